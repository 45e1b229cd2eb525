"""The edges of compress.py: what it can be told, what it refuses before weights are loaded."""
import argparse
import os
import sys
from pathlib import Path

from run.errors import BadInput, Parser, reading
from run.models import add_model_flags, seed_flag


def parse_args() -> argparse.Namespace:
    p = Parser(description="Compress the cache of a text and answer questions from it.", allow_abbrev=False)
    p.add_argument("--context", metavar="FILE", help="text to compress, - for standard input; default: one in data/")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--keep", type=float, help="kept fraction of the compressible tokens; default 0.1")
    size.add_argument("--tokens", type=int, help="kept tokens, as an absolute number, per head on average")
    p.add_argument("--question", action="append", metavar="TEXT", help="asked of every cache; repeatable")
    p.add_argument("--method", metavar="NAME", help="answer from a training-free cache as well, of as many tokens: "
                   "kvzip, random and others (an unknown name lists them)")
    p.add_argument("--html", metavar="FILE", help="write a page of its own to look at: which heads keep which token, "
                   "and the answers, at several kept fractions")
    p.add_argument("--adapter", metavar="DIR", help="trained compressor, or the folder of the run that trained it; "
                   "default: newest in out/, else of adapters/")
    p.add_argument("--save", metavar="FILE", help="write the short cache (never that of --method) to this safetensors "
                   "file")
    p.add_argument("--load", metavar="FILE", help="ask a saved cache: no document, no prefill")
    p.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens; default 64")
    p.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy decoding")
    p.add_argument("--seed", type=seed_flag, default=0, help="of the sampling, and of an untrained compressor")
    add_model_flags(p)
    a = p.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise BadInput("this program is one process; start it without torchrun (train.py and eval.py can be shared)")
    made = (a.context, a.keep, a.tokens, a.adapter, a.save, a.method, a.html)
    if a.load is not None and any(x is not None for x in made):
        p.error("--load asks a cache as it is: no --context, --keep, --tokens, --adapter, --save, --method or --html "
                "goes with it")
    if a.load is not None and not a.question:
        p.error("--load needs at least one --question")
    if not all(q.strip() for q in a.question or ()):
        p.error("--question is empty; ask something")
    if a.max_new_tokens < 1:
        p.error(f"--max-new-tokens is {a.max_new_tokens}: at least 1 is needed")
    for flag, path in (("--save", a.save), ("--html", a.html)):
        if path is not None and (not path or Path(path).is_dir()):
            p.error(f"{flag} {path!r}: expected the name of a file")
    if not 0 <= a.temperature < float("inf"):
        p.error(f"--temperature is {a.temperature}: 0, or a number above it, is needed")
    if a.keep is None and a.tokens is None:
        a.keep = 0.1
    return a


def find_adapter(path, name: str = "--adapter") -> Path:
    """The adapter that the flag `name` gives: its folder, or that of the run that trained it."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / "adapter.json").exists():
            return folder
    raise BadInput(f"{name} {path}: no adapter.json in it, nor in {Path(path) / 'adapter'}; expected a folder that "
                   "train.py has written, adapter/ below its --out (an unfinished run has none)")


def read_text(path) -> str:
    with reading(path, "expected a file of UTF-8 text"):
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise BadInput(f"{path}: the context is empty; there is nothing to compress")
    return text.strip()
