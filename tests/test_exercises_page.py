"""exercises.md is right: its tests notice an emptied function, and need no function of
a later step, and the code on the page is ours."""
import doctest
import inspect
import re
from importlib import import_module

import pytest

import test_exercises
from conftest import ROOT

PAGE = (ROOT / "exercises.md").read_text(encoding="utf-8")
NAMES = re.findall(r"\*\*Empty\*\* `([\w.]+)`", PAGE)
TESTS = re.findall(r"tests/test_exercises\.py::(\w+)", PAGE)


def find(name: str):
    """The function of a name such as compress.Scorer.forward."""
    module, *path = name.split(".")
    found = import_module(module)
    for part in path:
        found = getattr(found, part)
    return found


def run(test: str) -> None:
    """Call a test of the page, with all its parameters."""
    function = getattr(test_exercises, test)
    marks = getattr(function, "pytestmark", [])
    cases = marks[0].args[1] if marks else [()]
    for case in cases:
        function(*case)


def emptied(*_, **__):
    raise NotImplementedError


@pytest.mark.parametrize("step", range(6))
def test_a_step_needs_no_later_step(step, monkeypatch):
    for name in NAMES[step + 1:]:
        monkeypatch.setattr(find(name), "__code__", emptied.__code__)
    run(TESTS[step])


@pytest.mark.parametrize("step", range(6))
def test_an_emptied_function_is_noticed(step, monkeypatch):
    monkeypatch.setattr(find(NAMES[step]), "__code__", emptied.__code__)
    with pytest.raises(NotImplementedError):
        run(TESTS[step])


@pytest.mark.parametrize("step", range(6))
def test_the_lines_of_a_hint_are_in_our_code(step):
    hint = re.findall(r"<details>.*?```python\n(.*?)```", PAGE, re.S)[step]
    code = inspect.getsource(find(NAMES[step]))
    for line in hint.splitlines():
        assert line in code


def test_the_lines_of_step_4_run():
    result = doctest.testfile(str(ROOT / "exercises.md"), module_relative=False)
    assert result.attempted and not result.failed
