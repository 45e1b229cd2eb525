"""Files that strangers made or disks damaged: each is refused in one line that names it, or passed over with one."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, tiny_compressor, tiny_llama
from run import files
from run.errors import BadInput, expect, provenance, read_json, reading, write_json
from run.files import base_of, load_state, default_adapter, read_adapter, save_adapter, save_state


class Tok:
    fingerprint, system = "t", None


# errors -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, why", [
    ("[1]", "where dict was expected"), ('{"a": NaN}', "NaN is not a finite number"), ('{"a": 1e999}', "not a finite"),
    ('{"a": -Infinity}', "not a finite number"), ('{"a": %s}' % ("9" * 5000), "4300 digits"),
    ('{"a": %s}' % ("[" * 100_000 + "]" * 100_000), "recursion"), ('{"a": "\\uD800"}', "surrogates not allowed"),
    ('{"a": 1', "delimiter"), ("", "Expecting value"), (b"\xff{}", "can't decode"), (None, "no such file"),
])
def test_json_that_is_refused(tmp_path, text, why):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=f"a.json: .*{why}.*; write, train") as e:
        read_json(path)
    assert str(e.value).isprintable() and len(str(e.value)) < 400


def test_json_that_is_read(tmp_path):
    good = {"a": [1, 2.5, True, None, "汉🙂\n"], "b": 10 ** 30}
    (tmp_path / "a.json").write_text(json.dumps(good))  # the smiling face is a pair of surrogates here
    assert read_json(tmp_path / "a.json") == good


def test_whatever_goes_wrong_while_reading_is_one_line():
    for wrong in (lambda: {}["x"], lambda: 1 / 0, lambda: expect(True, int, float), lambda: open("/nowhere/x")):
        with pytest.raises(BadInput, match=r"^f\\n\\x1b\[31m: .+; advice$"):
            with reading("f\n\x1b[31m", "advice"):
                wrong()
    with pytest.raises(BadInput, match="^has its own sentence$"), reading("f"):
        raise BadInput("has its own sentence")
    with pytest.raises(KeyboardInterrupt), reading("f"):
        raise KeyboardInterrupt


def test_a_command_with_blanks_can_be_given_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compress.py", "--question", "Who built it?"])
    assert provenance(0)["command"] == "python compress.py --question 'Who built it?'"


# how programs end ---------------------------------------------------------------------------------------------------

def start(code, **env):
    return subprocess.Popen([sys.executable, *code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | env)


@pytest.mark.parametrize("number, says", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_stopped_program_says_so_in_one_line(number, says):
    code = ("import time\nfrom run.errors import run_program\ndef main():\n  try:\n    print('go', flush=True)\n"
            "    time.sleep(60)\n  finally:\n    print('cleaned up')\nrun_program(main)")
    p = start(["-c", code])
    assert p.stdout.readline() == "go\n"
    p.send_signal(number)
    out, err = p.communicate(timeout=30)
    assert (p.returncode, out, err) == (128 + number, "cleaned up\n", f"-c: stopped by {says}\n")


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "from run.errors import run_program\nrun_program(lambda: print('x\\n' * 100_000))"
    p = start(["-c", code])
    p.stdout.close()
    assert p.stderr.read() == "" and p.wait() == 0


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    """numpy as a program finds it here is a Ctrl-C that comes while it is imported."""
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    p = start(["data/fetch.py", "--out", str(tmp_path)], PYTHONPATH=str(tmp_path))
    assert p.communicate(timeout=30) == ("", "") and p.returncode == -signal.SIGINT  # which shells call 130


# weights, adapters, states ------------------------------------------------------------------------------------------

def test_every_tensor_counts_in_the_fingerprint_of_weights():
    want = base_of(tiny_llama(tied=False), Tok)["weights"]
    assert base_of(tiny_llama(tied=False), Tok)["weights"] == want
    for name, _ in tiny_llama(tied=False).named_parameters():
        other = tiny_llama(tied=False)
        with torch.no_grad():
            other.get_parameter(name).mul_(1.5)
        assert base_of(other, Tok)["weights"] != want, name


def test_the_default_adapter_is_the_last_one_made_for_this_model(tmp_path, monkeypatch, capsys):
    """One that cannot be read is passed over with a line: it must not stop who has another."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    model = tiny_llama()
    assert default_adapter(model, Tok) is None
    mine, other = base_of(model, Tok), base_of(tiny_llama(n_head=2), Tok)
    for name, about in (("adapters/a", {"created": "2030-01-02", "base": mine}),
                        ("out/run/adapter", {"created": "2031-01-01", "base": mine}),
                        ("adapters/b", {"created": "2029-01-01", "base": mine}),
                        ("out/new/adapter", {"created": "2032-01-01", "base": other}),
                        ("out/odd/adapter", {"created": 5, "base": mine}), ("out/odder/adapter", {"base": 5})):
        write_json(tmp_path / name / "adapter.json", about)
    (tmp_path / "out" / "odd" / "adapter" / "adapter.json").write_text("{")
    assert default_adapter(model, Tok) == tmp_path / "out/run/adapter"
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all("adapter.json: " in line and "passed over" in line for line in err)


def test_adapters_of_other_types_are_refused(tmp_path):
    model = tiny_llama()
    save_adapter(tmp_path, tiny_compressor(model), model, Tok, {"train": {"steps": 5}})
    assert read_adapter(tmp_path, model, Tok)[0]["train"] == {"steps": 5}
    good, about = load_file(tmp_path / "adapter.safetensors"), read_json(tmp_path / "adapter.json")
    for change in ({"b_q": good["b_q"].to(torch.float8_e4m3fn)}, {"b_q": good["b_q"].to(torch.complex64)},
                   {"gamma": torch.tensor(float("inf"))}):
        save_file(good | change, tmp_path / "adapter.safetensors")
        with pytest.raises(BadInput, match="adapter.safetensors: .*expected finite fp32"):
            read_adapter(tmp_path, model, Tok)
    save_file(good, tmp_path / "adapter.safetensors")
    for change in ({"config": 5}, {"base": [1]}, {"train": "x"}, {"created": 1.5}, {"base": {"architecture": 5}}):
        write_json(tmp_path / "adapter.json", about | change)
        with pytest.raises(BadInput, match="adapter.json: "):
            read_adapter(tmp_path, model, Tok)


def trained():
    comp = tiny_compressor(tiny_llama())
    optimizer = torch.optim.AdamW(comp.parameters(), lr=1e-2)
    for p in comp.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return comp, optimizer


def test_a_copy_of_a_state_is_no_state(tmp_path):
    comp, optimizer = trained()
    paths = [save_state(tmp_path, step, comp, optimizer, {}) for step in (4, 8)]
    for name in ("00000008 (copy).safetensors", "best.safetensors", "-1.safetensors"):
        (tmp_path / "state" / name).write_bytes(paths[1].read_bytes())
    assert load_state(tmp_path, comp, optimizer)["step"] == 8
    save_state(tmp_path, 12, comp, optimizer, {})
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "-1.safetensors", "00000008 (copy).safetensors", "00000008.safetensors", "00000012.safetensors",
        "best.safetensors"], "of its own, two are kept; what is not its own stays"


def test_a_state_of_another_compressor_is_passed_over(tmp_path, capsys):
    comp, optimizer = trained()
    save_state(tmp_path, 4, comp, optimizer, {})
    model = tiny_llama()
    other = tiny_compressor(model, rank=2)
    save_state(tmp_path, 8, other, torch.optim.AdamW(other.parameters()), {})
    assert load_state(tmp_path, comp, optimizer)["step"] == 4
    assert "00000008.safetensors: not as expected" in capsys.readouterr().err


def test_a_state_without_some_of_the_moments_is_passed_over(tmp_path, capsys):
    comp, optimizer = trained()
    save_state(tmp_path, 4, comp, optimizer, {})
    del optimizer.state[comp.b_q]["exp_avg_sq"]
    save_state(tmp_path, 8, comp, optimizer, {})
    assert load_state(tmp_path, comp, optimizer)["step"] == 4
    assert "00000008.safetensors: of the moments of b_q, it has step, exp_avg alone" in capsys.readouterr().err
    assert set(optimizer.state[comp.b_q]) == {"step", "exp_avg", "exp_avg_sq"}
