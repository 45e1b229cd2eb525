"""The flags of compress.py, and what all programs need for theirs.

They stand apart so that they are checked before torch is imported, which takes
seconds.
"""
import argparse
import math
import os
from pathlib import Path

from run.errors import BadInput, Parser, reading


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", metavar="DIR",
        help="folder of a Llama, Mistral or Qwen in the Hugging Face layout; without it: "
        "SmolLM2-135M-Instruct, which is downloaded on first use. A text must fit into the "
        "model's sliding window, if it has one")
    parser.add_argument(
        "--system", metavar="TEXT",
        help="system prompt; default: the one of the model's chat template")
    parser.add_argument(
        "--device", type=device_flag, default="auto",
        help="cpu, cuda, mps, or auto (default): cuda, else mps, else cpu")
    parser.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="dtype of the frozen model; auto (default): bf16 where the device has units for it")


def device_flag(text: str) -> str:
    """The `type` of --device: auto, or a device such as cuda or cuda:1."""
    if text.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected auto, cpu, cuda or mps")
    return text


def seed_flag(text: str) -> int:
    """The `type` of --seed."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^32 - 1")
    return int(text)


def fraction_flag(text: str) -> float:
    """The `type` of --keep."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a fraction such as 0.1, at most 1")
    return value


def lines_flag(text: str) -> tuple[int, int]:
    """The `type` of --keep-lines: "10-20" -> (10, 20), and "10" -> (10, 10)."""
    first, _, last = text.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected lines such as 10-20, counted from 1")
    return int(first), int(last)


def find_adapter(path, flag: str = "--adapter") -> Path:
    """The folder of an adapter, or the adapter in the folder of a training run."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / "adapter.json").exists():
            return folder
    raise BadInput(
        f"{flag} {path}: no adapter.json in it, nor in {Path(path) / 'adapter'}; "
        "expected a folder that train.py has written, or its --out"
    )


def parse_compress_flags() -> argparse.Namespace:
    """The command line of compress.py. Errors: BadInput."""
    p = Parser(description="Compress the cache of a text and answer questions from it.")
    p.add_argument("--context", metavar="FILE", help="text to compress; - for standard "
                   "input; default: data/lighthouse.txt")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--keep", type=fraction_flag, help="fraction of the text's tokens to "
                      "keep, on average over heads; default 0.1")
    size.add_argument("--tokens", type=int, help="the same as a number of tokens")
    p.add_argument("--keep-text", action="append", metavar="TEXT", help="a passage of the text "
                   "that all heads keep, wherever it stands, beside what --keep keeps; repeatable")
    p.add_argument("--keep-lines", action="append", type=lines_flag, metavar="FIRST-LAST",
                   help="lines of the file, not as printed, that all heads keep, counted from 1; "
                   "repeatable")
    p.add_argument("--question", action="append", metavar="TEXT", help="repeatable")
    p.add_argument("--plain", action="store_true", help="ask the bare question; otherwise the "
                   "default model is told to extract the answer from the text")
    p.add_argument("--chat", action="store_true", help="talk about the text, turn by turn, on the "
                   "compressed cache; Ctrl-D ends it")
    p.add_argument("--adapter", metavar="DIR", help="a trained compressor; default: the "
                   "shipped one, for the default model")
    p.add_argument("--html", metavar="FILE", help="write a page that shows which heads "
                   "keep which token, and the answers, at several keep ratios")
    p.add_argument("--save", metavar="FILE", help="write the compressed cache to a file, with "
                   "--chat after the conversation")
    p.add_argument("--load", metavar="FILE", help="ask a saved cache, or go on with --chat; no "
                   "text is read")
    p.add_argument("--max-new-tokens", type=int, default=64, help="default 64")
    p.add_argument("--temperature", type=float, default=0.0, help="0, the default, is "
                   "greedy decoding")
    p.add_argument("--seed", type=seed_flag, help="of sampling with --temperature; default 0")
    add_model_flags(p)
    args = p.parse_args()

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise BadInput("this program is one process; start it without torchrun")
    check_together(p, args)
    if args.keep is None and args.tokens is None:
        args.keep = 0.1
    if args.tokens is not None and args.tokens < 1:
        p.error(f"--tokens is {args.tokens}, expected at least 1")
    for flag in ("question", "keep_text"):
        if not all(text.strip() for text in getattr(args, flag) or ()):
            p.error(f"--{flag.replace('_', '-')} is empty; give it some words")
    if args.max_new_tokens < 1:
        p.error(f"--max-new-tokens is {args.max_new_tokens}, expected at least 1")
    if not 0 <= args.temperature < math.inf:
        p.error(f"--temperature is {args.temperature}, expected 0 or more")
    if args.seed is not None and not args.temperature:
        p.error("--seed is for sampling; give a --temperature above 0, too")
    args.seed = args.seed or 0
    if args.load is not None and not Path(args.load).is_file():
        p.error(f"--load {args.load}: no such file")
    check_readable(args.context, args.adapter, args.weights)
    check_written(p, args)
    return args


def check_weights_folder(folder) -> None:
    """Errors: BadInput for one that cannot be a model's."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder; expected one with a model's weights")
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder}: no config.json in it; expected the folder of a model")


def check_readable(text=None, adapter=None, weights=None) -> None:
    """Refuse what is not there, before anything else takes time. Errors: BadInput.

    text: a file, or "-"; adapter, weights: folders.
    """
    if text is not None and text != "-":
        with reading(text, "expected a file of UTF-8 text"):
            open(text, "rb").close()
    if adapter is not None:
        find_adapter(adapter)
    if weights is not None:
        check_weights_folder(weights)


def check_written(p: Parser, args: argparse.Namespace) -> None:
    """Refuse to write to a folder, or over a file that is not ours.

    Whether --save names a saved cache is seen later, by check_save.
    """
    for flag in ("save", "html"):
        path = getattr(args, flag)
        if path is None:
            continue
        if not path or Path(path).is_dir():
            p.error(f"--{flag} {path!r}: expected the name of a file")
        if not os.path.exists(path):
            continue
        text = args.context or ""
        if os.path.exists(text) and os.path.samefile(path, text):
            p.error(f"--{flag} {path} is the text itself; give another name")
        if flag == "html" and Path(path).suffix != ".html":
            p.error(f"--html {path}: a file is there that is no page; give a name that ends in "
                    ".html")


def check_together(p: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if args.load is not None:
        for flag in ("context", "keep", "tokens", "keep_text", "keep_lines", "adapter", "html"):
            if getattr(args, flag) is not None:
                p.error(f"--{flag.replace('_', '-')} does not go with --load, which uses a "
                        "cache as it is")
        if args.system is not None:
            p.error("--system does not go with --load: the saved cache has its system prompt")
        if args.save is not None and not args.chat:
            p.error("--save does not go with --load; only a conversation (--chat) changes a cache")
        if not args.question and not args.chat:
            p.error("--load needs --chat, or at least one --question")
    if args.chat:
        if args.plain:
            p.error("--plain does not go with --chat, which always sends what you type")
        for flag in ("question", "html"):
            if getattr(args, flag):
                p.error(f"--{flag} does not go with --chat, in which you type what you ask")
        if args.context == "-":
            p.error("--context - reads standard input, and so does --chat; give a file")
