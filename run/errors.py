"""What every program needs: one-line errors, atomic files, an orderly end.

Nothing of ours and no torch is imported here, so a program can check its flags
before torch is loaded.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent
UMASK = os.umask(0)  # the only way to ask for it is to set it
os.umask(UMASK)

# Numbers in JSON are refused beyond this, because sums and products of them would
# overflow. Many a tokenizer_config.json holds 1e30, which means "no limit".
LARGEST_NUMBER = 1e32


class BadInput(Exception):
    """Something that the user gave is wrong; the message is the one line they see."""

    def __init__(self, message):
        # It may quote a file from a stranger, so control characters are escaped.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
        if len(line) > 1000:
            line = f"{line[:600]} … {line[-300:]}"
        super().__init__(line)


# ---------------------------------------------------------------------- reading

@contextmanager
def reading(path, advice: str = "write, train or download it again"):
    """Turn whatever goes wrong in the block, which reads a file, into one line.

    No list of what can be wrong in a file from a stranger is complete. The
    block checks sizes before it takes memory; after the block, the program
    trusts what it read. Links are followed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, BadInput) or type(error).__name__ == "OutOfMemoryError":
            raise  # it has its own line; it is not the file's fault
        cause = str(error).removeprefix(f"{path}: ")  # model.py names the file itself
        if isinstance(error, OSError):
            cause = (error.strerror or cause).lower().replace(" or directory", "")
        elif not isinstance(error, (ValueError, SafetensorError)):
            cause = f"not as expected ({type(error).__name__}: {error})"
        raise BadInput(f"{path}: {cause}; {advice}") from error


def expect(value, *kinds):
    """The value, if its type is one of `kinds`. For use in `reading`.

    A bool is no int here.
    """
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{value!r:.50} where {names} was expected")
    return value


def parse_number(digits: str) -> int | float:
    """A number in JSON. Errors: ValueError for NaN, and beyond LARGEST_NUMBER."""
    value = float(digits)
    if not abs(value) <= LARGEST_NUMBER:
        raise ValueError(f"{digits:.20} is not finite, or larger than {LARGEST_NUMBER}")
    return int(digits) if digits.lstrip("-").isdecimal() else value


def parse_json(text: str) -> dict:
    """A JSON object, its numbers and characters checked. For use in `reading`."""
    try:
        value = json.loads(
            text, parse_int=parse_number, parse_float=parse_number, parse_constant=parse_number)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None

    expect(value, dict)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    return value


def read_json(path) -> dict:
    with reading(path):
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))


# ---------------------------------------------------------------------- writing

def write_atomic(path, write) -> None:
    """Write a file that is always complete: with its old or its new content.

    write: called with a temporary path beside it. What a killed writer left
    there is removed once it is an hour old, for a younger file may belong to a
    writer that lives, perhaps on another host.
    """
    path = Path(path)
    unique = f"{os.getpid()}-{os.urandom(4).hex()}"  # process numbers repeat on other hosts
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors makes its files private
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"{path}: cannot be written ({error}); what was there before is still there") from None
    finally:
        with suppress(OSError):
            temporary.unlink()

    with suppress(OSError):
        for file in path.parent.iterdir():
            ours = file.name.startswith(f".{path.name}.") and file.suffix == ".tmp"
            if ours and time.time() - file.stat().st_mtime > 3600:
                file.unlink()


def write_json(path, value, indent: int | None = 2) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def provenance(seed: int) -> dict:
    """Where a number comes from: threads, command, commit and seed.

    Call it before the work, because the code may change during it.
    """
    import torch  # which takes seconds: not before the flags are checked

    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(describe, text=True, capture_output=True, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"  # no git, or not a checkout

    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        # without --, torchrun would take our --n for its own
        launcher = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']} --"
    return {
        "threads": torch.get_num_threads(),
        "command": f"{launcher} {shlex.join(sys.argv)}",
        "commit": commit,
        "seed": seed}


# --------------------------------------------------------------------- programs

class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, without the usage."""

    def parse_known_args(self, args=None, namespace=None):
        for arg in sys.argv[1:] if args is None else args:
            if any("\ud800" <= c <= "\udfff" for c in arg):  # bytes that Python could not read
                raise BadInput(f"{arg}: not in UTF-8; rename the file")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        if unknown and not unknown.startswith("-"):
            message += "; a value stands behind its flag"
        for flag in get_close_matches(unknown, self._option_string_actions, n=1):
            message += f"; did you mean {flag}?"
        raise BadInput(f"{message} (--help lists the flags)" if "argument" in message else message)


def leave(code: int) -> None:
    """End one of torchrun's processes without Python's own shutdown.

    A thread of torch may wake during that and abort the process, with
    everything written, and then torchrun calls the run failed (a third of the
    runs on a busy machine).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_input_error(error: Exception) -> bool:
    """Whether it is BadInput, or comes from a `raise ValueError` in model.py.

    model.py is a file to copy into other projects, so it knows no BadInput.
    """
    if isinstance(error, BadInput):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    if Path(last.filename).resolve() != ROOT / "model.py" or "raise" not in last.line:
        return False
    return type(error) is ValueError


def run_program(main, is_last: bool = True) -> None:
    """Run main(); what the user caused ends it with one line, not a traceback.

    is_last: whether the program ends with it. If it goes on, signals have their
        usual effect again until the next call.

    Exit codes: 2 for bad input, 128 + the signal for SIGTERM or Ctrl-C. Any
    other exception is a bug of ours and keeps its traceback. A second signal
    ends the program at once.

    Programs have these lines before they import torch, which takes seconds:
        if __name__ == "__main__":
            run_program(parse_args, is_last=False)
    """
    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    name = Path(sys.argv[0]).name
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    signal.signal(signal.SIGINT, stop)
    if not under_torchrun:  # which ends processes that wait for others at once, and says so
        signal.signal(signal.SIGTERM, stop)

    code = None  # goes on, once main() has returned
    try:
        main()
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code or 0
    except BrokenPipeError:  # of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print(f"{name}: stopped by {signal.Signals(number).name}", file=sys.stderr)
        code = 128 + number
    except Exception as error:
        if not is_input_error(error):
            raise
        print(f"{name}: error: {BadInput(error)}", file=sys.stderr)
        code = 2

    if under_torchrun and (is_last or code is not None):
        leave(code or 0)
    if code is not None:
        sys.exit(code)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not under_torchrun:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
