"""What a training run needs, by arithmetic: memory, operations, hours (--plan).

A multiply-add counts as two operations, causal attention as half a square. What
activation checkpointing computes twice counts once, but for the logits of the
first phase.
"""
import math

import torch

from model import Config, Llama
from run.dist import World
from run.errors import BadInput
from run.loading import is_out_of_memory, pick_dtype, read_config

# the model of the presets 8b and paper, whose config.json is behind a licence
LLAMA_8B_SHAPE = Config(
    vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, head_dim=128, n_embd=4096,
    n_ffn=14336, max_positions=131072, tied=False)
BYTES = {"fp32": 4, "bf16": 2, "auto": 2}  # auto: --plan takes a GPU with bf16 units
HEADER = 24        # tokens of the chat header before every context
USABLE = 0.9       # of a GPU's memory; the rest is for the driver and the allocator
UTILISATION = 0.4  # of a GPU's peak; train.py logs what a step reaches
HOST = 8           # GPUs of one host, over which fsdp shards the weights


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def tokens_asked(mix: dict[str, int], c, context: float) -> float:
    """Tokens of the questions and answers about a context of `context` tokens, on
    average, as counted with SmolLM2's tokenizer.

    c: the TrainConfig, also below.
    """
    per_question = {
        "continue": c.answer, "recite": 24 + c.answer, "cloze": 54, "title": 29,
        "fact": 30, "replay": 16 + context}
    return sum(n * per_question[kind] for kind, n in mix.items())


def step_flops(
    cfg: Config, compressor, contexts: int, context: float, asked: float,
    supervised: float, phase: str, learn_scores: bool,
) -> float:
    """Operations of one training step.

    context, asked, supervised: tokens of all `contexts` of the step together.
    A backward pass through a frozen matrix costs as much as a forward pass,
    because only its input has a gradient. Through attention or a trained matrix
    it costs twice as much.
    """
    D = cfg.n_embd
    inner = cfg.n_head * cfg.head_dim
    kv = cfg.n_kv_head * cfg.head_dim
    n = context / contexts
    adapted, rank, _ = compressor.a_q.shape
    scorer = 2 * context * count(compressor.scorer)

    # operations per token and layer
    matrices = 2 * D * (2 * inner + 2 * kv + 3 * cfg.n_ffn)
    to_context = 4 * inner * n / 2
    to_cache = 4 * inner * (n + asked / contexts)
    lora = 4 * rank * (D + inner)

    read = context * ((cfg.n_layer - 1) * (matrices + to_context) + 4 * D * kv)
    ask = asked * cfg.n_layer * (matrices + to_cache)
    if phase == "scorer":
        total = read + ask + 3 * scorer
        if compressor.cfg.target == "both":  # and back, to each attention weight
            total += asked * cfg.n_layer * (matrices + 2 * to_cache)
            total += 6 * asked * D * cfg.vocab_size
        return total
    encode = context * adapted * (2 * matrices + 3 * to_context + 3 * lora)
    n_backward = cfg.n_layer if learn_scores else adapted
    student = ask + asked * n_backward * (matrices + 2 * to_cache)
    logits = 6 * supervised * D * cfg.vocab_size  # teacher, student, gradient
    return read + ask + encode + student + logits + scorer * (3 if learn_scores else 1)


def memory(
    c, model: Llama, compressor, asked: float, dtype: str, gpus: int, parallel: str,
    phase: str = "distillation",
) -> dict[str, float]:
    """Bytes in one process at the peak of a phase, which is in the loss.

    asked: tokens of the questions about one context.
    A frozen matrix keeps nothing for the backward pass. What a block keeps, per
    token, are the inputs of its norms in fp32, q, k, v, the attention's output
    and three inner widths of the MLP; with activation checkpointing, its input.
    """
    cfg = model.cfg
    D = cfg.n_embd
    inner = cfg.n_head * cfg.head_dim
    kv = cfg.n_kv_head * cfg.head_dim
    size = BYTES[dtype]
    adapted = len(compressor.a_q)
    n_backward = cfg.n_layer if c.scorer_lr_phase2 else adapted
    micro = max(1, min(c.micro, c.batch_of(phase) // gpus))
    context = micro * (c.context + HEADER)
    trained = count(compressor)
    frozen = count(model)
    if parallel == "fsdp":  # a share of all blocks, and two whole ones at a time
        frozen += count(model.layers) * (1 / min(gpus, HOST) + 2 / cfg.n_layer - 1)

    per_token = 8 * D + size * (2 * inner + 2 * kv + 3 * cfg.n_ffn)
    encode = context * (per_token + size * (D + inner))  # with the LoRA's inputs
    entries = c.context + HEADER + asked / 2  # that a token of a question looks at
    asked = micro * asked  # of all contexts of a forward pass
    # attention keeps keys and values of every query head, widened for the bias
    ask = asked * per_token + 2.2 * (context + asked) * size * inner
    kept = adapted * encode + n_backward * ask
    if c.activation_checkpointing:
        inputs = adapted * context * size * (D + 2 * kv) + n_backward * asked * 4 * D
        kept = inputs + max(encode, ask)
    if phase == "scorer":
        layers = cfg.n_layer if compressor.cfg.target == "both" else 1
        weights = asked * entries * cfg.n_head  # of attention, in one layer
        kept = layers * (asked * per_token + weights * (4 + size))
        if c.activation_checkpointing:  # the weights themselves stay, in fp32
            kept = layers * (asked * size * D + weights * 4)
    return {
        "frozen weights": frozen * size,
        "trained parameters, gradient, AdamW (fp32)": 16 * trained,
        "gradient buckets of DistributedDataParallel": 4 * trained * (gpus > 1),
        "full cache of the contexts": context * size * (D + 2 * kv * cfg.n_layer),
        "activations for the backward pass": kept,
        "logits of one chunk": min(c.chunk, asked) * cfg.vocab_size * (16 + 2 * size),
    }


def print_plan(a, c, model: Llama, compressor, scorer_mix: dict, mix: dict) -> None:
    """a: the flags; model, compressor: without memory, on the meta device;
    scorer_mix, mix: the questions about a context in the two phases."""
    parallel = c.parallel
    if parallel == "auto":
        weights = count(model) * BYTES[a.dtype]
        parallel = fitting_parallel(weights, a.gpus, a.gpu_memory * 1e9)
    phases = []
    for phase, steps, questions in (
        ("scorer", c.scorer_steps, scorer_mix), ("distillation", c.steps, mix),
    ):
        if steps > 0:
            asked = tokens_asked(questions, c, c.context)
            phases.append(memory(
                c, model, compressor, asked, a.dtype, a.gpus, parallel, phase))
    items = max(phases, key=lambda items: sum(items.values()))

    print(f"{count(model):,} frozen parameters, {count(compressor):,} trained\n"
          f"--gpus {a.gpus}, --parallel {parallel}, --batch {c.batch}, "
          f"--micro {c.micro}, --context {c.context}\n\n"
          "memory of one process, in GB")
    for name, size in items.items():
        if size:
            print(f"{size / 1e9:10.3g}  {name}")
    total = sum(items.values()) / 1e9
    usable = a.gpu_memory * USABLE
    print(f"{total:10.3g}  together, of {usable:.3g} that can be used")
    if total > usable:
        print(f"This does not fit. Try {advice(c, a.gpus, parallel)}.")
        return

    print(f"\ntime at {UTILISATION:.0%} of {a.gpu_tflops:g} TFLOP/s per GPU; "
          "a CPU takes many times longer")
    speed = a.gpus * a.gpu_tflops * 1e12 * UTILISATION
    shortest = c.min_context or c.context
    mean = c.context  # of lengths of which every doubling is as likely
    if shortest < c.context:
        mean = (c.context - shortest) / math.log(c.context / shortest)
    total = 0
    for phase, steps, questions in (
        ("scorer", c.scorer_steps, scorer_mix), ("distillation", c.steps, mix),
    ):
        batch = c.batch_of(phase)
        asked = batch * tokens_asked(questions, c, mean)
        context = batch * (HEADER + mean)
        flops = step_flops(model.cfg, compressor, batch, context, asked, asked,
                           phase, c.scorer_lr_phase2 > 0)
        seconds = steps * flops / speed
        total += seconds
        print(f"{phase:14}{steps} steps of {flops:.3g} operations: {duration(seconds)}")
    print(f"{'together':14}{duration(total)}")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds / 3600:.3g} hours"


def fitting_parallel(weights: float, processes: int, gpu_bytes: float | None) -> str:
    """ddp while the frozen weights (bytes) leave half of a GPU's memory, else fsdp."""
    too_large = gpu_bytes and weights > gpu_bytes / 2
    return "fsdp" if too_large and processes > 1 else "ddp"


def choose_parallel(asked: str, folder, dtype: str, world: World) -> str:
    """ddp or fsdp; asked: --parallel, which may be auto."""
    if world.world_size == 1:
        if asked == "fsdp":
            raise BadInput(
                "--parallel fsdp spreads the model over processes and there is one; "
                "start several with torchrun --nproc_per_node=8 train.py …")
        return "ddp"
    if asked != "auto":
        return asked

    cfg = read_config(f"{folder}/config.json")
    with torch.device("meta"):
        weights = count(Llama(cfg)) * pick_dtype(dtype, world.device).itemsize
    gpu_bytes = None
    if world.device.type == "cuda":
        gpu_bytes = torch.cuda.get_device_properties(world.device).total_memory
    chosen = fitting_parallel(weights, world.world_size, gpu_bytes)
    print(f"--parallel {chosen}: the frozen model takes {weights / 1e9:.3g} GB")
    return chosen


def advice(c, processes: int, parallel: str) -> str:
    """Flags that need less memory, those first that cost least."""
    flags = []
    if c.micro > 1:
        flags.append(f"--micro {c.micro // 2}")
    if not c.activation_checkpointing:
        flags.append("--activation-checkpointing")
    if parallel == "ddp":
        several = "" if processes > 1 else "several GPUs with "
        flags.append(f"{several}--parallel fsdp")
    if c.chunk > 64:
        flags.append(f"--chunk {c.chunk // 2}")
    flags.append(f"a --context below {c.context}")
    return ", ".join(flags)


def out_of_memory(error: RuntimeError, c, processes: int) -> BadInput | None:
    """What to do about an allocation that failed; None for any other error."""
    if not is_out_of_memory(error):
        return None
    cause = str(error).splitlines()[0]
    return BadInput(f"out of memory: try {advice(c, processes, c.parallel)}; "
                    f"--plan shows what needs how much ({cause})")
