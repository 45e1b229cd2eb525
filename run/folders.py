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

from run.errors import BadInput, read_json, reading, write_atomic, write_json
from run.files import load_state, state_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What a resumed run may change: how a step is computed, not what; and what happens around the training.
FREE = {"init_adapter", "micro", "chunk", "parallel", "recompute", "compile", "save_every", "eval_contexts", "out",
        "shards"}


def set_aside(out, step: int) -> None:
    """Rename the states after `step`, which did not read back, and remove what a killed write left behind: should they
    be readable the next time, the log would not be what they say."""
    for path in state_files(out):
        if int(path.stem) > step:
            path.replace(path.with_suffix(".damaged"))
    for path in (Path(out) / "state").glob(".*.tmp"):
        path.unlink(missing_ok=True)


def trim_log(path, steps: int) -> None:
    """Drop the lines of a log after its first `steps`: those steps will be done again, to the same numbers."""
    path = Path(path)
    with reading(path, "move it away"):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[:steps] if line.endswith(b"\n")]
    if len(whole) < steps:
        print(f"warning: {path}: {len(whole)} lines where {steps} were expected; the rest is lost", file=sys.stderr)
    write_atomic(path, lambda tmp: tmp.write_bytes(b"".join(whole)))


# ----------------------------------------------------------------------------------------------- whose folder is it?

def differs(out: Path, wanted: dict, defaults: dict) -> str:
    """Why the run in `out` is another one than `wanted` (as in config.json), in a few words; "" if it is the same.
    defaults: of all flags: a run of before a flag existed ran with its default."""
    if not (out / "config.json").exists():
        return "there is no config.json in it"
    found = read_json(out / "config.json")
    have = found.get("train")
    have = defaults | (have if isinstance(have, dict) else {})
    for key in sorted(have.keys() - FREE):
        if key not in defaults:
            return f"it has a setting {key}, which is of another version"
        if have[key] != wanted["train"][key]:
            return f"--{key.replace('_', '-')} was {have[key]}, now {wanted['train'][key]}"
    for part, name in (("system", f"--system, {found.get('system')!r:.50}"),
                       ("dtype", f"--dtype, {found.get('dtype')}"), ("base", "base model"), ("from", "--init-adapter")):
        if part in wanted and found.get(part) != wanted[part]:
            return f"another {name}"
    return ""


def used(out: Path) -> bool:
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; expected a folder, or a name that is free")
    return out.exists() and any(not p.name.startswith(".") for p in out.iterdir())


def untrained(out: Path) -> bool:
    """A run of which there is nothing but its beginning: no state, and nothing that comes later."""
    return not any((out / name).exists() for name in ("adapter", "result.json")) and not any(
        (out / "state").glob("*.safetensors"))


def folders(default: str):
    """default, default-2, … up to and with the first that is free."""
    yield (folder := Path(default))
    i = 1
    while used(folder):
        i += 1
        yield (folder := Path(f"{default}-{i}"))


def dtype_of(wanted: dict, out: str, default: str, defaults: dict) -> str | None:
    """The dtype, fp32 or bf16, of the unfinished run that find_run_folder is going to find, as far as the flags tell:
    going on needs the same, and --dtype auto looks at the clock. None where there is no such run."""
    for folder in [Path(out)] if out else folders(default):
        if used(folder) and not (folder / "result.json").exists() and not differs(folder, wanted, defaults):
            return {"float32": "fp32", "bfloat16": "bf16"}.get(read_json(folder / "config.json").get("dtype"))
    return None


@contextmanager
def alone_in(out: Path, name: str = ".lock", doing: str = "training"):
    """One run at a time that holds this lock in a folder. Errors: BadInput where another process is at it, or where
    nobody can write."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / name, "w")
    except OSError as e:
        raise BadInput(f"--out {out}: cannot be written to ({e.strerror}); give another folder") from None
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{out}: another process is {doing} in it; wait for it, or give a new --out") from None
            except OSError as e:  # some network file systems have no locks
                print(f"warning: {out}: cannot be locked ({e}); make sure that no other run uses it", file=sys.stderr)
        yield


def find_run_folder(wanted: dict, out: str, default: str, defaults: dict) -> tuple[Path, bool]:
    """The folder for a run, and whether the run in it is finished already. A new or the same run may have it.

    wanted: the content of config.json; out: --out, or "": then the first of default, default-2, … that is free or holds
    this very run, unfinished; defaults: of all flags. Errors: BadInput when --out names the folder of another run, of
    which a step was trained.
    """
    if out:
        folder = Path(out)
        why = differs(folder, wanted, defaults) if used(folder) else ""
        if why and not ((folder / "config.json").exists() and untrained(folder)):
            raise BadInput(f"{folder} holds another run ({why}); give a new --out, or delete that folder")
        return folder, (folder / "result.json").exists()
    for folder in folders(default):
        if not used(folder) or not ((folder / "result.json").exists() or differs(folder, wanted, defaults)):
            return folder, False


def write_config(out: Path, wanted: dict) -> None:
    """Write config.json, unless steps of this run have been trained before."""
    if untrained(out):
        write_json(out / "config.json", wanted)


# ------------------------------------------------------------------------------------------------- while it is trained

def resume(out: Path, module, optimizer, texts: str, total: int, world) -> int:
    """Put the newest state into module and optimizer, and the log back to it; returns the steps that are done.

    Errors: BadInput for a run that was begun with other texts, or a folder that not all hosts see."""
    state = load_state(out, module, optimizer) or {"step": 0, "processes": world.world_size, "texts": texts}
    begin = state["step"]
    if state["texts"] != texts:
        raise BadInput(f"{out}: the texts of --sources are not those that this run began with; give a new --out")
    if world.broadcast(begin) != begin:
        raise BadInput(f"{out}: process {world.rank} sees the state of another step than process 0; give an --out on a "
                       "disk that all hosts share")
    if begin:
        print(f"resuming {out} after {begin} of {total} steps")
    if state["processes"] != world.world_size:
        print(f"processes: {world.world_size}, and {state['processes']} before: the same contexts in the same order, "
              "but sums are rounded differently from here on")
    if not world.rank:
        set_aside(out, begin)
        trim_log(out / "log.jsonl", begin)
    return begin


def append_line(file, value: dict, sync: bool = False) -> None:
    """One JSON line at the end of a log opened unbuffered, visible to others at once; sync: and on the disk. Errors:
    BadInput if it cannot be written, or not as a whole."""
    line = json.dumps(value).encode() + b"\n"
    try:
        if file.write(line) < len(line):
            raise OSError("only a part of a line was")
        if sync:
            os.fsync(file.fileno())
    except OSError as e:
        raise BadInput(f"{file.name}: cannot be written ({e}); the last state in {Path(file.name).parent} is good, so "
                       "make room and give the same command again") from None


def show(bar, recent: dict, line: dict) -> None:
    """What a step's log line says, beside the progress bar: running means of its phase's number (kept in `recent`), for
    distillation by how much was kept."""
    teaching = line["phase"] == "reconstruct"
    name = "error" if teaching else f"kl<={next(b for b in (0.1, 0.25, 1.0) if line['keep'] <= b)}"
    value = line["loss" if teaching else "kl"]
    recent[name] = 0.9 * recent.get(name, value) + 0.1 * value
    bar.set_description(line["phase"], refresh=False)
    bar.set_postfix_str(" ".join(f"{b}: {recent[b]:.2f}" for b in sorted(recent) if (b == "error") == teaching)
                        + f" {line['tokens_per_s']} tok/s {line['gflop_per_s']:.0f} GFLOP/s", refresh=False)


class Signals:
    """SIGTERM and Ctrl-C ask for a stop, which the loop grants between two steps; a second Ctrl-C does not wait."""

    def __init__(self, saved: int = 0, speak: bool = True):
        self.got, self.saved, self.speak = 0, saved, speak  # saved: steps in the newest state; the loop keeps it true

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        again = number == self.got == signal.SIGINT
        self.got = number
        text = (f"stopped at once: what was trained after step {self.saved} is lost" if again else
                "finishing this step and saving it; Ctrl-C again stops at once, without")
        if self.speak:
            os.write(2, f"\n{text}\n".encode())  # print is not for signal handlers: it may have been interrupted itself
        if again:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
