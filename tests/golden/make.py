"""Make the golden scores: what NVIDIA's kvpress 0.5.5 says each token is worth, and
what it keeps where heads share a budget. The baselines in eval.py are tested
against them.

    python -m venv .venv-golden
    .venv-golden/bin/pip install -r tests/golden/requirements.txt
    .venv-golden/bin/python tests/golden/make.py   # under a minute

The model is the default one (SmolLM2-135M-Instruct, Q4_1 dequantised, fp32). The
context is the first 300 tokens of the chat header and data/lighthouse.txt. The
tests read only the file that this script writes, and need no kvpress.

What kvpress.safetensors holds (L = 5 layers, listed in the metadata; G = 3
key-value heads; N = 300 tokens):
    ids               (N,) int32, the context; the first `prefix_length` (metadata)
                      are the chat header
    h2o snapkv        (L, G, N) fp32, scores, of which kvpress keeps the largest
    streaming         (L, G, N) fp32, 1 for a token that StreamingLLM keeps at half
    kvzip             (L, G, N) fp32, with the context replayed in one pass
    kvzip.replay.0    (R,) int32, what was read after the cache: the instruction, the
                      model's turn, the context
    kvzip_chunked and kvzip_chunked.replay.i   the same in chunks of 128 tokens
    kvzip.kept        (30, G, N) bool, what all layers keep of a quarter, under one
                      budget for all heads
    adasnapkv.kept    (30, G, N) bool, the same of AdaKV on SnapKV's scores, from a
                      window of 8 tokens
"""
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import (AdaKVPress, KVzipPress, ObservedAttentionPress, SnapKVPress,
                     StreamingLLMPress)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from data.fetch import fetch  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from run.errors import write_atomic  # noqa: E402

OUT = Path(__file__).parent / "kvpress.safetensors"
LAYERS = [0, 8, 16, 24, 29]
N = 300         # tokens
CHUNK = 128     # tokens; the context after the header makes three chunks
RATIO = 0.5     # removed; kvpress computes no scores at 0. Only StreamingLLM depends on it
SHARED = 0.75   # removed, for the kept sets
WINDOW = 8      # of SnapKV there; AdaKV's safeguard, a fifth of 75 tokens, is larger

# the window and kernel of SnapKV and the sinks are kvpress's defaults, written out
PRESSES = {
    "h2o": ObservedAttentionPress(RATIO),
    "snapkv": SnapKVPress(RATIO, window_size=64, kernel_size=5),
    "streaming": StreamingLLMPress(RATIO, n_sink=4),
}
SHARED_PRESSES = {
    "kvzip": KVzipPress(SHARED, n_sink=4),
    "adasnapkv": AdaKVPress(SnapKVPress(SHARED, window_size=WINDOW, kernel_size=5)),
}


class WatchedKVzip(KVzipPress):
    """KVzip forgets its scores once it has compressed; this one keeps them, and the replays."""

    def prepare(self, model, tokenizer, *rest):
        pairs = super().prepare(model, tokenizer, *rest)
        self.replays = [ids[0] for _, ids in pairs]
        self.prefix = self.prefix_length
        return pairs

    def compress_post(self, model):
        super().compress_post(model)
        self.scores = self.score_val[:, 0].clone()  # (n_layer, G, N), after the sinks got theirs


def prefill(model, press, ids):
    with torch.no_grad(), press(model):
        model.model(input_ids=ids[None], past_key_values=DynamicCache())


def scores_of(model, press, ids):
    """The scores that a press computes while the model reads `ids`: (L, G, N)."""
    seen = {}
    score = press.score

    def watched(module, *rest):
        seen[module.layer_idx] = score(module, *rest)
        return seen[module.layer_idx]

    press.score = watched
    prefill(model, press, ids)
    return torch.stack([seen[layer][0] for layer in LAYERS])


def kept_by(model, press, ids):
    """What each head keeps, (n_layer, G, N) bool. kvpress masks what it drops."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    prefill(model, press, ids)
    c = model.config
    kept = torch.ones(c.num_hidden_layers, c.num_key_value_heads, len(ids), dtype=torch.bool)
    for i, layer in enumerate(model.model.layers):
        rows, heads, tokens = layer.self_attn.masked_key_indices
        kept[i, heads, tokens] = False
    return kept


def main():
    folder = fetch()
    tokenizer = Tokenizer(folder)
    text = (ROOT / "data" / "lighthouse.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.header + tokenizer.encode(text))[:N]
    # H2O needs eager attention, which shows its weights; KVzip refuses it
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    tensors = {"ids": ids}
    for name, press in PRESSES.items():
        tensors[name] = scores_of(model, press, ids)
    model.set_attn_implementation("sdpa")
    for name, size in {"kvzip": 2048, "kvzip_chunked": CHUNK}.items():
        press = WatchedKVzip(RATIO, n_sink=4, chunk_size=size)
        prefill(model, press, ids)
        assert press.prefix == len(tokenizer.header), "kvpress has another chat header"
        tensors[name] = press.scores[LAYERS]
        for i, replay in enumerate(press.replays):
            tensors[f"{name}.replay.{i}"] = replay
    for name, press in SHARED_PRESSES.items():
        tensors[f"{name}.kept"] = kept_by(model, press, ids)

    packages = ("kvpress", "transformers", "torch", "tokenizers")
    metadata = {name: version(name) for name in packages}
    metadata |= {
        "layers": json.dumps(LAYERS), "prefix_length": str(len(tokenizer.header)),
        "window_size": "64", "kernel_size": "5", "n_sink": "4", "chunk_size": str(CHUNK),
        "compression_ratio": str(RATIO), "shared_ratio": str(SHARED),
        "shared_window": str(WINDOW),
        "model": "SmolLM2-135M-Instruct, Q4_1 dequantised to fp32"}
    for name, x in tensors.items():
        tensors[name] = x.to(torch.int32) if x.dtype == torch.int64 else x.contiguous()
    write_atomic(OUT, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")
    for name, tensor in tensors.items():
        print(f"  {name:24} {tuple(tensor.shape)}")


if __name__ == "__main__":
    main()
