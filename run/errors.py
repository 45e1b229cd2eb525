"""What every program here shares: the error a user sees, files written whole or not at all, and how a program ends."""
import json
import os
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


def read_json(path) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise BadInput(f"{path}: a JSON {type(value).__name__}, expected an object; write it again")
        return value
    except OSError as e:
        raise BadInput(f"{path}: {(e.strerror or str(e)).lower().replace(' or directory', '')}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise BadInput(f"{path}: not valid JSON ({e}); write it again") from None


@contextmanager
def reading(path):
    """Whatever goes wrong while `path` is read and looked at becomes the one line that names it."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        what = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise BadInput(f"{path}: cannot be read as expected ({what})") from None


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
    return {"threads": torch.get_num_threads(), "command": " ".join([launcher, *sys.argv]), "commit": commit,
            "seed": seed}


def run_program(main) -> None:
    """Run main(); BadInput becomes one line on stderr and exit code 2, Ctrl-C exit code 130. Anything else is a bug
    of ours, and keeps its traceback."""
    try:
        main()
    except BadInput as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
