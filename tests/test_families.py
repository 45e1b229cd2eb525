"""Llama, Mistral and Qwen: tiny random models that transformers makes and saves.

Our logits are its logits, and the whole method runs on each family.
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import decay
from conftest import tiny_compressor
from model import load_llama
from run.errors import BadInput
from run.loading import load_checked
from test_compress import continuation, masked_cache, read, select_at
from train import DistillKL

transformers = pytest.importorskip("transformers")

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "Llama, biases": {"attention_bias": True, "rope_theta": 500.0},
    "Llama, 3.1": {"rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "Mistral, wide heads": {"head_dim": 20, "sliding_window": None, "num_key_value_heads": 4},
    "Qwen2, one head": {"num_key_value_heads": 1},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """transformers' model and its folder of several weight files.

    No parameter has its default, so that each one must be read and used.
    """
    name = request.param.split(",")[0]
    config = getattr(transformers, f"{name}Config")(**CONFIG | FAMILIES[request.param])
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        std = 1.0 if "embed" in name else 0.3 / p.dim()
        torch.nn.init.normal_(p, mean=float("norm" in name), std=std)
    folder = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return theirs, folder


@torch.no_grad()
def test_logits_are_those_of_transformers(family):
    theirs, folder = family
    ours = load_checked(folder)
    tokens = torch.randint(0, 97, (2, 300), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    assert torch.allclose(ours.logits(ours(tokens)), expected, atol=1e-4)

    cache = ours.prefill(tokens[:, :290]).reserve(10)
    decoded = torch.cat([ours(tokens[:, i:i + 1], cache) for i in range(290, 300)], 1)
    assert torch.allclose(ours.logits(decoded), expected[:, 290:], atol=1e-4)


def test_the_method_runs(family):
    """The compressed cache answers as the masked one does, which has gradients."""
    model = load_llama(family[1])
    compressor = tiny_compressor(model)
    ctx = read(model, compressor)
    selection, k = select_at(compressor, ctx)
    beta = decay(compressor.scorer(ctx.h, ctx.lengths), selection, "threshold", 0.5)
    tokens = continuation(model)
    student = model(tokens, masked_cache(model, compressor, ctx, selection, k, beta))
    with torch.no_grad():
        teacher = model(tokens, compressor.full_cache(model, ctx))
        compressed = model(tokens, compressor.compress(model, ctx, keep=0.1))
    assert torch.allclose(student, compressed, atol=1e-4)
    assert (student - teacher).abs().max() > 0.05

    rows = (student.flatten(0, 1), teacher.flatten(0, 1))
    DistillKL.apply(*rows, model.head_weight, 0.6, 5)[0].mean().backward()
    for name, p in compressor.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------- what a model's files say twice

@pytest.fixture
def twice(tmp_path):
    """A folder of a tied Llama of transformers, and how to change its config.json."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG | {"tie_word_embeddings": True})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())

    def change(**changes):
        path.write_text(json.dumps({k: v for k, v in raw.items() if "rope" not in k} | changes))

    return tmp_path, change


@pytest.mark.parametrize("ropes, theta, warns", [
    ({"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 100.0}, 500, True),
    ({"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 500.0}, 500, False),
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 100.0}, 100, False),
    ({"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {**LLAMA3}, "rope_theta": 100.0}, 100, True),
    ({"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {}}, 500, False),
    ({"rope_theta": 100.0}, 100, False),
    ({}, 10000, False),
])
@torch.no_grad()
def test_rope_theta_is_the_one_that_transformers_reads(twice, capsys, ropes, theta, warns):
    folder, change = twice
    change(**ropes)
    ours = load_checked(folder)
    assert ours.cfg.rope_theta == theta
    assert bool(ours.cfg.rope_scaling) == bool(ropes.get("rope_scaling"))

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warns and all(f"{float(theta)} is used" in line for line in lines)
    tokens = torch.arange(60)[None]
    expected = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert torch.allclose(ours.logits(ours(tokens)), expected, atol=1e-4)


def test_partial_rotary_positions_are_refused_where_transformers_5_writes_them(twice):
    folder, change = twice
    change(rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5})
    with pytest.raises(BadInput, match="partial_rotary_factor is 0.5"):
        load_checked(folder)


@pytest.mark.parametrize("ropes", [
    {"rope_scaling": {**LLAMA3}, "rope_parameters": [1]},
    {"rope_scaling": {**LLAMA3, "rope_theta": 500.0}, "rope_theta": "x"},
], ids=str)
def test_strange_rotary_settings_that_nobody_uses_are_one_line(twice, ropes):
    folder, change = twice
    change(**ropes)
    with pytest.raises(BadInput, match="config.json"):
        load_checked(folder)


@pytest.mark.parametrize("other", [False, True])
def test_a_tied_head_that_differs_is_said(twice, capsys, other):
    folder, _ = twice
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][5] += other
    save_file(tensors, path)
    assert load_checked(folder).cfg.tied
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == other and all("lm_head.weight is not the" in line for line in lines)
