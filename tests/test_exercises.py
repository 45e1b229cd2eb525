"""exercises.md: six small tests, one for each function that a learner empties and writes again, in this order.

Each needs its own function and those before it, none after it, so a learner may empty all six at once. The tests below
them hold the page to that: an emptied function, and a plausible mistake, must be noticed by the test that is named.
"""
import math
import re
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

import compress
import train
from compress import Choice, Scorer, decay, gather, select
from conftest import ROOT, tiny_compressor, tiny_llama
from model import NEG
from train import DistillKL

# README's worked example: five tokens, two heads of one layer, K = 2, one recent token; (B, L, G, N) = (1, 1, 2, 5)
SCORES = torch.tensor([[[[-1.0, -2.0, -1.5, -3.0, -0.5], [-9.0, -8.0, -9.0, -7.0, -6.0]]]])
KEPT = torch.tensor([[[[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]]]).bool()
RECENT = torch.tensor([[[[0, 0, 0, 0, 1]]]]).bool()


def near(*want):
    return pytest.approx(want, abs=2e-3)


def test_1_scores():
    torch.manual_seed(0)
    scorer = Scorer(n_embd=4, hidden=8, n_layer=3, n_kv_head=2)
    h, lengths = torch.randn(2, 5, 4), torch.tensor([5, 3])  # the second row: three tokens, two of padding
    scores = scorer(h, lengths)
    assert scores.shape == (2, 3, 2, 5), "(B, L, G, N): for every token a number from every head"
    assert torch.allclose(scorer(7 * h, lengths), scores, atol=1e-5), "how long a hidden state is must not matter"
    alone = scorer(h[1:, :3], lengths[1:])
    assert torch.allclose(scores[1:, ..., :3], alone, atol=1e-5), "padding is not text that is still to come"
    second = h[0, 1] / h[0, 1].square().mean().sqrt()
    x = torch.cat([second, torch.tensor([math.log(1 + 3), math.log(1 + 1)])])  # three tokens follow, one precedes
    want = scorer.w2(F.gelu(scorer.w1(x))).view(3, 2)
    assert torch.allclose(scores[0, :, :, 1], want, atol=1e-5), "W₂·GELU(W₁·x); output l·G + g is head g of layer l"
    assert scorer(h.bfloat16(), lengths).dtype == torch.float32, "scores are fp32, whatever the model computes in"


def test_2_shared_budget():
    every, scores = torch.ones(1, 5, dtype=torch.bool), SCORES.mT.contiguous().mT  # as the scorer's: not contiguous
    choice = select(scores, every, torch.tensor([2]), recent=1)
    assert choice.kept.int().sum() == 4, "K = 2 for each of two heads on average: four entries"
    assert choice.kept[0, 0, 1, 4], "the recent token stays in every head, whatever its score"
    assert choice.kept.int().tolist() == KEPT.int().tolist(), "the best of both heads together, not of each"
    assert choice.theta.flatten().tolist() == near(-1.75), "between −1.5, the last that stays, and −2, the next"
    assert choice.fixed.int().tolist() == RECENT.int().tolist(), "fixed: what no score could have moved"
    every[0, 0] = False  # the first token is protected: it stays anyway, and takes no part
    choice = select(scores, every, torch.tensor([2]), recent=1)
    assert choice.kept[0, 0].int().tolist() == [[0, 1, 1, 0, 1], [0, 0, 0, 0, 1]], "only candidates use up the budget"
    assert choice.fixed[0, 0, 0].int().tolist() == [1, 0, 0, 0, 1]


def test_3_ragged_cache():
    k = torch.tensor([[11.0, 12, 13, 14, 15], [21, 22, 23, 24, 25]])[None, ..., None]  # (B, G, N, d): head, token
    parts = gather(KEPT)(0, k, -k)
    assert [p.k.flatten().tolist() for p in parts] == [[11, 13, 15], [25]], "a part for each length, nothing padded"
    assert [p.v.flatten().tolist() for p in parts] == [[-11, -13, -15], [-25]], "values go with their keys"
    assert [p.positions.flatten().tolist() for p in parts] == [[0, 2, 4], [4]], "where an entry stood in the context"
    assert all(p.bias is None for p in parts), "every entry is there in full: no bias"
    one, = gather(KEPT[:, :, :1])(0, k, -k)
    assert one.k[0, :, :, 0].tolist() == [[11, 13, 15], [21, 23, 25]], "heads that hold equally many share a part"
    two = torch.cat([KEPT, KEPT.flip(2)])  # a second row, in which the heads have changed places
    first, = gather(two)(0, k.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1))
    assert first.positions.tolist() == [[[0, 2, 4], [4, -1, -1]], [[4, -1, -1], [0, 2, 4]]], "shorter rows are padded"
    assert first.bias[0, 1].tolist() == [0, NEG, NEG], "and nobody hears the padding"


def test_4_decay_and_its_gradient():
    scores, choice = SCORES.clone().requires_grad_(), Choice(KEPT, RECENT, torch.full((1, 1, 1, 1), -1.75))

    def slope(beta):
        return torch.autograd.grad(beta.sum(), scores)[0][0, 0, 0].tolist()
    soft = decay(scores, choice, "threshold", 0.5, soft=True)
    assert soft[0, 0, 0].tolist() == near(-0.201, -0.974, -0.474, -2.579, 0), "soft: log σ((s − θ)/τ); recent ones 0"
    assert soft[0, 0, 0].softmax(-1).tolist() == near(0.283, 0.131, 0.215, 0.026, 0.346), "attention, once 0.2 each"
    assert slope(soft) == near(0.365, 1.245, 0.755, 1.848, 0), "dβ/ds = (1 − σ((s − θ)/τ))/τ"
    hard = decay(scores, choice, "threshold", 0.5)
    assert hard[0, 0].tolist() == [[0, NEG, 0, NEG, 0], [NEG, NEG, NEG, NEG, 0]], "hard: there, or not there"
    assert slope(hard) == near(0.365, 0, 0.755, 0, 0), "the value is 0, the gradient is still that of the formula"
    paper = decay(scores, choice, "sigmoid", 0.5)
    assert paper[0, 0, 0].tolist() == near(-1.313, NEG, -1.701, NEG, 0), "sigmoid: log σ(s), and its value stays"


def test_5_routing():
    comp = tiny_compressor(tiny_llama(), eta=2)  # six layers of two heads: layers[2], [3] and [4] have adapters
    kept = torch.zeros(1, 6, 2, 100, dtype=torch.bool)
    kept[0, 4, 0, 7] = kept[0, 5, :, 7] = True  # token 7 is kept by one head of layers[4] and both of layers[5]
    choice = Choice(kept, torch.zeros(1, 1, 1, 100, dtype=torch.bool), torch.zeros(1, 1, 1, 1))

    def strength(k):
        route = comp.routes(choice, torch.tensor([100]), torch.tensor([k]), torch.float32)
        return [route(i) if route(i) is None else float(route(i).mask[0, 7]) for i in range(6)]
    assert strength(1) == [None, None, 0, 0.5, 1, None], "at 100×: the share of the next layer's heads that keep it"
    assert strength(10)[2:5] == near(0, 0.125, 0.25), "at 10×, times (log 10 / log 100)² = 1/4"
    assert strength(100)[2:5] == near(0, 0, 0), "nothing is dropped: no routing"
    route = comp.routes(choice, torch.tensor([100]), torch.tensor([1]), torch.float32)(3)
    assert route.mask.shape == (1, 100, 1) and route.mask.sum() == 0.5, "a token that nobody keeps is not routed"
    assert torch.equal(route.a_q, comp.a_q[1]) and torch.equal(route.b_o, comp.b_o[1]), "layers[3] has the second ones"


def test_6_loss():
    """Three words; the head is the identity, so hidden states are logits."""
    p, q = torch.tensor([[0.7, 0.2, 0.1]] * 5), torch.tensor([[0.5, 0.3, 0.2]] * 5)

    def loss_and_gradient(lam):
        z = q.log().requires_grad_()
        loss, kl, agree = DistillKL.apply(z, p.log(), torch.eye(3), lam, 2)  # two rows at a time
        assert kl.tolist() == near(*[0.085] * 5) and agree.tolist() == [1] * 5, "always KL(p‖q); the top word agrees"
        return [loss[4].item(), *torch.autograd.grad(loss.sum(), z)[0][4].tolist()]
    assert loss_and_gradient(1.0) == near(0.085, -0.2, 0.1, 0.1), "forward: Σ p·log(p/q); its gradient is q − p"
    got = loss_and_gradient(0.0)
    assert got[0] == pytest.approx(0.092, abs=2e-3), "reverse: Σ q·log(q/p)"
    assert got[1:] == near(-0.214, 0.094, 0.120), "its gradient is q·(log q − log p − KL(q‖p))"
    assert loss_and_gradient(0.6) == near(0.088, -0.206, 0.098, 0.108), "0.6 of the first and 0.4 of the second"


# exercises.md keeps its word -----------------------------------------------------------------------------------------

PAGE = (ROOT / "exercises.md").read_text(encoding="utf-8")
STEPS = [(re.search(r"\*\*Empty\*\* `([\w.]+)`", part)[1], re.search(r"tests/test_exercises\.py::(\w+)", part)[1])
         for part in re.split(r"^## (?=\d)", PAGE, flags=re.M)[1:]]


def function(name: str):
    module, *path = name.split(".")
    found = import_module(module)
    for part in path:
        found = getattr(found, part)
    return found


def emptied(*_, **__):
    raise NotImplementedError


# The mistakes replace a function's code, not its name, so all who imported it have them; names are its module's.

def padding_counts(self, h, lengths):
    before = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
    after = h.shape[1] - 1 - before
    x = torch.cat([F.rms_norm(h.float(), h.shape[-1:]), torch.stack([after, before], -1).float().log1p()], -1)
    return self.w2(F.gelu(self.w1(x))).transpose(1, 2).unflatten(1, self.heads)


def each_head_its_own(scores, candidates, k, recent=0, check=True):
    forced = torch.zeros_like(candidates)[:, None, None]
    forced[..., -recent:] = True
    best = scores.masked_fill(forced, math.inf).topk(int(k[0]), -1).indices
    return Choice(torch.zeros_like(scores).bool().scatter(-1, best, True), forced, scores.mean((1, 2, 3), True))


def padded_to_the_longest(stay, beta=None):
    longest = int(stay.sum(-1).max())
    index = (~stay).to(torch.uint8).argsort(dim=-1, stable=True)[:, 0, :, :longest]
    real = stay[:, 0].gather(2, index)

    def store(layer, k, v):
        row, head = torch.arange(k.shape[0])[:, None, None], torch.arange(k.shape[1])[:, None]
        return [Part(k[row, head, index], v[row, head, index], torch.where(real, index, -1),  # noqa: F821
                     torch.where(real, 0.0, NEG))]
    return store


def no_gradient_when_hard(scores, choice, kind, tau, soft=False):
    beta = F.logsigmoid(scores if kind == "sigmoid" else (scores - choice.theta) / tau).where(~choice.fixed, 0)
    return beta if soft else torch.where(choice.kept | choice.fixed, beta if kind == "sigmoid" else beta * 0, NEG)


def this_layers_share(self, choice, n, k, dtype):
    strength = choice.share * ((n / k).log() / math.log(100)).clamp(max=1).square()[:, None, None]
    return lambda layer: None if not 0 <= layer - self.cfg.eta < len(self.a_q) else Route(  # noqa: F821
        strength[:, layer, :, None], *(x[layer - self.cfg.eta] for x in self.adapters()))


def the_other_way_round(ctx, student, teacher, head, lam, chunk):
    log_q, log_p = (F.linear(x, head).log_softmax(-1) for x in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    ctx.save_for_backward((q - p) @ head)  # the whole loss has the gradient of its first half
    ctx.mark_non_differentiable(forward)
    return lam * forward + (1 - lam) * reverse, forward.clone(), (log_q.argmax(-1) == log_p.argmax(-1)).float()


MISTAKES = [padding_counts, each_head_its_own, padded_to_the_longest, no_gradient_when_hard, this_layers_share,
            the_other_way_round]


def test_the_page_names_the_six_tests_in_order():
    assert [test for _, test in STEPS] == [name for name in globals() if re.match(r"test_\d", name)]
    assert len(STEPS) == len(MISTAKES) == 6


@pytest.mark.parametrize("step", range(len(STEPS)), ids=[name for name, _ in STEPS])
def test_an_emptied_function_and_a_mistake_are_noticed_where_the_page_says(step, monkeypatch):
    """And what comes later on the page is not needed yet."""
    for name, _ in STEPS[step + 1:]:
        monkeypatch.setattr(function(name), "__code__", emptied.__code__)
    name, test = STEPS[step]
    globals()[test]()
    monkeypatch.setattr(function(name), "__code__", emptied.__code__)
    with pytest.raises(NotImplementedError):
        globals()[test]()
    monkeypatch.setattr(function(name), "__code__", MISTAKES[step].__code__)
    with pytest.raises(AssertionError) as noticed:
        globals()[test]()
    assert not str(noticed.value).startswith("assert"), "a failure begins with a sentence that teaches"
