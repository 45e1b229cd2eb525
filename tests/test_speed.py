"""results/speed.py measures what it says it measures."""
import json
import sys

import pytest

from conftest import ROOT, save_llama, tiny_llama

sys.path.insert(0, str(ROOT / "results"))
import speed  # noqa: E402


def test_the_promise_of_a_short_cache_by_hand():
    """Weights of 100 bytes, a cache of 300 whole and 60 short: 400 bytes a step against 160."""
    assert speed.promise(100, 300, 60) == 2.5
    assert speed.promise(100, 300, 300) == 1.0


def test_ways_are_measured_in_turns_and_the_warm_up_is_left_out():
    calls, seconds = [], {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([100.0, 5.0, 4.0, 6.0])}

    def way(name):
        calls.append(name)
        return next(seconds[name])
    assert speed.in_turns(3, a=lambda: way("a"), b=lambda: way("b")) == {"a": 2.0, "b": 5.0}
    assert calls == ["a", "b"] * 4


def test_one_command_writes_every_ratio(tmp_path, monkeypatch):
    folder = save_llama(tiny_llama(), tmp_path / "tiny")
    out = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick", "--weights", str(folder), "--out", str(out)])
    speed.main()
    result = json.loads(out.read_text())
    assert {"command", "commit", "threads", "versions", "settings", "seconds"} <= set(result)
    assert set(result["ratios"]) == {
        *(f"prefill {n} {dtype}" for n in (64, 128) for dtype in ("fp32", "bf16")), "ragged, of the promise",
        *(f"decode {n}{floor}" for n in (64, 128) for floor in ("", ", of the floor")),
        *(f"compress {n}" for n in (64, 128, 256))}
    for n in (64, 128):
        cell = result["cells"][f"decode {n}"]
        assert result["ratios"][f"decode {n}"]["ratio"] == pytest.approx(cell["theirs"] / cell["ours"], abs=1e-4)
        assert result["ratios"][f"decode {n}, of the floor"]["ratio"] == pytest.approx(cell["floor"] / cell["ours"],
                                                                                       abs=1e-4)
    ragged = result["cells"]["ragged, of the promise"]
    assert 1 < ragged["promised"] < ragged["whole_bytes"] / ragged["ragged_bytes"]
