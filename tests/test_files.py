"""What strangers made or disks damaged is refused in one line, and programs end in order."""
import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, save_llama, tiny_llama
from model import load_llama
from run import loading
from run.errors import BadInput, expect, provenance, read_json, reading, run_program, write_json
from run.loading import load_checked, open_model, pick_dtype, read_config
from test_tokenizer import tiny_tokenizer_json

# ------------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize("text, why", [
    ("[1]", "where dict was expected"),
    ('{"a": NaN}', "NaN is not finite"),
    ('{"a": -Infinity}', "not finite"),
    ('{"a": 1e999}', "not finite"),
    ('{"a": 1e308}', "or larger than"),
    ('{"a": 1%s}' % ("0" * 400), "or larger than"),
    ('{"a": %s}' % ("9" * 5000), "not finite"),
    ('{"a": %s}' % ("[" * 100_000 + "]" * 100_000), "recursion"),
    ('{"a": "\\uD800"}', "surrogates not allowed"),
    ('{"a": 1', "delimiter"),
    ("", "Expecting value"),
    (b"\xff{}", "can't decode"),
    (None, "no such file"),
])
def test_json_that_is_refused(tmp_path, text, why):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=f"a.json: .*{why}") as e:
        read_json(path)
    assert str(e.value).isprintable()


def test_json_that_is_read(tmp_path):
    """The smiling face is a pair of surrogates; 10^30 stands in many a tokenizer_config.json."""
    good = {"a": [1, -2.5, True, None, "汉🙂\n"], "b": 10 ** 30}
    (tmp_path / "a.json").write_text(json.dumps(good))
    assert read_json(tmp_path / "a.json") == good


def test_whatever_goes_wrong_while_reading_is_one_line():
    for wrong in (lambda: {}["x"], lambda: 1 / 0, lambda: expect(True, int), lambda: open("/nowhere")):
        with pytest.raises(BadInput, match=r"^f\\n\\x1b\[31m: .+; advice$"):
            with reading("f\n\x1b[31m", "advice"):
                wrong()
    with pytest.raises(BadInput, match="^has its own line$"), reading("f"):
        raise BadInput("has its own line")
    with pytest.raises(KeyboardInterrupt), reading("f"):
        raise KeyboardInterrupt


def test_what_killed_writers_left_is_removed(tmp_path):
    """An hour after they wrote last; a younger file may be another writer's."""
    for name in (".a.json.1-aa.tmp", ".a.json.2-bb.tmp", ".b.json.1-aa.tmp"):
        (tmp_path / name).write_text("half")
    for name in (".a.json.1-aa.tmp", ".b.json.1-aa.tmp"):
        os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    write_json(tmp_path / "a.json", {})
    assert sorted(os.listdir(tmp_path)) == [".a.json.2-bb.tmp", ".b.json.1-aa.tmp", "a.json"]


# ------------------------------------------------------------------------------------------ programs

def test_flags_can_be_checked_before_torch_is_imported():
    code = ("import sys, run.errors, run.flags, run.train_flags, run.eval_flags; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_command_with_blanks_can_be_given_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compress.py", "--question", "Who built it?"])
    assert provenance(0)["command"] == "python compress.py --question 'Who built it?'"


def test_what_model_py_refuses_is_one_line_and_other_errors_are_not(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: loading.Config.from_json(tmp_path / "config.json"))
    assert stop.value.code == 2 and "model_type is 'bert'" in capsys.readouterr().err

    for wrong in (lambda: int("x"), lambda: loading.rope_frequencies(None), lambda: expect(5, str)):
        with pytest.raises((ValueError, AttributeError)):
            run_program(wrong)


def start(code, **env):
    return subprocess.Popen(
        [sys.executable, *code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_program_says_so_in_one_line(number):
    code = """
import time
from run.errors import run_program
def main():
    try:
        print("go", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up")
run_program(main)"""
    p = start(["-c", code])
    assert p.stdout.readline() == "go\n"
    p.send_signal(number)
    out, err = p.communicate(timeout=30)
    assert (p.returncode, out) == (128 + number, "cleaned up\n")
    assert err == f"-c: stopped by {number.name}\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    p = start(["-c", "from run.errors import run_program\nrun_program(lambda: print('x\\n' * 100_000))"])
    p.stdout.close()
    assert p.stderr.read() == "" and p.wait() == 0


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    """numpy as a program finds it here is a Ctrl-C that comes while it is imported."""
    (tmp_path / "numpy.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    p = start(["data/fetch.py", "--out", str(tmp_path)], PYTHONPATH=str(tmp_path))
    assert p.communicate(timeout=30) == ("", "")
    assert p.returncode == -signal.SIGINT  # which shells call 130


# ------------------------------------------------------------------------------------------- weights

@pytest.fixture
def saved(tmp_path):
    return save_llama(tiny_llama(), tmp_path / "llama")


def change(saved, **values):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("key, value, why", [
    ("tie_word_embeddings", "false", "'false' where bool"),
    ("num_hidden_layers", 10 ** 9, "1 to 1000"),
    ("num_hidden_layers", True, "True where int"),
    ("hidden_size", -5, "hidden_size is -5"),
    ("vocab_size", 10 ** 12, "vocab_size is 1000000000000"),
    ("vocab_size", 97.0, "97.0 where int"),
    ("vocab_size", 1 << 24, "embed_tokens.weight is .97, 48., config.json says .16777216, 48."),
    ("num_attention_heads", 1 << 22, "48, 50331648"),
    ("num_key_value_heads", 3, "expected a multiple"),
    ("head_dim", 13, "even width"),
    ("rms_norm_eps", -1e-5, "a number above 0"),
    ("rope_theta", "x", "'x' where int or float"),
    ("rope_theta", 10 ** 400, "larger than"),
    ("rope_scaling", "x", "not as expected"),
    ("rope_scaling", {"type": "yarn", "factor": 2.0}, "'yarn' are not supported"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "'linear' are not supported"),
    ("rope_scaling", dict.fromkeys(loading.Config.__annotations__, 1) | {"type": "llama3"}, "None where"),
    ("model_type", ["llama"], r"model_type is \['llama'\]"),
    ("model_type", "gemma3_text", "model_type is 'gemma3_text'"),
], ids=str)
def test_a_configuration_that_cannot_be_is_refused(saved, key, value, why):
    change(saved, **{key: value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInput, match=why) as e:
        load_checked(saved)
    assert str(e.value).count(str(saved)) == 1
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200 << 10, "no memory was taken for it"


@pytest.mark.parametrize("changes, positions", [
    ({"model_type": "mistral", "sliding_window": 100}, 100),
    ({"model_type": "mistral", "sliding_window": None}, 512),
    ({"model_type": "mistral"}, 512),  # its window is 4096
    ({"model_type": "qwen2", "sliding_window": 100}, 512),
    ({"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": True}, 100),
    ({"model_type": "llama", "sliding_window": 100}, 512),
], ids=str)
def test_a_model_is_used_up_to_its_sliding_window(saved, changes, positions):
    change(saved, **changes)
    assert read_config(saved / "config.json").max_positions == positions


def test_surplus_tensors_are_refused_but_for_harmless_ones(saved):
    """Old files hold rotary tables, and a tied head a second time."""
    file = saved / "model.safetensors"
    tensors = load_file(file)
    want = load_checked(saved).state_dict()
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | harmless, file)
    found = load_checked(saved).state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)

    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, file)
    with pytest.raises(BadInput, match="q_proj.bias is not in the model"):
        load_checked(saved)
    save_file(tensors, file)
    change(saved, num_hidden_layers=7)
    with pytest.raises(BadInput, match="missing, the first is layers.6"):
        load_checked(saved)
    with pytest.raises(ValueError, match="no tensor for layers.6"):
        load_llama(saved)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.long, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_finite_numbers_are_refused(saved, bad):
    tensors = load_file(saved / "model.safetensors")
    w = tensors["model.layers.3.mlp.up_proj.weight"]
    if isinstance(bad, float):
        w[5, 7] = bad
    else:
        tensors["model.layers.3.mlp.up_proj.weight"] = w.to(bad)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(BadInput, match="layers.3.mlp.up"):
        load_checked(saved)


@pytest.mark.parametrize("name", ["../other.st", "..", ".", "", "a/../b", 5, None, ["x"], "\0", "\ud800"])
def test_an_index_names_files_of_its_folder(saved, monkeypatch, name):
    """Whatever else it names is not even opened, though it be there."""
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").rename(saved.parent / "other.st")
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    monkeypatch.setattr(loading, "safe_open", lambda *x: pytest.fail("it is opened"))
    with pytest.raises(BadInput, match="^[^\n\0]+; download it again$"):
        load_checked(saved)


def test_links_in_a_folder_are_followed(saved):
    """They are the user's own."""
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").rename(saved.parent / "other.st")
    (saved / "link.st").symlink_to(saved.parent / "other.st")
    index = {"weight_map": dict.fromkeys(tensors, "link.st")}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_checked(saved).embed.weight, tensors["model.embed_tokens.weight"])


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(saved, monkeypatch):
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(loading, "load_checked", lambda *x: pytest.fail("it is said too late"))
    (saved / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()))
    flags = argparse.Namespace(weights=str(saved), device="cpu", dtype="fp32", system=None)
    with pytest.raises(BadInput, match="the tokenizer has [0-9]+ ids, the model 97"):
        open_model(flags)


@pytest.mark.parametrize("features, dtype", [
    ("flags: fpu avx512_bf16 sse", torch.bfloat16),
    ("flags: amx_bf16 amx_tile", torch.bfloat16),
    ("Features: asimd bf16 i8mm", torch.bfloat16),
    ("flags: fpu avx512f avx512_fp16", torch.float32),
])
def test_dtype_auto_asks_what_the_processor_has(monkeypatch, features, dtype):
    monkeypatch.setattr(Path, "read_text", lambda path: features)
    assert pick_dtype("auto", torch.device("cpu")) == dtype
    assert pick_dtype("fp32", torch.device("cpu")) == torch.float32
