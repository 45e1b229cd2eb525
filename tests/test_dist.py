"""Several processes, and runs that are cut off: with real processes, signals and files.

What would fail here: a mean taken per process (gradients differ when processes hold unequal
numbers of supervised tokens), a random draw that depends on earlier ones, a state without AdamW's
moments or with the wrong step, a file written in place, a sharded weight used outside of its block.
"""
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from compress import load_adapter
from conftest import ROOT, save_llama, tiny_compressor, tiny_llama
from data.batches import collate
from data.tokenizer import Tokenizer
from eval import held_out_table
from model import load_llama, local_shard
from run.checkpoint import Signals, base_of
from run.dist import World
from run.errors import BadInput, leave
from run.memory_plan import choose_parallel
from test_tokenizer import write_tokenizer
from test_train import make_step, sample
from train import MicroBatch, forward_backward, main, my_samples

pytestmark = pytest.mark.dist
ENV = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def torchrun(n, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
            *map(str, args)]


# ------------------------------------------------------------------ two processes and one

STEPS = [("scorer", 0.1), ("hard", 0.1), ("soft", 0.2), ("hard", 0.05)]  # phase, keep ratio


def gradients(model, world: World) -> dict:
    """Numbers and gradients of some steps, of 8 contexts of unequal lengths with 2 to 30
    supervised tokens each, two per forward pass."""
    compressor = tiny_compressor(model)
    found = {}
    for i, (phase, keep) in enumerate(STEPS):
        micro_batches = []
        for numbers in my_samples(8 * i, 8, 2, world):
            cases = [sample(j, n_context=20 + 3 * (j % 7), lengths=(5 + 2 * (j % 8), 5))
                     for j in numbers]
            micro_batches.append(MicroBatch.of(collate(cases), keep))
        step = make_step(model, compressor, phase, world)
        metrics = forward_backward(step, micro_batches, phase, world)
        found[f"{i}.numbers"] = torch.stack(list(metrics.values()))
        found |= {f"{i}.{name}": p.grad for name, p in compressor.named_parameters()
                  if p.grad is not None}
        compressor.zero_grad()
    return found


def worker(folder, out):
    """What each of torchrun's processes does for the test below."""
    world = World.start("cpu")
    for parallel, checkpointing in (("ddp", False), ("fsdp", False), ("fsdp", True)):
        model = load_llama(folder, shard=world.shard if parallel == "fsdp" else None)
        model.activation_checkpointing = checkpointing
        local = sum(local_shard(p)[0].numel() for p in model.parameters())
        whole_blocks = []

        def count(*_):  # the blocks whose weights are whole in this process, whenever one runs
            is_whole = [not isinstance(block.mlp.up.weight, DTensor) for block in model.layers]
            whole_blocks.append(sum(is_whole))

        for block in model.layers:
            block.register_forward_hook(count)
        found = gradients(model, world) | {"sizes": torch.tensor([local, max(whole_blocks)])}
        print(base_of(model, Tokenizer(folder))["weights"])
        if not world.rank:
            save_file(found, f"{out}/{parallel}{'-checkpointing' * checkpointing}.safetensors")
    world.end()
    leave(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_llama(tiny_llama(vocab_size=310, max_positions=4096), folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def two_processes(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients")
    done = subprocess.run(torchrun(2, __file__, tiny, out), env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp-checkpointing"])
def test_two_processes_compute_what_one_does(tiny, two_processes, how):
    """Numbers and gradients of each step; relative norm 1e-5."""
    model = load_llama(tiny)
    one = gradients(model, World(torch.device("cpu")))
    two = load_file(two_processes[0] / f"{how}.safetensors")
    local, whole_blocks = two.pop("sizes").tolist()
    assert one.keys() == two.keys()
    for i in range(len(STEPS)):
        names = [name for name in one if name.startswith(f"{i}.") and "numbers" not in name]
        a = torch.cat([one[name].flatten() for name in names])
        b = torch.cat([two[name].flatten() for name in names])
        assert a.norm() > 1e-3 and (a - b).norm() <= 1e-5 * a.norm()
        assert torch.allclose(one[f"{i}.numbers"], two[f"{i}.numbers"], rtol=1e-5)

    unsharded = 310 * 48 + 48  # the embedding, which is the head, and the last norm
    total = sum(p.numel() for p in model.parameters())
    if how == "ddp":
        assert (local, whole_blocks) == (total, 6)
    else:
        assert local == unsharded + (total - unsharded) // 2
        assert whole_blocks <= 2  # the one that runs, and one whose backward pass is not over
    assert set(two_processes[1].split()) == {base_of(model, Tokenizer(tiny))["weights"]}


def test_every_sample_is_seen_once_whatever_the_number_of_processes():
    for size in (1, 2, 3, 4, 8):
        worlds = [World(torch.device("cpu"), rank, size) for rank in range(size)]
        seen = [my_samples(24 * step, 24, 2, world) for step in range(5) for world in worlds]
        assert [i for parts in seen for part in parts for i in part] == list(range(5 * 24))
        assert len({len(parts) for parts in seen}) == 1  # fsdp: everybody in every forward pass


def test_every_document_has_one_process():
    for size in (1, 2, 3, 4):
        worlds = [World(torch.device("cpu"), rank, size) for rank in range(size)]
        parts = [world.my_rows(list(range(29))) for world in worlds]
        assert sorted(i for part in parts for i in part) == list(range(29))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_cannot_be_shared_is_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3",
                        "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    for device in ("mps", "cuda:0"):
        with pytest.raises(BadInput, match=f"--device {device} with torchrun: expected cuda"):
            World.start(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="3 processes and 1 GPUs on this host"):
        World.start("cuda")
    monkeypatch.setattr(World, "start", lambda device: World(torch.device("cpu"), world_size=3))
    monkeypatch.setattr("sys.argv", ["train.py", "--batch", "4"])
    with pytest.raises(BadInput, match="--batch 4 cannot be shared by 3 processes"):
        main()
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(BadInput, match="8 tasks of one job step would each work alone"):
        World.start("cpu")
    with pytest.raises(BadInput, match="spreads the model over processes and there is one"):
        choose_parallel("fsdp", None, "bf16", World(torch.device("cpu")))


# ------------------------------------------------------------------- runs that are cut off

N_STEPS = 14  # of them 7 of the scorer's phase


@pytest.fixture(scope="module")
def command(tiny, tmp_path_factory):
    """A run of both phases with every kind of random draw, four contexts a step; about a second."""
    texts = tmp_path_factory.mktemp("texts")
    for i in range(60):
        sentence = f"Text {i} says that the Old Mill was built in {1500 + i} by Ada Stone. "
        (texts / f"{i}.txt").write_text(sentence * 12)
    flags = {"--weights": tiny, "--sources": texts, "--shards": tmp_path_factory.mktemp("shards"),
             "--context": 64, "--answer": 8, "--mix": "continue=1,recite=2,cloze=2", "--eta": 2,
             "--rank": 4, "--hidden": 48, "--dtype": "fp32", "--device": "cpu",
             "--scorer-steps": 7, "--steps": N_STEPS - 7, "--batch": 4, "--soft-fraction": 0.5,
             "--lr": 0.01, "--scorer-lr-phase2": 0.01, "--save-every": 4, "--eval-contexts": 0}
    return [ROOT / "train.py", "--resume", *[x for flag in flags.items() for x in flag]]


def run(command, out, *more, code=0, launch=(sys.executable,), **options):
    args = [*launch, *map(str, [*command, *more, "--out", out])]
    done = subprocess.run(args, env=ENV, capture_output=True, text=True, **options)
    assert done.returncode == code, (done.returncode, done.stdout[-500:], done.stderr[-3000:])
    return done


def start(command, out, *more, launch=(sys.executable,), **options):
    args = [*launch, *map(str, [*command, *more, "--out", out])]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen(args, env=ENV, text=True, **options)


def outcome(out):
    """The adapter and the logged numbers of a finished run, without the times."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(N_STEPS))
    for line in log:
        for name in ("seconds", "tokens_per_s", "gflop_per_s"):
            del line[name]
    return load_file(out / "adapter" / "adapter.safetensors"), log


def assert_same(a, b):
    tensors, log = outcome(a)
    other_tensors, other_log = outcome(b)
    assert log == other_log
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(x, other_tensors[name]) for name, x in tensors.items())


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(command, out)
    return out


def newest_state(out):
    return max((out / "state").glob("*.safetensors"))


def logged_steps(out) -> int:
    path = out / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process, out, steps):
    while logged_steps(out) < steps:
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.002)


def interrupt(command, out, number, steps):
    """Start a run, send it a signal after so many steps; returns its exit code."""
    process = start(command, out)
    wait_for(process, out, steps)
    process.send_signal(number)
    return process.wait(timeout=60)


def last_child(process) -> int:
    ps = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    return int(subprocess.run(ps, capture_output=True, text=True).stdout.split()[-1])


def test_a_killed_run_ends_as_if_it_had_not_been(command, uninterrupted, tmp_path):
    """SIGKILL at a random step of each phase; then the newest state is damaged as well."""
    out = tmp_path / "run"
    first = random.randrange(5, 7)
    second = random.randrange(9, 12)
    print(f"killed after {first} and {second} steps")  # shown when the test fails
    assert interrupt(command, out, signal.SIGKILL, first) == -signal.SIGKILL
    assert interrupt(command, out, signal.SIGKILL, second) == -signal.SIGKILL
    newest = newest_state(out)
    raw = bytearray(newest.read_bytes())
    raw[-5] ^= 1
    newest.write_bytes(raw)
    done = run(command, out)
    assert f"{newest}: its bytes are not those that were written" in done.stderr
    assert f"resuming {out} after {int(newest.stem) - 4} of 14 steps" in done.stdout
    assert_same(out, uninterrupted)

    assert "this run is finished" in run(command, out).stdout
    assert_same(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_first(command, uninterrupted, tmp_path, number):
    """Exit code 143 or 130, and a state of that step, not of a multiple of --save-every."""
    out = tmp_path / "run"
    assert interrupt(command, out, number, 5) == 128 + number
    assert 5 <= logged_steps(out) == int(newest_state(out).stem) < N_STEPS
    run(command, out)
    assert_same(out, uninterrupted)


def test_a_second_ctrl_c_does_not_wait(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Signals(saved=25) as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert "finishing this step" in capfd.readouterr().err
        signals.saved = 50
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert "after step 50 is lost" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_state_that_cannot_be_written_leaves_the_one_before(command, uninterrupted, tmp_path):
    """A limit on the size of files stands for a full disk."""
    out = tmp_path / "run"
    assert interrupt(command, out, signal.SIGTERM, 5) == 143
    good = newest_state(out)
    before = good.read_bytes()
    limit = (len(before) // 2, len(before) // 2)
    done = run(command, out, code=2,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert newest_state(out) == good and good.read_bytes() == before
    run(command, out)
    assert_same(out, uninterrupted)


def test_two_processes_of_which_one_was_lost_end_as_if_it_had_not_been(command, tiny, tmp_path):
    """SIGKILL to one of two under torchrun, which then gives up; the same command goes on. The
    table at the end is drawn once, and its numbers are those that one process finds."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    table = ("--eval-contexts", 2, "--parallel")
    said = run(command, whole, *table, "fsdp", launch=torchrun(2)).stderr
    assert said.count("held-out table:   0%") == 1
    process = start(command, out, *table, "fsdp", launch=torchrun(2))
    wait_for(process, out, 5)
    os.kill(last_child(process), signal.SIGKILL)
    assert process.wait(timeout=90) != 0
    done = run(command, out, *table, "auto", launch=torchrun(2))  # ddp here; it may change
    assert f"resuming {out} after" in done.stdout
    assert_same(out, whole)

    model, tok = load_llama(tiny), Tokenizer(tiny)
    sources, shards = (str(command[command.index(x) + 1]) for x in ("--sources", "--shards"))
    compressor = load_adapter(whole / "adapter", model, tok)
    alone = held_out_table(model, tok, compressor, sources, shards, 64, 2, 0)
    for folder in (whole, out):
        cells = json.loads((folder / "result.json").read_text())["cells"]
        assert len(cells) == len(alone) > 0
        for a, b in zip(cells, alone):
            assert all(a[name] == b[name] for name in ("kind", "method", "keep", "n"))
            assert a["mean"]["kl"] == pytest.approx(b["mean"]["kl"], abs=1e-4)


def test_another_number_of_processes_goes_on_with_the_same_contexts(
        command, uninterrupted, tmp_path):
    """Two processes under fsdp, of which one is asked to stop: both do, after the same step. One
    process goes on, says so, and ends where one process would have, to rounding."""
    out = tmp_path / "run"
    process = start(command, out, "--parallel", "fsdp", "--activation-checkpointing",
                    launch=torchrun(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(process, out, 5)
    os.kill(last_child(process), signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode and re.search(r"exitcode *: 143", said), said[-3000:]
    assert logged_steps(out) == int(newest_state(out).stem) < N_STEPS
    done = run(command, out)
    assert "processes: 1, and 2 before: the same contexts in the same order" in done.stdout

    tensors, log = outcome(out)
    other_tensors, other_log = outcome(uninterrupted)
    for a, b in zip(log, other_log):
        assert a["keep"] == b["keep"] and abs(a["loss"] - b["loss"]) <= 1e-3 * b["loss"]
    assert not all(torch.equal(x, other_tensors[name]) for name, x in tensors.items()), \
        "were these two processes at all?"


if __name__ == "__main__":
    worker(*sys.argv[1:])
