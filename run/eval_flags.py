"""What an evaluation can be told: its flags, what is refused before weights are loaded, and the documents they mean."""
import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from data import tasks as T
from data.fetch import fetch
from data.prepare import SHARDS
from data.samples import Case
from data.tasks import MAX_NEW_TOKENS, METRICS
from model import Llama
from run.compress_flags import find_adapter
from run.errors import BadInput, Parser, read_json
from run.models import add_model_flags, pick_dtype, seed_flag
from run.world import World

KEEPS = (0.5, 0.25, 0.1, 0.05)


def parse_args(methods, default: str) -> argparse.Namespace:
    """methods: the known ones' names; default: those that are measured without the flag."""
    p = Parser(description="What a short cache keeps: tasks, baselines, cost.")
    p.add_argument("--tasks", default="fidelity", help=f"comma-separated, of {', '.join(METRICS)}; default fidelity")
    p.add_argument("--methods", default=default, help=f"comma-separated, of {', '.join(methods)}; default "
                   f"{default}")
    p.add_argument("--keep", default=",".join(map(str, KEEPS)), help="kept fractions, 1 the whole cache; default "
                   "0.5,0.25,0.1,0.05")
    p.add_argument("--n", type=int, default=20, help="fidelity: documents per kind; squad, choice: questions; "
                   "summary: documents; niah: documents, rounded up to fill the grid evenly; cost: repeats; default 20")
    p.add_argument("--data", action="append", default=[], metavar="TASK=PATH", help="repeatable: squad=FILE, "
                   "summary=FILE, choice=FILE, niah=TEXT or cost=TEXT (default: essays), fidelity=SOURCES "
                   "(built-in or folders of texts; default: wiki,sotu)")
    p.add_argument("--shards", default=SHARDS, metavar="DIR", help="fidelity: folder for tokens; default: data/shards")
    p.add_argument("--pack", type=int, default=1, help="squad: paragraphs per document; default 1")
    p.add_argument("--context", type=int, default=512, help="fidelity: compressible tokens per document; default 512")
    p.add_argument("--lengths", default="512,1024", help="niah, cost: compressible tokens; default 512,1024")
    p.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="niah: where needles lie; default 0,0.25,0.5,0.75,1")
    p.add_argument("--against", metavar="METHOD", help="add each cell's paired difference to this method")
    p.add_argument("--truncate", action="store_true", help="cut the ends of documents that are too long for the "
                   "model's positions (not of niah and cost)")
    p.add_argument("--adapter", metavar="DIR", help="trained compressor; default: newest in out/, else of adapters/")
    p.add_argument("--seed", type=seed_flag, default=0, help="of the documents and of random choices; default 0")
    p.add_argument("--out", metavar="FILE", help="results as JSON, answers beside it as .jsonl.gz; a run goes on "
                   "where it stopped")
    p.add_argument("--json", action="store_true", help="print the cells as one JSON line instead of the table")
    p.add_argument("--plot", action="store_true", help="draw the figures of --out beside it (needs matplotlib)")
    add_model_flags(p)
    return p.parse_args()


def numbers(a: argparse.Namespace, name: str, kind, low: float, high: float) -> list:
    text = getattr(a, name)
    try:
        values = [kind(x) for x in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= v <= high for v in values):
        example = {"keep": "0.5,0.1", "lengths": "512,1024", "depths": "0,0.5,1"}[name]
        raise BadInput(f"--{name} is {text!r}: expected numbers from {low} to {high}, such as {example}")
    return list(dict.fromkeys(values))


def check(a: argparse.Namespace, methods) -> dict:
    """Refuse what cannot work before the weights are loaded; returns the lists that the flags spell."""
    if a.adapter is not None:
        read_json(find_adapter(a.adapter) / "adapter.json")
    lists = {"tasks": a.tasks.split(","), "methods": list(dict.fromkeys(a.methods.split(",")))}
    for flag, known in (("tasks", METRICS), ("methods", methods)):
        for name in lists[flag]:
            if name not in known:
                raise BadInput(f"--{flag}: {name!r} is unknown, expected some of {', '.join(known)}")
    if a.against is not None and a.against not in lists["methods"]:
        raise BadInput(f"--against is {a.against!r}: expected one of --methods ({a.methods})")
    lists["keep"] = numbers(a, "keep", float, 1e-6, 1)
    lists["lengths"] = numbers(a, "lengths", int, 64, 1 << 20)
    lists["depths"] = numbers(a, "depths", float, 0, 1)
    if a.n < 1 or a.pack < 1 or a.context < 16:
        raise BadInput("--n and --pack must be at least 1, --context at least 16 tokens")
    lists["data"] = dict(part.partition("=")[::2] for part in a.data)
    for task, path in lists["data"].items():
        if task not in METRICS or not path:
            raise BadInput(f"--data {task}={path}: expected TASK=PATH with a task of {', '.join(METRICS)}")
        if task == "fidelity" and "" in path.split(","):
            raise BadInput(f"--data {task}={path}: an empty name in it; expected sources such as wiki,sotu")
        if task != "fidelity" and not Path(path).is_file():
            raise BadInput(f"--data {task}={path}: {'a folder' if Path(path).is_dir() else 'no such file'}; expected a "
                           "file")
    for task in ("squad", "summary", "choice"):
        if task in lists["tasks"] and task not in lists["data"]:
            raise BadInput(f"task {task} needs its file: --data {task}=PATH (results/README.md says where to get one)")
    if a.out is not None and (not a.out or Path(a.out).is_dir()):
        raise BadInput(f"--out {a.out!r}: expected the name of a file")
    if a.plot:
        if "cost" in lists["tasks"] and "full" not in lists["methods"]:
            raise BadInput("--plot draws cost against the method full; add it to --methods")
        if a.out is None:
            raise BadInput("--plot draws what --out names: give both")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise BadInput("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    return lists


def agree(a: argparse.Namespace, lists: dict, world: World) -> None:
    """Settle what several processes must have in common, --device and --dtype, before they share the documents out.
    Errors: BadInput for what they cannot share."""
    if world.world_size == 1:
        return
    if "cost" in lists["tasks"]:
        raise BadInput("--tasks cost is timed, and other processes would be in its way; run it without torchrun")
    if world.world_size > world.local_world_size:
        raise BadInput(f"{world.world_size} processes on {world.world_size // world.local_world_size} hosts: expected "
                       "one host, where they can append to one file of answers")
    if a.weights is None:
        with world.one_first():
            fetch()
    a.device = str(world.device)
    if a.dtype == "auto":
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        a.dtype = world.on_rank0(lambda: names[pick_dtype("auto", world.device)])


def build(task: str, a: argparse.Namespace, lists: dict, tokenizer, model: Llama, replay: int
          ) -> tuple[list[Case], dict]:
    """A task's cases, short enough for the model, and the settings that make them what they are. replay: see `fit`."""
    path = lists["data"].get(task)
    n = {"n": a.n}
    if task == "fidelity":
        settings = n | {"context": a.context, "sources": path or "wiki,sotu"}
        cases = T.fidelity(tokenizer, a.n, a.seed, a.context, path or "wiki,sotu", a.shards, lists["data"].get("squad"))
        if "squad" not in lists["data"]:
            print("fidelity: without the kind squad; --data squad=PATH adds it")
    elif task == "squad":
        settings = n | {"pack": a.pack}
        cases = T.squad(tokenizer, path, a.n, a.seed, a.pack)
    elif task == "niah":
        settings = n | {"lengths": lists["lengths"], "depths": lists["depths"]}
        cases = T.niah(tokenizer, path, a.n, a.seed, lists["lengths"], lists["depths"])
    elif task == "cost":
        settings = n | {"lengths": lists["lengths"], "device": str(model.device), "threads": torch.get_num_threads()}
        cases = T.cost(tokenizer, path, a.n, lists["lengths"])
    else:
        settings, cases = n, {"summary": T.summary, "choice": T.choice}[task](tokenizer, path, a.n, a.seed)
    fit(cases, task, model.cfg.max_positions, a.truncate, replay)
    content = json.dumps([asdict(c) for c in cases]).encode()
    return cases, settings | {"contexts": len(cases), "documents": hashlib.sha256(content).hexdigest()[:16]}


def fit(cases: list[Case], task: str, max_positions: int, truncate: bool, replay: int) -> None:
    """Refuse documents that leave no room for question and answer, or cut their ends off. replay: the tokens that
    KVzip reads besides the document's own, 0 without it; it needs room for some of those, too. What has a length of
    its own is not cut: a needle may stand at its end."""
    cut = 0
    for c in cases:
        asked = max(len(q.prompt) + len(q.answer) + MAX_NEW_TOKENS.get(task, 64) for q in c.queries)
        asked = max(asked, replay and min(c.n, 256) + replay)
        over = len(c.context) + asked - max_positions
        if over > 0:
            measured = task in ("niah", "cost")
            if measured or not truncate or over >= c.n:
                raise BadInput(f"{task}: document {c.unit} has {c.n} tokens, the model {max_positions} positions, "
                               "question and answer included; " + ("give smaller --lengths" if measured else
                               "--truncate cuts its end off, the answer too if it stands there"))
            c.context, cut = c.context[:-over], cut + 1
    if cut:
        print(f"{task}: {cut} documents were cut to the model's {max_positions} positions")
