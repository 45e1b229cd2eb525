"""The rooms: imports run one way, and every file is short enough to be read."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from conftest import ROOT

FILES = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p
         for p in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("run/*.py"))}


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, wherever in it, but for what it starts as a program."""
    found, body = set(), ast.parse(path.read_text(encoding="utf-8")).body
    started = [x for x in body if isinstance(x, ast.If) and ast.unparse(x.test) == "__name__ == '__main__'"]
    for node in (node for part in body if part not in started for node in ast.walk(part)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found & FILES.keys()


GRAPH = {name: imports(path) for name, path in FILES.items()}


def test_imports_run_one_way_and_in_no_circle():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises for a circle
    assert order.index("model") < order.index("compress") < order.index("eval") < order.index("train")
    for name, used in GRAPH.items():
        if name.startswith("data."):
            assert all(x.startswith("data.") or x == "run.errors" for x in used), name
        if name.startswith("run.") and name != "run.ask":  # a program, which nothing imports
            assert not used & {"train", "eval"}, name
        assert "run.ask" not in used, name
    assert GRAPH["model"] == {"run.errors"}


def test_one_step_is_mathematics_of_four_files():
    """From train.py to the scorer's gradient: what is called is in these."""
    import train
    step = {train.Distiller, train.DistillKL, train.Compressor, train.decay, train.attention_received, train.collate,
            train.Llama, train.Batch}
    assert {x.__module__ for x in step} == {"train", "compress", "model", "data.samples"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_read_in_one_sitting(name):
    lines = FILES[name].read_text(encoding="utf-8").split("\n")
    assert len(lines) <= (601 if name == "model" else 451)  # model.py holds a whole Llama, its cache and its loading
    assert max(map(len, lines)) <= 120
