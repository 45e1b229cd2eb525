"""The invariants of the method on tiny random models, for both kinds of selection.

Test names begin with the number of the invariant:
   1  keep = 1 is the plain model
   2  LoRA changes a dropped token only through attention to kept ones
   3  the kept entries are the top of the budget
   4  gradients agree with finite differences
   5  training leaves the frozen model as it was
   6  a ragged batch is its rows
   7  a protected span survives exactly
   8  saving and loading change no bit
   9  decoding step by step is one forward pass
  10  the gathered cache equals the masked one
  11  the selection learns
"""
import doctest

import pytest
import torch

import compress as compress_file
from compress import (
    Selection, attention_and_effect, decay, kept_count, last_tokens, max_attention, select)
from conftest import tiny_compressor, tiny_llama
from model import NEG, full_cache, pad_right, relative_positions, rotate
from run.checkpoint import load_cache, save_cache
from run.errors import BadInput
from train import DistillKL

N = 40          # context tokens
PROTECTED = 3   # the first of them
T = 7           # tokens of a continuation


def read(model, compressor, batch=2):
    """A context of random tokens."""
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 97, (batch, N), generator=rng).to(model.device)
    protect = torch.arange(N, device=model.device).expand(batch, N) < PROTECTED
    return compressor.read(model, tokens, protect=protect)


def continuation(model, batch=2):
    rng = torch.Generator().manual_seed(4)
    return torch.randint(0, 97, (batch, T), generator=rng).to(model.device)


def select_at(compressor, ctx, keep=0.1):
    """A selection and its k, by default at 10×, where LoRA has its part."""
    k = kept_count(ctx.compressible.sum(1), keep)
    return compressor.select(compressor.scorer(ctx.h, ctx.lengths), ctx, k, registers=True), k


def masked_cache(model, compressor, ctx, chosen, k, beta):
    """The cache of training: nothing is gathered, dropped entries have a bias."""
    return compressor.training_cache(ctx, compressor.encode(model, ctx, chosen, k), beta, k)


def budget_is_spent(compressor, cache, k):
    """Whether the 12 heads hold k entries on average, registers among them. With a
    selection per token, a fraction of a token may be left."""
    entries = int(cache.entries().sum())
    if compressor.cfg.selection == "head":
        return entries == k * 12
    return k * 12 - 12 < entries <= k * 12


def logits(model, cache, tokens):
    return model.logits(model(tokens, cache))


def plain_logits(model, ctx, tokens):
    """Those of the model itself, without any cache."""
    return model.logits(model(torch.cat([ctx.tokens, tokens], 1))[:, N:])


# Every test that uses `compressor` runs for both kinds of selection. Those that
# are parametrized by `decay_kind` or `dtype` replace the fixture of this name.

@pytest.fixture(params=["head", "token"])
def selection(request):
    return request.param


@pytest.fixture
def decay_kind():
    return "threshold"


@pytest.fixture
def dtype():
    return torch.float32


@pytest.fixture
def model(dtype):
    return tiny_llama(dtype)


@pytest.fixture
def compressor(model, selection, decay_kind):
    return tiny_compressor(model, selection=selection, decay=decay_kind)


@pytest.fixture
def fresh(model, selection):
    """The compressor before training, with B = 0 and no registers."""
    return tiny_compressor(model, selection=selection, trained=False, registers=0)


@pytest.fixture
def ctx(model, compressor):
    return read(model, compressor)


@pytest.fixture
def tokens(model):
    return continuation(model)


both_decays = pytest.mark.parametrize("decay_kind", ["threshold", "sigmoid"])


def test_the_lines_at_the_top_of_compress_run():
    result = doctest.testmod(compress_file)
    assert result.attempted and not result.failed


@torch.no_grad()
def test_the_tests_can_fail(model, compressor, fresh, ctx, tokens):
    """Selection and LoRA move the logits by far more than any tolerance."""
    full = logits(model, compressor.full_cache(model, ctx), tokens)
    trained = logits(model, compressor.compress(model, ctx, keep=0.1), tokens)
    untrained = logits(model, fresh.compress(model, ctx, keep=0.1), tokens)
    assert (full - untrained).abs().max() > 0.1
    assert (trained - untrained).abs().max() > 0.05


# -------------------------------------------------------------- 1, 2: what LoRA does

@torch.no_grad()
@pytest.mark.parametrize("size", [{"keep": 1.0}, {"tokens": 10_000}], ids=str)
def test_1_keeping_everything_is_the_plain_model(model, compressor, ctx, tokens, size):
    ours = logits(model, compressor.compress(model, ctx, **size), tokens)
    assert torch.allclose(ours, plain_logits(model, ctx, tokens), atol=1e-4)


@torch.no_grad()
def test_1_fresh_lora_without_decay_is_the_plain_model(model, fresh, ctx, tokens):
    chosen, k = select_at(fresh, ctx)
    cache = masked_cache(model, fresh, ctx, chosen, k, torch.zeros(chosen.kept.shape))
    ours = logits(model, cache, tokens)
    assert torch.allclose(ours, plain_logits(model, ctx, tokens), atol=1e-4)


@torch.no_grad()
def test_2_lora_changes_dropped_tokens_only_through_attention(model, compressor, fresh, ctx):
    kept = torch.zeros(2, *compressor.scorer.shape, N, dtype=torch.bool)
    kept[:, :, 0, [15, 22]] = True  # by one head of each layer
    chosen = Selection(kept, torch.zeros(2, 1, 1, N).bool(), torch.zeros(2, 1, 1, 1))
    k = torch.tensor([2, 2])
    changed = []  # of each layer, which tokens: (N,)
    for a, b in zip(*[c.encode(model, ctx, chosen, k) for c in (compressor, fresh)]):
        difference = torch.stack(a)[..., :N, :] - torch.stack(b)  # (2, B, G, N, d)
        changed.append(difference.abs().amax((0, 1, 2, 4)) > 1e-7)
    changed = torch.stack(changed)
    assert not changed[:, :15].any(), "nothing before the first kept token"
    assert not changed[:compressor.cfg.eta + 1].any(), "nothing in layers 1 to η+1"
    assert changed[-1, 15] and changed[-1, 16:22].any()


@pytest.mark.parametrize("how, expected", [
    ("growing", [1, 1, 0.5, 0, 0, 0]),
    ("full", [1, 1, 1, 1, 1, 0]),
])
def test_routing_strength_depends_on_the_compression(model, how, expected):
    n = torch.tensor([90000, 4000, 800, 160, 41, 0])
    k = torch.tensor([40, 40, 40, 40, 40, 0])
    compressor = tiny_compressor(model, routing_strength=how)
    assert compressor.routing_strength(n, k).tolist() == pytest.approx(expected)


# ------------------------------------------------------------------ 3: the selection

@pytest.mark.parametrize("heads", [(1, 1), (5, 2)])
def test_3_select_takes_the_top_of_the_budget(heads):
    torch.manual_seed(0)
    scores = torch.randn(4, *heads, 30)
    compressible = torch.rand(4, 30) > 0.3
    k = kept_count(compressible.sum(1), keep=0.4)
    forced = last_tokens(compressible, 2)[:, None, None]
    chosen = select(scores, compressible, k, forced)
    for row in range(4):
        kept = chosen.kept[row]
        assert kept.sum() == k[row] * heads[0] * heads[1]
        assert not kept[..., ~compressible[row]].any()
        recent = compressible[row].nonzero()[-2:, 0]
        assert kept[..., recent].all() and chosen.score_ignored[row, 0, 0, recent].all()

        scored = ~chosen.score_ignored[row]
        last = scores[row][kept & scored].min()
        next_ = scores[row][~kept & scored].max()
        assert last > next_
        assert torch.isclose(chosen.theta[row], (last + next_) / 2)


def test_3_recent_tokens_are_an_eighth_of_the_kept_ones_at_most(model):
    compressor = tiny_compressor(model, recent=4)
    ctx = compressor.read(model, torch.randint(97, (3, 60)))
    k = torch.tensor([40, 16, 5])
    chosen = compressor.select(compressor.scorer(ctx.h, ctx.lengths), ctx, k)
    assert chosen.score_ignored.sum(-1).flatten().tolist() == [4, 2, 1]


def test_3_ties_go_to_the_earlier_head_and_token():
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]).expand(1, 2, 1, 5)
    chosen = select(scores, torch.ones(1, 5).bool(), torch.tensor([2]))
    assert chosen.kept[0, :, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]


def test_3_a_score_that_is_not_finite_is_an_error():
    """Unless it belongs to padding."""
    scores = torch.tensor([[[[1.0, torch.nan]]]])
    with pytest.raises(BadInput, match="a score is not finite"):
        select(scores, torch.tensor([[True, True]]), torch.tensor([1]))
    chosen = select(scores, torch.tensor([[True, False]]), torch.tensor([1]))
    assert chosen.kept.flatten().tolist() == [True, False]


@pytest.mark.parametrize("n, size, expected", [
    (30, {"keep": 0.1}, 3),
    (11, {"keep": 0.1}, 2),
    (100, {"keep": 0.07}, 7),
    (3, {"keep": 1.0}, 3),
    (0, {"keep": 0.5}, 0),
    (10, {"tokens": 10 ** 30}, 10),
], ids=str)
def test_3_kept_count_is_the_ceiling(n, size, expected):
    assert kept_count(torch.tensor([n]), **size).tolist() == [expected]


@pytest.mark.parametrize("size", [
    {"keep": 0.0}, {"keep": 1.1}, {"tokens": 0}, {}, {"keep": 0.1, "tokens": 3},
], ids=str)
def test_a_wrong_size_is_refused(size):
    with pytest.raises(BadInput):
        kept_count(torch.tensor([10]), **size)


# ------------------------------------------------------------ 4, 5: gradient, training

def teacher_of(model, compressor, ctx):
    """Hidden states of a continuation that looks back at the full cache."""
    with torch.no_grad():
        return model(continuation(model), compressor.full_cache(model, ctx)).flatten(0, 1)


def distillation(model, compressor, ctx, teacher, chosen, k, beta):
    """The loss of a training step."""
    cache = masked_cache(model, compressor, ctx, chosen, k, beta)
    student = model(continuation(model), cache).flatten(0, 1)
    loss, _, _ = DistillKL.apply(student, teacher, model.head_weight, 0.6, 5)
    return loss.mean()


@both_decays
@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("soft", [False, True])
def test_4_gradients_agree_with_finite_differences(model, compressor, ctx, decay_kind, soft):
    """Towards β and towards the scores, with the kept entries and θ held fixed.

    A hard step gives kept entries alone a gradient, a soft step all. In a hard
    step of "threshold" the value of β stays 0; its formula is differenced.
    """
    teacher = teacher_of(model, compressor, ctx)
    chosen, k = select_at(compressor, ctx)

    def loss(beta):
        return distillation(model, compressor, ctx, teacher, chosen, k, beta)

    def formula(scores):
        return decay(scores, chosen, decay_kind, 0.5, soft=True)

    scores = compressor.scorer(ctx.h, ctx.lengths).detach().requires_grad_()
    beta = decay(scores, chosen, decay_kind, 0.5, soft)
    beta.retain_grad()
    loss(beta).backward()
    decayed = ~chosen.score_ignored & (chosen.kept | soft)
    assert torch.equal(scores.grad != 0, decayed)

    some = decayed.nonzero()[::1 + int(decayed.sum()) // 9]
    for entry in some.tolist():
        step = torch.zeros_like(scores)
        step[tuple(entry)] = 1e-5
        with torch.no_grad():
            up = formula(scores + step) - formula(scores)
            down = formula(scores - step) - formula(scores)
            of_scores = loss(beta + up) - loss(beta + down)
            of_beta = loss(beta + step) - loss(beta - step)
        for grad, difference in ((scores.grad, of_scores), (beta.grad, of_beta)):
            numeric = float(difference) / 2e-5
            assert float(grad[tuple(entry)]) == pytest.approx(numeric, rel=1e-3, abs=1e-8)


def test_5_training_leaves_the_frozen_model_as_it_was(model, compressor, ctx):
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(compressor.parameters(), lr=1e-2)
    teacher = teacher_of(model, compressor, ctx)
    for soft in (False, True):
        chosen, k = select_at(compressor, ctx)
        beta = decay(compressor.scorer(ctx.h, ctx.lengths), chosen, "threshold", 0.5, soft)
        distillation(model, compressor, ctx, teacher, chosen, k, beta).backward()
        assert all(p.grad.any() for p in compressor.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


# ------------------------------------------------------------- 6 to 10: the cache

@torch.no_grad()
@both_decays
def test_6_a_ragged_batch_is_its_rows(model, compressor):
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 97, (n,), generator=rng).tolist() for n in (40, 17, 33, 5)]
    tokens, lengths = pad_right(rows)
    protect = torch.arange(40).expand(4, 40) < 2
    questions = continuation(model, batch=4)
    ctx = compressor.read(model, tokens, lengths, protect)
    together = compressor.compress(model, ctx, tokens=6)
    answers = logits(model, together, questions)
    for i, n in enumerate(lengths):
        ctx = compressor.read(model, tokens[i:i + 1, :n], protect=protect[i:i + 1, :n])
        alone = compressor.compress(model, ctx, tokens=6)
        answer = logits(model, alone, questions[i:i + 1])
        assert torch.allclose(answer[0], answers[i], atol=1e-4)
        assert torch.equal(alone.entries()[0], together.entries()[i])


def heads_of(groups):
    """Keys, positions and biases of each head of a layer; of the first row."""
    for group in groups:
        for i in range(group.k.shape[1]):
            shared = min(i, group.positions.shape[1] - 1)
            bias = None if group.bias is None else group.bias[0, shared]
            yield group.k[0, i], group.positions[0, shared], bias


@torch.no_grad()
@pytest.mark.parametrize("decay_kind", ["sigmoid"])
def test_7_a_protected_span_survives_exactly(model, compressor):
    """In every head, without LoRA, without decay, and outside of the budget."""
    ctx = read(model, compressor, batch=1)
    ctx.compressible[:, 18:25] = False
    protected = ctx.protected[0]
    chosen, k = select_at(compressor, ctx)
    fraction = chosen.kept.float().mean(2)
    lora = compressor.token_lora(fraction, ctx.compressible.sum(1), k, model.dtype)
    assert not lora(compressor.cfg.eta).strength[0, protected].any()

    full = compressor.full_cache(model, ctx)
    cache = compressor.compress(model, ctx, keep=0.1)
    assert budget_is_spent(compressor, cache, k + protected.sum())
    for layer, groups in enumerate(cache.layers):
        for head, (keys, positions, bias) in enumerate(heads_of(groups)):
            spared = protected[positions]
            assert spared.sum() == protected.sum()
            assert not bias[spared].any()
            if layer <= compressor.cfg.eta:
                is_register = torch.zeros_like(spared)
                is_register[-1] = layer == compressor.cfg.eta  # it is stored last
                original = full.layers[layer][0].k[0, head, positions]
                assert torch.equal(keys[~is_register], original[~is_register])


class Tokenizer:
    """What a saved cache needs of one."""
    fingerprint = "t"
    system = None


@torch.no_grad()
@both_decays
def test_8_saving_and_loading_change_no_bit(model, compressor, tokens, tmp_path):
    """Of rows of different lengths, whose heads differ, too."""
    contexts, lengths = pad_right([[*range(50)], [*range(31)]])
    ctx = compressor.read(model, contexts, lengths)
    cache = compressor.compress(model, ctx, keep=0.1)
    save_cache(tmp_path / "cache", cache, model, Tokenizer)
    loaded = load_cache(tmp_path / "cache", model, Tokenizer)
    assert torch.equal(logits(model, loaded, tokens), logits(model, cache, tokens))


@torch.no_grad()
def test_9_decoding_is_one_forward_pass_and_the_cache_stays(model, compressor, ctx, tokens):
    cache = compressor.compress(model, ctx, keep=0.1)
    before = [g.map(torch.clone).tensors() for groups in cache.layers for g in groups]
    expected = model(tokens, cache)
    reserved = cache.reserve(T)
    decoded = torch.cat([model(token, reserved) for token in tokens.split(1, dim=1)], 1)
    assert torch.allclose(decoded, expected, atol=1e-4)
    assert reserved.next_position.tolist() == [N + T] * 2, "positions count the whole context"
    after = [g.tensors() for groups in cache.layers for g in groups]
    assert all(all(map(torch.equal, a, b)) for a, b in zip(before, after))


@torch.no_grad()
@both_decays
def test_10_the_gathered_cache_equals_the_masked_one(model, compressor, ctx, tokens, decay_kind):
    chosen, k = select_at(compressor, ctx)
    beta = decay(compressor.scorer(ctx.h, ctx.lengths), chosen, decay_kind, 0.5)
    masked = logits(model, masked_cache(model, compressor, ctx, chosen, k, beta), tokens)
    gathered = logits(model, compressor.compress(model, ctx, keep=0.1), tokens)
    assert torch.allclose(gathered, masked, atol=1e-4)


@torch.no_grad()
def test_10_only_what_is_kept_takes_memory(model, compressor):
    ctx = read(model, compressor, batch=1)
    cache = compressor.compress(model, ctx, keep=0.1)
    groups = [group for groups in cache.layers for group in groups]
    positions = sum(group.positions.numel() for group in groups)
    entries = int(cache.entries().sum())
    assert budget_is_spent(compressor, cache, 4 + PROTECTED)  # K = ⌈0.1 · 37⌉ = 4
    assert cache.nbytes() == entries * 2 * 12 * 4 + positions * 4
    assert all(group.bias is None for group in groups)


# -------------------------------------------------------------- 11: the scorer learns

def test_11_the_selection_learns(selection):
    """By regression, in seconds. On other contexts, and on continuations of a kind
    that was not trained on, random scores are then clearly worse.

    All heads have the same weights, so that a selection per token can be right.
    """
    model = tiny_llama(rope_theta=1e8)
    model.embed.weight += 1
    attn = model.layers[0].attn
    queries = 2 * attn.wq.weight[:12].repeat(4, 1)
    keys = attn.wk.weight[:12].repeat(2, 1)
    for block in model.layers:
        block.attn.wq.weight.copy_(queries)
        block.attn.wk.weight.copy_(keys)

    compressor = tiny_compressor(
        model, selection=selection, target="attention", registers=0, trained=False, hidden=64)
    optimizer = torch.optim.Adam(compressor.scorer.parameters(), lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(60):
        tokens = torch.randint(0, 97, (4, 48), generator=rng)
        ctx = compressor.read(model, tokens)
        target = max_attention(model, compressor.full_cache(model, ctx), tokens).log()
        if selection == "token":
            target = target.mean((1, 2), keepdim=True)
        loss = (compressor.scorer(ctx.h, ctx.lengths) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        ctx = compressor.read(model, torch.randint(0, 97, (64, 48), generator=rng))
        questions = torch.randint(0, 97, (64, 7), generator=rng)
        full = compressor.full_cache(model, ctx)
        log_p = logits(model, full, questions).log_softmax(-1)
        learned = compressor.scorer(ctx.h, ctx.lengths)
        kl = []
        for scores in (torch.rand(learned.shape, generator=rng), learned):
            cache = compressor.compress(model, ctx, keep=0.2, scores=scores)
            log_q = logits(model, cache, questions).log_softmax(-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(1))
    gain = kl[0] - kl[1]  # of each of 64 contexts
    assert gain.mean() > 2 * gain.std() / 8


@torch.no_grad()
@pytest.mark.parametrize("first, end, sinks", [(0, 20, 0), (6, 11, 2)])
def test_max_attention_is_the_largest_softmax_weight(model, first, end, sinks):
    """Against a softmax written out, in a padded batch, with more queries than a
    block has."""
    context, lengths = pad_right([[*range(20)], [*range(5, 18)]])
    cache = model.prefill(context, lengths)
    tokens = torch.randint(0, 97, (2, 150))
    segments = torch.tensor([[0] * 80 + [1] * 70, [0] * 60 + [1] * 80 + [-1] * 10])
    queries = []
    keys = []
    for block in model.layers:
        block.attn.wq.register_forward_hook(lambda module, x, y: queries.append(y))
        block.attn.wk.register_forward_hook(lambda module, x, y: keys.append(y))
    ours = max_attention(
        model, cache, tokens, segments=segments, first=first, end=end, sinks=sinks
    )

    i = torch.arange(20)
    looked_at = ((i < sinks) | (i >= first) & (i < end)) & (i < lengths[:, None])
    same = segments[:, :, None] == segments[:, None, :]
    visible = torch.cat([looked_at[:, None].expand(-1, 150, -1), same.tril()], 2)
    rope = model.rope(relative_positions(tokens, segments) + cache.next_position[:, None])
    for layer, (group,) in enumerate(cache.layers):
        q = rotate(queries[layer].view(2, 150, 4, 12).transpose(1, 2), rope)
        k = rotate(keys[layer].view(2, 150, 2, 12).transpose(1, 2), rope)
        k = torch.cat([group.k, k], 2).repeat_interleave(2, 1)
        weights = (q @ k.mT / 12 ** 0.5).masked_fill(~visible[:, None], NEG).softmax(-1)
        weights = weights.masked_fill(segments[:, None, :, None] < 0, 0)
        expected = weights[..., first:end].amax(2).unflatten(1, (2, 2)).amax(2)
        assert torch.allclose(ours[:, layer], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_the_effect_of_an_entry_is_a_gradient(dtype):
    """Where a single query predicts a single token, the effect is the derivative of
    its log-likelihood towards the entry's bias, divided by 1 − attention. A second
    segment predicts another token: the squares add up."""
    model = tiny_llama(dtype, n_kv_head=4)  # as many as query heads
    context = torch.arange(20)[None]
    cache = model.prefill(context)
    tokens = torch.tensor([[5, 6, 7, 8]])
    segments = torch.tensor([[0, 0, 1, 1]])
    attention, effect = attention_and_effect(model, cache, tokens, segments)
    expected = max_attention(model, cache, tokens, segments=segments)
    assert torch.allclose(attention, expected, atol=1e-6)

    def likelihood(beta, first):
        kvs = [(group.k, group.v) for (group,) in cache.layers]
        h = model(tokens[:, first:first + 1], full_cache(kvs, None, beta))
        return (model.head_weight @ h[0, 0]).log_softmax(-1)[tokens[0, first + 1]]

    for layer, head, entry in ((0, 0, 3), (2, 1, 19), (5, 3, 7)):
        step = torch.zeros(1, 6, 4, 20, dtype=dtype)
        step[0, layer, head, entry] = 1e-4
        total = 0
        for first in (0, 2):
            with torch.no_grad():
                slope = (likelihood(step, first) - likelihood(-step, first)) / 2e-4
            A = max_attention(model, cache, tokens[:, first:first + 1])
            total += (slope / (1 - A[0, layer, head, entry])) ** 2
        assert float(effect[0, layer, head, entry]) == pytest.approx(float(total) ** 0.5, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------- the registers

@torch.no_grad()
def test_registers_are_in_every_head_above_the_scorer(model, selection):
    """They count as another entry of the token that they copy. Below, and up to 4×,
    every head has the recent tokens instead (selection per head only)."""
    compressor = tiny_compressor(model, selection=selection, registers=2, recent=2)
    ctx = read(model, compressor)
    for keep, from_layer in ((0.2, compressor.cfg.eta), (0.3, 6)):
        kept = compressor.select(compressor.scorer(ctx.h, ctx.lengths), ctx, k_of(ctx, keep),
                                 registers=True).kept
        cache = compressor.compress(model, ctx, keep=keep)
        for layer, groups in enumerate(cache.layers):
            for head, (_, positions, _) in enumerate(heads_of(groups)):
                own = kept[0, layer if len(kept[0]) > 1 else 0][head if selection == "head" else 0]
                copies = 1 if layer >= from_layer else 0
                for token in (N - 2, N - 1):
                    assert (positions == token).sum() == own[token] + copies
                if selection == "head" and not copies:
                    assert own[N - 1]
    assert cache.next_position.tolist() == [N, N]


def k_of(ctx, keep):
    return kept_count(ctx.compressible.sum(1), keep)


@torch.no_grad()
def test_without_lora_a_register_is_the_token_that_it_copies(model):
    """Its value in the first layer above η: it has the same hidden state there. Its key
    has the same position, too."""
    compressor = tiny_compressor(model, trained=False, registers=2)
    ctx = read(model, compressor)
    chosen, k = select_at(compressor, ctx)
    keys, values = compressor.encode(model, ctx, chosen, k)[compressor.cfg.eta]
    for x in (keys, values):
        assert torch.equal(x[:, :, N:], x[:, :, N - 2:N])


# ------------------------------------------------------------------------------ edges

@pytest.mark.parametrize("eta", [0, 5, "2"])
def test_eta_must_leave_a_layer_to_adapt(model, eta):
    with pytest.raises(BadInput, match="eta is .*, expected 1 … 4"):
        tiny_compressor(model, eta=eta)


@both_decays
def test_a_row_without_compressible_tokens_harms_nobody(model, compressor, ctx, tokens, decay_kind):
    ctx.compressible[1] = False
    chosen, k = select_at(compressor, ctx)
    beta = decay(compressor.scorer(ctx.h, ctx.lengths), chosen, decay_kind, 0.5)
    beta.sum().backward()
    assert not beta[1].any()
    assert all(p.grad.isfinite().all() for p in compressor.scorer.parameters())

    cache = compressor.compress(model, ctx, keep=0.1)
    assert (cache.entries()[1] == N).all()
    assert logits(model, cache, tokens).isfinite().all()
