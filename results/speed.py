"""Measure how fast reading, decoding, compressing and training are on this machine.

    python results/speed.py                             # SmolLM2 on the CPU; results/speed.json
    python results/speed.py --device cuda               # results/speed-cuda.json
    python results/speed.py --device cuda --shape 8b    # results/speed-cuda-8b.json
    python results/speed.py --quick                     # small sizes; nothing is written

`--shape` takes random weights of that model's shape, made on the device: times
do not depend on what the weights are. It measures training, too.

Reading and decoding are compared with transformers. Decoding is compared with
the time that it takes to read the weights and the cache once ("floor"), and
decoding from a compressed cache with what its fewer bytes promise. Training is
compared with what `train.py --plan` computes. A machine's speed drifts, so what
is compared is measured in turns (A B A B). All numbers are medians of seconds,
and their ratios. The file is written again after each measurement.
"""
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compress import Compressor, CompressorConfig  # noqa: E402
from data.fetch import fetch  # noqa: E402
from data.batches import collate  # noqa: E402
from data.samples import Case, Query  # noqa: E402
from model import CONFIG_NAMES, Config, Llama, generate, load_llama  # noqa: E402
from run.dist import World  # noqa: E402
from run.errors import BadInput, Parser, provenance, run_program, write_json  # noqa: E402
from run.loading import keep_freed_memory, pick_device  # noqa: E402
from run.memory_plan import (  # noqa: E402
    HEADER,
    LLAMA_8B_SHAPE,
    UTILISATION,
    memory,
    step_flops,
    tokens_asked,
)
from run.train_flags import PRESETS, TrainConfig, parse_mix  # noqa: E402
from train import (  # noqa: E402
    Distiller,
    MicroBatch,
    compressor_config,
    forward_backward,
    start_phase,
)

KEEP = 0.1

SHAPES = {
    "tiny": Config(
        vocab_size=512, n_layer=4, n_head=4, n_kv_head=2, head_dim=16, n_embd=64,
        n_ffn=128, max_positions=1024),
    "135m": Config(  # SmolLM2-135M
        vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, n_embd=576,
        n_ffn=1536, max_positions=8192),
    "1b": Config(  # Llama-3.2-1B
        vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, head_dim=64, n_embd=2048,
        n_ffn=8192, max_positions=131072),
    "8b": LLAMA_8B_SHAPE,  # Llama-3.1-8B
}

# Tokens of documents, and (tokens, rows) that decode together. contexts: of one
# training step; 0: no training.
CPU = {
    "prefill": (512, 2048),
    "decode": ((512, 1), (2048, 1), (8000, 8)),
    "compress": (512, 2048, 8000),
    "contexts": 0,
    "repeats": 5,
    "steps": 32,
}
GPU = CPU | {
    "prefill": (2048, 8000),
    "decode": ((2048, 1), (2048, 8), (8000, 1), (8000, 8)),
    "compress": (2048, 8000),
}
QUICK = {
    "prefill": (64, 128),
    "decode": ((64, 1), (128, 1), (256, 4)),
    "compress": (64, 128, 256),
    "contexts": 0,
    "repeats": 3,
    "steps": 8,
}

# what was hoped for; a number after "<" is the most, after ">" the least
CPU_TARGETS = {
    "prefill 512 bf16": "> 1.2", "prefill 2048 bf16": "> 1.1",
    "decode 512 x 1": "> 1.5", "decode 512 x 1, of the floor": "> 0.75",
    "decode 2048 x 1": "> 2", "decode 2048 x 1, of the floor": "> 0.75",
    "compressed 8000 x 8, of the promise": "> 0.8",
    "compress 512": "< 1.1", "compress 2048": "< 1.1", "compress 8000": "< 1.1",
}
GPU_TARGETS = {
    "compressed 2048 x 1": "> 1", "compressed 2048 x 8": "> 1",
    "compressed 8000 x 1": "> 1", "compressed 8000 x 8": "> 1",
    "compressed 8000 x 8, of the promise": "> 0.5",
}
TARGETS = {
    "135m": GPU_TARGETS | {
        "decode 2048 x 1": "> 5", "decode 2048 x 1, ms": "< 2",
        "compress 2048": "< 2", "compress 8000": "< 2",
    },
    "1b": GPU_TARGETS | {"compress 2048": "< 1.3", "compress 8000": "< 1.3"},
    "8b": GPU_TARGETS | {
        "decode 2048 x 1, of the floor": "> 0.7", "decode 2048 x 8, of the floor": "> 0.7",
        "decode 8000 x 1, of the floor": "> 0.7", "decode 8000 x 8, of the floor": "> 0.7",
        "compress 2048": "< 1.3", "compress 8000": "< 1.3",
        "training, of the bf16 rate": "> 0.4",
        "training seconds, of the plan": "< 1.15", "training bytes, of the plan": "< 1.15",
    },
}


class Report:
    """What was measured so far, on the screen and in a file."""

    def __init__(self, path: Path | None, about: dict, targets: dict[str, str]):
        self.path = path
        self.about = about
        self.targets = targets
        self.cells = {}
        self.ratios = {}
        self.start = time.perf_counter()

    def add(self, name: str, seconds: dict, ratios: dict, **more) -> None:
        """seconds: of each way; ratios: the rows of the table that follow."""
        self.cells[name] = seconds | more
        print(f"{name}: " + "  ".join(f"{way} {1e3 * x:.2f} ms" for way, x in seconds.items()))
        for row, ratio in ratios.items():
            target = self.targets.get(row)
            self.ratios[row] = {"ratio": round(ratio, 4), "target": target}
            print(f"    {row:36} {ratio:7.3f}   {target or ''}", flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            seconds = round(time.perf_counter() - self.start)
            measured = {"seconds": seconds, "ratios": self.ratios, "cells": self.cells}
            write_json(self.path, self.about | measured)


# --------------------------------------------------------------------- measuring

def now() -> float:
    """Seconds, once a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, *args) -> float:
    start = now()
    function(*args)
    return now() - start


def in_turns(repeats: int, **ways) -> dict[str, float]:
    """The median seconds of each way, measured in turns after a round that
    warms up.

    A way is a function and its arguments; the function returns its own seconds.
    """
    rounds = []
    for _ in range(repeats + 1):
        rounds.append({name: function(*args) for name, (function, *args) in ways.items()})
    return {name: statistics.median(r[name] for r in rounds[1:]) for name in ways}


def peaks(**ways) -> dict[str, int]:
    """The bytes that each way needs beside what is there before; of a GPU only."""
    found = {}
    if torch.cuda.is_available():
        for name, (function, *args) in ways.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function(*args)
            found[name] = torch.cuda.max_memory_allocated() - before
    return found


def promise(weights: int, full: int, compressed: int) -> float:
    """The speed-up of decoding if only bytes counted: a step reads the weights
    and the cache."""
    return (weights + full) / (weights + compressed)


def decode(model, cache, steps: int) -> float:
    """Seconds per step, one token of each row."""
    rows = len(cache.next_position)
    tokens = generate(model, cache, [[5]] * rows, steps + 1)
    next(tokens)
    seconds = timed(list, tokens) / steps
    model.captured = None  # its memory would count as the next one's
    return seconds


@torch.inference_mode()
def decode_transformers(theirs, cache, length: int, steps: int) -> float:
    """The same by transformers, which appends to its cache; that is undone in
    the end."""
    token = torch.full((1, 1), 5, device=theirs.device)
    start = now()
    for _ in range(steps):
        token = theirs(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
    seconds = (now() - start) / steps
    cache.crop(length)
    return seconds


def read_once(nbytes: int, device) -> float:
    """Seconds to multiply a bf16 matrix of so many bytes with a vector.

    Of more than 2 GB it is the time of a matrix of 2 GB, in proportion.
    """
    part = min(nbytes, 2 << 30)
    matrix = torch.ones(part // 2048, 1024, dtype=torch.bfloat16, device=device)
    vector = torch.ones(1, 1024, dtype=torch.bfloat16, device=device)
    F.linear(vector, matrix)
    seconds = statistics.median(timed(F.linear, vector, matrix) for _ in range(5))
    return seconds * nbytes / part


def bf16_rate(device) -> float:
    """Operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).bfloat16()
    return 2 * n ** 3 / in_turns(5, product=(timed, torch.mm, a, a))["product"]


# ------------------------------------------------------------------------ models

def open_weights(folder, device, dtype):
    """The same model from a folder, ours and that of transformers."""
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return load_llama(folder, device, dtype), theirs.to(device).eval()


def make_weights(cfg: Config, device):
    """Two models of this shape with random bf16 weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    with torch.device("meta"):
        model = Llama(cfg).bfloat16()
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for p in model.parameters():
        p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)

    settings = {theirs: getattr(cfg, ours) for ours, theirs in CONFIG_NAMES.items()}
    with torch.device(device):
        theirs = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.bfloat16)
    return model, theirs.eval()


# ------------------------------------------------------------ what is measured

def measure_prefill(report: Report, ours, theirs, documents: dict, repeats: int) -> None:
    label = {torch.float32: "fp32", torch.bfloat16: "bf16"}[ours.dtype]
    for n, tokens in documents.items():
        ways = {
            "ours": (timed, ours.prefill, tokens),
            "theirs": (timed, theirs.model, tokens),  # without the output head
        }
        s = in_turns(repeats, **ways)
        name = f"prefill {n} {label}"
        report.add(name, s, {name: s["theirs"] / s["ours"]}, peak_bytes=peaks(**ways))


def measure_decoding(
    report: Report, model, theirs, compress, tokens, rows: int, repeats: int, steps: int,
) -> None:
    """From the full and the compressed cache; of one row transformers, too."""
    n = tokens.shape[1]
    weights = sum(p.nbytes for p in model.parameters())
    full = model.prefill(tokens).rows([0] * rows)
    compressed = compress(tokens).rows([0] * rows)
    full_bytes = full.nbytes()
    compressed_bytes = compressed.nbytes()
    ways = {
        "full": (decode, model, full, steps),
        "compressed": (decode, model, compressed, steps),
    }
    if rows == 1:
        past = theirs.model(tokens, use_cache=True).past_key_values
        ways["theirs"] = (decode_transformers, theirs, past, n, steps)
    floors = {
        "floor": (read_once, weights + full_bytes, tokens.device),
        "compressed_floor": (read_once, weights + compressed_bytes, tokens.device),
    }
    s = in_turns(repeats, **ways, **floors)

    size = f"{n} x {rows}"
    promised = promise(weights, full_bytes, compressed_bytes)
    ratios = {
        f"decode {size}, ms": 1000 * s["full"],
        f"decode {size}, of the floor": s["floor"] / s["full"],
        f"compressed {size}": s["full"] / s["compressed"],
        f"compressed {size}, of the floor": s["compressed_floor"] / s["compressed"],
        f"compressed {size}, of the promise": s["full"] / s["compressed"] / promised,
    }
    if rows == 1:
        ratios = {f"decode {size}": s["theirs"] / s["full"]} | ratios
    report.add(
        f"decode {size}", s, ratios, promised=promised,
        weight_bytes=weights, full_bytes=full_bytes, compressed_bytes=compressed_bytes,
        floor_gb_per_s=(weights + full_bytes) / s["floor"] / 1e9, peak_bytes=peaks(**ways))


def measure_compressing(report: Report, model, compress, documents: dict, repeats: int) -> None:
    for n, tokens in documents.items():
        ways = {
            "prefill": (timed, model.prefill, tokens),
            "compress": (timed, compress, tokens),
        }
        s = in_turns(repeats, **ways)
        ratios = {f"compress {n}": s["compress"] / s["prefill"]}
        report.add(f"compress {n}", s, ratios, peak_bytes=peaks(**ways))


def training_config(shape: str) -> TrainConfig:
    """--preset 8b, which a tiny model has in small."""
    names = {field.name for field in fields(TrainConfig)}
    preset = PRESETS["8b"].items()
    c = TrainConfig(**{name: value for name, value in preset if name in names})
    if shape == "tiny":
        c = replace(c, context=64, answer=8, eta=1, hidden=32, rank=4)
    return c


def measure_training(
    report: Report, model, c: TrainConfig, contexts: int, repeats: int,
) -> None:
    """Steps of distillation, of `contexts` contexts and one in each pass."""
    device = model.device
    world = World(device)
    compressor = Compressor(model.cfg, compressor_config(c)).to(device)
    optimizer = torch.optim.AdamW(compressor.parameters(), lr=1e-5)
    model.activation_checkpointing = c.activation_checkpointing
    distiller = Distiller(model, compressor, c.lam, c.chunk)
    learn_scores = c.scorer_lr_phase2 > 0
    distiller = start_phase(distiller, "hard", learn_scores, world)

    # random tokens, as many as the preset's questions have
    mix = parse_mix(c.mix)
    asked = tokens_asked(mix, c, c.context)
    length = asked // sum(mix.values())
    vocabulary = model.cfg.vocab_size
    micro_batches = []
    for _ in range(contexts):
        context = torch.randint(vocabulary, (HEADER + c.context,)).tolist()
        queries = []
        for _ in range(sum(mix.values())):
            ids = torch.randint(vocabulary, (length,)).tolist()
            queries.append(Query("recite", ids[:length // 2], ids[length // 2:]))
        batch = collate([Case(context, HEADER, queries)], c.prompts)
        micro_batches.append(MicroBatch.of(batch, KEEP))

    def step():
        forward_backward(distiller, micro_batches, "hard", world)
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    s = in_turns(repeats, step=(timed, step))
    flops = step_flops(
        model.cfg, compressor, contexts, contexts * (HEADER + c.context), contexts * asked,
        contexts * asked, "hard", learn_scores)
    rate = bf16_rate(device)
    planned = flops / (UTILISATION * rate)
    ratios = {
        "training, of the bf16 rate": flops / s["step"] / rate,
        "training seconds, of the plan": s["step"] / planned,
    }
    more = {"flops": flops, "bf16_rate": rate, "planned_seconds": planned}
    if device.type == "cuda":
        more["bytes"] = torch.cuda.max_memory_allocated()
        plan = memory(c, model, compressor, asked, "bf16", 1, "ddp")
        more["planned_bytes"] = sum(plan.values())
        ratios["training bytes, of the plan"] = more["bytes"] / more["planned_bytes"]
    report.add(f"training, {contexts} contexts", s, ratios, **more)
    model.activation_checkpointing = False


def measure(report: Report, folder, shape: str | None, device, settings: dict) -> None:
    """folder: of weights, without a shape."""
    from transformers import utils
    utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    repeats = settings["repeats"]
    steps = settings["steps"]

    def documents(sizes) -> dict:
        return {n: torch.randint(model.cfg.vocab_size, (1, n), device=device) for n in sizes}

    if shape is None:
        model, theirs = open_weights(folder, device, torch.float32)
        with torch.no_grad():
            measure_prefill(report, model, theirs, documents(settings["prefill"]), repeats)
        model, theirs = open_weights(folder, device, torch.bfloat16)
    else:
        with torch.no_grad():
            model, theirs = make_weights(SHAPES[shape], device)

    # an untrained scorer costs what a trained one costs
    config = CompressorConfig(eta=min(6, model.cfg.n_layer - 2))
    compressor = Compressor(model.cfg, config).requires_grad_(False).to(device)

    def compress(tokens):
        return compressor.compress(model, compressor.read(model, tokens), keep=KEEP)

    with torch.no_grad():
        measure_prefill(report, model, theirs, documents(settings["prefill"]), repeats)
        for n, rows in settings["decode"]:
            tokens = documents([n])[n]
            measure_decoding(report, model, theirs, compress, tokens, rows, repeats, steps)
        del theirs
        measure_compressing(report, model, compress, documents(settings["compress"]), repeats)
    if settings["contexts"] > 0:
        measure_training(report, model, training_config(shape), settings["contexts"], repeats)


def main() -> None:
    p = Parser(description="Measure prefill, decoding, compression and training here.")
    p.add_argument("--weights", metavar="DIR", help="default: SmolLM2-135M-Instruct")
    p.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    p.add_argument("--device", default="cpu", help="cpu (the default), or cuda")
    p.add_argument("--quick", action="store_true", help="small sizes, few repeats; written "
                   "only where --out says")
    p.add_argument("--out", metavar="FILE", help="default: results/speed.json; with a GPU or "
                   "a shape in its name, such as results/speed-cuda-8b.json")
    args = p.parse_args()
    if args.shape and args.weights:
        p.error("--shape takes random weights; leave out --weights")
    try:
        import transformers
    except ImportError:
        raise BadInput("transformers is compared with; pip install transformers==5.2") from None

    keep_freed_memory()
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    settings = GPU if on_gpu else CPU
    if args.quick or args.shape == "tiny":
        settings = QUICK
    if args.shape:
        settings = settings | {"contexts": 4}
    targets = TARGETS.get(args.shape or "135m", {}) if on_gpu else CPU_TARGETS

    path = None
    if args.out:
        path = Path(args.out)
    elif not args.quick and args.shape != "tiny":
        words = ["speed"] + ["cuda"] * on_gpu + [args.shape] * bool(args.shape)
        path = ROOT / "results" / ("-".join(words) + ".json")
    about = provenance(seed=0) | {
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": settings,
        "keep": KEEP,
    }
    folder = None if args.shape else args.weights or fetch()
    measure(Report(path, about, targets), folder, args.shape, device, settings)
    if path is not None:
        print(path)


if __name__ == "__main__":
    run_program(main)
