"""The rooms of the code: imports run one way, and a training step stands in four files."""
import ast
from graphlib import TopologicalSorter

from conftest import ROOT

MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for folder in (ROOT, ROOT / "data", ROOT / "run")
    for path in folder.glob("*.py")
}


def imports(path) -> set[str]:
    """Our own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def test_imports_form_no_circle_and_have_an_order():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises for a circle
    positions = [order.index(name) for name in ("model", "compress", "eval", "train")]
    assert positions == sorted(positions)


def test_model_can_be_copied_into_another_project():
    assert GRAPH["model"] == set()


def test_data_needs_only_data_and_errors():
    for name, used in GRAPH.items():
        if name.startswith("data."):
            assert all(x.startswith("data.") or x == "run.errors" for x in used), name


def test_what_runs_programs_imports_none():
    for name, used in GRAPH.items():
        if name.startswith("run."):
            assert not used & {"compress", "eval", "train"}, name


def test_one_training_step_stands_in_four_files():
    import train
    step = (
        train.Distiller,
        train.DistillKL,
        train.Compressor,
        train.decay,
        train.max_attention,
        train.Llama,
        train.Batch,
        train.collate,
    )
    assert {x.__module__ for x in step} == {"train", "compress", "model", "data.batches"}
