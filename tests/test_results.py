"""Tables and figures say what the result files say; the committed results have the form that is promised."""
import json
import re
import sys

import pytest
import torch

from conftest import ROOT, tiny_compressor, tiny_llama
from data.samples import Case
from run.errors import BadInput

sys.path.insert(0, str(ROOT / "results"))
import plots  # noqa: E402
import tables  # noqa: E402

COMMITTED = [name for name in tables.TABLES if (tables.RESULTS / f"{name}.json").exists()]
HEADLINE = {0.25: 0.5, 0.1: 1.0, 0.05: 1.5}  # keep: KL of `random` in the toy below


def block(page, name: str) -> str:
    found, = re.findall(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", page.read_text(encoding="utf-8"), re.S)
    return found.removesuffix("\n")


# the committed numbers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", tables.TABLES)
def test_the_page_shows_what_the_files_say(name):
    shown = block(tables.RESULTS / "README.md", name)
    assert shown == tables.made(name) and "nan" not in shown
    assert (shown == tables.MISSING) == (name not in COMMITTED)


@pytest.mark.parametrize("page", [ROOT / "README.md", tables.CARD])
def test_readme_and_card_show_the_headline_of_the_file(page):
    shown = block(page, "headline")
    assert shown == tables.made("fidelity", tables.headline_table) or shown == "" and "fidelity" not in COMMITTED


@pytest.mark.parametrize("name", COMMITTED)
def test_results_have_the_form_that_is_promised(name):
    result = tables.load(name)
    assert {"command", "commit", "seed", "threads", "processes", "device", "dtype", "versions", "settings", "adapter",
            "model", "seconds", "cells"} <= {*result, *result["settings"]}
    assert result["cells"]
    for c in result["cells"]:
        assert {"task", "kind", "method", "keep", "N", "K", "n", "mean", "ci95", "cache_bytes", "seconds"} <= set(c)
        for metric, mean in c["mean"].items():
            assert (c["ci95"][metric] is None) == (c["units"] < 2)
            if c["ci95"][metric] is not None:
                low, high = c["ci95"][metric]
                assert low - 1e-4 <= mean <= high + 1e-4, (c["kind"], c["method"], metric)


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_every_number_comes_from_a_commit(path):
    text = path.read_text(encoding="utf-8")
    assert '"commit"' in text and "dirty" not in text and "unknown" not in json.dumps(json.loads(text).get("commit"))


@pytest.mark.parametrize("name, metric", [x for x in (("squad", "f1"), ("niah", "match")) if x[0] in COMMITTED])
def test_every_task_shown_has_its_ceiling_above_its_floor(name, metric):
    """With the intervals apart: else the task says nothing about this model."""
    cells = tables.Cells(tables.load(name), name)
    full, none = cells("all", "full", 1), cells("all", "none", 0)
    assert full["ci95"][metric][0] > none["ci95"][metric][1]


@pytest.mark.skipif("fidelity" not in COMMITTED, reason="not measured yet")
def test_no_document_is_further_from_the_full_cache_than_any_method():
    cells = tables.Cells(tables.load("fidelity"), "fidelity")
    assert cells("all", "full", 1)["mean"]["kl"] == 0 and {"kvzip", "kvdistill", "random"} <= set(cells.methods)
    for m in set(cells.methods) - {"none"}:
        for keep in cells.keeps:
            c = cells("all", m, keep)
            assert c is None or c["mean"]["kl"] < cells("all", "none", 0)["mean"]["kl"], (m, keep)


@pytest.mark.parametrize("name", COMMITTED)
def test_figures_are_drawn_from_the_committed_results(name, tmp_path):
    made, = plots.draw(tables.load(name), tmp_path / f"{name}.json")
    assert made.read_bytes().startswith(b"\x89PNG") and made.stat().st_size > 10_000
    assert (tables.RESULTS / tables.FIGURES[name][0]).exists()


# the tables, by hand --------------------------------------------------------------------------------------------------

def cell(kind, method, keep, kl, **more) -> dict:
    return {"task": "fidelity", "kind": kind, "method": method, "keep": keep, "N": 400.0, "K": 400 * keep, "n": 9,
            "contexts": 3, "units": 3, "cache_bytes": 1_234_000, "mean": {"kl": kl, "js": 0.1, "agree": 0.5},
            "ci95": {"kl": [kl * 0.9, kl * 1.1], "js": None, "agree": None}, **more}


def toy(methods={"random": 1.0, "h2o": 0.9, "snapkv": 0.8, "kvzip": 0.2, "kvdistill": 0.3}) -> dict:
    """A result of `fidelity`; methods: their KL as a multiple of HEADLINE's."""
    kinds = ("recite", "squad", "all")
    cells = [cell(kind, m, keep, kl) for kind in kinds for m, keep, kl in (("full", 1.0, 0.0), ("none", 0.0, 2.0))]
    cells += [cell(kind, m, keep, times * kl) for kind in kinds for m, times in methods.items()
              for keep, kl in HEADLINE.items()]
    return {"cells": cells, "model": "toy", "threads": 1, "processes": 2, "seconds": 120, "commit": "abc1234",
            "against": None, "settings": {"dtype": "float32"},
            "command": "python eval.py --tasks fidelity --n 100 --methods " + ",".join(["full", "none", *methods])
                       + " --keep 0.25,0.1,0.05 --adapter adapters/quick --out results/fidelity.json; python other.py"}


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def test_the_headline_by_hand():
    text = tables.headline_table(toy())
    rows = rows_of(text)
    assert list(rows)[2:] == ["full", "none", "random", "snapkv", "kvzip", "kvdistill"], "h2o is worse than snapkv here"
    assert rows["random"] == ["0.50 (0.45–0.55)", "1.00 (0.90–1.10)", "1.50 (1.35–1.65)", "0.50", "1.00", "1.50",
                              "1.23"]
    assert rows["kvzip"][0] == "**0.10** (0.090–0.11)" and rows["kvzip"][4] == "**0.20**"
    assert "**" not in "".join(rows["full"] + rows["none"] + rows["kvdistill"])
    under = " ".join(text.split("\n\n")[1].split())
    assert "K = 100, 40, 20 of N = 400 tokens" in under and "`results/fidelity.json`" in under


def test_a_method_that_lacks_a_keep_has_no_number_there():
    result = toy()
    result["cells"] = [c for c in result["cells"] if (c["method"], c["keep"]) != ("random", 0.05)]
    assert rows_of(tables.headline_table(result))["random"][2] == "–"
    assert "random" in tables.fidelity_table(result) and tables.fidelity_table(result).count("| random |") == 2


def test_the_floor_and_the_ceiling_must_be_there():
    result = toy()
    result["cells"] = [c for c in result["cells"] if c["method"] != "none"]
    with pytest.raises(BadInput, match="full and none"):
        tables.fidelity_table(result)


def test_a_command_is_shown_as_it_was_given():
    """Broken before flags only, in lines of at most 120 characters where it can be; two runs are two commands."""
    command = toy()["command"]
    lines = tables.command_lines(command).splitlines()
    assert lines[0] == "```bash" and lines[-1] == "```" and lines[-2] == "python other.py"
    assert "\n".join(lines[1:-1]).replace(" \\\n   ", "").replace("\n", "; ") == command
    assert all(len(line) <= 120 for line in lines) and all(x.startswith("    --") for x in lines[2:-2])


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A repository with pages and no results."""
    (tmp_path / "results").mkdir()
    blocks = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in tables.TABLES)
    (tmp_path / "results" / "README.md").write_text(blocks)
    for name in ("README.md", "card.md"):
        (tmp_path / name).write_text("text\n<!-- table: headline -->\n<!-- end -->\nmore\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "CARD", tmp_path / "card.md")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return tmp_path


def test_what_is_not_measured_is_said_and_what_is_replaces_it(elsewhere):
    tables.main()
    page = elsewhere / "results" / "README.md"
    assert [block(page, name) for name in tables.TABLES] == [tables.MISSING] * 4
    (elsewhere / "results" / "fidelity.json").write_text(json.dumps(toy()))
    (elsewhere / "results" / "fidelity-quality.png").write_bytes(b"")
    for _ in range(2):  # the second time there are tables to replace
        tables.main()
        assert block(page, "fidelity").startswith("![KL against kept fraction](fidelity-quality.png)\n\n| keep 0.25")
        assert block(page, "squad") == tables.MISSING
        for page_of_its_own in (elsewhere / "README.md", elsewhere / "card.md"):
            text = page_of_its_own.read_text()
            assert text.startswith("text\n") and text.endswith("<!-- end -->\nmore\n")
            assert text.count("| kvzip |") == 1


def test_a_page_without_its_block_is_one_line(elsewhere):
    (elsewhere / "README.md").write_text("no block")
    with pytest.raises(BadInput, match="0 blocks .*headline.*expected one"):
        tables.main()
    assert (elsewhere / "README.md").read_text() == "no block"


# the figures ----------------------------------------------------------------------------------------------------------

def test_a_figure_shows_eight_methods_at_most(tmp_path, monkeypatch):
    methods = {m: 0.1 * (i + 1) for i, m in enumerate(plots.COLOURS)}
    assert plots.chosen(["none", "zebra", "random", "full", "kvdistill"]) == ["kvdistill", "random", "zebra"]
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, path: figures.append(fig))
    plots.draw(toy(methods), tmp_path / "x.json")
    panels = figures[0].axes
    assert [len(ax.containers) for ax in panels] == [8, 8], "a panel for all kinds, one for SQuAD's"
    plots.plt.close("all")


def test_break_even_by_hand():
    """Reading costs 10 s, reading and compressing 16; a question 2.0 s from the full cache, 0.5 from the short one:
    four questions pay. A method whose questions take as long never does. Caches of one size are not pooled."""
    def cell(method, keep, prefill, compress, question):
        return {"task": "cost", "kind": "4096", "method": method, "keep": keep, "cache_bytes": 100, "K": 4096 * keep,
                "seconds": {"prefill": prefill, "compress": compress},
                "mean": {"tokens_per_s": 5 * question, "tokens_per_s_8": 9.0, "question_s": question}}
    cells = [cell("full", 1.0, 10, 0, 2.0), cell("kvdistill", 0.1, 4, 12, 0.5), cell("random", 0.1, 10, 1, 2.0),
             cell("h2o", 0.1, 10, 13, 1.0), cell("question", 0.1, 10, 1, 0.5)]
    rows = {r["method"]: r for r in plots.cost_rows({"cells": cells})}
    assert rows["kvdistill"]["ratio"] == 1.6 and rows["kvdistill"]["break_even"] == 4.0
    assert rows["kvdistill"]["tokens_per_s"] == 2.5 and rows["h2o"]["tokens_per_s"] == 5.0, "each has its own"
    assert rows["random"]["break_even"] is None and rows["full"]["ratio"] == 1.0
    assert rows["h2o"]["ratio"] == 1.3 and rows["h2o"]["break_even"] == 3.0, "its second reading is left out"
    assert rows["question"]["bytes"] is None and rows["question"]["break_even"] is None
    with pytest.raises(BadInput, match="against the method full"):
        plots.cost_rows({"cells": cells[1:]})


def test_heads_share_one_budget_unequally(tmp_path, capsys):
    """Shares are counted in equal shares, so their mean over heads is 1 for every document."""
    model, tokens = tiny_llama(), torch.arange(60).remainder(97).tolist()
    comp = tiny_compressor(model)
    cases = [Case(tokens[i:i + 44], 4, []) for i in range(3)]
    shares = plots.budget_shares(comp, model, cases, 0.25)
    assert shares.shape == (3, 6, 2) and shares.mean((1, 2)) == pytest.approx([1, 1, 1])
    assert shares.min() == pytest.approx(1 / 10) and shares.std() > 0.1, "one recent token of ten in every head"
    made = plots.head_map(comp, model, cases, tmp_path / "heads.png", (0.5, 0.25))
    assert made.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out.count("between 3 documents") == 2
    with pytest.raises(BadInput, match="--choice token"):
        plots.head_map(tiny_compressor(model, choice="token"), model, cases, tmp_path / "none.png")
