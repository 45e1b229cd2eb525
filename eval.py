"""Measure what a short cache keeps: the paper's tasks, every baseline's choice through the same cache.

    python eval.py --tasks fidelity --n 20             # held-out text: which method answers as the full cache?
    python eval.py --tasks squad --data squad=SQUAD.json --pack 5 --keep 0.25,0.1 --out results/squad.json
    torchrun --nproc_per_node 2 -- eval.py ...         # two processes, or one per GPU, share the documents out

The protocol: a document is compressed before any question is known, the chat header kept; then all questions are asked
of the one cache. `full` is the ceiling, `none` (no document) the floor. A baseline is a score for each entry, and the
budget its authors share it by (`BASELINES`). The parts, in order: budgets, scores, one method's cache, judging answers,
the loop, the program. Tasks and metrics are in data/tasks.py, means and 95 % intervals (by document) in run/records.py.

Shapes: N tokens of the one document at hand, K kept per head on average, L layers, H query heads, G key-value heads, d
head width. Scores are (1, l, g, N), l and g as in compress.py: TOVA's are (1, L, 1, N), for example.
"""
import hashlib
import json
import os
import platform
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

import torch
import torch.nn.functional as F
from tqdm import tqdm

from compress import Compressor, Context, attention_received, drop_from, kept_count, open_compressor, select
from data import tasks as T
from data.samples import REPEAT, Case, Query, collate
from data.tasks import MAX_NEW_TOKENS, METRICS, SQUAD_END, tokens_with
from model import Cache, Llama, generate
from run.errors import BadInput, provenance, run_program
from run.eval_flags import KEEPS, agree, build, check, parse_args
from run.files import ROOT, base_of
from run.models import model_name, open_model
from run.records import Results, cells_of, keeps_of, print_table
from run.world import World

SINKS, WINDOW, KERNEL, CHUNK, TAIL = 4, 64, 5, 2048, 8  # tokens; the originals' defaults
SAFE = 0.2  # AdaKV's: the part of an equal budget that is every head's own
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with"

# method: whose scores, and who shares a budget: each head has its own ("head"), the heads of a layer share ("layer"),
# all share ("all"), or all share and keep `recent` tokens each, as under the compressor at hand ("ours")
BASELINES = {"random": ("random", "ours"), "random:token": ("random:token", "head"), "streaming": ("streaming", "head"),
             "knorm": ("knorm", "head"), "h2o": ("h2o", "head"), "snapkv": ("snapkv", "head"),
             "adasnapkv": ("snapkv", "layer"), "tova": ("tova", "head"), "kvzip": ("kvzip", "all"),
             "kvzip:equal": ("kvzip", "head"), "question": ("question", "head")}
SCORES = ("random", "streaming", "knorm", "h2o", "snapkv", "tova", "kvzip")
METHODS = ("full", "none", *BASELINES, "truncate", "untrained", "kvdistill", "no-routing",
           *(f"kvdistill:{name}" for name in SCORES))
QUICK_METHODS = ("none", "random", "kvzip", "no-routing", "kvdistill", "kvdistill:random")
DEFAULT_METHODS = "full,none,random,streaming,knorm,snapkv,adasnapkv,kvzip,kvdistill,kvdistill:random,no-routing"


# ------------------------------------------------------------------------------------------------------- the budgets

def choose(scores, candidates, k, heads: int, recent: int = 0):
    """Where every `heads` adjacent heads share a budget of heads·k: 1, each has its own; G, a layer's share; L·G,
    all share. scores (B, l, g, N); candidates (1, N); k (1,) int64; recent: the last ones, kept in every head ->
    kept, (B, l, g, N) bool. `select`, with a row for each budget."""
    rows = scores.reshape(-1, 1, heads, scores.shape[3])
    return select(rows, candidates.expand(len(rows), -1), k.expand(len(rows)), recent, check=False).kept.view_as(scores)


def choose_in_layer(scores, candidates, k, recent: int):
    """AdaKV (arXiv 2407.11550): a fifth of the equal budget, and one entry at least, are each head's own; the rest goes
    to the best of all heads of the layer. As in kvpress, the recent window counts towards that fifth, and stays."""
    safe = choose(scores, candidates, (k * SAFE + 1e-6).long().clamp(min=1), 1, recent)
    return choose(scores.masked_fill(safe, 1e9), candidates, k, scores.shape[2], recent)


# -------------------------------------------------------------------------------------------------------- the scores

def attention_sum(model: Llama, tokens, cache: Cache | None, n: int):
    """The attention that the first n keys get from all of `tokens` (1, T), read on top of `cache`, together:
    (L, G, H/G, n) fp32."""
    total = {}

    def watch(layer, weights, first):                                                      # (1, G, H/G, t, s)
        received = F.pad(weights[0, ..., :n].sum(2), (0, max(0, n - weights.shape[-1])))
        total[layer] = total[layer] + received if layer in total else received
    model(tokens, cache, watch=watch)
    return torch.stack(list(total.values()))


def snap_window(k: int) -> int:  # at most half of what is kept
    return max(1, min(WINDOW, k // 2))


def attention_from(model: Llama, tokens, cache: Cache, n: int, kernel: int):
    """Mean attention of all `tokens` over the n keys of `cache`, smoothed: (1, L, G, n). Smoothing pads with zeros."""
    mean = attention_sum(model, tokens, cache, n) / tokens.shape[1]
    return F.avg_pool1d(mean.flatten(0, 1), kernel, stride=1, padding=kernel // 2).view_as(mean).mean(2)[None]


def streaming(ctx: Context):
    """The first 4 tokens and the most recent ones (StreamingLLM, arXiv 2309.17453). A protected header of 4 or more
    holds the first ones already, and costs the method nothing."""
    place = torch.arange(ctx.tokens.shape[1], device=ctx.h.device)
    return torch.where(place < SINKS, len(place) + SINKS - place, place).float()[None, None, None]


def knorm(full: Cache):
    """Small keys first (arXiv 2406.11430)."""
    return -torch.stack([part.k.float().norm(dim=-1) for part, in full.layers], 1)


def h2o(model: Llama, ctx: Context):
    """Attention a token has received from all others, summed; mean over the query heads of a group (H2O, arXiv
    2306.14048). kvpress divides the sum by the number of queries that could see the token, and forces no recent tokens;
    they are half of H2O's budget. For simplicity the document is read a second time here; whoever sums while reading it
    first need not, so the cost table leaves that out."""
    return attention_sum(model, ctx.tokens, None, ctx.tokens.shape[1]).mean(2)[None]


def snapkv(model: Llama, ctx: Context, full: Cache, window: int, kernel: int = KERNEL):
    """Attention from the last `window` tokens, averaged and smoothed over 5 neighbours; they stay themselves (SnapKV,
    arXiv 2404.14469). Those tokens are read once more, on top of the cache of what lies before them. TOVA (arXiv
    2401.06104) is this with a window of one token, nothing smoothed, all heads of a layer alike."""
    n = ctx.tokens.shape[1] - window
    before = Cache([[p.map(lambda x: x[:, :, :n]) for p in parts] for parts in full.layers],
                   full.next_position - window)
    scores = attention_from(model, ctx.tokens[:, n:], before, n, kernel)
    return F.pad(scores, (0, window), value=1.0)                                           # no mean weight is above


def kvzip_replays(tokenizer, ids: list[int], first: int, chunk: int = CHUNK) -> list[tuple[int, int, list[int]]]:
    """[(start, end, ids to read on top of the cache)]: an instruction to repeat, then ids[start:end] themselves."""
    again = tokenizer.encode(REPEAT_FROM, joined=True)
    asks = {a: again + ids[max(a - TAIL, first):a] for a in range(first, len(ids), chunk)}
    asks[first] = tokenizer.encode(REPEAT, joined=True)
    return [(a, min(a + chunk, len(ids)), ask + tokenizer.turn + ids[a:a + chunk]) for a, ask in asks.items()]


def replay_overhead(tokenizer) -> int:
    first, again = (len(tokenizer.encode(x, joined=True)) for x in (REPEAT, REPEAT_FROM))
    return max(first, again + TAIL) + len(tokenizer.turn)


def kvzip(model: Llama, tokenizer, ctx: Context, full: Cache, chunk: int = CHUNK):
    """The most attention an entry gets while the context reconstructs itself (KVzip, arXiv 2505.23416).

    Maximum over the queries of the replay and over a group's heads; the softmax runs over the first 4 keys, the chunk's
    own, and the replay's. The first 4 tokens always stay (a protected header holds them), and no recent ones are
    forced. Close to the model's last position chunks are shorter: a replay needs positions, too.
    """
    ids, n = ctx.tokens[0].tolist(), ctx.tokens.shape[1]
    chunk = min(chunk, model.cfg.max_positions - n - replay_overhead(tokenizer))
    scores = torch.cat([attention_received(model, full, torch.tensor([replay], device=model.device), first=a, end=b,
                                           sinks=SINKS)
                        for a, b, replay in kvzip_replays(tokenizer, ids, int(ctx.protected.sum()), chunk)], -1)
    scores = F.pad(scores, (n - scores.shape[-1], 0))                                      # the header is protected
    scores[..., :SINKS] = 2.0                                                              # no weight is above 1
    return scores


# ------------------------------------------------------------------------------------------------ one method's cache

class Document:
    """A case read once: its context up to layer η, its whole cache, and every method's scores, made when asked for."""

    def __init__(self, model: Llama, tokenizer, comps: dict[str, Compressor], case: Case, seed: str):
        self.model, self.tok, self.comps, self.case, self.seed, self.memo = model, tokenizer, comps, case, seed, {}
        tokens = torch.tensor([case.context], device=model.device)
        protect = torch.arange(tokens.shape[1], device=model.device)[None] < case.n_protect
        self.comp, self.owed = comps["kvdistill"], 0.0
        t0 = clock(model)
        self.ctx = self.comp.read(model, tokens, protect=protect)
        t1 = clock(model)
        self.full = self.comp.full(model, self.ctx)
        self.seconds = {"read": t1 - t0, "prefill": clock(model) - t0}

    def scores(self, name: str, k: int):
        """(1, l, g, N) fp32; `question`: a row for each query. Only SnapKV's depend on k."""
        key = name, snap_window(k) if name == "snapkv" else None
        if key in self.memo:
            self.owed += self.memo[key][1]  # made for another cache, but this method needs them as well
            return self.memo[key][0]
        start, model, ctx, full = clock(self.model), self.model, self.ctx, self.full
        n, heads = ctx.tokens.shape[1], (model.cfg.n_layer, model.cfg.n_kv_head)
        rng = torch.Generator().manual_seed(random.Random(self.seed).getrandbits(62))
        scores = {"random": lambda: torch.rand(1, *heads, n, generator=rng).to(model.device),
                  "random:token": lambda: torch.rand(1, 1, 1, n, generator=rng).to(model.device),
                  "streaming": lambda: streaming(ctx), "knorm": lambda: knorm(full), "h2o": lambda: h2o(model, ctx),
                  "snapkv": lambda: snapkv(model, ctx, full, snap_window(k)),
                  "tova": lambda: snapkv(model, ctx, full, 1, 1).mean(2, keepdim=True),
                  "kvzip": lambda: kvzip(model, self.tok, ctx, full),
                  # SnapKV whose window is the question: an upper reference, for the cache fits this one question only
                  "question": lambda: torch.cat([
                      attention_from(model, torch.tensor([x.prompt], device=model.device), full, n, KERNEL)
                      for x in self.case.queries])}[name]()
        self.memo[key] = scores, clock(model) - start
        return scores

    def as_ours(self, scores):
        """Scores that the compressor's own way to choose can take: one per token, where its heads keep the same."""
        return scores if self.comp.cfg.choice == "head" else scores.mean((1, 2), keepdim=True)

    def kept(self, method: str, k):
        """What a baseline keeps, by its scores and its budget: (B, l, g, N) bool. k: (1,) int64."""
        (name, budget), candidates = BASELINES[method], self.ctx.candidates
        scores, window = self.scores(name, int(k)), snap_window(int(k))
        recent = {"h2o": int(k) // 2, "snapkv": window, "tova": 1}.get(name, 0)
        return {"ours": lambda: self.comp.choose(self.as_ours(scores), self.ctx, k).kept,
                "layer": lambda: choose_in_layer(scores, candidates, k, recent),
                "all": lambda: choose(scores, candidates, k, scores[0, ..., 0].numel(), recent),
                "head": lambda: choose(scores, candidates, k, 1, recent)}[budget]()

    def cache(self, method: str, keep: float) -> Cache:
        """The short cache of one method: one row, or, for `question`, a row per query. keep = 1 is the whole cache."""
        model, ctx, full, comps = self.model, self.ctx, self.full, self.comps
        k = kept_count(ctx.candidates.sum(1), keep or 1)                                   # (1,) int64
        if method == "none":
            return model.prefill(ctx.tokens[:, :self.case.n_protect])
        if method == "full" or int(k) == self.case.n:
            return full
        if method == "truncate":  # the last k tokens, read anew right behind the header
            return model.prefill(torch.cat([ctx.tokens[:, :self.case.n_protect], ctx.tokens[:, -int(k):]], 1))
        if method in ("kvdistill", "untrained"):
            return comps[method].compress(model, ctx, tokens=int(k))
        if method == "no-routing":  # the trained choice, from the plain cache
            return drop_from(full, ctx, self.comp.choose(self.comp.scores(ctx), ctx, k).kept)
        if method.startswith("kvdistill:"):  # another choice, under the trained routing and its way to share a budget
            heads = model.cfg.n_layer, model.cfg.n_kv_head
            scores = self.scores(method.partition(":")[2], int(k)).expand(1, *heads, -1)
            return self.comp.compress(model, ctx, tokens=int(k), scores=self.as_ours(scores))
        kept = self.kept(method, k)
        return drop_from(full.rows([0] * len(kept)) if len(kept) > 1 else full, ctx, kept)

    def timed_cache(self, method: str, keep: float) -> tuple[Cache, dict]:
        """And its seconds: `prefill` is what the method needs of reading the context plainly, `compress` the rest,
        scores included, even if another cache had needed the same ones before."""
        self.owed, start = 0.0, clock(self.model)
        cache = self.cache(method, keep)
        own = 0.0 if cache is self.full else clock(self.model) - start + self.owed
        plain, read = self.seconds["prefill"], self.seconds["read"]
        less = {"truncate": 0.0, "none": 0.0, "kvdistill": read, "untrained": read}
        return cache, {"prefill": plain if cache is self.full else less.get(method, plain), "compress": own}


# ------------------------------------------------------------------------------------------------- judging answers

def clock(model: Llama) -> float:
    """Seconds, once the device has done all that it was asked to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def divergence(log_q, log_p):
    """KL(p ‖ q) and Jensen-Shannon divergence in nats, and top-1 agreement (1 or 0), per row: (R, V) fp32 -> (3, R)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).clamp(min=1e-38).log()
    kl = torch.linalg.vecdot(p, log_p - log_q)
    js = (torch.linalg.vecdot(p, log_p - log_m) + torch.linalg.vecdot(q, log_q - log_m)) / 2
    return torch.stack([kl.clamp(min=0), js.clamp(min=0), (log_q.argmax(-1) == log_p.argmax(-1)).float()])


class Judge:
    """Asks a case's queries of a cache and scores the answers: judge(cache) -> one dict per query, with "kind",
    "weight", the task's metrics, and for generated answers the "prediction". A cache has one row, or one per query."""

    def __init__(self, task: str, model: Llama, tokenizer, case: Case, full: Cache):
        self.task, self.model, self.tok, self.case = task, model, tokenizer, case
        if task == "fidelity":
            self.teacher = self.log_probabilities(case.queries, full)

    def log_probabilities(self, queries: list[Query], cache: Cache):
        """log p of the vocabulary where the R tokens of all answers are predicted, fp32 (R, V). The queries are
        segments of one row for a cache of one row, else a row each."""
        one = len(cache.next_position) == 1
        b = collate([replace(self.case, queries=qs) for qs in ([queries] if one else [[q] for q in queries])])
        h = self.model(b.cont.to(self.model.device), cache, b.segments.to(self.model.device))
        return self.model.logits(h[b.answers.to(self.model.device)]).log_softmax(-1)

    def __call__(self, cache: Cache) -> list[dict]:
        return {"fidelity": self.fidelity, "choice": self.choice, "cost": self.cost
                }.get(self.task, self.generated)(cache)

    def fidelity(self, cache):
        per_token = divergence(self.log_probabilities(self.case.queries, cache), self.teacher).cpu()   # (3, R)
        parts = per_token.split([len(q.answer) for q in self.case.queries], 1)
        return [{"kind": q.kind, "weight": len(q.answer), **dict(zip(METRICS["fidelity"], part.mean(1).tolist()))}
                for q, part in zip(self.case.queries, parts)]

    def choice(self, cache):
        out = []
        for i, q in enumerate(self.case.queries):
            options = [Query(q.kind, q.prompt, self.tok.encode(o.strip()) + self.tok.end) for o in q.options]
            log_p = self.log_probabilities(options, cache if len(cache.next_position) == 1 else cache.rows([i]))
            wanted = torch.tensor([t for x in options for t in x.answer], device=log_p.device)
            per_token = log_p.gather(1, wanted[:, None])[:, 0].split([len(x.answer) for x in options])
            likely = [float(x.mean()) for x in per_token]  # a mean, as options differ in length
            best = q.options[likely.index(max(likely))]
            out.append({"kind": q.kind, "weight": 1, "accuracy": float(best in q.gold), "chance": 1 / len(q.options),
                        "prediction": best})
        return out

    def cost(self, cache):
        """Tokens per second at batch 1 and 8, decoding alone, and seconds for one question with its answer."""
        prompt, new, stop = self.case.queries[0].prompt, MAX_NEW_TOKENS["cost"], frozenset()
        rate, start = {}, clock(self.model)
        for batch in (1, 8):
            steps = generate(self.model, cache if batch == 1 else cache.rows([0] * 8), [prompt] * batch, new + 1, stop)
            next(steps)
            begin = clock(self.model)
            done = sum(1 for _ in steps)
            rate[batch] = batch * done / (clock(self.model) - begin)
            if batch == 1:
                question = clock(self.model) - start
        return [{"kind": self.case.queries[0].kind, "weight": 1, "tokens_per_s": rate[1], "tokens_per_s_8": rate[8],
                 "question_s": question}]

    def generated(self, cache):
        queries = self.case.queries
        cache = cache if len(cache.next_position) == len(queries) else cache.rows([0] * len(queries))
        ends = self.tok.stop_ids | (tokens_with(self.tok, SQUAD_END) if self.task == "squad" else frozenset())
        steps = list(generate(self.model, cache, [q.prompt for q in queries], MAX_NEW_TOKENS[self.task], ends))
        texts = [self.tok.decode([s[i] for s in steps if s[i] is not None]).strip() for i in range(len(queries))]
        metrics = METRICS[self.task].items()
        return [{"kind": q.kind, "weight": 1, "prediction": text, **{name: f(text, q.gold) for name, f in metrics}}
                for q, text in zip(queries, texts)]


# -------------------------------------------------------------------------------------------------------- the loop

@torch.no_grad()
def measure(task: str, model: Llama, tokenizer, comps: dict[str, Compressor], cases: list[tuple[int, Case]], methods,
            keeps, seed: int, done=frozenset()) -> Iterator[list[dict]]:
    """Ask every case's queries of every method's cache; yields the records of one case after the other.

    Args: comps: {"kvdistill": …, "untrained": …}; cases: (number, case), any subset: a case's records depend on its
    number alone, so processes may share them out; done: (number, method, keep) to leave out.
    A record: {"task", "case", "unit", "method", "keep", "N", "K": entries per head on average, "bytes": as stored,
    header included, "seconds", "answers": what `Judge` says}.
    """
    for i, case in cases:
        todo = [(m, keep) for m in methods for keep in keeps_of(m, keeps) if (i, m, keep) not in done]
        if not todo:
            continue
        document, order = Document(model, tokenizer, comps, case, f"{seed}/{task}/{i}"), list(todo)
        if task == "cost":  # a first reading also maps the memory that all others find; and no method is always first
            document = Document(model, tokenizer, comps, case, f"{seed}/{task}/{i}")
            random.Random(document.seed).shuffle(order)
        judge, records = Judge(task, model, tokenizer, case, document.full), []
        for method, keep in order:
            cache, seconds = document.timed_cache(method, keep)
            start = clock(model)
            answers = judge(cache)
            seconds["decode"] = clock(model) - start
            records.append({"task": task, "case": i, "unit": case.unit, "method": method, "keep": keep, "N": case.n,
                            "K": round(float(cache.entries().cpu().double().mean()) - case.n_protect, 2),
                            "bytes": cache.nbytes() // len(cache.next_position), "seconds": seconds,
                            "answers": answers})
        yield sorted(records, key=lambda r: todo.index((r["method"], r["keep"])))


def held_out_table(model: Llama, tokenizer, comp: Compressor, sources: str, shards, context: int, contexts: int,
                   seed: int, keeps=KEEPS, world: World | None = None, squad_path=T.SQUAD) -> list[dict]:
    """What ends a training run: the cells of `fidelity` for a few methods on held-out text, printed. squad_path: a file
    in SQuAD's layout, if it is there, adds the kind `squad`; world: the processes that share the documents out; the
    numbers do not depend on how many they are."""
    squad = squad_path if squad_path and Path(squad_path).is_file() else None
    if not squad:
        print(f"the table is without SQuAD's answers; a file in SQuAD's layout as {T.SQUAD} adds them")
    cases = list(enumerate(T.fidelity(tokenizer, contexts, seed, context, sources, shards, squad)))
    mine = world.part(cases) if world else cases
    records, bar = [], tqdm(mine, desc="held-out table", unit="document", disable=bool(world and world.rank))
    room = model.cfg.max_positions - context - len(tokenizer.header) - replay_overhead(tokenizer)  # for KVzip's replay
    methods = [m for m in QUICK_METHODS if m != "kvzip" or room > 0]
    for part in measure("fidelity", model, tokenizer, {"kvdistill": comp}, bar, methods, keeps, seed):
        records += part
    if world:
        records = sorted(world.gather(records), key=lambda r: r["case"])
    cells = cells_of(records)
    print_table(cells)
    return cells


# ----------------------------------------------------------------------------------------------------- the program

def main() -> None:
    a = parse_args(METHODS, DEFAULT_METHODS)
    lists, about = check(a, METHODS), provenance(a.seed)
    world = World.start(a.device)
    agree(a, lists, world)
    with Results(a.out, world) as results:
        evaluate(a, lists, about, world, results)
    world.end()


def evaluate(a, lists: dict, about: dict, world: World, results: Results) -> None:
    """What every process does: its share of the documents; the first one shows the result."""
    model, tokenizer = open_model(a)
    comp, folder = open_compressor(a.adapter, model, tokenizer, a.seed)
    ours = [m for m in lists["methods"] if m.startswith("kvdistill") or m == "no-routing"]
    if folder is None and ours:
        raise BadInput(f"--methods {','.join(ours)} need a trained adapter and there is none for this model; train one "
                       "(train.py), give --adapter, or leave them out")
    state = hashlib.sha256(b"".join([repr(comp.cfg).encode(), *(v.cpu().numpy() for v in comp.state_dict().values())]))
    settings = {"weights": base_of(model, tokenizer)["weights"][:16], "dtype": str(model.dtype)[6:],
                "adapter": state.hexdigest()[:16], "seed": a.seed, "tasks": {}}
    # with --truncate in any case: documents do not depend on the methods
    replay = replay_overhead(tokenizer) if a.truncate or any("kvzip" in m for m in lists["methods"]) else 0
    work = {}
    for task in lists["tasks"]:
        with world.one_first():  # texts are made tokens of once
            work[task], settings["tasks"][task] = build(task, a, lists, tokenizer, model, replay)
    if world.broadcast(settings) != settings:
        raise BadInput(f"process {world.rank} has other weights, adapter or documents than process 0; expected equal")
    results.begin({"settings": settings, **about, "processes": world.world_size, "against": a.against,
                   "model": model_name(a.weights), "adapter": folder and os.path.relpath(folder, ROOT),
                   "device": str(model.device), "cells": [],
                   "versions": {"python": platform.python_version(), "torch": torch.__version__}})

    torch.manual_seed(a.seed + 1)
    comps = {"kvdistill": comp, "untrained": Compressor(model.cfg, comp.cfg).to(model.device)}
    for task, cases in work.items():
        wanted = {(i, m, k) for i in range(len(cases)) for m in lists["methods"] for k in keeps_of(m, lists["keep"])}
        done = results.done(task, wanted)
        if task == "cost":  # the first passes are slow, whatever they are
            warm = replace(cases[0], context=cases[0].context[:128], unit="warm")
            list(measure(task, model, tokenizer, comps, [(0, warm)], lists["methods"], lists["keep"], a.seed))
        left = world.part(sorted({i for i, _, _ in wanted - done}))
        bar = tqdm([(i, cases[i]) for i in left], desc=task, unit="document", mininterval=1, disable=world.rank > 0)
        for records in measure(task, model, tokenizer, comps, bar, lists["methods"], lists["keep"], a.seed, done):
            results.add(records)
        results.finish(task)
    if world.rank:
        return
    if a.plot:
        from results.plots import draw
        for path in draw(results.result, results.out):
            print(f"figure: {path}")
    cells = [c for c in results.result["cells"] if c["task"] in lists["tasks"]]
    if a.json:
        return print(json.dumps(cells))
    print_table(cells)
    print(f"\nresult: {a.out}" if a.out else "")


if __name__ == "__main__":
    run_program(main)
