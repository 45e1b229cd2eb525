"""The arithmetic of --plan against what torch counts, on the shapes of real models and without their weights.

The step runs on tensors that have shapes and no numbers (FakeTensorMode). So it cannot pass if anything in it looks at
a number on the way: on a GPU that would be a wait.
"""
import json
import re
import weakref
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compress import Compressor, CompressorConfig
from conftest import hf_config
from run.errors import BadInput
from run.train_flags import check, parse_args
from run.plan import (HEADER, continuation_tokens, memory, out_of_memory, parameters, step_flops,
                       suggest_parallel)
from data.samples import Batch
from model import Config, Llama
from train import PRESETS, Distiller, TrainConfig, Work, main

SMOLLM = Config(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, n_embd=576, n_ffn=1536,
                max_positions=8192)
LLAMA_8B = Config(vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, head_dim=128, n_embd=4096, n_ffn=14336,
                  max_positions=131072, tied=False)


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at the same time, at most."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.live:
                storage = x.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.live.pop(key)


def one_pass(cfg: Config, c: TrainConfig, asked: int, *watch) -> None:
    """Forward and backward of c.micro contexts, `asked` tokens about each, without numbers, under the modes `watch`."""
    def long(*shape):
        return torch.zeros(shape, dtype=torch.long)

    n, B = c.context + HEADER, c.micro
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:  # torch counts no CPU flash attention
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Llama(cfg).requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)
        model.recompute = c.recompute
        distil = Distiller(model, Compressor(cfg, CompressorConfig(c.eta, c.rank)), c.lam, c.chunk, c.target, c.tau)
        batch = Batch(long(B, n), long(B) + n, long(B, n) > 0, long(B, asked), long(B, asked), long(B, asked) == 0,
                      long(B, asked))
        slots = int(c.keep_high * c.context) + HEADER
        work = Work(batch, long(B * asked), long(B), torch.zeros(B, n), slots, n + asked)
        for mode in watch:
            stack.enter_context(mode)
        distil(work, False, torch.tensor(1.0), B)["loss"].backward()


MIX = {"continue": 1, "recite": 2, "cloze": 2, "title": 2}


@pytest.mark.parametrize("cfg, c", [
    (SMOLLM, TrainConfig()), (replace(SMOLLM, n_layer=12), TrainConfig(micro=4, batch=4, rank=64)),
    (replace(LLAMA_8B, n_layer=10), TrainConfig(context=1000, rank=128, recompute=True))], ids=["135m", "four", "8b"])
def test_operations_and_bytes_are_those_of_a_step(cfg, c):
    """Operations within 10 %, bytes within 15 %. With --recompute torch counts what is done twice, and we do not."""
    asked = round(continuation_tokens(MIX, c.answer))
    flops, peak = FlopCounterMode(display=False), Peak()
    one_pass(cfg, c, asked, flops, peak)
    n = c.context + HEADER
    ours = step_flops(cfg, CompressorConfig(c.eta, c.rank), c.micro * n, c.micro * asked, c.micro * c.keep_high * n,
                      c.micro * asked, c.micro)
    counted = flops.get_total_flops()
    assert 0.6 < ours / counted < 0.9 if c.recompute else 0.9 < ours / counted < 1.1
    parts = memory(cfg, c, MIX, "bf16", 1, "ddp")
    del parts["AdamW's two moments"]  # no optimiser here
    assert 0.85 < sum(parts.values()) / peak.most < 1.15


def test_trained_and_frozen_parameters_of_the_8b_preset():
    """The two numbers that README quotes; the first by hand: 25 layers of A and B on W_Q and W_O, the scorer, γ."""
    c = PRESETS["paper"]
    trained, frozen = parameters(LLAMA_8B, CompressorConfig(c["eta"], c["rank"]))
    D, r = 4096, 128
    assert trained == 25 * 4 * r * D + (D + 2) * D + D + D + 1 + 1 == 69_222_402
    assert sum(p.numel() for p in frozen.parameters()) == 8_030_261_248


def test_a_plan_says_what_does_not_fit(tmp_path, monkeypatch, capsys):
    """From config.json alone: no weights lie in this folder."""
    (tmp_path / "config.json").write_text(json.dumps(hf_config(LLAMA_8B)))
    flags = ["train.py", "--preset", "paper", "--weights", str(tmp_path), "--plan"]

    def plan(*more):
        monkeypatch.setattr("sys.argv", [*flags, *more])
        main()
        return capsys.readouterr().out

    out = plan("--gpus", "8")
    assert "8,030,261,248 frozen parameters, 69,222,402 trained" in out and "cannot fit" not in out
    assert re.search(r"16\.06 GB  weights, frozen", out) and "--parallel ddp" in out
    out = plan("--gpus", "8", "--gpu-memory", "24")
    assert "--parallel fsdp" in out and "cannot fit" not in out
    out = plan("--gpu-memory", "16")
    assert "This cannot fit: the frozen weights are the largest part; use more GPUs with --parallel fsdp" in out
    with pytest.raises(BadInput, match="cannot be shared by --gpus 3"):
        plan("--gpus", "3")


@pytest.mark.parametrize("weights, memory, want", [(16e9, 80e9, "ddp"), (16e9, 24e9, "fsdp"), (141e9, 80e9, "fsdp"),
                                                   (16e9, None, "ddp")])
def test_ddp_while_half_of_the_gpu_is_left(weights, memory, want):
    assert suggest_parallel(weights, memory) == want


def test_out_of_memory_names_flags_that_help():
    c = TrainConfig(micro=4, batch=8, parallel="ddp")
    text = str(out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), c, 2))
    assert all(x in text for x in ("--micro 2 (now 4)", "--recompute", "--parallel fsdp", "--chunk 64", "below 300"))
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    text = str(out_of_memory(error, TrainConfig(recompute=True), 1))
    assert "--micro" not in text and "--recompute" not in text and "fsdp" not in text
    assert out_of_memory(RuntimeError("shapes differ"), c, 2) is None


def test_presets_are_flags_and_flags_have_the_last_word(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--preset", "paper", "--rank", "7", "--no-recompute"])
    a = parse_args(TrainConfig, PRESETS)
    c = a.config
    assert (c.rank, c.recompute, c.eta, c.lam, c.lr, c.batch, a.dtype) == (7, False, 6, 0.6, 5e-5, 32, "bf16")
    for preset in PRESETS:
        monkeypatch.setattr("sys.argv", ["train.py", "--preset", preset])
        check(parse_args(TrainConfig, PRESETS).config)
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert parse_args(TrainConfig, PRESETS).config == TrainConfig()
