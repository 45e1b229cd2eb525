"""Committed numbers: invariant 10 holds in them, and README shows what the files say."""
import json
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import tables  # noqa: E402


@pytest.fixture(scope="module")
def quick():
    return json.loads((ROOT / "results" / "quick.json").read_text(encoding="utf-8"))


def test_10_selection_learns(quick):
    """The trained routing with tokens chosen at random is clearly worse than with the trained scores."""
    kl = {(r["method"], r["keep"], r["kind"]): r["kl"] for r in quick["table"]}
    for keep in (0.25, 0.1):
        assert kl["trained", keep, "all"] < 0.9 * kl["trained-random-selection", keep, "all"]
        assert kl["trained", keep, "recite"] < 0.95 * kl["trained-random-selection", keep, "recite"]


def test_the_quick_result_has_the_form_that_is_promised(quick):
    assert {"table", "seconds", "threads", "command", "commit", "seed"} <= set(quick)
    for row in quick["table"]:
        assert {"method", "keep", "kind", "kl", "agree", "n"} <= set(row) and row["n"] > 0 and row["kl"] >= 0
        assert row["ci95"][0] <= row["kl"] <= row["ci95"][1]
    assert {r["keep"] for r in quick["table"]} == {0.5, 0.25, 0.1, 0.05}


def test_readme_shows_the_committed_table(quick):
    assert tables.quick_tables(quick) in (ROOT / "README.md").read_text(encoding="utf-8")
