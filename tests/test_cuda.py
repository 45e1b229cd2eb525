"""A GPU gives the numbers of a CPU, by other kernels. Skipped where there is none."""
from functools import partial

import pytest
import torch

from compress import decay, select
from conftest import save_llama, tiny_compressor, tiny_llama
from data.batches import collate
from data.samples import Case, Query
from model import CapturedStep, decode_step, generate, load_llama
from run.dist import World
from test_compress import continuation, logits, masked_cache, read, select_at
from train import Distiller, MicroBatch, StepCounts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ("cpu", "cuda")


def make(device, **changes):
    """The tiny model and its compressor, made on the CPU, whose random numbers they are."""
    model = tiny_llama()
    compressor = tiny_compressor(model, **changes)
    return model.to(device), compressor.to(device)


def close(a, b):
    return torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("selection", ["head", "token"])
@pytest.mark.parametrize("keep", [0.3, 0.1])
def test_a_compressed_cache_answers_as_on_a_cpu(selection, keep):
    """Gathered, and masked as in training."""
    answers = []
    for device in DEVICES:
        model, compressor = make(device, selection=selection)
        ctx = read(model, compressor)
        tokens = continuation(model)
        chosen, k = select_at(compressor, ctx, keep)
        beta = decay(compressor.scorer(ctx.h, ctx.lengths), chosen, "threshold", 0.5)
        masked = masked_cache(model, compressor, ctx, chosen, k, beta)
        gathered = compressor.compress(model, ctx, keep=keep)
        answers.append(logits(model, gathered, tokens))
        assert close(logits(model, masked, tokens), answers[-1])
    assert close(*answers)


def test_select_takes_the_same_entries_also_where_scores_are_equal():
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (3, 5, 2, 40), generator=rng).float()
    compressible = torch.arange(40).expand(3, 40) > 4
    k = torch.tensor([1, 9, 35])
    on_cpu, on_gpu = [select(scores.to(d), compressible.to(d), k.to(d)) for d in DEVICES]
    assert torch.equal(on_cpu.kept, on_gpu.kept.cpu())
    assert torch.equal(on_cpu.theta, on_gpu.theta.cpu())


def sample(seed, n) -> Case:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (n + 14,), generator=rng).tolist()
    return Case(ids[:n], 3, [Query("recite", ids[n:n + 3], ids[n + 3:])])


@pytest.mark.parametrize("phase", ["scorer", "hard", "soft"])
def test_a_training_step_has_the_same_gradient(phase):
    batch = collate([sample(0, 40), sample(1, 25)])
    losses = []
    gradients = []
    for device in DEVICES:
        model, compressor = make(device)
        distiller = Distiller(model, compressor, lam=0.6, chunk=7)
        world = World(torch.device(device))
        micro = MicroBatch.of(batch, 0.1)
        counts = StepCounts.of([micro], world)
        loss = distiller(micro.to(world.device), counts, phase)["loss"]
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in compressor.parameters() if p.grad is not None])
    assert close(*losses)
    for a, b in zip(*gradients, strict=True):
        assert (a - b.cpu()).norm() <= 1e-3 * a.norm() + 1e-7


@pytest.mark.parametrize("keep", [1.0, 0.2])
def test_generation_writes_the_same_tokens(keep):
    written = []
    for device in DEVICES:
        model, compressor = make(device)
        cache = compressor.compress(model, read(model, compressor), keep=keep)
        for _ in range(2):  # a GPU captures its step, and then replays it
            written.append(list(generate(model, cache, [[5, 6, 7], [8]], 12)))
    assert all(steps == written[0] for steps in written)


@torch.inference_mode()
@pytest.mark.parametrize("keep", [1.0, 0.2])  # a full and a ragged cache
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0), (torch.bfloat16, 2e-2)])
def test_a_captured_step_computes_what_the_step_does(keep, dtype, tolerance):
    model, compressor = make("cuda")
    model = model.to(dtype)
    cache = compressor.compress(model, read(model, compressor), keep=keep)
    reserved = cache.reserve(12)
    other = cache.reserve(12)
    step = partial(decode_step, model, cache=other)
    captured = CapturedStep(step, other, torch.Generator("cuda"), other.layout())
    tokens = torch.tensor([5, 8], device="cuda")
    for _ in range(12):
        expected = decode_step(model, tokens, reserved)
        assert (captured(tokens) - expected).abs().max() <= tolerance
        tokens = expected.argmax(-1)


def test_a_captured_step_is_used_again_only_where_it_fits():
    """Two caches that are equally large with their slots, then the first again."""
    ids = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(0))
    written = []
    for device in DEVICES:
        model, _ = make(device)
        texts = []
        for n, prompt in ((30, [5, 6, 7]), (28, [5, 6, 7, 8, 9]), (30, [9, 8, 7])):
            cache = model.prefill(ids[:, :n].to(device))
            texts.append(list(generate(model, cache, [prompt], 12)))
        written.append(texts)
    assert written[0] == written[1]


def test_sampling_depends_on_the_seed_alone():
    """Also if the second call replays the step that the first one has captured."""
    model, compressor = make("cuda")
    cache = compressor.compress(model, read(model, compressor), keep=0.2)
    written = []
    for seed in (0, 0, 1):
        steps = generate(model, cache, [[5], [8]], 12, temperature=1.5, seed=seed)
        written.append(list(steps))
    assert written[0] == written[1] != written[2]


@torch.no_grad()
def test_bf16_is_near_fp32(tmp_path):
    folder = save_llama(tiny_llama(), tmp_path)
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_llama(folder, "cuda", dtype)
        compressor = tiny_compressor(tiny_llama()).to("cuda")
        cache = compressor.compress(model, read(model, compressor), keep=0.3)
        answers.append(logits(model, cache, continuation(model)))
    assert (answers[0] - answers[1]).norm() < 0.1 * answers[0].norm()
