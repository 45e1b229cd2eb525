"""eval.py as a user runs it: all tasks on a tiny model, stopped and continued, bad input."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import compress
import eval
from conftest import ROOT, tiny_compressor
from data.tokenizer import Tokenizer
from model import load_llama
from run.checkpoint import lock_dir, save_adapter
from run.records import load_records
from test_programs import call, error_of, write_model
from test_tasks import squad_file


def add_adapter(weights, folder):
    model = load_llama(weights)
    save_adapter(folder, tiny_compressor(model), model, Tokenizer(weights), {})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model with an adapter, and a small file for every task."""
    folder = tmp_path_factory.mktemp("eval")
    add_adapter(write_model(folder / "tiny"), folder / "adapter")
    squad_file(folder / "squad.json")
    hay = " ".join(f"This is sentence {i} of many." for i in range(400))
    (folder / "hay.txt").write_text(hay)
    mill = "The mill was built by Ada. It burned in 1817, and nobody rebuilt it. " * 4
    ships = "Ships came at dawn. " * 9
    asked = {"question": "Who?", "options": ["Ada", "Ben", "Cy"], "answer": 0}
    with open(folder / "s.jsonl", "w") as summaries, open(folder / "c.jsonl", "w") as choices:
        for text in (mill, ships):
            print(json.dumps({"document": text, "summary": text[:30]}), file=summaries)
            print(json.dumps({"document": text} | asked), file=choices)
    (folder / "texts").mkdir()
    for i in range(60):
        text = f"Text {i} says that the Old Mill was built in {1500 + i}. " * 15
        (folder / "texts" / f"{i}.txt").write_text(text)
    return folder


DATA = {"squad": "squad.json", "niah": "hay.txt", "summary": "s.jsonl", "choice": "c.jsonl",
        "cost": "hay.txt", "fidelity": "texts"}


def flags(files, *more, data=DATA):
    found = ["--weights", files / "tiny", "--adapter", files / "adapter", "--dtype", "fp32",
             "--device", "cpu"]
    if data:
        found += ["--shards", files / "shards"]
    for task, name in data.items():
        found += ["--data", f"{task}={files / name}"]
    return [str(x) for x in [*found, *more]]


NIAH = ("--tasks", "niah", "--lengths", "700", "--depths", "0,1", "--keep", "0.5", "--methods",
        "random,kvdistill")
FIDELITY = ("--tasks", "fidelity", "--n", "2", "--context", "300")


def cells_in(path) -> dict:
    """The cells of a result without their seconds, which differ from run to run."""
    cells = json.loads(path.read_text())["cells"]
    return {(c["task"], c["kind"], c["method"], c["keep"]): c | {"seconds": 0} for c in cells}


def test_all_tasks_in_one_run_then_continued_with_another_method(files, tmp_path):
    out = tmp_path / "r.json"
    what = ("--tasks", "squad,niah,summary,choice,cost", "--n", "6", "--keep", "0.5,0.2", "--pack",
            "2", "--lengths", "700", "--depths", "0,1", "--out", out)
    stdout = call(eval, *flags(files, *what, "--methods", "full,none,kvzip,kvdistill"))
    assert "(chance)" in stdout and stdout.splitlines()[-1] == f"result: {out}"
    cells = cells_in(out)
    for task, metric in (("squad", "f1"), ("niah", "match"), ("summary", "rougeL"),
                         ("choice", "accuracy"), ("cost", "tokens_per_s")):
        full = cells[task, "all", "full", 1.0]
        for method, keep in (("full", 1.0), ("none", 0.0), ("kvdistill", 0.5), ("kvzip", 0.2)):
            cell = cells[task, "all", method, keep]
            low, high = cell["ci95"][metric]
            assert low <= cell["mean"][metric] <= high and cell["n"] > 0
            assert (cell["K"] == cell["N"]) == (method == "full")
        assert cells[task, "all", "kvzip", 0.2]["cache_bytes"] < 0.4 * full["cache_bytes"]
    assert cells["choice", "all", "full", 1.0]["mean"]["chance"] == 0.33333
    assert ("niah", "single/700/1.0", "kvzip", 0.5) in cells
    result = json.loads(out.read_text())
    assert {"command", "commit", "seed", "threads", "versions", "seconds"} <= set(result)

    before = load_records(out.with_suffix(".jsonl.gz"))
    more = ("--methods", "kvzip:recent,kvdistill", "--against", "kvzip:recent")
    stdout = call(eval, *flags(files, *what, *more))
    assert "summary: 4 of 8 caches were measured before" in stdout
    assert "minus kvzip:recent" in stdout
    after = load_records(out.with_suffix(".jsonl.gz"))
    assert after[:len(before)] == before
    assert {r["method"] for r in after[len(before):]} == {"kvzip:recent"}
    again = cells_in(out)
    for key, cell in cells.items():
        assert again[key]["mean"] == cell["mean"]
    ours, theirs = (again["squad", "all", m, 0.2] for m in ("kvdistill", "kvzip:recent"))
    difference = ours["mean"]["f1"] - theirs["mean"]["f1"]
    assert ours["difference"]["mean"]["f1"] == pytest.approx(difference, abs=2e-5)
    other = flags(files, *what[:3], "7", *what[4:])
    assert "squad n = 6, this run has 7" in error_of(eval, *other)


def test_a_killed_run_goes_on_where_it_stopped(files, tmp_path):
    """SIGKILL in the middle, then the same command: nothing is measured twice."""
    what = flags(files, *NIAH, "--n", "12", "--out")
    out, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    answers = out.with_suffix(".jsonl.gz")
    process = subprocess.Popen([sys.executable, ROOT / "eval.py", *what, out], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (answers.exists() and answers.stat().st_size > 600):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = len(load_records(answers))
    assert 0 < done < 24 and cells_in(out) == {}
    stdout = call(eval, *what, out)
    assert f"niah: {done} of 24 caches were measured before" in stdout
    call(eval, *what, whole)
    assert cells_in(out) == cells_in(whole)


def test_a_run_that_is_stopped_says_so(files, tmp_path):
    out = tmp_path / "r.json"
    what = flags(files, *NIAH, "--n", "40", "--out", out)
    process = subprocess.Popen([sys.executable, ROOT / "eval.py", *what], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not out.with_suffix(".jsonl.gz").exists():
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert said.endswith("\neval.py: stopped by SIGTERM\n") and process.returncode == 143


@pytest.mark.dist
def test_two_processes_share_the_documents_out(files, tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]

    def go(*args, code=0):
        command = [sys.executable, *args]
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
        assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
        return done.stdout if code == 0 else done.stderr.split("Traceback")[0]

    what = flags(files, "--tasks", "niah,fidelity", *NIAH[2:], *FIDELITY[2:])
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    go(ROOT / "eval.py", *what, "--out", one)
    stdout = go(*torchrun, ROOT / "eval.py", *what, "--out", two)
    assert stdout.count("caches measured") == 2, "one process speaks, about two tasks"
    assert cells_in(two) == cells_in(one)
    result = json.loads(two.read_text())
    assert result["processes"] == 2
    assert result["command"].startswith("torchrun --nproc_per_node 2 -- ")
    cost = flags(files, "--tasks", "cost")
    assert "cost measures time" in go(*torchrun, ROOT / "eval.py", *cost, code=1)
    other_seed = [*what, "--out", two, "--seed", "1"]
    said = go(*torchrun, ROOT / "eval.py", *other_seed, code=1)
    assert "made with seed = 0, this run has 1" in said


def test_fidelity_on_own_texts_and_squad_answers(files, tmp_path):
    what = ("--keep", "1,0.2", "--methods", "full,none,kvdistill", "--out", tmp_path / "r.json")
    call(eval, *flags(files, *FIDELITY, *what))
    cells = cells_in(tmp_path / "r.json")
    assert {kind for _, kind, _, _ in cells} >= {"all", "continue", "recite", "cloze", "squad"}
    full = cells["fidelity", "all", "full", 1.0]
    assert full["mean"]["kl"] < 1e-6 < cells["fidelity", "all", "kvdistill", 0.2]["mean"]["kl"]
    assert cells["fidelity", "all", "kvdistill", 1.0]["cache_bytes"] == full["cache_bytes"]


def test_the_table_that_ends_a_training_run(files, tmp_path, monkeypatch):
    """The kind squad is there when its file is; the numbers are those of the program."""
    model, tokenizer = load_llama(files / "tiny"), Tokenizer(files / "tiny")
    compressor = eval.open_compressor(files / "adapter", files / "tiny", model, tokenizer)[0]
    what = (model, tokenizer, compressor, str(files / "texts"), files / "shards", 300, 2, 0)
    monkeypatch.setattr(eval.tasks, "SQUAD", tmp_path / "missing.json")
    assert "squad" not in {cell["kind"] for cell in eval.held_out_table(*what)}
    monkeypatch.setattr(eval.tasks, "SQUAD", files / "squad.json")
    cells = eval.held_out_table(*what)
    assert "squad" in {cell["kind"] for cell in cells}
    call(eval, *flags(files, *FIDELITY, "--split", "dev", "--out", tmp_path / "r.json"))
    theirs = cells_in(tmp_path / "r.json")
    for c in cells:
        mean = theirs["fidelity", c["kind"], c["method"], c["keep"]]["mean"]
        assert mean["kl"] == pytest.approx(c["mean"]["kl"], abs=1e-3)


def test_ask_prints_the_answers_of_several_methods(files):
    what = ("--ask", files / "texts" / "3.txt", "--question", "When?", "--question", "Who?",
            "--methods", "full,kvzip,h2o", "--keep", "0.25")
    stdout = call(eval, *flags(files, *what, data={}))
    assert stdout.count("kvzip, keep 0.25") == stdout.count("h2o, keep 0.25") == 4
    assert "? When?" in stdout and "? Who?" in stdout
    row = next(line.split() for line in stdout.splitlines() if line.startswith("h2o, keep"))
    assert row[5].endswith("x") and 2 < float(row[5][:-1]) < 4, row


def test_ask_gives_the_answers_of_compress(files, monkeypatch):
    """Also where the default model is told to extract the answer, and where it is not."""
    monkeypatch.setattr("run.loading.fetch", lambda: files / "tiny")
    text = files / "texts" / "3.txt"
    common = ("--adapter", files / "adapter", "--dtype", "fp32", "--device", "cpu", "--keep",
              "0.25", "--question", "When was the mill built?")
    monkeypatch.setattr("run.html_report.terminal_width", lambda: 9999)
    found = []
    for plain in ([], ["--plain"]):
        ours = call(compress, "--context", text, *common, *plain)
        theirs = call(eval, "--ask", text, "--methods", "full,kvdistill", *common, *plain)
        theirs = theirs.replace("kvdistill, keep 0.25", "compressed")
        answers = [re.search(r"\n\? (.*)\nanswering", x, re.S)[1].split() for x in (ours, theirs)]
        assert answers[0] == answers[1]
        found.append(answers[0])
    assert found[0] != found[1]


def test_ask_refuses_what_compress_refuses(files, tmp_path, monkeypatch):
    monkeypatch.setattr(eval, "open_model", None)
    (tmp_path / "long.txt").write_text("word " * 2000)
    what = ("--ask", tmp_path / "long.txt", "--question", "Who?", "--methods", "kvdistill")
    said = error_of(eval, *flags(files, *what, data={}))
    theirs = ("--context", tmp_path / "long.txt", "--question", "Who?")
    assert said.removeprefix("eval") == error_of(
        compress, *flags(files, *theirs, data={})).removeprefix("compress")


def test_two_runs_on_one_result_file(files, tmp_path):
    what = flags(files, *FIDELITY, "--keep", "0.5", "--methods", "full", "--out")
    with lock_dir(tmp_path, ".r.json.lock"):
        said = error_of(eval, *what, tmp_path / "r.json")
        assert "writing r.json" in said and not (tmp_path / "r.json").exists()
    call(eval, *what, tmp_path / "r.json")


@pytest.mark.parametrize("args, message", [
    (("--tasks", "squod"), "'squod' is unknown, expected some of fidelity, ends"),
    (("--methods", "magic"), "'magic' is unknown, expected some of full, none, random"),
    (("--keep", "2"), "--keep: '2'"),
    (("--keep", "0"), "--keep: '0'"),
    (("--keep", "half"), "--keep: 'half': expected fractions above 0, at most 1"),
    (("--keep", "nan"), "--keep: 'nan'"),
    (("--lengths", "1"), "--lengths: '1'"),
    (("--depths", "5"), "--depths: '5'"),
    (("--n", "0"), "at least 1"),
    (("--against", "h2o"), "expected one of --methods"),
    (("--out", "."), "expected the name of a file"),
    (("--data", "squad"), "expected TASK=PATH"),
    (("--data", "fidelity=a,"), "expected TASK=PATH"),
    (("--tasks", "squad"), "needs its file: --data squad=PATH"),
    (("--tasks", "squad", "--data", "squad=none.json"), "no such file"),
    (("--ask", "x.txt"), "give both"),
    (("--ask", "x.txt", "--question", " "), "ask something"),
    (("--ask", "x.txt", "--question", "Who?"), "x.txt: no such file"),
    (("--ask", "x.txt", "--question", "Who?", "--out", "y"), "--out does not go with --ask"),
    (("--plain",), "--plain goes with --ask"),
    (("--pack", "3"), "--pack is for --tasks squad"),
])
def test_bad_flags_are_one_line(files, args, message):
    assert message in error_of(eval, *flags(files, *args, data={}))


def test_documents_that_are_too_long(files, tmp_path):
    """Cut where nobody said how long they are; refused where a flag did."""
    small = write_model(tmp_path / "small", max_positions=400)
    add_adapter(small, tmp_path / "adapter")
    text = "Ships came at dawn. " * 90
    (tmp_path / "long.jsonl").write_text(json.dumps({"document": text, "summary": "Ships."}))
    what = ("--weights", small, "--adapter", tmp_path / "adapter", "--n", "1", "--dtype", "fp32",
            "--data", f"cost={files}/hay.txt", "--data", f"summary={tmp_path}/long.jsonl")
    cost = ("--tasks", "cost", "--lengths", "390")
    assert "has 390 tokens and needs" in error_of(eval, *what, *cost)
    stdout = call(eval, *what, "--tasks", "summary", "--methods", "kvzip", "--keep", "0.5")
    assert "summary: 1 documents were cut to the model's 400 positions" in stdout

    options = ["boats " * 12, "a", "b"]  # longer than what is left for other answers
    asked = {"document": text, "question": "What came?", "options": options, "answer": 1}
    (tmp_path / "options.jsonl").write_text(json.dumps(asked))
    stdout = call(eval, *what, "--data", f"choice={tmp_path}/options.jsonl", "--tasks", "choice",
                  "--methods", "none", "--keep", "0.5")
    assert "choice: 1 documents were cut to the model's 400 positions" in stdout
