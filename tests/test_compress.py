"""The method's invariants on tiny random models, where each can be checked to rounding, for `head` and for `token` (8,
saved caches, is in test_files.py; 5 and 11, what training does and learns, in test_train.py).

The models have weights large enough that attention to each token matters: a test that compares logits cannot pass by
everything being near zero. `test_the_tests_can_fail` checks that.
"""
import itertools
import math

import pytest
import torch

from compress import Choice, attention_received, decay, gather, kept_count, select
from conftest import tiny_compressor, tiny_llama
from model import Cache, offsets, pad_right, rotate
from run.errors import BadInput
from train import DistillKL

N, T, PROTECT = 40, 7, 3
BOTH = pytest.mark.parametrize("choice", ["head", "token"])


def context(model, comp, batch=2, n=N, seed=3):
    tokens = torch.randint(0, model.cfg.vocab_size, (batch, n), generator=torch.Generator().manual_seed(seed))
    protect = torch.zeros(batch, n, dtype=torch.bool)
    protect[:, :PROTECT] = True
    return comp.read(model, tokens.to(model.device), protect=protect.to(model.device))


def continuation(model, batch=2, t=T, seed=4):
    tokens = torch.randint(0, model.cfg.vocab_size, (batch, t), generator=torch.Generator().manual_seed(seed))
    return tokens.to(model.device)


def logits(model, cache, tokens):
    return model.logits(model(tokens, cache))


def masked(model, comp, ctx, choice, k, beta) -> Cache:
    """The training's cache: everything is there, what a head dropped under a bias of −1e9."""
    return ctx.whole_cache(comp.encode(model, ctx, choice, k, lambda layer, keys, values: (keys, values)), beta)


def chosen(comp, ctx, keep=0.1):  # at 10×, so that routing has a part in it
    n = ctx.candidates.sum(1)
    k = kept_count(n, keep)
    return comp.choose(comp.scores(ctx), ctx, k), k


@torch.no_grad()
@BOTH
def test_the_tests_can_fail(model, choice):
    """Dropping entries, routing and β each move the logits by far more than any tolerance below."""
    comp, unrouted = (tiny_compressor(model, choice=choice, trained=t) for t in (True, False))
    ctx, cont = context(model, comp), continuation(model)
    full = logits(model, comp.full(model, ctx), cont)
    assert (full - logits(model, comp.compress(model, ctx, keep=0.1), cont)).abs().max() > 0.1
    which, k = chosen(comp, ctx)
    zero = torch.zeros_like(which.kept, dtype=torch.float32)
    a = logits(model, masked(model, comp, ctx, which, k, zero), cont)
    b = logits(model, masked(model, unrouted, ctx, which, k, zero), cont)
    c = logits(model, masked(model, comp, ctx, which, k, zero - 2.0 * which.kept), cont)
    assert (a - b).abs().max() > 0.05 and (a - c).abs().max() > 0.05


# 1 ---------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@BOTH
@pytest.mark.parametrize("how", [{"keep": 1.0}, {"tokens": 10_000}])
def test_1_keeping_everything_is_the_plain_model(model, choice, how):
    comp = tiny_compressor(model, choice=choice)
    ctx, cont = context(model, comp), continuation(model)
    plain = model.logits(model(torch.cat([ctx.tokens, cont], 1)))[:, N:]
    assert torch.allclose(logits(model, comp.compress(model, ctx, **how), cont), plain, atol=1e-4)


@torch.no_grad()
@BOTH
def test_1_untrained_routes_without_decay_change_nothing(model, choice):
    """B = 0, β = 0, all entries there: the machinery of part 4 is exact."""
    comp = tiny_compressor(model, trained=False, choice=choice)
    ctx, cont = context(model, comp), continuation(model)
    which, k = chosen(comp, ctx, 0.1)
    cache = masked(model, comp, ctx, which, k, torch.zeros_like(which.kept, dtype=torch.float32))
    plain = model.logits(model(torch.cat([ctx.tokens, cont], 1)))[:, N:]
    assert torch.allclose(logits(model, cache, cont), plain, atol=1e-4)


# 2 ---------------------------------------------------------------------------------------------------------------

def only(model, choice, tokens) -> Choice:
    """These tokens kept, in all heads or (`head`) in one head of every layer."""
    L, G = (model.cfg.n_layer, model.cfg.n_kv_head) if choice == "head" else (1, 1)
    kept = torch.zeros(2, L, G, N, dtype=torch.bool)
    kept[:, :, 0, tokens] = True
    return Choice(kept, torch.zeros(2, 1, 1, N, dtype=torch.bool), torch.zeros(2, 1, 1, 1))


@torch.no_grad()
@BOTH
def test_2_routing_reaches_others_only_through_attention(model, choice):
    comp, plain = (tiny_compressor(model, trained=t, choice=choice) for t in (True, False))
    ctx, which = context(model, comp), only(model, choice, [15, 22])
    store = lambda layer, k, v: (k, v)  # noqa: E731
    a, b = (c.encode(model, ctx, which, torch.tensor([2, 2]), store) for c in (comp, plain))
    for layer, (x, y) in enumerate(zip(a, b)):
        for one, other in zip(x, y):
            changed = (one - other).abs().amax((0, 1, 3)) > 1e-7             # (N,)
            assert not changed[:15].any(), "a token before the first routed one changed"
            if layer <= comp.cfg.eta:                                        # layers 1 … η+1 in the paper's count
                assert not changed.any()
    changed = (a[-1][1] - b[-1][1]).abs().amax((0, 1, 3)) > 1e-7
    assert changed[15] and changed[16:].any()


def test_2_strength_is_the_next_layers_share_and_grows_with_compression(model):
    """One of two heads keeps token 15 in layer 4 alone: routed by 1/2 in layer 3, and nowhere else; ρ = 1 at 100×."""
    comp, which = tiny_compressor(model), only(model, "head", [])
    which.kept[:, 3, 0, 15] = True
    route = comp.routes(which, torch.tensor([4000, 40]), torch.tensor([40, 40]), torch.float32)
    assert route(1) is None and route(5) is None                             # η = 2, six layers
    assert [float(route(i).mask[0, 15, 0]) for i in (2, 3, 4)] == pytest.approx([0.5, 0, 0])
    assert route(2).mask[0].sum() == pytest.approx(0.5) and route(2).mask[1].sum() == 0
    route = comp.routes(which, torch.tensor([800, 160]), torch.tensor([40, 40]), torch.float32)
    assert float(route(2).mask[0, 15, 0]) == pytest.approx(0.25)                 # half of it, times 1/2 at 20×
    assert comp.rho(torch.tensor([160, 80, 0]), torch.tensor([40, 40, 0])).tolist() == [0, 0, 0]  # none up to 4×
    route = comp.routes(which, torch.tensor([90000, 40]), torch.tensor([40, 40]), torch.float32)
    assert float(route(2).mask[0, 15, 0]) == 0.5                                 # beyond 100× it grows no more


# 3 ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("l, g", [(1, 1), (5, 2)])
def test_3_select_takes_exactly_the_top_of_the_budget(l, g):
    torch.manual_seed(0)
    scores, candidates = torch.randn(4, l, g, 30), torch.rand(4, 30) > 0.3
    k = kept_count(candidates.sum(1), keep=0.4)
    which = select(scores, candidates, k, recent=2)
    for i in range(4):
        kept, last = which.kept[i], candidates[i].nonzero()[-2:, 0]
        assert kept.sum() == k[i] * l * g and not kept[..., ~candidates[i]].any()
        assert kept[..., last].all() and which.fixed[i, 0, 0, last].all()
        free = candidates[i].clone()
        free[last] = False
        inside, outside = scores[i][kept & free], scores[i][~kept & free]
        assert inside.min() > outside.max()
        assert which.theta[i] == pytest.approx(float(inside.min() + outside.max()) / 2)


def test_3_recent_tokens_are_at_most_an_eighth_of_what_is_kept(model):
    """Rows of one batch that keep 40, 16, and 5 tokens per head: 4, 2, and 1 of them are each head's last ones."""
    comp, k = tiny_compressor(model, recent=4), torch.tensor([40, 16, 5])
    ctx = comp.read(model, torch.randint(97, (3, 60)))
    scores = -torch.arange(60.0).expand(3, 6, 2, 60)  # the last tokens are the worst
    fixed = comp.choose(scores, ctx, k).fixed & ctx.candidates[:, None, None]
    assert fixed.sum(-1).flatten().tolist() == [4, 2, 1]
    comp.cfg.recent = 0
    assert not (comp.choose(scores, ctx, k).fixed & ctx.candidates[:, None, None]).any()


def test_3_a_worked_budget():
    """Five tokens, two heads, K = 2, one recent: four entries. Head 1 looks at everything, head 2 at the last alone."""
    scores = torch.tensor([[[[-1.0, -2.0, -1.5, -3.0, -0.5], [-9.0, -8.0, -9.0, -7.0, -6.0]]]])
    which = select(scores, torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]), recent=1)
    assert which.kept[0, 0].int().tolist() == [[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]
    assert which.theta.item() == -1.75
    beta = decay(scores, which, "threshold", 0.5, soft=True)[0, 0, 0]
    assert beta.tolist() == pytest.approx([math.log(1 / (1 + math.exp(-x))) for x in (1.5, -0.5, 0.5, -2.5)] + [0],
                                          abs=1e-6)


def test_3_ties_go_to_the_earlier_token_and_bad_scores_are_errors():
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]).expand(1, 2, 1, 5)
    every = torch.ones(1, 5, dtype=torch.bool)
    assert select(scores, every, torch.tensor([2])).kept[0, :, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    bad = torch.tensor([[[[1.0, float("nan")]]]])
    with pytest.raises(BadInput, match="not a finite number"):
        select(bad, every[:, :2], torch.tensor([1]))
    assert select(bad, torch.tensor([[True, False]]), torch.tensor([1])).kept.flatten().tolist() == [True, False]


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

@BOTH
@pytest.mark.parametrize("kind, soft", [("sigmoid", False), ("threshold", False), ("threshold", True)])
def test_4_gradients_agree_with_finite_differences(choice, kind, soft):
    """float64; what is kept, and θ, held fixed. In hard `threshold` steps β has the value 0 but the gradient of its
    formula: that formula is what is differenced."""
    model = tiny_llama(torch.float64)
    comp = tiny_compressor(model, decay=kind, choice=choice)
    ctx, cont = context(model, comp), continuation(model)
    with torch.no_grad():
        scores, teacher = comp.scores(ctx), model(cont, comp.full(model, ctx)).flatten(0, 1)
    k = kept_count(ctx.candidates.sum(1), 0.1)
    which = comp.choose(scores, ctx, k)
    value = decay(scores, which, kind, comp.cfg.tau, soft)

    def loss_of_beta(beta):
        return DistillKL.apply(model(cont, masked(model, comp, ctx, which, k, beta)).flatten(0, 1), teacher,
                               model.head_weight, 0.6, 5)[0].mean()

    def loss_of_scores(s):
        beta = decay(s, which, kind, comp.cfg.tau, soft)
        if kind == "threshold" and not soft and not s.requires_grad:  # its value stays 0: difference the formula
            shift = decay(s, which, kind, comp.cfg.tau, True) - decay(scores, which, kind, comp.cfg.tau, True)
            beta = torch.where(which.kept, shift, value)
        return loss_of_beta(beta)

    free = (which.kept | (soft & ctx.candidates[:, None, None])) & ~which.fixed
    for f, at in ((loss_of_beta, value), (loss_of_scores, scores)):
        x = at.clone().requires_grad_()
        grad, = torch.autograd.grad(f(x), x)
        if f is loss_of_scores:
            assert (grad[~free] == 0).all()
        assert (grad[free] != 0).float().mean() > 0.9
        for at_index in free.nonzero().tolist()[::max(1, int(free.sum()) // 9)]:
            step = torch.zeros_like(at)
            step[tuple(at_index)] = 1e-5
            with torch.no_grad():
                numeric = (f(at + step) - f(at - step)) / 2e-5
            assert math.isclose(float(grad[tuple(at_index)]), float(numeric), rel_tol=1e-3, abs_tol=1e-8)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_4_loss_has_the_gradient_that_autograd_would_find(lam):
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


# 6, 7 ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@BOTH
@pytest.mark.parametrize("kind", ["threshold", "sigmoid"])
def test_6_a_ragged_batch_is_its_rows_one_by_one(model, choice, kind):
    comp = tiny_compressor(model, choice=choice, decay=kind)
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
        assert torch.equal(alone.entries()[0], together.entries()[i])


@torch.no_grad()
@BOTH
def test_7_protected_spans_survive_exactly_in_every_head(model, choice):
    """A span in the middle: all its positions, unrouted, β = 0; its keys up to layer η + 1 are the plain model's."""
    comp = tiny_compressor(model, choice=choice, decay="sigmoid")
    ctx = context(model, comp)
    ctx.candidates[:, 18:25] = False
    which, k = chosen(comp, ctx)
    assert not which.kept[..., 18:25].any()
    assert (comp.routes(which, ctx.candidates.sum(1), k, model.dtype)(comp.cfg.eta).mask[:, 18:25] == 0).all()
    cache, full = comp.compress(model, ctx, keep=0.1), comp.full(model, ctx)
    span = [*range(PROTECT), *range(18, 25)]
    for layer, parts in enumerate(cache.layers):
        first = 0
        for part in parts:
            for row in range(2):
                for head in range(part.k.shape[1]):
                    at = part.positions[row, min(head, part.positions.shape[1] - 1)].tolist()
                    slots = [at.index(p) for p in span]
                    assert (part.bias[row, min(head, part.bias.shape[1] - 1), slots] == 0).all()
                    if layer <= comp.cfg.eta:
                        want = full.layers[layer][0].k[row, first + head, span]
                        assert torch.equal(part.k[row, head, slots], want)
            first += part.k.shape[1]
    assert (cache.entries().sum((1, 2)) == (k + len(span)) * 12).all()       # 6 layers of 2 heads


# 9 ---------------------------------------------------------------------------------------------------------------

def everything(cache):
    return [x.clone() for parts in cache.layers for p in parts for x in p.tensors()] + [cache.next_position.clone()]


@torch.no_grad()
@BOTH
def test_9_step_by_step_is_one_pass_and_the_cache_stays(model, choice):
    comp = tiny_compressor(model, choice=choice)
    ctx, cont = context(model, comp), continuation(model)
    cache = comp.compress(model, ctx, keep=0.1)
    before = everything(cache)
    want = logits(model, cache, cont)
    room = cache.with_room(T)
    got = torch.cat([logits(model, room, cont[:, i:i + 1]) for i in range(T)], 1)
    assert torch.allclose(got, want, atol=1e-4)
    assert room.next_position.tolist() == [N + T] * 2, "the continuation starts at the original context length"
    assert all(torch.equal(a, b) for a, b in zip(before, everything(cache)))


# 10 --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@BOTH
@pytest.mark.parametrize("kind", ["threshold", "sigmoid"])
def test_10_gathered_equals_masked_and_only_what_stays_is_stored(model, choice, kind):
    comp = tiny_compressor(model, choice=choice, decay=kind)
    ctx, cont = context(model, comp, batch=1), continuation(model, batch=1)
    which, k = chosen(comp, ctx)
    short = comp.compress(model, ctx, keep=0.1)
    mask = masked(model, comp, ctx, which, k, decay(comp.scores(ctx), which, kind, comp.cfg.tau))
    assert torch.allclose(logits(model, short, cont), logits(model, mask, cont), atol=1e-4)
    entries = (int(k) + PROTECT) * 12
    books = sum(x.numel() * 4 for ps in short.layers for p in ps for x in (p.positions, p.bias) if x is not None)
    assert short.entries().sum() == entries and short.nbytes() == entries * 2 * 12 * 4 + books
    assert all((p.bias is None) == (kind == "threshold") for ps in short.layers for p in ps)


@torch.no_grad()
def test_10_parts_are_heads_of_equal_length_side_by_side():
    k = torch.arange(4 * 6.0).view(1, 4, 6, 1)                               # entry of head h, token t: 6h + t
    stay = torch.tensor([[[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1]]]).bool()
    parts = gather(stay[:, None])(3, k, -k)                                  # one choice for all layers
    assert [p.k[0, :, :, 0].tolist() for p in parts] == [[[0, 2], [10, 11]], [[12, 13, 14]], [[19, 23]]]
    assert [p.positions[0].tolist() for p in parts] == [[[0, 2], [4, 5]], [[0, 1, 2]], [[1, 5]]]
    assert all(torch.equal(p.v, -p.k) and p.bias is None for p in parts)
    both = torch.cat([stay, stay.roll(1, 1)])
    two = gather(torch.stack([~both, both], 1))(1, k.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1))  # a layer's own
    assert sum(p.k.shape[2] * p.k.shape[1] for p in two) == 2 + 2 + 3 + 3    # padded to the longer row, head by head
    assert all((p.bias is None) == bool((p.positions >= 0).all()) for p in two)


# What the scorer learns -------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("first, end, sinks", [(0, 20, 0), (6, 11, 2)])
def test_attention_received_is_the_largest_softmax_weight(first, end, sinks):
    """Against a plain softmax over the sinks, the part, and the segment's own tokens, in a padded batch."""
    model = tiny_llama()
    tokens, lengths = pad_right([[*range(20)], [*range(5, 18)]])
    asked, segments = torch.randint(0, 97, (2, 9)), torch.tensor([[0] * 5 + [1] * 4, [0] * 6 + [1] * 2 + [-1]])
    cache = model.prefill(tokens, lengths)
    got = attention_received(model, cache, asked, segments=segments, first=first, end=end, sinks=sinks)
    assert got.shape == (2, 6, 2, end - first) and (end < 20 or (got[1, ..., 13:] == 0).all())
    want = torch.zeros(2, 6, 2, 20)
    queries, keys = [], []
    for block in model.layers:  # what each layer's queries and keys are, before they meet
        block.attn.wq.register_forward_hook(lambda m, x, y: queries.append(y))
        block.attn.wk.register_forward_hook(lambda m, x, y: keys.append(y))
    model(asked, cache, segments)
    rope = model.rope(offsets(asked, segments) + cache.next_position[:, None])
    for layer in range(6):
        q, own = (rotate(x[layer].view(2, 9, -1, 12).transpose(1, 2), rope) for x in (queries, keys))
        k = torch.cat([cache.layers[layer][0].k, own], 2)
        for b, h, t in itertools.product(range(2), range(4), range(9)):
            there = [i for i in (*range(sinks), *range(first, end)) if i < lengths[b]]
            see = there + [20 + i for i in range(t + 1) if segments[b, i] == segments[b, t]]
            w = (k[b, h // 2, see] @ q[b, h, t] / 12 ** 0.5).softmax(0)[:len(there)]
            if segments[b, t] >= 0:
                want[b, layer, h // 2, there] = torch.maximum(want[b, layer, h // 2, there], w)
    assert torch.allclose(got, want[..., first:end], atol=1e-5)


# Edges -----------------------------------------------------------------------------------------------------------

def test_eta_must_leave_a_layer_to_adapt(model):
    for eta in (0, 5, 6, "2"):
        with pytest.raises(BadInput, match="eta"):
            tiny_compressor(model, eta=eta)


@BOTH
def test_a_row_without_anything_to_compress_harms_nobody(model, choice):
    """One row of the batch is protected as a whole: finite β and gradients for all, under both ways to decay."""
    comp = tiny_compressor(model, choice=choice)
    ctx = context(model, comp)
    ctx.candidates[1] = False
    which, k = chosen(comp, ctx)
    scores = comp.scores(ctx)
    for kind in ("threshold", "sigmoid"):
        beta = decay(scores, which, kind, 0.5)
        assert beta.isfinite().all() and (beta[1] == 0).all()
        grads = torch.autograd.grad(torch.where(which.kept, beta, 0).sum(), list(comp.scorer.parameters()),
                                    retain_graph=True)
        assert all(g.isfinite().all() for g in grads)
    short = comp.compress(model, ctx, keep=0.1)
    assert short.entries()[1].tolist() == [[N, N]] * 6
    assert model(torch.randint(97, (len(ctx.tokens), 3)), short).isfinite().all(), "nothing kept of nothing is no NaN"


@torch.no_grad()
def test_everything_protected_is_no_compression(model, compressor):
    ctx, cont = context(model, compressor), continuation(model)
    ctx.candidates[:] = False
    want = logits(model, compressor.full(model, ctx), cont)
    assert torch.equal(logits(model, compressor.compress(model, ctx, keep=0.1), cont), want)
