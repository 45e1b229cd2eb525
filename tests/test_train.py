"""One training step of either phase: what is learned, and what gets a gradient."""
import json
import math

import pytest
import torch

import model as model_file
from compress import attention_and_effect
from conftest import tiny_compressor, tiny_llama
from data.prepare import Shard
from data.batches import collate
from data.samples import Case, Query, Samples
from data.tokenizer import Tokenizer
from run.dist import World
from test_tokenizer import tiny_tokenizer_json
from train import (BatchSampler, Distiller, MicroBatch, StepCounts, TrainConfig,
                   compressor_config, forward_backward, start_phase, train)

ALONE = World(torch.device("cpu"))
LORA = {"a_q", "b_q", "a_o", "b_o"}


def sample(seed, n_context=40, lengths=(9, 6)) -> Case:
    """A context of random ids and two queries of these lengths."""
    rng = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(0, 97, (n,), generator=rng).tolist()

    context = ids(n_context)
    queries = [Query(kind, ids(3), ids(n - 3)) for kind, n in zip(("recite", "title"), lengths)]
    return Case(context, 3, queries)


def make_step(model, compressor, phase, world=ALONE, learn_scores=True):
    """What `train` hands to forward_backward in this phase."""
    distiller = Distiller(model, compressor, lam=0.6, chunk=7)
    return start_phase(distiller, phase, learn_scores, world)


def gradients(model, samples, phase, learn_scores=True, **changes):
    """A step's numbers, and the gradient of every trained tensor. samples: by forward pass."""
    compressor = tiny_compressor(model, **changes)
    step = make_step(model, compressor, phase, learn_scores=learn_scores)
    micro_batches = [MicroBatch.of(collate(part), 0.1) for part in samples]
    metrics = forward_backward(step, micro_batches, phase, ALONE)
    return metrics, {name: p.grad for name, p in compressor.named_parameters()}


@pytest.mark.parametrize("selection", ["head", "token"])
@pytest.mark.parametrize("phase", ["scorer", "hard", "soft"])
def test_accumulation_is_one_large_batch(model, phase, selection):
    """With unequal contexts and unequal numbers of supervised tokens."""
    samples = [sample(0), sample(1, n_context=25, lengths=(4, 4)), sample(2, lengths=(15, 5)),
               sample(3, n_context=33)]
    metrics, together = gradients(model, [samples], phase, selection=selection)
    others, apart = gradients(model, [[s] for s in samples], phase, selection=selection)
    assert metrics.keys() == others.keys()
    assert all(torch.allclose(metrics[name], others[name], rtol=1e-4) for name in metrics)
    for name, grad in together.items():
        if grad is not None and name != "scorer.w2.bias":  # nearly 0: a shift of all scores
            assert (grad - apart[name]).norm() <= 1e-4 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("phase, learn_scores, want", [
    ("scorer", True, {"scorer"}), ("scorer", False, {"scorer"}), ("hard", True, LORA | {"scorer"}),
    ("soft", True, LORA | {"scorer"}), ("hard", False, LORA)])
def test_a_phase_reaches_what_it_trains_and_no_more(model, phase, learn_scores, want):
    _, grads = gradients(model, [[sample(0), sample(1)]], phase, learn_scores)
    reached = {name.split(".")[0] for name, x in grads.items() if x is not None and x.any()}
    assert reached == want


def test_5_the_frozen_model_gets_no_gradient_and_keeps_every_bit(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    compressor = tiny_compressor(model)
    optimizer = torch.optim.AdamW(compressor.parameters(), lr=1e-2)
    for phase in ("scorer", "hard", "soft"):
        step = make_step(model, compressor, phase)
        forward_backward(step, [MicroBatch.of(collate([sample(0)]), 0.1)], phase, ALONE)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert {id(p) for p in step.parameters()} == {id(p) for p in compressor.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("selection", ["head", "token"])
def test_the_scorer_learns_the_logarithm_of_the_most_attention(model, monkeypatch, selection):
    """Against a softmax written out, layer by layer; the two queries do not see each other."""
    compressor = tiny_compressor(model, selection=selection, target="attention")
    case = sample(0)
    ids = torch.tensor([case.context])
    m = MicroBatch.of(collate([case]), 0.1)
    step = make_step(model, compressor, "scorer")
    loss = step(m, StepCounts.of([m], ALONE), "scorer")["loss"]

    attention, rotated, rotate = torch.zeros(6, 2, 40), [], model_file.rotate
    monkeypatch.setattr(model_file, "rotate",
                        lambda x, rope: rotated.append(rotate(x, rope)) or rotated[-1])
    for query in case.queries:
        rotated.clear()
        model(torch.cat([ids, torch.tensor([query.prompt + query.answer])], 1))
        for layer in range(6):
            keys, queries = rotated[2 * layer][0], rotated[2 * layer + 1][0]
            for h in range(4):
                logits = queries[h] @ keys[h // 2].T / math.sqrt(12)
                later = torch.ones_like(logits).triu(1).bool()
                weights = logits.masked_fill(later, -math.inf).softmax(-1)[40:, :40]
                attention[layer, h // 2] = attention[layer, h // 2].maximum(weights.amax(0))

    if selection == "token":
        attention = attention.mean((0, 1), keepdim=True)
    ctx = compressor.read(model, ids)
    scores = compressor.scorer(ctx.h, ctx.lengths)
    error = (scores[0] - attention.clamp(min=1e-6).log())[..., 3:]  # without protected tokens
    assert torch.isclose(loss, error.square().mean(), rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("selection", ["head", "token"])
def test_the_scorer_learns_the_effect_as_well(model, selection):
    compressor = tiny_compressor(model, selection=selection)
    m = MicroBatch.of(collate([sample(0)]), 0.1)
    loss = make_step(model, compressor, "scorer")(m, StepCounts.of([m], ALONE), "scorer")["loss"]

    ctx = compressor.read(model, m.batch.tokens)
    full = compressor.full_cache(model, ctx)
    error = compressor.scorer(ctx.h, ctx.lengths)
    for factor in attention_and_effect(model, full, m.batch.continuation, m.batch.segments):
        if selection == "token":
            factor = factor.mean((1, 2), keepdim=True)
        error = error - factor.clamp(min=1e-6).log()
    expected = error[..., 3:].square().mean()  # without protected tokens
    assert torch.isclose(loss, expected, rtol=1e-4)


def test_11_selection_learns(tmp_path):
    """Both phases on a tiny model, through the loop itself: on held-out contexts the trained
    scores are then clearly better than random ones under the same LoRA, and fresh ones are not.

    The model's attention is sharp and similar for all queries, as words have a part in common.
    Where it is diffuse, random tokens are a fair sample and nothing can be learned.
    """
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()), encoding="utf-8")
    tok = Tokenizer(tmp_path)
    model = tiny_llama(vocab_size=310, rope_theta=1e8, seed=3)
    model.embed.weight += 1
    for block in model.layers:
        block.attn.wq.weight *= 8

    rng = torch.Generator()
    words = ("mill stone river light tower keeper north island harbour winter letter engine "
             "garden window").split()
    for i in range(60):
        drawn = torch.randint(0, len(words), (150,), generator=rng.manual_seed(i)).tolist()
        (tmp_path / f"{i}.txt").write_text(" ".join(words[j] for j in drawn))
    c = TrainConfig(scorer_steps=160, steps=20, batch=4, micro=4, context=48, answer=8, rank=4,
                    eta=2, hidden=64, keep_min=0.1, keep_max=0.5, scorer_lr=1e-2, mix="continue=1",
                    sources=str(tmp_path), shards=str(tmp_path / "shards"))
    fresh = tiny_compressor(model, trained=False, **vars(compressor_config(c)))
    trained = tiny_compressor(model, trained=False, **vars(compressor_config(c)))
    (tmp_path / "run").mkdir()
    train(c, BatchSampler(c, tok, ALONE), trained, model, tmp_path / "run", ALONE)

    folder, = (tmp_path / "shards").iterdir()
    samples = Samples([Shard(folder, "val", tok)], tok, c.context, {"continue": 1}, c.answer, seed=1)
    b = collate([samples(i) for i in range(64)])
    with torch.no_grad():
        ctx = trained.read(model, b.tokens, b.lengths, b.protect)

        def log_probabilities(cache):
            hidden = model(b.continuation, cache, b.segments)[b.answers]
            return model.logits(hidden).view(64, 7, -1).log_softmax(-1)

        def kl(scores):  # (64,), by document
            q = log_probabilities(trained.compress(model, ctx, tokens=10, scores=scores))
            return (p.exp() * (p - q)).sum(-1).mean(1)

        p = log_probabilities(trained.full_cache(model, ctx))
        random = kl(torch.rand(64, 6, 2, b.tokens.shape[1], generator=rng))
        gain = random - kl(trained.scorer(ctx.h, ctx.lengths))
        fresh_gain = random - kl(fresh.scorer(ctx.h, ctx.lengths))
    print(f"random {random.mean():.2f}, gain {gain.mean():.2f} ± {gain.std() / 8:.2f}, "
          f"fresh {fresh_gain.mean():.2f}")
    assert gain.mean() > 4 * gain.std() / 8
    assert fresh_gain.mean() < 0.5 * gain.mean()


def test_the_second_phase_sees_other_samples_than_the_first(tmp_path, monkeypatch):
    """Also where the phases have different batches."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()), encoding="utf-8")
    tok = Tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("The mill stands by the river. " * 40)
    c = TrainConfig(scorer_steps=3, scorer_batch=4, steps=2, batch=2, context=48, answer=8,
                    mix="continue=1", sources=str(tmp_path), shards=str(tmp_path / "shards"))
    seen = []

    def my_samples(first, batch, micro, world):
        seen.extend(range(first, first + batch))
        return []

    monkeypatch.setattr("train.my_samples", my_samples)
    sampler = BatchSampler(c, tok, ALONE)
    for step in range(5):
        sampler(step)
    assert seen == list(range(3 * 4 + 2 * 2))
