"""The arithmetic of --plan against what torch counts, on the shapes of real models and without their weights.

The step runs on tensors that have shapes and no numbers (FakeTensorMode). So it cannot pass if anything in it looks at
a number on the way: on a GPU that would be a wait.
"""
import json
import re
import weakref
from contextlib import ExitStack
from dataclasses import replace
from functools import cache as once

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compress import Compressor
from conftest import hf_config
from run.errors import BadInput
from run.train_flags import check, parse_args
from run.plan import (HEADER, TEACH, continuation_tokens, memory, out_of_memory, parameters, step_flops,
                      suggest_parallel)
from data.samples import Batch
from model import Config, Llama, attend_by_kernel, attend_in_blocks
from train import PRESETS, Distiller, MicroBatch, Totals, TrainConfig, main

SMOLLM = Config(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, n_embd=576, n_ffn=1536,
                max_positions=8192)
LLAMA_8B = Config(vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, head_dim=128, n_embd=4096, n_ffn=14336,
                  max_positions=131072, tied=False)


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at the same time, at most; parameters do not count."""

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


def one_pass(cfg: Config, c: TrainConfig, asked: int, phase: str, *watch) -> None:
    """Forward and backward of c.micro contexts, `asked` tokens about each, without numbers, under the modes `watch`."""
    def long(*shape):
        return torch.zeros(shape, dtype=torch.long)

    n, B = c.context + HEADER, c.micro
    with FakeTensorMode(), ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Llama(cfg).requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)
        model.recompute = c.recompute
        distil = Distiller(model, Compressor(cfg, c.compressor()), c.lam, c.chunk, c.scorer_lr > 0)
        batch = Batch(long(B, n), long(B) + n, long(B, n) > 0, long(B, asked), long(B, asked), long(B, asked) == 0,
                      long(B, asked) == 0)
        m = MicroBatch(batch, long(B * asked), long(B) + 100, n + asked, False)
        totals = Totals(*torch.ones(5))
        blocks = attend_in_blocks  # what a GPU does is planned: fused kernels, but where weights are watched
        patch.setattr("model.attend_in_blocks", lambda *x, watch=None: blocks(*x, watch=watch) if watch else
                      attend_by_kernel(*x[:5]))
        for mode in watch:
            if isinstance(mode, Peak):
                mode.live = {p.untyped_storage()._cdata: 0 for p in (*model.parameters(), *distil.parameters())}
            stack.enter_context(mode)
        distil(m, totals, phase)["loss"].backward()


MIX = {"continue": 1, "recite": 2, "cloze": 2, "title": 2}
KINDS = {"reconstruct": TEACH, "hard": MIX, "soft": MIX}


@once
def operations(phase: str, *flags) -> tuple[float, float]:
    """Of a step of the quick experiment with these flags, on ten layers: by our arithmetic, and counted by torch."""
    c, counter, cfg = replace(TrainConfig(), **dict(flags)), FlopCounterMode(display=False), replace(SMOLLM, n_layer=10)
    asked, n = round(continuation_tokens(KINDS[phase], c)), c.context + HEADER
    with sdpa_kernel(SDPBackend.MATH):  # torch counts no CPU flash attention
        one_pass(cfg, c, asked, phase, counter)
    return step_flops(cfg, c.compressor(), n, asked, asked, 1, phase, c.scorer_lr > 0), counter.get_total_flops()


@pytest.mark.parametrize("phase", ["reconstruct", "hard"])
@pytest.mark.parametrize("flags", [{}, {"choice": "token"}, {"hidden": 16384}, {"rank": 256}, {"eta": 3},
                                   {"scorer_lr": 1e-3, "soft": 1.0}, {"choice": "token", "eta": 2, "rank": 8}], ids=str)
def test_operations_follow_every_flag(phase, flags):
    """Within 10 %, and so does what the flags change, where that is 3 % of a step or more."""
    phase = "soft" if phase == "hard" and flags.get("soft") else phase
    (ours, counted), (ours_before, counted_before) = operations(phase, *flags.items()), operations(phase)
    assert 0.9 < ours / counted < 1.1
    change = counted - counted_before
    assert abs(ours - ours_before - change) <= max(0.15 * abs(change), 0.03 * counted)


@pytest.mark.parametrize("cfg, c", [
    (SMOLLM, TrainConfig()), (replace(SMOLLM, n_layer=12), TrainConfig(micro=4, batch=4, rank=64, scorer_lr=1e-3)),
    (replace(LLAMA_8B, n_layer=10), TrainConfig(context=1000, rank=128, recompute=True))], ids=["135m", "four", "8b"])
@pytest.mark.parametrize("phase", ["reconstruct", "hard"])
def test_bytes_are_those_of_a_step(cfg, c, phase):
    """Without the parameters, within 15 %: of distillation what is planned, of teaching no more than that."""
    peak = Peak()
    one_pass(cfg, c, round(continuation_tokens(KINDS[phase], c)), phase, peak)
    parts = memory(cfg, c, MIX, "bf16", 1, "ddp")
    ours = sum(list(parts.values())[4:])  # without weights, adapters, their gradients and moments
    assert peak.most < 1.15 * ours
    assert phase == "reconstruct" or peak.most > 0.85 * ours


@pytest.mark.parametrize("flags", [{}, {"choice": "token"}, {"hidden": 64, "rank": 3, "eta": 20}])
def test_trained_parameters_follow_the_flags(flags):
    """By hand: A and B on W_Q and W_O of layers η+1 … L−1, the scorer's two layers with their biases."""
    c = replace(TrainConfig(), **flags)
    outputs = 1 if c.choice == "token" else 30 * 3
    want = (29 - c.eta) * 4 * c.rank * 576 + (578 + 1) * c.hidden + (c.hidden + 1) * outputs
    assert parameters(SMOLLM, c.compressor())[0] == want


def test_parameters_of_the_8b_preset():
    """The two numbers that README quotes; the first by hand: 25 layers of A and B on W_Q and W_O, the scorer."""
    trained, frozen = parameters(LLAMA_8B, replace(TrainConfig(), **{
        k: v for k, v in PRESETS["paper"].items() if k not in ("weights", "dtype")}).compressor())
    D, r = 4096, 128
    assert trained == 25 * 4 * r * D + (D + 2 + 1) * D + (D + 1) * 32 * 8 == 70_267_136
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
    assert "8,030,261,248 frozen parameters, 70,267,136 trained" in out and "cannot fit" not in out
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
    assert all(x in text for x in ("--micro 2 (now 4)", "--recompute", "--parallel fsdp", "--chunk 64", "below 400"))
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


def test_every_kind_of_question_has_its_tokens():
    from data.samples import KINDS
    assert all(continuation_tokens({kind: 1}, TrainConfig()) > 20 for kind in (*KINDS, "replay"))
