"""The same numbers on a GPU as on a CPU: other kernels, nothing else. Skipped where there is no GPU."""
import pytest
import torch

import test_train
from compress import decay, select
from conftest import save_llama, tiny_compressor, tiny_llama
from data.samples import collate
from model import generate, load_llama
from run.world import World
from test_compress import BOTH, N, chosen, context, continuation, logits, masked
from train import MicroBatch, add_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ("cpu", "cuda")


def on(device, **changes):
    """The tiny model and its compressor there: made on the CPU, whose random numbers they are."""
    model = tiny_llama()
    comp = tiny_compressor(model, **changes)
    return model.to(device), comp.to(device)


def close(a, b, tolerance=1e-4):
    return torch.allclose(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("keep", [1.0, 0.3, 0.1])
def test_a_short_cache_answers_as_on_a_cpu(choice, keep):
    """Gathered, and masked as training has it."""
    out = []
    for device in DEVICES:
        model, comp = on(device, choice=choice)
        ctx, cont = context(model, comp), continuation(model)
        out.append(logits(model, comp.compress(model, ctx, keep=keep), cont))
        which, k = chosen(comp, ctx, keep)
        beta = decay(comp.scores(ctx), which, "threshold", 0.5)
        assert close(logits(model, masked(model, comp, ctx, which, k, beta), cont), out[-1])
    assert close(*out)


def test_select_takes_the_same_entries_also_where_scores_are_equal():
    scores = torch.randint(0, 9, (3, 5, 2, 40), generator=torch.Generator().manual_seed(0)).float()
    candidates, k = torch.arange(40).expand(3, 40) > 4, torch.tensor([1, 9, 35])
    a, b = (select(scores.to(d), candidates.to(d), k.to(d), recent=2) for d in DEVICES)
    assert torch.equal(a.kept, b.kept.cpu()) and torch.equal(a.theta, b.theta.cpu())


@pytest.mark.parametrize("phase", test_train.PHASES)
def test_a_training_step_has_the_same_gradient(phase):
    samples = [test_train.sample(0), test_train.sample(1, n_context=25, lengths=(4, 4)), test_train.sample(2)]
    out = []
    for device in DEVICES:
        model, comp = on(device)
        got = add_gradients(test_train.distiller(model, comp), [MicroBatch.of(collate(samples), 0.1)], phase,
                            World(torch.device(device)))
        out.append((got, {name: p.grad for name, p in comp.named_parameters() if p.grad is not None}))
    (cpu, cpu_grads), (gpu, gpu_grads) = out
    assert close(cpu["loss"], gpu["loss"]) and cpu_grads.keys() == gpu_grads.keys()
    for name, grad in cpu_grads.items():
        assert (grad - gpu_grads[name].cpu()).norm() <= 1e-3 * grad.norm() + 1e-7, name


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.2])
def test_generation_writes_the_same_tokens(keep):
    """Two prompts of different lengths, step by step from one buffer."""
    out = []
    for device in DEVICES:
        model, comp = on(device)
        tokens = torch.randint(0, 97, (1, N), generator=torch.Generator().manual_seed(3)).to(device)
        cache = comp.compress(model, comp.read(model, tokens), keep=keep)
        out.append([*generate(model, cache.rows([0, 0]), [[5, 6, 7], [8]], 12)])
    assert out[0] == out[1]


@torch.no_grad()
def test_bf16_is_near_fp32(tmp_path):
    """All that differs is rounding: the fused kernels with the bias as one more column of the keys among it."""
    folder = save_llama(tiny_llama(), tmp_path)
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_llama(folder, "cuda", dtype)
        comp = tiny_compressor(tiny_llama()).to("cuda")
        tokens = torch.randint(0, 97, (1, N), generator=torch.Generator().manual_seed(3)).to("cuda")
        out.append(logits(model, comp.compress(model, comp.read(model, tokens), keep=0.3), continuation(model, 1)))
    assert (out[0] - out[1]).norm() < 0.1 * out[0].norm()
