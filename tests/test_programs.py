"""The programs as a user runs them: in their own process, on a tiny model folder, with good and with bad input."""
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress import load_adapter
from conftest import ROOT, save_llama, tiny_compressor, tiny_llama
from run.errors import BadInput, run_program
from run.files import load_cache, newest_adapter, save_adapter, save_cache
from data.tokenizer import Tokenizer
from model import load_llama
from test_tokenizer import tiny_tokenizer_json

def write_model(folder, **changes):
    """A tiny random Llama with a byte-level tokenizer, in the Hugging Face layout."""
    save_llama(tiny_llama(vocab_size=310, **{"max_positions": 4096} | changes), folder)
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Text {i} says that the Old Mill was built in {1500 + i} by Ada Stone. " * 12)
    return folder


def run(program, *args, code=0, stdin=None):
    """Run a program of ours; returns stdout, stderr. Asserts the exit code, and that errors are no tracebacks."""
    got = subprocess.run([sys.executable, ROOT / program, *map(str, args)], capture_output=True, text=True, cwd=ROOT,
                         input=stdin, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert got.returncode == code, got.stderr[-2000:]
    if code == 2:
        assert "Traceback" not in got.stderr
    return got.stdout, got.stderr


def one_line_error(program, *args) -> str:
    """What a program says when it exits with 2: run in this process, which is twenty times faster than starting one."""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", [program, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            run_program(module.main)
    lines = stderr.getvalue().strip().splitlines()
    assert stop.value.code == 2 and "error:" in lines[-1], lines
    return lines[-1]


# compress.py -------------------------------------------------------------------------------------------------------

SMALL = ("--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "5")


def test_compress_save_load_ask(tiny, tmp_path):
    """The answers from a saved cache are those of the short cache it was saved from; bytes shrink as printed."""
    doc, adapter, cache = tmp_path / "doc.txt", tmp_path / "adapter", tmp_path / "cache.safetensors"
    doc.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 5)
    model, tok = load_llama(tiny), Tokenizer(tiny)
    save_adapter(adapter, tiny_compressor(model), model, tok, {})
    out, _ = run("compress.py", "--weights", tiny, "--context", doc, "--adapter", adapter, "--keep", "0.1",
                 "--question", "Why?", "--question", "And then?", "--save", cache, *SMALL)
    n, k = map(int, re.search(r"(\d+) compressible -> (\d+) kept", out).groups())
    assert k == -(-n // 10)
    before, after = (int(x.replace(",", "")) for x in re.search(r"bytes +([\d,]+) -> ([\d,]+)", out).groups())
    assert after < 0.2 * before
    marked = "".join(re.findall(r"\[(.*?)\]", out.split("\n\n")[1], re.S))
    assert 0 < len(marked) <= 3 * k
    short = re.findall(r"short  (.*)", out)
    again, _ = run("compress.py", "--weights", tiny, "--load", cache, "--question", "Why?", "--question", "And then?",
                   *SMALL)
    assert len(short) == 2 and [line[2:] for line in again.splitlines() if line.startswith("  ")] == short


@torch.no_grad()
def test_8_save_and_load_change_no_bit(tiny, tmp_path):
    model, tok = load_llama(tiny), Tokenizer(tiny)
    comp = tiny_compressor(model)
    tokens = torch.randint(0, 300, (2, 50))
    cache = comp.compress(model, comp.read(model, tokens), keep=0.2)
    cont = torch.randint(0, 300, (2, 6))
    want = model(cont, cache)
    save_cache(tmp_path / "c.safetensors", cache, model, tok)
    assert torch.equal(model(cont, load_cache(tmp_path / "c.safetensors", model, tok)), want)
    save_adapter(tmp_path / "a", comp, model, tok, {})
    again = load_adapter(tmp_path / "a", model, tok)
    assert torch.equal(model(cont, again.compress(model, again.read(model, tokens), keep=0.2)), want)


def test_foreign_and_damaged_files_are_refused(tiny, tmp_path, capsys):
    model, tok = load_llama(tiny), Tokenizer(tiny)
    comp = tiny_compressor(model)
    save_adapter(tmp_path / "a", comp, model, tok, {})
    cache_file = tmp_path / "c.safetensors"
    ctx = comp.read(model, torch.ones(1, 20, dtype=torch.long))
    save_cache(cache_file, comp.compress(model, ctx, keep=0.5), model, tok)

    other = load_llama(write_model(tmp_path / "other", n_kv_head=1))
    for load, path in ((load_adapter, tmp_path / "a"), (load_cache, cache_file)):
        with pytest.raises(BadInput, match="n_kv_head = 2, this one has 1"):
            load(path, other, tok)
    assert "warning" not in capsys.readouterr().err
    load_cache(cache_file, tiny_llama(vocab_size=310, max_positions=4096, seed=9), tok)
    assert "made with other weights" in capsys.readouterr().err

    good = cache_file.read_bytes()
    cache_file.write_bytes(good[:len(good) // 2])
    with pytest.raises(BadInput, match="cannot be read as a saved cache"):
        load_cache(cache_file, model, tok)
    save_file({"x": torch.ones(3)}, cache_file)
    with pytest.raises(BadInput, match="not a saved cache"):
        load_cache(cache_file, model, tok)
    with pytest.raises(BadInput, match="cannot be read"):
        load_cache(tmp_path / "nowhere", model, tok)

    save_cache(cache_file, comp.compress(model, ctx, keep=0.5), model, tok)
    with safe_open(cache_file, "pt") as f:
        header, parts = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    for name, bad in (("bias", parts["bias"][0]), ("bias", parts["bias"] * torch.nan), ("k", parts["k"][:-1]),
                      ("positions", parts["positions"][:, :-1]), ("next_position", parts["next_position"][0])):
        save_file(parts | {name: bad.contiguous().clone()}, cache_file, metadata=header)
        with pytest.raises(BadInput, match="no cache of this model has"):
            load_cache(cache_file, model, tok)

    for header in ("{", "[]"):
        save_file(parts, cache_file, metadata={"kvdistill_cache": header})
        with pytest.raises(BadInput, match="header cannot be read"):
            load_cache(cache_file, model, tok)

    tensors = load_file(tmp_path / "a" / "adapter.safetensors")
    save_file(tensors | {"gamma": torch.tensor(torch.nan)}, tmp_path / "a" / "adapter.safetensors")
    with pytest.raises(BadInput, match="not finite"):
        load_adapter(tmp_path / "a", model, tok)
    save_file({k: v[:1] if k == "b_q" else v for k, v in tensors.items()}, tmp_path / "a" / "adapter.safetensors")
    with pytest.raises(BadInput, match="not those that adapter.json describes"):
        load_adapter(tmp_path / "a", model, tok)
    with pytest.raises(BadInput, match="no such file"):
        load_adapter(tmp_path / "nowhere", model, tok)


def test_compress_refuses_bad_input(tiny, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary"
    empty.write_text("  \n")
    binary.write_bytes(b"\xff\xfe\x00")
    base = ("--weights", tiny)
    for args, message in (
            (("--context", tmp_path / "nowhere.txt"), "no such file"), (("--context", empty), "context is empty"),
            (("--context", binary), "cannot be read as UTF-8 text"), (("--keep", "0"), "keep is 0"),
            (("--keep", "1.5"), "keep is 1.5"),
            (("--tokens", "0"), "tokens is 0"), (("--context", ""), "cannot be read"),
            (("--seed", "-1"), "whole number"),
            (("--max-new-tokens", "0"), "at least 1"), (("--save", tmp_path), "expected the name of a file"),
            (("--context", empty / "x"), "cannot be read"),
            (("--keep", "0.1", "--tokens", "3"), "not allowed with"),
            (("--kep", "0.1"), "unrecognized arguments"), (("--load", "x"), "needs at least one --question"),
            (("--load", "x", "--keep", "0.5", "--question", "q"), "--load asks"),
            (("--adapter", tmp_path / "nowhere"), "no such file"), (("--device", "toaster"), "cannot be used")):
        assert message in one_line_error("compress.py", *base, *args), args
    assert "no such folder" in one_line_error("compress.py", "--weights", tmp_path / "nowhere")
    long = tmp_path / "long.txt"
    long.write_text("word " * 2000)
    assert "positions; use a shorter text" in one_line_error("compress.py", *base, "--context", long, *SMALL)


def test_context_from_standard_input_shorter_than_k(tiny):
    out, _ = run("compress.py", "--weights", tiny, "--context", "-", "--tokens", "500", *SMALL, stdin="Just a few.")
    n, k = map(int, re.search(r"(\d+) compressible -> (\d+) kept", out).groups())
    assert n == k
    full, short = (re.search(rf"\n  {name} +(.*)", out)[1] for name in ("full", "short"))
    assert full == short


def test_the_newest_adapter_is_the_last_one_made_for_this_model(tiny, tmp_path, monkeypatch):
    import compress
    monkeypatch.setattr(compress, "ROOT", tmp_path)
    model, tok = load_llama(tiny), Tokenizer(tiny)
    assert newest_adapter(model, tok) is None
    mine, other = compress.base_of(model, tok), compress.base_of(load_llama(write_model(tmp_path / "m", n_head=2)), tok)
    for name, created, base in (("adapters/a", "2030-01-02", mine), ("out/run/adapter", "2031-01-01", mine),
                                ("adapters/b", "2029-01-01", mine), ("out/new/adapter", "2032-01-01", other)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter.json").write_text(json.dumps({"created": created, "base": base}))
    assert newest_adapter(model, tok) == tmp_path / "out/run/adapter"


# train.py ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny_run(tiny, texts, tmp_path):
    """Flags of a training run that takes seconds and writes nothing outside its temporary folder."""
    return ("--weights", tiny, "--sources", texts, "--shards", tmp_path / "shards", "--context", "64", "--answer", "8",
            "--eta", "2", "--rank", "4", "--dtype", "fp32", "--device", "cpu")


def test_train_learns_on_a_tiny_model(tiny, tiny_run, tmp_path):
    """40 steps through the real program: the logged loss falls, an adapter appears, the last line is the JSON table."""
    out, _ = run("train.py", *tiny_run, "--steps", "40", "--batch", "4", "--micro", "2",
                 "--mix", "continue=1,recite=1,cloze=1", "--keep-low", "0.3", "--lr", "0.01", "--out", tmp_path / "run",
                 "--eval-contexts", "4")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(40))
    first, last = (sum(line["loss"] for line in part) for part in (log[:10], log[-10:]))
    assert last < 0.95 * first
    result = json.loads(out.strip().splitlines()[-1])
    assert {"cells", "seconds", "threads", "command", "commit", "seed"} <= set(result)
    cells = {(c["method"], c["keep"], c["kind"]) for c in result["cells"]}
    assert ("kvdistill", 0.25, "cloze") in cells and ("none", 0.0, "all") in cells
    assert all(c["mean"]["kl"] >= 0 and 0 <= c["mean"]["agree"] <= 1 and c["n"] > 0 for c in result["cells"])
    model, tok = load_llama(tiny), Tokenizer(tiny)
    comp = load_adapter(tmp_path / "run" / "adapter", model, tok)
    assert comp.b_q.abs().max() > 0
    _, err = run("train.py", *tiny_run, "--steps", "1", "--out", tmp_path / "run", "--eval-contexts", "0", code=2)
    assert "holds another run (--batch was 4, now 1)" in err
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 40, "the first run's log is untouched"


def test_train_refuses_bad_input(tiny, tiny_run, tmp_path):
    for args, message in ((("--steps", "0"), "--steps is 0"), (("--batch", "3", "--micro", "2"), "must divide --batch"),
                          (("--keep-high", "1.0"), "keep-low"), (("--mix", "sing=1"), "expected KIND=COUNT"),
                          (("--decay", "linear"), "expected centred or sigmoid"), (("--chunk", "-1"), "--chunk is -1"),
                          (("--warmup", "0"), "at least 1"), (("--clip", "0"), "above 0"), (("--soft", "7"), "share"),
                          (("--seed", "-3"), "whole number"), (("--scorer-lr", "-1"), "--scorer-lr is -1"),
                          (("--stpes", "5"), "unrecognized arguments"), (("--mix", "cloze=²"), "expected KIND=COUNT"),
                          (("--sources", "wiki,"), "an entry is empty"),
                          (("--lam", "2"), "expected 0"), (("--steps", "many"), "invalid int value")):
        assert message in one_line_error("train.py", "--weights", tiny, *args), args
    assert "eta is 9" in one_line_error("train.py", *tiny_run, "--eta", "9", "--out", tmp_path / "x")
    assert "no such file or folder" in one_line_error("train.py", *tiny_run, "--sources", tmp_path / "no",
                                                      "--out", tmp_path / "y")


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tiny_run, tmp_path):
    for which in ("--lr", "--scorer-lr"):
        message = one_line_error("train.py", *tiny_run, "--steps", "30", which, "1e30", "--warmup", "1",
                                 "--out", tmp_path / f"run{which}", "--eval-contexts", "0")
        assert re.search(r"step \d+: .*(the loss is|not a finite)", message), message


@pytest.mark.parametrize("program", ["compress.py", "train.py", "eval.py", "data/fetch.py", "data/prepare.py"])
def test_help_works_and_unknown_flags_are_errors(program):
    out, _ = run(program, "--help")
    assert "usage:" in out and len(out) > 200
    _, err = run(program, "--no-such-flag", code=2)
    assert "unrecognized arguments: --no-such-flag" in err
