"""Answers and results that strangers made: what does not fit is refused in one line that names the file."""
import gzip
import json
import sys

import pytest

from conftest import ROOT
from run.errors import BadInput, write_json
from run.records import append_records, continue_from, load_records

sys.path.insert(0, str(ROOT / "results"))
import plots  # noqa: E402
import tables  # noqa: E402


def changed(tree: dict, path: tuple, value):
    """A copy with the value at path; without it, for ..."""
    tree = json.loads(json.dumps(tree))
    place = tree
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return tree


RECORD = {
    "task": "squad", "case": 0, "unit": "a", "method": "full", "keep": 1.0, "N": 5, "K": 5, "bytes": 9,
    "seconds": {"prefill": 1.0, "compress": 0.0, "decode": 1.0},
    "answers": [{"kind": "squad", "weight": 1, "f1": 1.0, "em": 1.0, "contains": 1.0}]}


@pytest.mark.parametrize("path, value", [
    (("task",), "x"), (("task",), []), (("case",), [1]), (("case",), ...), (("unit",), {}),
    (("method",), None), (("keep",), "1"), (("N",), ...), (("K",), True), (("bytes",), 1e308),
    (("seconds",), 5), (("seconds", "decode"), None), (("answers",), {}), (("answers", 0), 5),
    (("answers", 0, "kind"), 7), (("answers", 0, "f1"), ...), (("answers", 0, "weight"), "1"),
], ids=str)
def test_records_of_another_form_are_refused(tmp_path, path, value):
    file = tmp_path / "r.jsonl.gz"
    append_records(file, [RECORD])
    assert load_records(file) == [RECORD]
    file.unlink()
    append_records(file, [RECORD, changed(RECORD, path, value)])
    with pytest.raises(BadInput, match="r.jsonl.gz: .*; no answers of this program: move it away"):
        load_records(file)


@pytest.mark.parametrize("raw", [
    b"5\n", b"[" * 10 ** 5 + b"\n", b'{"task": "\xff"}\n', b"9" * 5000 + b"\n", b"\n"])
def test_lines_that_are_no_records_are_refused(tmp_path, raw):
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(BadInput, match="r.jsonl.gz: .*; no answers of this program"):
        load_records(tmp_path / "r.jsonl.gz")


@pytest.mark.parametrize("path, value", [
    (("settings",), 5), (("settings", "tasks"), []), (("settings", "tasks", "niah"), 5),
    (("command",), []), (("commit",), None), (("seconds",), "1"), (("against",), [1]),
    (("threads",), 1.5), (("cells",), 5)], ids=str)
def test_results_of_another_form_are_refused(tmp_path, path, value):
    out = tmp_path / "r.json"
    answers = tmp_path / "r.jsonl.gz"
    about = {"commit": "b", "command": "python eval.py", "seconds": 0, "against": None, "threads": 1,
             "processes": 1, "cells": []}
    before = about | {"settings": {"tasks": {"squad": {"n": 5}, "niah": {"contexts": 3}}}}
    mine = about | {"settings": {"tasks": {"squad": {"n": 5}}}}
    write_json(out, before)
    assert continue_from(out, answers, json.loads(json.dumps(mine))) == []
    write_json(out, changed(before, path, value))
    with pytest.raises(BadInput, match="r.json: .*; it is not a result of this program: give another --out"):
        continue_from(out, answers, mine)


@pytest.mark.parametrize("path, value", [
    (("cells",), 5), (("cells", 0), None), (("cells", 0, "mean"), ...), (("settings",), []),
    (("seconds",), "1"), (("cells", 0, "keep"), "x")], ids=str)
def test_tables_and_figures_of_a_broken_result_are_one_line(tmp_path, monkeypatch, path, value):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plots, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["plots.py"])
    good = json.loads((ROOT / "results" / "fidelity.json").read_text())
    write_json(tmp_path / "results" / "fidelity.json", changed(good, path, value))
    with pytest.raises(BadInput, match="fidelity.json: .*; make it again with eval.py"):
        tables.made("fidelity")
    if value in (5, None):  # what the figures show, too
        with pytest.raises(BadInput, match="fidelity.json: .*; make it again with eval.py"):
            plots.main()
