"""The method's ten invariants on tiny random models, where each can be checked to rounding (8 is in test_programs.py,
10 in test_results.py).

The models have weights large enough that attention to each token matters: a test that compares logits cannot pass by
everything being near zero. `test_the_tests_can_fail` checks that.
"""
import math

import pytest
import torch

from compress import decay, kept_count, positions_of, select, soft_decay
from conftest import tiny_compressor, tiny_llama
from run.errors import BadInput
from model import NEG, pad_right
from train import DistillKL

N, T = 40, 7
PROTECT = 3


def context(model, comp, batch=2, n=N, seed=3):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.cfg.vocab_size, (batch, n), generator=g)
    protect = torch.zeros(batch, n, dtype=torch.bool)
    protect[:, :PROTECT] = True
    return comp.read(model, tokens, protect=protect)


def continuation(model, batch=2, t=T, seed=4):
    return torch.randint(0, model.cfg.vocab_size, (batch, t), generator=torch.Generator().manual_seed(seed))


def logits(model, cache, tokens):
    return model.logits(model(tokens, cache))


@torch.no_grad()
def test_the_tests_can_fail(model, compressor):
    """Dropping tokens, routing and β each move the logits by far more than any tolerance below."""
    ctx, cont = context(model, compressor), continuation(model)
    full = logits(model, compressor.full(model, ctx), cont)
    short = logits(model, compressor.compress(model, ctx, keep=0.25), cont)
    assert (full - short).abs().max() > 0.1
    kept = select(compressor.scores(ctx), ctx.candidates, torch.tensor([9, 9]))
    zero = torch.zeros_like(ctx.tokens, dtype=torch.float32)
    unrouted = tiny_compressor(model, trained=False)
    a = logits(model, compressor.encode(model, ctx, kept, zero), cont)
    b = logits(model, unrouted.encode(model, ctx, kept, zero), cont)
    c = logits(model, compressor.encode(model, ctx, kept, zero - 2.0 * kept), cont)
    assert (a - b).abs().max() > 0.05 and (a - c).abs().max() > 0.05


# 1 ---------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("how", [{"keep": 1.0}, {"tokens": 10_000}])
def test_1_keeping_everything_is_the_plain_model(model, compressor, how):
    ctx, cont = context(model, compressor), continuation(model)
    plain = model.logits(model(torch.cat([ctx.tokens, cont], 1)))[:, N:]
    assert torch.allclose(logits(model, compressor.compress(model, ctx, **how), cont), plain, atol=1e-4)


@torch.no_grad()
def test_1_an_untrained_route_without_decay_changes_nothing(model):
    """All but one token kept, B = 0, β = 0, the dropped token put back: the machinery of part 4 is exact."""
    comp = tiny_compressor(model, trained=False)
    ctx, cont = context(model, comp), continuation(model)
    kept = ctx.candidates.clone()
    kept[:, 20] = False
    cache = comp.encode(model, ctx, kept, torch.zeros_like(ctx.tokens, dtype=torch.float32), everything=True)
    plain = model.logits(model(torch.cat([ctx.tokens, cont], 1)))[:, N:]
    assert torch.allclose(logits(model, cache, cont), plain, atol=1e-4)


# 2 ---------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("two_pass", [False, True])
def test_2_routing_reaches_others_only_through_attention(model, two_pass):
    comp, plain = (tiny_compressor(model, trained=t, two_pass=two_pass) for t in (True, False))
    ctx = context(model, comp)
    kept = torch.zeros_like(ctx.candidates)
    kept[:, [15, 22]] = True
    zero = torch.zeros_like(ctx.tokens, dtype=torch.float32)
    a, b = (c.encode(model, ctx, kept, zero, everything=True) for c in (comp, plain))
    eta = 0 if two_pass else comp.cfg.eta
    for layer in range(model.cfg.n_layer):
        for x, y in ((a.k[layer], b.k[layer]), (a.v[layer], b.v[layer])):
            changed = (x - y).abs().amax((0, 1, 3)) > 1e-7                   # (N,)
            assert not changed[:15].any(), "a token before the first routed one changed"
            if layer <= eta:                                                 # layers 1 … η+1 in the paper's count
                assert not changed.any()
    changed = (a.v[-1] - b.v[-1]).abs().amax((0, 1, 3)) > 1e-7
    assert changed[15] and changed[16:].any()


# 3 ---------------------------------------------------------------------------------------------------------------

def test_3_select_takes_exactly_the_top_scores():
    torch.manual_seed(0)
    scores, candidates = torch.randn(5, 30), torch.rand(5, 30) > 0.3
    n = candidates.sum(1)
    k = kept_count(n, keep=0.4)
    kept = select(scores, candidates, k)
    index, real = positions_of(kept)
    for i in range(5):
        got = index[i][real[i]].tolist()
        assert got == sorted(set(got)) and len(got) == math.ceil(0.4 * int(n[i]))
        assert candidates[i][got].all()
        dropped = candidates[i] & ~kept[i]
        assert scores[i][got].min() > scores[i][dropped].max()


def test_3_ties_go_to_the_earlier_token_and_bad_scores_are_errors():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    everything = torch.ones(1, 5, dtype=torch.bool)
    assert select(scores, everything, torch.tensor([2]))[0].tolist() == [False, True, True, False, False]
    with pytest.raises(BadInput, match="not a finite number"):
        select(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([1]))
    padded = torch.tensor([[1.0, float("nan")]])  # not a candidate: its score does not matter
    assert select(padded, torch.tensor([[True, False]]), torch.tensor([1]))[0].tolist() == [True, False]


@pytest.mark.parametrize("n, keep, want", [(30, 0.1, 3), (10, 0.1, 1), (11, 0.1, 2), (100, 0.07, 7), (3, 1.0, 3),
                                           (5, 0.01, 1), (0, 0.5, 0)])
def test_3_kept_count_is_the_ceiling_without_rounding_noise(n, keep, want):
    assert kept_count(torch.tensor([n]), keep=keep).tolist() == [want]


def test_kept_count_refuses_nonsense():
    n = torch.tensor([10])
    assert kept_count(n, tokens=99).tolist() == kept_count(n, tokens=10 ** 30).tolist() == [10]
    for bad in ({"keep": 0.0}, {"keep": 1.1}, {"tokens": 0}, {}, {"keep": 0.1, "tokens": 3}):
        with pytest.raises(BadInput):
            kept_count(n, **bad)


# 4 ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sigmoid", "centred"])
def test_4_gradients_agree_with_finite_differences(kind):
    """float64; indices fixed. dL/dβ by differences, dL/ds by differences, dropped tokens exactly zero."""
    model = tiny_llama(torch.float64)
    comp = tiny_compressor(model, decay=kind)
    ctx, cont = context(model, comp), continuation(model)
    n = ctx.candidates.sum(1)
    scores = comp.scores(ctx).detach().double()
    kept = select(scores, ctx.candidates, kept_count(n, keep=0.2))
    with torch.no_grad():
        teacher = model(cont, comp.full(model, ctx)).flatten(0, 1)

    def loss_of_beta(beta):
        cache = comp.encode(model, ctx, kept, beta)
        return DistillKL.apply(model(cont, cache).flatten(0, 1), teacher, model.head_weight, 0.6, 5)[0].mean()

    def loss_of_scores(s):
        return loss_of_beta(decay(s, kept, n, kind, comp.gamma))

    for f, at in ((loss_of_beta, decay(scores, kept, n, kind, comp.gamma).detach()), (loss_of_scores, scores)):
        x = at.clone().requires_grad_()
        grad, = torch.autograd.grad(f(x), x)
        assert (grad[ctx.candidates & ~kept] == 0).all() and grad[kept].abs().min() > 1e-9
        for i, j in kept.nonzero().tolist()[::3]:
            step = torch.zeros_like(at)
            step[i, j] = 1e-5
            with torch.no_grad():
                numeric = (f(at + step) - f(at - step)) / 2e-5
            assert math.isclose(float(grad[i, j]), float(numeric), rel_tol=1e-4, abs_tol=1e-8)


def test_4_soft_decay_reaches_dropped_tokens_and_knows_no_scale():
    scores = torch.randn(2, 20, dtype=torch.float64, requires_grad=True)
    candidates = torch.ones(2, 20, dtype=torch.bool)
    candidates[1, 15:] = False
    k = torch.tensor([5, 4])
    beta = soft_decay(scores, candidates, k, 0.15)
    kept = select(scores.detach(), candidates, k)
    assert (beta[kept] > math.log(0.5)).all() and (beta[candidates & ~kept] < math.log(0.5)).all()
    assert (beta[~candidates] == 0).all()
    weights = torch.randn(2, 20, dtype=torch.float64)
    grad, = torch.autograd.grad((beta * weights).sum(), scores)
    assert (grad[candidates & ~kept] != 0).all() and (grad[~candidates] == 0).all()
    assert torch.allclose(soft_decay(7 * scores.detach() + 3, candidates, k, 0.15), beta.detach(), atol=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_5_loss_has_the_gradient_that_autograd_would_find(lam):
    """The hand-written backward against autograd on the plain formula, in float64, over uneven chunks."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 11, 8, dtype=torch.float64).unbind()
    student.requires_grad_()
    head = torch.randn(23, 8, dtype=torch.float64)
    loss, kl, agree = DistillKL.apply(student, teacher, head, lam, 4)
    q, p = (student @ head.T).log_softmax(-1), (teacher @ head.T).log_softmax(-1)
    want = lam * (p.exp() * (p - q)).sum(-1) + (1 - lam) * (q.exp() * (q - p)).sum(-1)
    weights = torch.rand(11, dtype=torch.float64)
    assert torch.allclose(loss.double(), want, atol=1e-5)
    assert torch.equal(agree.bool(), q.argmax(-1) == p.argmax(-1))
    got, = torch.autograd.grad((loss * weights).sum(), student)
    right, = torch.autograd.grad((want * weights).sum(), student)
    assert torch.allclose(got, right, atol=1e-7)


def test_decay_by_hand():
    """Two kept tokens of four with scores 0 and log 3, γ = 1: mean exp(s) is 2, N/K is 2, so β = (0, log 3)."""
    scores = torch.tensor([[0.0, 9.0, math.log(3), -5.0]])
    kept = torch.tensor([[True, False, True, False]])
    beta = decay(scores, kept, torch.tensor([4]), "centred", torch.tensor(1.0))
    assert torch.allclose(beta, torch.tensor([[0.0, 0.0, math.log(3), 0.0]]), atol=1e-6)
    beta = decay(scores, kept, torch.tensor([4]), "sigmoid", torch.tensor(1.0))
    assert torch.allclose(beta.exp(), torch.tensor([[0.5, 1.0, 0.75, 1.0]]), atol=1e-6)


# 6, 7 ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("two_pass", [False, True])
def test_6_a_ragged_batch_is_its_rows_one_by_one(model, two_pass):
    comp = tiny_compressor(model, two_pass=two_pass)
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 97, (n,), generator=g).tolist() for n in (40, 17, 33, 5)]
    tokens, lengths = pad_right(rows)
    protect = torch.zeros_like(tokens, dtype=torch.bool)
    protect[:, :2] = True
    cont = continuation(model, batch=4)
    together = comp.compress(model, comp.read(model, tokens, lengths, protect), tokens=6)
    got = logits(model, together, cont)
    for i, row in enumerate(rows):
        ctx = comp.read(model, torch.tensor([row]), protect=protect[i:i + 1, :len(row)])
        alone = comp.compress(model, ctx, tokens=6)
        assert torch.allclose(logits(model, alone, cont[i:i + 1]), got[i:i + 1], atol=1e-4)
        assert alone.positions[0].tolist() == together.positions[i][:alone.n_slots].tolist()
    pad = together.positions == -1
    assert pad.any() and (together.bias[pad] == NEG).all() and (together.k[3].transpose(1, 2)[pad] == 0).all()


@torch.no_grad()
def test_7_protected_spans_survive_exactly(model, compressor):
    """A span in the middle: same positions, unrouted, β = 0; its keys up to layer η are the plain model's."""
    ctx = context(model, compressor)
    ctx.candidates[:, 18:25] = False
    kept = select(compressor.scores(ctx), ctx.candidates, torch.tensor([6, 6]))
    assert not kept[:, 18:25].any()
    cache, full = compressor.compress(model, ctx, tokens=6), compressor.full(model, ctx)
    span = [*range(PROTECT), *range(18, 25)]
    for row in range(2):
        slots = [cache.positions[row].tolist().index(p) for p in span]
        assert (cache.bias[row, slots] == 0).all()
        for layer in range(compressor.cfg.eta + 1):
            assert torch.equal(cache.k[layer][row][:, slots], full.k[layer][row][:, span])
    assert cache.n_slots == 6 + len(span)
    route = compressor.routes(kept, model.dtype)(compressor.cfg.eta)
    assert (route.mask[:, 18:25] == 0).all()


# 9 ---------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_9_step_by_step_is_one_pass_and_the_cache_stays(model, compressor):
    ctx, cont = context(model, compressor), continuation(model)
    cache = compressor.compress(model, ctx, keep=0.3)
    before = [x.clone() for x in (*cache.k, *cache.v, cache.bias, cache.positions, cache.next_position)]
    want = logits(model, cache, cont)
    room = cache.with_room(T)
    got = torch.cat([logits(model, room, cont[:, i:i + 1]) for i in range(T)], 1)
    assert torch.allclose(got, want, atol=1e-4)
    assert room.positions[0, -1] == N + T - 1, "the continuation starts at the original context length"
    after = [*cache.k, *cache.v, cache.bias, cache.positions, cache.next_position]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


# Edges -----------------------------------------------------------------------------------------------------------

def test_eta_must_leave_a_layer_to_adapt(model):
    for eta in (0, 5, 6, "2"):
        with pytest.raises(BadInput, match="eta"):
            tiny_compressor(model, eta=eta)


def test_a_row_without_anything_to_compress_harms_nobody(model, compressor):
    """One row of the batch is protected as a whole: finite β and gradients for all, under both ways to decay."""
    ctx = context(model, compressor)
    ctx.candidates[1] = False
    n = ctx.candidates.sum(1)
    k = kept_count(n, keep=0.25)
    scores = compressor.scores(ctx)
    kept = select(scores.detach(), ctx.candidates, k)
    for beta in (decay(scores, kept, n, "centred", compressor.gamma), soft_decay(scores, ctx.candidates, k, 0.15)):
        assert beta.isfinite().all() and (beta[1] == 0).all()
        grads = torch.autograd.grad(beta.sum(), list(compressor.scorer.parameters()) + [compressor.gamma],
                                    allow_unused=True, retain_graph=True)
        assert all(g is None or g.isfinite().all() for g in grads)


@torch.no_grad()
def test_everything_protected_is_no_compression(model, compressor):
    ctx, cont = context(model, compressor), continuation(model)
    ctx.candidates[:] = False
    want = logits(model, compressor.full(model, ctx), cont)
    assert torch.equal(logits(model, compressor.compress(model, ctx, keep=0.1), cont), want)
