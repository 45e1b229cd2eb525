"""Metrics by hand and against their reference packages; the cases of every task."""
import json
import random
import re
from collections import Counter

import pytest
from rouge_score.rouge_scorer import RougeScorer
from transformers.data.metrics import squad_metrics

from data.samples import Case
from data.tasks import (
    N_NEEDLES, SPLITS, choice, contains, cost, ends, essays, exact_match, f1, fidelity, niah, normalize, rouge_l, spread,
    squad, squad_answers, string_match_all, summary, windows,
)
from data.tokenizer import Tokenizer
from run.errors import BadInput
from test_tokenizer import write_tokenizer


@pytest.fixture
def tok(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path / "tok"))


def text_of(tok, case: Case) -> str:
    return tok.decode(case.context[case.n_protect:])


# ------------------------------------------------------------------ metrics

def test_squad_metrics_by_hand():
    assert normalize(" The  Cat's, hat! ") == "cats hat"
    assert exact_match("the Cat", ["a dog", "cat."]) == 1
    assert exact_match("cats", ["cat"]) == 0
    assert f1("the cat sat", ["cat"]) == 2 / 3  # precision 1/2, recall 1
    assert f1("in 1817", ["1817", "year 1817"]) == 2 / 3
    assert f1("b b", ["b"]) == 2 / 3  # only one b counts
    assert contains("It was built in 1817, they say.", ["1817"]) == 1
    assert contains("18170", ["1817"]) == 0
    assert contains("new york", ["New York City", "York"]) == 1
    for metric in (exact_match, f1, contains):
        assert metric("", ["x"]) == 0
    # The script of v1.1 compares what is left after an article is removed.
    assert exact_match("", ["the"]) == 1
    assert f1("", ["the"]) == contains("", ["the"]) == 0


def test_squad_metrics_equal_the_reference():
    rng = random.Random(0)
    words = ["The", "cat", "sat,", "a", "mat.", "1,000", "an", "Old", "old", "cat's", "-"]
    for _ in range(300):
        a, b = (" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in "ab")
        assert exact_match(a, [b]) == squad_metrics.compute_exact(b, a), (a, b)
        if normalize(a) and normalize(b):  # v2's script counts two empty answers as right
            assert f1(a, [b]) == pytest.approx(squad_metrics.compute_f1(b, a)), (a, b)


def test_needle_metric_by_hand():
    assert string_match_all("It is 12345678.", ["1234567"]) == 1
    assert string_match_all("123456", ["1234567"]) == string_match_all("", ["7"]) == 0
    assert string_match_all("7 and Nine", ["7", "nine", "5"]) == 2 / 3


def test_rouge_by_hand_and_equal_to_the_reference():
    assert rouge_l("the cat sat", ["the cat ran"]) == 2 / 3
    assert rouge_l("a b c d", ["d c b a"]) == 0.25
    assert rouge_l("", ["x"]) == rouge_l("x", [""]) == 0
    assert rouge_l("x", ["y", "X!"]) == 1

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(0)
    words = "The bill, (H.R. 12) amends naïve law's part-time workers in 2019".split()
    for _ in range(100):
        a, b = (" ".join(rng.choices(words, k=rng.randint(0, 30))) for _ in "ab")
        want = scorer.score(b, a)["rougeL"].fmeasure
        assert rouge_l(a, [b]) == pytest.approx(want), (a, b)


# -------------------------------------------------------------------- cases

def squad_file(path, articles=3, paragraphs=4):
    """A file in SQuAD's layout: two questions per paragraph, and one without an answer."""
    data = []
    for a in range(articles):
        article = {"title": f"T{a}", "paragraphs": []}
        for p in range(paragraphs):
            qas = [{"question": "?", "answers": []}]
            for q in range(2):
                answer = {"text": f"Ada {q}"}
                question = f"Who built mill {a}-{p}-{q}?"
                qas.append({"question": question, "answers": [answer, answer]})
            context = f"Mill {a}-{p} stands here. Ada built it."
            article["paragraphs"].append({"context": context, "qas": qas})
        data.append(article)
    path.write_text(json.dumps({"data": data}))
    return path


def test_spread_takes_from_every_group_in_turn():
    drawn = spread([[1, 2, 3], [4], []], 3, random.Random(0), "numbers")
    assert [len(group) for group in drawn] == [2, 1, 0] and set(drawn[0]) < {1, 2, 3}
    drawn = spread([[1, 2], [3]], 9, random.Random(0), "numbers")
    assert [sorted(group) for group in drawn] == [[1, 2], [3]]


def test_squad_packs_paragraphs_and_spreads_questions(tok, tmp_path, capsys):
    path = squad_file(tmp_path / "squad.json")
    cases = squad(tok, path, 12, 0, pack=2)
    assert [len(case.queries) for case in cases] == [2] * 6  # 12 questions, 6 documents
    assert [case.unit for case in cases] == ["T0", "T0", "T1", "T1", "T2", "T2"]
    assert text_of(tok, cases[1]) == (
        "Mill 0-2 stands here. Ada built it.\n\nMill 0-3 stands here. Ada built it."
    )
    for case in cases:
        for query in case.queries:
            prompt = tok.decode(query.prompt)
            asked = prompt.split("mill ")[1].split("?")[0]
            assert prompt.endswith('The answer is "') and query.gold == [f"Ada {asked[4:]}"]
            assert f"Mill {asked[:3]}" in text_of(tok, case)

    assert squad(tok, path, 12, 0, pack=2) == cases != squad(tok, path, 12, 1, pack=2)
    assert sum(len(case.queries) for case in squad(tok, path, 999, 0)) == 24
    assert "there are only 24 questions, not 999" in capsys.readouterr().out


def test_squad_answers_fill_documents_of_a_given_length(tok, tmp_path):
    path = squad_file(tmp_path / "squad.json")
    one = len(tok.encode("Mill 0-2 stands here. Ada built it."))
    cases = squad_answers(tok, path, 6, 0, n_context=3 * one, split="all")
    assert len(cases) == 6
    assert {case.unit for case in cases} == {"squad/T0", "squad/T1", "squad/T2"}
    for case in cases:
        assert 2 * one < case.n <= 3 * one and text_of(tok, case).count("Mill") == 2
        for query in case.queries:
            assert query.kind == "squad"
            assert tok.decode(query.answer) == query.gold[0] + '"'


@pytest.fixture
def haystack(tmp_path):
    path = tmp_path / "hay.txt"
    path.write_text(" ".join(f"This is sentence {i} of many." for i in range(400)))
    return path


def test_needles_lie_where_they_should(tok, haystack):
    cases = niah(tok, haystack, 12, 0, [2000, 4000], [0.0, 0.5, 1.0])
    assert len(cases) == 16  # as many for each of the grid's eight cells
    kinds = [case.queries[0].kind for case in cases]
    assert kinds[:3] == ["single/2000/0.0", "single/2000/0.5", "single/2000/1.0"]

    seen = set()
    for case in cases:
        text = text_of(tok, case)
        kind, length, _ = case.queries[0].kind.split("/")
        n_needles = 1 if kind == "single" else N_NEEDLES
        assert len(case.queries) == n_needles == text.count("One of the special")
        assert text.startswith("Some special magic") and abs(case.n - int(length)) <= 30
        for query in case.queries:
            value, = query.gold
            prompt = tok.decode(query.prompt)
            key = prompt.split(" number for ")[1].split(" mentioned")[0]
            assert prompt.endswith(f"for {key} mentioned in the provided text is")
            assert f"One of the special magic numbers for {key} is: {value}." in text
            depth = float(query.kind.split("/")[2])
            # The introduction, the needle and a sentence move it a little.
            assert kind == "multi" or abs(text.index(value) / len(text) - depth) < 0.12
            seen.add((key, value))
    assert len(seen) == sum(len(case.queries) for case in cases)
    assert niah(tok, haystack, 12, 0, [2000, 4000], [0.0, 0.5, 1.0]) == cases


def test_haystacks_of_the_wrong_length_are_refused(tok, haystack):
    with pytest.raises(BadInput, match="introduction and needles alone take"):
        niah(tok, haystack, 1, 0, [200], [0.5])
    for build in (
        lambda: niah(tok, haystack, 1, 0, [99999], [0.5]),
        lambda: cost(tok, haystack, 1, [99999]),
    ):
        with pytest.raises(BadInput, match="tokens, 99999 are asked for"):
            build()


def test_summary_reads_both_layouts(tok, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(
        '{"report": "Long text.", "summary": "Short."}\n\n'
        '{"document": "Another.", "summary": "It."}\n'
    )
    found = {text_of(tok, case): case.queries[0].gold for case in summary(tok, path, 2, 0)}
    assert found == {"Another.": ["It."], "Long text.": ["Short."]}


def test_choice_reads_both_layouts(tok, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"document": "D1", "question": "Q1?", "options": ["x", "y"], "answer": 1}\n'
        '{"document": "D1", "question": "Q2?", "options": ["x", "y"], "answer": "x"}\n'
        '{"article": "D2", "questions": [{"question": "Q3?", "options": ["u", "v", "w"], '
        '"gold_label": 3}]}\n'
    )
    cases = choice(tok, path, 3, 0)
    assert [text_of(tok, case) for case in cases] == ["D1", "D2"]
    queries = [query for case in cases for query in case.queries]
    prompts = [tok.decode(query.prompt) for query in queries]
    found = {p.split("?")[0].strip(): q.gold for p, q in zip(prompts, queries)}
    assert found == {"Q1": ["y"], "Q2": ["x"], "Q3": ["w"]}
    assert "- u\n- v\n- w" in prompts[2]


# Values in the place of SQuAD's "data"
BAD_SQUAD = [
    None, 5, {}, [5], [], [{"title": "a"}], [{"title": "a", "paragraphs": 5}],
    [{"title": 5, "paragraphs": []}],
    [{"title": "a", "paragraphs": [{"context": None, "qas": []}]}],
    [{"title": "a", "paragraphs": [{"context": " ", "qas": []}]}],
    [{"title": "a", "paragraphs": [{"context": "x", "qas": {"a": 1}}]}],
    [{"title": "a", "paragraphs": [{"context": "x", "qas": [
        {"question": 5, "answers": []}]}]}],
    [{"title": "a", "paragraphs": [{"context": "x", "qas": [
        {"question": "q", "answers": {"text": "y"}}]}]}],
    [{"title": "a", "paragraphs": [{"context": "x", "qas": [
        {"question": "q", "answers": [{"text": " "}]}]}]}],
]
# Lines for the task choice, beside a document and a question
BAD_CHOICE = [
    {}, {"questions": None}, {"questions": []}, {"options": ["y"]}, {"options": ["y", "y"]},
    {"options": ["y", " "]}, {"options": ["y" * 5000, 3]}, {"options": ["y", "z"]},
    {"options": ["y", "z"], "answer": 2}, {"options": ["y", "z"], "answer": ["y"]},
    {"options": ["y", "z"], "gold_label": True},
]
BAD_SUMMARY = [
    "", "5", "[1]", '{"x": NaN}', '{"document": "\\ud800", "summary": "y"}',
    '{"document": "x", "summary": "y"}\n{', '{"text": "x", "summary": "y"}',
    '{"document": 5, "summary": "y"}', '{"document": "x"}', "[" * 10 ** 5,
]


@pytest.mark.parametrize("build, text", [
    *[(squad, json.dumps({"data": data})) for data in BAD_SQUAD],
    *[(squad, text) for text in ("{", "{}", "[]", '{"data": 1e999}', "[" * 10 ** 5)],
    *[(choice, json.dumps({"document": "x", "question": "q"} | line)) for line in BAD_CHOICE],
    *[(summary, text) for text in BAD_SUMMARY],
])
def test_broken_data_is_refused_in_one_line(tok, tmp_path, build, text):
    path = tmp_path / "broken"
    path.write_text(text)
    with pytest.raises(BadInput, match=f"^{path}") as error:
        build(tok, path, 5, 0)
    assert "\n" not in str(error.value)


def test_a_broken_line_is_named(tok, tmp_path):
    path = tmp_path / "broken"
    path.write_text('{"document": "x", "summary": "y"}\n{"text": "x", "summary": "y"}')
    with pytest.raises(BadInput, match=":2: no text under document or report"):
        summary(tok, path, 5, 0)


def test_what_is_no_text_is_refused(tok, tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\x00")
    for path in (tmp_path / "x", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="expected UTF-8 text"):
            niah(tok, path, 1, 0, [200], [0.5])


def test_fidelity_has_enough_documents_of_every_kind(tok, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(300):
        text = f"Text {i} says that the Old Mill was built in {1500 + i} by Ada. " * 12
        (texts / f"{i}.txt").write_text(text)
    squad_path = squad_file(tmp_path / "squad.json")
    cases = fidelity(tok, 5, 0, 300, str(texts), tmp_path / "shards", squad_path)

    count = Counter(kind for case in cases for kind in {q.kind for q in case.queries})
    assert count == {"continue": 5, "recite": 5, "cloze": 5, "squad": 5}  # no descriptions
    assert all(case.n <= 300 for case in cases)
    assert all(q.prompt and q.answer for case in cases for q in case.queries)
    assert fidelity(tok, 5, 0, 300, str(texts), tmp_path / "shards")[0] == cases[0]


def test_both_halves_of_the_held_out_texts_are_apart(tok, tmp_path):
    """In fidelity, at the ends, of SQuAD's articles, and of a single document."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(400):
        (texts / f"{i}.txt").write_text(f"Text {i} says that the Old Mill was built by Ada. " * 12)
    squad_path = squad_file(tmp_path / "squad.json", articles=6)
    one = tmp_path / "one.txt"
    one.write_text(" ".join(f"Sentence {i} is about Ada." for i in range(4000)))

    def documents(cases):
        return {text_of(tok, case) for case in cases}

    def seen(split, source):
        where = {"sources": str(source), "shards": tmp_path / "shards", "split": split}
        return documents(fidelity(tok, 5, 0, 300, **where) + ends(tok, 5, 0, 300, **where))

    for source in (texts, one):
        dev, test = [
            {word for text in seen(split, source) for word in re.findall(r"(?:Text|ence) \d+ (?:says|is)", text)}
            for split in ("dev", "test")]
        assert dev and test and not dev & test

    asked = {split: squad(tok, squad_path, 100, 0, split=split) for split in SPLITS}
    dev, test = documents(asked["dev"]), documents(asked["test"])
    assert dev and test and not dev & test and dev | test == documents(asked["all"])


@pytest.mark.weights
def test_essays_are_halved():
    dev, test = essays("dev"), essays("test")
    assert len(dev) > 20 and len(test) > 20 and not set(dev) & set(test)
    assert sorted(dev + test) == sorted(essays())


def test_ends_ask_about_the_first_and_the_last_sentence(tok, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(300):
        text = f"Text {i} says that the Old Mill was built in {1500 + i} by Ada. " * 12
        (texts / f"{i}.txt").write_text(text)
    cases = ends(tok, 4, 0, 300, str(texts), tmp_path / "shards")
    count = Counter(query.kind for case in cases for query in case.queries)
    assert count == {"fact/first": 4, "fact/last": 4, "recite/first": 4, "recite/last": 4}
    for case in cases:
        assert case.n == 300
        text = text_of(tok, case)
        for query in case.queries:
            answer = tok.decode(query.answer).removesuffix("<|eot_id|>")
            kind, place = query.kind.split("/")
            near = text[:120] if place == "first" else text[-170:]
            assert answer in near, (query.kind, answer, near)
            assert kind == "fact" or place == "first" or text.endswith(answer) or len(answer) >= 32
    with pytest.raises(BadInput, match="no room for two made-up sentences"):
        ends(tok, 4, 0, 24, str(texts), tmp_path / "shards")


def documents(*lengths):
    """Articles of given lengths; token i of document d is 1000·d + i."""
    return [
        ({"title": str(d), "about": "x", "n": n}, [1000 * d + i for i in range(n)])
        for d, n in enumerate(lengths)]


def test_windows_do_not_overlap_and_know_the_articles_in_them():
    lengths = (10, 30, 900, 25, 40, 5, 20, 800)
    found = windows(documents(*lengths), [-1], random.Random(0), 60, 10)
    assert all(len(ids) == 60 and len(after) == 10 for _, ids, after, _ in found)
    seen = [i for _, ids, _, _ in found for i in ids if i >= 0]
    assert len(seen) == len(set(seen))

    units = Counter(unit for unit, *_ in found)
    assert units["2"] == 14 and units["7"] == 13  # the two long ones
    for unit, ids, after, articles in found:
        if unit in "27":
            assert after == [*range(ids[-1] + 1, ids[-1] + 11)] and not articles
        else:
            ends = [(1000 * d, 1000 * d + n - 1) for d, n in enumerate(lengths)]
            inside = [str(d) for d, (a, b) in enumerate(ends) if a in ids and b in ids]
            assert sorted(d["title"] for d in articles) == inside


def test_cost_has_one_document_per_length_and_repeat(tok, haystack):
    cases = cost(tok, haystack, 2, [64, 128])
    assert [case.n for case in cases] == [64, 64, 128, 128]
    assert [case.queries[0].kind for case in cases] == ["64", "64", "128", "128"]
