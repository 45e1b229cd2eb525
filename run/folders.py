"""A training run's folder: whose it is, what is in it, and how the same command takes it up again.

    OUT/config.json               what was asked for, and for which base model
    OUT/log.jsonl                 one line per step
    OUT/state/00000050.safetensors   after 50 steps: see run/files.py
    OUT/adapter/, OUT/result.json    when training, and the table after it, are done

Nothing else has to be kept. The learning rate is a function of the step, and every random draw (contexts, kept
fractions) one of (seed, step, sample): the number of the next step stands for the schedule, the place in the data and
the state of all random generators.
"""
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from run.errors import BadInput, read_json, write_atomic, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What a resumed run may change: how a step is computed, not what; and what happens around the training.
FREE = {"micro", "chunk", "parallel", "recompute", "compile", "save_every", "eval_contexts", "out", "shards"}


def set_aside(out, step: int) -> None:
    """Rename the states after `step`, which did not read back, and remove what a killed write left behind: should they
    be readable the next time, the log would not be what they say."""
    folder = Path(out) / "state"
    for path in folder.glob("*.safetensors"):
        if int(path.stem) > step:
            path.replace(path.with_suffix(".damaged"))
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def trim_log(path, steps: int) -> None:
    """Drop the lines of a log after its first `steps`: those steps will be done again, to the same numbers."""
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[:steps] if line.endswith(b"\n")]
    if len(whole) < steps:
        print(f"warning: {path}: {len(whole)} lines where {steps} were expected; the rest is lost", file=sys.stderr)
    write_atomic(path, lambda tmp: tmp.write_bytes(b"".join(whole)))


# ----------------------------------------------------------------------------------------------- whose folder is it?

def differs(out: Path, wanted: dict) -> str:
    """Why the run in `out` is another one than `wanted` (as in config.json), in a few words; "" if it is the same."""
    if not (out / "config.json").exists():
        return "there is no config.json in it"
    found = read_json(out / "config.json")
    for part in ("train", "dtype", "base"):
        have, want = found.get(part), wanted[part]
        if part != "train" and have != want:
            return f"another {'base model' if part == 'base' else f'--dtype, {have}'}"
        for key in () if part != "train" else sorted(want.keys() - FREE):
            if (have or {}).get(key) != want[key]:
                return f"--{key.replace('_', '-')} was {(have or {}).get(key)}, now {want[key]}"
    return ""


def used(out: Path) -> bool:
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; expected a folder, or a name that is free")
    return out.exists() and any(not p.name.startswith(".") for p in out.iterdir())


def dtype_of(out: str, default: str) -> str | None:
    """The dtype of the unfinished run in the folder, fp32 or bf16: going on needs the same, and --dtype auto looks at
    the clock. None where there is no such run."""
    folder = Path(out or default)
    if not (folder / "config.json").is_file() or (folder / "result.json").exists():
        return None
    return {"float32": "fp32", "bfloat16": "bf16"}.get(read_json(folder / "config.json").get("dtype"))


@contextmanager
def alone_in(out: Path, name: str = ".lock", doing: str = "training"):
    """One run at a time that holds this lock in a folder. Errors: BadInput where another process is at it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / name, "w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{out}: another process is {doing} in it; wait for it, or give a new --out") from None
            except OSError as e:  # some network file systems have no locks
                print(f"warning: {out}: cannot be locked ({e}); make sure that no other run uses it", file=sys.stderr)
        yield


def claim(wanted: dict, out: str, default: str) -> tuple[Path, bool]:
    """The folder for a run, and whether the run in it is finished already. A new or the same run may have it.

    wanted: the content of config.json; out: --out, or "": then the first of default, default-2, … that is free or holds
    this very run, unfinished. Errors: BadInput when --out names the folder of another run.
    """
    if out:
        folder = Path(out)
        why = differs(folder, wanted) if used(folder) else ""
        if why:
            raise BadInput(f"{folder} holds another run ({why}); give a new --out, or delete that folder")
        return folder, (folder / "result.json").exists()
    folder, i = Path(default), 1
    while used(folder) and ((folder / "result.json").exists() or differs(folder, wanted)):
        i += 1
        folder = Path(f"{default}-{i}")
    return folder, False


def sign(out: Path, wanted: dict) -> None:
    """Write config.json, unless this run has been begun before."""
    if not (out / "config.json").exists():
        write_json(out / "config.json", wanted)


def append_line(file, value: dict, sync: bool = False) -> None:
    """One JSON line at the end of a log opened unbuffered, visible to others at once; sync: and on the disk. Errors:
    BadInput if it cannot be written."""
    try:
        file.write(json.dumps(value).encode() + b"\n")
        if sync:
            os.fsync(file.fileno())
    except OSError as e:
        raise BadInput(f"{file.name}: cannot be written ({e}); the last state in {Path(file.name).parent} is good, so "
                       "make room and give the same command again") from None


class Signals:
    """SIGTERM and Ctrl-C ask for a stop, which the loop grants between two steps; a second Ctrl-C does not wait."""

    def __enter__(self):
        self.got = 0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        if number == self.got == signal.SIGINT:
            raise KeyboardInterrupt
        self.got = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
