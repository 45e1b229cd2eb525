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


def run(monkeypatch, out, *flags) -> dict:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick", "--out", str(out), *flags])
    speed.main()
    return json.loads(out.read_text())


def test_one_command_writes_every_ratio(tmp_path, monkeypatch):
    folder = save_llama(tiny_llama(), tmp_path / "tiny")
    result = run(monkeypatch, tmp_path / "speed.json", "--weights", str(folder))
    assert {"command", "commit", "threads", "versions", "settings", "seconds"} <= set(result)
    ratios = {name: row["ratio"] for name, row in result["ratios"].items()}
    for n in (64, 128):
        cell = result["cells"][f"decode {n} x 1"]
        expected = cell["theirs"] / cell["full"]
        assert ratios[f"decode {n} x 1"] == pytest.approx(expected, abs=1e-4)
        expected = cell["floor"] / cell["full"]
        assert ratios[f"decode {n} x 1, of the floor"] == pytest.approx(expected, abs=1e-4)
        assert {f"prefill {n} fp32", f"prefill {n} bf16", f"compress {n}"} <= set(ratios)
    batch = result["cells"]["decode 256 x 4"]
    assert 1 < batch["promised"] < batch["full_bytes"] / batch["compressed_bytes"]
    assert "training, of the bf16 rate" not in ratios


def test_a_shape_needs_no_weights_and_is_trained_too(tmp_path, monkeypatch):
    result = run(monkeypatch, tmp_path / "tiny.json", "--shape", "tiny")
    ratios = {name: row["ratio"] for name, row in result["ratios"].items()}
    assert {"prefill 64 bf16", "decode 64 x 1", "compress 64"} <= set(ratios)
    cell = result["cells"]["training, 4 contexts"]
    assert ratios["training, of the bf16 rate"] == pytest.approx(
        cell["flops"] / cell["step"] / cell["bf16_rate"], abs=1e-4)


def test_shapes_have_the_parameters_that_their_names_say():
    """Of the published models: 134,515,008, 1,235,814,400 and 8,030,261,248."""
    import torch
    from model import Llama
    from run.memory_plan import count
    sizes = []
    for name in ("135m", "1b", "8b"):
        with torch.device("meta"):
            sizes.append(count(Llama(speed.SHAPES[name])))
    assert sizes == [134_515_008, 1_235_814_400, 8_030_261_248]
