"""The arithmetic of --plan against what torch counts in a real step, of which only the shapes
are computed (FakeTensorMode). A step that looked at a number on the way would fail here, and on
a GPU it would wait."""
import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compress import Compressor
from conftest import hf_config
from data.batches import Batch
from data.samples import KINDS
from model import Config, Llama, attention_sdpa
from run.memory_plan import (HEADER, LLAMA_8B_SHAPE, fitting_parallel, memory, out_of_memory,
                             step_flops, tokens_asked)
from train import (
    SCORER_MIX, Distiller, MicroBatch, StepCounts, TrainConfig, compressor_config, main, parse_mix)

SMOLLM = Config(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, n_embd=576,
                n_ffn=1536, max_positions=8192)


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that were made inside and are alive at the same time."""

    def __init__(self, parameters):
        super().__init__()
        self.alive = {p.untyped_storage()._cdata: 0 for p in parameters}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.alive:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.alive.pop(key)


def trace(cfg, c: TrainConfig, phase: str, mix, make_mode):
    """Forward and backward pass of c.micro contexts, under a mode; on a GPU's attention."""
    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.long)

    n, asked, B = c.context + HEADER, tokens_asked(mix, c, c.context), c.micro
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        model = Llama(cfg).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        model.activation_checkpointing = c.activation_checkpointing
        compressor = Compressor(cfg, compressor_config(c))
        compressor.requires_grad_(phase != "scorer")
        compressor.scorer.requires_grad_(phase == "scorer" or c.scorer_lr_phase2 > 0)
        distiller = Distiller(model, compressor, c.lam, c.chunk)
        batch = Batch(zeros(B, n), zeros(B) + n, zeros(B, n) > 0, zeros(B, asked),
                      zeros(B, asked), zeros(B, asked) == 0, zeros(B, asked) == 0)
        m = MicroBatch(batch, zeros(B * asked), zeros(B) + 100, n + asked, padded=False)
        counts = StepCounts(*torch.ones(5))
        with make_mode([*model.parameters(), *compressor.parameters()]) as mode:
            distiller(m, counts, phase)["loss"].backward()
    return model, compressor, asked, mode


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Attention without weights takes the fused kernels, as on a GPU, and not a CPU's way."""
    import model as model_file
    blockwise = model_file.attention_blockwise

    def choose(q, k, v, mask=None, bias=None, on_weights=None):
        if on_weights is None:
            return attention_sdpa(q, k, v, mask, bias)
        return blockwise(q, k, v, mask, bias, on_weights)

    monkeypatch.setattr(model_file, "attention_blockwise", choose)


MIX = parse_mix(TrainConfig().mix)


@pytest.mark.parametrize("phase, mix, flags", [
    ("scorer", SCORER_MIX, {}), ("hard", MIX, {}), ("hard", MIX, {"rank": 256, "eta": 3}),
    ("soft", MIX, {"selection": "token", "scorer_lr_phase2": 1e-3, "hidden": 16384})], ids=str)
def test_operations_are_those_of_a_step(on_a_gpu, phase, mix, flags):
    """Within 10 %."""
    c = TrainConfig(**flags)
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count a CPU's flash attention
        model, compressor, asked, counter = trace(
            replace(SMOLLM, n_layer=10), c, phase, mix, lambda _: FlopCounterMode(display=False))
    ours = step_flops(model.cfg, compressor, 1, c.context + HEADER, asked, asked, phase,
                      c.scorer_lr_phase2 > 0)
    assert 0.9 < ours / counter.get_total_flops() < 1.1, ours / counter.get_total_flops()


@pytest.mark.parametrize("cfg, c", [
    (SMOLLM, TrainConfig()),
    (replace(SMOLLM, n_layer=12), TrainConfig(micro=4, batch=4, rank=64, scorer_lr_phase2=1e-3)),
    (replace(LLAMA_8B_SHAPE, n_layer=10), TrainConfig(context=1000, rank=128,
                                                      activation_checkpointing=True)),
], ids=["135m", "four", "8b"])
def test_bytes_are_those_of_a_step(on_a_gpu, cfg, c):
    """Within 15 %, without the parameters: their memory needs no trace. In the first
    phase, within 30 %."""
    model, compressor, asked, peak = trace(cfg, c, "hard", MIX, PeakMemory)
    items = memory(c, model, compressor, asked, "bf16", 1, "ddp")
    assert 0.85 < sum(list(items.values())[3:]) / peak.peak < 1.15
    model, compressor, asked, peak = trace(cfg, c, "scorer", SCORER_MIX, PeakMemory)
    items = memory(c, model, compressor, asked, "bf16", 1, "ddp", "scorer")
    assert 0.7 < sum(list(items.values())[3:]) / peak.peak < 1.3


def plan(monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr("sys.argv", ["train.py", "--plan", *map(str, flags)])
    main()
    return capsys.readouterr().out


def test_the_8b_llama_needs_no_file(monkeypatch, capsys):
    """Trained parameters by hand: 25 layers of A and B on W_Q and W_O, and the scorer."""
    D, r = 4096, 128
    trained = 25 * 4 * r * D + (D + 2 + 1) * D + (D + 1) * 32 * 8
    out = plan(monkeypatch, capsys, "--preset", "8b", "--gpus", 8)
    assert f"8,030,261,248 frozen parameters, {trained:,} trained" in out
    assert "16.1  frozen weights" in out and "--parallel ddp" in out and "not fit" not in out
    out = plan(monkeypatch, capsys, "--preset", "8b", "--gpus", 8, "--gpu-memory", 24)
    assert "--parallel fsdp" in out and "not fit" not in out
    out = plan(monkeypatch, capsys, "--preset", "paper", "--gpu-memory", 16)
    assert "This does not fit. Try several GPUs with --parallel fsdp" in out
    assert "hours" not in out


def test_a_small_model_has_digits(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(SMOLLM)))
    out = plan(monkeypatch, capsys, "--weights", tmp_path)
    assert " 0.00 " not in out and " 0.0 hours" not in out and "0 hours\n" not in out
    assert "a CPU takes many times longer" in out


def test_ddp_while_half_of_the_gpu_is_left():
    assert fitting_parallel(16e9, 8, 80e9) == fitting_parallel(16e9, 8, None) == "ddp"
    assert fitting_parallel(16e9, 8, 24e9) == "fsdp"
    assert fitting_parallel(16e9, 1, 24e9) == "ddp"


def test_out_of_memory_names_flags_that_help():
    c = TrainConfig(micro=4, batch=8, parallel="ddp")
    error = out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), c, 2)
    for flag in ("--micro 2", "--activation-checkpointing", "--parallel fsdp", "--chunk 64",
                 "--context below 400"):
        assert flag in str(error)
    assert out_of_memory(RuntimeError("shapes differ"), c, 2) is None


def test_every_kind_of_question_has_its_tokens():
    assert all(tokens_asked({kind: 1}, TrainConfig(), 400) > 20 for kind in (*KINDS, "replay"))


def test_a_pass_holds_no_more_contexts_than_its_step():
    """--scorer-batch 1 --micro 16: the first phase needs what one context needs."""
    with torch.device("meta"):
        model = Llama(SMOLLM)
        compressor = Compressor(SMOLLM, compressor_config(TrainConfig()))
    needs = [memory(c, model, compressor, 1000, "bf16", 1, "ddp", "scorer") for c in (
        TrainConfig(batch=16, micro=16, scorer_batch=1), TrainConfig())]
    assert needs[0] == needs[1]
