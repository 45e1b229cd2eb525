"""Training samples: addressable, made of the text alone, and as tensors."""
import random
from collections import Counter

import numpy as np
import pytest
import torch

from data.prepare import Shard, write_shards
from data.batches import collate
from data.samples import BLANK, KINDS, Case, Query, Samples, fact_query
from data.tokenizer import Tokenizer
from test_tokenizer import write_tokenizer

MIX = dict.fromkeys(KINDS, 2) | {"continue": 1}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def shard(tok, tmp_path_factory):
    documents = []
    for i in range(400):
        text = f"Thing {i} was made in {1800 + i} by Anna Berg. "
        text += "It is a remarkable object indeed, they say. " * (i % 7)
        about = f"thing number {i}" if i % 3 else ""
        documents.append({"title": f"T{i}", "about": about, "text": text})
    folder = tmp_path_factory.mktemp("shards")
    write_shards(documents, tok, folder)
    return Shard(folder, "train", tok)


class OneDocument:
    """A shard of one document without a description."""
    docs = [{"about": ""}]

    def __init__(self, ids):
        self.ids = np.array(ids)

    def __len__(self):
        return 1

    def tokens(self, i):
        return self.ids


def document_of(case: Case) -> list[int]:
    return case.context[case.n_protect:]


def answer_of(tok, query: Query) -> str:
    return tok.decode(query.answer).removesuffix("<|eot_id|>")


def test_samples_are_addressable(shard, tok):
    stream = Samples([shard], tok, 700, MIX, n_answer=24)
    assert stream(5) == stream(5) != stream(6)
    again = Samples([shard], tok, 700, MIX, n_answer=24)
    assert again(5) == stream(5)
    assert Samples([shard], tok, 700, MIX, n_answer=24, seed=1)(5) != stream(5)


def test_queries_are_made_of_the_text(shard, tok):
    stream = Samples([shard], tok, 700, MIX, n_answer=24)
    titles = {d["about"]: d["title"] for d in shard.docs}
    count = Counter()
    for case in map(stream, range(40)):
        assert case.context[:case.n_protect] == tok.header and case.n == 700
        text = tok.decode(document_of(case))
        for query in case.queries:
            count[query.kind] += 1
            prompt = tok.decode(query.prompt)
            answer = answer_of(tok, query)
            if query.kind == "continue":
                assert len(query.prompt) == 1 and len(query.answer) == 23
            elif query.kind == "recite":
                assert answer in text and '"' in prompt
                assert len(query.answer) == 24 or text.endswith(answer)
            elif query.kind == "cloze":
                assert answer in text and BLANK in prompt
            elif query.kind == "fact":
                assert answer in text
            elif query.kind == "title":  # the article was not pushed out by a fact
                number = int(titles[answer][1:])
                assert f"Thing {number} was made in {1800 + number} by Anna Berg." in text
    assert count.keys() == set(KINDS) and 40 < count["fact"] <= 80


@pytest.mark.parametrize("n", [109, 330, 4000])
def test_windows_of_a_long_document_start_anywhere(tok, n):
    """Whether the document is little or much longer than a window of 100 tokens."""
    stream = Samples([OneDocument(range(n))], tok, 80, {"continue": 1}, n_answer=20)
    starts = Counter()
    for case in map(stream, range(600)):
        ids = document_of(case) + case.queries[0].prompt + case.queries[0].answer
        assert ids == [*range(ids[0], ids[0] + 100)] and ids[-1] < n
        starts[4 * ids[0] // (n - 99)] += 1
    assert len(starts) == 4 and min(starts.values()) > 100


def test_a_fact_that_is_cut_off_is_not_asked_for(tok):
    """Unless it stands at an end, the only place between two sentences is at the end
    of the context."""
    late = OneDocument(tok.encode("x" * 79 + ". " + "y" * 19))
    stream = Samples([late], tok, 80, {"fact": 1}, n_answer=20)
    kinds = Counter()
    for case in map(stream, range(40)):
        assert case.n == 80
        kinds[case.queries[0].kind] += 1
    assert kinds.keys() == {"continue", "fact"} and kinds["continue"] > 10


def test_a_quarter_of_the_questions_is_about_each_end(tok):
    text = " ".join(f"The Old Mill number {i} was built by Ada." for i in range(40))
    stream = Samples(
        [OneDocument(tok.encode(text))], tok, 600, {"recite": 1, "cloze": 1, "fact": 1},
        n_answer=24)
    places = Counter()
    for case in map(stream, range(200)):
        text = tok.decode(document_of(case))
        for query in case.queries:
            prompt, answer = tok.decode(query.prompt), answer_of(tok, query)
            if query.kind == "recite":
                places["recite", "first"] += text.lstrip().startswith(answer)
                places["recite", "last"] += text.index(answer) > len(text) - 5 * 24
            elif query.kind == "cloze":
                question = prompt.split("text: ")[1].split("<")[0]
                before, after = question.split(BLANK)
                last_sentences = text[-110:]  # a cut one may follow
                places["cloze", "last"] += (before + answer + after).strip() in last_sentences
            elif query.kind == "fact":
                places["fact", "first"] += answer in text[:70]
                places["fact", "last"] += answer in text[-70:]
    assert len(places) == 5 and all(30 < count < 80 for count in places.values()), places


def test_facts_answer_their_questions(tok):
    rng = random.Random(0)
    sentences = set()
    for _ in range(200):
        sentence, query = fact_query(rng, tok)
        sentences.add(sentence)
        answer = answer_of(tok, query)
        assert answer in sentence and answer not in tok.decode(query.prompt)
        assert "{" not in sentence
    assert len(sentences) > 190


def test_title_queries_without_descriptions_give_their_places_away(tok, capsys):
    text = "The Old Mill was built by Ada in the spring of that year. " * 20
    plain = OneDocument(tok.encode(text))
    mix = {"continue": 1, "recite": 1, "title": 3, "cloze": 1}
    stream = Samples([plain], tok, 400, mix, n_answer=20)
    for case in map(stream, range(5)):
        kinds = Counter(query.kind for query in case.queries)
        assert kinds == {"continue": 1, "recite": 3, "cloze": 2}
    said = capsys.readouterr().err
    assert said.count("a context are continue 1, recite 3, cloze 2") == 1
    assert mix["title"] == 3  # the caller's mix is not changed


def test_a_context_is_repeated_once_where_there_are_no_titles(tok):
    plain = OneDocument(tok.encode("The Old Mill was built by Ada in the spring. " * 40))
    mix = {"replay": 1, "continue": 1, "cloze": 1, "title": 2}
    for case in map(Samples([plain], tok, 400, mix, n_answer=20), range(5)):
        kinds = Counter(query.kind for query in case.queries)
        assert kinds == {"replay": 1, "continue": 1, "cloze": 3}


def test_title_queries_stay_where_one_source_has_descriptions(tok, shard, capsys):
    plain = OneDocument(tok.encode("The Old Mill was built by Ada. " * 40))
    stream = Samples([plain, shard], tok, 400, {"title": 2}, n_answer=20)
    assert "title" in {q.kind for i in range(20) for q in stream(i).queries}
    assert capsys.readouterr().err == ""


def test_a_context_always_has_a_query(tok):
    """There is no sentence to ask for, but the text goes on."""
    stream = Samples([OneDocument(tok.encode("x " * 400))], tok, 100, {"cloze": 1}, n_answer=16)
    assert [query.kind for query in stream(0).queries] == ["continue"]


def test_every_doubling_of_the_length_is_as_likely(tok):
    stream = Samples(
        [OneDocument(range(4000))], tok, 400, {"continue": 1}, n_answer=20, seed=3, min_context=100,
    )
    lengths = [stream(i).n for i in range(300)]
    assert 100 <= min(lengths) < 105 and 390 < max(lengths) <= 400
    assert 120 < sum(n < 200 for n in lengths) < 180


def test_collate_by_hand():
    a = Case([1, 2, 3], 1, [Query("recite", [4, 5], [6])])
    b = Case([1, 2], 2, [Query("cloze", [7], [8]), Query("title", [9, 10], [11, 12])])
    batch = collate([a, b])
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 2, 0]]
    assert batch.lengths.tolist() == [3, 2]
    assert batch.protect.tolist() == [[True, False, False], [True, True, False]]
    assert batch.continuation.tolist() == [[4, 5, 6, 0, 0, 0], [7, 8, 9, 10, 11, 12]]
    assert batch.segments.tolist() == [[0, 0, 0, -1, -1, -1], [0, 0, 1, 1, 1, 1]]

    # A prediction is made one token before what it predicts.
    answers = torch.tensor([[0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]]).bool()
    assert torch.equal(batch.answers, answers) and torch.equal(batch.supervised, answers)

    # The words of a question count, too, but nothing is predicted across two queries.
    batch = collate([a, b], prompts=True)
    assert torch.equal(batch.answers, answers)
    assert batch.supervised.int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0]]


def test_a_recite_query_without_blanks_does_not_give_its_answer_away(tok):
    text = "灯塔建在岛上，守塔人每晚点灯。船只远远就能看见它的光。" * 4
    stream = Samples([OneDocument(tok.encode(text))], tok, 300, {"recite": 1}, n_answer=24)
    asked = [query for case in map(stream, range(20)) for query in case.queries
             if query.kind == "recite"]
    assert asked
    for query in asked:
        cue = tok.decode(query.prompt).split('"')[1]
        assert "\ufffd" not in cue
        assert 0 < len(tok.encode(cue)) <= 12  # half of the answer's tokens
