"""Shared pieces: a tiny random Llama (hermetic, milliseconds), and the real SmolLM2 for tests marked `weights`."""
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
from model import Config, Llama, load_llama  # noqa: E402


def tiny_llama(dtype=torch.float32, seed=0, **changes) -> Llama:
    """6 layers, width 48, 4 query and 2 key-value heads, vocabulary 97; weights large enough that attention matters."""
    torch.manual_seed(seed)
    cfg = dict(vocab_size=97, n_layer=6, n_head=4, n_kv_head=2, head_dim=12, n_embd=48, n_ffn=64, max_positions=512)
    model = Llama(Config(**(cfg | changes)))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15 if "embed" not in name else 1.0)
    return model.to(dtype).requires_grad_(False).eval()


def hf_config(cfg: Config) -> dict:
    return dict(model_type="llama", hidden_act="silu", vocab_size=cfg.vocab_size, num_hidden_layers=cfg.n_layer,
                num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head, head_dim=cfg.head_dim,
                hidden_size=cfg.n_embd, intermediate_size=cfg.n_ffn, max_position_embeddings=cfg.max_positions,
                rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta, rope_scaling=cfg.rope_scaling,
                tie_word_embeddings=cfg.tied)


def save_llama(model, folder):
    """Write a model as Hugging Face would: config.json and model.safetensors, under its names."""
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    parts = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn.wq": "self_attn.q_proj",
             "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj", "attn.wo": "self_attn.o_proj",
             "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
    for i in range(model.cfg.n_layer):
        names |= {f"layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({names[k]: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(model.cfg)))
    return folder


def tiny_compressor(model, seed=1, trained=True, **changes) -> Compressor:
    """A compressor for a tiny model; `trained` gives it adapters that do something (B ≠ 0)."""
    torch.manual_seed(seed)
    comp = Compressor(model.cfg, CompressorConfig(**({"eta": 2, "rank": 4, "hidden": 32, "recent": 2} | changes)))
    if trained:
        with torch.no_grad():
            for p in (comp.b_q, comp.b_o):
                p.normal_(std=0.2)
            comp.scorer.w2.weight.mul_(5)
    return comp.to(model.dtype)


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def compressor(model):
    return tiny_compressor(model)


@pytest.fixture(scope="session")
def weights():
    """Folder of the real default model."""
    from data.fetch import fetch
    return fetch()


@pytest.fixture(scope="session")
def smollm(weights):
    return load_llama(weights)


@pytest.fixture(scope="session")
def tokenizer(weights):
    from data.tokenizer import Tokenizer
    return Tokenizer(weights)
