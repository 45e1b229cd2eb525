"""Weights, answers and results that strangers made: what does not fit is refused by name before
memory is taken for it."""
import gzip
import json
import resource
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, save_llama, tiny_llama
from run.errors import BadInput, write_json
from run.models import load_checked
from run.records import append_records, continue_from, load_records


sys.path.insert(0, str(ROOT / "results"))
import plots  # noqa: E402
import tables  # noqa: E402


@pytest.fixture
def saved(tmp_path):
    return save_llama(tiny_llama(), tmp_path / "llama")


def change(saved, **values):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("key, value, why", [
    ("tie_word_embeddings", "false", "tie_word_embeddings is 'false'"), ("num_hidden_layers", 10 ** 9, "1 to 1000"),
    ("num_hidden_layers", True, "True, expected a whole"), ("hidden_size", -5, "-5, expected"),
    ("vocab_size", 10 ** 12, "1000000000000, expected"), ("vocab_size", 97.0, "97.0, expected a whole"),
    ("vocab_size", 1 << 24, "embed_tokens.weight is .97, 48., config.json says .16777216, 48."),
    ("num_attention_heads", 1 << 22, "48, 50331648"), ("num_key_value_heads", 3, "expected a multiple"),
    ("head_dim", 13, "even width"), ("rms_norm_eps", -1e-5, "expected a number above 0"), ("rope_theta", "x", "'x'"),
    ("rope_theta", 10 ** 400, "too large"), ("rope_scaling", "x", "where dict"), ("rope_scaling", [1], "where dict"),
    ("rope_scaling", dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor",
                                    "original_max_position_embeddings"), 1) | {"type": "llama3"}, "not below"),
    ("model_type", ["llama"], r"model_type is \['llama'\]"),
])
def test_a_configuration_that_cannot_be_is_refused(saved, key, value, why):
    change(saved, **{key: value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInput, match=why) as e:
        load_checked(saved)
    assert str(saved) in str(e.value) and len(str(e.value)) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "no memory was taken for it"


def test_surplus_tensors_are_refused_but_for_harmless_ones(saved):
    """A model of six layers is not one of five; old files hold rotary tables, and a tied head a second time."""
    file = saved / "model.safetensors"
    tensors, want = load_file(file), load_checked(saved).state_dict()
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
                         "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    got = load_checked(saved).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, file)
    with pytest.raises(BadInput, match="q_proj.bias is none of the tensors"):
        load_checked(saved)
    save_file(tensors, file)
    change(saved, num_hidden_layers=5)
    with pytest.raises(BadInput, match="layers.5.* is none of the tensors"):
        load_checked(saved)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.long])
def test_weights_that_are_no_finite_numbers_are_refused(saved, bad):
    tensors = load_file(saved / "model.safetensors")
    w = tensors["model.layers.3.mlp.up_proj.weight"]
    if isinstance(bad, float):
        w[5, 7] = bad
    save_file(tensors | {"model.layers.3.mlp.up_proj.weight": w if isinstance(bad, float) else w.to(bad)},
              saved / "model.safetensors")
    with pytest.raises(BadInput, match="model.safetensors: .*layers.3.mlp.up_proj.weight holds numbers that are not"):
        load_checked(saved)


def test_an_index_names_files_of_its_folder(saved):
    """Not of another one, though it be there; a link in the folder may lead elsewhere: whoever made it wanted that."""
    tensors = load_file(saved / "model.safetensors")
    elsewhere = saved.parent / "elsewhere.safetensors"
    (saved / "model.safetensors").rename(elsewhere)
    for name in ("../elsewhere.safetensors", str(elsewhere), "", "..", ".", "a/../b", 5, None, ["x"], "\0"):
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        with pytest.raises(BadInput, match="^[^\n\0]+; download it again$"):
            load_checked(saved)
    for index in ({}, {"weight_map": True}, {"weight_map": ["x"]}):
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(BadInput, match="index.json: .*; download it again"):
            load_checked(saved)
    (saved / "link.safetensors").symlink_to(elsewhere)
    (saved / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "link.safetensors")}))
    assert torch.equal(load_checked(saved).embed.weight, tensors["model.embed_tokens.weight"])


def changed(tree: dict, path: tuple, value):
    """A copy with the value at path; without it, for ..."""
    tree = json.loads(json.dumps(tree))
    at = tree
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return tree


RECORD = {"task": "squad", "case": 0, "unit": "a", "method": "full", "keep": 1.0, "N": 5, "K": 5, "bytes": 9,
          "seconds": {"prefill": 1.0, "compress": 0.0, "decode": 1.0},
          "answers": [{"kind": "squad", "weight": 1, "f1": 1.0, "em": 1.0, "contains": 1.0}]}


@pytest.mark.parametrize("path, value", [
    (("task",), "x"), (("task",), []), (("case",), [1]), (("case",), ...), (("unit",), {}), (("method",), None),
    (("keep",), "1"), (("N",), ...), (("K",), True), (("seconds",), 5), (("seconds", "decode"), None),
    (("answers",), {}), (("answers", 0), 5), (("answers", 0, "kind"), 7), (("answers", 0, "f1"), ...),
    (("answers", 0, "weight"), "1")], ids=str)
def test_records_of_another_form_are_refused(tmp_path, path, value):
    file = tmp_path / "r.jsonl.gz"
    append_records(file, [RECORD])
    assert load_records(file) == [RECORD]
    file.unlink()
    append_records(file, [RECORD, changed(RECORD, path, value)])
    with pytest.raises(BadInput, match="r.jsonl.gz: .*; no answers of this program: move it away"):
        load_records(file)


@pytest.mark.parametrize("raw", [b"5\n", b"[" * 10 ** 5 + b"\n", b'{"task": "\xff"}\n', b"9" * 5000 + b"\n", b"\n"])
def test_lines_that_are_no_records_are_refused(tmp_path, raw):
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(BadInput, match="r.jsonl.gz: .*; no answers of this program"):
        load_records(tmp_path / "r.jsonl.gz")


@pytest.mark.parametrize("path, value", [
    (("settings",), 5), (("settings", "tasks"), []), (("settings", "tasks", "niah"), 5), (("command",), 5),
    (("settings", "tasks", "niah", "contexts"), "9"), (("commit",), None), (("seconds",), "1"), (("against",), [1]),
    (("threads",), 1.5)], ids=str)
def test_results_of_another_form_are_refused(tmp_path, path, value):
    out, answers = tmp_path / "r.json", tmp_path / "r.jsonl.gz"
    mine = {"settings": {"tasks": {"squad": {"n": 5}}}, "commit": "b", "command": "python eval.py"}
    before = {"settings": {"tasks": {"squad": {"n": 5}, "niah": {"contexts": 3}}}, "commit": "a", "command": "c",
              "seconds": 2, "against": None, "threads": "1, 2", "cells": []}
    write_json(out, before)
    assert continue_from(out, answers, json.loads(json.dumps(mine))) == []
    write_json(out, changed(before, path, value))
    with pytest.raises(BadInput, match="r.json: .*; it is not a result of this program: give another --out"):
        continue_from(out, answers, mine)


@pytest.mark.parametrize("path, value", [
    (("cells",), 5), (("cells", 0), None), (("cells", 0, "mean"), ...), (("settings",), []), (("threads",), ...),
    (("seconds",), "1"), (("cells", 0, "keep"), "x")], ids=str)
def test_tables_and_figures_of_a_broken_result_are_one_line(tmp_path, monkeypatch, path, value):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plots, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots.py"])
    write_json(tmp_path / "results" / "fidelity.json",
               changed(json.loads((ROOT / "results" / "fidelity.json").read_text()), path, value))
    with pytest.raises(BadInput, match="fidelity.json: .*; make it again with eval.py"):
        tables.made("fidelity")
    if value in (5, None):  # what the figures show, too
        with pytest.raises(BadInput, match="fidelity.json: .*; make it again with eval.py"):
            plots.main()
