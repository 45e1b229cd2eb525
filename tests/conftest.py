"""What tests share: a tiny random Llama, a compressor for it, and the real SmolLM2.

Tests that need the real model are marked `weights`. All others are hermetic.
"""
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from compress import Compressor, CompressorConfig  # noqa: E402
from model import CONFIG_NAMES, RENAMED, Config, Llama, load_llama  # noqa: E402

TINY = {
    "vocab_size": 97,
    "n_layer": 6,
    "n_head": 4,
    "n_kv_head": 2,
    "head_dim": 12,
    "n_embd": 48,
    "n_ffn": 64,
    "max_positions": 512,
}


def tiny_llama(dtype=torch.float32, seed=0, **changes) -> Llama:
    """A random frozen model, with weights large enough that attention matters."""
    torch.manual_seed(seed)
    model = Llama(Config(**TINY | changes))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=1.0 if "embed" in name else 0.15)
    return model.to(dtype).requires_grad_(False).eval()


def hf_config(cfg: Config) -> dict:
    """The config.json of a Llama."""
    raw = {theirs: getattr(cfg, ours) for ours, theirs in CONFIG_NAMES.items()}
    scaling = cfg.rope_scaling and {"rope_type": "llama3", **cfg.rope_scaling}
    return raw | {
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
    }


def hf_name(name: str) -> str:
    """The inverse of hf_to_ours, for a model whose head is tied."""
    for theirs, ours in RENAMED.items():
        if ours:
            name = name.replace(ours, theirs)
    return f"model.{name}"


def save_llama(model: Llama, folder: Path) -> Path:
    """Write config.json and model.safetensors as Hugging Face would."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(name): x.contiguous() for name, x in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(model.cfg)))
    return folder


def tiny_compressor(model, seed=1, trained=True, **changes) -> Compressor:
    """A compressor for a tiny model. If `trained`, its LoRA does something: B ≠ 0."""
    torch.manual_seed(seed)
    settings = {"eta": 2, "rank": 4, "hidden": 32, "recent": 2} | changes
    compressor = Compressor(model.cfg, CompressorConfig(**settings))
    if trained:
        with torch.no_grad():
            compressor.b_q.normal_(std=0.2)
            compressor.b_o.normal_(std=0.2)
            compressor.scorer.w2.weight.mul_(5)
    return compressor.to(model.dtype)


@pytest.fixture(autouse=True)
def threads(request):
    """One thread for tiny models, where more would wait for each other."""
    is_real = request.node.get_closest_marker("weights") is not None
    torch.set_num_threads(os.cpu_count() if is_real else 1)


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def compressor(model):
    return tiny_compressor(model)


@pytest.fixture(scope="session")
def weights():
    """The folder of the real default model."""
    from data.fetch import fetch
    return fetch()


@pytest.fixture(scope="session")
def smollm(weights):
    return load_llama(weights)


@pytest.fixture(scope="session")
def tokenizer(weights):
    from data.tokenizer import Tokenizer
    return Tokenizer(weights)
