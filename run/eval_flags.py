"""The methods that eval.py compares, and its flags.

They stand apart so that flags are checked before torch is imported, which takes
seconds.
"""
import argparse
import os
from pathlib import Path

from data import tasks
from data.prepare import SHARDS
from data.tasks import METRICS
from run.errors import BadInput, Parser, reading
from run.flags import add_model_flags, check_readable, seed_flag

# Methods that select from the full cache, as (whose scores rank the entries, who shares a
# budget). A new one needs its scores in `Document.scores` of eval.py, and, if it keeps
# recent tokens, a line in `Document.kept`.
#   head        each head has a budget of its own
#   layer       the heads of a layer share one
#   all         all heads share one
#   compressor  the compressor's own rule: all heads share one, and each keeps
#               a few recent tokens (an adapter with --selection token: all heads
#               keep the same tokens)
# Not in this table are "full", "none", and two others. "kvdistill" encodes the tokens that
# its scorer selects with LoRA ("routing"), and keeps registers. "kvdistill:random" does
# the same with a random selection.
BASELINES = {
    "random": ("random", "compressor"),
    "streaming": ("streaming", "head"),
    "h2o": ("h2o", "head"),
    "snapkv": ("snapkv", "head"),
    "adasnapkv": ("snapkv", "layer"),
    "kvzip": ("kvzip", "all"),
    "kvzip:recent": ("kvzip", "compressor"),
    "kvzip:equal": ("kvzip", "head"),
    "no-routing": ("scorer", "compressor"),  # the trained selection, no LoRA, no registers
}
METHODS = ("full", "none", *BASELINES, "kvdistill", "kvdistill:random")
DEFAULT_METHODS = "full,none,random,kvzip,kvzip:recent,no-routing,kvdistill,kvdistill:random"
DEFAULT_KEEPS = [0.5, 0.25, 0.1, 0.05]
NOT_WITH_ASK = ("tasks", "n", "split", "data", "shards", "context", "pack", "lengths", "depths",
                "against", "out")


def names(known):
    """The type of a flag that lists names, separated by commas."""
    def parse(text: str) -> list[str]:
        found = list(dict.fromkeys(text.split(",")))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown, expected some of "
                                                 f"{', '.join(known)}")
        return found
    return parse


def numbers(kind: type, low: float, high: float, expected: str | None = None):
    """The type of a flag that lists numbers, separated by commas."""
    expected = expected or f"numbers from {low} to {high}"

    def parse(text: str) -> list:
        try:
            values = [kind(x) for x in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(low <= x <= high for x in values):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}, separated by commas")
        return list(dict.fromkeys(values))
    return parse


def data_source(text: str) -> tuple[str, str]:
    """The type of --data: a task, and its file or sources."""
    task, _, path = text.partition("=")
    if task not in METRICS or "" in path.split(","):
        raise argparse.ArgumentTypeError(f"{text!r}: expected TASK=PATH with a task of "
                                         f"{', '.join(METRICS)}")
    return task, path


def parse_args() -> argparse.Namespace:
    p = Parser(description="Measure what a compressed cache keeps.")
    p.add_argument("--tasks", type=names(METRICS), default="fidelity", metavar="LIST",
                   help=f"of {', '.join(METRICS)}; default fidelity")
    p.add_argument("--methods", type=names(METHODS), default=DEFAULT_METHODS, metavar="LIST",
                   help=f"of {', '.join(METHODS)}; default {DEFAULT_METHODS}")
    fractions = numbers(float, 1e-6, 1, "fractions above 0, at most 1")
    p.add_argument("--keep", type=fractions, default=DEFAULT_KEEPS, metavar="LIST",
                   help="kept fractions of a document; 1 is the full cache; default "
                   "0.5,0.25,0.1,0.05")
    p.add_argument("--n", type=int, default=20, help="fidelity, ends: documents per kind of "
                   "question; squad, choice: questions; summary, niah: documents; cost: repeats; "
                   "default 20")
    p.add_argument("--split", choices=tasks.SPLITS, default="all", help="fidelity, ends, "
                   "squad, and niah's essays: the texts to choose by (dev), those to report "
                   "(test), or, by default, all")
    p.add_argument("--data", type=data_source, action="append", default=[], metavar="TASK=PATH",
                   help="repeatable: squad=FILE (also adds the kind squad to fidelity), "
                   "summary=FILE, choice=FILE, niah=TEXT or cost=TEXT (default: essays), "
                   "fidelity=SOURCES or ends=SOURCES (built-in or folders; default wiki,sotu)")
    p.add_argument("--shards", default=SHARDS, metavar="DIR",
                   help="fidelity, ends: the folder for tokens; default data/shards")
    p.add_argument("--context", type=int, default=512,
                   help="fidelity, ends: compressible tokens per document; default 512")
    p.add_argument("--pack", type=int, default=1,
                   help="squad: paragraphs per document; default 1")
    p.add_argument("--lengths", type=numbers(int, 64, 1 << 20), default="512,1024", metavar="LIST",
                   help="niah, cost: compressible tokens; default 512,1024")
    p.add_argument("--depths", type=numbers(float, 0, 1), default="0,0.25,0.5,0.75,1",
                   metavar="LIST", help="niah: where needles lie; default 0,0.25,0.5,0.75,1")
    p.add_argument("--against", choices=METHODS, metavar="METHOD",
                   help="add the paired difference of every method to this one")
    p.add_argument("--adapter", metavar="DIR", help="the trained compressor; default: the "
                   "shipped one, which fits the default model")
    p.add_argument("--seed", type=seed_flag, default=0,
                   help="of the documents and of random scores; default 0")
    p.add_argument("--out", metavar="FILE", help="write the result as JSON, and the answers beside "
                   "it as .jsonl.gz; the same command goes on where it was stopped")
    p.add_argument("--ask", metavar="FILE", help="no task: answer the questions about this text "
                   "from the caches of several methods")
    p.add_argument("--question", action="append", metavar="TEXT",
                   help="asked about the text of --ask; repeatable")
    p.add_argument("--plain", action="store_true", help="with --ask: ask the bare question, as "
                   "compress.py --plain does")
    add_model_flags(p)
    args = p.parse_args()

    if (args.ask is None) != (args.question is None):
        p.error("--ask FILE and --question TEXT go together: give both, or neither")
    if args.plain and args.ask is None:
        p.error("--plain goes with --ask")
    default = p.parse_args([])
    for flag in NOT_WITH_ASK:
        if args.ask is not None and getattr(args, flag) != getattr(default, flag):
            p.error(f"--{flag} does not go with --ask, which only prints answers")
    args.data = dict(args.data)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before any weights are loaded."""
    if args.ask is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        raise BadInput("--ask is one process; start it without torchrun")
    if not all(question.strip() for question in args.question or ()):
        raise BadInput("--question is empty; ask something")
    for flag, least in (("n", 1), ("pack", 1), ("context", 16)):
        if getattr(args, flag) < least:
            raise BadInput(f"--{flag} is {getattr(args, flag)}, expected at least {least}")
    if args.pack > 1 and "squad" not in args.tasks:
        raise BadInput("--pack is for --tasks squad")
    check_readable(args.ask, args.adapter, args.weights)
    for task, path in args.data.items():
        if task not in ("fidelity", "ends"):  # these have sources
            with reading(path, f"expected the file of --data {task}"):
                open(path, "rb").close()
    if args.against is not None and args.against not in args.methods:
        raise BadInput(f"--against {args.against}: expected one of --methods "
                       f"({','.join(args.methods)})")
    for task in args.tasks:
        if task in ("squad", "summary", "choice") and task not in args.data:
            raise BadInput(f"task {task} needs its file: --data {task}=PATH (results/README.md "
                           "says where to get one)")
    if args.out is not None and (not args.out or Path(args.out).is_dir()):
        raise BadInput(f"--out {args.out!r}: expected the name of a file")
