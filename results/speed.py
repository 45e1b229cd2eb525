"""Measure how fast reading, decoding and compressing are on this machine.

    python results/speed.py                  # some 6 minutes of two quiet cores; results/speed.json
    python results/speed.py --device cuda    # results/speed-cuda.json
    python results/speed.py --quick          # a minute, small sizes; nothing is written

Reading and decoding are compared with transformers. Decoding is compared with
the time that it takes to read the weights and the cache once ("floor"), and
decoding from a compressed cache with what its fewer bytes promise. A machine's
speed drifts, so what is compared is measured in turns (A B A B). All numbers
are medians of seconds, and their ratios.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compress import Compressor, CompressorConfig  # noqa: E402
from data.fetch import fetch  # noqa: E402
from model import generate, load_llama  # noqa: E402
from run.errors import BadInput, Parser, provenance, run_program, write_json  # noqa: E402
from run.loading import keep_freed_memory, pick_device  # noqa: E402

TARGETS = {  # of "compress": at most; of all others: at least
    "prefill 512 bf16": 1.2, "prefill 2048 bf16": 1.1, "decode 512": 1.5, "decode 2048": 2.0,
    "decode 512, of the floor": 0.75, "decode 2048, of the floor": 0.75,
    "compressed, of the promise": 0.8,
    "compress 512": 1.1, "compress 2048": 1.1, "compress 8000": 1.1,
}
KEEP = 0.1
BATCH = 8  # rows that decode from a compressed cache


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


def promise(weights: int, full: int, compressed: int) -> float:
    """The speed-up of decoding if only bytes counted: a step reads the weights
    and the cache."""
    return (weights + full) / (weights + compressed)


def decode(model, cache, steps: int) -> float:
    """Seconds per step, one token of each row."""
    rows = len(cache.next_position)
    tokens = generate(model, cache, [[5]] * rows, steps + 1)
    next(tokens)
    return timed(list, tokens) / steps


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
    """Seconds to multiply a bf16 matrix of so many bytes with a vector."""
    matrix = torch.ones(nbytes // 2048, 1024, dtype=torch.bfloat16, device=device)
    vector = torch.ones(1, 1024, dtype=torch.bfloat16, device=device)
    F.linear(vector, matrix)
    return statistics.median(timed(F.linear, vector, matrix) for _ in range(5))


@torch.no_grad()
def measure(folder, device, sizes, long: int, repeats: int, steps: int) -> tuple[dict, dict]:
    """Returns the seconds, {name: {way: seconds, …}}, and the ratios, {name:
    number}.

    sizes: tokens of the documents; long: of one more, for compressing.
    """
    from transformers import AutoModelForCausalLM, utils
    utils.logging.disable_progress_bar()
    cells, ratios = {}, {}

    def note(name: str, ratio: float, seconds: dict, **more) -> None:
        cells[name] = seconds | more
        ratios[name] = ratio
        each = "  ".join(f"{way} {1000 * x:.1f} ms" for way, x in seconds.items())
        print(f"{name:28} {ratio:6.2f}   {each}", flush=True)

    # prefill: the last model, of bf16, stays for what follows
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = load_llama(folder, device, dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        vocabulary = model.cfg.vocab_size
        documents = {n: torch.randint(vocabulary, (1, n), device=device) for n in (*sizes, long)}
        for n in sizes:
            s = in_turns(repeats, ours=(timed, model.prefill, documents[n]),
                         theirs=(timed, theirs.model, documents[n]))  # without the output head
            note(f"prefill {n} {label}", s["theirs"] / s["ours"], s)

    # decoding one row from a full cache
    weights = sum(p.nbytes for p in model.parameters())
    for n in sizes:
        cache = model.prefill(documents[n])
        past = theirs.model(documents[n], use_cache=True).past_key_values
        nbytes = weights + cache.nbytes()
        s = in_turns(repeats, ours=(decode, model, cache, steps), floor=(read_once, nbytes, device),
                     theirs=(decode_transformers, theirs, past, n, steps))
        note(f"decode {n}", s["theirs"] / s["ours"], s, bytes=nbytes,
             floor_gb_per_s=nbytes / s["floor"] / 1e9)
        ratios[f"decode {n}, of the floor"] = s["floor"] / s["ours"]

    # compressing: an untrained scorer costs what a trained one costs
    torch.manual_seed(0)
    config = CompressorConfig(eta=min(6, model.cfg.n_layer - 2))
    compressor = Compressor(model.cfg, config).requires_grad_(False).to(device)

    def compress(ids):
        return compressor.compress(model, compressor.read(model, ids), keep=KEEP)

    for n, ids in documents.items():
        s = in_turns(repeats, prefill=(timed, model.prefill, ids), compress=(timed, compress, ids))
        note(f"compress {n}", s["compress"] / s["prefill"], s)

    # decoding a batch from the full and the compressed cache of the long document
    full = model.prefill(documents[long]).rows([0] * BATCH)
    compressed = compress(documents[long]).rows([0] * BATCH)
    s = in_turns(repeats, full=(decode, model, full, steps),
                 compressed=(decode, model, compressed, steps))
    speed_up = s["full"] / s["compressed"]
    promised = promise(weights, full.nbytes(), compressed.nbytes())
    note("compressed, of the promise", speed_up / promised, s, speed_up=speed_up,
         promised=promised, full_bytes=full.nbytes(), compressed_bytes=compressed.nbytes())
    return cells, ratios


def main() -> None:
    p = Parser(description="Measure prefill, decoding and compression on this machine.")
    p.add_argument("--weights", metavar="DIR", help="default: SmolLM2-135M-Instruct")
    p.add_argument("--device", default="cpu", help="cpu (the default), or cuda")
    p.add_argument("--quick", action="store_true", help="small sizes, few repeats; written "
                   "only where --out says")
    p.add_argument("--out", metavar="FILE", help="default: results/speed.json, on a GPU "
                   "results/speed-cuda.json")
    args = p.parse_args()
    try:
        import transformers
    except ImportError:
        raise BadInput("transformers is compared with; pip install transformers==5.2") from None

    keep_freed_memory()
    device = pick_device(args.device)
    settings = {"sizes": (512, 2048), "long": 8000, "repeats": 5, "steps": 32}
    name = "speed.json"
    if args.quick:
        settings = {"sizes": (64, 128), "long": 256, "repeats": 3, "steps": 8}
    where = str(device)
    if device.type == "cuda":
        name = "speed-cuda.json"
        where = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = provenance(seed=0) | {"device": where, "versions": versions, "settings": settings,
                                  "batch": BATCH, "keep": KEEP}

    start = time.perf_counter()
    cells, ratios = measure(args.weights or fetch(), device, **settings)
    seconds = round(time.perf_counter() - start)
    rows = {}
    print()
    for row, ratio in ratios.items():
        target = TARGETS.get(row)
        rows[row] = {"ratio": round(ratio, 4), "target": target}
        print(f"{row:28} {ratio:6.2f}   target {target or '-'}")
    if args.out or not args.quick:
        path = Path(args.out or ROOT / "results" / name)
        write_json(path, about | {"seconds": seconds, "ratios": rows, "cells": cells})
        print(path)


if __name__ == "__main__":
    run_program(main)
