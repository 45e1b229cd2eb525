"""exercises.md: six small tests, one for each function that a learner empties and writes again, in this order.

Each needs its own function and those before it, none after it, so a learner may empty all six at once. What holds the
page to that is in test_exercises_page.py, which gives answers away.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from compress import Choice, Scorer, decay, gather, select
from conftest import tiny_compressor, tiny_llama
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
    assert strength(5)[2:5] == near(0, 0.25, 0.5), "at 20×, times log(20/4) / log(100/4) = 1/2"
    assert strength(25)[2:5] == near(0, 0, 0), "up to 4× nothing is routed"
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
