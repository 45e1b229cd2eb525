"""Metrics on hand-worked cases and against their reference packages; documents and questions of every task."""
import json
import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from transformers.data.metrics import squad_metrics

from run.errors import BadInput
from data.samples import Case, Query
from data.tasks import (N_KEYS, choice, contains, cost, exact_match, f1, fidelity, niah, normalize, rouge_l, spread,
                        squad, squad_answers, string_match_all, summary, windows)
from data.tokenizer import Tokenizer
from test_tokenizer import write_tokenizer


@pytest.fixture
def tok(tmp_path):
    (tmp_path / "tok").mkdir()
    return Tokenizer(write_tokenizer(tmp_path / "tok"))


# metrics ------------------------------------------------------------------------------------------------------------

def test_squad_metrics_by_hand():
    assert normalize(" The  Cat's, hat! ") == "cats hat"
    assert exact_match("the Cat", ["a dog", "cat."]) == 1 and exact_match("cats", ["cat"]) == 0
    assert f1("the cat sat", ["cat"]) == 2 / 3                       # precision 1/2, recall 1
    assert f1("in 1817", ["1817", "year 1817"]) == 2 / 3
    assert f1("b b a", ["b"]) == f1("b b", ["b"]) == 2 / 3           # "a" is an article; only one b counts
    assert contains("It was built in 1817, they say.", ["1817"]) == 1 and contains("18170", ["1817"]) == 0
    assert contains("new york", ["New York City", "York"]) == 1
    for metric in (exact_match, f1, contains):
        assert metric("", ["x"]) == 0
    assert exact_match("", ["the"]) == 1 and f1("", ["the"]) == contains("", ["the"]) == 0, "as the v1.1 script has it"


def test_squad_metrics_equal_the_reference():
    rng = random.Random(0)
    words = ["The", "cat", "sat,", "a", "mat.", "1,000", "an", "Old", "old", "cat's", "-"]
    for _ in range(300):
        a, b = (" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in "ab")
        assert exact_match(a, [b]) == squad_metrics.compute_exact(b, a), (a, b)
        if normalize(a) and normalize(b):  # v2's script, which transformers has, counts two empty answers as right
            assert f1(a, [b]) == pytest.approx(squad_metrics.compute_f1(b, a)), (a, b)


def test_needle_metric_by_hand():
    assert string_match_all("It is 1234567.", ["1234567"]) == 1 and string_match_all("12345678", ["1234567"]) == 1
    assert string_match_all("123456", ["1234567"]) == 0 == string_match_all("", ["7"])
    assert string_match_all("7 and Nine", ["7", "nine", "5"]) == 2 / 3


def test_rouge_by_hand_and_equal_to_the_reference():
    assert rouge_l("the cat sat", ["the cat ran"]) == 2 / 3
    assert rouge_l("a b c d", ["d c b a"]) == 0.25 and rouge_l("b d", ["a b c d"]) == 2 / 3
    assert rouge_l("", ["x"]) == rouge_l("x", [""]) == 0 and rouge_l("x", ["y", "X!"]) == 1
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(0)
    words = "The bill, (H.R. 12) amends naïve law's part-time workers in 2019".split()
    for _ in range(100):
        a, b = (" ".join(rng.choices(words, k=rng.randint(0, 30))) for _ in "ab")
        assert rouge_l(a, [b]) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure), (a, b)


# documents and questions --------------------------------------------------------------------------------------------

def squad_file(path, articles=3, paragraphs=4):
    def paragraph(a, p):
        qas = [{"question": f"Who built mill {a}-{p}-{q}?", "answers": [{"text": f"Ada {q}"}, {"text": f"Ada {q}"}]}
               for q in range(2)]
        return {"context": f"Mill {a}-{p} stands here. Ada built it.", "qas": [*qas, {"question": "?", "answers": []}]}
    data = [{"title": f"T{a}", "paragraphs": [paragraph(a, p) for p in range(paragraphs)]} for a in range(articles)]
    path.write_text(json.dumps({"data": data}))
    return path


def text_of(tok, case: Case) -> str:
    return tok.decode(case.context[case.n_protect:])


def test_squad_packs_paragraphs_and_spreads_questions(tok, tmp_path, capsys):
    path = squad_file(tmp_path / "squad.json")
    cases = squad(tok, path, 12, 0, pack=2)
    assert [len(c.queries) for c in cases] == [2] * 6, "twelve questions over six documents"
    assert [c.unit for c in cases] == ["T0/0", "T0/1", "T1/2", "T1/3", "T2/4", "T2/5"]
    assert text_of(tok, cases[1]) == "Mill 0-2 stands here. Ada built it.\n\nMill 0-3 stands here. Ada built it."
    for c in cases:
        for q in c.queries:
            asked = tok.decode(q.prompt).split("mill ")[1].split("?")[0]
            assert tok.decode(q.prompt).endswith('The answer is "')
            assert f"Mill {asked[:3]}" in text_of(tok, c) and q.gold == [f"Ada {asked[4:]}"]
    assert squad(tok, path, 12, 0, pack=2) == cases != squad(tok, path, 12, 1, pack=2)
    assert sum(len(c.queries) for c in squad(tok, path, 999, 0)) == 24
    assert "--n 999 is more than there is: 24 questions" in capsys.readouterr().out


def test_squad_answers_fill_documents_of_a_given_length(tok, tmp_path):
    path = squad_file(tmp_path / "squad.json")
    one = len(tok.encode("Mill 0-2 stands here. Ada built it."))
    cases = squad_answers(tok, path, 6, 0, n_context=3 * one)
    assert len(cases) == 6 and {c.unit for c in cases} == {"squad/T0", "squad/T1", "squad/T2"}
    for c in cases:
        assert 2 * one < c.n <= 3 * one and text_of(tok, c).count("Mill") == 2
        assert all(q.kind == "squad" and tok.decode(q.answer) == q.gold[0] + '"' for q in c.queries)


def test_spread_takes_from_every_group_in_turn():
    parts = spread([[1, 2, 3], [4], []], 3, random.Random(0))
    assert [len(p) for p in parts] == [2, 1, 0] and set(parts[0]) < {1, 2, 3}
    assert [sorted(p) for p in spread([[1, 2], [3]], 9, random.Random(0))] == [[1, 2], [3]]


@pytest.fixture
def haystack(tmp_path):
    path = tmp_path / "hay.txt"
    path.write_text(" ".join(f"This is sentence {i} of many." for i in range(400)))
    return path


def test_needles_lie_where_they_should(tok, haystack):
    cases = niah(tok, haystack, 12, 0, [2000, 4000], [0.0, 0.5, 1.0])
    assert len(cases) == 16, "as many for each of eight fields"
    kinds = [c.queries[0].kind for c in cases]
    assert kinds[:3] == ["single/2000/0.0", "single/2000/0.5", "single/2000/1.0"] and "4000/0.0" in kinds[4]
    seen = set()
    for c in cases:
        text, (kind, length, _) = text_of(tok, c), c.queries[0].kind.split("/")
        assert text.startswith("Some special magic numbers") and abs(c.n - int(length)) <= 30
        assert len(c.queries) == (1 if kind == "single" else N_KEYS) == text.count("One of the special magic numbers")
        assert kind == "single" or [q.kind.split("/")[2] for q in c.queries].count("0.5") in (1, 2)
        for q in c.queries:
            value, = q.gold
            key = tok.decode(q.prompt).split(" number for ")[1].split(" mentioned")[0]
            assert f"One of the special magic numbers for {key} is: {value}." in text and len(value) == 7
            assert tok.decode(q.prompt).endswith(f"special magic number for {key} mentioned in the provided text is")
            share = text.index(value) / len(text)
            wanted = float(q.kind.split("/")[2])  # the introduction, the needle and a sentence move it a little
            assert kind == "multi" or abs(share - wanted) < 0.12, (share, wanted)
            seen.add((key, value))
    assert len(seen) == sum(len(c.queries) for c in cases), "new keys and values in every document"
    assert niah(tok, haystack, 12, 0, [2000, 4000], [0.0, 0.5, 1.0]) == cases
    with pytest.raises(BadInput, match="introduction and needles alone take"):
        niah(tok, haystack, 1, 0, [200], [0.5])
    with pytest.raises(BadInput, match="tokens, 99999 are asked for"):
        niah(tok, haystack, 1, 0, [99999], [0.5])


def test_summary_and_choice_read_their_layouts(tok, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"report": "Long text.", "summary": "Short."}\n\n{"document": "Another.", "summary": "It."}\n')
    cases = summary(tok, path, 2, 0)
    found = {text_of(tok, c): c.queries[0].gold for c in cases}
    assert found == {"Another.": ["It."], "Long text.": ["Short."]}
    path.write_text('{"document": "D1", "question": "Q1?", "options": ["x", "y"], "answer": 1}\n'
                    '{"document": "D1", "question": "Q2?", "options": ["x", "y"], "answer": "x"}\n'
                    '{"article": "D2", "questions": [{"question": "Q3?", "options": ["u", "v", "w"], '
                    '"gold_label": 3}]}\n')
    cases = choice(tok, path, 3, 0)
    assert [len(c.queries) for c in cases] == [2, 1] and [text_of(tok, c) for c in cases] == ["D1", "D2"]
    found = {tok.decode(q.prompt).split("?")[0].strip(): q for c in cases for q in c.queries}
    assert {k: q.gold for k, q in found.items()} == {"Q1": ["y"], "Q2": ["x"], "Q3": ["w"]}
    assert "- u\n- v\n- w" in tok.decode(found["Q3"].prompt)


@pytest.mark.parametrize("build, text, message", [
    (squad, "{", "broken: not valid JSON"), (squad, "{}", "'data'); expected SQuAD's layout"),
    (squad, '{"data": [{"title": "a", "paragraphs": [{"qas": []}]}]}', "article 1"),
    (squad, '{"data": []}', "no question with an answer"),
    (squad, '{"data": [{"title": "a", "paragraphs": [{"context": null, "qas": []}]}]}', "article 1"),
    (squad, '{"data": [{"title": "A", "paragraphs": [{"context": " ", "qas": []}]}]}',
     "article 1: a paragraph without text; expected SQuAD's layout"),
    (choice, '{"document": "x", "questions": null}', "questions is None"),
    (summary, "", "no line with an object"), (summary, '{"document": "x", "summary": "y"}\n{', ":2: not valid JSON"),
    (summary, '{"text": "x", "summary": "y"}', ":1: no text under 'document' or 'report'; it has ['text', 'summary']"),
    (summary, "[1]", ":1: [1] where dict was expected"),
    (choice, '{"document": "x", "question": "q", "options": ["y"]}', "two or more"),
    (choice, '{"document": "x", "question": "q", "options": ["y", "y"]}', "two or more different"),
    (choice, '{"document": "x", "question": "q", "options": ["y", " "]}', "two or more different"),
    (choice, '{"document": "x", "question": "q", "options": ["y", "z"], "gold_label": true}', ":1: answer is None"),
    (choice, '{"document": "x", "questions": []}', "no question in it"),
    (choice, "[" * 10 ** 5, ":1: not valid JSON (maximum recursion depth"),
    (squad, "[" * 10 ** 5, "broken: not valid JSON (maximum recursion depth"),
    # of the wrong type, wherever
    *[(squad, json.dumps({"data": x}), "expected SQuAD's layout") for x in (
        None, 5, {}, "x", [5], ["x"], [{"title": "a"}], [{"title": "a", "paragraphs": 5}],
        [{"title": 5, "paragraphs": []}], [{"title": "a", "paragraphs": [{"context": "x", "qas": {"a": 1}}]}],
        [{"title": "a", "paragraphs": [{"context": "x", "qas": [{"question": 5, "answers": []}]}]}],
        [{"title": "a", "paragraphs": [{"context": "x", "qas": [{"question": "q", "answers": {"text": "y"}}]}]}],
        [{"title": "a", "paragraphs": [{"context": "x", "qas": [{"question": "q", "answers": [{"text": ["y"]}]}]}]}])],
    *[(squad, x, "broken: ") for x in ('{"data": 1e999}', '{"data": "\\ud800"}', "[]", "null", '{"a": NaN}')],
    *[(summary, x, ":1: ") for x in ("5", "null", '{"x": NaN}', '{"x": ' + "9" * 5000 + "}",
                                                   '{"document": "\\ud800", "summary": "y"}')],
    (summary, '{"document": 5, "summary": "y"}', "no text under"), (summary, '{"document": "x"}', "no text under"),
    (choice, json.dumps({"document": "x", "question": "q", "options": ["y" * 5000, 3]}), "two or more different"),
    (choice, json.dumps({"document": "x", "question": "q", "options": ["y", "z"], "answer": ["y"]}), "answer is ['y']"),

    (squad, '{"data": [{"title": "a", "paragraphs": [{"context": "x", "qas": [{"question": "q", "answers": '
            '[{"text": " "}]}, {"question": "", "answers": [{"text": "y"}]}]}]}]}', "no question with an answer"),
    (choice, '{"document": "x", "question": "q", "options": ["y", "z"], "answer": 2}', ":1: answer is 2"),
])
def test_broken_data_is_refused_with_its_place(tok, tmp_path, build, text, message):
    path = tmp_path / "broken"
    path.write_text(text)
    with pytest.raises(BadInput, match="broken") as e:
        build(tok, path, 5, 0)
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 1000


def test_what_is_no_text_is_refused(tok, tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\x00")
    for path in (tmp_path / "x", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="expected UTF-8 text"):
            niah(tok, path, 1, 0, [200], [0.5])


def test_fidelity_has_enough_documents_of_every_kind(tok, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(300):
        (texts / f"{i}.txt").write_text(f"Text {i} says that the Old Mill was built in {1500 + i} by Ada. " * 12)
    cases = fidelity(tok, 5, 0, 300, str(texts), tmp_path / "shards", squad_file(tmp_path / "squad.json"))
    count = {}
    for c in cases:
        for kind in {q.kind for q in c.queries}:
            count[kind] = count.get(kind, 0) + 1
        assert all(q.answer and q.prompt for q in c.queries) and c.n <= 300
    assert count == {"continue": 5, "recite": 5, "cloze": 5, "squad": 5}, "plain texts have no titles to ask for"
    assert "'title': 0 documents" not in capsys.readouterr().out
    assert fidelity(tok, 5, 0, 300, str(texts), tmp_path / "shards")[0] == cases[0]


class Documents:
    """A shard of given documents; token i of document d is 1000·d + i."""
    def __init__(self, *lengths):
        self.docs = [{"title": str(d), "about": "x", "n": n} for d, n in enumerate(lengths)]

    def __len__(self):
        return len(self.docs)

    def tokens(self, i):
        return np.arange(self.docs[i]["n"]) + 1000 * i


def test_windows_do_not_overlap_and_know_the_articles_in_them():
    found = windows(Documents(10, 30, 900, 25, 40, 5, 20, 800), [-1], random.Random(0), 60, 10)
    seen = [t for _, ids, _, _ in found for t in ids if t >= 0]
    assert len(seen) == len(set(seen)) and all(len(ids) == 60 and len(after) == 10 for _, ids, after, _ in found)
    long = [f for f in found if f[0] in "27"]
    assert len(long) == 14 + 13 and {f[0] for f in found[:2]} <= {"2", "7", "window 0", "window 1", "window 2"}
    for unit, ids, after, articles in found:
        inside = [d for d, n in ((0, 10), (1, 30), (3, 25), (4, 40), (5, 5), (6, 20))
                  if 1000 * d in ids and 1000 * d + n - 1 in ids]
        assert sorted(int(d["title"]) for d in articles) == inside
        if unit in "27":
            assert after == list(range(ids[-1] + 1, ids[-1] + 11))


def test_cost_has_one_document_per_length_and_repeat(tok, haystack):
    cases = cost(tok, haystack, 2, [64, 128])
    assert [c.n for c in cases] == [64, 64, 128, 128]
    assert [c.queries[0].kind for c in cases] == ["64", "64", "128", "128"]
    assert isinstance(cases[0].queries[0], Query)
