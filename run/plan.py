"""What a training step costs, by arithmetic: operations, bytes, seconds; and the speed that it is held against.

Counted as the model needs it: a multiply-add is two operations, causal attention half a square, and what activation
recomputation does twice counts once.
"""
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from compress import Compressor, CompressorConfig
from run.errors import BadInput
from data.fetch import fetch
from model import Config, Llama

BYTES = {"fp32": 4, "bf16": 2, "auto": 2}
HEADER = 24  # tokens of the chat header, kept whole
ROOM = 0.9   # share of a GPU's memory that may be planned for: the rest goes to the driver, the libraries, and gaps


def block_flops(cfg: Config) -> int:
    """One block's matrix products, per token; attention itself excluded."""
    inner, kv = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    return 2 * cfg.n_embd * (2 * inner + 2 * kv + 3 * cfg.n_ffn)


def step_flops(cfg: Config, comp: CompressorConfig, ctx: float, cont: float, kept: float, rows: float, contexts: float,
               target: bool = True) -> float:
    """Operations of one training step; ctx, cont, kept, rows: tokens of the whole step, in `contexts` contexts.

    Frozen weights need no gradient, so a backward pass through them costs one forward, not two; through attention and
    through the adapters, two. The teacher reads every layer of the context but the last, of which only keys and values
    are made; the student shares layers 1…η with it and reads the adapted ones again, forward and backward. The
    continuation goes through all layers three times: teacher, student, student's backward.
    """
    L, D, inner = cfg.n_layer, cfg.n_embd, cfg.n_head * cfg.head_dim
    block, pair = block_flops(cfg), 4 * inner           # pair: per query and key, in one layer
    adapted = L - 1 - (0 if comp.two_pass else comp.eta)
    n, t, k = ctx / contexts, cont / contexts, kept / contexts
    read = ctx * (block * (L - 1 + 2 * adapted) + pair * n / 2 * (L - 1 + 3 * adapted))
    last = ctx * 3 * 4 * D * cfg.n_kv_head * cfg.head_dim
    adapters = ctx * adapted * 12 * comp.rank * (D + inner)
    scorer = ctx * 4 * D * D                            # its input has no gradient
    ask = cont * L * (3 * block + pair * (n + t + 3 * (k + t)))  # under a mask, which hides keys but skips none
    watch = cont * (L - comp.eta + 1) * pair / 2 * (n + t) * target
    head = 3 * 2 * rows * D * cfg.vocab_size            # student, teacher, and the gradient
    return read + last + adapters + scorer + ask + watch + head


def rates(tokens: float, flops: float, seconds: float) -> dict:
    return {"tokens_per_s": round(tokens / seconds), "gflop_per_s": round(flops / seconds / 1e9, 1)}


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
    with torch.device("meta"):
        return Llama(Config.from_json(Path(folder) / "config.json"))


def continuation_tokens(mix: dict, answer: int) -> float:
    """Tokens asked about one context: the average of what `data.samples` makes of each kind, measured (LOG.md)."""
    return sum(count * {"continue": answer, "recite": 24 + answer, "cloze": 54, "title": 29}[kind]
               for kind, count in mix.items())


def memory(cfg: Config, c, mix: dict, dtype: str, size: int, parallel: str) -> dict[str, float]:
    """Bytes in one process at the fullest moment of a step, by part: the loss and the first blocks of the backward
    pass, when all that backward needs is still there. c: TrainConfig; size: processes on one host.

    A frozen matrix keeps nothing for backward but itself, so of a block these remain, per token: both norms' inputs in
    fp32, q, k, v, attention's output, three of the MLP's inner width, and in an adapted block the inputs of the four
    low-rank matrices. With --recompute, only what goes into the block.
    """
    e, D, F_, V, L = BYTES[dtype], cfg.n_embd, cfg.n_ffn, cfg.vocab_size, cfg.n_layer
    inner, kv = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    comp = CompressorConfig(c.eta, c.rank, c.decay, c.two_pass, not c.no_positions)
    trained, frozen = parameters(cfg, comp)
    whole = sum(p.numel() for p in frozen.embed.parameters()) * (1 if cfg.tied else 2)
    block = sum(p.numel() for p in frozen.layers[0].parameters())
    weights = (whole + (block * L if parallel == "ddp" else block * (L / size + 2))) * e  # two blocks are unsharded
    adapted = L - 1 - (0 if comp.two_pass else comp.eta)

    n = c.micro * (c.context + HEADER)
    t_each = continuation_tokens(mix, c.answer)
    t, kept = c.micro * t_each, c.micro * (c.keep_high * c.context + HEADER)
    kept = n if c.soft else kept
    of_block = 8 * D + e * (2 * inner + 2 * kv + 3 * F_)                  # per token
    of_adapters = e * (D + inner + 2 * c.rank)
    scores = c.micro * cfg.n_head * t_each * (t_each + kept / c.micro)    # student's attention: the mask has a gradient
    pair = scores * (e + 4)
    ask_block = t * of_block + kept * e * 2 * kv + pair
    read_block = n * (of_block + of_adapters)
    if c.recompute:
        activations = adapted * n * e * (D + 2 * kv) + L * t * e * (D + 2 * kv) + max(read_block, ask_block)
    else:
        activations = adapted * read_block + L * ask_block
    context = n * e * (D + comp.eta * 2 * kv)                             # h^η, and the keys and values below it
    short, logits = L * kept * e * 2 * kv, min(c.chunk, t) * V * (4 * 4 + 2 * e)
    # the teacher, before all that: the cache of every other layer, and one layer's attention for the scorer's target
    teacher = (L - comp.eta) * n * e * 2 * kv + t * cfg.n_head * (t_each + n / c.micro) * (8 + e) * (c.target > 0)
    return {
        "weights, frozen": weights,
        "adapters and scorer, fp32": 4.0 * trained,
        "their gradient" + (", and its flat copy" if size > 1 else ""): (4.0 if size == 1 else 8.0) * trained,
        "AdamW's two moments": 8.0 * trained,
        "context up to layer η": context,
        "short cache, in every layer": short,
        "kept for backward": activations,
        "logits of one chunk": logits,
        "what the teacher's pass needs beyond these": max(0.0, teacher - short - activations - logits),
    }


def parameters(cfg: Config, comp: CompressorConfig) -> tuple[int, Llama]:
    """The number of trained parameters, and the frozen model without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in Compressor(cfg, comp).parameters()), Llama(cfg)


def print_plan(a, mix: dict) -> None:
    """--plan: parameters, bytes, operations and seconds for the flags in `a`; says when the step cannot fit."""
    c, cfg = a.config, Config.from_json(Path(a.weights or fetch()) / "config.json")
    if a.gpus < 1 or c.batch % (a.gpus * c.micro):
        raise BadInput(f"--batch {c.batch} cannot be shared by --gpus {a.gpus} with --micro {c.micro}; expected a "
                       f"multiple of {a.gpus * c.micro}")
    comp = CompressorConfig(c.eta, c.rank, c.decay, c.two_pass, not c.no_positions)
    trained, frozen = parameters(cfg, comp)
    count = sum(p.numel() for p in frozen.parameters())
    room = ROOM * a.gpu_memory * 1e9
    totals = {}
    for parallel in ("ddp", "fsdp") if c.parallel == "auto" and a.gpus > 1 else (
            (c.parallel,) if c.parallel != "auto" else ("ddp",)):
        totals[parallel] = memory(cfg, c, mix, a.dtype, min(a.gpus, a.gpus_per_host), parallel)
    suggested = c.parallel if c.parallel != "auto" else "ddp" if a.gpus == 1 else suggest_parallel(
        count * BYTES[a.dtype], a.gpu_memory * 1e9)
    parts = totals.get(suggested, totals["ddp"] if "ddp" in totals else next(iter(totals.values())))

    n, t = c.context + HEADER, continuation_tokens(mix, c.answer)
    keep = (c.keep_low * c.keep_high) ** 0.5                              # the middle of what is drawn
    flops = step_flops(cfg, comp, c.batch * n, c.batch * t, c.batch * keep * n, c.batch * t, c.batch, c.target > 0)
    seconds = flops / (a.gpus * a.gpu_tflops * 1e12 * a.utilisation)
    print(f"{count:,} frozen parameters, {trained:,} trained (rank {c.rank} in "
          f"{cfg.n_layer - 1 - (0 if comp.two_pass else comp.eta)} layers)")
    print(f"{a.gpus} processes, --parallel {suggested}, {BYTES[a.dtype] * 8} bits; a step: {c.batch} contexts of {n} "
          f"tokens and {t:.0f} asked about each, {c.batch // a.gpus // c.micro} passes of {c.micro} per process\n")
    print("bytes in one process, at the fullest moment of a step")
    for name, size in parts.items():
        print(f"  {size / 1e9:8.2f} GB  {name}")
    total = sum(parts.values())
    print(f"  {total / 1e9:8.2f} GB  together; {room / 1e9:.0f} of {a.gpu_memory:.0f} GB are counted on")
    if total > room:
        print("  This cannot fit: " + advice(parts, c, a.gpus, suggested))
    print(f"\noperations   {flops:.3e} per step, {flops / (c.batch * (n + t)):.2e} per token")
    print(f"seconds      {seconds:.2f} per step at {a.utilisation:.0%} of {a.gpu_tflops:.0f} TFLOP/s per GPU; "
          f"{c.steps} steps: {c.steps * seconds / 3600:.1f} hours")


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
    if not any(words in str(error) for words in ("out of memory", "t allocate memory")):
        return None
    help_ = [f"--micro {c.micro // 2} (now {c.micro})"] * (c.micro > 1) + ["--recompute"] * (not c.recompute)
    help_ += ["--parallel fsdp"] * (size > 1 and c.parallel == "ddp")
    help_ += [f"--chunk {c.chunk // 2} (now {c.chunk})"] * (c.chunk > 64)
    return BadInput(f"out of memory: try {', '.join(help_ + [f'a --context below {c.context}'])}; "
                    f"--plan shows what needs how much ({str(error).splitlines()[0]})")
