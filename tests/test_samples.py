"""Training samples: addressable, made of the text alone, and as tensors."""
import random
from collections import Counter

import numpy as np
import pytest
import torch

from data.prepare import Shard, write_shards
from data.samples import BLANK, FACTS, KINDS, Case, Query, Samples, collate, fact
from data.tokenizer import Tokenizer
from test_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def shard(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards([{"title": f"T{i}", "about": f"thing number {i}" if i % 3 else "",
                   "text": f"Thing {i} was made in {1800 + i} by Anna Berg. "
                           + "It is a remarkable object indeed, they say. " * (i % 7)} for i in range(400)],
                 tok, folder)
    return Shard(folder, "train", tok)


def test_samples_are_addressable_and_made_of_the_text(shard, tok):
    stream = Samples([shard], tok, 700, {k: 2 for k in KINDS}, n_answer=24)
    assert stream(5) == stream(5) != stream(6)
    seen = set()
    for i in range(20):
        c = stream(i)
        assert c.context[:c.n_protect] == tok.header and c.n == 700 and c.n_protect == len(tok.header) > 1
        text = tok.decode(c.context[c.n_protect:])
        for q in c.queries:
            seen.add(q.kind)
            prompt, answer = tok.decode(q.prompt), tok.decode(q.answer)
            if q.kind == "continue":
                assert len(q.prompt) == 1 and len(q.answer) == 23
            if q.kind == "recite":
                assert answer in text and '"' in prompt and len(q.answer) == 24
            if q.kind == "cloze":
                assert answer.removesuffix("<|eot_id|>") in text and BLANK in prompt
            if q.kind == "title":
                assert answer.startswith("thing number") and answer.endswith("<|eot_id|>")
            if q.kind == "fact":
                assert answer.removesuffix("<|eot_id|>") in text
    assert seen == set(KINDS)


class Numbers:
    """A shard of one document, whose token i is i."""
    docs = [{"about": ""}]

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return 1

    def tokens(self, i):
        return np.arange(self.n)


@pytest.mark.parametrize("n", [109, 330, 4000])
def test_windows_of_a_long_document_start_anywhere(tok, n):
    """Whether it is nine tokens longer than a window of 100, or forty times: every start is as likely, the last too."""
    stream = Samples([Numbers(n)], tok, 80, {"continue": 1}, n_answer=20)
    cases = [stream(i) for i in range(600)]
    starts = Counter(c.context[c.n_protect] for c in cases)
    for c in cases:
        ids = c.context[c.n_protect:] + c.queries[0].prompt + c.queries[0].answer
        assert ids == [*range(ids[0], ids[0] + 100)] and ids[-1] < n
    quarter = Counter(4 * s // (n - 99) for s in starts.elements())
    assert min(quarter.values()) > 100 and len(quarter) == 4
    assert n > 200 or sorted(starts) == [*range(10)]


def test_facts_stand_in_the_text_and_are_asked_for(shard, tok):
    stream = Samples([shard], tok, 700, {"fact": 2, "title": 1}, n_answer=24)
    count, titles = 0, {d["about"]: d["title"] for d in shard.docs}
    for i in range(40):
        c = stream(i)
        text = tok.decode(c.context[c.n_protect:])
        assert c.n == 700
        for q in c.queries:
            prompt, answer = tok.decode(q.prompt), tok.decode(q.answer).removesuffix("<|eot_id|>")
            if q.kind == "fact":
                count += 1
                assert answer in text and "magic" not in prompt
            if q.kind == "title":  # what the facts pushed out at the end is not asked for either
                assert f"Thing {titles[answer][1:]} was made in {1800 + int(titles[answer][1:])} by Anna Berg." in text
        other = Samples([shard], tok, 700, {"continue": 1}, n_answer=24)
        assert other(i).n == 700
    assert 40 < count <= 80


def test_a_fact_that_is_cut_off_is_not_asked_for(tok):
    """It goes between two sentences; where the only such place is the context's last token, it is cut off."""
    class Late(Numbers):
        def tokens(self, i):
            return np.array(tok.encode("x" * 79 + ". " + "y" * 19))
    stream = Samples([Late(0)], tok, 80, {"fact": 1}, n_answer=20)
    assert [q.kind for q in stream(0).queries] == ["continue"] and stream(0).n == 80


def test_facts_answer_their_questions(tok):
    """The answer is in the sentence, and not in the question."""
    rng, sentences = random.Random(0), set()
    for _ in range(200):
        sentence, q = fact(rng, tok)
        sentences.add(sentence)
        answer = tok.decode(q.answer).removesuffix("<|eot_id|>")
        assert answer in sentence and answer not in tok.decode(q.prompt) and "{" not in sentence
    assert len(sentences) > 190 and len(FACTS) > 4


def test_a_context_always_has_a_query(tok, tmp_path):
    """Documents without titles or sentences cannot be asked about; the text going on is what is left."""
    write_shards([{"title": str(i), "about": "", "text": "x " * 400} for i in range(99)], tok, tmp_path)
    stream = Samples([Shard(tmp_path, "train", tok)], tok, 100, {"title": 1, "cloze": 1}, n_answer=16)
    assert [q.kind for q in stream(0).queries] == ["continue"]


def test_collate_by_hand():
    """Rows are padded; a prediction is made one token before what it predicts."""
    a = Case([1, 2, 3], 1, [Query("recite", [4, 5], [6])])
    b = Case([1, 2], 2, [Query("cloze", [7], [8]), Query("title", [9, 10], [11, 12])])
    batch = collate([a, b])
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 2, 0]] and batch.lengths.tolist() == [3, 2]
    assert batch.protect.tolist() == [[True, False, False], [True, True, False]]
    assert batch.cont.tolist() == [[4, 5, 6, 0, 0, 0], [7, 8, 9, 10, 11, 12]]
    assert batch.segments.tolist() == [[0, 0, 0, -1, -1, -1], [0, 0, 1, 1, 1, 1]]
    answers = torch.tensor([[0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]]).bool()
    assert torch.equal(batch.answers, answers) and torch.equal(batch.supervised, answers)
    batch = collate([a, b], prompts=True)  # question words too, but nothing is predicted across two queries
    assert torch.equal(batch.answers, answers)
    assert batch.supervised.int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0]]


def test_lengths_are_drawn_evenly_between_the_shortest_and_the_longest(tok):
    stream = Samples([Numbers(4000)], tok, 300, {"continue": 1}, n_answer=20, seed=3, shortest=100)
    lengths = [stream(i).n for i in range(200)]
    assert 100 <= min(lengths) < 110 and 290 < max(lengths) <= 300 and 180 < sum(lengths) / 200 < 220
    assert [stream(i).n for i in range(20)] == lengths[:20]  # a sample's length is its own, not the stream's
