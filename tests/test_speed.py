"""results/speed.py measures what it says that it measures."""
import json
import sys

import pytest

from conftest import save_llama, tiny_llama
from results import speed


def test_the_promise_of_a_compressed_cache_by_hand():
    """Weights of 100 bytes, a cache of 300 or 60: a step reads 400 bytes, or 160."""
    assert speed.promise(100, 300, 60) == 2.5
    assert speed.promise(100, 300, 300) == 1.0


def test_ways_are_measured_in_turns_and_the_warm_up_is_left_out():
    calls = []
    seconds = {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([100.0, 5.0, 4.0, 6.0])}

    def way(name):
        calls.append(name)
        return next(seconds[name])

    assert speed.in_turns(3, a=(way, "a"), b=(way, "b")) == {"a": 2.0, "b": 5.0}
    assert calls == ["a", "b"] * 4


def test_one_command_writes_every_ratio(tmp_path, monkeypatch):
    folder = save_llama(tiny_llama(), tmp_path / "tiny")
    out = tmp_path / "speed.json"
    flags = ["--quick", "--weights", str(folder), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags])
    speed.main()
    result = json.loads(out.read_text())
    assert {"command", "commit", "threads", "versions", "settings", "seconds"} <= set(result)
    for n in (64, 128):
        cell, ratios = result["cells"][f"decode {n}"], result["ratios"]
        ratio = ratios[f"decode {n}"]["ratio"]
        assert ratio == pytest.approx(cell["theirs"] / cell["ours"], abs=1e-4)
        floor = ratios[f"decode {n}, of the floor"]["ratio"]
        assert floor == pytest.approx(cell["floor"] / cell["ours"], abs=1e-4)
        assert {f"prefill {n} fp32", f"prefill {n} bf16", f"compress {n}"} <= set(ratios)
    batch = result["cells"]["compressed, of the promise"]
    assert 1 < batch["promised"] < batch["full_bytes"] / batch["compressed_bytes"]
