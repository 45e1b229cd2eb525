"""Measure what a compressed cache keeps: baselines, tasks, and judged answers.

    python eval.py --n 20
    python eval.py --tasks squad --data squad=SQUAD.json --pack 5 --out out/squad.json
    python eval.py --ask notes.txt --question "Who came?" --methods kvzip,h2o --keep 0.1
    torchrun --nproc_per_node 2 -- eval.py ...     # the processes share the documents out

The first command measures fidelity: does the model predict the same tokens from
the compressed cache as from the full cache? The second generates answers to
SQuAD's questions. The third prints what the model answers from the caches of
several methods about one text.

A document is compressed before any question is known. Its chat header is kept
by every method. Then all questions are asked of the one compressed cache. The
full cache (method `full`) is the ceiling, no document at all (`none`) is the
floor. Tasks and metrics are in data/tasks.py, means and 95 % intervals in
run/records.py.

Shapes: N tokens of a context, the chat header included (in records and tables N is
without it), K of them kept per head on average, T tokens read after it, R of them
predicted in answers, L layers, H query heads, G key-value heads, D model width, V
vocabulary; t queries of a block, and s keys that they see. Importance scores are
(1, l, g, N) fp32: l = L and g = G, or l = g = 1 where all heads share one score
per token.
"""
import argparse
import hashlib
import json
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

from run.errors import ROOT, BadInput, provenance, run_program
from run.eval_flags import BASELINES, DEFAULT_KEEPS, DEFAULT_METHODS, parse_args

if __name__ == "__main__":
    run_program(parse_args, is_last=False)  # a typo is answered before torch is imported

import torch
import torch.nn.functional as F
from tqdm import tqdm

from compress import (Compressor, Context, ask_all, check_length, kept_count, last_tokens,
                      max_attention, open_compressor, pick_wording, prune_cache, read_text, select)
from data import tasks
from data.batches import collate
from data.fetch import fetch
from data.samples import REPEAT, Case, Query, make_case
from data.tasks import MAX_NEW_TOKENS, METRICS, SQUAD_END, tokens_with
from model import Cache, HeadGroup, Llama, generate
from run.checkpoint import base_of
from run.dist import World
from run.loading import model_name, open_model, open_tokenizer
from run.records import Results, cells_of, keeps_of, print_table

# The constants of the baselines, as their authors chose them.
SINKS = 4          # the first tokens, which StreamingLLM and KVzip always keep
WINDOW = 64        # SnapKV averages the attention of this many last tokens
KERNEL = 5         # and smooths it over this many neighbours
SAFEGUARD = 5      # AdaKV: a fifth of an equal budget is each head's own
CHUNK = 2048       # KVzip replays this many tokens at once
TAIL = 8           # and quotes this many tokens before a later chunk

# How much room to leave for a replay of KVzip.
INSTRUCTION = 128  # its instruction has fewer tokens, even at one token per character
LEAST_CHUNK = 256  # the least that is replayed at once; `fit` leaves room for it
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with"


def prepare_process(args: argparse.Namespace, world: World) -> None:
    """Refuse what several processes cannot share, give each process its device,
    and download the weights once."""
    if world.world_size == 1:
        return
    if "cost" in args.tasks:
        raise BadInput("--tasks cost measures time, and other processes would disturb it; run it "
                       "without torchrun")
    if world.world_size > world.local_world_size:
        hosts = world.world_size // world.local_world_size
        raise BadInput(f"{world.world_size} processes on {hosts} hosts: expected one host, where "
                       "all can append to one file of answers")
    args.device = str(world.device)
    if args.weights is None:
        with world.local_rank0_first():
            fetch()


# -------------------------------------------------------------------------------------- the budgets

def share_budget(scores, compressible, k, heads: int, recent: int = 0):
    """Keep the best-scored entries, where every `heads` adjacent heads share a
    budget of heads·k.

    scores (1, l, g, N) fp32; compressible (1, N) bool; k (1,) int64. heads: 1
    gives each head its own budget, G one to each layer, L·G a single one to all
    heads. recent: this many last tokens are kept in every head. Returns the kept
    entries, (1, l, g, N) bool.
    """
    rows = scores.reshape(-1, 1, heads, scores.shape[3])  # one row per budget
    row_of_all = compressible.expand(len(rows), -1)
    forced = last_tokens(row_of_all, min(recent, int(k)))[:, None, None]
    selection = select(rows, row_of_all, k.expand(len(rows)), forced, check=False)
    return selection.kept.view_as(scores)


def share_in_layer(scores, compressible, k, recent: int):
    """AdaKV (arXiv 2407.11550): the heads of a layer share a budget, a fifth of
    it in equal parts.

    Each head first keeps its own best entries, at least one. The recent tokens
    count towards them, as in kvpress: below K = 320 they are all of this fifth. Shapes
    as in `share_budget`.
    """
    own = (k // SAFEGUARD).clamp(min=1)
    safe = share_budget(scores, compressible, own, 1, recent)
    return share_budget(scores.masked_fill(safe, 1e9), compressible, k, scores.shape[2], recent)


# --------------------------------------------------------------------------------------- the scores

def random_scores(model: Llama, n: int, seed: str):
    """One random number per entry, (1, L, G, n); drawn on the CPU, so that
    devices agree."""
    rng = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    scores = torch.rand(1, model.cfg.n_layer, model.cfg.n_kv_head, n, generator=rng)
    return scores.to(model.device)


def streaming(ctx: Context):
    """StreamingLLM (arXiv 2309.17453): the first 4 tokens, and the most recent
    ones. (1, 1, 1, N).

    A protected header of 4 tokens or more holds the first ones already.
    """
    position = torch.arange(ctx.tokens.shape[1], device=ctx.h.device)
    first = position < SINKS
    scores = torch.where(first, len(position) + SINKS - position, position)
    return scores.float()[None, None, None]


def attention_sum(model: Llama, tokens, cache: Cache | None, n: int):
    """For each of the first n keys, the sum of the attention that it gets from all
    `tokens` (1, T), which are read after `cache`.

    Returns (L, G, H/G, n) fp32.
    """
    total = {}

    def on_weights(layer, weights, first_query):              # (1, G, H/G, t, s)
        received = weights[0, ..., :n].sum(2)                 # (G, H/G, n or less)
        received = F.pad(received, (0, n - received.shape[-1]))
        # Called for each block of queries; a block does not see the keys behind it.
        total[layer] = total[layer] + received if layer in total else received

    model(tokens, cache, on_weights=on_weights)
    return torch.stack(list(total.values()))


def h2o(model: Llama, ctx: Context):
    """H2O (arXiv 2306.14048): the attention that a token has received.

    It is summed over the tokens from itself on, and averaged over the query heads
    of a group, (1, L, G, N). We read the document a second time to get the weights, so
    H2O takes more seconds here than in code that sums while it reads.
    """
    return attention_sum(model, ctx.tokens, None, ctx.tokens.shape[1]).mean(2)[None]


def snapkv_window(k: int) -> int:
    return max(1, min(WINDOW, k // 2))  # at most half of what is kept


def snapkv(model: Llama, ctx: Context, full: Cache, window: int):
    """SnapKV (arXiv 2404.14469): mean attention from the last `window` tokens,
    smoothed. The published method has the question in this window. Here no question
    is known yet, so the window is the end of the document.

    Returns (1, L, G, N). The last tokens themselves are always kept: their score
    is 1, which no mean weight exceeds. They are read once more, after a cache of
    what lies before them.
    """
    n = ctx.tokens.shape[1] - window
    layers = []
    for (group,) in full.layers:
        k, v, positions = (x[:, :, :n] for x in (group.k, group.v, group.positions))
        layers.append([HeadGroup(k, v, positions, None)])
    before = Cache(layers, full.next_position - window)

    mean = attention_sum(model, ctx.tokens[:, n:], before, n) / window       # (L, G, H/G, n)
    smooth = F.avg_pool1d(mean.flatten(0, 1), KERNEL, stride=1, padding=KERNEL // 2)
    scores = smooth.view_as(mean).mean(2)[None]
    return F.pad(scores, (0, window), value=1.0)


def kvzip_replays(tokenizer, ids: list[int], first: int, chunk: int = CHUNK):
    """What KVzip reads after the full cache: the context from token `first` on,
    in chunks.

    Returns a list of (start, end, tokens): the instruction to repeat, then
    ids[start:end].
    """
    replays = []
    for start in range(first, len(ids), chunk):
        if start == first:
            instruction = tokenizer.encode(REPEAT, joined=True)
        else:
            quote = ids[max(start - TAIL, first):start]
            instruction = tokenizer.encode(REPEAT_FROM, joined=True) + quote
        end = min(start + chunk, len(ids))
        replays.append((start, end, instruction + tokenizer.turn + ids[start:end]))
    return replays


def kvzip(model: Llama, tokenizer, ctx: Context, full: Cache, chunk: int = CHUNK):
    """KVzip (arXiv 2505.23416): the largest attention to an entry while the
    context is repeated.

    The maximum runs over the tokens of the replay and over the query heads of a
    group, the softmax over the first 4 keys, those of the chunk and those of
    the replay. Returns (1, L, G, N). The first 4 tokens are always kept. A
    replay needs positions, too: where the model has few left, chunks are
    shorter.
    """
    ids = ctx.tokens[0].tolist()
    chunk = min(chunk, model.cfg.max_positions - len(ids) - INSTRUCTION)

    parts = []
    for start, end, replay in kvzip_replays(tokenizer, ids, int(ctx.protected.sum()), chunk):
        tokens = torch.tensor([replay], device=model.device)
        parts.append(max_attention(model, full, tokens, first=start, end=end, sinks=SINKS))

    scores = torch.cat(parts, -1)
    scores = F.pad(scores, (len(ids) - scores.shape[-1], 0))  # the header, which is protected
    scores[..., :SINKS] = 2.0                                 # no weight is above 1
    return scores


# ------------------------------------------------------------------------ a document and its caches

def clock(model: Llama) -> float:
    """Seconds, once the device has done all that it was asked to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    elif model.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class Document:
    """A document that is read once, and the cache that each method makes of it.

    seed: of the random scores. full: the full cache, one row. Scores are made
    when first needed.
    """

    def __init__(self, model: Llama, tokenizer, compressor: Compressor, case: Case, seed: str):
        self.model = model
        self.tokenizer = tokenizer
        self.compressor = compressor
        self.case = case
        self.seed = seed
        self.made = {}             # scores that have been made, and the seconds it took
        self.reused_seconds = 0.0  # spent earlier on scores that this cache reuses

        tokens = torch.tensor([case.context], device=model.device)
        protect = torch.arange(tokens.shape[1], device=model.device)[None] < case.n_protect
        start = clock(model)
        self.ctx = compressor.read(model, tokens, protect=protect)
        self.read_seconds = clock(model) - start
        self.full = compressor.full_cache(model, self.ctx)
        self.prefill_seconds = clock(model) - start

    def scores(self, name: str, k: int):
        """The scores of a baseline, (1, l, g, N). Those of SnapKV depend on k."""
        key = (name, snapkv_window(k) if name == "snapkv" else None)
        if key in self.made:
            scores, seconds = self.made[key]
            self.reused_seconds += seconds
            return scores

        start = clock(self.model)
        model, ctx = self.model, self.ctx
        if name == "random":
            scores = random_scores(model, ctx.tokens.shape[1], self.seed)
        elif name == "streaming":
            scores = streaming(ctx)
        elif name == "h2o":
            scores = h2o(model, ctx)
        elif name == "snapkv":
            scores = snapkv(model, ctx, self.full, snapkv_window(k))
        elif name == "kvzip":
            scores = kvzip(model, self.tokenizer, ctx, self.full)
        elif name == "scorer":
            scores = self.compressor.scorer(ctx.h, ctx.lengths)
        else:
            raise ValueError(f"no scores are called {name}")
        self.made[key] = scores, clock(self.model) - start
        return scores

    def for_compressor(self, scores):
        """Scores that fit the compressor's rule: averaged over layers and heads, if all
        heads keep the same tokens."""
        if self.compressor.cfg.selection == "token":
            return scores.mean((1, 2), keepdim=True)
        return scores

    def kept(self, method: str, k):
        """The entries that a baseline keeps, (1, l, g, N) bool. k: (1,) int64."""
        name, budget = BASELINES[method]
        scores = self.scores(name, int(k))
        if budget == "compressor":
            return self.compressor.select(self.for_compressor(scores), self.ctx, k).kept

        recent = 0
        if name == "h2o":
            recent = int(k) // 2
        elif name == "snapkv":
            recent = snapkv_window(int(k))
        if budget == "layer":
            return share_in_layer(scores, self.ctx.compressible, k, recent)
        heads = {"head": 1, "all": scores.shape[1] * scores.shape[2]}[budget]
        return share_budget(scores, self.ctx.compressible, k, heads, recent)

    def cache(self, method: str, keep: float) -> Cache:
        """The cache of one method, one row. keep = 1 is the full cache, whatever
        the method (but for `none`)."""
        model, ctx = self.model, self.ctx
        if method == "none":
            return model.prefill(ctx.tokens[:, :self.case.n_protect])
        k = kept_count(ctx.compressible.sum(1), keep)                        # (1,) int64
        if method == "full" or int(k) == self.case.n:
            return self.full
        if method == "kvdistill":
            return self.compressor.compress(model, ctx, keep)
        if method == "kvdistill:random":
            scores = self.for_compressor(self.scores("random", int(k)))
            return self.compressor.compress(model, ctx, keep, scores=scores)
        return prune_cache(self.full, ctx, self.kept(method, k))

    def timed_cache(self, method: str, keep: float) -> tuple[Cache, dict]:
        """The cache of one method, and the seconds that it cost.

        "prefill" is what the method needs of a plain reading of the document.
        "compress" is all the rest, including scores that were made before for
        another cache.
        """
        self.reused_seconds = 0.0
        start = clock(self.model)
        cache = self.cache(method, keep)
        compress = clock(self.model) - start + self.reused_seconds
        prefill = self.prefill_seconds
        if cache is self.full:
            compress = 0.0
        elif method == "none":
            prefill = 0.0
        elif method.startswith("kvdistill"):
            prefill = self.read_seconds  # layers 1 … η; the others are read anew
        return cache, {"prefill": prefill, "compress": compress}


# ---------------------------------------------------------------------------------- judging answers

def log_probabilities(model: Llama, case: Case, queries: list[Query], cache: Cache):
    """Log probabilities of the vocabulary, where R answer tokens are predicted.

    The queries are segments of one row, and none of them sees another.
    Returns (R, V) fp32.
    """
    batch = collate([replace(case, queries=queries)])
    tokens = batch.continuation.to(model.device)
    h = model(tokens, cache, segments=batch.segments.to(model.device))       # (1, T, D)
    return model.logits(h[batch.answers.to(model.device)]).log_softmax(-1)


def divergence(log_q, log_p):
    """KL(p ‖ q) and Jensen-Shannon divergence in nats, and top-1 agreement (1
    or 0).

    log_q, log_p: (R, V) fp32. Returns (3, R).
    """
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).clamp(min=1e-38).log()
    kl = torch.linalg.vecdot(p, log_p - log_q)
    js = (torch.linalg.vecdot(p, log_p - log_m) + torch.linalg.vecdot(q, log_q - log_m)) / 2
    agree = (log_q.argmax(-1) == log_p.argmax(-1)).float()
    return torch.stack([kl.clamp(min=0), js.clamp(min=0), agree])


def judge_fidelity(model: Llama, case: Case, cache: Cache, teacher) -> list[dict]:
    """How far are the predictions from the teacher's, the full cache's
    `log_probabilities`?"""
    student = log_probabilities(model, case, case.queries, cache)
    lengths = [len(query.answer) for query in case.queries]
    per_answer = divergence(student, teacher).cpu().split(lengths, 1)        # (3, its tokens) each
    answers = []
    for query, values in zip(case.queries, per_answer):
        metrics = dict(zip(("kl", "js", "agree"), values.mean(1).tolist()))
        answers.append({"kind": query.kind, "weight": len(query.answer), **metrics})
    return answers


def judge_choice(model: Llama, tokenizer, case: Case, cache: Cache) -> list[dict]:
    """Which option is the likeliest, by the mean over its tokens? Options
    differ in length."""
    answers = []
    for query in case.queries:
        options = []
        for option in query.options:
            ids = tokenizer.encode(option.strip()) + tokenizer.end
            options.append(Query(query.kind, query.prompt, ids))

        log_p = log_probabilities(model, case, options, cache)
        ids = torch.tensor([t for option in options for t in option.answer], device=log_p.device)
        per_option = log_p.gather(1, ids[:, None])[:, 0].split([len(x.answer) for x in options])
        likely = [float(x.mean()) for x in per_option]
        best = query.options[likely.index(max(likely))]
        answers.append({"kind": query.kind, "weight": 1, "accuracy": float(best in query.gold),
                        "chance": 1 / len(options), "prediction": best})
    return answers


def judge_cost(model: Llama, case: Case, cache: Cache) -> list[dict]:
    """Tokens per second of decoding at batch 1 and 8, and seconds for one short answer.
    On a GPU the seconds include the capture of a decoding step, the rates do not."""
    new = MAX_NEW_TOKENS["cost"]
    prompt = case.queries[0].prompt
    rates = {}
    start = clock(model)
    for batch in (1, 8):
        rows = cache if batch == 1 else cache.rows([0] * batch)
        steps = generate(model, rows, [prompt] * batch, new + 1)
        next(steps)                    # the first token comes from reading the prompt
        decoding = clock(model)
        done = sum(1 for _ in steps)
        rates[batch] = batch * done / (clock(model) - decoding)
        if batch == 1:
            question = clock(model) - start
    return [{"kind": case.queries[0].kind, "weight": 1, "tokens_per_s": rates[1],
             "tokens_per_s_8": rates[8], "question_s": question}]


def judge_generated(task: str, model: Llama, tokenizer, case: Case, cache: Cache) -> list[dict]:
    """Generate an answer to every query, greedily, and compare it with the
    accepted ones."""
    stop_ids = tokenizer.stop_ids
    if task == "squad":
        stop_ids = stop_ids | tokens_with(tokenizer, SQUAD_END)
    rows = cache.rows([0] * len(case.queries))
    prompts = [query.prompt for query in case.queries]
    steps = list(generate(model, rows, prompts, MAX_NEW_TOKENS[task], stop_ids))

    answers = []
    for i, query in enumerate(case.queries):
        text = tokenizer.decode([step[i] for step in steps if step[i] is not None]).strip()
        metrics = {name: metric(text, query.gold) for name, metric in METRICS[task].items()}
        answers.append({"kind": query.kind, "weight": 1, "prediction": text, **metrics})
    return answers


def judge(task: str, model: Llama, tokenizer, case: Case, cache: Cache, teacher) -> list[dict]:
    """Ask the queries of a cache. One dict per query: its "kind", "weight" and
    the metrics."""
    if task in ("fidelity", "ends"):
        return judge_fidelity(model, case, cache, teacher)
    if task == "choice":
        return judge_choice(model, tokenizer, case, cache)
    if task == "cost":
        return judge_cost(model, case, cache)
    return judge_generated(task, model, tokenizer, case, cache)


# ----------------------------------------------------------------------------------------- the loop

@torch.no_grad()
def measure(task: str, model: Llama, tokenizer, compressor: Compressor, cases, methods, keeps,
            seed: int, done=frozenset()) -> Iterator[list[dict]]:
    """For every case, ask its queries of each method's cache; yields the records of
    a case.

    cases: an iterable of (number, case). Random numbers depend on the seed, the task
    and the number, not on the cases before, so processes may share the cases out.
    done: (number, method, keep) that are left out. A record: {"task", "case", "unit",
    "method", "keep", "N", "K": entries per head on average, "bytes": as stored, with
    the header, "seconds": {"prefill", "compress", "decode": all of `judge`},
    "answers": what `judge` returns}.
    """
    for i, case in cases:
        todo = [(m, keep) for m in methods for keep in keeps_of(m, keeps)
                if (i, m, keep) not in done]
        if not todo:
            continue
        name = f"{seed}/{task}/{i}"
        document = Document(model, tokenizer, compressor, case, name)
        order = list(todo)
        if task == "cost":
            # The first reading also asks the system for memory, so read again.
            del document
            document = Document(model, tokenizer, compressor, case, name)
            random.Random(name).shuffle(order)  # no method always comes first
        teacher = None
        if task in ("fidelity", "ends"):
            teacher = log_probabilities(model, case, case.queries, document.full)

        records = []
        for method, keep in order:
            cache, seconds = document.timed_cache(method, keep)
            start = clock(model)
            answers = judge(task, model, tokenizer, case, cache, teacher)
            seconds["decode"] = clock(model) - start
            k = float(cache.entries().cpu().double().mean()) - case.n_protect
            records.append({"task": task, "case": i, "unit": case.unit, "method": method,
                            "keep": keep, "N": case.n, "K": round(k, 2), "bytes": cache.nbytes(),
                            "seconds": seconds, "answers": answers})
        yield sorted(records, key=lambda r: todo.index((r["method"], r["keep"])))


def held_out_table(model: Llama, tokenizer, compressor: Compressor, sources: str, shards,
                   context: int, contexts: int, seed: int, world: World | None = None,
                   share: bool = True) -> list[dict]:
    """The table that ends a training run: fidelity on the development half of
    held-out text. Returns its cells.

    context: tokens of a document; contexts: documents for each kind of
    question. world: the processes, which share the documents out; without
    `share`, each of them measures all.
    """
    squad = tasks.SQUAD if tasks.SQUAD.is_file() else None
    if squad is None:
        print("the table has no answers to SQuAD's questions: results/README.md says where to get "
              f"the file {tasks.SQUAD}")
    # leaves room for a replay
    room = (model.cfg.max_positions - len(tokenizer.header) - INSTRUCTION) // 2
    context = max(1, min(context, room))
    cases = list(enumerate(
        tasks.fidelity(tokenizer, contexts, seed, context, sources, shards, squad, split="dev")))
    if world and share:
        cases = world.my_rows(cases)

    records = []
    bar = tqdm(cases, desc="held-out table", unit="document", disable=bool(world and world.rank))
    for new in measure("fidelity", model, tokenizer, compressor, bar, DEFAULT_METHODS.split(","),
                       DEFAULT_KEEPS, seed):
        records += new
    if world and share:
        records = sorted(world.gather(records), key=lambda r: r["case"])
    cells = cells_of(records)
    print_table(cells, by_kind=False)
    return cells


# -------------------------------------------------------------------------------------- the program

def fit(cases: list[Case], task: str, tokenizer, max_positions: int) -> None:
    """Cut off the ends of documents that leave no room for a question with its
    answer, or for a replay of KVzip's. Documents whose length a flag sets are refused
    instead, and so is one of which nothing would remain."""
    cut = 0
    for case in cases:
        longest = max(len(query.prompt) + len(query.answer) for query in case.queries)
        if task == "choice":
            longest += max(len(tokenizer.encode(option)) + len(tokenizer.end)
                           for query in case.queries for option in query.options)
        room = longest + MAX_NEW_TOKENS.get(task, 64)
        room = max(room, INSTRUCTION + min(case.n, LEAST_CHUNK))
        over = len(case.context) + room - max_positions
        if over <= 0:
            continue
        if task in ("fidelity", "ends", "niah", "cost") or over >= case.n:
            raise BadInput(f"{task}: {case.unit} has {case.n} tokens and needs {room} positions "
                           f"more, the model has {max_positions}; use shorter documents")
        case.context = case.context[:-over]
        cut += 1
    if cut:
        print(f"{task}: {cut} documents were cut to the model's {max_positions} positions")


def build(task: str, args, tokenizer, model: Llama) -> tuple[list[Case], dict]:
    """The cases of a task, short enough for the model, and the settings they
    depend on."""
    path = args.data.get(task)
    n, seed, split = args.n, args.seed, args.split
    settings = {"n": n}
    if task in ("fidelity", "ends", "squad", "niah"):
        settings |= {"split": split}
    if task in ("fidelity", "ends"):
        sources = path or "wiki,sotu"
        settings |= {"context": args.context, "sources": sources}
        texts = {"sources": sources, "shards": args.shards, "split": split}
    if task == "fidelity":
        squad = args.data.get("squad")
        if squad is None:
            print("fidelity: without the kind squad; --data squad=PATH adds it")
        cases = tasks.fidelity(tokenizer, n, seed, args.context, squad_path=squad, **texts)
    elif task == "ends":
        cases = tasks.ends(tokenizer, n, seed, args.context, **texts)
    elif task == "squad":
        settings |= {"pack": args.pack}
        cases = tasks.squad(tokenizer, path, n, seed, args.pack, split)
    elif task == "niah":
        settings |= {"lengths": args.lengths, "depths": args.depths}
        cases = tasks.niah(tokenizer, path, n, seed, args.lengths, args.depths, split)
    elif task == "cost":
        settings |= {"lengths": args.lengths, "device": str(model.device),
                     "threads": torch.get_num_threads()}
        cases = tasks.cost(tokenizer, path, n, args.lengths)
    elif task == "summary":
        cases = tasks.summary(tokenizer, path, n, seed)
    else:
        cases = tasks.choice(tokenizer, path, n, seed)
    fit(cases, task, tokenizer, model.cfg.max_positions)
    content = json.dumps([asdict(case) for case in cases]).encode()
    return cases, settings | {"contexts": len(cases), "documents": sha256(content)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def adapter_hash(compressor: Compressor) -> str:
    """A hash of what a compressor does: its configuration as JSON, and its
    numbers."""
    content = [json.dumps(asdict(compressor.cfg), sort_keys=True).encode()]
    for name, tensor in sorted(compressor.state_dict().items()):
        content += [name.encode(), tensor.cpu().numpy().tobytes()]
    return sha256(b"".join(content))


@torch.no_grad()
def ask(args) -> None:
    """Print the cache of every method for one text, and what the model answers
    from it."""
    text = read_text(args.ask)
    tokenizer, model_cfg = open_tokenizer(args)
    asking = pick_wording(args, tokenizer)
    replays = any(method.startswith("kvzip") for method in args.methods)
    room = INSTRUCTION + LEAST_CHUNK if replays else 0
    check_length(asking, tokenizer, text, args.question, model_cfg.max_positions, room)
    model, _ = open_model(args, tokenizer=tokenizer)
    compressor, _ = open_compressor(args.adapter, args.weights, model, tokenizer)
    case = make_case(tokenizer, tokenizer.document(text.strip()), [], args.ask)
    document = Document(model, tokenizer, compressor, case, str(args.seed))

    print(f"{args.ask}: {case.n} tokens, and {case.n_protect} of the chat header in every cache\n")
    print(f"{'cache':24} {'kept tokens':>12} {'bytes':>12} {'fewer bytes':>12} {'seconds':>8}")
    caches = {}
    for method in args.methods:
        for keep in keeps_of(method, args.keep):
            cache, seconds = document.timed_cache(method, keep)
            name = method if method in ("full", "none") else f"{method}, keep {keep:g}"
            kept = float(cache.entries().float().mean()) - case.n_protect
            ratio = document.full.nbytes() / cache.nbytes()
            print(f"{name:24} {kept:12.0f} {cache.nbytes():12,} {ratio:11.1f}x "
                  f"{sum(seconds.values()):8.2f}")
            caches[name] = cache
    print("\nkept tokens: per head, on average; seconds: to read and to compress the text")
    ask_all(model, asking, caches, args.question, 64, 0.0, args.seed)


def evaluate(args, about: dict, world: World, results: Results) -> None:
    """What every process does: its share of the documents. The first process
    shows the result."""
    model, tokenizer = open_model(args)
    compressor, folder = open_compressor(args.adapter, args.weights, model, tokenizer)
    settings = {"weights": base_of(model, tokenizer)["weights"][:16],
                "dtype": str(model.dtype).removeprefix("torch."),
                "adapter": adapter_hash(compressor), "seed": args.seed, "tasks": {}}
    work = {}
    for task in args.tasks:
        with world.local_rank0_first():  # it writes the tokens of the texts, the others read them
            work[task], settings["tasks"][task] = build(task, args, tokenizer, model)
    if world.broadcast(settings) != settings:
        raise BadInput(f"process {world.rank} has other weights, adapter or documents than process "
                       "0; expected equal ones")
    results.begin({"settings": settings, **about, "processes": world.world_size,
                   "against": args.against, "model": model_name(args.weights),
                   "adapter": folder and os.path.relpath(folder, ROOT),
                   "device": str(model.device),
                   "versions": {"python": platform.python_version(), "torch": torch.__version__}})

    for task, cases in work.items():
        wanted = {(i, method, keep) for i in range(len(cases)) for method in args.methods
                  for keep in keeps_of(method, args.keep)}
        done = results.done(task, wanted)
        same = {"methods": args.methods, "keeps": args.keep, "seed": args.seed}
        if task == "cost":  # the first passes are slow, whatever they are
            warm = replace(cases[0], context=cases[0].context[:cases[0].n_protect + 128])
            list(measure(task, model, tokenizer, compressor, [(0, warm)], **same))
        left = world.my_rows(sorted({i for i, _, _ in wanted - done}))
        bar = tqdm([(i, cases[i]) for i in left], desc=task, unit="document", mininterval=1,
                   disable=world.rank > 0)
        for records in measure(task, model, tokenizer, compressor, bar, **same, done=done):
            results.add(records)
        results.finish(task)

    if not world.rank:
        print_table([c for c in results.result["cells"] if c["task"] in args.tasks])
        print(f"\nresult: {args.out}" if args.out else "")


def main() -> None:
    args = parse_args()
    if args.ask is not None:
        return ask(args)
    about = provenance(args.seed)
    world = World.start(args.device)
    prepare_process(args, world)
    with Results(args.out, world) as results:
        evaluate(args, about, world, results)
    world.end()


if __name__ == "__main__":
    run_program(main)
