"""Records on disk, means and intervals, cells, and the table in the terminal."""
import gzip
import json

import pytest

from run.errors import BadInput
from run.records import (append_records, cells_of, continue_from, load_records, mean_and_interval,
                         print_table)


def record(i=0, method="full", keep=1.0, kls=(1.0,), kinds=("cloze",), weights=(1,), size=9000):
    answers = [{"kind": kind, "weight": weight, "kl": kl, "js": kl / 2, "agree": 1}
               for kind, weight, kl in zip(kinds, weights, kls)]
    return {"task": "fidelity", "case": i, "unit": f"u{i}", "method": method, "keep": keep,
            "N": 10, "K": 10 * keep, "bytes": size, "answers": answers,
            "seconds": {"prefill": 1, "compress": 2, "decode": 3}}


# intervals and cells ----------------------------------------------------------------------

def test_the_unit_of_an_interval_is_the_document():
    """Four documents of ten equal answers: the interval is that of four numbers, not of forty."""
    mean, (low, high) = mean_and_interval(list("abcd") * 10, [0, 1, 2, 3] * 10, [1] * 40)
    assert mean == 1.5 and low < 0.6 and high > 2.4
    assert mean_and_interval(list("abab"), [1] * 4, [1] * 4) == (1.0, [1.0, 1.0])
    assert mean_and_interval(list("aaa"), [1, 2, 3], [1] * 3) == (2.0, None)
    assert mean_and_interval(list("ab"), [1, 4], [2, 1])[0] == 2.0


def test_no_hit_in_twenty_documents_is_no_certainty():
    """Clopper and Pearson: 0 of 20 leaves 0 to 1 − 0.025^(1/20) = 0.16843."""
    units = [i // 2 for i in range(40)]
    none = mean_and_interval(units, [0] * 40, [1] * 40, judgements=True)
    every = mean_and_interval(units, [1] * 40, [1] * 40, judgements=True)
    assert none == (0, [0, 0.16843]) and every == (1, [0.83157, 1])
    assert mean_and_interval(units, [0] * 40, [1] * 40) == (0, [0, 0])


def test_cells_by_hand():
    form = {"kinds": ("a/x", "a/y", "b"), "weights": (1, 1, 2)}
    found = [record(0, "none", 0.0, (3, 3, 3), **form), record(1, "none", 0.0, (3, 3, 3), **form),
             record(0, "ours", 0.2, (1, 2, 0), **form), record(1, "ours", 0.2, (3, 4, 1), **form)]
    cells = {(c["kind"], c["method"]): c for c in cells_of(found, "none")}
    assert {kind for kind, _ in cells} == {"a", "a/x", "a/y", "b", "all"}
    assert cells["a", "ours"]["mean"] == {"kl": 2.5, "js": 1.25, "agree": 1}
    assert cells["all", "ours"]["mean"]["kl"] == (1 + 2 + 0 + 3 + 4 + 2) / 8
    assert cells["all", "ours"]["ci95"]["kl"] == [0.75, 2.25]
    assert cells["a/x", "ours"]["difference"] == {
        "against": "none", "mean": {"kl": -1, "js": -0.5, "agree": 0},
        "ci95": {"kl": [-2, 0], "js": [-1, 0], "agree": [0, 0]}}
    assert (cells["b", "ours"]["n"], cells["b", "ours"]["contexts"]) == (2, 2)
    assert cells["b", "ours"]["seconds"] == {"prefill": 1, "compress": 2, "decode": 3}
    assert cells_of([*found[3:], *found[:3]], "none") == cells_of(found, "none")


def test_a_method_that_saw_some_documents_only_has_no_cell(capsys):
    found = [record(i, "full") for i in (0, 1)] + [record(1, "kvzip", 0.2)]
    assert {c["method"] for c in cells_of(found)} == {"full"}
    assert "kvzip, keep 0.2 is left out; it saw 1 of 2 documents" in capsys.readouterr().out

    task = found[0]["task"]  # of three documents: no method is finished
    assert cells_of(found, sizes={task: 3}) == []
    assert "full, keep 1 is left out; it saw 2 of 3 documents" in capsys.readouterr().out


# the table --------------------------------------------------------------------------------

def table(capsys, documents: int) -> list[list[str]]:
    found = []
    for i in range(documents):
        for method, keep, kl, size in (("full", 1.0, 0, 9000), ("none", 0.0, 3, 100),
                                       ("a", 0.5, 1, 4000), ("a", 0.2, 2, 2000),
                                       ("b", 0.5, 4, 4500), ("b", 0.2, 6, 2500)):
            found.append(record(i, method, keep, (kl,), size=size))
    print_table(cells_of(found, "a"))
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_table_shows_ratios_and_differences(capsys):
    lines = table(capsys, 8)
    assert "nats per token, lower is better" in " ".join(lines[1])
    assert "8 answers about 8 documents of 10 tokens; in parentheses" in " ".join(lines[2])
    assert lines[3] == "method keep 0.5 keep 0.2".split()
    assert lines[4] == ["full", *["0.000", "(0.000–0.000)"] * 2], "full is the same at every keep"
    assert lines[-1] == "fewer bytes 2.0–2.2x 3.6–4.5x".split()
    b = next(i for i, line in enumerate(lines) if line[:1] == ["b"])
    assert lines[b] == "b 4.000 (4.000–4.000) 6.000 (6.000–6.000)".split()
    assert lines[b + 1] == "minus a +3.000 (+3.000, +3.000) +4.000 (+4.000, +4.000)".split()
    assert sum(line[:1] == ["minus"] for line in lines) == 1, "not to itself, nor at other keeps"


def test_fewer_than_eight_documents_have_no_interval(capsys):
    lines = table(capsys, 7)
    assert "b 4.000 6.000".split() in lines and "parentheses:" not in sum(lines, [])
    assert "1 answer about 1 document of 10 tokens".split() in table(capsys, 1)


def test_the_table_of_a_training_run_fits_and_has_one_part(capsys):
    found = []
    for i in range(8):
        kinds = {"kinds": ("cloze", "title", "recite"), "weights": (1, 1, 1)}
        found.append(record(i, "full", 1.0, (0, 0, 0), **kinds))
        for keep in (0.5, 0.25, 0.1, 0.05):
            found.append(record(i, "kvdistill:random", keep, (1, 2, i), **kinds))
    print_table(cells_of(found), by_kind=False)
    lines = capsys.readouterr().out.splitlines()
    assert sum("per token" in line for line in lines) == 1 and "all kinds" in lines[1]
    assert max(map(len, lines[3:])) < 100

    for r in found:
        r["unit"] = "novel"
    print_table(cells_of(found))
    assert "8 documents of 10 tokens, all of them pieces of one text" in capsys.readouterr().out


# on disk ----------------------------------------------------------------------------------

def test_what_a_killed_run_left_half_written_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    a, b, c, d = (record(i) | {"x": "ü" * 99} for i in range(4))
    append_records(path, [a, b])
    append_records(path, [c])
    whole = path.read_bytes()
    assert load_records(path) == [a, b, c] and path.read_bytes() == whole
    for cut in range(len(whole) - 25, len(whole)):
        path.write_bytes(whole[:cut])
        assert load_records(path) == [a, b]
        append_records(path, [d, a])
        assert load_records(path) == [a, b, d], "what was measured twice counts once"
    with pytest.raises(BadInput, match="cannot be written"):
        append_records("/dev/full", [a])


@pytest.mark.parametrize("foreign", [
    gzip.compress(b"no json\n"), b"plain text\n", gzip.compress(b'{"a": 1}\n'),
    gzip.compress(b"9" * 5000), gzip.compress(json.dumps(record() | {"bytes": 1e308}).encode())])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, foreign):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(foreign)
    with pytest.raises(BadInput, match="no answers of this program"):
        load_records(path)
    assert path.read_bytes() == foreign


@pytest.fixture
def out(tmp_path):
    """A result of one record."""
    assert continue_from(tmp_path / "r.json", tmp_path / "r.jsonl.gz", result()) == []
    append_records(tmp_path / "r.jsonl.gz", [record()])
    return tmp_path / "r.json"


def result(seed=0, command="go", **task) -> dict:
    tasks = {"squad": {"n": 5, "pack": 1} | task}
    return {"settings": {"seed": seed, "tasks": tasks}, "commit": "abc", "command": command,
            "threads": 1, "processes": 1, "seconds": 0, "against": None, "cells": []}


def test_the_same_settings_go_on(out):
    again = result()
    assert len(continue_from(out, out.with_suffix(".jsonl.gz"), again)) == 1
    assert (again["commit"], again["command"], again["threads"]) == ("abc", "go", "1")
    more = result(command="go on") | {"threads": 2, "against": "full"}
    more["settings"]["tasks"] = {"niah": {"n": 3}}
    assert len(continue_from(out, out.with_suffix(".jsonl.gz"), more)) == 1
    assert set(more["settings"]["tasks"]) == {"squad", "niah"}, "another task may join the file"
    assert (more["command"], more["threads"]) == ("go; go on", "1, 2")


@pytest.mark.parametrize("other, message", [
    (result(seed=1), "seed = 0, this run has 1"), (result(pack=2), "squad pack = 1")])
def test_other_settings_are_refused(out, other, message):
    with pytest.raises(BadInput, match=message):
        continue_from(out, out.with_suffix(".jsonl.gz"), other)


@pytest.mark.parametrize("content", ['{"table": []}', '{"settings": {"tasks": {}}, "cells": 5}',
                                     json.dumps(result(seed=10 ** 400)), "[]"])
def test_what_is_no_result_is_one_line(out, content):
    out.write_text(content)
    with pytest.raises(BadInput, match="^[^\n]*r.json: "):
        continue_from(out, out.with_suffix(".jsonl.gz"), result())


def test_answers_without_their_result_are_refused(out):
    out.unlink()
    with pytest.raises(BadInput, match="answers without their result"):
        continue_from(out, out.with_suffix(".jsonl.gz"), result())
