"""Committed numbers: README shows what the files say."""
import json
import sys

import pytest

from conftest import ROOT
from run.errors import BadInput

sys.path.insert(0, str(ROOT / "results"))
import plots  # noqa: E402
import tables  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", tables.TABLES)
def test_readme_shows_the_committed_tables(name):
    table = tables.TABLES[name](tables.load(name), name)
    assert table in README and "nan" not in table


@pytest.mark.parametrize("name", tables.TABLES)
def test_results_have_the_form_that_is_promised(name):
    result = tables.load(name)
    assert {"command", "commit", "seed", "threads", "device", "dtype", "versions", "settings", "adapter", "model",
            "seconds", "cells"} <= {*result, *result["settings"]}
    assert "dirty" not in result["commit"] and result["cells"]
    for c in result["cells"]:
        assert {"task", "kind", "method", "keep", "N", "K", "n", "mean", "ci95", "cache_bytes", "seconds"} <= set(c)
        for metric, mean in c["mean"].items():
            assert (c["ci95"][metric] is None) == (c["units"] < 2)
            if c["ci95"][metric] is None:
                continue
            assert c["ci95"][metric][0] - 1e-4 <= mean <= c["ci95"][metric][1] + 1e-4, (c["kind"], c["method"], metric)


def test_fidelity_has_a_hundred_documents_of_each_kind():
    cells = tables.Cells(tables.load("fidelity"), "fidelity")
    for kind in tables.KINDS:
        for method in cells.methods:
            for keep in cells.keeps:
                assert cells(kind, method, keep)["contexts"] >= 100, (kind, method)


@pytest.mark.parametrize("name, metric", (("squad", "f1"), ("squad-all", "f1"), ("niah", "match")))
def test_every_task_shown_has_its_ceiling_above_its_floor(name, metric):
    """With the intervals apart: else the task says nothing about this model."""
    cells = tables.Cells(tables.load(name), name.partition("-")[0])
    full, none = cells("all", "full", 1), cells("all", "none", 0)
    assert full["ci95"][metric][0] > none["ci95"][metric][1]


def test_all_questions_are_asked_where_all_are_promised():
    few, every = (tables.Cells(tables.load(name), "squad") for name in ("squad", "squad-all"))
    assert all(c["n"] == 200 for c in few.at.values() if c["kind"] == "all")
    assert all(c["n"] == 826 for c in every.at.values() if c["kind"] == "all")
    assert {"full", "none", "kvzip", "kvdistill"} <= set(every.methods) < set(few.methods)


# figures ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ("fidelity", "squad", "niah", "cost"))
def test_figures_are_drawn_from_the_committed_results(name, tmp_path):
    made, = plots.draw(tables.load(name), tmp_path / f"{name}.json")
    assert made.read_bytes().startswith(b"\x89PNG") and made.stat().st_size > 10_000
    assert f"results/{made.name}" in README and (ROOT / "results" / made.name).exists()


def test_break_even_by_hand():
    """Reading costs 10 s, reading and compressing 16; a question 2.0 s from the full cache, 0.5 from the short ones (a
    mean of three, as they are of one size): four questions pay. A method whose questions take as long never does."""
    def cell(method, keep, prefill, compress, question):
        k = {"full": 4096, "random": 800}.get(method, 400)
        return {"task": "cost", "kind": "4096", "method": method, "keep": keep, "cache_bytes": 100, "K": k,
                "seconds": {"prefill": prefill, "compress": compress},
                "mean": {"tokens_per_s": 5 * question, "tokens_per_s_8": 9.0, "question_s": question}}
    cells = [cell("full", 1.0, 10, 0, 2.0), cell("kvdistill", 0.1, 4, 12, 0.4), cell("random", 0.1, 10, 1, 2.0),
             cell("h2o", 0.1, 10, 13, 0.6), cell("question", 0.1, 10, 1, 0.5)]
    rows = {r["method"]: r for r in plots.cost_rows({"cells": cells})}
    assert rows["kvdistill"]["ratio"] == 1.6 and rows["kvdistill"]["break_even"] == 4.0
    assert rows["kvdistill"]["tokens_per_s"] == rows["h2o"]["tokens_per_s"] == pytest.approx(2.5), "caches of one size"
    assert rows["random"]["break_even"] is None and rows["full"]["ratio"] == 1.0
    assert rows["h2o"]["ratio"] == 1.3 and rows["h2o"]["break_even"] == 2.0, "its second reading is left out"
    assert rows["question"]["bytes"] is None and rows["question"]["break_even"] is None
    with pytest.raises(BadInput, match="against the method full"):
        plots.cost_rows({"cells": cells[1:]})
