"""What a training step costs, by arithmetic: operations, bytes, seconds; and the speed that it is held against.

Counted as the model needs it: a multiply-add is two operations, causal attention half a square, and what activation
recomputation does twice counts once.
"""
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from compress import Compressor, CompressorConfig
from run.errors import BadInput
from run.models import no_memory, read_config
from data.fetch import fetch
from model import Config, Llama

BYTES = {"fp32": 4, "bf16": 2, "auto": 2}
HEADER = 24  # tokens of the chat header, kept whole
ROOM = 0.9   # share of a GPU's memory that may be planned for: the rest goes to the driver, the libraries, and gaps


def block_flops(cfg: Config) -> int:
    """One block's matrix products, per token; attention itself excluded."""
    inner, kv = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    return 2 * cfg.n_embd * (2 * inner + 2 * kv + 3 * cfg.n_ffn)


def step_flops(cfg: Config, comp: CompressorConfig, ctx: float, cont: float, supervised: float, contexts: float,
               phase: str, learn_scores: bool = False) -> float:
    """Operations of one training step; ctx, cont, supervised: tokens of the whole step, in `contexts` contexts.

    Frozen weights need no gradient, so a backward pass through them costs one forward, not two; through attention and
    through the adapters, two. Both phases read every layer of the context but the last, of which only keys and values
    are made, and then the continuation, which attends to all of the context: masks hide keys but skip none.
    reconstruct: attention's weights are looked at as they are made, and the scorer learns from them.
    else: the student shares layers 1…η, and reads the adapted ones again, forward and backward; the continuation goes
    through all layers twice, and backward through those whose cache has a gradient: all if the scores learn, else the
    layers after η + 1.
    """
    L, D, inner, kv = cfg.n_layer, cfg.n_embd, cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    block, pair = block_flops(cfg), 4 * inner           # pair: per query and key, in one layer
    adapted, outputs = Compressor.n_adapted(cfg, comp), L * cfg.n_kv_head if comp.choice == "head" else 1
    n, t = ctx / contexts, cont / contexts
    read = ctx * ((L - 1) * (block + pair * n / 2) + 4 * D * kv)
    ask = cont * L * (block + pair * (n + t))
    first, second = 2 * ctx * (D + 2) * comp.hidden, 2 * ctx * comp.hidden * outputs  # of the scorer
    if phase == "reconstruct":
        return read + ask + 2 * first + 3 * second      # the scorer's input has no gradient
    again = ctx * (adapted * (2 * block + 3 * pair * n / 2 + 12 * comp.rank * (D + inner)) + 8 * D * kv)
    wide = pair * (1 + bias_columns(cfg.head_dim) / cfg.head_dim) * (n + t)           # β is a column of the keys
    student = cont * (L * (block + wide) + (L if learn_scores else adapted) * (block + 2 * wide))
    head = 3 * 2 * supervised * D * cfg.vocab_size      # student, teacher, and the gradient
    return read + ask + again + student + head + (first + second) * (2 if learn_scores else 1)


def bias_columns(head_dim: int) -> int:
    """Columns that `attend` adds to keys and values for the bias: kernels want a multiple of 8."""
    return 8 - head_dim % 8


def speed(cfg: Config, comp: CompressorConfig, got: dict, contexts: int, phase: str, learn_scores: bool,
          seconds: float) -> dict:
    """For the log: how fast a step was. got: its numbers, by name (train.Totals)."""
    flops = step_flops(cfg, comp, got["context"], got["continuation"], got["supervised"], contexts, phase, learn_scores)
    return {"seconds": round(seconds, 3), "tokens_per_s": round((got["context"] + got["continuation"]) / seconds),
            "gflop_per_s": round(flops / seconds / 1e9, 1)}


def gemm_rate(model: Llama, tokens: int, seconds: float = 2.0) -> float:
    """Operations per second of bare matrix products: one block's seven at `tokens` rows, in the model's dtype and on
    its device, the median of those that fit into `seconds`. What a step is held against."""
    cfg, inner, kv = model.cfg, model.cfg.n_head * model.cfg.head_dim, model.cfg.n_kv_head * model.cfg.head_dim
    D, make = cfg.n_embd, {"device": model.device, "dtype": model.dtype}
    shapes = [(tokens, D, inner), (tokens, D, kv), (tokens, D, kv), (tokens, inner, D), (tokens, D, cfg.n_ffn),
              (tokens, D, cfg.n_ffn), (tokens, cfg.n_ffn, D)]
    work = [(torch.randn(m, k, **make), torch.randn(n, k, **make)) for m, k, n in shapes]
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    taken, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        wait()
        start = time.perf_counter()
        for x, w in work:
            F.linear(x, w)
        wait()
        taken.append(time.perf_counter() - start)
    return sum(2 * m * k * n for m, k, n in shapes) / sorted(taken)[len(taken) // 2]


def choose_parallel(asked: str, folder, dtype: str, size: int, device: torch.device) -> str:
    """ddp or fsdp for `size` processes, by bytes where --parallel is auto; says why. One process has no choice."""
    if size == 1:
        if asked == "fsdp":
            raise BadInput("--parallel fsdp spreads the model over processes and there is one; start several with "
                           "torchrun --nproc_per_node=8 train.py …")
        return "ddp"
    need = sum(p.numel() for p in empty_model(folder).parameters()) * BYTES[dtype]
    have = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if asked == "auto":
        asked = suggest_parallel(need, have)
        have = f"{have / 1e9:.0f} GB of each GPU" if have else "this CPU's memory"
        print(f"--parallel {asked}: the frozen model takes {need / 1e9:.1f} GB, to be held against {have}")
    return asked


def suggest_parallel(weights: float, memory: float | None) -> str:
    """ddp while the frozen weights (bytes) leave more than half of a GPU to the step, or where there is no GPU."""
    return "fsdp" if memory and weights > memory / 2 else "ddp"


def empty_model(folder) -> Llama:
    cfg = read_config(Path(folder) / "config.json")
    with torch.device("meta"):
        return Llama(cfg)


def continuation_tokens(mix: dict, c) -> float:
    """Tokens asked about one context: what `data.samples` makes of each kind on average, measured (LOG.md), or 40."""
    each = {"continue": c.answer, "recite": 24 + c.answer, "cloze": 54, "title": 29, "fact": 30,
            "replay": 16 + c.context}
    return sum(count * each.get(kind, 40) for kind, count in mix.items())


TEACH = {"replay": 1, "continue": 1}  # the mix of the first phase


def memory(cfg: Config, c, mix: dict, dtype: str, size: int, parallel: str) -> dict[str, float]:
    """Bytes in one process at the fullest moment of a step, by part: the loss of a distillation step, when all that
    backward needs is there. c: TrainConfig; size: processes on one host.

    A frozen matrix keeps nothing for backward but itself, so of a block these remain, per token: norms' inputs in
    fp32, q, k, v, attention's output, three of the MLP's inner width, and in an adapted block the inputs of the four
    low-rank matrices; of the student's continuation also all keys and values, for every query head and with the bias
    as a column.
    With --recompute, only what goes into the block. Attention itself keeps no weights: its kernels make them again (not
    so, and not counted, where a sliding window bites).
    """
    e, D, F_, V, L = BYTES[dtype], cfg.n_embd, cfg.n_ffn, cfg.vocab_size, cfg.n_layer
    inner, kv = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    comp = c.compressor()
    trained, frozen = parameters(cfg, comp)
    whole = sum(p.numel() for p in frozen.embed.parameters()) * (1 if cfg.tied else 2)
    block = sum(p.numel() for p in frozen.layers[0].parameters())
    weights = (whole + (block * L if parallel == "ddp" else block * (L / size + 2))) * e  # two blocks are unsharded
    adapted = Compressor.n_adapted(cfg, comp)
    backward = L if c.scorer_lr > 0 else adapted                          # layers with a backward of the continuation

    n, t = c.micro * (c.context + HEADER), c.micro * continuation_tokens(mix, c)
    wide = 1 + bias_columns(cfg.head_dim) / cfg.head_dim
    of_block = 8 * D + e * (2 * inner + 2 * kv + 3 * F_) + 4 * (inner + kv) * cfg.head_norm  # per token
    read_block = n * (of_block + e * (D + inner + 2 * c.rank))
    keys = (n + t) * e * 2 * inner * wide                                 # what a layer's attention holds on to
    ask_block = t * (of_block + e * 2 * inner * (wide - 1)) + keys
    if c.recompute:
        activations = adapted * n * e * (D + 2 * kv) + backward * t * 4 * D + max(read_block, ask_block)
    else:
        activations = adapted * read_block + backward * ask_block
    context = n * e * (D + comp.eta * 2 * kv)                             # h^η, and the keys and values below it
    full, logits = (L - comp.eta) * n * e * 2 * kv, min(c.chunk, t) * V * (4 * 4 + 2 * e)
    # teaching: a block, the attention of 128 tokens at a time, what was found, and the scorer's layers
    t0 = c.micro * continuation_tokens(TEACH, c)
    found = L * cfg.n_kv_head * n * 4
    teach = t0 * of_block + keys + 3 * 128 * cfg.n_head * (n + t0) * 4 + 3 * found + n * 4 * (2 * D + 3 * comp.hidden)
    return {
        "weights, frozen": weights,
        "adapters and scorer, fp32": 4.0 * trained,
        "their gradient" + (", and its flat copy" if size > 1 else ""): (4.0 if size == 1 else 8.0) * trained,
        "AdamW's two moments": 8.0 * trained,
        "context up to layer η": context,
        "the teacher's cache above it": full,
        "kept for backward": activations,
        "logits of one chunk": logits,
        "what the first phase needs beyond these": max(0.0, teach * (c.reconstruct > 0) - activations - logits),
    }


def parameters(cfg: Config, comp: CompressorConfig) -> tuple[int, Llama]:
    """The number of trained parameters, and the frozen model without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in Compressor(cfg, comp).parameters()), Llama(cfg)


def print_plan(a, mix: dict) -> None:
    """--plan: parameters, bytes, operations and seconds for the flags in `a`; says when the step cannot fit."""
    c, cfg = a.config, read_config(Path(a.weights or fetch()) / "config.json")
    if c.batch % (a.gpus * c.micro):
        raise BadInput(f"--batch {c.batch} cannot be shared by --gpus {a.gpus} with --micro {c.micro}; expected a "
                       f"multiple of {a.gpus * c.micro}")
    comp = c.compressor()
    trained, frozen = parameters(cfg, comp)
    count = sum(p.numel() for p in frozen.parameters())
    parallel = c.parallel if c.parallel != "auto" else "ddp" if a.gpus == 1 else suggest_parallel(
        count * BYTES[a.dtype], a.gpu_memory * 1e9)
    parts, room = memory(cfg, c, mix, a.dtype, min(a.gpus, a.gpus_per_host), parallel), ROOM * a.gpu_memory * 1e9
    n, total = c.context + HEADER, sum(parts.values())
    print(f"{count:,} frozen parameters, {trained:,} trained (rank {c.rank} in "
          f"{Compressor.n_adapted(cfg, comp)} layers; a scorer per {c.choice}, width {c.hidden})")
    print(f"{a.gpus} processes, --parallel {parallel}, {BYTES[a.dtype] * 8} bits; a step: {c.batch} contexts of {n} "
          f"tokens{' at most' if c.shortest else ''}, {c.batch // a.gpus // c.micro} passes of {c.micro} per process\n")
    print("bytes in one process, at the fullest moment of a step")
    for name, size in parts.items():
        print(f"  {size / 1e9:8.2f} GB  {name}")
    print(f"  {total / 1e9:8.2f} GB  together; {room / 1e9:.0f} of {a.gpu_memory:.0f} GB are counted on")
    if total > room:
        print("  This cannot fit: " + advice(parts, c, a.gpus, parallel))
    print(f"\nseconds are at {a.utilisation:.0%} of {a.gpu_tflops:.0f} TFLOP/s per GPU")
    hours, mean = 0, replace(c, context=(c.context + (c.shortest or c.context)) // 2)
    n = mean.context + HEADER
    for phase, steps, kinds in (("reconstruct", c.reconstruct, TEACH), ("distil", c.steps, mix)):
        t = continuation_tokens(kinds, mean)
        flops = step_flops(cfg, comp, c.batch * n, c.batch * t, c.batch * t, c.batch, phase, c.scorer_lr > 0)
        seconds = flops / (a.gpus * a.gpu_tflops * 1e12 * a.utilisation)
        hours += steps * seconds / 3600
        print(f"{phase:12} {t:.0f} tokens asked about each context; {flops:.3e} operations per step, "
              f"{flops / (c.batch * (n + t)):.2e} per token; {seconds:.2f} s per step, {steps} steps: "
              f"{steps * seconds / 3600:.1f} hours")
    print(f"{'together':12} {hours:.1f} hours")


def profile(c, model: Llama, about: dict, world, train) -> None:
    """A few steps of each phase, its first one not counted, against the speed of bare matrix products in the same
    minute. train: called with a folder, trains as c says and logs there."""
    tokens = c.micro * (c.context + HEADER)
    before = gemm_rate(model, tokens)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = world.broadcast(Path(tmp))
        train(tmp)
        lines = [] if world.rank else list(map(json.loads, (tmp / "log.jsonl").read_text().splitlines()))
    best, found = (before + gemm_rate(model, tokens)) / 2 * world.world_size, {}
    for phase, part in (("reconstruct", lines[1:c.reconstruct]), ("distil", lines[c.reconstruct + 1:])):
        if part:
            seconds = sum(x["seconds"] for x in part)
            reached = sum(x["gflop_per_s"] * x["seconds"] for x in part) / seconds
            found[phase] = {"steps": len(part), "seconds_per_step": round(seconds / len(part), 3),
                            "gflop_per_s": round(reached, 1), "utilisation": round(reached * 1e9 / best, 3)}
    print(json.dumps({**found, "gemm_gflop_per_s": round(best / 1e9, 1), "micro": c.micro, "context": c.context,
                      "dtype": str(model.dtype)[6:], "processes": world.world_size, **about}))


def advice(parts: dict[str, float], c, size: int, parallel: str) -> str:
    """Flags that shrink the largest part."""
    largest = max(parts, key=parts.get)
    if largest.startswith("weights"):
        return "the frozen weights are the largest part; " + (
            "--parallel fsdp spreads them" if parallel == "ddp" and size > 1 else "use more GPUs with --parallel fsdp")
    if largest.startswith("logits"):
        return "the logits are the largest part; lower --chunk"
    return "the activations are the largest part; " + ("lower --micro" if c.micro > 1 else "--recompute"
                                                       if not c.recompute else "lower --context, or --answer")


def out_of_memory(error: RuntimeError, c, size: int) -> BadInput | None:
    """What to do about an allocation that failed, in one of `size` processes; None for any other error."""
    if not no_memory(error):
        return None
    help_ = [f"--micro {c.micro // 2} (now {c.micro})"] * (c.micro > 1) + ["--recompute"] * (not c.recompute)
    help_ += ["--parallel fsdp"] * (size > 1 and c.parallel == "ddp")
    help_ += [f"--chunk {c.chunk // 2} (now {c.chunk})"] * (c.chunk > 64)
    return BadInput(f"out of memory: try {', '.join(help_ + [f'a --context below {c.context}'])}; "
                    f"--plan shows what needs how much ({str(error).splitlines()[0]})")
