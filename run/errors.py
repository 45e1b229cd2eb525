"""What every program here shares: the error a user sees, files written whole or not at all, and how a program ends."""
import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError


UMASK = os.umask(0)  # the only way to ask for it is to set it
os.umask(UMASK)


class BadInput(Exception):
    """Something the user gave us is wrong; the message is the one line they see, and the exit code is 2."""

    def __init__(self, message):
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))  # it may quote a stranger's file
        super().__init__(line if len(line) <= 1000 else f"{line[:600]} … {line[-300:]}")


@contextmanager
def reading(path, advice: str = "write, train or download it again"):
    """Whatever goes wrong in the block, which reads a file that the user named, becomes the one line that names file
    and cause: no list of what can be wrong in a stranger's file is complete. Sizes are checked in the block before
    memory is taken; what follows a clean exit may trust what was read. Links are followed: they are the user's."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):  # it has its sentence; it is no fault of the file
        raise
    except Exception as e:
        cause = (e.strerror or str(e)).lower().replace(" or directory", "") if isinstance(e, OSError) else str(e)
        if not isinstance(e, (OSError, ValueError, SafetensorError)):
            cause = f"not as expected ({type(e).__name__}: {e})"
        raise BadInput(f"{path}: {cause}; {advice}") from e


def expect(value, *kinds):
    """The value, if its type is one of `kinds` (a bool is no int here); for what is read from files, in `reading`."""
    if type(value) not in kinds:
        raise ValueError(f"{value!r:.50} where {' or '.join(k.__name__ for k in kinds)} was expected")
    return value


def write_atomic(path, write) -> None:
    """Call write(temporary path), flush to disk, then rename: `path` holds either the old file or the whole new one."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")  # process numbers repeat on hosts
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(tmp, 0o666 & ~UMASK)  # safetensors makes its files private
        os.replace(tmp, path)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot be written ({e}); what was there before is still there") from None
    finally:
        if tmp.exists():
            tmp.unlink()


def write_json(path, value, indent: int | None = 2) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    write_atomic(path, lambda tmp: tmp.write_text(text + "\n", encoding="utf-8"))


def finite(digits: str) -> float:
    if not math.isfinite(x := float(digits)):
        raise ValueError(f"{digits:.20} is not a finite number")
    return x


def parse_json(text: str) -> dict:
    """A JSON object with finite numbers and whole characters; for use in `reading`."""
    try:
        value = expect(json.loads(text, parse_float=finite, parse_constant=finite), dict)
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"not valid JSON ({e})") from None
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    return value


def read_json(path) -> dict:
    with reading(path):
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))


def provenance(seed: int) -> dict:
    """Where a number comes from: threads, command, commit, seed. Call it before the work: the code may change after."""
    try:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], text=True,
                             capture_output=True, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"  # no git, or not a checkout
    many = os.environ.get("LOCAL_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    launcher = f"torchrun --nproc_per_node {many} --" if many else "python"  # without --, it takes our --n for its own
    return {"threads": torch.get_num_threads(), "command": f"{launcher} {shlex.join(sys.argv)}", "commit": commit,
            "seed": seed}


class Parser(argparse.ArgumentParser):
    """Flags; what is wrong with them is one line, without the usage."""

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)" if "argument" in message else message)


def leave(code: int) -> None:
    """End one of torchrun's processes without Python's own shutdown: a thread of torch's that wakes in it aborts the
    process, with everything written, and torchrun calls the run failed (a third of runs on a busy machine)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_program(main) -> None:
    """Run main(). What ends it early is one line on stderr: BadInput, with exit code 2; SIGTERM or a first Ctrl-C, with
    128 + the signal (the second one waits for nothing). Anything else is a bug of ours, and keeps its traceback.

    Programs have two lines before they import torch or numpy, which take long enough for a Ctrl-C and a traceback:
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run_program: Ctrl-C just ends it
    """
    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGINT, stop)
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun ends processes at once that wait for others, and says so
        signal.signal(signal.SIGTERM, stop)
    code = 0
    try:
        main()
        sys.stdout.flush()
    except SystemExit as e:
        code = e.code or 0
    except BadInput as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        print(f"{name}: stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}", file=sys.stderr)
        code = 128 + number
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave(code)
    if code:
        sys.exit(code)
