"""One training step: what gets a gradient and what does not, accumulation, the attention target, the count of FLOPs;
and the devices and processes it runs on."""
import math
import signal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_compressor, tiny_llama
from run.errors import BadInput
from run.folders import Signals
from run.plan import choose_parallel
from data.samples import Continuation, Sample, collate
from run.models import pick_dtype
from run.world import World
from model import attention_mask
from train import AttentionTarget, Distiller, Work, main, step_flops


def sample(seed, n_context=40, lengths=(9, 6)):
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(0, 97, (n,), generator=g).tolist()  # noqa: E731
    return Sample(ids(n_context), 3, [Continuation(k, ids(n), 3) for k, n in zip(("recite", "title"), lengths)])


def distiller(model, comp, **changes):
    return Distiller(model, comp, **(dict(lam=0.6, chunk=7, target=0.5, tau=0.15) | changes))


def gradients(model, parts, keep=0.3, soft=False, noise=None, **changes):
    comp = tiny_compressor(model)
    rows = sum(int(b.supervised.sum()) for b in parts)
    contexts = sum(len(b.tokens) for b in parts)
    step, loss = distiller(model, comp, **changes), 0.0
    for b in parts:
        out = step(Work.of(b, keep, soft, noise), soft, rows, contexts)
        out["loss"].backward()
        loss += float(out["loss"].detach())
    return loss, {name: p.grad for name, p in comp.named_parameters()}


@pytest.mark.parametrize("soft", [False, True])
def test_accumulation_is_one_large_batch(model, soft):
    """Unequal contexts and unequal numbers of supervised tokens: a mean per micro-batch would be wrong here."""
    samples = [sample(0), sample(1, n_context=25, lengths=(4, 4)), sample(2, lengths=(15, 3)), sample(3, n_context=33)]
    one = gradients(model, [collate(samples)], soft=soft)
    many = gradients(model, [collate([s]) for s in samples], soft=soft)
    assert math.isclose(one[0], many[0], rel_tol=1e-5)
    for name, g in one[1].items():
        if g is not None and name != "scorer.w2.bias":  # shifting all scores changes nothing: its gradient is noise
            assert (g - many[1][name]).norm() <= 1e-4 * g.norm() + 1e-7, name


def test_every_trained_tensor_gets_a_gradient_from_its_own_path(model):
    """β reaches the scorer without the target; γ only acts on hard steps under `centred`."""
    b = [collate([sample(0), sample(1)])]
    _, hard = gradients(model, b, target=0.0)
    assert all(g is not None and g.abs().max() > 0 for name, g in hard.items() if "bias" not in name)
    _, soft = gradients(model, b, target=0.0, soft=True)
    assert soft["gamma"] is None and soft["scorer.w1.weight"].abs().max() > 0


def test_5_the_frozen_model_gets_no_gradient_and_keeps_every_bit(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    comp = tiny_compressor(model)
    optimizer = torch.optim.AdamW(comp.parameters(), lr=1e-2)
    b, step = collate([sample(0)]), distiller(model, comp)
    for i in range(4):
        soft = i % 2 == 0
        step(Work.of(b, 0.3, soft), soft, int(b.supervised.sum()), 1)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in step.parameters()}


@torch.no_grad()
def test_attention_target_is_the_attention(model, compressor):
    """Against a dense softmax written out: one continuation, one layer at a time, mean over heads."""
    b = collate([sample(0, lengths=(9,))])
    ctx = compressor.read(model, b.tokens, b.lengths, b.protect)
    full = compressor.full(model, ctx)
    seen = {}
    target = AttentionTarget(attention_mask(b.cont, full, b.segments), b.supervised, 2, 40)

    def watch(layer, q, k):
        target(layer, q, k)
        seen[layer] = (q, k)
    model(b.cont, full, b.segments, watch=watch)
    mean = 0
    for layer in range(1, 6):  # layers η … L, counted from 1
        q, k = seen[layer]
        for head in range(4):
            logits = q[0, head] @ k[0, head // 2].T / math.sqrt(12)
            logits = logits.masked_fill(torch.ones(9, 49).triu(41).bool(), -math.inf)
            mean = mean + logits.softmax(-1)[:, :40] / 20
    assert torch.allclose(target.result()[0], mean[b.supervised[0]].amax(0), atol=1e-5)


def test_noise_changes_the_choice_and_nothing_else(model):
    """Noise moves the selection; without it the step is deterministic."""
    b = [collate([sample(0)])]
    assert gradients(model, b)[0] == gradients(model, b)[0]
    noise = 5 * torch.randn(b[0].tokens.shape, generator=torch.Generator().manual_seed(0))
    assert gradients(model, b, noise=noise)[0] != gradients(model, b)[0]


def test_flops_agree_with_pytorchs_counter():
    """A wider model, so that matrix products dominate as they do in practice. Ours leaves out scorer and adapters."""
    model = tiny_llama(n_layer=8, n_embd=192, n_head=6, n_kv_head=3, head_dim=32, n_ffn=512, vocab_size=1000)
    comp = tiny_compressor(model, rank=1)
    b = collate([sample(0, n_context=120, lengths=(40, 30)), sample(1, n_context=120, lengths=(40, 30))])
    rows = int(b.supervised.sum())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts no CPU flash attention
        distiller(model, comp, target=0.0)(Work.of(b, 0.25), False, rows, 2)["loss"].backward()
    ours = step_flops(model.cfg, comp.cfg, 240, 140, 60, rows, 2, target=False)
    assert 0.85 < ours / counter.get_total_flops() < 1.15


# devices and processes ----------------------------------------------------------------------------------------------

def test_a_gpu_without_bf16_gets_fp32_or_a_clear_word(monkeypatch):
    """As on a T4 or a V100; auto is bf16 on a GPU that has it."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert pick_dtype("auto", gpu) == pick_dtype("fp32", gpu) == torch.float32
    with pytest.raises(BadInput, match="Tesla T4 has no units for it; use --dtype fp32"):
        pick_dtype("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_dtype("auto", gpu) == pick_dtype("bf16", gpu) == torch.bfloat16
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


def test_what_cannot_be_shared_is_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1",
                        "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="mps is one GPU"):
        World.start("mps")
    with pytest.raises(BadInput, match="--device cuda:0 with torchrun: expected cuda"):
        World.start("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="3 processes and 1 GPUs on this host"):
        World.start("cuda")
    monkeypatch.setattr(World, "start", lambda device: World(torch.device("cpu"), size=3))
    monkeypatch.setattr("sys.argv", ["train.py", "--batch", "4"])
    with pytest.raises(BadInput, match="--batch 4 cannot be shared by 3 processes"):
        main()
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(BadInput, match="8 tasks of one job step would each work alone"):
        World.start("cpu")
    with pytest.raises(BadInput, match="spreads the model over processes and there is one"):
        choose_parallel("fsdp", None, "bf16", 1, torch.device("cpu"))


def test_a_second_ctrl_c_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.got == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
