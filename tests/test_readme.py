"""The READMEs and exercises.md name files, functions, flags and commands that exist, and their Python examples run as written."""
import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache as once
from importlib import import_module

import pytest

from conftest import ROOT
from data import prepare
from eval import DEFAULT_METHODS, METHODS
from run import compress_flags, eval_flags, train_flags
from train import PRESETS, TrainConfig

sys.path.insert(0, str(ROOT / "results"))
import plots  # noqa: E402

PAGES = ("README.md", "results/README.md", "run/README.md", "adapters/smollm2-135m-instruct/README.md")
ALL = (*PAGES, "exercises.md")
PARSERS = {"train.py": lambda: train_flags.parse_args(TrainConfig, PRESETS), "compress.py": compress_flags.parse_args,
           "eval.py": lambda: eval_flags.parse_args(METHODS, DEFAULT_METHODS), "data/prepare.py": prepare.main,
           "results/plots.py": plots.main}
MADE = {"adapter/", "adapters/", "out/"}  # folders that running makes
THEIRS = {"--max-restarts", "--requeue"}  # flags of torchrun and sbatch


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.S | re.M)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)


@once
def flags_of(program: str) -> set[str]:
    """The flags that a program's own parser lists in its --help."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [program, "--help"])
        PARSERS[program]()
    lines = re.findall(r"^  (?:-\w, )?(--[a-z-]+)(?:, (--[a-z-]+))?", said.getvalue(), re.M)
    return {flag for line in lines for flag in line if flag}


@pytest.mark.weights
@pytest.mark.parametrize("page", PAGES)
def test_the_python_examples_run(page, weights, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for code in fences(page, "python"):
        exec(compile(code, page, "exec"), {})
        assert len(capsys.readouterr().out.strip()) > 5
    assert page != "README.md" or fences(page, "python"), "README shows how it is used from Python"


def test_readme_is_short():
    assert len(text_of("README.md")) <= 12_000


@pytest.mark.parametrize("page", ALL)
def test_lines_are_short_outside_tables_and_code(page):
    assert not [line for line in prose(page).splitlines() if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("page", ALL)
def test_every_file_named_exists(page):
    named = set(re.findall(r"`([\w./-]+(?:\.py|\.md|\.txt|/))`", text_of(page))) - MADE
    named |= {path for path in re.findall(r"\]\(([^)#]+)\)", text_of(page)) if not path.startswith("http")}
    for path in named:
        assert (ROOT / path).exists() or (ROOT / page).parent.joinpath(path).exists(), path
    assert named


@pytest.mark.parametrize("page", ALL)
def test_every_function_and_test_named_exists(page):
    names = re.findall(r"`((?:compress|model|train|eval|data\.\w+|run\.\w+)\.(?!py`)[A-Za-z_.]+)`", text_of(page))
    for name in names:
        parts = name.split(".")
        module = import_module(".".join(parts[:2] if parts[0] in ("data", "run") else parts[:1]))
        for part in parts[2 if parts[0] in ("data", "run") else 1:]:
            assert hasattr(module, part), name
            module = getattr(module, part)
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text_of(page)):
        assert f"def {name}(" in tests, name
    assert names or page != "README.md"


@pytest.mark.parametrize("page", ALL)
def test_every_flag_named_in_the_text_exists(page):
    known = set().union(*map(flags_of, PARSERS)) | THEIRS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"<!--.*?-->", "", prose(page))))
    assert named <= known, named - known


def commands(page: str) -> list[str]:
    lines = "\n".join(fences(page, "bash") + re.findall(r"`(python [^`]*)`", prose(page))).replace("\\\n", " ")
    return re.findall(r"(?<![\w/.-])((?:data/|results/)?\w+\.py(?: [^|'#&\n]*)?)(?=$|[|'#&])", lines, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_its_program_takes(page, monkeypatch):
    """By the program's own parser, flags and values; of those that then go on to work, the flags alone."""
    found = commands(page)
    assert found
    monkeypatch.setattr(train_flags, "find_adapter", lambda *_: ROOT / "adapters" / "quick")  # that of a run to come
    for command in found:
        program, *arguments = shlex.split(command.replace("…", ""))
        assert (ROOT / program).exists(), command
        if program not in PARSERS:
            continue
        unknown = {x for x in arguments if x.startswith("--")} - flags_of(program)
        assert not unknown, command
        if program in ("train.py", "compress.py", "eval.py"):
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            try:
                PARSERS[program]()
            except SystemExit as e:
                assert e.code == 0, f"{command}: refused"  # --help ends as well


def test_a_wrong_name_would_be_noticed():
    """What the tests above look for is looked for in the right place."""
    assert {"--reconstruct", "--no-prompts", "--plan", "--weights"} <= flags_of("train.py")
    assert "--reconstruct" not in flags_of("eval.py") and "--target" not in flags_of("train.py")
    assert "--heads" in flags_of("results/plots.py") and "--source" in flags_of("data/prepare.py")
    assert "train.py --preset paper --plan --gpus 8" in " ".join(map(str.strip, commands("run/README.md")))
