"""README's Python example runs as written, and the files, flags and functions that it names exist."""
import re

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.weights
def test_the_python_example_runs(weights, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 5


def test_every_file_and_function_named_in_tables_exists():
    files = [path for cell in re.findall(r"^\| (`[^|]+) \|", README, re.M) for path in re.findall(r"`([^`]+)`", cell)]
    assert len(files) > 10
    for path in files:
        assert (ROOT / path).exists(), path
    dotted = re.findall(r"`((?:compress|model|train|eval)\.[A-Z_a-z.]+)`", README)
    for module, *names in (name.split(".") for name in dotted):
        if names == ["py"]:
            continue
        thing = __import__(module)
        for name in names:
            thing = getattr(thing, name)


THEIRS = {"exclude", "exclusive", "mem", "time", "cpus-per-task", "local-dir", "max-restarts", "nnodes", "nproc",
          "rdzv", "nodes", "gpus-per-node", "requeue", "ntasks-per-node", "wrap"}  # flags of hf, torchrun and sbatch


def test_every_flag_named_in_readme_exists():
    programs = ("train.py", "compress.py", "eval.py", "data/prepare.py", "data/weights.py", "data/options.py",
                "data/eval_options.py")
    sources = "".join((ROOT / f).read_text(encoding="utf-8") for f in programs)
    for flag in set(re.findall(r"(?<=[ `(])--([a-z][a-z-]+)", README)) - THEIRS:
        names = {flag.replace("-", "_"), flag.removeprefix("no-").replace("-", "_")}  # --no-x turns off --x
        assert f'"--{flag}"' in sources or any(f"{name}:" in sources for name in names), flag
