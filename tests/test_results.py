"""Tables and figures say what the result files say, and the files have the promised form."""
import json
import re

import pytest

from conftest import ROOT, tiny_compressor, tiny_llama
from data.samples import Case
from results import plots, tables
from run.errors import BadInput

COMMITTED = [name for name in tables.TABLES if (tables.RESULTS / f"{name}.json").exists()]
HEADLINE = {0.25: 0.5, 0.1: 1.0, 0.05: 1.5}  # keep: the KL of `random` in the toy below


def block(page, name: str) -> str:
    pattern = rf"<!-- table: {name} -->\n(.*?)<!-- end -->"
    found, = re.findall(pattern, page.read_text(encoding="utf-8"), re.S)
    return found.removesuffix("\n")


# the committed numbers --------------------------------------------------------------------

@pytest.mark.parametrize("name", tables.TABLES)
def test_the_page_shows_what_the_files_say(name):
    assert block(tables.RESULTS / "README.md", name) == tables.made(name)


@pytest.mark.parametrize("page", [ROOT / "README.md", tables.CARD])
def test_readme_and_card_show_the_headline(page):
    assert block(page, "headline") == tables.headline()


@pytest.mark.parametrize("name", COMMITTED)
def test_results_have_the_promised_form(name):
    result = tables.load(name)
    assert {"command", "commit", "seed", "threads", "processes", "device", "dtype", "versions",
            "adapter", "model", "seconds", "cells"} <= {*result, *result["settings"]}
    for cell in result["cells"]:
        assert {"task", "kind", "method", "keep", "N", "K", "n", "units", "cache_bytes",
                "seconds"} <= set(cell)
        for metric, mean in cell["mean"].items():
            assert (cell["ci95"][metric] is None) == (cell["units"] < 2)
            if cell["ci95"][metric]:
                low, high = cell["ci95"][metric]
                assert low - 1e-4 <= mean <= high + 1e-4


@pytest.mark.parametrize("path", sorted(tables.RESULTS.rglob("*.json")), ids=lambda path: path.name)
def test_every_number_comes_from_a_commit(path):
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["commit"] != "unknown" and "dirty" not in text


@pytest.mark.parametrize("name, metric", [("squad", "f1"), ("niah", "match")])
def test_the_ceiling_of_a_task_is_above_its_floor(name, metric):
    """With the intervals apart: else the task says nothing about this model."""
    cells = tables.Cells(tables.load(f"test/{name}"), name)
    full, none = cells("all", "full", 1), cells("all", "none", 0)
    assert full["ci95"][metric][0] > none["ci95"][metric][1]


@pytest.mark.parametrize("name", [name for name in COMMITTED if name in tables.FIGURES])
def test_figures_are_drawn_from_the_committed_results(name, tmp_path):
    figure, = plots.draw(tables.load(name), tmp_path / f"{name.split('/')[-1]}.json")
    assert figure.name == tables.FIGURES[name][0]
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert (tables.RESULTS / name).with_name(figure.name).exists()


# the tables, by hand ----------------------------------------------------------------------

def cell(kind, method, keep, kl) -> dict:
    return {"task": "fidelity", "kind": kind, "method": method, "keep": keep, "N": 400.0,
            "K": 400 * keep, "n": 27, "contexts": 9, "units": 9, "cache_bytes": 1e6 * (keep + 0.1),
            "mean": {"kl": kl, "js": 0.1, "agree": 0.5},
            "ci95": {"kl": [kl * 0.9, kl * 1.1], "js": [0, 1], "agree": [0, 1]}}


METHODS = {"random": 1.0, "h2o": 0.9, "kvzip": 0.2, "kvzip:recent": 0.4, "kvdistill": 0.3}


def toy(methods=METHODS) -> dict:
    """A result of fidelity; methods: their KL as a multiple of HEADLINE's."""
    cells = []
    for kind in ("recite", "squad", "all"):
        cells += [cell(kind, "full", 1.0, 0.0), cell(kind, "none", 0.0, 2.0)]
        for method, times in methods.items():
            cells += [cell(kind, method, keep, times * kl) for keep, kl in HEADLINE.items()]
    names = ",".join(["full", "none", *methods])
    return {"cells": cells, "model": "toy", "threads": 1, "processes": 2, "seconds": 120,
            "commit": "abc1234", "against": None, "settings": {"dtype": "float32"},
            "command": f"python eval.py --tasks fidelity --n 100 --methods {names} --keep 0.25,0.1 "
                       "--adapter adapters/quick --out results/fidelity.json; python other.py"}


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    return {line[0]: line[1:] for line in lines}


def test_the_headline_by_hand():
    text = tables.headline_table(toy())
    rows = rows_of(text)
    assert list(rows)[2:] == ["full", "none", "random", "h2o", "kvzip", "kvzip:recent", "kvdistill"]
    assert rows["KL, nats per token"][1] == "keep 0.1, 5.5× fewer bytes"
    assert rows["random"] == ["0.50 (0.45–0.55)", "1.00 (0.90–1.10)", "1.50 (1.35–1.65)",
                              "0.50", "1.00", "1.50"]
    assert rows["kvzip"][0] == "**0.10** (0.090–0.11)" and rows["kvzip"][4] == "**0.20**"
    assert "**" not in "".join(rows["full"] + rows["none"] + rows["kvdistill"])
    assert "27 answers about 9 test documents" in text


def test_a_method_that_lacks_a_keep_has_no_number_there():
    result = toy()
    result["cells"] = [c for c in result["cells"] if (c["method"], c["keep"]) != ("random", 0.05)]
    assert rows_of(tables.headline_table(result))["random"][2] == "–"
    assert tables.fidelity_table(result).count("| random |") == 2


def test_the_floor_and_the_ceiling_must_be_there():
    result = toy()
    result["cells"] = [c for c in result["cells"] if c["method"] != "none"]
    with pytest.raises(BadInput, match="full and none"):
        tables.fidelity_table(result)


def test_a_command_is_shown_as_it_was_given():
    """Broken before flags only; two runs are two commands."""
    command = toy()["command"]
    lines = tables.command_block(command).splitlines()
    assert lines[0] == "```bash" and lines[-2:] == ["python other.py", "```"]
    assert "\n".join(lines[1:-1]).replace(" \\\n   ", "").replace("\n", "; ") == command
    assert all(line.startswith("    --") for line in lines[2:-2])


def cost_cell(method, keep, prefill, compress, question):
    return {"task": "cost", "kind": "4096", "method": method, "keep": keep, "cache_bytes": 100,
            "K": 4096 * keep, "seconds": {"prefill": prefill, "compress": compress},
            "mean": {"tokens_per_s": 5.0, "tokens_per_s_8": 9.0, "question_s": question}}


def test_break_even_by_hand():
    """Reading costs 10 s, reading and compressing 16. A question costs 2.0 s with the full cache,
    0.5 with the compressed one: four questions pay."""
    cells = [cost_cell("full", 1.0, 10, 0, 2.0), cost_cell("kvdistill", 0.1, 4, 12, 0.5),
             cost_cell("random", 0.1, 10, 1, 2.0), cost_cell("h2o", 0.1, 10, 13, 1.0)]
    rows = {row["method"]: row for row in tables.cost_rows({"cells": cells})}
    assert rows["kvdistill"]["ratio"] == 1.6 and rows["kvdistill"]["break_even"] == 4.0
    assert rows["random"]["break_even"] is None and rows["full"]["ratio"] == 1.0
    assert rows["h2o"]["break_even"] == 3.0, "its second reading is left out"
    with pytest.raises(BadInput, match="against the method full"):
        tables.cost_rows({"cells": cells[1:]})


# pages ------------------------------------------------------------------------------------

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A repository with pages and no results."""
    (tmp_path / "results" / "test").mkdir(parents=True)
    blocks = [f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in tables.TABLES]
    (tmp_path / "results" / "README.md").write_text("".join(blocks))
    for name in ("README.md", "card.md"):
        (tmp_path / name).write_text("text\n<!-- table: headline -->\n<!-- end -->\nmore\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "CARD", tmp_path / "card.md")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return tmp_path


def test_what_is_not_measured_is_said_and_what_is_replaces_it(elsewhere):
    page = elsewhere / "results" / "README.md"
    tables.main()
    assert [block(page, name) for name in tables.TABLES] == [tables.MISSING] * 7
    (elsewhere / "results" / "test" / "fidelity.json").write_text(json.dumps(toy()))
    (elsewhere / "results" / "test" / "fidelity-quality.png").write_bytes(b"")
    for _ in range(2):  # the second time there are tables to replace
        tables.main()
        shown = block(page, "test/fidelity")
        assert "(test/fidelity-quality.png)\n\n| keep 0.25" in shown
        assert block(page, "test/squad") == tables.MISSING
        for name in ("README.md", "card.md"):
            text = (elsewhere / name).read_text()
            assert text.startswith("text\n") and text.endswith("<!-- end -->\nmore\n")
            assert text.count("| kvzip:recent |") == 1


@pytest.mark.parametrize("name, value", [("cells", 5), ("cells", [None]), ("settings", [])])
def test_a_broken_result_is_one_line(tmp_path, monkeypatch, name, value):
    good = json.loads((tables.RESULTS / "test" / "fidelity.json").read_text())
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "fidelity.json").write_text(json.dumps(good | {name: value}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    with pytest.raises(BadInput, match="fidelity.json: .*; make it again with eval.py"):
        tables.made("test/fidelity")


def test_a_page_without_its_block_is_one_line(elsewhere):
    (elsewhere / "README.md").write_text("no block")
    with pytest.raises(BadInput, match="no block .*headline"):
        tables.main()
    assert (elsewhere / "README.md").read_text() == "no block"


# the figures ------------------------------------------------------------------------------

def test_a_figure_shows_the_first_eight_of_its_methods(tmp_path, monkeypatch):
    assert plots.shown(["none", "random", "kvzip:recent", "full"]) == ["kvzip:recent", "random"]
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, path: figures.append(fig))
    plots.draw(toy({method: 0.1 * (i + 1) for i, method in enumerate(plots.COLOURS)}),
               tmp_path / "x.json")
    assert [len(ax.containers) for ax in figures[0].axes] == [8, 8]
    labels = [tick.get_text() for tick in figures[0].axes[0].get_xticklabels()]
    assert "0.1\n(5.5×)" in labels
    plots.plt.close("all")


def test_heads_share_one_budget_unequally(tmp_path, capsys):
    """Shares are counted in equal shares, so their mean over heads is 1 for every document."""
    model = tiny_llama()
    tokens = [i % 97 for i in range(60)]
    compressor = tiny_compressor(model)
    cases = [Case(tokens[i:i + 44], 4, []) for i in range(3)]
    shares = plots.budget_shares(compressor, model, cases, 0.25)
    assert shares.shape == (3, 6, 2) and shares.mean((1, 2)) == pytest.approx([1, 1, 1])
    assert shares.min() == pytest.approx(1 / 10) and shares.std() > 0.1
    path = plots.head_map(compressor, model, cases, tmp_path / "heads.png", (0.5, 0.25))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("between 3 documents") == 2
    with pytest.raises(BadInput, match="all heads keep the same"):
        plots.head_map(tiny_compressor(model, selection="token"), model, cases, tmp_path / "no.png")
