"""Measure what a short cache keeps: fidelity to the full cache, teacher-forced, against training-free ways to choose.

    python eval.py --adapter adapters/quick --contexts 40

The same table ends `train.py`. Every method answers from a cache of the same size, about the same contexts, with the
chat header protected. Two rows take the trained compressor apart: `trained-random-selection` is its routing with tokens
chosen blindly, `trained-no-routing` its choice of tokens from the plain cache, with β = 0.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from compress import Compressor, Context, drop_from, kept_count, open_compressor, select
from data import BadInput, provenance, run_program, write_json
from data.prepare import SHARDS, Shard, prepare
from data.samples import KINDS, Batch, Samples, collate
from data.weights import add_model_flags, open_model, seed_flag
from model import Cache, Llama

KEEPS = (0.5, 0.25, 0.1, 0.05)
EVAL_MIX = {"continue": 1, "recite": 1, "cloze": 2, "title": 2}  # continuations per held-out context

METHODS = ("none", "random", "streaming", "knorm", "untrained", "trained", "trained-random-selection",
           "trained-no-routing")


def baseline_scores(method: str, ctx: Context, full: Cache, rng: torch.Generator):
    """Scores (B, N) fp32 of a training-free method; the same positions are kept in every layer and head.

    random: uniform. streaming: the 4 first and the most recent (StreamingLLM, arXiv 2309.17453).
    knorm: small keys first, their norm averaged over layers and heads (arXiv 2406.11430; per head in the original).
    """
    B, N = ctx.tokens.shape
    if method == "random":
        return torch.rand(B, N, generator=rng).to(ctx.h.device)
    if method == "streaming":
        place = ctx.candidates.long().cumsum(1)                   # 1, 2, … among the compressible tokens
        return torch.where(place <= 4, N + 5 - place, place).float()
    if method == "knorm":
        return -torch.stack([k.float().norm(dim=-1).mean(1) for k in full.k]).mean(0)
    raise ValueError(method)


@torch.no_grad()
def short_caches(method: str, model: Llama, compressors: dict[str, Compressor], ctx: Context, full: Cache, keeps, rng):
    """Yield (keep, cache) of one method for a batch of contexts."""
    if method == "none":  # no document: only what is protected, and the question right behind it
        header = int(ctx.protected.sum(1)[0])
        cache = model.prefill(ctx.tokens[:, :header])
        yield from ((keep, cache) for keep in keeps)
        return
    comp = compressors.get(method)
    if method == "trained-no-routing":
        scores = compressors["trained"].scores(ctx)
    elif not comp:
        name = "random" if method == "trained-random-selection" else method
        scores = baseline_scores(name, ctx, full, rng)
    for keep in keeps:
        if comp:
            yield keep, comp.compress(model, ctx, keep)
        elif method == "trained-random-selection":
            yield keep, compressors["trained"].compress(model, ctx, keep, scores=scores)
        else:
            yield keep, drop_from(full, ctx, select(scores, ctx.candidates, kept_count(ctx.candidates.sum(1), keep)))


@torch.no_grad()
def divergence(student, teacher, head, chunk: int = 128):
    """KL(p ‖ q) in nats and top-1 agreement (1 or 0) per row, from hidden states (R, D) and the head (V, D); fp32."""
    kl, agree = [], []
    for q, p in zip(student.split(chunk), teacher.split(chunk)):
        log_q, log_p = (F.linear(x, head).float().log_softmax(-1) for x in (q, p))  # (chunk, V)
        kl.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q))
        agree.append((log_q.argmax(-1) == log_p.argmax(-1)).float())
    return torch.cat(kl), torch.cat(agree)


def mean_and_interval(context, values, resamples: int = 1000) -> tuple[float, list[float]]:
    """Mean of `values`, one per token, and its 95 % bootstrap interval with the context as unit.

    Tokens of one context are not independent, so whole contexts are drawn with replacement. Args: numpy (n,) each.
    """
    _, unit = np.unique(context, return_inverse=True)
    sums, counts = np.bincount(unit, values), np.bincount(unit)
    drawn = np.random.default_rng(0).integers(0, len(counts), (resamples, len(counts)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(values.mean()), [float(low), float(high)]


@torch.no_grad()
def fidelity(model: Llama, compressors: dict[str, Compressor], batches: list[Batch], kinds, methods=METHODS,
             keeps=KEEPS, seed: int = 0, progress=iter) -> list[dict]:
    """KL(p_full ‖ q) in nats and top-1 agreement per answer token, for every method, keep and kind, and "all".

    compressors: {"trained": …, "untrained": …}. Returns rows {"method", "keep", "kind", "kl", "agree", "n", "ci95",
    "contexts"}: n answer tokens, ci95 the interval of kl. "all" is the mean over tokens of all kinds.
    """
    rng, found, n_before = torch.Generator().manual_seed(seed), {}, 0
    for b in progress(batches):
        comp = next(iter(compressors.values()))
        ctx = comp.read(model, b.tokens, b.lengths, b.protect)
        full = comp.full(model, ctx)
        teacher = model(b.cont, full, b.segments)[b.supervised]
        about = torch.stack([n_before + b.supervised.nonzero()[:, 0], b.kinds[b.supervised]]).cpu()  # context, kind
        n_before += len(b.tokens)
        for method in methods:
            for keep, cache in short_caches(method, model, compressors, ctx, full, keeps, rng):
                if method != "none" or keep == keeps[0]:  # no document is no document, at every keep
                    student = model(b.cont, cache, b.segments)[b.supervised]
                    kl, agree = divergence(student, teacher, model.head_weight)
                found.setdefault((method, keep), []).append(torch.cat([about, torch.stack([kl, agree]).cpu()]))
    rows = []
    for (method, keep), parts in found.items():
        context, kind_of, kl, agree = torch.cat(parts, 1).double().numpy()
        for i, kind in [*enumerate(kinds), (None, "all")]:
            at = np.ones(len(kl), bool) if i is None else kind_of == i
            if at.any():
                mean, interval = mean_and_interval(context[at], kl[at])
                rows.append({"method": method, "keep": keep, "kind": kind, "kl": mean, "agree": float(agree[at].mean()),
                             "n": int(at.sum()), "ci95": interval, "contexts": len(np.unique(context[at]))})
    return rows


def print_table(rows: list[dict], methods, kinds) -> None:
    """KL per kind, a block per kept fraction; the smallest KL of a column is marked with *."""
    at = {(r["method"], r["keep"], r["kind"]): r["kl"] for r in rows}
    kinds = [k for k in (*kinds, "all") if any(r["kind"] == k for r in rows)]
    for keep in sorted({r["keep"] for r in rows}, reverse=True):
        print(f"\nkeep {keep:<20}" + "".join(f"{k:>11}" for k in kinds) + "    KL(full || short), nats per token")
        best = {k: min(at[m, keep, k] for m in methods) for k in kinds}
        for m in methods:
            row = [f"{at[m, keep, k]:10.3f}" + ("*" if at[m, keep, k] == best[k] else " ") for k in kinds]
            print(f"{m:25}" + "".join(row))


def held_out_table(model: Llama, tokenizer, comp: Compressor, sources: str, folder, context: int, contexts: int,
                   seed: int, keeps=KEEPS) -> list[dict]:
    """Measure and print `fidelity` on `contexts` held-out contexts of `context` compressible tokens each."""
    shards = [Shard(f, "val", tokenizer) for f in prepare(sources.split(","), tokenizer, folder)]
    samples = Samples(shards, tokenizer, context, EVAL_MIX, n_answer=32, seed=seed + 1)
    drawn = [samples(i) for i in range(contexts)]
    batches = [collate(drawn[i:i + 2]).to(model.device) for i in range(0, contexts, 2)]
    torch.manual_seed(seed + 1)
    untrained = Compressor(model.cfg, comp.cfg).to(model.device)
    rows = fidelity(model, {"trained": comp, "untrained": untrained}, batches, KINDS, keeps=keeps, seed=seed,
                    progress=lambda it: tqdm(it, desc="held-out table", unit="batch"))
    print_table(rows, METHODS, KINDS)
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description="Fidelity of a compressor to the full cache, on held-out text.")
    p.add_argument("--adapter", metavar="DIR", help="trained compressor; default: the newest in adapters/ and out/")
    p.add_argument("--sources", default="wiki,sotu", help="wiki, sotu, or paths; default wiki,sotu")
    p.add_argument("--shards", default=SHARDS, metavar="DIR", help="folder for their tokens; default: data/shards")
    p.add_argument("--context", type=int, default=300, help="compressible tokens per context; default 300")
    p.add_argument("--contexts", type=int, default=20, help="held-out contexts; default 20")
    p.add_argument("--keep", default=",".join(map(str, KEEPS)), help="kept fractions; default 0.5,0.25,0.1,0.05")
    p.add_argument("--seed", type=seed_flag, default=0, help="of the contexts and of random choices")
    p.add_argument("--out", metavar="FILE", help="also write the result to this JSON file")
    add_model_flags(p)
    a = p.parse_args()
    try:
        keeps = [float(k) for k in a.keep.split(",")]
    except ValueError:
        raise BadInput(f"--keep is {a.keep!r}: expected fractions such as 0.5,0.1") from None
    for k in keeps:
        kept_count(torch.tensor([1]), keep=k)
    if a.contexts < 1 or a.context < 16:
        raise BadInput("--contexts must be at least 1, and --context at least 16 tokens")
    if a.out is not None and (not a.out or Path(a.out).is_dir()):
        raise BadInput(f"--out {a.out!r}: expected the name of a file")
    start, about = time.perf_counter(), provenance(a.seed)
    model, tokenizer = open_model(a)
    comp = open_compressor(a.adapter, model, tokenizer, a.seed)
    table = held_out_table(model, tokenizer, comp, a.sources, a.shards, a.context, a.contexts, a.seed, keeps)
    result = {"table": table, "dtype": str(model.dtype)[6:], "context": a.context,
              "seconds": round(time.perf_counter() - start, 1), **about}
    if a.out is not None:
        write_json(a.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
