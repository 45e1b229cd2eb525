"""States on disk, and whose folder is whose: what needs no process of its own (test_dist.py has the rest)."""
import json
import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, tiny_compressor, tiny_llama
from run.errors import BadInput, write_json
from run.files import load_state, save_state
from run.folders import alone_in, append_line, claim, dtype_of, set_aside, sign, trim_log


def trained(seed: int):
    """A compressor and its AdamW after two steps; γ never had a gradient, so it has no moments."""
    comp = tiny_compressor(tiny_llama(), seed=seed)
    optimizer = torch.optim.AdamW(comp.parameters(), lr=1e-2)
    for i in range(2):
        for j, (name, p) in enumerate(comp.named_parameters()):
            g = torch.Generator().manual_seed(9 * i + j)
            p.grad = None if name == "gamma" else torch.randn(p.shape, generator=g)
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
        assert (name == "gamma") == (not want)
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


def test_dtype_auto_goes_on_with_the_dtype_of_the_run(tmp_path):
    assert dtype_of(str(tmp_path), "") is None
    write_json(tmp_path / "config.json", {"dtype": "bfloat16"})
    assert dtype_of(str(tmp_path), "") == dtype_of("", str(tmp_path)) == "bf16"
    write_json(tmp_path / "result.json", {})
    assert dtype_of(str(tmp_path), "") is None


def test_a_log_is_cut_back_to_its_state(tmp_path, capsys):
    """Lines after the state go, a half-written one too; lines that are missing are spoken of."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    trim_log(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]
    assert not capsys.readouterr().err
    trim_log(path, 5)
    assert "2 lines where 5 were expected" in capsys.readouterr().err


def test_a_folder_belongs_to_one_run(tmp_path):
    """The same run may have it again, with other ways to compute the same; another run may not."""
    def wanted(**changes):
        return {"train": {"lr": 1.0, "micro": 1, "steps": 5} | changes, "dtype": "float32", "base": {"weights": "a"}}
    named, default = str(tmp_path / "named"), str(tmp_path / "quick")
    for out in (named, ""):
        folder, finished = claim(wanted(), out, default)
        assert (str(folder), finished) == (out or default, False)
        write_json(folder / "config.json", wanted())
        assert claim(wanted(micro=2), out, default) == (folder, False)
    for other, why in ((wanted(lr=2.0), "--lr was 1.0, now 2.0"), (wanted() | {"dtype": "bfloat16"}, "another --dtype"),
                       (wanted() | {"base": {"weights": "b"}}, "another base model")):
        with pytest.raises(BadInput, match=why):
            claim(other, named, default)
        assert claim(other, "", default)[0].name == "quick-2"
    for name in ("named", "quick"):
        write_json(tmp_path / name / "result.json", {})
    assert claim(wanted(), named, default) == (tmp_path / "named", True)
    assert claim(wanted(), "", default) == (tmp_path / "quick-2", False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("Dear")
    with pytest.raises(BadInput, match="is a file; expected a folder"):
        claim(wanted(), str(tmp_path / "foreign" / "letter.txt"), default)
    with pytest.raises(BadInput, match="no config.json"):
        claim(wanted(), str(tmp_path / "foreign"), default)
