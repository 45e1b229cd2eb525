"""The baselines against golden scores of kvpress and by hand, and how answers are judged."""
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import eval
from compress import DEMO, SHIPPED_ADAPTER, Compressor, CompressorConfig, load_adapter
from conftest import ROOT, tiny_compressor, tiny_llama
from data import tasks
from data.samples import Case, Query
from eval import (Document, divergence, h2o, judge, kvzip, kvzip_replays,
                  log_probabilities, measure, share_budget, share_in_layer, snapkv, streaming)
from run.eval_flags import BASELINES, METHODS


class Letters:
    """A tokenizer of 90 characters, as much of it as evaluation needs."""
    header = [1, 2, 3]
    turn = [96, 95]
    end = [96]
    stop_ids = {96}

    def encode(self, text, joined=False):
        return [ord(c) % 90 for c in text]

    def decode(self, ids):
        return " ".join(map(str, ids))


def case(n=60, seed=0, queries=3) -> Case:
    rng = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(4, 90, (count,), generator=rng).tolist()

    made = [Query(f"k{i % 2}", ids(5 + i), ids(4 + i), ["7"]) for i in range(queries)]
    return Case(Letters.header + ids(n), 3, made, f"unit{seed}")


def held(cache) -> list[list[list[int]]]:
    """The positions that each head of each layer holds: [layer][head] -> list."""
    layers = []
    for groups in cache.layers:
        heads = []
        for group in groups:
            for h in range(group.k.shape[1]):
                heads.append(group.positions[0, min(h, group.positions.shape[1] - 1)].tolist())
        layers.append(heads)
    return layers


@pytest.fixture
def compressor(model):
    """Without registers, so that all methods keep equally many tokens."""
    return tiny_compressor(model, registers=0)


@pytest.fixture
def document(model, compressor):
    with torch.no_grad():
        return Document(model, Letters(), compressor, case(), "seed")


# scores -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden():
    with safe_open(ROOT / "tests" / "golden" / "kvpress.safetensors", "pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}
        return tensors | {"layers": json.loads(f.metadata()["layers"])}


@pytest.fixture(scope="module")
def read(smollm, golden):
    """The golden context, and its full cache; no baseline's score needs a trained compressor."""
    compressor = Compressor(smollm.cfg, CompressorConfig())
    ids = golden["ids"].long()[None]
    ctx = compressor.read(smollm, ids, protect=torch.arange(ids.shape[1])[None] < 24)
    return ctx, compressor.full_cache(smollm, ctx)


@pytest.mark.weights
@pytest.mark.parametrize("name", ["h2o", "snapkv", "kvzip", "kvzip_chunked"])
@torch.no_grad()
def test_scores_equal_those_of_kvpress(smollm, tokenizer, golden, read, name):
    """Within 0.1 %: a wrong denominator, or a mean for a maximum, is off by far more."""
    ctx, full = read
    body = slice(24, None)
    if name == "h2o":  # kvpress divides by the number of queries that could see the token
        ours = h2o(smollm, ctx) / torch.arange(300, 0, -1)
    elif name == "snapkv":
        ours = snapkv(smollm, ctx, full, 64)
        body = slice(24, -64)  # the window itself is kept in any case
    else:
        chunk = 2048 if name == "kvzip" else 128
        ours = kvzip(smollm, tokenizer, ctx, full, chunk)
    ours, theirs = ours[0][golden["layers"]], golden[name]
    torch.testing.assert_close(ours[..., body], theirs[..., body], rtol=1e-3, atol=1e-8)


@pytest.mark.weights
@pytest.mark.parametrize("name", ["kvzip", "adasnapkv"])
@torch.no_grad()
def test_a_shared_budget_keeps_what_kvpress_keeps(smollm, tokenizer, golden, read, name):
    """75 of 300 tokens per head, the header included. A score that differs in its last digit may
    swap two entries at the edge: at most 3 of 6,750."""
    ctx, full = read
    everything, k = torch.ones_like(ctx.compressible), torch.tensor([75])
    if name == "kvzip":
        kept = share_budget(kvzip(smollm, tokenizer, ctx, full), everything, k, 90)[0]
    else:
        kept = share_in_layer(snapkv(smollm, ctx, full, 8), everything, k, 8)[0]
    theirs = golden[f"{name}.kept"]
    assert kept.sum() == theirs.sum() == 75 * 90
    assert (kept & ~theirs).sum() <= 3


@pytest.mark.weights
def test_kvzip_replays_what_kvpress_replays(tokenizer, golden):
    ids = golden["ids"].tolist()
    for name, chunk in (("kvzip", 2048), ("kvzip_chunked", 128)):
        replays = [tokens for _, _, tokens in kvzip_replays(tokenizer, ids, 24, chunk)]
        keys = sorted(key for key in golden if key.startswith(f"{name}.replay"))
        assert replays == [golden[key].tolist() for key in keys]


@pytest.mark.weights
def test_streaming_keeps_what_kvpress_keeps(golden, read):
    """150 of 300 tokens there; here the header is kept besides, and holds the first four."""
    ctx, _ = read
    theirs = golden["streaming"][0, 0].bool().nonzero()[:, 0].tolist()
    scores = streaming(ctx)[0, 0, 0].masked_fill(~ctx.compressible[0], -1)
    assert scores.topk(146).indices.sort().values.tolist() == theirs[4:]


@torch.no_grad()
def test_snapkv_by_hand(model, document):
    """The attention of the last 6 tokens in a plain reading, smoothed over 5 neighbours."""
    seen = []
    n = 57

    def on_weights(layer, weights, first_query):
        seen.append(weights[0, :, :, n:, :n])

    model(document.ctx.tokens, on_weights=on_weights)
    scores = snapkv(model, document.ctx, document.full, 6)[0]
    for weights, ours in zip(seen, scores, strict=True):
        smooth = F.pad(weights.mean(2), (2, 2)).unfold(-1, 5, 1).mean(-1).mean(1)
        torch.testing.assert_close(ours[:, :n], smooth, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_kvzip_near_the_last_position_replays_in_shorter_chunks(compressor):
    """323 of 512 positions are taken, so 61 tokens can be replayed at once."""
    model = tiny_llama(max_positions=512)
    document = Document(model, Letters(), compressor, case(n=320), "seed")
    assert document.cache("kvzip", 0.1).entries().sum() == (3 + 32) * 12
    assert document.scores("kvzip", 32).isfinite().all()


def test_attention_of_8k_tokens_is_summed_in_blocks():
    """All weights of one layer would be 1 GB. In its own process, as a peak never comes down."""
    code = """
import resource, torch
from eval import h2o, kvzip, snapkv
from test_eval import Letters, tiny_compressor, tiny_llama
model = tiny_llama(n_layer=3, max_positions=16384)
compressor, tokens = tiny_compressor(model, eta=1), torch.randint(4, 90, (1, 8000))
with torch.no_grad():
    ctx = compressor.read(model, tokens, protect=torch.arange(8000)[None] < 3)
    full = compressor.full_cache(model, ctx)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    h2o(model, ctx), snapkv(model, ctx, full, 64), kvzip(model, Letters(), ctx, full)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400, f"{float(done.stdout):.0f} MiB"


# budgets ----------------------------------------------------------------------------------

def test_budgets_by_hand():
    """Two layers of two heads, six tokens without the first, two to keep per head."""
    scores = torch.tensor([[[[9., 5, 4, 3, 2, 0], [9, 1, 1, 0, 0, 0]],
                            [[9, 8, 7, 6, 0, 1], [9, 0, 0, 2, 0, 0]]]])
    compressible = torch.tensor([[False, True, True, True, True, True]])
    k = torch.tensor([2])

    def where(kept):
        return [[head.nonzero()[:, 0].tolist() for head in layer] for layer in kept[0]]

    each = where(share_budget(scores, compressible, k, 1))
    assert each == [[[1, 2], [1, 2]], [[1, 2], [1, 3]]]
    layer = where(share_budget(scores, compressible, k, 2))
    assert layer == [[[1, 2, 3, 4], []], [[1, 2, 3], [3]]]
    everybody = where(share_budget(scores, compressible, k, 4))
    assert everybody == [[[1, 2, 3, 4], []], [[1, 2, 3], [3]]]
    recent = where(share_budget(scores, compressible, k, 4, recent=1))
    assert recent == [[[1, 5], [5]], [[1, 2, 3, 5], [5]]]
    assert where(share_in_layer(scores, compressible, k, 0))[0] == [[1, 2, 3], [1]]
    assert where(share_in_layer(scores, compressible, k, 1))[0] == [[1, 2, 5], [5]]


# how many adjacent heads share a budget, in a model of 6 layers of 2; and the forced recent
# tokens of K = 12: an eighth of them under the compressor's rule, a half under h2o and snapkv
SHARING = {"head": 1, "layer": 2, "all": 12, "compressor": 12}
RECENT = {"h2o": 6, "snapkv": 6, "adasnapkv": 6, "streaming": 0, "kvzip": 0, "kvzip:equal": 0}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "none")])
@torch.no_grad()
def test_every_method_keeps_its_budget_and_the_header(document, method):
    before = [group.k.clone() for (group,) in document.full.layers]
    cache = document.cache(method, 0.2)
    assert cache.next_position.tolist() == [63]
    heads = SHARING[BASELINES.get(method, ("", "compressor"))[1]]
    assert (cache.entries()[0].view(-1, heads).sum(1) == heads * (3 + 12)).all()
    for kept in sum(held(cache), []):
        assert kept[:3] == [0, 1, 2] and kept == sorted(set(kept))
        assert set(range(63 - RECENT.get(method, 1), 63)) <= set(kept)
    assert all(group.bias is None for groups in cache.layers for group in groups)
    assert all(torch.equal(k, group.k) for k, (group,) in zip(before, document.full.layers))


@pytest.mark.parametrize("method", [m for m, (_, budget) in BASELINES.items() if budget != "head"])
@torch.no_grad()
def test_heads_that_share_a_budget_hold_different_numbers(document, method):
    assert document.cache(method, 0.2).entries().unique().numel() > 1


@torch.no_grad()
def test_streaming_keeps_the_first_four_and_the_most_recent(document):
    expected = [0, 1, 2, 3, 55, 56, 57, 58, 59, 60, 61, 62]
    assert held(document.cache("streaming", 0.15)) == [[expected] * 2] * 6


@torch.no_grad()
def test_kvzip_recent_is_kvzip_under_the_budget_of_the_compressor(document, compressor):
    """The same entries as a compressor whose scorer says what KVzip measures."""
    scores = document.scores("kvzip", 12)
    cache = compressor.compress(document.model, document.ctx, tokens=12, scores=scores)
    assert held(document.cache("kvzip:recent", 0.2)) == held(cache)
    assert held(document.cache("kvzip:recent", 0.2)) != held(document.cache("kvzip", 0.2))


@torch.no_grad()
def test_with_a_token_adapter_all_heads_keep_the_same(model):
    document = Document(model, Letters(), tiny_compressor(model, selection="token", registers=0),
                        case(), "")
    for method in ("kvdistill", "no-routing", "kvdistill:random", "random", "kvzip:recent"):
        first = held(document.cache(method, 0.2))[0][0]
        assert len(first) == 15 and held(document.cache(method, 0.2)) == [[first] * 2] * 6


@torch.no_grad()
def test_what_the_names_of_our_methods_say(document):
    """The same entries with and without routing, and the same random ones with and without it."""
    for routed, plain in (("kvdistill", "no-routing"), ("kvdistill:random", "random")):
        routed, plain = document.cache(routed, 0.2), document.cache(plain, 0.2)
        assert held(routed) == held(plain)
        assert torch.equal(routed.layers[1][0].k, plain.layers[1][0].k)  # before η
        assert not torch.equal(routed.layers[4][0].k, plain.layers[4][0].k)


@torch.no_grad()
def test_keep_1_is_the_full_cache_and_none_is_the_header(document):
    for method in METHODS:
        if method != "none":
            assert document.cache(method, 1.0) is document.full, method
    none = document.cache("none", 0.0)
    assert held(none) == [[[0, 1, 2]] * 2] * 6 and none.next_position.tolist() == [3]
    assert document.timed_cache("kvdistill", 1.0)[1]["compress"] == 0


@torch.no_grad()
def test_bytes_count_what_is_stored(document):
    entry = 2 * 12 * 4  # key and value, d = 12, fp32; a position is an int32
    assert document.full.nbytes() == 63 * 6 * (2 * entry + 4)  # a layer's heads share positions
    assert document.cache("kvzip:equal", 0.2).nbytes() == 15 * 12 * (entry + 4)
    assert document.cache("random", 0.2).nbytes() == 15 * 12 * (entry + 4)


# the shipped adapter ----------------------------------------------------------------------

@pytest.mark.weights
@torch.no_grad()
def test_the_end_of_a_document_is_found(smollm, tokenizer):
    """At 10x, a needle behind the last sentence. An adapter whose LoRA filled the last
    tokens with the text before them lost their own content."""
    compressor = load_adapter(SHIPPED_ADAPTER, smollm, tokenizer)
    cases = [case for case in tasks.niah(tokenizer, DEMO, 8, 3, [512], [1.0])
             if len(case.queries) == 1]
    found = 0
    for case in cases:
        cache = Document(smollm, tokenizer, compressor, case, "x").cache("kvdistill", 0.1)
        answer, = judge("niah", smollm, tokenizer, case, cache, None)
        found += answer["match"]
    assert len(cases) == 4 and found >= 3


# judging ----------------------------------------------------------------------------------

def test_divergence_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2), and m = (5/8, 3/8) between them."""
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()
    q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    kl, js, agree = divergence(q, p)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert torch.allclose(kl, torch.tensor([by_hand, 0.0]), atol=1e-6)
    p_to_m = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    q_to_m = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    assert torch.allclose(js, torch.tensor([(p_to_m + q_to_m) / 2, 0.0]), atol=1e-6)
    assert agree.tolist() == [1.0, 1.0] and divergence(q[:1], p[1:])[2].tolist() == [0.0]


@torch.no_grad()
def test_fidelity_of_each_answer_is_that_of_the_question_asked_alone(model, document):
    def asked(case, cache):
        teacher = log_probabilities(model, case, case.queries, document.full)
        return judge("fidelity", model, Letters(), case, cache, teacher)

    for answer in asked(document.case, document.full):
        assert answer["kl"] < 1e-6 and answer["js"] < 1e-6 and answer["agree"] == 1
    compressed = document.cache("random", 0.1)
    together = asked(document.case, compressed)
    assert [answer["weight"] for answer in together] == [4, 5, 6]
    for query, answer in zip(document.case.queries, together):
        alone, = asked(replace(document.case, queries=[query]), compressed)
        assert answer["kl"] > 0.01 and 0 < answer["js"] <= math.log(2)
        assert answer["kl"] == pytest.approx(alone["kl"], abs=1e-4)


@torch.no_grad()
def test_choice_takes_the_likeliest_option(model, document):
    tokenizer, question = Letters(), document.case.queries[0].prompt
    options, likely = ["abc", "de", "fghij"], []
    for option in options:  # one by one, by hand
        ids = tokenizer.encode(option) + tokenizer.end
        h = model(torch.tensor([question + ids]), document.full)[0, len(question) - 1:-1]
        log_p = model.logits(h).log_softmax(-1)
        likely.append(log_p[range(len(ids)), ids].mean().item())
    best = options[likely.index(max(likely))]
    wrong = options[likely.index(min(likely))]
    queries = [Query("all", question, gold=[gold], options=options) for gold in (best, wrong)]
    asked = replace(document.case, queries=queries)
    first, second = judge("choice", model, tokenizer, asked, document.full, None)
    assert (first["accuracy"], second["accuracy"]) == (1, 0) and first["chance"] == 1 / 3
    assert first["prediction"] == second["prediction"] == best


@torch.no_grad()
def test_generated_answers_do_not_depend_on_their_neighbours(model, document):
    cache = document.cache("kvdistill", 0.3)
    together = judge("niah", model, Letters(), document.case, cache, None)
    for query, answer in zip(document.case.queries, together):
        one = replace(document.case, queries=[query])
        alone, = judge("niah", model, Letters(), one, cache, None)
        assert alone == answer and answer["match"] == float("7" in answer["prediction"])


# the loop ---------------------------------------------------------------------------------

def records(model, compressor, methods=("full", "none", "random", "kvdistill"), cases=(0, 1),
            keeps=(0.5, 0.2), **more):
    made = [(i, case(seed=i)) for i in cases]
    parts = measure("fidelity", model, Letters(), compressor, made, methods, keeps, 0, **more)
    return [record for part in parts for record in part]


def test_a_case_gives_the_same_records_whoever_measures_it(model, compressor):
    def sorted_without_seconds(found):
        found = [{k: v for k, v in r.items() if k != "seconds"} for r in found]
        return sorted(found, key=lambda r: (r["case"], r["method"], -r["keep"]))

    together = records(model, compressor, cases=(0, 1, 2))
    apart = records(model, compressor, cases=(2, 1)) + records(model, compressor, cases=(0,))
    assert sorted_without_seconds(together) == sorted_without_seconds(apart)
    assert [r["K"] for r in together[:6]] == [60, 0, 30, 12, 30, 12]


def test_what_is_done_is_left_out(model, compressor):
    done = {(0, "full", 1.0), (0, "none", 0.0), (0, "random", 0.5), (0, "kvdistill", 0.5)}
    left = records(model, compressor, cases=(0,), done=done)
    assert [(r["method"], r["keep"]) for r in left] == [("random", 0.2), ("kvdistill", 0.2)]


@torch.no_grad()
def test_scores_cost_each_cache_the_same_seconds(model, compressor, monkeypatch):
    """They are made once for a document, and charged to every cache that needs them."""
    def slow(*args):
        time.sleep(0.2)
        return kvzip(*args)

    monkeypatch.setattr(eval, "kvzip", slow)
    for r in records(model, compressor, methods=("kvzip", "kvzip:recent", "random"), cases=(0,)):
        assert (r["seconds"]["compress"] > 0.2) == r["method"].startswith("kvzip")
