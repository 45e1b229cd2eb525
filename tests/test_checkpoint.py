"""States on disk, and whose folder is whose: what needs no process of its own (test_dist.py has the rest)."""
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, tiny_compressor, tiny_llama
from run.errors import BadInput, read_json, write_json
from run.files import load_state, save_state
from run.folders import alone_in, append_line, dtype_of, find_run_folder, set_aside, trim_log, write_config


def trained(seed: int):
    """A compressor and its AdamW after two steps, in which the scorer had no gradient, so it has no moments."""
    comp = tiny_compressor(tiny_llama(), seed=seed)
    optimizer = torch.optim.AdamW(comp.parameters(), lr=1e-2)
    for i in range(2):
        for j, (name, p) in enumerate(comp.named_parameters()):
            g = torch.Generator().manual_seed(9 * i + j)
            p.grad = None if "scorer" in name else torch.randn(p.shape, generator=g)
        optimizer.step()
    return comp, optimizer


def test_a_state_brings_back_every_bit_and_two_are_kept(tmp_path):
    comp, optimizer = trained(1)
    for step in (4, 8, 12):
        save_state(tmp_path, step, comp, optimizer, {"processes": 1})
    assert [p.name for p in sorted((tmp_path / "state").iterdir())] == ["00000008.safetensors", "00000012.safetensors"]
    other, its = trained(2)
    its.state.clear()
    assert load_state(tmp_path, other, its)["step"] == 12
    for (name, p), q in zip(comp.named_parameters(), other.parameters()):
        assert torch.equal(p, q)
        have, want = its.state.get(q, {}), optimizer.state.get(p, {})
        assert have.keys() == want.keys() and all(torch.equal(have[k], want[k]) for k in want), name
        assert ("scorer" in name) == (not want)
    for c, o in ((comp, optimizer), (other, its)):  # and the next step is the same, too
        for p in c.parameters():
            p.grad = torch.ones_like(p)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(comp.parameters(), other.parameters()))


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: raw[:-9] + b"\x7f" + raw[-8:],
                                    lambda raw: b"", lambda raw: raw.replace(b"kvdistill_state", b"kvdistill_other"),
                                    lambda raw: raw.replace(b"sha256", b"sha257"),
                                    lambda raw: re.sub(rb'(step[^0-9]*)\d', rb"\g<1>7", raw, count=1)])
def test_a_damaged_state_is_passed_over_and_two_are_an_error(tmp_path, capsys, damage):
    comp, optimizer = trained(1)
    paths = [save_state(tmp_path, step, comp, optimizer, {}) for step in (4, 8)]
    paths[1].write_bytes(damage(paths[1].read_bytes()))
    assert damage(paths[0].read_bytes()) != paths[0].read_bytes()
    assert load_state(tmp_path, comp, optimizer)["step"] == 4
    assert str(paths[1]) in capsys.readouterr().err
    paths[0].write_bytes(damage(paths[0].read_bytes()))
    with pytest.raises(BadInput, match="none of 2 states can be read"):
        load_state(tmp_path, comp, optimizer)
    assert load_state(tmp_path / "new", comp, optimizer) is None


def test_states_that_did_not_read_back_are_set_aside(tmp_path):
    """Else a disk that recovers would bring a state back whose log is gone."""
    comp, optimizer = trained(1)
    for step in (4, 8):
        save_state(tmp_path, step, comp, optimizer, {})
    (tmp_path / "state" / ".00000012.safetensors.77-ab.tmp").write_bytes(b"half")
    set_aside(tmp_path, 4)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["00000004.safetensors", "00000008.damaged"]


def test_one_run_at_a_time_in_a_folder(tmp_path):
    code = f"from run.folders import alone_in\nwith alone_in(__import__('pathlib').Path({str(tmp_path)!r})): pass"
    def other():
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    with alone_in(tmp_path):
        assert "another process is training in it" in other().stderr
    assert other().returncode == 0


def test_a_full_disk_while_logging_is_one_line():
    with open("/dev/full", "ab", buffering=0) as log, pytest.raises(BadInput, match="No space left"):
        append_line(log, {"step": 1})


def test_a_line_that_was_written_in_part_is_noticed(tmp_path):
    """A raw write may take fewer bytes than it was given, and says so in its return value alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(tmp_path / "log.jsonl", "ab", buffering=0) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))
        try:
            with pytest.raises(BadInput, match="only a part"):
                append_line(log, {"step": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "log.jsonl").stat().st_size == 5


def test_dtype_auto_goes_on_with_the_dtype_of_the_run(tmp_path):
    """Wherever it is: the first folder may hold another run, or one that is finished."""
    flags = {"lr": 1.0, "steps": 5}
    def dtype(out, **changes):
        return dtype_of({"train": flags | changes}, out, str(tmp_path / "quick"), flags)
    assert dtype("") is dtype(str(tmp_path / "new")) is None
    for name, lr, precision in (("quick", 2.0, "float32"), ("quick-2", 1.0, "bfloat16"), ("quick-3", 3.0, "float32")):
        write_json(tmp_path / name / "config.json", {"dtype": precision, "train": flags | {"lr": lr}})
    assert [dtype("", lr=x) for x in (2.0, 1.0, 3.0, 4.0)] == ["fp32", "bf16", "fp32", None]
    assert dtype(str(tmp_path / "quick-2")) == "bf16"
    write_json(tmp_path / "quick-2" / "result.json", {})
    assert dtype("") is dtype(str(tmp_path / "quick-2")) is None


def test_a_log_is_cut_back_to_its_state(tmp_path, capsys):
    """Lines after the state go, a half-written one too; lines that are missing are spoken of."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    trim_log(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]
    assert not capsys.readouterr().err
    trim_log(path, 5)
    assert "2 lines where 5 were expected" in capsys.readouterr().err


FLAGS = {"lr": 1.0, "micro": 1, "steps": 5}


def wanted(**changes):
    return {"train": FLAGS | changes, "dtype": "float32", "base": {"weights": "a"}}


def a_step(folder):
    """What a run leaves that was saved once."""
    (folder / "state").mkdir()
    (folder / "state" / "00000004.safetensors").touch()


def test_a_folder_belongs_to_one_run(tmp_path):
    """The same run may have it again, with other ways to compute the same; another run may not."""
    named, default = str(tmp_path / "named"), str(tmp_path / "quick")
    def find(what, out):
        return find_run_folder(what, out, default, FLAGS)
    for out in (named, ""):
        folder, finished = find(wanted(), out)
        assert (str(folder), finished) == (out or default, False)
        write_config(folder, wanted())
        a_step(folder)
        assert find(wanted(micro=2), out) == (folder, False)
    for other, why in ((wanted(lr=2.0), "--lr was 1.0, now 2.0"), (wanted() | {"dtype": "bfloat16"}, "another --dtype"),
                       (wanted() | {"base": {"weights": "b"}}, "another base model"),
                       (wanted() | {"system": "Be brief."}, "another --system, None")):
        with pytest.raises(BadInput, match=why):
            find(other, named)
        assert find(other, "")[0].name == "quick-2"
    for name in ("named", "quick"):
        write_json(tmp_path / name / "result.json", {})
    assert find(wanted(), named) == find(wanted() | {"system": None}, named) == (tmp_path / "named", True)
    assert find(wanted(), "") == (tmp_path / "quick-2", False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("Dear")
    with pytest.raises(BadInput, match="is a file; expected a folder"):
        find(wanted(), str(tmp_path / "foreign" / "letter.txt"))
    with pytest.raises(BadInput, match="no config.json"):
        find(wanted(), str(tmp_path / "foreign"))


def test_a_run_without_a_trained_step_may_be_replaced(tmp_path):
    write_config(tmp_path, wanted())
    (tmp_path / "log.jsonl").write_text('{"step": 0}')  # of before the first state: lost anyway
    assert find_run_folder(wanted(lr=2.0), str(tmp_path), "", FLAGS) == (tmp_path, False)
    write_config(tmp_path, wanted(lr=2.0))
    assert read_json(tmp_path / "config.json") == wanted(lr=2.0)
    a_step(tmp_path)
    write_config(tmp_path, wanted(lr=3.0))
    assert read_json(tmp_path / "config.json") == wanted(lr=2.0)
    with pytest.raises(BadInput, match="--lr was 2.0, now 1.0"):
        find_run_folder(wanted(), str(tmp_path), "", FLAGS)


def test_a_flag_that_a_run_did_not_know_had_its_default(tmp_path):
    write_config(tmp_path, wanted())
    a_step(tmp_path)
    flags = FLAGS | {"tau": 0.5}
    assert find_run_folder(wanted(tau=0.5), str(tmp_path), "", flags) == (tmp_path, False)
    with pytest.raises(BadInput, match="--tau was 0.5, now 0.7"):
        find_run_folder(wanted(tau=0.7), str(tmp_path), "", flags)
    with pytest.raises(BadInput, match="it has a setting lr, which is of another version"):
        find_run_folder({"train": {"steps": 5}, "dtype": "float32", "base": {"weights": "a"}}, str(tmp_path), "",
                        {"steps": 5})


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    """The kernel's own folder stands for a disk that is read-only to everybody."""
    for folder in ("/proc/kvdistill", "/proc/sys"):
        with pytest.raises(BadInput, match="--out /proc/.* cannot be written to"), alone_in(Path(folder)):
            pass
