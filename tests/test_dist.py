"""Several processes, and runs that are cut off: with real processes, signals and files.

What would break here: a mean taken per process (gradients differ when processes hold unequal numbers of supervised
tokens), a random draw that depends on what came before it, a state without the moments of AdamW or with the wrong
step, a file written in place, a block whose sharded weights are used outside of its forward.
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
from data.samples import collate
from data.tokenizer import Tokenizer
from run.errors import leave
from run.files import base_of
from run.world import World
from eval import held_out_table
from model import load_llama, own_rows
from test_tokenizer import write_tokenizer
from test_train import distiller, sample
from train import MicroBatch, add_gradients, share

pytestmark = pytest.mark.dist
ENV = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def torchrun(n, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *map(str, args)]


# two processes against one ------------------------------------------------------------------------------------------

STEPS = [("reconstruct", 0.1), ("hard", 0.1), ("soft", 0.2), ("hard", 0.05)]  # phase, keep


def micro_batches(world: World, step: int, keep: float, micro: int) -> list[MicroBatch]:
    """Eight contexts of unequal lengths, with 2 to 30 supervised tokens each."""
    made = [[sample(i, n_context=20 + 3 * (i % 7), lengths=(5 + 2 * (i % 8), 5)) for i in part]
            for part in share(8 * step, 8, micro, world)]
    return [MicroBatch.of(collate(part), keep) for part in made]


def gradients(model, world: World, micro: int) -> dict:
    comp, out = tiny_compressor(model), {}
    for step, (phase, keep) in enumerate(STEPS):
        numbers = add_gradients(distiller(model, comp), micro_batches(world, step, keep, micro), phase, world)
        out[f"{step}.numbers"] = torch.stack(list(numbers.values()))
        out |= {f"{step}.{name}": p.grad for name, p in comp.named_parameters() if p.grad is not None}
        comp.zero_grad()
    return out


def worker(folder, out):
    """What each of torchrun's processes does for the test below."""
    world = World.start("cpu")
    for parallel, recompute in (("ddp", False), ("fsdp", False), ("fsdp", True)):
        model = load_llama(folder, shard=world.shard if parallel == "fsdp" else None)
        model.recompute = recompute
        own = sum(own_rows(p)[0].numel() for p in model.parameters())
        together = []

        def count(*_):  # how many blocks' weights are whole in this process, whenever one runs
            together.append(sum(not isinstance(block.mlp.up.weight, DTensor) for block in model.layers))
        for block in model.layers:
            block.register_forward_hook(count)
        got = gradients(model, world, micro=2) | {"own": torch.tensor([own, max(together)])}
        print(base_of(model, Tokenizer(folder))["weights"])
        if not world.rank:
            save_file(got, f"{out}/{parallel}{'-recompute' * recompute}.safetensors")
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
    got = subprocess.run(torchrun(2, __file__, tiny, out), env=ENV, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-3000:]
    return out, got.stdout


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp-recompute"])
def test_two_processes_compute_what_one_does(tiny, two_processes, how):
    """Loss and gradient of a step of each kind, four forward passes of two contexts each; relative norm 1e-5."""
    model = load_llama(tiny)
    one = gradients(model, World(torch.device("cpu")), micro=2)
    two = load_file(two_processes[0] / f"{how}.safetensors")
    own, together = two.pop("own").tolist()
    assert one.keys() == two.keys()
    for step in range(len(STEPS)):
        names = [name for name in one if name.startswith(f"{step}.") and not name.endswith("numbers")]
        a, b = (torch.cat([x[name].flatten() for name in names]) for x in (one, two))
        assert a.norm() > 1e-3 and (a - b).norm() <= 1e-5 * a.norm()
        assert torch.allclose(one[f"{step}.numbers"], two[f"{step}.numbers"], rtol=1e-5)
    shared = 310 * 48 + 48  # embedding (which is the head) and last norm stay whole
    whole = sum(p.numel() for p in model.parameters())
    assert together == 6 if how == "ddp" else together <= 2  # the block that runs, and one whose backward is not over
    assert own == (whole if how == "ddp" else shared + (whole - shared) // 2)
    assert set(two_processes[1].split()) == {base_of(model, Tokenizer(tiny))["weights"]}  # of sharded weights, the same


def test_every_sample_is_seen_once_whatever_the_number_of_processes():
    want = list(range(5 * 24))
    for size in (1, 2, 3, 4, 8):
        worlds = [World(torch.device("cpu"), rank, size) for rank in range(size)]
        seen = [share(24 * step, 24, 2, world) for step in range(5) for world in worlds]
        assert [i for parts in seen for part in parts for i in part] == want
        assert len({len(parts) for parts in seen}) == 1  # fsdp needs everybody in every forward pass


def test_every_document_has_one_process():
    for size in (1, 2, 3, 4):
        parts = [World(torch.device("cpu"), rank, size).part(list(range(29))) for rank in range(size)]
        assert sorted(i for part in parts for i in part) == list(range(29))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    even = [sum(i % 2 == 0 for i in World(torch.device("cpu"), rank, 2).part(list(range(100)))) for rank in (0, 1)]
    assert even == [25, 25]  # two sources in turn: each process reads as much of both


# runs that are cut off ----------------------------------------------------------------------------------------------

STEPS_OF_RUN = 14  # of them 7 reconstruct


@pytest.fixture(scope="module")
def command(tiny, tmp_path_factory):
    """A run of both phases with every kind of random draw in it, four contexts a step; takes about a second."""
    texts, shards = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("shards")
    for i in range(60):
        (texts / f"{i}.txt").write_text(f"Text {i} says that the Old Mill was built in {1500 + i} by Ada Stone. " * 12)
    return [ROOT / "train.py", "--weights", tiny, "--sources", texts, "--shards", shards, "--context", 64,
            "--answer", 8, "--eta", 2, "--rank", 4, "--hidden", 48, "--dtype", "fp32", "--device", "cpu",
            "--reconstruct", 7, "--steps", STEPS_OF_RUN - 7, "--batch", 4, "--soft", 0.5, "--lr", 0.01, "--scorer-lr",
            0.01, "--save-every", 4, "--eval-contexts", 0, "--out"]


def run(command, out, code=0, launch=(sys.executable,), **changes):
    got = subprocess.run([*launch, *map(str, command), str(out)], env=ENV, capture_output=True, text=True, **changes)
    assert got.returncode == code, (got.returncode, got.stdout[-500:], got.stderr[-3000:])
    return got


def outcome(out):
    """Adapter and logged numbers of a finished run, the times left out."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = {"seconds", "tokens_per_s", "gflop_per_s"}
    assert [line["step"] for line in log] == list(range(STEPS_OF_RUN))
    tensors = load_file(out / "adapter" / "adapter.safetensors")
    return tensors, [{k: line[k] for k in line.keys() - times} for line in log]


def assert_same(a, b):
    (x, log_x), (y, log_y) = outcome(a), outcome(b)
    assert log_x == log_y
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(command, out)
    return out


def wait_for(process, out, steps):
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_bytes().count(b"\n") < steps:
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.002)


def interrupt(command, out, number, steps):
    """Start a run and send it a signal once it has logged `steps` steps; returns its exit code."""
    process = subprocess.Popen([sys.executable, *map(str, command), str(out)], env=ENV, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for(process, out, steps)
    process.send_signal(number)
    return process.wait(timeout=60)


def child_after(torchrun, out, steps) -> int:
    """The process number of torchrun's last worker, once the run has logged `steps` steps."""
    wait_for(torchrun, out, steps)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], capture_output=True, text=True)
    return int(children.stdout.split()[-1])


def test_a_killed_run_ends_as_if_it_had_not_been(command, uninterrupted, tmp_path):
    """SIGKILL at a random step, in each phase once; then the damaged newest state is passed over, too."""
    out = tmp_path / "run"
    rng = random.Random()
    first, second = rng.randrange(5, 7), rng.randrange(9, 12)
    print(f"killed after {first} and {second} steps")  # shown when the test fails
    assert interrupt(command, out, signal.SIGKILL, first) == -signal.SIGKILL
    assert interrupt(command, out, signal.SIGKILL, second) == -signal.SIGKILL
    newest = max((out / "state").glob("*.safetensors"))
    raw = bytearray(newest.read_bytes())
    raw[-5] ^= 1
    newest.write_bytes(raw)
    got = run(command, out)
    assert f"{newest}: its bytes are not those that were written" in got.stderr
    assert f"resuming {out} after {int(newest.stem) - 4} of 14 steps" in got.stdout
    assert_same(out, uninterrupted)

    again = run(command, out)
    assert "this run is finished" in again.stdout
    assert_same(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_first(command, uninterrupted, tmp_path, number):
    """Exit code 143 or 130, and a state of the very step, not of a multiple of --save-every."""
    out = tmp_path / "run"
    assert interrupt(command, out, number, 5) == 128 + number
    lines = (out / "log.jsonl").read_bytes().count(b"\n")
    assert 5 <= lines < STEPS_OF_RUN
    assert int(max((out / "state").glob("*.safetensors")).stem) == lines
    run(command, out)
    assert_same(out, uninterrupted)


def test_a_state_that_cannot_be_written_leaves_the_one_before(command, uninterrupted, tmp_path):
    """A limit on the size of files stands for a full disk: one line, and later the run goes on without it."""
    out = tmp_path / "run"
    assert interrupt(command, out, signal.SIGTERM, 5) == 143
    good = max((out / "state").glob("*.safetensors"))
    before = good.read_bytes()
    limit = len(before) // 2
    got = run(command, out, code=2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert "cannot be written" in got.stderr and "Traceback" not in got.stderr
    assert max((out / "state").glob("*")) == good and good.read_bytes() == before
    run(command, out)
    assert_same(out, uninterrupted)


def test_two_processes_of_which_one_was_lost_end_as_if_it_had_not_been(command, tiny, tmp_path):
    """SIGKILL to one of two under torchrun, which then gives up; the same command again ends with the same adapter."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    two = [*command[:-1], "--parallel", "fsdp", "--out"]
    run([*two[:-1], "--eval-contexts", 2, "--out"], whole, launch=torchrun(2))
    process = subprocess.Popen([*torchrun(2), *map(str, two), str(out)], env=ENV, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    os.kill(child_after(process, out, 5), signal.SIGKILL)
    assert process.wait(timeout=90) != 0
    two[two.index("fsdp")] = "ddp"  # how the work is spread may change
    assert f"resuming {out} after" in run([*two[:-1], "--eval-contexts", 2, "--out"], out, launch=torchrun(2)).stdout
    assert_same(out, whole)

    two[two.index("ddp")] = "fsdp"
    said = run([*two[:-1], "--profile", 1, "--out"], tmp_path / "none", launch=torchrun(2)).stdout
    assert json.loads(said.splitlines()[-1])["processes"] == 2 and not (tmp_path / "none").exists()

    # the table that two processes made, in shares (ddp) or together (fsdp), is the one that one process makes
    model, tok = load_llama(tiny), Tokenizer(tiny)
    sources, shards = (str(command[command.index(name) + 1]) for name in ("--sources", "--shards"))
    alone = held_out_table(model, tok, load_adapter(whole / "adapter", model, tok), sources, shards, 64, 2, 0)
    for folder in (whole, out):
        cells = json.loads((folder / "result.json").read_text())["cells"]
        assert len(cells) == len(alone) > 0
        for a, b in zip(cells, alone):
            assert [a[k] for k in ("kind", "method", "keep", "n")] == [b[k] for k in ("kind", "method", "keep", "n")]
            assert a["mean"]["kl"] == pytest.approx(b["mean"]["kl"], abs=1e-4)


def test_another_number_of_processes_goes_on_with_the_same_contexts(command, uninterrupted, tmp_path):
    """Two processes under fsdp, of which one alone is asked to stop: both do, at the same step. One process goes on,
    says so, and ends where one process would have, to rounding."""
    out = tmp_path / "run"
    two = [*command[:-1], "--parallel", "fsdp", "--recompute", "--out"]
    process = subprocess.Popen([*torchrun(2), *map(str, two), str(out)], env=ENV, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    os.kill(child_after(process, out, 5), signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode and re.search(r"exitcode *: 143", said), said[-3000:]
    lines = (out / "log.jsonl").read_bytes().count(b"\n")
    assert int(max((out / "state").glob("*.safetensors")).stem) == lines < STEPS_OF_RUN
    got = run(command, out)
    assert "processes: 1, and 2 before: the same contexts in the same order" in got.stdout
    (x, log_x), (y, log_y) = outcome(out), outcome(uninterrupted)
    assert [line["keep"] for line in log_x] == [line["keep"] for line in log_y]
    assert all(abs(a["loss"] - b["loss"]) <= 1e-3 * b["loss"] for a, b in zip(log_x, log_y))
    assert not all(torch.equal(x[k], y[k]) for k in x), "were these two processes at all?"


if __name__ == "__main__":
    worker(*sys.argv[1:])
