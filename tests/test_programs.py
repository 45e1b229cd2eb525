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
from safetensors.torch import load, load_file, save_file

from compress import load_adapter
from conftest import ROOT, save_llama, tiny_compressor, tiny_llama
from run.compress_flags import read_text
from run.errors import BadInput, read_json, run_program, write_json
from run.files import base_of, load_cache, default_adapter, save_adapter, save_cache
from run.world import World
from data.tokenizer import Tokenizer
from model import load_llama
from run.ask import METHODS
from run.ask import main as ask_main
from run.page import kept_map
from test_tokenizer import write_tokenizer
from train import Draw, TrainConfig
from train import main as train_main


def write_model(folder, **changes):
    """A tiny random Llama with a byte-level tokenizer, in the Hugging Face layout."""
    save_llama(tiny_llama(vocab_size=310, **{"max_positions": 4096} | changes), folder)
    return write_tokenizer(folder)


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
    module = importlib.import_module({"compress.py": "run.ask"}.get(program, program[:-3].replace("/", ".")))
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", [program, *map(str, args)])
        patch.setattr("run.errors.leave", sys.exit)  # which would end the tests
        with pytest.raises(SystemExit) as stop:
            run_program(module.main)
    lines = stderr.getvalue().strip().splitlines()
    assert stop.value.code == 2 and "error:" in lines[-1], lines
    return lines[-1]


# compress.py -------------------------------------------------------------------------------------------------------

SMALL = ("--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "5")


def test_compress_save_load_ask(tiny, tmp_path):
    """The answers from a saved cache are those of the short cache it was saved from; bytes shrink as printed."""
    doc, adapter, cache = tmp_path / "doc.txt", tmp_path / "run" / "adapter", tmp_path / "cache.safetensors"
    doc.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 5)
    model, tok = load_llama(tiny), Tokenizer(tiny)
    save_adapter(adapter, tiny_compressor(model, recent=4), model, tok, {})
    out, _ = run("compress.py", "--weights", tiny, "--context", doc, "--adapter", adapter.parent, "--keep", "0.1",
                 "--question", "Why?", "--question", "And then?", "--save", cache, *SMALL)
    assert f"adapter: {adapter} " in out  # the folder of a run is as good as that of its adapter
    n, k, least, most = map(int, re.search(r"(\d+) compressible -> (\d+) kept .*\((\d+) to (\d+)\)", out).groups())
    assert k == -(-n // 10) and 3 == least < k < most  # recent tokens in every head: 30 // 8
    before, after = (int(x.replace(",", "")) for x in re.search(r"bytes +([\d,]+) -> ([\d,]+)", out).groups())
    assert after < 0.2 * before
    short = re.findall(r"short  (.*)", out)
    again, _ = run("compress.py", "--weights", tiny, "--load", cache, "--question", "Why?", "--question", "And then?",
                   *SMALL)
    assert len(short) == 2 and re.findall(r"saved  (.*)", again) == short
    assert f"{k + 9} of {n + 9} tokens per head" in again


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"decay": "sigmoid"}, {"choice": "token"}], ids=str)
def test_8_save_and_load_change_no_bit(tiny, tmp_path, changes):
    """Rows of different lengths, whose heads hold different numbers of tokens: every tensor, and the logits."""
    model, tok = load_llama(tiny), Tokenizer(tiny)
    comp = tiny_compressor(model, **changes)
    tokens = torch.randint(0, 300, (2, 50))
    ctx = comp.read(model, tokens, torch.tensor([50, 31]), torch.arange(50).expand(2, 50) < 2)
    cache = comp.compress(model, ctx, keep=0.1)
    assert "choice" in changes or len(cache.entries().unique()) > 5
    cont = torch.randint(0, 300, (2, 6))
    want = model(cont, cache)
    save_cache(tmp_path / "c.safetensors", cache, model, tok)
    found = load_cache(tmp_path / "c.safetensors", model, tok)
    assert torch.equal(model(cont, found), want) and torch.equal(found.next_position, cache.next_position)
    a, b = ([[p.tensors() for p in parts] for parts in x.layers] for x in (found, cache))
    assert [[len(p) for p in parts] for parts in a] == [[len(p) for p in parts] for parts in b]
    assert all(torch.equal(*pair) for x, y in zip(a, b) for p, q in zip(x, y) for pair in zip(p, q))
    save_adapter(tmp_path / "a", comp, model, tok, {})
    again = load_adapter(tmp_path / "a", model, tok)
    assert torch.equal(model(cont, again.compress(model, ctx, keep=0.1)), want)


@pytest.fixture
def saved(tiny, tmp_path):
    """Model, tokenizer, and a saved adapter and cache of theirs."""
    model, tok = load_llama(tiny), Tokenizer(tiny)
    comp = tiny_compressor(model, recent=4)
    save_adapter(tmp_path / "a", comp, model, tok, {})
    ctx = comp.read(model, torch.arange(40)[None])
    save_cache(tmp_path / "c.safetensors", comp.compress(model, ctx, keep=0.5), model, tok)
    return model, tok, tmp_path / "a", tmp_path / "c.safetensors"


def test_files_of_other_models_are_refused(saved, tmp_path, capsys):
    model, tok, adapter, cache_file = saved
    other = load_llama(write_model(tmp_path / "other", n_kv_head=1))
    for read, path in ((load_adapter, adapter), (load_cache, cache_file)):
        with pytest.raises(BadInput, match="n_kv_head = 2, this one has 1"):
            read(path, other, tok)
    assert "warning" not in capsys.readouterr().err
    load_cache(cache_file, tiny_llama(vocab_size=310, max_positions=4096, seed=9), tok)
    assert "made with other weights" in capsys.readouterr().err


def test_damaged_caches_are_refused(saved):
    model, tok, _, path = saved
    good = path.read_bytes()
    with safe_open(path, "pt") as f:
        header, parts = f.metadata(), {k: f.get_tensor(k).clone() for k in f.keys()}  # not mapped: it is overwritten
    last = max(k for k in parts if k.startswith("3."))[:-len(".v")]

    def refused(match="write it again with --save"):
        with pytest.raises(BadInput, match=match) as e:
            load_cache(path, model, tok)
        assert "\n" not in str(e.value) and str(path) in str(e.value)

    path.write_bytes(good[:len(good) // 2])
    refused("write it again with --save")
    save_file({"x": torch.ones(3)}, path)
    refused("write it again with --save")
    for text, match in (("{", "not valid JSON"), ("[]", "where dict was expected"), ('{"format": 2}', "'base'"),
                        ('{"architecture": {}}', "format 1, expected 2"), ('{"format": 2, "base": []}', "where dict was")):
        save_file(parts, path, metadata={"kvdistill_cache": text})
        refused(match)
    k, positions, end = parts["3.0.k"], parts["3.0.positions"], parts["next_position"]
    for name, bad in (("3.0.k", k * torch.nan), ("3.0.k", k.half()), ("3.0.k", k[..., :-1]), ("3.0.k", k[0]),
                      ("3.0.v", parts["3.0.v"][:, :, :-1]), ("3.0.v", parts["3.0.v"].bfloat16()),
                      ("3.0.positions", positions + 40), ("3.0.positions", positions - 41),
                      ("3.0.positions", positions.long()), ("3.0.positions", positions.expand(1, 5, -1)),
                      ("3.0.bias", torch.full(positions.shape, torch.nan)), ("3.0.bias", torch.zeros(1)),
                      ("next_position", end[0]), ("next_position", end + 5000), ("next_position", -end),
                      ("next_position", end.int()), ("next_position", end[:0]), ("9.0.k", k), ("word", k),
                      ("3.0.k", k.repeat(1, 3, 1, 1)), (f"{last}.v", None), (f"{last}.positions", None)):
        made = {n: x.contiguous().clone() for n, x in (parts | {name: bad}).items() if x is not None}
        save_file(made, path, metadata=header)
        refused()
    path.write_bytes(good)
    load_cache(path, model, tok)


def test_damaged_and_older_adapters_are_refused(saved, tmp_path):
    model, tok, folder, _ = saved
    tensors, meta = load(folder.joinpath("adapter.safetensors").read_bytes()), read_json(folder / "adapter.json")

    def refused(match, tensors=tensors, **config):
        save_file(tensors, folder / "adapter.safetensors")
        kept = {k: v for k, v in (meta["config"] | config).items() if v is not None}
        write_json(folder / "adapter.json", meta | {"config": kept})
        with pytest.raises(BadInput, match=match) as e:
            load_adapter(folder, model, tok)
        assert "\n" not in str(e.value)
    refused("not finite", tensors | {"a_q": tensors["a_q"] * torch.nan})
    refused("not those that adapter.json describes", tensors | {"b_q": tensors["b_q"][:1]})
    refused("not those that adapter.json describes", choice="token")
    refused("not those that adapter.json describes", hidden=1 << 40)  # which is not allocated
    refused("another version of this program \\(two_pass ", two_pass=False)
    refused("another version of this program \\(choice ", choice=None)
    refused("no usable adapter", hidden="many")
    refused("no usable adapter", recent=[4])
    refused("no usable adapter", eta=9)
    refused("no usable adapter", choice="layer")
    with pytest.raises(BadInput, match="no such file"):
        load_adapter(tmp_path / "nowhere", model, tok)


def test_compress_refuses_bad_input(tiny, tmp_path, monkeypatch):
    empty, binary, marked = tmp_path / "empty.txt", tmp_path / "binary", tmp_path / "from-windows.txt"
    marked.write_bytes(b"\xef\xbb\xbfA text.")
    assert read_text(marked) == "A text.", "a mark at the beginning is no part of the text"
    empty.write_text("  \n")
    binary.write_bytes(b"\xff\xfe\x00")
    base = ("--weights", tiny)
    for args, message in (
            (("--context", tmp_path / "nowhere.txt"), "no such file"), (("--context", empty), "context is empty"),
            (("--context", binary), "expected a file of UTF-8 text"), (("--keep", "0"), "keep is 0"),
            (("--keep", "1.5"), "keep is 1.5"), (("--question", " "), "--question is empty"),
            (("--tokens", "0"), "tokens is 0"), (("--context", ""), "expected a file of UTF-8 text"),
            (("--seed", "-1"), "whole number"), (("--temperature", "nan"), "--temperature is nan"),
            (("--max-new-tokens", "0"), "at least 1"), (("--save", tmp_path), "expected the name of a file"),
            (("--context", empty / "x"), "not a directory"),
            (("--keep", "0.1", "--tokens", "3"), "not allowed with"),
            (("--kep", "0.1"), "unrecognized arguments"), (("--load", "x"), "needs at least one --question"),
            (("--load", "x", "--keep", "0.5", "--question", "q"), "--load asks"), (("--device", "toaster"), "be used"),
            (("--method", "magic"), "'magic' is unknown, expected one of random, random:token, streaming, "),
            (("--method", "question"), "is unknown"), (("--html", ""), "expected the name of a file"),
            (("--html", tmp_path), "--html"), (("--load", "x", "--method", "kvzip", "--question", "q"), "--load asks"),
            (("--load", "x", "--html", "y", "--question", "q"), "--load asks")):
        assert message in one_line_error("compress.py", *base, *args), args
    assert "no such folder" in one_line_error("compress.py", "--weights", tmp_path / "nowhere")
    long = tmp_path / "long.txt"
    long.write_text("word " * 2000)
    assert "positions; use a shorter text" in one_line_error("compress.py", *base, "--context", long, *SMALL)
    long.write_text("word " * 780)
    message = one_line_error("compress.py", *base, "--context", long, "--method", "kvzip", *SMALL)
    assert re.search(r"kvzip reads the text twice: .* \d+ more than the model's 4096 positions; use a shorter", message)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert "one process; start it without torchrun" in one_line_error("compress.py", *base)


def test_adapter_and_cache_are_looked_at_before_the_weights(saved, tmp_path):
    """There are no weights here, and that is not what is complained about."""
    none = ("--weights", tmp_path / "no-weights")
    assert "no adapter.json in it, nor in" in one_line_error("compress.py", *none, "--adapter", tmp_path / "nowhere")
    (tmp_path / "adapter.json").write_text("{")
    assert "adapter.json: " in one_line_error("compress.py", *none, "--adapter", tmp_path)
    assert "nowhere: no such file" in one_line_error("compress.py", *none, "--load", tmp_path / "nowhere",
                                                       "--question", "q")


@pytest.mark.parametrize("choice", ["head", "token"])
def test_a_training_free_cache_beside_ours(tiny, tmp_path, capsys, monkeypatch, choice):
    """Every method there is: its own entries of the plain cache, as many on average as ours; what is saved is ours."""
    model, tok = load_llama(tiny), Tokenizer(tiny)
    save_adapter(tmp_path / "a", tiny_compressor(model, recent=4, choice=choice), model, tok, {})
    (tmp_path / "doc.txt").write_text("The quick brown fox jumps over the lazy dog, again and again. " * 5)
    seen = {}
    monkeypatch.setattr("run.ask.show_answers", lambda model, tok, caches, *_: seen.update(caches))

    def ask(*args):
        monkeypatch.setattr(sys, "argv", ["compress.py", *map(str, (
            "--weights", tiny, "--adapter", tmp_path / "a", "--context", tmp_path / "doc.txt", *SMALL, *args))])
        seen.clear()
        ask_main()
        return capsys.readouterr().out
    for method in METHODS:
        out = ask("--keep", "0.2", "--method", method, "--save", tmp_path / "cache")
        assert list(seen) == ["full", "short", method]
        k, size = re.search(rf"\n{method}, a training-free choice: (\d+) kept .*\nbytes +([\d,]+)\n", out).groups()
        assert k == re.search(r"compressible -> (\d+) kept", out)[1]
        assert int(size.replace(",", "")) == seen[method].nbytes()
        ours, theirs, full = (kept_map(seen[x], seen["full"].next_position[0]) for x in ("short", method, "full"))
        assert ours.sum() == theirs.sum() < full.sum() and not ours.equal(theirs)
        assert kept_map(load_cache(tmp_path / "cache", model, tok), full.shape[2]).equal(ours)
        plain = seen["full"].layers[-1][0].k  # which routing changes in ours
        for part in seen[method].layers[-1][:1]:
            at = part.positions[0, 0].long()
            assert torch.equal(part.k[0, 0], plain[0, 0, at[at >= 0]])
    ask("--tokens", "30", "--method", "random")
    kept = [int(seen[x].entries().float().mean()) - 9 for x in ("short", "random")]
    assert kept == [30, 30]
    out = ask("--tokens", "5000", "--method", "kvzip")
    assert seen["kvzip"] is seen["full"] and "x fewer" in out


def test_what_the_adapter_cannot_do_is_one_line(tiny, saved, tmp_path):
    """Hidden states that are no numbers, so that scores are none."""
    model, tok, adapter, _ = saved
    args = ("--context", "-", "--adapter", adapter, *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        broken = tiny_llama(vocab_size=310, max_positions=4096)
        broken.layers[0].mlp.down.weight.fill_(3e38)
        save_llama(broken, tmp_path / "broken")
        (tmp_path / "broken" / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
        patch.setattr(sys, "stdin", io.StringIO("Just a few words, over and over. " * 9))
        message = one_line_error("compress.py", "--weights", tmp_path / "broken", *args)
        assert "a score is not a finite number" in message


@pytest.mark.parametrize("size", [("--tokens", "500"), ("--keep", "1")])
def test_a_text_that_is_kept_as_a_whole(tiny, size):
    """From standard input; no compression at all: the same answers and bytes."""
    out, _ = run("compress.py", "--weights", tiny, "--context", "-", *size, *SMALL, stdin="Just a few.")
    n, k = map(int, re.search(r"(\d+) compressible -> (\d+) kept", out).groups())
    assert n == k
    full, short = (re.search(rf"\n  {name} +(.*)", out)[1] for name in ("full", "short"))
    assert full == short and len(set(re.search(r"bytes +([\d,]+) -> ([\d,]+)", out).groups())) == 1


def test_the_default_adapter_was_trained_here_last_or_is_the_shipped_one_trained_longest(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("run.files.ROOT", tmp_path)
    model, tok = load_llama(tiny), Tokenizer(tiny)
    assert default_adapter(model, tok) is None
    mine, other = base_of(model, tok), base_of(load_llama(write_model(tmp_path / "m", n_head=2)), tok)

    def add(name, created, steps, base=mine, before=()):
        (tmp_path / name).mkdir(parents=True)
        meta = {"created": created, "base": base, "train": {"reconstruct": 5, "steps": steps}, **dict(before)}
        (tmp_path / name / "adapter.json").write_text(json.dumps(meta))
        return default_adapter(model, tok)
    quick = tmp_path / "adapters/quick"
    assert add("out/foreign/adapter", "2032-01-01", 9, other) is None
    assert add("adapters/quick", "2030-01-02", 20) == quick == add("adapters/less", "2031-01-01", 10)
    assert add("adapters/long", "2029-01-01", 3000) == tmp_path / "adapters/long"
    before = {"from": {"train": {"steps": 1000}, "from": {"train": {"steps": 2000}}}}  # it went on from others
    assert add("adapters/longer", "2028-01-01", 10, before=before) == tmp_path / "adapters/longer"
    assert add("out/run/adapter", "2028-01-01", 2) == tmp_path / "out/run/adapter"
    assert add("out/old/adapter", "2027-01-01", 99) == tmp_path / "out/run/adapter"


# train.py ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny_run(tiny, texts, tmp_path):
    """Flags of a training run that takes seconds and writes nothing outside its temporary folder."""
    return ("--weights", tiny, "--sources", texts, "--shards", tmp_path / "shards", "--context", "64", "--answer", "8",
            "--eta", "2", "--rank", "4", "--hidden", "48", "--dtype", "fp32", "--device", "cpu", "--mix",
            "continue=1,recite=1,cloze=1")


def test_train_learns_on_a_tiny_model(tiny, tiny_run, tmp_path):
    """Both phases through the real program: what each of them lowers falls, an adapter appears; then the table, the
    answers, and where the numbers are."""
    out, _ = run("train.py", *tiny_run, "--reconstruct", "40", "--steps", "40", "--batch", "4", "--micro", "2",
                 "--keep-low", "0.1", "--lr", "0.01", "--teach-lr", "0.01", "--out", tmp_path / "run",
                 "--eval-contexts", "4")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["phase"]) for line in log] == [
        (i, "reconstruct" if i < 40 else "hard") for i in range(80)]
    for part, name in ((log[:40], "loss"), (log[40:], "loss")):
        first, last = (sum(line[name] for line in x) for x in (part[:10], part[-10:]))
        assert last < 0.95 * first
    assert out.rstrip().endswith(f"all numbers: {tmp_path / 'run' / 'result.json'}") and '"cells"' not in out
    assert re.search(r"\? Who built the lighthouse\?\n  whole, [\d,]+ bytes .*\n  4 x smaller, [\d,]+ bytes", out)
    result = read_json(tmp_path / "run" / "result.json")
    assert {"cells", "seconds", "threads", "command", "commit", "seed"} <= set(result)
    cells = {(c["method"], c["keep"], c["kind"]) for c in result["cells"]}
    assert ("kvdistill", 0.25, "cloze") in cells and ("none", 0.0, "all") in cells
    assert all(c["mean"]["kl"] >= 0 and 0 <= c["mean"]["agree"] <= 1 and c["n"] > 0 for c in result["cells"])
    model, tok = load_llama(tiny), Tokenizer(tiny)
    comp = load_adapter(tmp_path / "run" / "adapter", model, tok)
    assert comp.b_q.abs().max() > 0
    _, err = run("train.py", *tiny_run, "--steps", "1", "--out", tmp_path / "run", "--eval-contexts", "0", code=2)
    assert "holds another run (--batch was 4, now 1)" in err
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 80, "the first run's log is untouched"


def test_a_run_goes_on_from_an_adapter_and_has_its_shape(tiny, tiny_run, tmp_path):
    """With rates of nearly 0 the second run's adapter is the first's, scorer and routes; its shape needs no flags."""
    first, second = tmp_path / "first", tmp_path / "second"
    short = "--steps", "2", "--eval-contexts", "0"
    run("train.py", *tiny_run, *short, "--reconstruct", "2", "--tau", "0.25", "--out", first)
    flags = [*tiny_run]
    for name in ("--eta", "--rank", "--hidden"):
        del flags[(i := flags.index(name)):i + 2]
    run("train.py", *flags, *short, "--reconstruct", "0", "--init-adapter", first, "--lr", "1e-9", "--out", second)
    was, now = (load_file(x / "adapter" / "adapter.safetensors") for x in (first, second))
    assert was["b_q"].abs().max() > 1e-4 and all(torch.allclose(now[k], was[k], atol=1e-7) for k in was)
    meta = read_json(second / "adapter" / "adapter.json")
    assert meta["config"]["tau"] == 0.25 and meta["from"]["train"]["reconstruct"] == 2
    assert "--rank is 8, but" in one_line_error("train.py", *flags, "--init-adapter", first, "--rank", "8")
    assert "no adapter.json in it" in one_line_error("train.py", *flags, "--init-adapter", tmp_path)
    again = "--init-adapter", f"{second.parent}/./first", "--lr", "1e-9", "--out", second  # a path of another spelling
    assert "finished" in run("train.py", *flags, *short, "--reconstruct", "0", *again)[0]
    meta = read_json(first / "adapter" / "adapter.json")
    write_json(first / "adapter" / "adapter.json", meta | {"seed": 5})  # another adapter in the same place
    message = one_line_error("train.py", *flags, *short, "--reconstruct", "0", *again)
    assert "holds another run (another --init-adapter)" in message
    for broken in ({"recent": [4]}, {"tau": None}):
        write_json(first / "adapter" / "adapter.json", meta | {"config": meta["config"] | broken})
        assert "adapter.json: " in one_line_error("train.py", *flags, "--init-adapter", first)


def test_train_refuses_bad_input(tiny):
    for args, message in ((("--steps", "-1"), "--steps is -1"), (("--stpes", "5"), "unrecognized arguments"),
                          (("--batch", "3", "--micro", "2"), "must divide --batch"),
                          (("--chunk", "-1"), "--chunk is -1"),
                          (("--steps", "0", "--reconstruct", "0"), "--reconstruct is 0, too"),
                          (("--keep-high", "1.0"), "keep-low"), (("--mix", "sing=1"), "expected KIND=COUNT"),
                          (("--decay", "linear"), "expected threshold or sigmoid"),
                          (("--decay", "sigmoid"), "give 1e-3"), (("--reconstruct", "0"), "give 1e-3"),
                          (("--choice", "layer"), "expected head or token"), (("--hidden", "0"), "--hidden is 0"),
                          (("--warmup", "0"), "at least 1"), (("--clip", "0"), "above 0"), (("--soft", "7"), "share"),
                          (("--seed", "-3"), "whole number"), (("--scorer-lr", "-1"), "--scorer-lr is -1"),
                          (("--mix", "cloze=²"), "expected KIND=COUNT"),
                          (("--sources", "wiki,"), "an entry is empty"),
                          (("--lam", "2"), "expected 0"), (("--steps", "many"), "invalid int value")):
        assert message in one_line_error("train.py", "--weights", tiny, *args), args


def test_a_typo_leaves_no_folder_behind_and_any_may_be_corrected(tiny_run, texts, tmp_path):
    """Layers, sources and shards are looked at before config.json is written. What cannot be seen before the first step
    leaves a run without any, and the corrected command may have its folder."""
    short = ("--reconstruct", "1", "--steps", "1", "--eval-contexts", "0", "--out", tmp_path / "x")
    assert "eta is 9" in one_line_error("train.py", *tiny_run, *short, "--eta", "9")
    assert "no such file or folder" in one_line_error("train.py", *tiny_run, *short, "--sources", tmp_path / "no")
    damaged = tmp_path / "damaged"
    Draw(TrainConfig(sources=str(texts), shards=str(damaged)), {"continue": 1}, Tokenizer(tiny_run[1]), World("cpu"))
    next(damaged.glob("*/train.bin")).write_bytes(b"123")
    assert "prepare it again" in one_line_error("train.py", *tiny_run, *short, "--shards", damaged)
    assert not (tmp_path / "x").exists()
    assert "positions" in one_line_error("train.py", *tiny_run, *short, "--context", "4096")
    assert (tmp_path / "x" / "config.json").exists()
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, (*tiny_run, *short)), "--json"])
        train_main()
    assert json.loads(out.getvalue().splitlines()[-1])["context"] == 64  # --json: all of it in one line


def test_the_system_prompt_belongs_to_a_run_and_its_adapter(tiny_run, tmp_path, monkeypatch, capsys):
    """Another one is refused when the run is taken up again, and warned of, in one line, when the adapter is used."""
    out, asked = tmp_path / "x", "Be brief."
    flags = (*tiny_run, "--reconstruct", "1", "--steps", "1", "--eval-contexts", "0", "--out", out)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--system", asked])
    train_main()
    assert read_json(out / "config.json")["system"] == read_json(out / "adapter" / "adapter.json")["system"] == asked
    for other in ((), ("--system", "Be long.")):
        assert "holds another run (another --system, 'Be brief.')" in one_line_error("train.py", *flags, *other)
    model = load_llama(tiny_run[1])
    for system, lines in ((asked, []), (None, [f"warning: {out / 'adapter'} was trained with --system 'Be brief.': "
                                               "expect less"])):
        capsys.readouterr()
        load_adapter(out / "adapter", model, Tokenizer(tiny_run[1], system))
        assert capsys.readouterr().err.splitlines() == lines


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tiny_run, tmp_path):
    for which in ("--lr", "--teach-lr", "--scorer-lr"):
        message = one_line_error("train.py", *tiny_run, "--reconstruct", "5", "--steps", "30", which, "1e37",
                                 "--warmup", "1", "--rank", "256", "--out", tmp_path / f"run{which}")
        assert re.search(r"step \d+: .*(the loss is|not a finite)", message), message


def test_a_profile_writes_nothing_and_knows_both_phases(tiny_run, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.plan.gemm_rate", lambda *_: 1e9)
        patch.setattr(sys, "argv", ["train.py", *map(str, tiny_run), "--profile", "2", "--out", str(tmp_path / "x")])
        train_main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["reconstruct"]["steps"] == found["distil"]["steps"] == 2 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("program", ["compress.py", "train.py", "eval.py", "data/fetch.py", "data/prepare.py"])
def test_help_works_and_unknown_flags_are_errors(program):
    out, _ = run(program, "--help")
    assert "usage:" in out and len(out) > 200
    _, err = run(program, "--no-such-flag", code=2)
    assert "unrecognized arguments: --no-such-flag" in err
