"""Measure what a short cache keeps: fidelity to the full cache, teacher-forced, against training-free ways to choose.

`train.py` calls `fidelity` for the table that ends the quick experiment.
"""
import torch

from compress import Compressor, Context, drop_from, kept_count, select
from data.samples import Batch
from model import Cache, Llama
from train import DistillKL

METHODS = ("none", "random", "streaming", "knorm", "untrained", "trained", "trained-random-selection")


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
    scores = None if comp else baseline_scores("random" if method == "trained-random-selection" else method, ctx, full, rng)
    for keep in keeps:
        if comp:
            yield keep, comp.compress(model, ctx, keep)
        elif method == "trained-random-selection":
            yield keep, compressors["trained"].compress(model, ctx, keep, scores=scores)
        else:
            yield keep, drop_from(full, ctx, select(scores, ctx.candidates, kept_count(ctx.candidates.sum(1), keep)))


@torch.no_grad()
def fidelity(model: Llama, compressors: dict[str, Compressor], batches: list[Batch], kinds, methods=METHODS,
             keeps=(0.5, 0.25, 0.1, 0.05), seed: int = 0, progress=iter) -> list[dict]:
    """KL(p_full ‖ q) in nats and top-1 agreement per answer token, for every method, keep and kind, and "all".

    compressors: {"trained": …, "untrained": …}. Returns rows {"method", "keep", "kind", "kl", "agree", "n"}; n tokens.
    "all" is the mean over tokens of all kinds.
    """
    rng, sums = torch.Generator().manual_seed(seed), {}
    for b in progress(batches):
        comp = next(iter(compressors.values()))
        ctx = comp.read(model, b.tokens, b.lengths, b.protect)
        full = comp.full(model, ctx)
        teacher = model(b.cont, full, b.segments)[b.supervised]
        kind_of = b.kinds[b.supervised]
        for method in methods:
            for keep, cache in short_caches(method, model, compressors, ctx, full, keeps, rng):
                student = model(b.cont, cache, b.segments)[b.supervised]
                _, kl, agree = DistillKL.apply(student, teacher, model.head_weight, 1.0, 256)
                for i, kind in [*enumerate(kinds), (None, "all")]:
                    rows = slice(None) if i is None else kind_of == i
                    s = sums.setdefault((method, keep, kind), [0.0, 0.0, 0])
                    s[0] += float(kl[rows].double().sum())
                    s[1] += float(agree[rows].double().sum())
                    s[2] += len(kl[rows])
    return [{"method": m, "keep": keep, "kind": kind, "kl": a / n, "agree": g / n, "n": n}
            for (m, keep, kind), (a, g, n) in sums.items() if n]


def print_table(rows: list[dict], methods, kinds) -> None:
    """KL per kind, a block per kept fraction; the smallest KL of a column is marked with *."""
    at = {(r["method"], r["keep"], r["kind"]): r["kl"] for r in rows}
    kinds = [k for k in (*kinds, "all") if any(r["kind"] == k for r in rows)]
    for keep in sorted({r["keep"] for r in rows}, reverse=True):
        print(f"\nkeep {keep:<20}" + "".join(f"{k:>11}" for k in kinds) + "    KL(full || short), nats per answer token")
        best = {k: min(at[m, keep, k] for m in methods) for k in kinds}
        for m in methods:
            print(f"{m:25}" + "".join(f"{at[m, keep, k]:10.3f}{'*' if at[m, keep, k] == best[k] else ' '}" for k in kinds))
