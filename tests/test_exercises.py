"""exercises.md: six small tests, one for each function that a learner empties and
writes again.

Each test needs its own function and those of earlier steps, but none of later steps.
test_exercises_page.py checks this; it gives the answers away.
"""

import pytest
import torch
import torch.nn.functional as F

from compress import Scorer, Selection, decay, gather, select
from conftest import tiny_compressor, tiny_llama
from model import NEG, attention
from train import DistillKL

# Five tokens, two heads of one layer, K = 2, one recent token: (B, L, G, N) = (1, 1, 2, 5)
SCORES = torch.tensor([[[[-1.0, -2.0, -1.5, -3.0, -0.5], [-9.0, -8.0, -9.0, -7.0, -6.0]]]])
KEPT = torch.tensor([[[[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]]]).bool()
RECENT = torch.tensor([[[[0, 0, 0, 0, 1]]]]).bool()
THETA = torch.tensor([[[[-1.75]]]])


def near(*expected):
    return pytest.approx(expected, abs=2e-3)


def test_1_scores():
    torch.manual_seed(0)
    scorer = Scorer(n_embd=4, hidden=8, n_layer=3, n_kv_head=2)
    h = torch.randn(2, 5, 4)
    lengths = torch.tensor([5, 3])  # the second row has two tokens of padding
    scores = scorer(h, lengths)
    assert scores.shape == (2, 3, 2, 5), "(B, L, G, N): every head gives every token a score"
    scaled = scorer(7 * h, lengths)
    assert torch.allclose(scaled, scores, atol=1e-5), "the length of a hidden state must not matter"
    alone = scorer(h[1:, :3], lengths[1:])
    assert torch.allclose(scores[1:, ..., :3], alone, atol=1e-5), "padding does not count as text"

    second = h[0, 1] / h[0, 1].square().mean().sqrt()
    distances = torch.tensor([3.0, 1.0]).log1p()  # three tokens follow, one precedes
    expected = scorer.w2(F.gelu(scorer.w1(torch.cat([second, distances])))).view(3, 2)
    assert torch.allclose(scores[0, :, :, 1], expected, atol=1e-5), (
        "W₂·GELU(W₁·x), and output l·G + g is the score of head g of layer l")
    dtype = scorer(h.bfloat16(), lengths).dtype
    assert dtype == torch.float32, "scores are fp32 for bf16 models, too"


def test_2_shared_budget():
    compressible = torch.ones(1, 5, dtype=torch.bool)
    scores = SCORES.mT.contiguous().mT  # not contiguous, like those of the scorer
    selection = select(scores, compressible, torch.tensor([2]), RECENT)
    assert selection.kept.sum() == 4, "K = 2 per head on average, and two heads: four entries"
    assert selection.kept[0, 0, 1, 4], "every head keeps its recent token, whatever its score"
    assert torch.equal(selection.kept, KEPT), "the best of both heads together, not of each head"
    assert torch.equal(selection.theta, THETA), "midway between −1.5, the last kept, and −2"
    assert torch.equal(selection.score_ignored, RECENT), "score_ignored: what no score could have changed"
    less = select(scores, compressible, torch.tensor([2]), RECENT, reserved=1)
    assert less.kept.sum() == 3, "registers use up budget"
    less = select(scores, compressible, torch.tensor([2]), RECENT, reserved=4)
    assert less.kept.sum() == 2, "but one entry per head is kept, on average"
    assert less.theta.isfinite().all(), "θ is finite, even if all kept entries are forced"

    compressible[0, 0] = False  # the first token is protected
    selection = select(scores, compressible, torch.tensor([2]), RECENT)
    expected = [[0, 1, 1, 0, 1], [0, 0, 0, 0, 1]]
    assert selection.kept[0, 0].int().tolist() == expected, "protected tokens use no budget"
    assert selection.score_ignored[0, 0, 0].int().tolist() == [1, 0, 0, 0, 1], "protected or recent"


def test_3_ragged_cache():
    k = torch.tensor([[11.0, 12, 13, 14, 15], [21, 22, 23, 24, 25]])[None, ..., None]
    groups = gather(KEPT)(0, k, -k)
    keys = [group.k.flatten().tolist() for group in groups]
    assert keys == [[11, 13, 15], [25]], "one group for each length, and nothing is padded"
    assert all(torch.equal(group.v, -group.k) for group in groups), "values go with their keys"
    positions = [group.positions.flatten().tolist() for group in groups]
    assert positions == [[0, 2, 4], [4]], "where an entry stood in the context"
    assert all(group.bias is None for group in groups), "nothing is padded or decayed: no bias"
    moved = gather(KEPT, position=torch.tensor([[9, 8, 7, 6, 5]]))(0, k, -k)
    positions = [group.positions.flatten().tolist() for group in moved]
    assert positions == [[9, 7, 5], [5]], "`position`, if it is given, says where an entry stood"

    groups = gather(KEPT[:, :, :1])(0, k, -k)
    keys = [group.k[0, :, :, 0].tolist() for group in groups]
    assert keys == [[[11, 13, 15], [21, 23, 25]]], "heads that keep equally many share a group"

    rows = torch.cat([KEPT, KEPT.flip(2)])  # in the second row the heads change places
    k = k.expand(2, -1, -1, -1)
    positions = [group.positions.tolist() for group in gather(rows)(0, k, k)]
    expected = [[[[0, 2, 4], [4, -1, -1]], [[4, -1, -1], [0, 2, 4]]]]
    assert positions == expected, "the shorter row of a head is padded, with position −1"
    bias = gather(rows)(0, k, k)[0].bias
    assert bias[0, 1].tolist() == [0, NEG, NEG], "attention must not see the padding"


def test_4_decay_and_its_gradient():
    scores = SCORES.clone().requires_grad_()
    selection = Selection(KEPT, RECENT, THETA)

    def gradient(x):
        return torch.autograd.grad(x.sum(), scores)[0][0, 0, 0].tolist()

    soft = decay(scores, selection, "threshold", 0.5, soft=True)
    expected = near(-0.201, -0.974, -0.474, -2.579, 0)
    assert soft[0, 0, 0].tolist() == expected, "soft: log σ((s − θ)/τ), and 0 for recent tokens"
    expected = near(0.365, 1.245, 0.755, 1.848, 0)
    assert gradient(soft) == expected, "dβ/ds = (1 − σ((s − θ)/τ))/τ"

    hard = decay(scores, selection, "threshold", 0.5)
    assert hard[0, 0].tolist() == [[0, NEG, 0, NEG, 0], [NEG, NEG, NEG, NEG, 0]], "kept or dropped"
    assert gradient(hard) == near(0.365, 0, 0.755, 0, 0), "the value is 0, the gradient remains"
    protected = Selection(KEPT & ~RECENT, RECENT, THETA)
    assert not decay(scores, protected, "threshold", 0.5)[..., 4].any(), (
        "what is not scored has 0, also if it is not in `kept`")
    paper = decay(scores, selection, "sigmoid", 0.5)
    expected = near(-1.313, NEG, -1.701, NEG, 0)
    assert paper[0, 0, 0].tolist() == expected, "sigmoid: log σ(s), and its value stays"

    q, k, v = torch.arange(56.0).sin().view(1, 1, 14, 4).split([4, 5, 5], dim=2)
    hard = decay(scores, selection, "threshold", 0.5)[:, 0, :1]
    reached = [x != 0 for x in gradient(attention(q, k, v, torch.ones(1, 1, 4, 4).bool(), hard))]
    assert reached == [True, False, True, False, False], "through attention, too"


def test_5_routing():
    compressor = tiny_compressor(tiny_llama(), eta=2)  # layers[2], [3] and [4] have LoRA
    kept = torch.zeros(1, 6, 2, 100, dtype=torch.bool)
    kept[0, 4, 0, 7] = True  # token 7 is kept by one head of layers[4]
    kept[0, 5, :, 7] = True  # and by both heads of layers[5]
    fraction = kept.float().mean(2)  # (B, L, N)

    def lora_at(k):
        n, k = torch.tensor([[100], [k]])
        lora = compressor.token_lora(fraction, n, k, torch.float32)
        return [lora(layer) for layer in range(6)]

    def strengths(k):
        return [float(x.strength[0, 7]) for x in lora_at(k)[2:5]]

    lora = lora_at(1)
    assert [x is None for x in lora] == [True, True, False, False, False, True], "layers with LoRA"
    assert strengths(1) == near(0, 0.5, 1), "the fraction of the next layer's heads that keep it"
    assert strengths(5) == near(0, 0.25, 0.5), "at 20×, times log(20/4) / log(100/4) = 1/2"
    assert strengths(25) == near(0, 0, 0), "up to 4× LoRA does nothing"
    assert lora[3].strength.shape == (1, 100, 1), "(B, N, 1)"
    assert lora[3].strength.sum() == 0.5, "a token that no head keeps has strength 0"
    assert torch.equal(lora[3].a_q, compressor.a_q[1]), "layers[3] has the second matrices"
    assert torch.equal(lora[3].b_o, compressor.b_o[1]), "layers[3] has the second matrices"


@pytest.mark.parametrize("lam, loss, gradient, why", [
    (1.0, 0.085, (-0.2, 0.1, 0.1), "forward: Σ p·log(p/q), with the gradient q − p"),
    (0.0, 0.092, (-0.214, 0.094, 0.120), "reverse: Σ q·log(q/p), with q·(log q − log p − KL(q‖p))"),
    (0.6, 0.088, (-0.206, 0.098, 0.108), "0.6 of the first and 0.4 of the second"),
])
def test_6_loss(lam, loss, gradient, why):
    """Three words. The head is the identity, so that hidden states are logits."""
    p = torch.tensor([[0.7, 0.2, 0.1]] * 5)
    z = torch.tensor([[0.5, 0.3, 0.2]] * 5).log().requires_grad_()
    losses, kl, agree = DistillKL.apply(z, p.log(), torch.eye(3), lam, 2)  # two rows at a time
    assert kl.tolist() == near(*[0.085] * 5), "the second result is KL(p‖q), whatever λ is"
    assert agree.tolist() == [1] * 5, "both put the same word first"
    assert losses.tolist() == near(*[loss] * 5), why
    losses.sum().backward()
    assert z.grad[4].tolist() == near(*gradient), why
