"""How fast reading, decoding and compressing are here: against transformers, against the memory, against what the bytes
of a short cache promise. Everything in one run; what is compared is measured in turns (A B A B), since a
machine's speed drifts; medians and their ratios go to results/speed.json:

    python results/speed.py            # SmolLM2-135M-Instruct, some 6 minutes of two quiet cores
    python results/speed.py --quick    # a minute, small sizes, for whoever changes model.py; nothing is written
    python results/speed.py --device cuda    # to results/speed-cuda.json
"""
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compress import Compressor, CompressorConfig  # noqa: E402
from data.fetch import fetch  # noqa: E402
from model import load_llama  # noqa: E402
from run.errors import BadInput, Parser, provenance, run_program, write_json  # noqa: E402
from run.models import keep_freed_memory, pick_device  # noqa: E402

TARGETS = {"prefill 512 bf16": 1.2, "prefill 2048 bf16": 1.1, "decode 512": 1.5, "decode 2048": 2.0,
           "decode 512, of the floor": 0.75, "decode 2048, of the floor": 0.75, "ragged, of the promise": 0.8,
           "compress 512": 1.1, "compress 2048": 1.1, "compress 8000": 1.1}  # compress: at most; all else: at least


def now() -> float:
    """Seconds, once a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(f) -> float:
    start = now()
    f()
    return now() - start


def in_turns(repeats: int, **ways) -> dict[str, float]:
    """Median seconds of each way, measured A B A B after one round that warms up. A way returns its own seconds."""
    rounds = [{name: way() for name, way in ways.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(r[name] for r in rounds) for name in ways}


def promise(weights: int, whole: int, short: int) -> float:
    """The speed-up of decoding from a short cache if reading bytes were all: every step reads weights and cache."""
    return (weights + whole) / (weights + short)


def greedy(logits_of, rows: int, steps: int, device) -> float:
    """Seconds per step; logits_of: (B, 1) tokens -> (B, 1, V)."""
    token, start = torch.full((rows, 1), 5, device=device), now()
    for _ in range(steps):
        token = logits_of(token).argmax(-1)
    return (now() - start) / steps


@torch.inference_mode()  # as `generate` does; transformers' generates under no_grad
def decode(model, cache, steps: int) -> float:
    buffer = cache.with_room(steps)
    return greedy(lambda token: model.logits(model(token, buffer)), len(cache.next_position), steps, model.device)


def decode_theirs(theirs, cache, length: int, steps: int) -> float:
    """By transformers, which appends to `cache`; its first `length` entries are left in the end."""
    step = lambda token: theirs(token, past_key_values=cache, use_cache=True).logits  # noqa: E731
    seconds = greedy(step, 1, steps, theirs.device)
    cache.crop(length)
    return seconds


def read_once(nbytes: int, device) -> float:
    """Seconds to multiply a bf16 matrix of that many bytes with a vector: what memory and processor allow at most."""
    matrix, vector = (torch.ones(n, 1024, dtype=torch.bfloat16, device=device) for n in (nbytes // 2048, 1))
    F.linear(vector, matrix)
    return statistics.median(timed(partial(F.linear, vector, matrix)) for _ in range(5))


@torch.no_grad()
def measure(folder, device, sizes, long, repeats, steps) -> tuple[dict, dict]:
    """All cells, {name: {way: seconds, …}}, and ratios, {name: number}. long: tokens of the long document."""
    from transformers import AutoModelForCausalLM, utils
    utils.logging.disable_progress_bar()
    cells, ratios = {}, {}
    document = lambda n: torch.randint(model.cfg.vocab_size, (1, n), device=device)  # noqa: E731

    def note(name, ratio, seconds, **more):
        cells[name], ratios[name] = seconds | more, ratio
        print(f"{name:28} {ratio:6.2f}   " + "  ".join(f"{way} {1000 * x:.1f} ms" for way, x in seconds.items()),
              flush=True)

    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):  # the last model stays, for what follows
        model = load_llama(folder, device, dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        for n in sizes:
            ids = document(n)
            s = in_turns(repeats, ours=lambda: timed(lambda: model.prefill(ids)),
                         theirs=lambda: timed(lambda: theirs.model(ids, use_cache=True)))  # no output head
            note(f"prefill {n} {short}", s["theirs"] / s["ours"], s)
    weights = sum(p.nbytes for p in model.parameters())

    for n in sizes:
        ids = document(n)
        cache, past = model.prefill(ids), theirs.model(ids, use_cache=True).past_key_values
        nbytes = weights + cache.nbytes()
        s = in_turns(repeats, ours=lambda: decode(model, cache, steps), floor=lambda: read_once(nbytes, device),
                     theirs=lambda: decode_theirs(theirs, past, n, steps))
        note(f"decode {n}", s["theirs"] / s["ours"], s, bytes=nbytes, floor_gb_per_s=nbytes / s["floor"] / 1e9)
        ratios[f"decode {n}, of the floor"] = s["floor"] / s["ours"]
    del theirs, past

    torch.manual_seed(0)  # an untrained scorer costs what a trained one costs
    comp = Compressor(model.cfg, CompressorConfig(eta=min(6, model.cfg.n_layer - 2))).requires_grad_(False).to(device)
    for n in (*sizes, long):
        ids = document(n)
        s = in_turns(repeats, prefill=lambda: timed(lambda: model.prefill(ids)),
                     compress=lambda: timed(lambda: comp.compress(model, comp.read(model, ids), keep=0.1)))
        note(f"compress {n}", s["compress"] / s["prefill"], s)

    whole, short = (c.rows([0] * 8) for c in (model.prefill(ids), comp.compress(model, comp.read(model, ids), 0.1)))
    s = in_turns(repeats, whole=lambda: decode(model, whole, steps), ragged=lambda: decode(model, short, steps))
    promised = promise(weights, whole.nbytes(), short.nbytes())
    note("ragged, of the promise", s["whole"] / s["ragged"] / promised, s, speed_up=s["whole"] / s["ragged"],
         promised=promised, whole_bytes=whole.nbytes(), ragged_bytes=short.nbytes(), entries_per_head=[
             int(short.entries().min()), int(short.entries().max())])
    return cells, ratios


def main() -> None:
    p = Parser(description="Measure prefill, decoding and compression on this machine.")
    p.add_argument("--weights", metavar="DIR", help="a Llama in the Hugging Face layout; default: the project's own")
    p.add_argument("--device", default="cpu", help="cpu (the default), or cuda")
    p.add_argument("--quick", action="store_true", help="small sizes, few repeats; written only where --out says")
    p.add_argument("--out", metavar="FILE", help="default: results/speed.json, on a GPU speed-cuda.json")
    a = p.parse_args()
    try:
        import transformers
    except ImportError:
        raise BadInput("transformers is what is compared with; pip install transformers==5.2") from None
    keep_freed_memory()
    device = pick_device(a.device)
    settings = dict(sizes=(64, 128), long=256, repeats=3, steps=8) if a.quick else dict(
        sizes=(512, 2048), long=8000, repeats=5, steps=32)
    out = provenance(seed=0) | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                                "settings": settings, "batch of ragged": 8, "keep": 0.1}
    start = time.perf_counter()
    cells, ratios = measure(a.weights or fetch(), device, **settings)
    rows = {name: {"ratio": round(x, 4), "target": TARGETS.get(name)} for name, x in ratios.items()}
    print("\n" + "\n".join(f"{name:28} {r['ratio']:6.2f}   target {r['target'] or '-'}" for name, r in rows.items()))
    if a.out or not a.quick:
        path = Path(a.out or ROOT / "results" / ("speed.json" if device.type == "cpu" else f"speed-{device.type}.json"))
        write_json(path, out | {"seconds": round(time.perf_counter() - start), "ratios": rows, "cells": cells})
        print(path)


if __name__ == "__main__":
    run_program(main)
