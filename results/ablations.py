"""Which part of the method is worth what? Each row changes one thing of `base` and keeps everything else.

    python results/ablations.py                # what is missing in results/ablations.json, then results/ablations.md
    python results/ablations.py choice         # of it, the rows whose names begin so: "choice", "routing/lambda", …

`choice` asks who should stay: scorers learn in seconds from hidden states and targets that are read once, and their
choice is taken from the plain cache. `routing` asks what happens to those that stay, and what the loss should be: one
taught scorer, and for every row the same STEPS steps of distillation. `long` asks some of it again of documents in
which eight entries of a head are few. A row is written when it is finished; cut off, the same command goes on. A part's
rows are judged on the same held-out answers, so differences are paired.
"""
import json
import math
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compress import (Compressor, CompressorConfig, Context, Scorer, attention_received, decay,  # noqa: E402
                      kept_count)
from data import tasks as T  # noqa: E402
from data.fetch import fetch  # noqa: E402
from data.prepare import SHARDS, Shard, prepare  # noqa: E402
from data.samples import Case, Samples, collate  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from eval import Judge, choose, kvzip  # noqa: E402
from model import NEG, Cache, Llama, load_llama, whole_cache  # noqa: E402
from results.ablations_variants import Adapted, Kept, Linear, Read, Routing, Slots  # noqa: E402
from results.tables import fill, markdown, number, paragraph, signed  # noqa: E402
from run.errors import BadInput, Parser, provenance, read_json, run_program, write_atomic  # noqa: E402
from run.models import keep_freed_memory  # noqa: E402
from run.records import mean_and_interval  # noqa: E402
from run.world import World  # noqa: E402
from train import Distiller, MicroBatch, Totals, TrainConfig, rate  # noqa: E402

RESULT, PAGE = ROOT / "results" / "ablations.json", ROOT / "results" / "ablations.md"
WORK = ROOT / "out" / "ablations"
ETAS, WINDOWS = (3, 6, 12), 300    # layers that a scorer may read after; windows of 400 tokens to teach it from
STEPS = 80                         # of distillation
DOCUMENTS, HELD_OUT = 12, 4321     # held-out documents of each kind, and the seed that draws them


# ------------------------------------------------------------------------------------------------------ the judge

@dataclass
class Document:
    """A text read once by the frozen model, and what it then says about it from its whole cache."""
    states: dict[int, torch.Tensor]  # hidden states (1, N, D) by the layer they come after
    kvs: list                        # keys and values of every layer, a pair of (1, G, N, d) each
    ctx: Read                        # up to layer 6
    judge: Judge | None = None

    @classmethod
    @torch.no_grad()
    def read(cls, model: Llama, ids: list[int], n_protect: int, etas=ETAS) -> "Document":
        tokens, states, kvs = torch.tensor([ids]), {}, []
        h = model.embed(tokens)
        for first, last in zip((0, *etas), (*etas, model.cfg.n_layer)):
            h, new = model.run_layers(h, first, last)
            states[last], kvs = h, kvs + new
        eta, candidates = etas[1], torch.arange(len(ids))[None] >= n_protect
        return cls(states, kvs, Read(states[eta], kvs[:eta], tokens, torch.tensor([len(ids)]), candidates, False))

    @torch.no_grad()
    def with_judge(self, model: Llama, tok, case: Case) -> "Document":
        return replace(self, judge=Judge("fidelity", model, tok, case, whole_cache(self.kvs)))

    def masked(self, kept) -> Cache:
        """The whole cache, with −1e9 on what is dropped: the same function as gathering what stays."""
        stay = kept | self.ctx.protected[:, None, None]
        return self.ctx.whole_cache(self.kvs, torch.where(stay, 0.0, NEG))


@torch.no_grad()
def judge(documents: list[Document], keeps, cache_of) -> dict:
    """{metric: {keep: a value for each answer}}; cache_of(document, its number, k) -> Cache."""
    out = {metric: {f"{keep:g}": [] for keep in keeps} for metric in ("kl", "js", "agree")}
    for i, d in enumerate(documents):
        for keep in keeps:
            for answer in d.judge.fidelity(cache_of(d, i, kept_count(d.ctx.candidates.sum(1), keep))):
                for metric, values in out.items():
                    values[f"{keep:g}"].append(round(answer[metric], 5))
    return out


# ------------------------------------------------------------------------------------------------ 1. who should stay

@dataclass(frozen=True)
class Taught:
    """A scorer and how it is taught. Rows that agree in all of this share it."""
    per: str = "head"        # it has a score for each head, for each layer (its heads' mean target), or one per token
    following: bool = True   # is what the text that follows attends to part of the target?
    eta: int = 6
    hidden: int = 1024       # 0: a linear map
    distances: bool = True   # does it see how much text lies before and after a token?
    windows: int = WINDOWS


@dataclass(frozen=True)
class Row:
    says: str
    scores: Taught | str = Taught()  # or "random", or "kvzip": the target itself, which takes a second reading
    shared: bool = True              # one budget for all heads, or each its own
    recent: float = 4                # below 1: of K


CHOICE = {
    "base": Row("a score per head, one budget, 4 recent tokens, η = 6, 300 windows"),
    "random": Row("random scores", "random"),
    "kvzip": Row("KVzip: the target itself, from a second reading", "kvzip", recent=0),
    "head, equal": Row("a score per head, each its own budget", shared=False),
    "layer": Row("a score per layer, one budget", Taught(per="layer")),
    "token": Row("a score per token, the paper's way", Taught(per="token"), recent=0),
    "replay only": Row("target without the text that follows", Taught(following=False)),
    "no distances": Row("the scorer does not see how much text lies before and after", Taught(distances=False)),
    "recent 0": Row("no recent tokens forced", recent=0),
    "recent 1": Row("1 recent token in every head", recent=1),
    "recent 2": Row("2 recent tokens in every head", recent=2),
    "recent K/10": Row("a tenth of K are recent tokens in every head", recent=0.1),
    "recent 8": Row("8 recent tokens in every head", recent=8),
    "eta 3": Row("read after layer 3", Taught(eta=3)),
    "eta 12": Row("read after layer 12", Taught(eta=12)),
    "linear": Row("a linear scorer", Taught(hidden=0)),
    "hidden 256": Row("hidden layer of 256", Taught(hidden=256)),
    "50 windows": Row("taught on 50 windows", Taught(windows=50)),
    "100 windows": Row("taught on 100 windows", Taught(windows=100)),
    "layer, equal": Row("a score per layer, each its own budget", Taught(per="layer"), shared=False),
    "recent 16": Row("16 recent tokens in every head", recent=16),
    "kvzip, 4 recent": Row("KVzip with 4 recent tokens in every head", "kvzip"),
    "kvzip, equal": Row("KVzip, each head its own budget", "kvzip", shared=False, recent=0),
}


def windows(model: Llama, tok, shards, n: int, n_context: int, etas=ETAS) -> dict:
    """n windows of one length, as the first phase of a training reads them: hidden states (n, N, D), and the log of the
    most attention (n, L, G, N) from the replay and from the text that follows. Kept in WORK, as they take minutes."""
    path = WORK / "windows.safetensors"
    if path.exists():
        return load_file(path)
    samples, out = Samples(shards, tok, n_context, {"replay": 1, "continue": 1}, 40, 0), {}
    for i in tqdm(range(n), desc="windows", mininterval=10):
        case = samples(i)
        b, d = collate([case]), Document.read(model, case.context, case.n_protect, etas)
        for j, name in enumerate(("replay", "following")):
            best = attention_received(model, whole_cache(d.kvs), b.cont[b.segments == j][None])
            out.setdefault(name, []).append(best[0].clamp(min=1e-6).log().half())
        for eta in etas:
            out.setdefault(f"h{eta}", []).append(d.states[eta][0])
    out = {name: torch.stack(x) for name, x in out.items()} | {"n_protect": torch.tensor(case.n_protect)}
    write_atomic(path, lambda tmp: save_file(out, tmp))
    return out


def target(t: Taught, data: dict, i: int):
    """What the scorer is to say about window i: (1, l, g, N)."""
    best = data["replay"][i:i + 1].float()
    best = torch.maximum(best, data["following"][i:i + 1].float()) if t.following else best
    over = {"head": (), "layer": (2,), "token": (1, 2)}[t.per]
    return best.exp().mean(over, keepdim=True).log() if over else best


def taught(t: Taught, seed: int, model: Llama, memo: dict) -> Scorer:
    """The regression of train.Distiller.reconstruct, a window a step; memo["windows"]: as from `windows`."""
    if (t, seed) in memo:
        return memo[t, seed]
    torch.manual_seed(seed)
    data, c = memo["windows"], model.cfg
    heads = {"head": (c.n_layer, c.n_kv_head), "layer": (c.n_layer, 1), "token": (1, 1)}[t.per]
    scorer = Scorer(c.n_embd, t.hidden, *heads) if t.hidden else Linear(c.n_embd, *heads)
    nn.init.constant_(scorer.w2.bias, -4.0)
    if not t.distances:
        with torch.no_grad():
            scorer.w1.weight[:, -2:] = 0
        scorer.w1.weight.register_hook(lambda grad: F.pad(grad[:, :-2], (0, 2)))  # and there they stay
    opt, p = torch.optim.AdamW(scorer.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0), int(data["n_protect"])
    order = random.Random(seed).sample(range(len(data["replay"])), min(t.windows, len(data["replay"])))
    for step, i in enumerate(order):
        h = data[f"h{t.eta}"][i:i + 1]
        F.mse_loss(scorer(h, torch.tensor([h.shape[1]]))[..., p:], target(t, data, i)[..., p:]).backward()
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        opt.param_groups[0]["lr"] = 1e-3 * rate(step, len(order), 10)
        opt.step()
        opt.zero_grad()
    memo[t, seed] = scorer.requires_grad_(False)
    return scorer


def choice_row(row: Row, seed: int, model: Llama, tok, documents, memo: dict) -> dict:
    """One row of `choice`, judged. memo: the windows, and scorers for the rows that share them."""
    scorer = taught(row.scores, seed, model, memo) if isinstance(row.scores, Taught) else None

    @once
    def scores(i):
        d = documents[i]
        if scorer:
            return scorer(d.states[row.scores.eta], d.ctx.lengths)
        if row.scores == "kvzip":
            return kvzip(model, tok, d.ctx, whole_cache(d.kvs))
        shape = 1, model.cfg.n_layer, model.cfg.n_kv_head, d.ctx.tokens.shape[1]
        return torch.rand(shape, generator=torch.Generator().manual_seed(1000 * seed + i))

    def cache_of(d, i, k):
        heads = scores(i)[0, ..., 0].numel() if row.shared else 1
        recent = round(row.recent if row.recent >= 1 else row.recent * int(k))
        return d.masked(choose(scores(i), d.ctx.candidates, k, heads, recent))
    return judge(documents, PARTS["choice"].keeps, cache_of)


# ------------------------------------------------------------------------------------------ 2. routing and the loss

@dataclass(frozen=True)
class Variant:
    says: str
    make: type = Routing
    settings: tuple = ()         # of `make`
    steps: int = STEPS
    lam: float = 0.6
    lr: float = 2e-3
    scorer: str | None = "head"  # taught so in `choice`, seed 0; None: random
    scorer_lr: float = 0.0       # through β
    soft: float = 0.0            # share of soft steps
    recent: int = 4
    rank: int = 32
    beta: bool = False           # what stays is decayed by its β at inference, too
    twice: bool = False          # a second seed


ROUTING = {
    "base": Variant("as shipped: W_Q and W_O, m by the next layer, none up to 4×, λ = 0.6", twice=True),
    "choice alone": Variant("nothing is routed", steps=0, twice=True),
    "lambda 1": Variant("forward KL alone", lam=1.0, twice=True),
    "lambda 0": Variant("reverse KL alone", lam=0.0, twice=True),
    "kept embedding": Variant("a learned embedding for kept tokens, no routing", Kept, lr=1e-2, twice=True),
    "kept embedding, fast": Variant("the same at ten times the rate", Kept, lr=1e-1),
    "slots": Variant("8 learned slots, no routing", Slots, twice=True),
    "QKVO": Variant("adapters on W_Q, W_K, W_V, W_O", Adapted, ("attn.wq attn.wk attn.wv attn.wo",)),
    "MLP": Variant("adapters on the MLP", Adapted, ("mlp.gate mlp.up mlp.down",)),
    "MLP, rank 12": Variant("the same, as many numbers as base", Adapted, ("mlp.gate mlp.up mlp.down",), rank=12),
    "beta at inference": Variant("base, its β at inference, too", beta=True),
    "recent 1": Variant("1 recent token in every head", recent=1),
    "strength 1": Variant("routing does not fade", settings=(0,)),
    "strength log": Variant("it fades with log(N/K)", settings=(1,)),
    "strength log²": Variant("with its square", settings=(2,), twice=True),
    "KL through beta": Variant("the scorer learns on, through β, hard steps", scorer_lr=1e-3),
    "KL, soft": Variant("the scorer learns on, half of the steps soft", scorer_lr=1e-3, soft=0.5),
    "KL alone": Variant("a random scorer learns through β alone, half soft", scorer=None, scorer_lr=1e-3, soft=0.5),
    "token": Variant("a score per token, routed", scorer="token"),
    "m later": Variant("m: the share of all later layers' heads", settings=(None, "later")),
    "m everywhere": Variant("m: the share of all heads", settings=(None, "everywhere")),
}
LONG = {name: ROUTING[name] for name in ("base", "choice alone", "slots", "MLP")}


@dataclass(frozen=True)
class Part:
    """Rows, and what they are judged on."""
    rows: dict
    keeps: tuple     # kept fractions that KL is shown for
    few: tuple       # and JS and top-1 agreement
    context: int     # tokens of a held-out document, at most
    every: int       # every n-th of these documents judges, as some rows take longer
    window: int = 0  # tokens of the contexts that `distil` learns from; 0: nothing is distilled


PARTS = {"choice": Part(CHOICE, (0.25, 0.1, 0.05), (0.1, 0.05), 400, 1),
         "routing": Part(ROUTING, (0.5, 0.25, 0.1, 0.05, 0.02), (0.1, 0.05), 400, 2, 300),
         "long": Part(LONG, (0.1, 0.05, 0.02, 0.01), (0.05, 0.02), 1600, 2, 1024)}


def lessons(model: Llama, tok, shards, n: int, window: int) -> list[tuple]:
    """What each step needs of the frozen model, read once for all rows: batch, context, the teacher's states."""
    samples, out = Samples(shards, tok, window, {"continue": 1, "recite": 1, "cloze": 1, "title": 1}, 40, 1), []
    ends = math.log(TrainConfig.keep_low), math.log(TrainConfig.keep_high)
    for i in tqdm(range(n), desc="lessons", mininterval=10):
        case = samples(i)
        m = MicroBatch.of(collate([case], prompts=True), math.exp(random.Random(f"keep/{i}").uniform(*ends)))
        d = Document.read(model, case.context, case.n_protect)
        with torch.no_grad():
            teacher = model(m.batch.cont, whole_cache(d.kvs), m.batch.segments, largest=m.largest).flatten(0, 1)[m.rows]
        out.append((m, d.ctx, teacher))
    return out


def distil(v: Variant, comp: Routing, todo: list[tuple], model: Llama, seed: int) -> None:
    """The second phase of train.train, on steps that are read already, in an order of the seed's."""
    step_of, rng = Distiller(model, comp, v.lam, 128, v.scorer_lr > 0), random.Random(seed)
    groups = [{"params": comp.trained(), "peak": v.lr}, {"params": [*comp.scorer.parameters()], "peak": v.scorer_lr}]
    opt = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0)
    for step, i in enumerate(tqdm(rng.sample(range(len(todo)), len(todo)), mininterval=10)):
        m, ctx, teacher = todo[i]
        step_of.distil(m, Totals.of([m], World(model.device)), ctx, teacher, rng.random() < v.soft)["loss"].backward()
        for g in opt.param_groups:
            nn.utils.clip_grad_norm_(g["params"], 1.0)
            g["lr"] = g["peak"] * rate(step, len(todo), 10)
        opt.step()
        opt.zero_grad()


def short_cache(v: Variant, comp: Routing, model: Llama, ctx: Context, k) -> Cache:
    """What the student of a hard step sees."""
    scores = comp.scores(ctx)
    choice = comp.choose(scores, ctx, k)
    bias = decay(scores, choice, comp.cfg.decay, comp.cfg.tau)
    if v.beta:
        bias = torch.where(choice.kept, decay(scores, choice, comp.cfg.decay, comp.cfg.tau, soft=True), bias)
    return ctx.whole_cache(comp.encode(model, ctx, choice, k, lambda layer, keys, values: (keys, values)), bias)


def routing_row(v: Variant, seed: int, model: Llama, part: Part, documents, memo: dict) -> dict:
    """One row of `routing` or `long`, trained and judged. memo: lessons by window, scorers, and what was trained."""
    key = replace(v, says="", beta=False, twice=False), seed, part.window
    if key not in memo:
        torch.manual_seed(seed)
        cfg = CompressorConfig(choice="token" if v.scorer == "token" else "head", recent=v.recent, rank=v.rank)
        comp = memo[key] = v.make(model.cfg, cfg, *v.settings)
        if v.scorer:
            comp.scorer.load_state_dict(taught(Taught(per=v.scorer), 0, model, memo).state_dict())
        distil(v, comp, memo[part.window][:v.steps], model, seed)
    made = judge(documents, part.keeps, lambda d, i, k: short_cache(v, memo[key], model, d.ctx, k))
    return {"parameters": sum(p.numel() for p in memo[key].trained())} | made


def memory(model: Llama, shards, comp: Compressor) -> dict:
    """Bytes as stored of a document of 2,048 tokens, by kept fraction; they do not depend on which entries stay."""
    ids = torch.tensor([x for i in range(40) for x in shards[0].tokens(i).tolist()][:2048])[None]
    ctx = comp.read(model, ids, protect=torch.arange(2048)[None] < 1)
    return {f"{keep:g}": comp.compress(model, ctx, keep).nbytes() for keep in (1, 0.5, 0.1, 0.01)}


# ----------------------------------------------------------------------------------------------------- the tables

def asked(result: dict, part: str) -> list[tuple]:
    """(document, unit, kind, tokens) of the answers that judge a part."""
    return [a for a in result["answers"][str(PARTS[part].context)] if a[0] % PARTS[part].every == 0]


def estimate(result: dict, part: str, row: str, keep, kind="all", metric="kl", less=None):
    """A row's mean over answers (by tokens) and seeds, its 95 % interval over documents, and the means of its seeds;
    with `less`, of what it has more than that row, answer by answer and seed by seed. Empty where it is not there."""
    at = {(r["row"], r["seed"]): np.array(r[metric][f"{keep:g}"]) for r in result["rows"] if r["part"] == part}
    found = [x - at[less, seed] if less else x for (name, seed), x in at.items()
             if name == row and (not less or (less, seed) in at)]
    mine, units, weights = zip(*[(j, a[1], a[3]) for j, a in enumerate(asked(result, part)) if kind in ("all", a[2])])
    return found and (*mean_and_interval(units, np.mean(found, 0)[[*mine]], weights),
                      [np.average(x[[*mine]], weights=weights) for x in found])


def table(result: dict, part: str, title: str, columns: list[tuple], less=None, interval=True) -> str:
    """A line for each measured row; columns: (keep, kind, metric). Of differences those are bold whose interval leaves
    0 out, if all seeds agree on the sign."""
    def cell(row, column):
        mean, (low, high), seeds = estimate(result, part, row, *column, less)
        bold = "**" if less and (low > 0 and min(seeds) > 0 or high < 0 and max(seeds) < 0) else ""
        form = signed if less else number
        return f"{bold}{form(mean)}{bold}" + f" ({form(low)} to {form(high)})" * interval

    names = {"kl": "KL", "js": "JS", "agree": "top-1", "all": "", "squad": "SQuAD "}
    trained = {r["row"]: f" ({r['parameters']:,} numbers)" for r in result["rows"] if r["part"] == part and
               r.get("parameters")}
    return markdown([title, *(f"{names[metric]} {names[kind]}{keep:g}" for keep, kind, metric in columns)],
                    [[name if less or not interval else f"{name}: {x.says}{trained.get(name, '')}",
                      *(cell(name, c) for c in columns)]
                     for name, x in PARTS[part].rows.items() if name != less and estimate(result, part, name, 0.1)])


def seeds_apart(result: dict, part: str) -> str:
    """How far base's two seeds are apart: what is smaller says little."""
    both = [estimate(result, part, "base", keep) for keep in PARTS[part].keeps]
    if not both[0] or len(both[0][2]) < 2:
        return ""
    return "Base with seed 1 less seed 0: " + ", ".join(signed(b - a) for _, _, (a, b) in both) + ". "


def tables(result: dict, part: str) -> str:
    kl, squad = ([(keep, kind, "kl") for keep in PARTS[part].keeps] for kind in ("all", "squad"))
    more = [(keep, kind, metric) for metric in ("js", "agree") for kind in ("all", "squad")
            for keep in PARTS[part].few]
    rows, answers = [r for r in result["rows"] if r["part"] == part], asked(result, part)
    commits, twice = (", ".join(dict.fromkeys(x)) or "none" for x in (
        (r["commit"] for r in rows), (r["row"] for r in rows if r["seed"])))
    left = ", ".join(f"{name} (seed {seed})" for _, name, seed in missing(result, [part])) or "none"
    note = (f"n = {len(answers)} answers to {len({a[0] for a in answers})} documents, "
            f"{sum(a[2] == 'squad' for a in answers)} of them SQuAD's. Two seeds: {twice}. {seeds_apart(result, part)}"
            f"Missing: {left}. Commit {commits}.")
    return "\n\n".join([table(result, part, "row: what it changes", kl), paragraph(note),
                        table(result, part, "minus base, paired", kl, "base"),
                        table(result, part, "minus base, paired", squad, "base"),
                        table(result, part, "row", squad + more, interval=False)])


def render(result: dict) -> None:
    """The blocks of ablations.md; what stands between them is written by hand."""
    whole = result["memory"]["1"]
    rows = [[f"{1 - float(k):.0%}", f"{n:,}", f"{n / whole:.4f}", k] for k, n in result["memory"].items() if k != "1"]
    head = ["compression", "bytes as stored", f"of the whole cache's {whole:,}", "promise"]
    fill(PAGE, {part: tables(result, part) for part in PARTS} | {"memory": markdown(head, rows)})


# ----------------------------------------------------------------------------------------------------- the program

def save(result: dict) -> None:
    """A line for each row, so that a difference can be read."""
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, ensure_ascii=False)[:-1]
    text = head + ',\n"rows": [\n' + ",\n".join(json.dumps(r, ensure_ascii=False) for r in result["rows"]) + "\n]}\n"
    write_atomic(RESULT, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def missing(result: dict, wanted) -> list[tuple]:
    """(part, row, seed) that are not there yet: first seeds first, then as `wanted`, beginnings of names, has it."""
    every = [("choice", name, seed) for name, row in CHOICE.items() for seed in (0, 1)[:2 - (row.scores == "kvzip")]]
    every += [("routing", name, seed) for name, v in ROUTING.items() for seed in (0, 1)[:1 + v.twice]]
    every += [("long", name, seed) for name in LONG for seed in (0,)]
    done = {(r["part"], r["row"], r["seed"]) for r in result["rows"]}
    place = {x: [f"{x[0]}/{x[1]}".startswith(w) for w in wanted] for x in every if x not in done}
    return sorted((x for x in place if any(place[x])), key=lambda x: (x[2], place[x].index(True)))


def main() -> None:
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("rows", nargs="*", default=[""], metavar="ROW", help="how the rows' names begin, such as choice/eta")
    wanted, commit = p.parse_args().rows, provenance(HELD_OUT)["commit"]
    names = [f"{where}/{name}" for where, part in PARTS.items() for name in part.rows]
    if odd := [w for w in wanted if not any(name.startswith(w) for name in names)]:
        raise BadInput(f"no row's name begins with {odd[0]!r}; expected the beginning of one, such as {names[0]}")
    if not T.SQUAD.is_file():
        raise BadInput(f"{T.SQUAD}: no such file, expected one in SQuAD's layout")
    keep_freed_memory()
    folder = fetch()
    tok, model = Tokenizer(folder), load_llama(folder, dtype=torch.bfloat16)
    cases = {p.context: T.fidelity(tok, DOCUMENTS, HELD_OUT, p.context, "wiki,sotu", SHARDS, T.SQUAD)
             for p in PARTS.values()}
    answers = {str(n): [[i, c.unit, q.kind, len(q.answer)] for i, c in enumerate(x) for q in c.queries]
               for n, x in cases.items()}
    result = read_json(RESULT) if RESULT.exists() else {"model": "SmolLM2-135M-Instruct, Q4_1 dequantised, bf16",
                                                        "answers": answers, "rows": []}
    if result["answers"] != answers:
        raise BadInput(f"{RESULT}: it was judged on other documents; move it away")
    shards = [Shard(f, "train", tok) for f in prepare(["wiki", "sotu"], tok, SHARDS)]
    if "memory" not in result:
        result["memory"] = memory(model, shards, Compressor(model.cfg, CompressorConfig()))
    memo = {}

    @once
    def documents(context: int, every: int) -> list[Document]:
        return [Document.read(model, c.context, c.n_protect).with_judge(model, tok, c) for c in cases[context][::every]]
    for where, name, seed in missing(result, wanted):
        part = PARTS[where]
        memo["windows"] = memo.get("windows") or windows(model, tok, shards, WINDOWS, 400)
        if part.window and part.window not in memo:
            memo[part.window] = lessons(model, tok, shards, STEPS, part.window)
        judges, start = documents(part.context, part.every), time.perf_counter()
        if part.window:
            made = routing_row(part.rows[name], seed, model, part, judges, memo)
        else:
            made = choice_row(part.rows[name], seed, model, tok, judges, memo)
        seconds = round(time.perf_counter() - start)
        print(where, name, seed, seconds, {k: round(sum(v) / len(v), 3) for k, v in made["kl"].items()}, flush=True)
        result["rows"].append({"part": where, "row": name, "seed": seed, "seconds": seconds,
                               "commit": commit, **made})
        save(result)
    save(result)
    render(result)


if __name__ == "__main__":
    run_program(main)
