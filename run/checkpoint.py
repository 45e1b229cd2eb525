"""Files that outlive a program: adapters, saved caches, training runs.

    adapter.safetensors              the weights of a compressor, fp32
    adapter.json                     its configuration, its model, its training
    FILE.safetensors                 a compressed cache; the header names the model

    OUT/config.json                  the flags and the model of a run; written first
    OUT/log.jsonl                    one line per step
    OUT/state/00000050.safetensors   trained weights and AdamW's moments at step 50
    OUT/adapter/                     the result of the training
    OUT/result.json                  the table at the end; then the run is finished

Tensors are in safetensors files and everything else is JSON. Nothing is
pickled, so a file from a stranger runs no code.

A state holds no random generator and no place in the data. The learning rate
and every random draw are functions of the step.
"""
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from model import Cache, HeadGroup, Llama, local_shard
from run.errors import (
    BadInput, expect, parse_json, read_json, reading, write_atomic, write_json)

FINGERPRINT_ROWS = 4  # rows of each weight that count in the model's fingerprint
CACHE_KEY = "kvdistill_cache"  # in the header of a saved cache
CACHE_FORMAT = 2
STATE_KEY = "kvdistill_state"  # in the header of a training state
STATES_KEPT = 2  # a run goes back to the older one if the newer one cannot be read

# Flags that do not decide what is trained, so a resumed run may change them.
# (init_adapter is compared by its adapter.json, under `from`.)
FREE_FLAGS = {
    "init_adapter", "micro", "chunk", "parallel", "activation_checkpointing",
    "save_every", "eval_contexts", "out", "shards"}


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# ------------------------------------------------------- what a file belongs to

def base_of(model: Llama, tokenizer) -> dict:
    """The model that an adapter or a saved cache belongs to: architecture,
    tokenizer and weights.

    The weights are a hash over the first rows of every tensor. If they are
    sharded, all processes have to take part in the first call, because the
    first rows lie in the first process.
    """
    if model.fingerprint is None:
        digest = hashlib.sha256()
        for name, weight in sorted(model.named_parameters()):
            rows = local_shard(weight)[0][:FINGERPRINT_ROWS]
            # In bf16, so that a model in fp32 has the same hash.
            rows = rows.to("cpu", torch.bfloat16).contiguous()
            digest.update(name.encode() + rows.view(torch.uint8).numpy().tobytes())

        box = [digest.hexdigest()]
        if any(isinstance(weight, DTensor) for weight in model.parameters()):
            dist.broadcast_object_list(box)
        model.fingerprint = box[0]

    return {
        "architecture": asdict(model.cfg),
        "tokenizer": tokenizer.fingerprint,
        "weights": model.fingerprint}


def check_base(path, found: dict, model: Llama, tokenizer) -> None:
    """Compare the base of a file with this model. Errors: BadInput for another
    architecture or tokenizer; other weights of the same architecture are only a
    warning.
    """
    base = base_of(model, tokenizer)
    need = base["architecture"]
    with reading(path):
        # Files of before Qwen was supported do not name what it added.
        have = {"bias": "", "head_norm": False, **found["architecture"]}

    for key in need | have:
        if have.get(key) != need.get(key):
            raise BadInput(
                f"{path}: made for a model with {key} = {have.get(key)!r:.50}, this one has "
                f"{need.get(key)}; pass the --weights it was made with")
    if found.get("tokenizer") != base["tokenizer"]:
        raise BadInput(f"{path}: made with another tokenizer; pass the --weights it was made with")
    if found.get("weights") != base["weights"]:
        warn(f"{path} was made with other weights of this architecture: expect less")


def read_tensors(path, device="cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. For use in `reading`."""
    with safe_open(path, "pt", device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, file.metadata() or {}


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse NaN and infinity. For use in `reading`."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


# --------------------------------------------------------------------- adapters

def save_adapter(folder, comp, model: Llama, tokenizer, about: dict) -> None:
    """Write adapter.safetensors and then adapter.json.

    about: how it was trained, as JSON values.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in comp.state_dict().items()}
    meta = {
        "config": asdict(comp.cfg),
        "base": base_of(model, tokenizer),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **about}
    write_atomic(Path(folder) / "adapter.safetensors", lambda path: save_file(tensors, path))
    write_json(Path(folder) / "adapter.json", meta)


def read_adapter_json(path) -> dict:
    """The content of an adapter.json."""
    meta = read_json(path)
    with reading(path):
        for key in ("config", "base"):
            expect(meta[key], dict)
    return meta


def read_adapter(folder, model: Llama, tokenizer) -> tuple[dict, dict[str, torch.Tensor]]:
    """adapter.json and the tensors of an adapter that was made for this model.

    Errors: BadInput for a missing, damaged or foreign adapter, or a number that
    is not finite.
    """
    folder = Path(folder)
    meta = read_adapter_json(folder / "adapter.json")
    check_base(folder / "adapter.json", meta["base"], model, tokenizer)
    if meta.get("system") != tokenizer.system:
        warn(f"{folder} was trained with --system {meta.get('system')!r:.50}: expect less")

    path = folder / "adapter.safetensors"
    with reading(path):
        tensors, _ = read_tensors(path)
        check_finite(tensors)
        if {x.dtype for x in tensors.values()} != {torch.float32}:
            raise ValueError("it holds other dtypes than fp32")
    return meta, tensors


# ----------------------------------------------------------------- saved caches

def save_cache(path, cache: Cache, model: Llama, tokenizer, about: dict | None = None) -> None:
    """Write a cache to one safetensors file; its header names the model.

    It holds next_position, and LAYER.GROUP.k, .v, .positions and perhaps .bias
    of each head group.
    about: what the cache is of, as JSON values.
    """
    tensors = {"next_position": cache.next_position.cpu()}
    for layer, groups in enumerate(cache.layers):
        for index, group in enumerate(groups):
            for name, x in vars(group).items():
                if x is not None:
                    # A copy, because the format does not allow shared memory.
                    x = x.cpu().clone(memory_format=torch.contiguous_format)
                    tensors[f"{layer}.{index}.{name}"] = x

    base = base_of(model, tokenizer)
    header = {"format": CACHE_FORMAT, "base": base, "about": about or {}}
    metadata = {CACHE_KEY: json.dumps(header)}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def cache_header(path) -> dict:
    """The header of a saved cache. Errors: BadInput for a file that is none.

    Under "about" is what `save_cache` was given, or {} in an older file.
    """
    with reading(path, "write it again with --save; a text is read with --context"):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError:
            raise ValueError("not a saved cache, or a damaged one") from None
        if CACHE_KEY not in metadata:
            raise ValueError("not a saved cache, but other tensors")
        header = parse_json(metadata[CACHE_KEY])
        if header.get("format") != CACHE_FORMAT:
            raise ValueError(
                f"a cache of format {header.get('format', 1)!r:.50}, expected {CACHE_FORMAT}")
        expect(header["base"], dict)
        about = expect(header.setdefault("about", {}), dict)
        if not 0 <= expect(about.get("turns", 0), int):
            raise ValueError("its number of turns is below 0")
    return header


def load_cache(path, model: Llama, tokenizer) -> Cache:
    """A saved cache, on the model's device and in its dtype.

    Errors: BadInput for a missing, truncated, foreign or misshapen file.
    """
    check_base(path, cache_header(path)["base"], model, tokenizer)
    cfg = model.cfg
    with reading(path, "write it again with --save"):
        tensors, _ = read_tensors(path, str(model.device))
        check_finite(tensors)

        next_position = tensors.pop("next_position")
        if next_position.dtype != torch.int64 or next_position.dim() != 1:
            raise ValueError("next_position is not a row of int64 numbers")
        if next_position.min() < 0 or next_position.max() > cfg.max_positions:
            raise ValueError(f"next_position is beyond the model's {cfg.max_positions}")

        layers = []
        for layer in range(cfg.n_layer):
            groups = []
            heads = 0
            while heads < cfg.n_kv_head:
                group = pop_group(tensors, f"{layer}.{len(groups)}", next_position, model)
                groups.append(group)
                heads += group.k.shape[1]
            if heads > cfg.n_kv_head:
                raise ValueError(f"layer {layer} has {heads} heads, expected {cfg.n_kv_head}")
            layers.append(groups)
        if tensors:
            raise ValueError(f"{min(tensors)} does not belong there")
    return Cache(layers, next_position)


def pop_group(tensors: dict, name: str, next_position, model: Llama) -> HeadGroup:
    """Take a head group out of a saved cache's tensors. For use in `reading`."""
    names = [f"{name}.{field.name}" for field in fields(HeadGroup)]
    k, v, positions, bias = [tensors.pop(key, None) for key in names]

    B, g, S, d = k.shape
    per_head = ((B, 1, S), (B, g, S))  # one row for the whole group, or one for each head
    fits = (
        g > 0 and B == len(next_position) and d == model.cfg.head_dim
        and v.shape == k.shape and v.dtype == k.dtype
        and k.dtype in (torch.float32, torch.bfloat16)
        and positions.shape in per_head and positions.dtype == torch.int32
        and (bias is None or bias.shape in per_head and bias.dtype == torch.float32))
    if not fits:
        raise ValueError(f"{name} has tensors of other shapes or dtypes than this model's cache")
    if ((positions < -1) | (positions >= next_position[:, None, None])).any():
        raise ValueError(f"{name}.positions are not within the text")
    return HeadGroup(k.to(model.dtype), v.to(model.dtype), positions, bias)


# -------------------------------------------------------------- training states

def digest_of(tensors: dict[str, torch.Tensor], about: dict) -> str:
    """SHA-256 over the header and each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        digest.update(x.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def state_files(out) -> list[Path]:
    """The states of a run, the newest first. A copy made by hand is none."""
    return sorted((Path(out) / "state").glob("[0-9]" * 8 + ".safetensors"), reverse=True)


def save_state(out, step: int, module, optimizer, about: dict) -> Path:
    """Write the state after `step` steps, and remove all but the newest two.

    It is read back before another one is removed.
    module: what is trained; optimizer: AdamW over its parameters; about: JSON
    values for the header.
    Errors: BadInput if it cannot be written or read back; the states before it
    are still there.
    """
    tensors = {}
    for name, p in module.named_parameters():
        tensors[f"trained.{name}"] = p.detach().cpu().contiguous()
        for key, x in optimizer.state.get(p, {}).items():  # nothing before the first gradient
            tensors[f"{key}.{name}"] = x.detach().cpu().contiguous()

    about = {"step": step, **about}
    metadata = {STATE_KEY: json.dumps({**about, "sha256": digest_of(tensors, about)})}
    path = Path(out) / "state" / f"{step:08}.safetensors"
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    read_state(path)
    for old in state_files(out)[STATES_KEPT:]:
        old.unlink(missing_ok=True)
    return path


def read_state(path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and header of a state.

    Errors: BadInput for a file that is not what was written.
    """
    with reading(path, "is the disk sound?"):
        tensors, metadata = read_tensors(path)
        header = parse_json(metadata[STATE_KEY])
        digest = header.pop("sha256")
        named = f"{expect(header['step'], int):08}"
        if digest_of(tensors, header) != digest or Path(path).stem != named:
            raise ValueError("its bytes are not those that were written")
    return tensors, header


def load_state(out, module, optimizer) -> dict | None:
    """Put the newest readable state into module and optimizer.

    Returns its header, or None if there are no states. A damaged file is named
    on stderr and left alone. Errors: BadInput if there are states and none can
    be read.
    """
    paths = state_files(out)
    for path in paths:
        try:
            tensors, header = read_state(path)
            with reading(path, "is it of another run?"):
                restore(tensors, module, optimizer)
            return header
        except BadInput as error:
            warn(f"{error}; going back to an older one")
    if paths:
        raise BadInput(
            f"{paths[0].parent}: none of {len(paths)} states can be read; delete {out} "
            "to start again")
    return None


@torch.no_grad()
def restore(tensors: dict[str, torch.Tensor], module, optimizer) -> None:
    """Copy a state's tensors into module and optimizer."""
    optimizer.state.clear()
    for name, p in module.named_parameters():
        p.copy_(tensors[f"trained.{name}"].view(p.shape))

        if f"step.{name}" in tensors:  # it had a gradient before
            step = tensors[f"step.{name}"].view(())
            mean = tensors[f"exp_avg.{name}"].view(p.shape)
            square = tensors[f"exp_avg_sq.{name}"].view(p.shape)
            optimizer.state[p] = {
                "step": step.float().clone(),  # AdamW counts steps on the CPU
                "exp_avg": mean.to(p, copy=True),
                "exp_avg_sq": square.to(p, copy=True)}


# ---------------------------------------------------------- the folder of a run

@contextmanager
def open_run(out: Path, config: dict, may_resume: bool):
    """Hold the folder of a training run; yields whether that run is finished.

    config: the content of config.json, which is written before the first step.
    Errors: BadInput as in check_run; for a folder that another process holds,
    and for one that cannot be written to.
    """
    check_run(out, config, may_resume)
    with lock_dir(out):
        if is_fresh(out):
            write_json(out / "config.json", config)
        yield (out / "result.json").exists()


def check_run(out: Path, config: dict, may_resume: bool) -> None:
    """Refuse a folder that holds something, unless may_resume and it is this
    very run.

    config: its `train` (the fields of TrainConfig), `system`, `from`, `dtype` and `base` say
    which run it is. Without the last two only flags are compared, so that this
    can be done before the model is loaded.
    Errors: BadInput.
    """
    if is_fresh(out):
        return
    if not may_resume:
        raise BadInput(
            f"--out {out} is not empty; add --resume to go on with the run in it, or give "
            "another --out")
    path = out / "config.json"
    if not path.exists():
        raise BadInput(f"--out {out} holds no run (there is no config.json); give another --out")

    found = read_json(path)
    with_model = "base" in config
    with reading(path, "give another --out, or delete that folder"):
        before = identity(found, with_model)
    now = identity(config, with_model)
    changes = []
    for name in sorted(before.keys() | now.keys()):
        values = before.get(name), now.get(name)
        if dict in map(type, values) and values[0] != values[1]:
            changes.append(f"{name} is another one")
        elif values[0] != values[1]:
            changes.append("{} was {!r:.50}, now {!r:.50}".format(name, *values))
    if changes:
        raise BadInput(
            f"--out {out} holds another run: {'; '.join(changes)}; repeat the flags of {path}, "
            "or give another --out")


def is_fresh(out: Path) -> bool:
    """Whether a folder holds nothing, or only what a run leaves that failed
    before its first step: config.json and an empty log. Hidden files, such as our
    lock, do not count."""
    if not out.is_dir():
        return True
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    if "log.jsonl" in names and (out / "log.jsonl").stat().st_size == 0:
        names.remove("log.jsonl")
    # The config.json of a model is not ours to overwrite.
    return not names or names == {"config.json"} and "train" in read_json(out / "config.json")


def identity(config: dict, with_model: bool) -> dict:
    """The part of a config.json that says which run it is: names for a message,
    and values."""
    found = {}
    for name, value in config["train"].items():
        if name not in FREE_FLAGS:
            found["--" + name.replace("_", "-")] = value
    found["--system"] = config.get("system")
    found["--init-adapter"] = config.get("from")
    if with_model:
        found["--dtype"] = config.get("dtype")
        for name, value in {**config["base"], **config["base"]["architecture"]}.items():
            if name != "architecture":
                found[f"the model's {name}"] = value
    return found


@contextmanager
def lock_dir(folder: Path, name: str = ".lock", doing: str = "training"):
    """Let one process at a time into the block.

    Errors: BadInput where another process holds the lock, or where the folder
    cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / name, "w")
    except OSError as error:
        raise BadInput(
            f"--out {folder}: cannot be written to ({error.strerror}); give another folder"
        ) from None

    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{folder}: another process is {doing} in it; wait for it, or give a new --out"
            ) from None
        except OSError as error:  # some network file systems have no locks
            warn(f"{folder}: cannot be locked ({error}); make sure that no other run uses it")
        yield


def resume(out: Path, module, optimizer, texts: str, total: int, world) -> int:
    """Put the newest state into module and optimizer, and cut back the log.

    texts: the fingerprint of the training texts; total: steps of the run.
    Returns the steps done.
    Errors: BadInput for a run that was begun with other texts, or a folder that
    not all hosts see.
    """
    fresh = {"step": 0, "processes": world.world_size, "texts": texts}
    state = load_state(out, module, optimizer) or fresh
    begin = state["step"]
    processes = state.get("processes")
    if state.get("texts") != texts:
        raise BadInput(
            f"{out}: the texts of --sources are not those that this run began with; "
            "give a new --out")
    if world.broadcast(begin) != begin:
        raise BadInput(
            f"{out}: process {world.rank} sees the state of another step than process 0; give an "
            "--out on a disk that all hosts share")

    if begin:
        print(f"resuming {out} after {begin} of {total} steps")
    if processes != world.world_size:
        print(
            f"processes: {world.world_size}, and {processes} before: the same contexts in the "
            "same order, but sums are rounded differently from here on")
    if not world.rank:
        quarantine(out, begin)
        trim_log(out / "log.jsonl", begin)
    return begin


def quarantine(out, step: int) -> None:
    """Rename the states after `step`, and remove half-written files.

    Those states could not be read. If the disk recovered, the next run would
    find one of them without its log.
    """
    for path in state_files(out):
        if int(path.stem) > step:
            path.replace(path.with_suffix(".damaged"))
    for path in Path(out).rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def trim_log(path, steps: int) -> None:
    """Drop a log's lines of all but the first `steps` steps; they are computed again."""
    path = Path(path)
    with reading(path, "move it away"):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith(b"\n")]
        lines = [line for line in lines if parse_json(line.decode())["step"] < steps]
    if len(lines) < steps:
        warn(f"{path}: {len(lines)} lines where {steps} were expected; the rest is lost")
    write_atomic(path, lambda temporary: temporary.write_bytes(b"".join(lines)))


# ------------------------------------------------------------ during a training

def append_line(file, value: dict, sync: bool = False) -> None:
    """Write one JSON line to a log that was opened unbuffered.

    sync: wait until it is on the disk.
    Errors: BadInput if the line cannot be written, or only a part of it.
    """
    line = json.dumps(value).encode() + b"\n"
    try:
        if file.write(line) < len(line):
            raise OSError("only a part of a line was")
        if sync:
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(
            f"{file.name}: cannot be written ({error}); the last state beside it is good, "
            "so make room and go on with --resume") from None


def show_progress(bar, recent: dict, line: dict) -> None:
    """Show a step's log line beside the progress bar.

    recent: the running mean of each phase's loss, which is updated.
    """
    phase = line["phase"]
    loss = 0.9 * recent.get(phase, line["loss"]) + 0.1 * line["loss"]
    recent[phase] = loss
    speed = f"{line['tokens_per_s']} tok/s {line['gflop_per_s']:.0f} GFLOP/s"
    bar.set_description(phase, refresh=False)
    bar.set_postfix_str(f"loss {loss:.2f} {speed}", refresh=False)


class Signals:
    """SIGTERM and Ctrl-C ask for a stop, which the loop grants after a step.

    A second Ctrl-C does not wait. received: the signal, or 0. saved: the steps
    in the newest state, which the loop keeps up to date.
    """

    def __init__(self, saved: int = 0, speak: bool = True):
        self.received = 0
        self.saved = saved
        self.speak = speak

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, frame):
        again = number == self.received == signal.SIGINT
        self.received = number
        text = "finishing this step and saving it; a second Ctrl-C stops at once"
        if again:
            text = f"stopped at once: what was trained after step {self.saved} is lost"
        if self.speak:
            os.write(2, f"\n{text}\n".encode())  # print is not safe in a signal handler
        if again:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
