"""Golden scores: what NVIDIA's kvpress 0.5.5 says each token is worth, to test the baselines in eval.py against; and
what it keeps where heads share a budget.

    python -m venv .venv-golden && .venv-golden/bin/pip install -r tests/golden/requirements.txt
    .venv-golden/bin/python tests/golden/make.py       # under a minute; writes tests/golden/kvpress.safetensors

The model is the default one (SmolLM2-135M-Instruct, Q4_1 dequantised, fp32); the context is the first 300 tokens of the
chat header and data/lighthouse.txt. The tests read only the file, never this script, and need no kvpress.

What the file holds (L = 5 layers, listed in the metadata; G = 3 key-value heads; N = 300):
    ids                        (N,) int32, the context; its first `prefix_length` (metadata) are the chat header
    knorm h2o snapkv tova      (L, G, N) fp32, the scores that kvpress keeps the largest of
    streaming                  (L, G, N) fp32, 1 for a token that StreamingLLM keeps at half, else 0
    kvzip                      (L, G, N) fp32, scores with the context replayed in one pass (kvpress's default)
    kvzip.replay.0             (R,) int32, what was run on top of the cache: instruction, model's turn, context
    kvzip_chunked[.replay.i]   the same with chunks of 128 tokens, one replay for each
    kvzip.kept                 (30, G, N) bool, what all layers keep at a quarter: one budget for all heads
    adasnapkv.kept             (30, G, N) bool, the same of AdaKV on SnapKV's scores, from a window of 8 tokens
"""
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import (AdaKVPress, KnormPress, KVzipPress, ObservedAttentionPress, SnapKVPress, StreamingLLMPress,
                     TOVAPress)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from run.errors import write_atomic  # noqa: E402
from data.fetch import fetch  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

OUT = Path(__file__).parent / "kvpress.safetensors"
LAYERS = [0, 8, 16, 24, 29]
N = 300         # tokens
CHUNK = 128     # tokens; the context after the header makes three chunks
RATIO = 0.5     # removed; kvpress computes no scores at 0. It decides what StreamingLLM keeps, and no other score
SHARED = 0.75   # removed, for the kept sets
WINDOW = 8      # SnapKV's there: AdaKV's safeguard, a fifth of 75 tokens, reaches beyond it

# window and kernel of SnapKV and the sinks are kvpress's defaults, written out
PRESSES = {"knorm": KnormPress(RATIO), "h2o": ObservedAttentionPress(RATIO), "tova": TOVAPress(RATIO),
           "snapkv": SnapKVPress(RATIO, window_size=64, kernel_size=5), "streaming": StreamingLLMPress(RATIO, n_sink=4)}


class WatchedKVzip(KVzipPress):
    """KVzip forgets its scores once it has compressed; this one keeps them, and the tokens that it replayed."""

    def prepare(self, model, tokenizer, *rest):
        pairs = super().prepare(model, tokenizer, *rest)
        self.replays, self.prefix = [ids[0] for _, ids in pairs], self.prefix_length
        return pairs

    def compress_post(self, model):
        super().compress_post(model)
        self.scores = self.score_val[:, 0].clone()  # (n_layer, G, N), after the sinks got theirs


def prefill(model, press, ids):
    with torch.no_grad(), press(model):
        model.model(input_ids=ids[None], past_key_values=DynamicCache())


def scores_of(model, press, ids):
    """The scores that a press computes while the model reads `ids`: (L, G, N)."""
    seen, score = {}, press.score

    def watched(module, *rest):
        seen[module.layer_idx] = score(module, *rest)
        return seen[module.layer_idx]
    press.score = watched
    prefill(model, press, ids)
    return torch.stack([seen[layer][0] for layer in LAYERS])


def kept_by(model, press, ids):
    """What all layers keep, by head: (n_layer, G, N) bool. kvpress drops nothing from the cache, it masks."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    prefill(model, press, ids)
    kept = torch.ones(model.config.num_hidden_layers, model.config.num_key_value_heads, len(ids), dtype=torch.bool)
    for i, layer in enumerate(model.model.layers):
        rows, heads, tokens = layer.self_attn.masked_key_indices
        kept[i, heads, tokens] = False
    return kept


def main():
    folder = fetch()
    tokenizer = Tokenizer(folder)
    text = (ROOT / "data" / "lighthouse.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.header + tokenizer.encode(text))[:N]
    # H2O needs eager attention, which shows its weights
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = {"ids": ids} | {name: scores_of(model, press, ids) for name, press in PRESSES.items()}
    model.set_attn_implementation("sdpa")  # and KVzip refuses it
    for name, size in {"kvzip": 2048, "kvzip_chunked": CHUNK}.items():
        press = WatchedKVzip(RATIO, n_sink=4, chunk_size=size)
        prefill(model, press, ids)
        assert press.prefix == len(tokenizer.header), "kvpress's chat header differs from ours"
        tensors[name] = press.scores[LAYERS]
        tensors |= {f"{name}.replay.{i}": replay for i, replay in enumerate(press.replays)}
    for name, shared in {"kvzip": KVzipPress(SHARED, n_sink=4),
                         "adasnapkv": AdaKVPress(SnapKVPress(SHARED, window_size=WINDOW, kernel_size=5))}.items():
        tensors[f"{name}.kept"] = kept_by(model, shared, ids)
    packages = {name: version(name) for name in ("kvpress", "transformers", "torch", "tokenizers")}
    metadata = packages | {"layers": json.dumps(LAYERS), "prefix_length": str(press.prefix), "window_size": "64",
                           "kernel_size": "5", "n_sink": "4", "chunk_size": str(CHUNK), "compression_ratio": str(RATIO),
                           "shared_ratio": str(SHARED), "shared_window": str(WINDOW),
                           "model": "SmolLM2-135M-Instruct, Q4_1 dequantised to fp32"}
    tensors = {k: v.to(torch.int32) if v.dtype == torch.int64 else v.contiguous() for k, v in tensors.items()}
    write_atomic(OUT, lambda path: save_file(tensors, path, metadata=metadata))
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")
    for name, tensor in tensors.items():
        print(f"  {name:24} {tuple(tensor.shape)}")


if __name__ == "__main__":
    main()
