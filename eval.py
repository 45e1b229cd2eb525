"""Measure what a short cache keeps: the paper's tasks, every baseline's choice through the same cache.

    python eval.py --tasks fidelity --n 20             # held-out text: which method answers as the full cache?
    python eval.py --tasks squad --data squad=dev-v1.1.json --pack 5 --keep 0.25,0.1 --out results/squad.json
    torchrun --nproc_per_node 2 -- eval.py ...         # two processes, or one per GPU, share the documents out

The protocol: a document is compressed before any question is known, the chat header kept; then all questions are asked
of the one cache. `full` is the ceiling, `none` (no document) the floor. Intervals are 95 % bootstrap intervals with the
document as unit. A baseline is a score for each entry, and the budget its authors share it by (`BASELINES`). The parts,
in order: budgets, scores, one method's cache, judging answers, the loop, the program. Tasks and metrics are in
data/tasks.py, means and intervals in run/records.py.

Shapes: N tokens of the one document at hand, K kept per head on average, L layers, H query heads, G key-value heads, d
head width. Scores are (1, l, g, N), l and g as in compress.py: TOVA's are (1, L, 1, N), for example.
"""
import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from compress import (Choice, Compressor, Context, attention_received, drop_from, kept_count, open_compressor, select)
from data import tasks as T
from data.samples import REPEAT, Case, Query, collate
from data.tasks import MAX_NEW_TOKENS, METRICS, SQUAD_END, tokens_with
from model import Cache, Llama, generate
from run.errors import BadInput, provenance, run_program
from run.eval_flags import KEEPS, agree, build, check, parse_args
from run.files import ROOT, base_of
from run.folders import alone_in
from run.models import model_name, open_model
from run.records import append_records, cells_of, continue_from, keeps_of, print_table, write_result
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

def choose(scores, candidates, k, heads: int, recent: int = 0) -> Choice:
    """The best entries where every `heads` adjacent heads share a budget of heads·k: 1, each has its own; G, those of a
    layer share; L·G, all share. scores (B, l, g, N); candidates (1 or B, N); k (1,) int64; recent: the last ones, kept
    in every head. `select`, with a row for each budget."""
    rows = scores.reshape(-1, 1, heads, scores.shape[3])
    per_row = candidates.repeat_interleave(len(rows) // len(candidates), 0)
    choice = select(rows, per_row, k.expand(len(rows)), recent, check=False)
    return replace(choice, kept=choice.kept.view(scores.shape))


def choose_in_layer(scores, candidates, k, recent: int) -> Choice:
    """AdaKV (arXiv 2407.11550): a fifth of the equal budget, and one entry at least, are each head's own; the rest goes
    to the best of all heads of the layer. As in kvpress, the recent window counts towards that fifth, and stays."""
    safe = choose(scores, candidates, (k * SAFE + 1e-6).long().clamp(min=1), 1, recent).kept
    return choose(scores.masked_fill(safe, 1e9), candidates, k, scores.shape[2], recent)


# -------------------------------------------------------------------------------------------------------- the scores

def attention_weights(q, k, own: int, block: int = 64) -> Iterator[torch.Tensor]:
    """Causal attention weights of queries q (1, H, T, d) over keys k (1, G, S, d), a block of queries at a time.

    own: the index among the keys of query 0's own; what lies before it, every query sees. Yields fp32 (G, H/G, t, s),
    s the keys that the block's last query sees: blocks, because all of them at 8k tokens would take 2.4 GB for each
    layer of nine heads, and because the keys behind a block need not be multiplied.
    """
    (_, H, T, d), (_, G, _, _) = q.shape, k.shape
    for i in range(0, T, block):
        rows = q[0].view(G, H // G, T, d)[:, :, i:i + block] * d ** -0.5                   # (G, H/G, t, d)
        t, first = rows.shape[2], own + i
        logits = (rows.reshape(G, -1, d) @ k[0, :, :first + t].transpose(1, 2)).float().view(G, H // G, t, first + t)
        later = torch.ones(t, t, dtype=torch.bool, device=k.device).triu(1)
        logits[..., first:].masked_fill_(later, -math.inf)
        yield logits.softmax(-1)


def watched(model: Llama, tokens, cache, score) -> torch.Tensor:
    """score(q, k) -> (G, N) of every layer while the model reads `tokens` on top of `cache`: (1, L, G, N)."""
    rows = []
    model(tokens, cache, watch=lambda layer, q, k: rows.append(score(q, k)))
    return torch.stack(rows)[None]


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
    def received(q, k):
        total = torch.zeros(k.shape[1:3], device=k.device)                                 # (G, N) fp32
        for w in attention_weights(q, k, 0):
            total[:, :w.shape[-1]] += w.sum(2).mean(1)
        return total
    return watched(model, ctx.tokens, None, received)


def snapkv(model: Llama, ctx: Context, full: Cache, window: int, kernel: int = KERNEL):
    """Attention from the last `window` tokens, averaged and smoothed over 5 neighbours; they stay themselves (SnapKV,
    arXiv 2404.14469). Those tokens are read once more, on top of the cache of what lies before them."""
    n = ctx.tokens.shape[1] - window
    before = Cache([[p.map(lambda x: x[:, :, :n]) for p in parts] for parts in full.layers],
                   full.next_position - window)
    scores = watched(model, ctx.tokens[:, n:], before, lambda q, k: attention_from(q, k, n, kernel))
    return F.pad(scores, (0, window), value=1.0)                                           # no mean weight is above


def attention_from(q, k, n: int, kernel: int):
    """Mean attention of all queries over the first n keys, smoothed: (G, n). Smoothing pads with zeros."""
    mean = next(attention_weights(q, k, n, block=q.shape[2]))[..., :n].mean(2)             # (G, H/G, n)
    return F.avg_pool1d(mean, kernel, stride=1, padding=kernel // 2).mean(1)


def tova(model: Llama, ctx: Context, full: Cache):
    """SnapKV with a window of one token, all heads of a layer alike, nothing smoothed (TOVA, arXiv 2401.06104)."""
    return snapkv(model, ctx, full, window=1, kernel=1).mean(2, keepdim=True)


def question_scores(model: Llama, full: Cache, prompt: list[int], n: int):
    """SnapKV whose window is the *question*: an upper reference, for the cache fits this one question only."""
    tokens = torch.tensor([prompt], device=model.device)
    return watched(model, tokens, full, lambda q, k: attention_from(q, k, n, KERNEL))


def kvzip_replays(tokenizer, ids: list[int], first: int, chunk: int = CHUNK) -> list[tuple[int, int, list[int]]]:
    """[(start, end, ids to read on top of the cache)]: an instruction to repeat, then ids[start:end] themselves."""
    out = []
    for a in range(first, len(ids), chunk):
        ask = tokenizer.encode(REPEAT)
        if a > first:
            ask = tokenizer.encode(REPEAT_FROM) + ids[max(a - TAIL, first):a]
        out.append((a, min(a + chunk, len(ids)), ask + tokenizer.turn + ids[a:a + chunk]))
    return out


def replay_overhead(tokenizer) -> int:
    return max(len(tokenizer.encode(REPEAT)), len(tokenizer.encode(REPEAT_FROM)) + TAIL) + len(tokenizer.turn)


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

    def scores(self, name: str, window: int):
        """(1, l, g, N) fp32; `question`: a row for each query. window: the recent tokens that SnapKV looks from."""
        key = (name, window if name == "snapkv" else None)
        if key not in self.memo:
            start, n, c = clock(self.model), self.ctx.tokens.shape[1], self.model.cfg
            rng = torch.Generator().manual_seed(random.Random(self.seed).getrandbits(62))
            self.memo[key] = {
                "random": lambda: torch.rand(1, c.n_layer, c.n_kv_head, n, generator=rng).to(self.model.device),
                "random:token": lambda: torch.rand(1, 1, 1, n, generator=rng).to(self.model.device),
                "streaming": lambda: streaming(self.ctx),
                "knorm": lambda: knorm(self.full),
                "h2o": lambda: h2o(self.model, self.ctx),
                "snapkv": lambda: snapkv(self.model, self.ctx, self.full, window),
                "tova": lambda: tova(self.model, self.ctx, self.full),
                "kvzip": lambda: kvzip(self.model, self.tok, self.ctx, self.full),
                "question": lambda: torch.cat([question_scores(self.model, self.full, q.prompt, n)
                                               for q in self.case.queries])}[name](), 0.0
            self.memo[key] = self.memo[key][0], clock(self.model) - start
        else:
            self.owed += self.memo[key][1]  # made for another cache, but this method needs them as well
        return self.memo[key][0]

    def choice(self, method: str, k) -> Choice:
        """What a baseline keeps, by its scores and its budget. k: (1,) int64."""
        (name, budget), candidates = BASELINES[method], self.ctx.candidates
        window = max(1, min(WINDOW, int(k) // 2))
        scores = self.scores(name, window)
        recent = {"h2o": int(k) // 2, "snapkv": window, "tova": 1}.get(name, 0)
        if budget == "ours":
            return self.comp.choose(scores, self.ctx, k)
        if budget == "layer":
            return choose_in_layer(scores, candidates, k, recent)
        return choose(scores, candidates, k, scores[0, ..., 0].numel() if budget == "all" else 1, recent)

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
            return drop_from(full, ctx, self.comp.choose(self.comp.scores(ctx), ctx, k))
        if method.startswith("kvdistill:"):  # another choice, under the trained routing and its way to share a budget
            c = model.cfg
            scores = self.scores(method.partition(":")[2], max(1, min(WINDOW, int(k) // 2)))
            scores = scores.expand(1, c.n_layer, c.n_kv_head, -1)
            scores = scores if self.comp.cfg.choice == "head" else scores.mean((1, 2), keepdim=True)
            return self.comp.compress(model, ctx, tokens=int(k), scores=scores)
        choice = self.choice(method, k)
        rows = len(choice.kept)
        return drop_from(full if rows == 1 else full.rows([0] * rows), ctx, choice)

    def timed_cache(self, method: str, keep: float) -> tuple[Cache, dict]:
        """And its seconds: `prefill` is what the method needs of reading the context plainly, `compress` the rest,
        scores included, even if another cache had needed the same ones before."""
        self.owed, start = 0.0, clock(self.model)
        cache = self.cache(method, keep)
        own = 0.0 if cache is self.full else clock(self.model) - start + self.owed
        read = {"truncate": 0.0, "none": 0.0, "kvdistill": self.seconds["read"], "untrained": self.seconds["read"]}
        prefill = self.seconds["prefill"] if cache is self.full else read.get(method, self.seconds["prefill"])
        return cache, {"prefill": prefill, "compress": own}


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
            options = [Query(q.kind, q.prompt, self.tok.encode(o.strip()) + self.tok.turn[:1]) for o in q.options]
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
        ids = [[] for _ in queries]
        prompts, new = [q.prompt for q in queries], MAX_NEW_TOKENS[self.task]
        ends = self.tok.stop_ids | (tokens_with(self.tok, SQUAD_END) if self.task == "squad" else frozenset())
        for step in generate(self.model, cache, prompts, new, ends):
            for row, t in zip(ids, step):
                if t is not None:
                    row.append(t)
        texts = [self.tok.decode(row).strip() for row in ids]
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
                            "K": round(float(cache.entries().double().mean()) - case.n_protect, 2),
                            "bytes": cache.nbytes() // len(cache.next_position), "seconds": seconds,
                            "answers": answers})
        yield sorted(records, key=lambda r: todo.index((r["method"], r["keep"])))


def held_out_table(model: Llama, tokenizer, comp: Compressor, sources: str, shards, context: int, contexts: int,
                   seed: int, keeps=KEEPS, world: World | None = None, squad_path=None) -> list[dict]:
    """What ends a training run: the cells of `fidelity` for a few methods on held-out text, printed. squad_path: a file
    in SQuAD's layout adds the kind `squad`; world: the processes that share the documents out; the numbers do not
    depend on how many they are."""
    cases = list(enumerate(T.fidelity(tokenizer, contexts, seed, context, sources, shards, squad_path)))
    mine = world.part(cases) if world else cases
    records, bar = [], tqdm(mine, desc="held-out table", unit="document", disable=bool(world and world.rank))
    for part in measure("fidelity", model, tokenizer, {"kvdistill": comp}, bar, QUICK_METHODS, keeps, seed):
        records += part
    if world:
        records = sorted(world.gather(records), key=lambda r: r["case"])
    cells = cells_of(records)
    print_table(cells)
    return cells


# ----------------------------------------------------------------------------------------------------- the program

def shown(folder: Path | None) -> str | None:
    return str(folder.relative_to(ROOT) if folder and folder.is_relative_to(ROOT) else folder)


def main() -> None:
    a = parse_args(METHODS, DEFAULT_METHODS)
    lists, about, start = check(a, METHODS), provenance(a.seed), time.perf_counter()
    world = World.start(a.device)
    if world.world_size > 1:
        agree(a, lists, world)
    with ExitStack() as held:
        if a.out is not None:  # two runs would ask everything twice, and each would overwrite the other's result
            out = Path(a.out)
            world.on_rank0(lambda: held.enter_context(alone_in(out.parent, f".{out.name}.lock", f"writing {out.name}")))
        evaluate(a, lists, about, world, start)
    if world.world_size > 1:
        dist.destroy_process_group()


def evaluate(a, lists: dict, about: dict, world: World, start: float) -> None:
    """What every process does: its share of the documents; the first one writes and shows the result."""
    model, tokenizer = open_model(a)
    comp, folder = open_compressor(a.adapter, model, tokenizer, a.seed)
    ours = [m for m in lists["methods"] if m.startswith("kvdistill") or m == "no-routing"]
    if folder is None and ours:
        raise BadInput(f"--methods {','.join(ours)} need a trained adapter and there is none for this model; train one "
                       "(train.py), give --adapter, or leave them out")
    state = b"".join(v.cpu().numpy().tobytes() for v in comp.state_dict().values())
    settings = {"weights": base_of(model, tokenizer)["weights"][:16], "dtype": str(model.dtype)[6:],
                "adapter": hashlib.sha256(state).hexdigest()[:16], "seed": a.seed, "tasks": {}}
    # with --truncate in any case: documents do not depend on the methods
    replay = replay_overhead(tokenizer) if a.truncate or any("kvzip" in m for m in lists["methods"]) else 0
    work = {}
    for task in lists["tasks"]:
        with world.one_first():  # texts are made tokens of once
            work[task], settings["tasks"][task] = build(task, a, lists, tokenizer, model, replay)
    if world.broadcast(settings) != settings:
        raise BadInput(f"process {world.rank} has other weights, adapter or documents than process 0; expected the "
                       "same")

    out = None if a.out is None else Path(a.out)
    answers = out and out.with_name(out.name.removesuffix(".json") + ".jsonl.gz")
    result = {"settings": settings, **about, "processes": world.world_size, "against": a.against,
              "model": model_name(a.weights), "adapter": shown(folder), "device": str(model.device),
              "versions": {"python": platform.python_version(), "torch": torch.__version__}, "cells": []}
    records = world.on_rank0(lambda: continue_from(out, answers, result)) if out else []
    before, saved = result.get("seconds", 0), start
    torch.manual_seed(a.seed + 1)
    comps = {"kvdistill": comp, "untrained": Compressor(model.cfg, comp.cfg).to(model.device)}
    for task, cases in work.items():
        done = {(r["case"], r["method"], r["keep"]) for r in records if r["task"] == task}
        wanted = {(i, m, k) for i in range(len(cases)) for m in lists["methods"] for k in keeps_of(m, lists["keep"])}
        if wanted & done:
            print(f"{task}: {len(wanted & done)} of {len(wanted)} caches were asked before and are skipped")
        task_start, fresh = time.perf_counter(), []
        if task == "cost":  # the first passes are slow, whatever they are
            warm = replace(cases[0], context=cases[0].context[:128], unit="warm")
            list(measure(task, model, tokenizer, comps, [(0, warm)], lists["methods"], lists["keep"], a.seed))
        left = world.part(sorted({i for i, _, _ in wanted - done}))
        bar = tqdm([(i, cases[i]) for i in left], desc=task, unit="document", mininterval=1, disable=world.rank > 0)
        metric = next(iter(METRICS[task]))
        for part in measure(task, model, tokenizer, comps, bar, lists["methods"], lists["keep"], a.seed, done):
            fresh += part
            if answers:
                append_records(answers, part)
            if world.rank:
                continue
            bar.set_postfix_str(running(records + fresh, task, metric, lists["methods"]))
            if out and time.perf_counter() - saved > 10:  # how long it took so far; answers are safe
                saved = time.perf_counter()
                write_result(out, result | {"seconds": round(before + saved - start, 1)})
        fresh = sorted(world.gather(fresh), key=lambda r: r["case"])
        records += fresh
        result["seconds"] = round(before + time.perf_counter() - start, 1)
        print(f"{task}: {sum(len(r['answers']) for r in fresh)} answers from {len(fresh)} caches in "
              f"{time.perf_counter() - task_start:.0f} s")
        if world.rank:
            continue
        contexts = {name: x.get("contexts") for name, x in settings["tasks"].items()}
        result["cells"] = cells_of(records, result["against"], contexts)
        if out:
            write_result(out, result)
    if world.rank:
        return
    if a.plot:
        from results.plots import draw
        for path in draw(result, out):
            print(f"figure: {path}")
    cells = [c for c in result["cells"] if c["task"] in lists["tasks"]]
    if a.json:
        print(json.dumps(cells))
        return
    print_table(cells)
    if out:
        print(f"\nresult: {out}")


def running(records: list[dict], task: str, metric: str, methods) -> str:
    """The score so far of a few methods, at the smallest kept fraction that each was asked at."""
    text = []
    for m in [m for m in ("full", "none", "random", "kvzip", "kvdistill") if m in methods]:
        mine = [r for r in records if r["task"] == task and r["method"] == m]
        low = min(r["keep"] for r in mine)
        values = [(x[metric], x["weight"]) for r in mine if r["keep"] == low for x in r["answers"]]
        text.append(f"{m} {sum(v * w for v, w in values) / sum(w for _, w in values):.2f}")
    return " ".join(text)


if __name__ == "__main__":
    run_program(main)
