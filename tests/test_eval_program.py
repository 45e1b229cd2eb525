"""eval.py as a user runs it: every task on a tiny model, interrupted and continued, with good and with bad input."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from compress import load_adapter
from conftest import ROOT, tiny_compressor
from data.tokenizer import Tokenizer
from eval import QUICK_METHODS, held_out_table
from model import load_llama
from run.files import save_adapter
from run.folders import alone_in
from run.records import load_records
from test_programs import one_line_error, run, write_model
from test_tasks import squad_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model with an adapter, and small files of our own for every task."""
    folder = tmp_path_factory.mktemp("eval")
    weights = write_model(folder / "tiny")
    model, tok = load_llama(weights), Tokenizer(weights)
    save_adapter(folder / "adapter", tiny_compressor(model), model, tok, {})
    squad_file(folder / "squad.json")
    (folder / "hay.txt").write_text(" ".join(f"This is sentence {i} of many." for i in range(400)))
    texts = ["The mill was built by Ada. It burned in 1817, and nobody rebuilt it. " * 4, "Ships came at dawn. " * 9]
    (folder / "s.jsonl").write_text("".join(json.dumps({"document": t, "summary": t[:30]}) + "\n" for t in texts))
    asked = {"question": "Who?", "options": ["Ada", "Ben", "Cy"], "answer": 0}
    (folder / "c.jsonl").write_text("".join(json.dumps({"document": t} | asked) + "\n" for t in texts))
    (folder / "texts").mkdir()
    for i in range(60):
        (folder / "texts" / f"{i}.txt").write_text(f"Text {i} says that the Old Mill was built in {1500 + i}. " * 15)
    return folder


def flags(files, *more, data=("squad=squad.json", "niah=hay.txt", "summary=s.jsonl", "choice=c.jsonl", "cost=hay.txt",
                              "fidelity=texts")):
    return ("--weights", files / "tiny", "--adapter", files / "adapter", "--dtype", "fp32", "--device", "cpu",
            "--shards", files / "shards", *(x for d in data for x in ("--data", d.replace("=", f"={files}/"))), *more)


def test_all_tasks_in_one_run_then_continued_with_another_method(files, tmp_path):
    out = tmp_path / "r.json"
    what = ("--tasks", "squad,niah,summary,choice,cost", "--n", "6", "--keep", "0.5,0.2", "--pack", "2", "--lengths",
            "700", "--depths", "0,1", "--out", out)
    stdout, _ = run("eval.py", *flags(files, *what, "--plot", "--methods", "full,none,random,kvzip,kvdistill"))
    for name in ("quality", "needles", "summary-quality", "choice-quality", "cost"):
        assert (tmp_path / f"r-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "(chance)" in stdout and "0.333" in stdout
    result = json.loads(out.read_text())
    cells = {(c["task"], c["kind"], c["method"], c["keep"]): c for c in result["cells"]}
    for task, metric in (("squad", "f1"), ("niah", "match"), ("summary", "rougeL"), ("choice", "accuracy"),
                         ("cost", "tokens_per_s")):
        for method, keep in (("full", 1.0), ("none", 0.0), ("random", 0.2), ("kvdistill", 0.5), ("kvzip", 0.2)):
            c = cells[task, "all", method, keep]
            low, high = c["ci95"][metric]
            assert low <= c["mean"][metric] <= high and c["n"] > 0
            assert set(c["seconds"]) == {"prefill", "compress", "decode"}
            assert (c["K"] == c["N"]) == (method == "full") and (c["K"] == 0) == (method == "none")
        assert cells[task, "all", "random", 0.2]["cache_bytes"] < 0.4 * cells[task, "all", "full", 1.0]["cache_bytes"]
    assert cells["squad", "all", "random", 0.2]["n"] == 6
    assert cells["choice", "all", "full", 1.0]["mean"]["chance"] == 0.33333
    assert ("niah", "single/700/1.0", "kvzip", 0.5) in cells and ("cost", "700", "full", 1.0) in cells
    assert {"command", "commit", "seed", "threads", "device", "versions", "settings", "seconds"} <= set(result)
    assert stdout.splitlines()[-1] == f"result: {out}" and "kB of the caches" in stdout
    before = load_records(out.with_suffix(".jsonl.gz"))
    assert all("prediction" in a for r in before if r["task"] in ("squad", "niah", "summary") for a in r["answers"])

    more, _ = run("eval.py", *flags(files, *what, "--methods", "none,streaming,kvdistill", "--against", "streaming"))
    assert "summary: 6 of 10 caches were asked before and are skipped" in more
    after = load_records(out.with_suffix(".jsonl.gz"))
    assert after[:len(before)] == before and {r["method"] for r in after[len(before):]} == {"streaming"}
    again = {(c["task"], c["kind"], c["method"], c["keep"]): c for c in json.loads(out.read_text())["cells"]}
    assert all(again[k]["mean"] == c["mean"] for k, c in cells.items())
    assert "  less streaming" in more
    difference = again["squad", "all", "kvdistill", 0.2]["difference"]
    assert difference["against"] == "streaming"
    assert difference["mean"]["f1"] == pytest.approx(again["squad", "all", "kvdistill", 0.2]["mean"]["f1"]
                                                     - again["squad", "all", "streaming", 0.2]["mean"]["f1"], abs=2e-5)
    assert "squad n = 6, this run has 7" in one_line_error("eval.py", *flags(files, *what[:3], "7", *what[4:]))


def test_a_killed_run_goes_on_where_it_stopped(files, tmp_path):
    """SIGKILL in the middle; then the same command: nothing asked twice, and the same cells as in one go."""
    what = ("--tasks", "niah", "--n", "12", "--keep", "0.5", "--lengths", "700", "--depths", "0,1", "--methods",
            "random,kvdistill")
    out = tmp_path / "killed.json"
    p = subprocess.Popen([sys.executable, ROOT / "eval.py", *map(str, flags(files, *what, "--out", out))], cwd=ROOT,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = out.with_suffix(".jsonl.gz")
    while not (answers.exists() and len(answers.read_bytes()) > 600):
        assert p.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    done = len(load_records(answers))
    assert 0 < done < 24 and json.loads(out.read_text())["cells"] == []
    stdout, _ = run("eval.py", *flags(files, *what, "--out", out))
    assert f"niah: {done} of 24 caches were asked before" in stdout
    whole = tmp_path / "whole.json"
    run("eval.py", *flags(files, *what, "--out", whole))
    timeless = lambda path: [{k: v for k, v in c.items() if k != "seconds"}  # noqa: E731
                             for c in json.loads(path.read_text())["cells"]]
    assert timeless(out) == timeless(whole)


@pytest.mark.dist
def test_two_processes_share_the_documents_out(files, tmp_path):
    """The cells are one process's, also when both were killed in the middle and another number of them goes on."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # in two processes, the sums of one
    what = [str(x) for x in flags(files, "--tasks", "niah,fidelity", "--n", "6", "--keep", "0.5,0.2", "--lengths",
                                  "700", "--depths", "0,1", "--context", "300", "--methods",
                                  "full,random,h2o,kvdistill")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]

    def go(out, launch):
        p = subprocess.run([*launch, str(ROOT / "eval.py"), *what, "--out", str(out)], cwd=ROOT, env=env, text=True,
                           capture_output=True)
        assert p.returncode == 0, p.stderr[-3000:]
        return p.stdout

    one, both, cut = tmp_path / "one.json", tmp_path / "both.json", tmp_path / "cut.json"
    go(one, [sys.executable])
    assert go(both, two).count("caches in") == 2, "one process speaks, of two tasks"
    first = json.loads(one.read_text())
    result = json.loads(both.read_text())
    timeless = lambda r: [{k: v for k, v in c.items() if k != "seconds"} for c in r["cells"]]  # noqa: E731
    assert timeless(result) == timeless(first) and result["settings"] == first["settings"]
    assert result["processes"] == 2 and result["command"].startswith("torchrun --nproc_per_node 2 -- ")
    records = load_records(both.with_suffix(".jsonl.gz"))
    assert len(records) == len({(r["task"], r["case"], r["method"], r["keep"]) for r in records})

    p = subprocess.Popen([*two, ROOT / "eval.py", *what, "--out", cut], cwd=ROOT, env=env,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = cut.with_suffix(".jsonl.gz")
    while not (answers.exists() and len(answers.read_bytes()) > 1200):
        assert p.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(p.pid)], capture_output=True, text=True).stdout.split()
    for pid in (p.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    p.wait()
    assert len(workers) == 2
    assert 0 < len(load_records(answers)) < len(records)
    assert "caches were asked before and are skipped" in go(cut, [sys.executable])
    assert timeless(json.loads(cut.read_text())) == timeless(first)

    (files / "broken.json").write_text("{")
    for args, message in ((flags(files, "--tasks", "cost"), "cost is timed"),
                          ([*what, "--out", both, "--seed", "1"], "made with seed = 0, this run has 1"),
                          (flags(files, "--tasks", "squad", data=("squad=broken.json",)), "json: not valid JSON")):
        p = subprocess.run([*two, ROOT / "eval.py", *map(str, args)], cwd=ROOT, env=env, text=True, capture_output=True)
        said = p.stderr.split("Traceback")[0]  # the traceback is torchrun's
        assert p.returncode and message in said and "Error" not in said, said


def test_fidelity_on_texts_and_squad_answers(files):
    stdout, _ = run("eval.py", *flags(files, "--tasks", "fidelity", "--n", "2", "--context", "300", "--keep", "0.2",
                                      "--methods", "full,none,kvdistill", "--json"))
    assert not list((ROOT / "data" / "shards").glob("texts-*")), "nothing is written into the repository"
    kl = {(c["kind"], c["method"]): c["mean"]["kl"] for c in json.loads(stdout.strip().splitlines()[-1])}
    assert {kind for kind, _ in kl} == {"all", "continue", "recite", "cloze", "squad"}
    assert kl["all", "full"] < 1e-6 < kl["all", "kvdistill"]
    assert "kB of the caches" not in stdout, "the line instead of the table"


def test_the_table_that_ends_a_training_run(files, capsys):
    """The kind squad is there when its file is; the numbers are those of the program's own cells."""
    weights, sources = files / "tiny", str(files / "texts")
    model, tok = load_llama(weights), Tokenizer(weights)
    comp = load_adapter(files / "adapter", model, tok)
    what = model, tok, comp, sources, files / "shards", 300, 2, 0, (0.5, 0.2)
    cells = held_out_table(*what, squad_path=files / "squad.json")
    assert {c["method"] for c in cells} == set(QUICK_METHODS)
    assert {c["kind"] for c in cells} == {"all", "continue", "recite", "cloze", "squad"}
    assert "fidelity · squad: kl (95 %)" in capsys.readouterr().out
    kinds = {c["kind"] for c in held_out_table(*what, squad_path=files / "nowhere.json")}
    assert kinds == {"all", "continue", "recite", "cloze"}
    stdout, _ = run("eval.py", *flags(files, "--tasks", "fidelity", "--n", "2", "--context", "300", "--keep", "0.5,0.2",
                                      "--methods", ",".join(QUICK_METHODS), "--json"))
    theirs = {(c["kind"], c["method"], c["keep"]): c["mean"] for c in json.loads(stdout.strip().splitlines()[-1])}
    for c in cells:
        assert theirs[c["kind"], c["method"], c["keep"]]["kl"] == pytest.approx(c["mean"]["kl"], abs=1e-3)


def test_a_run_that_is_ended_says_so(files, tmp_path):
    out = tmp_path / "r.json"
    what = flags(files, "--tasks", "niah", "--n", "40", "--keep", "0.5", "--lengths", "700", "--depths", "0,1",
                 "--methods", "random,kvdistill", "--out", out)
    p = subprocess.Popen([sys.executable, ROOT / "eval.py", *map(str, what)], cwd=ROOT, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
    while not out.with_suffix(".jsonl.gz").exists():
        assert p.poll() is None, "it ended before it could be stopped"
        time.sleep(0.02)
    p.send_signal(signal.SIGTERM)
    assert p.communicate()[1].endswith("\neval.py: stopped by SIGTERM\n") and p.returncode == 143


def test_keep_1_is_the_full_cache(files):
    stdout, _ = run("eval.py", *flags(files, "--tasks", "fidelity", "--n", "2", "--context", "300", "--keep", "1",
                                      "--methods", "full,kvdistill,random", "--json"))
    cells = [c for c in json.loads(stdout.strip().splitlines()[-1]) if c["kind"] == "all"]
    assert [c["method"] for c in cells] == ["full", "kvdistill", "random"]
    assert all(c["mean"]["kl"] < 1e-6 and c["K"] == c["N"] and c["cache_bytes"] == cells[0]["cache_bytes"]
               for c in cells)


def test_two_runs_on_one_result_file(files, tmp_path):
    """The second is refused while the first one holds the lock, and writes nothing; other files are not concerned."""
    what = flags(files, "--tasks", "fidelity", "--n", "1", "--context", "300", "--keep", "0.5", "--methods", "full")
    with alone_in(tmp_path, ".r.json.lock"):
        said = one_line_error("eval.py", *what, "--out", tmp_path / "r.json")
        assert "another process is writing r.json in it; wait for it, or give a new --out" in said
        assert not (tmp_path / "r.json").exists()
        run("eval.py", *what, "--out", tmp_path / "other.json")
    assert (tmp_path / "other.json").exists()
    run("eval.py", *what, "--out", tmp_path / "r.json")


def test_bad_input_is_one_line_that_says_what_to_do(files, tmp_path):
    for args, message in ((("--tasks", "squod"), "'squod' is unknown, expected some of fidelity, squad"),
                          (("--methods", "magic"), "'magic' is unknown, expected some of full, none, random"),
                          (("--keep", "2"), "--keep is '2'"), (("--keep", "0"), "--keep is '0'"),
                          (("--keep", "half"), "--keep is 'half'"),
                          (("--lengths", "1"), "--lengths is '1'"), (("--depths", "5"), "--depths is '5'"),
                          (("--n", "0"), "at least 1"), (("--against", "tova"), "expected one of --methods"),
                          (("--out", str(tmp_path)), "expected the name of a file"),
                          (("--data", "squad"), "expected TASK=PATH"), (("--plot",), "--plot draws what --out names")):
        assert message in one_line_error("eval.py", *flags(files, *args)), args
    assert "needs its file: --data squad=PATH" in one_line_error("eval.py", *flags(files, "--tasks", "squad", data=()))
    assert "no such file" in one_line_error("eval.py", *flags(files, "--tasks", "squad", data=("squad=none.json",)))
    assert "made for a model with" in one_line_error("eval.py", "--weights", write_model(tmp_path / "other", n_layer=7),
                                                     "--adapter", files / "adapter", "--dtype", "fp32")
    assert "a folder; expected a file" in one_line_error("eval.py", *flags(files, data=("squad=texts",)))
    assert "an empty name in it" in one_line_error("eval.py", *flags(files, data=("fidelity=texts,",)))
    small = write_model(tmp_path / "small", max_positions=400)
    model = load_llama(small)
    save_adapter(tmp_path / "small-adapter", tiny_compressor(model), model, Tokenizer(small), {})
    (files / "long.jsonl").write_text(json.dumps({"document": "Ships came at dawn. " * 90, "summary": "Ships."}) + "\n")
    what = ("--weights", small, "--adapter", tmp_path / "small-adapter", "--data", f"cost={files}/hay.txt", "--data",
            f"summary={files}/long.jsonl", "--lengths", "390", "--n", "1", "--dtype", "fp32",
            "--out", tmp_path / "cut.json")
    for more in ((), ("--truncate",)):
        assert "390 tokens, the model 400 positions" in one_line_error("eval.py", *what, "--tasks", "cost", *more)
    what += ("--tasks", "summary", "--methods")
    assert "--truncate cuts its end off" in one_line_error("eval.py", *what, "full")
    out, _ = run("eval.py", *what, "full", "--truncate")
    assert "summary: 1 documents were cut" in out
    out, _ = run("eval.py", *what, "full,kvzip", "--keep", "0.5", "--truncate")
    assert "1 of 2 caches were asked before" in out, "documents are cut alike, whatever the methods"
