"""train.py and compress.py as a user runs them, on a tiny model folder, with good and bad input."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compress
import train
from compress import CompressorConfig, load_adapter, read_text
from conftest import ROOT, save_llama, tiny_compressor, tiny_llama
from data.tokenizer import Tokenizer
from model import load_llama
from run.checkpoint import load_cache, save_adapter, save_cache
from run.errors import BadInput, read_json, run_program, write_json
from run.loading import open_model
from run.train_flags import PRESETS, TrainConfig
from test_tokenizer import write_tokenizer

SMALL = ("--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "5")


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
        sentence = f"Text {i} says that the Old Mill was built in {1500 + i} by Ada Stone. "
        (folder / f"{i}.txt").write_text(sentence * 12)
    return folder


@pytest.fixture
def saved(tiny, tmp_path):
    """Model, tokenizer, and a saved adapter and cache of theirs."""
    model, tok = load_llama(tiny), Tokenizer(tiny)
    compressor = tiny_compressor(model, recent=4)
    save_adapter(tmp_path / "run" / "adapter", compressor, model, tok, {})
    ctx = compressor.read(model, torch.arange(40)[None])
    cache = compressor.compress(model, ctx, keep=0.5)
    save_cache(tmp_path / "cache.safetensors", cache, model, tok)
    return model, tok, tmp_path / "run" / "adapter", tmp_path / "cache.safetensors"


def run(program, *args, stdin=None) -> str:
    """Run a program in its own process; returns what it prints."""
    done = subprocess.run([sys.executable, ROOT / program, *map(str, args)], capture_output=True,
                          text=True, cwd=ROOT, input=stdin,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def call(program, *args) -> str:
    """The same in this process, which is twenty times faster than starting one."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [program.__name__, *map(str, args)])
        program.main()
    return out.getvalue()


def error_of(program, *args) -> str:
    """The one line that a program says when it exits with 2."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.setattr(sys, "argv", [program.__name__, *map(str, args)])
        patch.setattr("run.errors.leave", sys.exit)  # which would end the tests
        with pytest.raises(SystemExit) as stop:
            run_program(program.main)
    lines = err.getvalue().strip().splitlines()
    assert stop.value.code == 2 and "error:" in lines[-1] and "Traceback" not in err.getvalue()
    return lines[-1]


# --------------------------------------------------------------------------- compress.py

def test_compress_save_load_ask(tiny, saved, tmp_path):
    """A saved cache gives the answers of the cache it was saved from; bytes shrink as printed."""
    text, cache = tmp_path / "text.txt", tmp_path / "short.safetensors"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 5)
    ask = ("--question", "Why?", "--question", "And then?", *SMALL)
    out = run("compress.py", "--weights", tiny, "--context", text, "--adapter", tmp_path / "run",
              "--keep", "0.1", "--save", cache, *ask)
    found = re.search(r"(\d+) -> (\d+) per head on average \((\d+) to (\d+)\)", out)
    n, k, least, most = map(int, found.groups())
    assert k == -(-n // 10) and 1 == least < k < most  # some heads keep a register alone
    sizes = re.search(r"bytes +([\d,]+) -> ([\d,]+)", out).groups()
    before, after = (int(x.replace(",", "")) for x in sizes)
    assert after < 0.2 * before
    answers = re.findall(r"compressed  (.*)", out)
    again = run("compress.py", "--weights", tiny, "--load", cache, *ask)
    assert len(answers) == 2 and re.findall(r"saved  (.*)", again) == answers
    assert f"{k + 9} of {n + 9} tokens per head" in again


@pytest.mark.parametrize("size", [("--tokens", "500"), ("--keep", "1")])
def test_a_text_that_is_kept_as_a_whole(tiny, saved, monkeypatch, size):
    """No compression at all: the same answers and bytes. The text is from standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Just a few."))
    out = call(compress, "--weights", tiny, "--adapter", saved[2], "--context", "-", *size, *SMALL)
    full, compressed = (re.search(rf"\n  {name} +(.*)", out)[1] for name in ("full", "compressed"))
    assert full == compressed
    assert len(set(re.search(r"bytes +([\d,]*\d) -> ([\d,]*\d)", out).groups())) == 1


def test_files_of_other_models_are_refused(saved, tmp_path, capsys):
    _, tok, adapter, cache = saved
    other = load_llama(write_model(tmp_path / "other", n_kv_head=1))
    for read, path in ((load_adapter, adapter), (load_cache, cache)):
        with pytest.raises(BadInput, match="n_kv_head = 2, this one has 1"):
            read(path, other, tok)
    assert "warning" not in capsys.readouterr().err
    load_cache(cache, tiny_llama(vocab_size=310, max_positions=4096, seed=9), tok)
    assert "made with other weights" in capsys.readouterr().err


def test_damaged_caches_are_refused(saved):
    model, tok, _, path = saved
    good = path.read_bytes()
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # the file is overwritten

    def refused():
        with pytest.raises(BadInput, match="write it again with --save") as e:
            load_cache(path, model, tok)
        assert "\n" not in str(e.value) and str(path) in str(e.value)

    path.write_bytes(good[:len(good) // 2])
    refused()
    for text in ("{", "[]", '{"format": 2}', '{"architecture": {}}', '{"format": 2, "base": []}'):
        save_file(tensors, path, metadata={"kvdistill_cache": text})
        refused()
    k, v, positions = (tensors[f"3.0.{name}"] for name in ("k", "v", "positions"))
    end = tensors["next_position"]
    for name, bad in (
            ("3.0.k", k * torch.nan), ("3.0.k", k.half()), ("3.0.k", k[..., :-1]), ("3.0.k", k[0]),
            ("3.0.k", k.repeat(1, 3, 1, 1)), ("3.0.v", v[:, :, :-1]), ("3.0.v", v.bfloat16()),
            ("3.0.positions", positions + 40), ("3.0.positions", positions - 41),
            ("3.0.positions", positions.long()), ("3.0.positions", positions.expand(1, 5, -1)),
            ("3.0.bias", torch.full(positions.shape, torch.nan)), ("3.0.bias", torch.zeros(1)),
            ("next_position", end[0]), ("next_position", end + 5000), ("next_position", -end),
            ("next_position", end.int()), ("next_position", end[:0]), ("9.0.k", k), ("word", k),
            ("3.0.v", None), ("3.0.positions", None)):
        changed = {key: x.contiguous().clone() for key, x in (tensors | {name: bad}).items()
                   if x is not None}
        save_file(changed, path, metadata=metadata)
        refused()
    path.write_bytes(good)
    load_cache(path, model, tok)


@pytest.mark.parametrize("args, message", [
    (("--context", "nowhere.txt"), "no such file"),
    (("--context", ""), "expected a file of UTF-8 text"),
    (("--context", __file__ + "/x"), "not a directory"),
    (("--keep", "0"), "--keep: '0'"), (("--keep", "1.5"), "--keep: '1.5'"),
    (("--tokens", "0"), "tokens is 0"), (("--keep", "0.1", "--tokens", "3"), "not allowed with"),
    (("--question", " "), "--question is empty"), (("--max-new-tokens", "0"), "at least 1"),
    (("--temperature", "nan"), "--temperature is nan"), (("--seed", "-1"), "whole number"),
    (("--save", "/"), "expected the name of a file"), (("--html", ""), "expected the name of a file"),
    (("--load", "x"), "--load needs --chat, or at least one"),
    (("--load", "x", "--question", "q"), "error: --load x: no such file"),
    (("--kep", "0.1"), "unrecognized arguments"),
    (("--load", "x", "--keep", "0.5", "--question", "q"), "does not go with --load"),
    (("--adapter", "nowhere"), "no adapter.json in it, nor in"),
    (("--weights", "nowhere"), "nowhere: there is no such folder"),
    ((), "no adapter is shipped for")], ids=str)
def test_compress_refuses_bad_input(tiny, args, message):
    assert message in error_of(compress, "--weights", tiny, *args)


def test_compress_refuses_bad_texts(tiny, saved, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    args = ("--weights", tiny, "--adapter", saved[2], "--context", text, *SMALL)
    text.write_bytes(b"\xef\xbb\xbfA text.")
    assert read_text(text) == "A text.", "a mark at the beginning is no part of the text"
    for raw, message in ((b"  \n", "text is empty"), (b"\xff\xfe\x00", "a file of UTF-8 text"),
                         (b"word " * 2000, "asked; use a shorter text")):
        text.write_bytes(raw)
        assert message in error_of(compress, *args)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert "start it without torchrun" in error_of(compress, *args)


def test_scores_that_are_no_numbers_are_one_line(tiny, saved, tmp_path):
    broken = tiny_llama(vocab_size=310, max_positions=4096)
    broken.layers[0].mlp.down.weight.fill_(3e38)
    save_llama(broken, tmp_path / "broken")
    write_tokenizer(tmp_path / "broken")
    (tmp_path / "text.txt").write_text("Just a few words, over and over. " * 9)
    assert "a score is not finite" in error_of(
        compress, "--weights", tmp_path / "broken", "--adapter", saved[2], "--context",
        tmp_path / "text.txt", *SMALL)


def test_a_model_that_does_not_fit_says_who_can_spread_it(tiny, monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("run.loading.load_llama", load)
    args = type("Args", (), dict(device="cpu", dtype="fp32", weights=tiny, system=None))
    with pytest.raises(BadInput, match="does not fit into cpu.*train.py.*--parallel fsdp"):
        open_model(args)


# ------------------------------------------------------------------------------ train.py

@pytest.fixture
def tiny_run(tiny, texts, tmp_path):
    """Flags of a training run that takes seconds and writes to its temporary folder only."""
    return ("--weights", tiny, "--sources", texts, "--shards", tmp_path / "shards", "--context",
            "64", "--answer", "8", "--eta", "2", "--rank", "4", "--hidden", "48", "--dtype", "fp32",
            "--device", "cpu", "--mix", "continue=1,recite=1,cloze=1")


ONE_STEP = ("--scorer-steps", "1", "--steps", "1", "--eval-contexts", "0")


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_train_learns_on_a_tiny_model(tiny, tiny_run, tmp_path):
    """Both phases through the real program: each one's loss falls; then the table, and the command
    that uses the adapter, which runs."""
    out = tmp_path / "run"
    said = run("train.py", *tiny_run, "--scorer-steps", "40", "--steps", "80", "--batch", "4",
               "--micro", "2", "--keep-min", "0.1", "--lr", "0.01", "--scorer-lr", "0.01", "--out",
               out, "--eval-contexts", "4")
    log = log_of(out)
    assert [line["phase"] for line in log] == ["scorer"] * 40 + ["hard"] * 80
    for part in (log[:40], log[40:]):
        first, last = (sum(line["loss"] for line in x) for x in (part[:10], part[-10:]))
        assert last < 0.95 * first
    result = read_json(out / "result.json")
    assert {"seconds", "threads", "command", "commit", "seed"} <= result.keys()
    cells = {(c["method"], c["keep"], c["kind"]) for c in result["cells"]}
    assert ("kvdistill", 0.25, "cloze") in cells and ("none", 0.0, "all") in cells
    assert "--n" not in said.split(), "train.py has no such flag"

    command = said.splitlines()[-1].partition("python ")[2].split()
    assert command == ["compress.py", "--adapter", str(out / "adapter"), "--weights", str(tiny)]
    assert "compressed" in call(compress, *command[1:], *SMALL)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_two_steps(tiny_run, tmp_path, monkeypatch, preset):
    """On a tiny model; what the paper says of its method is what --preset paper does."""
    monkeypatch.chdir(tmp_path)
    one = 0 if "scorer_steps" in PRESETS[preset] and preset.startswith("paper") else 1
    call(train, "--preset", preset, *tiny_run, "--scorer-steps", one, "--steps", 2 - one, "--batch",
         "2", "--eval-contexts", "0", "--min-context", "0", "--context", "48")
    out = Path("out") / preset
    assert len(log_of(out)) == 2
    settings = read_json(out / "adapter" / "adapter.json")["train"]
    moved = load_file(out / "adapter" / "adapter.safetensors")["b_q"].abs().max() > 0
    assert moved
    if preset.startswith("paper"):
        assert settings["selection"] == "token" and settings["decay"] == "sigmoid"
        assert settings["routing_strength"] == "full"
        rates = (1e-3, 1e-4) if preset == "paper-small" else (5e-5, 5e-5)
        assert (settings["lr"], settings["scorer_lr_phase2"]) == rates
        assert all(line["grad_scorer"] > 0 for line in log_of(out))


@pytest.mark.parametrize("preset, steps", [("quick", 300), ("8b", 2000), ("paper", 0)])
def test_help_shows_the_defaults_of_the_preset(capsys, preset, steps):
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--help", "--preset", preset])
        train.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--scorer-steps N .*?\(default: (\d+)\)", shown)[1] == str(steps)
    assert "(default: )" not in shown and "None" not in shown


def test_the_phases_have_batches_of_their_own(tiny_run, tmp_path):
    call(train, *tiny_run, "--scorer-steps", 1, "--steps", 1, "--scorer-batch", 2, "--batch", 4,
         "--context", 48, "--eval-contexts", 0, "--out", tmp_path / "run")
    scorer, distillation = [line["context"] for line in log_of(tmp_path / "run")]
    assert distillation == 2 * scorer > 2 * 2 * 48


def test_the_settings_have_the_defaults_of_the_compressor():
    assert train.compressor_config(TrainConfig()) == CompressorConfig()


def test_flags_win_over_the_preset(monkeypatch):
    argv = ["train.py", "--preset", "paper", "--rank", "7", "--plan"]
    monkeypatch.setattr(sys, "argv", argv)
    a, c = train.parse_args()
    assert (c.rank, c.eta, c.lam, c.batch, c.scorer_steps, a.dtype) == (7, 6, 0.6, 32, 0, "bf16")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train.parse_args()[1] == TrainConfig(out="out/quick")


def test_a_run_goes_on_from_an_adapter_and_has_its_shape(tiny, tiny_run, tmp_path):
    """With a rate of nearly 0 the second adapter is the first; its shape needs no flags."""
    first, second = tmp_path / "first", tmp_path / "second"
    call(train, *tiny_run, *ONE_STEP, "--tau", "0.25", "--out", first)
    flags = list(tiny_run)
    for name in ("--eta", "--rank", "--hidden"):
        i = flags.index(name)
        del flags[i:i + 2]
    flags += ["--init-adapter", first, "--scorer-steps", "0", "--steps", "1", "--lr", "1e-9",
              "--eval-contexts", "0", "--out", second]
    call(train, *flags)
    before, after = (load_file(x / "adapter" / "adapter.safetensors") for x in (first, second))
    assert before["b_q"].abs().max() > 1e-4
    assert all(torch.allclose(after[name], before[name], atol=1e-7) for name in before)
    meta = read_json(second / "adapter" / "adapter.json")
    assert meta["config"]["tau"] == 0.25 and meta["from"]["train"]["scorer_steps"] == 1
    assert "--rank 4, which is taken over" in error_of(train, *flags, "--rank", "8")
    assert "finished" in call(train, *flags, "--resume")

    path = first / "adapter" / "adapter.json"
    write_json(path, read_json(path) | {"seed": 5})  # another adapter in the same place
    assert "--init-adapter is another one" in error_of(train, *flags, "--resume")
    write_json(path, read_json(path) | {"config": {"tau": 0.5, "colour": "red"}})
    assert "adapter.json: " in error_of(train, *flags)


@pytest.mark.parametrize("args, message", [
    (("--steps", "-1"), "--steps: -1, expected at least 0"),
    (("--steps", "many"), "invalid int value"),
    (("--stpes", "5"), "unrecognized arguments"), (("--chunk", "-1"), "--chunk: -1"),
    (("--batch", "3", "--micro", "2"), "--batch 3 cannot be shared"),
    (("--gpus", "8"), "--gpus is for --plan"), (("--sources", "nowhere"), "nowhere': no such file"),
    (("--steps", "0", "--scorer-steps", "0"), "--steps and --scorer-steps are both 0"),
    (("--keep-max", "1.0"), "keep-min <= keep-max < 1"), (("--lam", "2"), "2, expected 0 to 1"),
    (("--mix", "sing=1"), "expected KIND=COUNT"),
    (("--mix", "continue=2"), "expected 0 or 1"), (("--mix", "cloze=²"), "expected KIND=COUNT"),
    (("--decay", "linear"), "invalid choice"), (("--selection", "layer"), "invalid choice"),
    (("--decay", "sigmoid"), "--scorer-steps 0"), (("--scorer-steps", "0"), "try --scorer-lr-phase2 1e-4"),
    (("--soft-fraction", "0.5"), "try --scorer-lr-phase2 1e-4"), (("--clip", "0"), "--clip: 0"),
    (("--clip", "inf"), "inf, expected at least 1e-12, and finite"),
    (("--scorer-lr-phase2", "-1"), "at least 0"), (("--seed", "-3"), "expected 0 to"),
    (("--sources", "caf\udce9.txt"), "caf\\udce9.txt: not in UTF-8; rename the file"),
    (("--sources", "wiki,"), "an empty entry"), (("--min-context", "3"), "16 to --context"),
    (("--init-adapter", "/"), "no adapter.json in it")], ids=str)
def test_train_refuses_bad_input(tiny, args, message):
    assert message in error_of(train, "--weights", tiny, *args)


def test_what_is_wrong_before_the_first_step_leaves_no_folder(tiny_run, tmp_path):
    args = (*tiny_run, *ONE_STEP, "--out", tmp_path / "x")
    assert "eta is 9" in error_of(train, *args, "--eta", "9")
    assert "no such file or folder" in error_of(train, *args, "--sources", tmp_path / "no")
    assert "--context is 4096, expected at most 20" in error_of(train, *args, "--context", "4096")
    assert not (tmp_path / "x").exists()


def test_the_folder_of_a_run(tiny_run, tmp_path, monkeypatch, capsys):
    """By default out/PRESET; taken up with --resume only; another run's is refused."""
    monkeypatch.chdir(tmp_path)
    args = (*tiny_run, *ONE_STEP, "--system", "Be brief.")
    said = call(train, *args, "--resume", "--json")  # there is nothing: it starts
    assert json.loads(said.splitlines()[-1])["context"] == 64
    adapter = tmp_path / "out" / "quick" / "adapter"
    assert read_json(adapter / "adapter.json")["system"] == "Be brief."
    assert "--resume" in error_of(train, *args)
    assert "this run is finished" in call(train, *args, "--resume")
    monkeypatch.setattr(train, "open_tokenizer", None)  # the flags are compared before
    assert "--lr was 0.002, now 0.5" in error_of(train, *args, "--resume", "--lr", "0.5")
    assert "--system was 'Be brief.'" in error_of(train, *tiny_run, *ONE_STEP, "--resume")
    assert "is not empty" in error_of(train, *args)

    capsys.readouterr()
    load_adapter(adapter, load_llama(tiny_run[1]), Tokenizer(tiny_run[1]))
    assert "was trained with --system 'Be brief.'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--lr", "--scorer-lr", "--scorer-lr-phase2"])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tiny_run, tmp_path, flag):
    message = error_of(train, *tiny_run, "--scorer-steps", "5", "--steps", "30", flag, "1e31",
                       "--warmup", "1", "--rank", "256", "--out", tmp_path / "run")
    assert re.search(r"step \d+: loss is .*lower --", message)


@pytest.mark.parametrize("program", ["compress.py", "train.py", "data/fetch.py", "data/prepare.py"])
def test_help_works(program):
    out = run(program, "--help")
    assert "usage:" in out and len(out) > 200
