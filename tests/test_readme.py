"""The pages name files, functions and flags that exist, and their Python examples run."""
import re
import subprocess
import sys
from functools import cache
from importlib import import_module

import pytest

from conftest import ROOT

PAGES = (
    "README.md",
    "FINDINGS.md",
    "exercises.md",
    "results/README.md",
    "run/README.md",
    "adapters/smollm2-135m-instruct/README.md",
)
PROGRAMS = (
    "compress.py", "train.py", "eval.py", "data/prepare.py", "results/plots.py",
    "results/speed.py",
)
OF_TORCHRUN = {
    "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts",
}
OF_SLURM = {
    "--nodes", "--gpus-per-node", "--exclusive", "--mem", "--time", "--requeue", "--wrap",
    "--ntasks-per-node", "--cpus-per-task",
}
OF_OTHERS = OF_TORCHRUN | OF_SLURM | {"--local-dir", "--exclude"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def flags_of(program: str) -> set[str]:
    """The flags that a program lists in its --help."""
    command = [sys.executable, ROOT / program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))


def commands_of(page: str) -> list[tuple[str, list[str]]]:
    """The commands in a page's blocks: (program, its flags)."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(page), re.S | re.M)
    text = "\n".join(blocks).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        line = line.split(" #")[0]
        for program in PROGRAMS:
            before, name, rest = line.partition(program)
            if name and not before.endswith(("/", "pip ")):
                found.append((program, re.findall(r"(?<!\S)--[a-z][a-z0-9_-]*", rest)))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^)#]+)\)", text_of(page))
    local = [path for path in links if not path.startswith("http")]
    for path in local:
        assert (ROOT / page).parent.joinpath(path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_function_that_a_page_names_exists(page):
    pattern = r"`((?:compress|model|train|eval|data\.\w+|run\.\w+)\.(?!py\b)[A-Za-z_.]+)`"
    for name in re.findall(pattern, text_of(page)):
        parts = name.split(".")
        depth = 2 if parts[0] in ("data", "run") else 1
        found = import_module(".".join(parts[:depth]))
        for part in parts[depth:]:
            assert hasattr(found, part), name
            found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_flags_that_its_program_knows(page):
    for program, flags in commands_of(page):
        unknown = set(flags) - flags_of(program) - OF_OTHERS
        assert not unknown, f"{program}: {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_text_is_one_of_a_program(page):
    known = set().union(*map(flags_of, PROGRAMS)) | OF_OTHERS
    prose = re.sub(r"^```.*?^```|<!--.*?-->", "", text_of(page), flags=re.S | re.M)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", prose))
    assert named <= known, named - known


def test_readme_shows_commands_of_every_program():
    programs = {program for program, _ in commands_of("README.md")}
    assert {"compress.py", "train.py", "eval.py"} <= programs


@pytest.mark.weights
def test_the_python_example_prints_what_the_page_says(weights, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    example, = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), re.S | re.M)
    exec(compile(example, "README.md", "exec"), {})
    expected = example.strip().splitlines()[-1].removeprefix("# ")
    assert capsys.readouterr().out.strip() == expected
