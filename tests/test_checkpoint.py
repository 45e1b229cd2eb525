"""Adapters, training states and the folder of a run, without processes of their own.

test_dist.py has the rest.
"""
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, tiny_compressor, tiny_llama
from run.checkpoint import (
    append_line, base_of, check_base, check_run, load_cache, load_state, lock_dir, open_run,
    quarantine, read_adapter, save_adapter, save_cache, save_state, trim_log)
from run.errors import BadInput, read_json, write_json


class Tok:
    fingerprint = "t"
    system = None


# ------------------------------------------------------------------------- adapters and saved caches

def test_every_tensor_counts_in_the_fingerprint_of_weights():
    want = base_of(tiny_llama(tied=False), Tok)["weights"]
    assert base_of(tiny_llama(tied=False), Tok)["weights"] == want
    for name, _ in tiny_llama(tied=False).named_parameters():
        other = tiny_llama(tied=False)
        with torch.no_grad():
            other.get_parameter(name).mul_(1.5)
        assert base_of(other, Tok)["weights"] != want, name


def test_files_of_before_qwen_load_for_llamas_and_for_nothing_else():
    base = base_of(tiny_llama(), Tok)
    for key in ("bias", "head_norm"):
        del base["architecture"][key]
    check_base("x", base, tiny_llama(), Tok)
    for other in (tiny_llama(head_norm=True), tiny_llama(bias="qkv")):
        with pytest.raises(BadInput, match="made for a model with (head_norm = False|bias = '')"):
            check_base("x", base, other, Tok)


@pytest.mark.parametrize("changes", [
    {"b_q": torch.ones(3).to(torch.float8_e4m3fn)},
    {"b_q": torch.ones(3).to(torch.complex64)},
    {"b_q": torch.ones(3).double()},
    {"gamma": torch.tensor(float("inf"))},
], ids=str)
def test_adapters_with_other_tensors_are_refused(tmp_path, changes):
    model = tiny_llama()
    save_adapter(tmp_path, tiny_compressor(model), model, Tok, {})
    good = load_file(tmp_path / "adapter.safetensors")
    save_file(good | changes, tmp_path / "adapter.safetensors")
    with pytest.raises(BadInput, match="adapter.safetensors: "):
        read_adapter(tmp_path, model, Tok)


@pytest.mark.parametrize("changes", [
    {"config": 5}, {"base": [1]}, {"base": {}}, {"base": {"architecture": 5}}], ids=str)
def test_adapters_with_other_settings_are_refused(tmp_path, changes):
    model = tiny_llama()
    save_adapter(tmp_path, tiny_compressor(model), model, Tok, {"train": {"steps": 5}})
    assert read_adapter(tmp_path, model, Tok)[0]["train"] == {"steps": 5}
    write_json(tmp_path / "adapter.json", read_json(tmp_path / "adapter.json") | changes)
    with pytest.raises(BadInput, match="adapter.json: "):
        read_adapter(tmp_path, model, Tok)


@torch.no_grad()
def test_a_saved_cache_is_loaded_in_the_dtype_of_the_model(tmp_path):
    model = tiny_llama()
    compressor = tiny_compressor(model)
    ctx = compressor.read(model, torch.arange(40)[None])
    cache = compressor.compress(model, ctx, keep=0.5)
    save_cache(tmp_path / "c", cache, model, Tok)

    found = load_cache(tmp_path / "c", tiny_llama(torch.bfloat16), Tok)
    for groups, again in zip(cache.layers, found.layers, strict=True):
        for a, b in zip(groups, again, strict=True):
            assert torch.equal(a.k.bfloat16(), b.k) and torch.equal(a.v.bfloat16(), b.v)
            assert torch.equal(a.positions, b.positions)


# ------------------------------------------------------------------------------------------- states

def trained(seed: int = 1):
    """A compressor and its AdamW after two steps, in which the scorer had no gradient."""
    comp = tiny_compressor(tiny_llama(), seed=seed)
    optimizer = torch.optim.AdamW(comp.parameters(), lr=1e-2)
    for i in range(2):
        for j, (name, p) in enumerate(comp.named_parameters()):
            g = torch.Generator().manual_seed(9 * i + j)
            p.grad = None if "scorer" in name else torch.randn(p.shape, generator=g)
        optimizer.step()
    return comp, optimizer


def states(folder):
    return sorted(path.name for path in (folder / "state").iterdir())


def test_a_state_brings_back_every_bit_and_two_are_kept(tmp_path):
    comp, optimizer = trained(1)
    for step in (4, 8, 12):
        save_state(tmp_path, step, comp, optimizer, {"processes": 1})
    assert states(tmp_path) == ["00000008.safetensors", "00000012.safetensors"]

    other, its = trained(2)
    its.state.clear()
    assert load_state(tmp_path, other, its)["step"] == 12
    for (name, p), q in zip(comp.named_parameters(), other.parameters()):
        assert torch.equal(p, q)
        have = its.state.get(q, {})
        want = optimizer.state.get(p, {})
        assert have.keys() == want.keys() and all(torch.equal(have[k], want[k]) for k in want), name
        assert ("scorer" in name) == (not want)

    for c, o in ((comp, optimizer), (other, its)):  # and the next step is the same, too
        for p in c.parameters():
            p.grad = torch.ones_like(p)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(comp.parameters(), other.parameters()))


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:len(raw) // 2],
    lambda raw: raw[:-9] + b"\x7f" + raw[-8:],
    lambda raw: b"",
    lambda raw: raw.replace(b"kvdistill_state", b"kvdistill_other"),
    lambda raw: raw.replace(b"sha256", b"sha257"),
    lambda raw: re.sub(rb'(step[^0-9]*)\d', rb"\g<1>7", raw, count=1)])
def test_a_damaged_state_is_passed_over_and_two_are_an_error(tmp_path, capsys, damage):
    comp, optimizer = trained()
    older, newer = [save_state(tmp_path, step, comp, optimizer, {}) for step in (4, 8)]
    newer.write_bytes(damage(newer.read_bytes()))
    assert load_state(tmp_path, comp, optimizer)["step"] == 4
    assert str(newer) in capsys.readouterr().err

    older.write_bytes(damage(older.read_bytes()))
    with pytest.raises(BadInput, match="none of 2 states can be read"):
        load_state(tmp_path, comp, optimizer)
    assert load_state(tmp_path / "new", comp, optimizer) is None


def test_a_copy_of_a_state_is_no_state(tmp_path):
    """Of its own, a run keeps two; what is not its own stays."""
    comp, optimizer = trained()
    path = [save_state(tmp_path, step, comp, optimizer, {}) for step in (4, 8)][1]
    copies = ["-1.safetensors", "00000008 (copy).safetensors", "best.safetensors"]
    for name in copies:
        path.with_name(name).write_bytes(path.read_bytes())
    assert load_state(tmp_path, comp, optimizer)["step"] == 8
    save_state(tmp_path, 12, comp, optimizer, {})
    assert states(tmp_path) == sorted([*copies, "00000008.safetensors", "00000012.safetensors"])


def test_states_that_do_not_fit_are_passed_over(tmp_path, capsys):
    """One of another compressor, and one that lacks some of the moments."""
    comp, optimizer = trained()
    save_state(tmp_path, 4, comp, optimizer, {})
    other = tiny_compressor(tiny_llama(), rank=2)
    save_state(tmp_path, 8, other, torch.optim.AdamW(other.parameters()), {})
    assert load_state(tmp_path, comp, optimizer)["step"] == 4
    assert "00000008.safetensors: not as expected" in capsys.readouterr().err

    del optimizer.state[comp.b_q]["exp_avg_sq"]
    save_state(tmp_path, 8, comp, optimizer, {})
    assert load_state(tmp_path, comp, optimizer)["step"] == 4
    assert "00000008.safetensors: not as expected" in capsys.readouterr().err
    assert set(optimizer.state[comp.b_q]) == {"step", "exp_avg", "exp_avg_sq"}


def test_what_is_later_than_the_state_is_put_away(tmp_path):
    """Else a disk that recovers would bring back a state without its log."""
    comp, optimizer = trained()
    for step in (4, 8):
        save_state(tmp_path, step, comp, optimizer, {})
    (tmp_path / "state" / ".00000012.safetensors.77-ab.tmp").write_bytes(b"half")
    (tmp_path / ".config.json.77-ab.tmp").write_bytes(b"half")
    quarantine(tmp_path, 4)
    assert states(tmp_path) == ["00000004.safetensors", "00000008.damaged"]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


# --------------------------------------------------------------------------------- a run's folder

def config(**changes):
    """The content of a config.json; changes: of its flags."""
    base = {"weights": "a", "architecture": {"n_layer": 6}}
    train = {"lr": 1.0, "micro": 1, "steps": 5} | changes
    return {"train": train, "system": None, "dtype": "float32", "from": None, "base": base}


def begun(folder):
    with open_run(folder, config(), may_resume=False) as finished:
        assert not finished
    (folder / "log.jsonl").write_text('{"step": 0}\n')


def test_a_run_goes_on_only_if_it_is_told_to(tmp_path):
    out = tmp_path / "out"
    begun(out)
    with pytest.raises(BadInput, match="is not empty; add --resume"):
        begun(out)
    with open_run(out, config(micro=2), may_resume=True) as finished:  # computes the same
        assert not finished
    assert read_json(out / "config.json") == config()


def test_a_run_that_failed_before_its_first_step_is_no_hindrance(tmp_path):
    begun(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with open_run(tmp_path, config(lr=2.0), may_resume=False):
        assert read_json(tmp_path / "config.json") == config(lr=2.0)
    write_json(tmp_path / "config.json", {"model_type": "llama"})  # of a model, not of a run
    with pytest.raises(BadInput, match="is not empty"):
        begun(tmp_path)


def test_flags_are_compared_before_there_is_a_model(tmp_path):
    begun(tmp_path)
    flags = {"train": config(lr=2.0, steps=6, micro=2)["train"], "system": None}
    changes = "--lr was 1.0, now 2.0; --steps was 5, now 6; repeat the flags of .*config.json"
    with pytest.raises(BadInput, match=changes):
        check_run(tmp_path, flags, may_resume=True)
    check_run(tmp_path, {"train": config()["train"]}, may_resume=True)


def test_to_resume_where_there_is_nothing_is_to_start(tmp_path):
    (tmp_path / ".hidden").touch()
    with open_run(tmp_path, config(), may_resume=True) as finished:
        assert not finished
    assert read_json(tmp_path / "config.json") == config()


def test_a_finished_run_says_so(tmp_path):
    begun(tmp_path)
    write_json(tmp_path / "result.json", {})
    with open_run(tmp_path, config(), may_resume=True) as finished:
        assert finished


@pytest.mark.parametrize("wanted, why", [
    (config(lr=2.0), "lr was 1.0, now 2.0"),
    (config(tau=0.5), "tau was None, now 0.5"),
    (config() | {"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
    (config() | {"system": "Be brief."}, "system was None"),
    (config() | {"from": {"created": "today"}}, "--init-adapter is another one"),
    (config() | {"base": {"weights": "b", "architecture": {"n_layer": 6}}}, "weights was 'a', now 'b'"),
    (config() | {"base": {"weights": "a", "architecture": {"n_layer": 5}}}, "n_layer was 6, now 5"),
])
def test_a_folder_belongs_to_one_run(tmp_path, wanted, why):
    begun(tmp_path)
    with pytest.raises(BadInput, match=why), open_run(tmp_path, wanted, may_resume=True):
        pass


@pytest.mark.parametrize("text", [
    None, "{", "5", json.dumps(config() | {"train": 5}), json.dumps(config() | {"dtype": ["float32"]}),
    json.dumps(config() | {"base": {}}), json.dumps(config()).replace("1.0", "1e999")])
def test_a_folder_with_something_else_is_refused(tmp_path, text):
    (tmp_path / "letter.txt").write_text("Dear")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=f"{tmp_path}"), open_run(tmp_path, config(), may_resume=True):
        pass


def test_one_run_at_a_time_in_a_folder(tmp_path):
    code = "import sys, pathlib, run.checkpoint as c\nwith c.lock_dir(pathlib.Path(sys.argv[1])): pass"

    def other():
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    with open_run(tmp_path, config(), may_resume=False):
        assert "another process is training in it" in other().stderr
    assert other().returncode == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    """The kernel's own folder stands for a disk that is read-only to everybody."""
    (tmp_path / "file").touch()
    for folder in ("/proc/kvdistill", "/proc/sys", tmp_path / "file"):
        with pytest.raises(BadInput, match="--out .* cannot be written to"), lock_dir(Path(folder)):
            pass


# ------------------------------------------------------------------------------------------ the log

def test_a_log_is_cut_back_to_its_state(tmp_path, capsys):
    """Lines after the state go, a half-written one too; lines that are missing are spoken of."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    trim_log(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert not capsys.readouterr().err
    trim_log(path, 5)
    assert "2 lines where 5 were expected" in capsys.readouterr().err

    path.write_text('{"step": 50}\n{"step": 51}\n')  # its beginning was lost
    trim_log(path, 51)
    assert path.read_text() == '{"step": 50}\n'


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
