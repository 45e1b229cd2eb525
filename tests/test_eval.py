"""Metrics on hand-worked cases, and the training-free ways to choose."""
import math

import numpy as np
import pytest
import torch

from conftest import tiny_compressor
from data.samples import Continuation, Sample, collate
from eval import METHODS, baseline_scores, divergence, fidelity, mean_and_interval


def test_divergence_by_hand():
    """Two tokens: p = (3/4, 1/4) against q = (1/2, 1/2): KL = 3/4·log(3/2) + 1/4·log(1/2)."""
    head = torch.eye(2)
    p, q = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    kl, agree = divergence(q, p, head, chunk=1)
    assert torch.allclose(kl, torch.tensor([0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0]), atol=1e-6)
    assert agree.tolist() == [1.0, 1.0] and divergence(q[:1], p[1:], head)[1].tolist() == [0.0]


def test_interval_has_the_context_as_unit():
    """Four contexts of ten equal tokens: the interval is that of four numbers, not of forty."""
    context, values = np.repeat([0, 1, 2, 3], 10), np.repeat([0.0, 1.0, 2.0, 3.0], 10)
    mean, (low, high) = mean_and_interval(context, values)
    assert mean == 1.5 and low < 0.6 and high > 2.4
    assert mean_and_interval(np.zeros(5), np.ones(5)) == (1.0, [1.0, 1.0])


@torch.no_grad()
def test_streaming_keeps_the_first_four_and_the_most_recent(model, compressor):
    tokens = torch.randint(0, 97, (1, 20))
    protect = torch.zeros(1, 20, dtype=torch.bool)
    protect[0, :2] = True
    ctx = compressor.read(model, tokens, protect=protect)
    scores = baseline_scores("streaming", ctx, compressor.full(model, ctx), None).masked_fill(~ctx.candidates, -1)
    assert scores[0].topk(7).indices.sort().values.tolist() == [2, 3, 4, 5, 17, 18, 19]


@torch.no_grad()
def test_knorm_prefers_small_keys(model, compressor):
    ctx = compressor.read(model, torch.randint(0, 97, (1, 20)))
    full = compressor.full(model, ctx)
    for k in full.k:
        k[:, :, 7] = 0
    assert int(baseline_scores("knorm", ctx, full, None).argmax()) == 7
    with pytest.raises(ValueError):
        baseline_scores("magic", ctx, full, None)


@torch.no_grad()
def test_fidelity_counts_answer_tokens_and_is_zero_for_the_full_cache(model):
    g = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(0, 97, (n,), generator=g).tolist()  # noqa: E731
    two = lambda: [Continuation("recite", ids(8), 3), Continuation("title", ids(5), 2)]  # noqa: E731
    samples = [Sample(ids(30), 2, two()) for _ in range(4)]
    batches = [collate(samples[:2]), collate(samples[2:])]
    compressors = {"trained": tiny_compressor(model), "untrained": tiny_compressor(model, trained=False)}
    rows = fidelity(model, compressors, batches, ("continue", "recite", "cloze", "title"), keeps=(1.0, 0.2))
    cell = {(r["method"], r["keep"], r["kind"]): r for r in rows}
    assert {k for _, _, k in cell} == {"recite", "title", "all"}, "kinds that do not occur have no row"
    for m in METHODS:
        assert [cell[m, 0.2, k]["n"] for k in ("recite", "title", "all")] == [20, 12, 32]
        total = sum(cell[m, 0.2, k]["kl"] * cell[m, 0.2, k]["n"] for k in ("recite", "title"))
        assert math.isclose(total, 32 * cell[m, 0.2, "all"]["kl"], rel_tol=1e-6)
        assert cell[m, 0.2, "all"]["kl"] > 0.01
        if m != "none":
            assert cell[m, 1.0, "all"]["kl"] < 1e-5 and cell[m, 1.0, "all"]["agree"] == 1
        low, high = cell[m, 0.2, "all"]["ci95"]
        assert low < cell[m, 0.2, "all"]["kl"] < high and cell[m, 0.2, "all"]["contexts"] == 4
    assert cell["none", 1.0, "all"] | {"keep": 0} == cell["none", 0.2, "all"] | {"keep": 0}
