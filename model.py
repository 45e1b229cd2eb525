"""A Llama in one file: the frozen model that KV-Distill compresses for, its key-value cache, and generation.

Mistral and Qwen are Llamas with a few switches: biases of projections, a norm of each head's queries and keys, heads of
any width, other rotary scaling, a sliding window.

Three things differ from the plainest Llama, because the compressor needs them:
  - heads of the cache may hold different tokens, and different numbers of them; an entry's `bias` is added to every
    attention logit towards it: 0 for most, the decay β where one is kept, NEG for what is not there;
  - attention takes an optional `Route`: a low-rank addition to W_Q and W_O for the tokens that will be kept;
  - a caller may watch the weights of attention go by (to learn what the model attends to).

Shapes: B batch, T new tokens, S cached tokens, D width, H query heads, G key-value heads, d head width, V vocabulary.
References: Llama 3, arXiv 2407.21783; Qwen3, 2505.09388; rotary positions, 2104.09864, and YaRN, 2309.00071.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from run.errors import BadInput, expect, read_json, reading

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for each shape anew, and each text has a shape of its own
NEG = -1e9  # an attention logit that means "not there"; finite, so that a row without any neighbour stays a number

KEYS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",  # config.json's
        "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "n_embd": "hidden_size",
        "n_ffn": "intermediate_size", "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps",
        "tied": "tie_word_embeddings"}


@dataclass
class Config:
    vocab_size: int
    n_layer: int
    n_head: int              # query heads, H
    n_kv_head: int           # key-value heads, G; H / G queries share one
    head_dim: int            # d
    n_embd: int              # width, D
    n_ffn: int               # inner width of the MLP
    max_positions: int       # tokens; longer inputs are refused
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # see rope_frequencies; without a rope_type it is llama3's
    tied: bool = True        # the output head is the embedding matrix
    bias: str = ""           # the projections that have one, of "qkvo"
    head_norm: bool = False  # every head's queries and keys are normalised before they are rotated
    sliding_window: int | None = None  # positions that a token sees, its own included, …
    sliding_layers: list | tuple = ()  # … in these layers, from 0 on; in all others, all

    @classmethod
    def from_json(cls, path) -> "Config":
        """Read a Hugging Face config.json. BadInput for another architecture; see run.models.read_config for the rest
        that may be wrong with it."""
        j = read_json(path)
        family = j.get("model_type")
        for key, known in {"model_type": ("llama", "mistral", "qwen2", "qwen3"), "hidden_act": ("silu", None),
                           "mlp_bias": (False, None), "quantization_config": (None,),
                           "partial_rotary_factor": (1, None)}.items():
            if j.get(key) not in known:
                raise BadInput(f"{path}: {key} is {j.get(key)!r:.50}, expected {' or '.join(map(repr, known))}")
        with reading(path, "expected the config.json of a Llama, Mistral or Qwen"):
            c = {ours: j.get(theirs) for ours, theirs in KEYS.items()}
            c["n_kv_head"], c["tied"] = c["n_kv_head"] or c["n_head"], c["tied"] or False
            c["head_dim"] = c["head_dim"] or (128 if family == "qwen3" else c["n_embd"] // c["n_head"])
            c["bias"] = "qkv" if family == "qwen2" else "qkvo" if j.get("attention_bias") else ""
            rope = expect(j.get("rope_scaling") or j.get("rope_parameters") or {}, dict)  # the latter: transformers 5
            c["rope_theta"] = j.get("rope_theta") or rope.get("rope_theta", 10000.0)
            c["rope_scaling"] = s = scaling_from_json(rope, c["max_positions"])
            if s and s.get("rope_type") == "yarn":  # Qwen's own advice leaves max_position_embeddings as it was
                c["max_positions"] = max(c["max_positions"], int(s["factor"] * s["original_max_position_embeddings"]))
            window = family == "mistral" or family != "llama" and j.get("use_sliding_window")
            window = j.get("sliding_window", 4096) if window else None
            if window is not None and window < c["max_positions"]:
                first, kinds = j.get("max_window_layers", 28), j.get("layer_types")
                c["sliding_window"], c["sliding_layers"] = window, [
                    i for i in range(min(c["n_layer"], 1000)) if family == "mistral" or (  # run.models refuses more
                        i >= first if kinds is None else kinds[i:i + 1] == ["sliding_attention"])]
            return cls(head_norm=family == "qwen3", **c)


def scaling_from_json(rope: dict, positions: int) -> dict | None:
    """Config.rope_scaling from config.json's."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
            "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor")}.get(expect(kind, str))
    if keys is None:
        raise ValueError(f"rope_scaling of type {kind!r:.50} is not supported")
    if odd := rope.keys() - {*keys, "type", "rope_type", "rope_theta", "original_max_position_embeddings"}:
        raise ValueError(f"rope_scaling of type {kind!r} with {min(odd)!r:.50} is not supported")
    s = {key: rope.get(key) for key in keys}
    s["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", positions)
    if kind == "yarn":
        s["beta_fast"], s["beta_slow"] = s["beta_fast"] or 32, s["beta_slow"] or 1
        s["attention_factor"] = s["attention_factor"] or 0.1 * math.log(max(1, s["factor"])) + 1
    return None if kind == "default" else s if kind == "llama3" else s | {"rope_type": kind}


# ------------------------------------------------------------------------------------------------------ the cache

@dataclass
class Part:
    """Adjacent key-value heads of one layer that hold equally many entries. g of the layer's G heads."""
    k: torch.Tensor               # (B, g, S, d), rotated to the positions they were computed at
    v: torch.Tensor               # (B, g, S, d)
    positions: torch.Tensor       # (B, 1 or g, S) int32, where the entry stood in the context, -1 for padding
    bias: torch.Tensor | None = None  # (B, 1 or g, S) fp32, added to the logits towards an entry; None: nothing is

    def tensors(self):
        return [x for x in vars(self).values() if x is not None]

    def map(self, f) -> "Part":
        return Part(*(None if x is None else f(x) for x in vars(self).values()))


@dataclass
class Cache:
    """Keys and values of every layer for tokens already read; what compression makes shorter.

    A layer is a list of parts, its heads in order: a whole cache has one part, as all heads hold all tokens; where each
    head holds tokens of its own, a part is mostly one head, and nothing is padded to the longest:

        layer 18   [head 1: ▮▮▮▮▮▮▮▮▮▮▮▮] [heads 2, 3: ▮▮▮▮]
        layer 19   [heads 1, 2, 3: ▮▮▮▮]

    A forward pass leaves it alone, and gradients flow through it; only what `with_room` made is appended to in place.
    """
    layers: list[list[Part]]
    next_position: torch.Tensor   # (B,) int64, where a continuation starts: the *original* context length
    free: int | None = None       # slots still to be appended to, at the end of every part; None: not a buffer

    def with_room(self, extra: int, ragged: bool = False) -> "Cache":
        """A copy that `extra` tokens can be appended to; ragged: some may be padding. A bias hides free slots."""
        def grow(p: Part, more=(0, extra)) -> Part:
            p = p.map(lambda x: x[:, :, :-self.free]) if self.free else p
            k, v, bias = F.pad(p.k, (0, 0, *more)), F.pad(p.v, (0, 0, *more)), p.bias
            if bias is None and (ragged or by_products(k)):
                bias = k.new_zeros(p.positions.shape, dtype=torch.float32)
            bias = bias if bias is None else F.pad(bias, more, value=NEG)
            return Part(k, v, F.pad(p.positions, more, value=-1), bias)
        return Cache([[grow(p) for p in parts] for parts in self.layers], self.next_position, extra)

    def rows(self, index) -> "Cache":
        """The rows `index` (a list), each as often as it is named: one context for several questions."""
        i = torch.as_tensor(index, device=self.next_position.device)
        return Cache([[p.map(lambda x: x[i]) for p in ps] for ps in self.layers], self.next_position[i], self.free)

    def extend(self, part: Part, k, v, at=None):
        """What new tokens see of a part: its keys, values, positions (of use if `at` (B, 1, T) says where the new ones
        stand) and biases; then their own. A buffer stores them, too."""
        if self.free is None:
            bias = None if part.bias is None else F.pad(part.bias, (0, k.shape[2]))
            places = None if at is None else torch.cat([part.positions, at.expand(-1, part.positions.shape[1], -1)], 2)
            return torch.cat([part.k, k], 2), torch.cat([part.v, v], 2), places, bias
        start, end = part.k.shape[2] - self.free, part.k.shape[2] - self.free + k.shape[2]
        part.k[:, :, start:end], part.v[:, :, start:end] = k, v
        if at is not None:
            part.positions[..., start:end] = at
        if part.bias is not None:
            part.bias[..., start:end] = 0
            end = part.k.shape[2] if k.shape[2] == 1 and by_products(part.k) else end  # see there
        return [x if x is None else x[:, :, :end] for x in vars(part).values()]

    def mark_appended(self, T: int, lengths=None) -> None:
        """After all layers have appended T tokens to a buffer; lengths: (B,), how many of them are no padding."""
        if lengths is not None:
            padding = torch.arange(T, device=lengths.device) >= lengths[:, None, None]          # (B, 1, T)
            for part in (p for parts in self.layers for p in parts if p.bias is not None):
                part.bias[..., part.k.shape[2] - self.free:][..., :T] = torch.where(padding, NEG, 0.0)
        self.next_position = self.next_position + (T if lengths is None else lengths)
        self.free -= T

    def entries(self) -> torch.Tensor:
        """(B, L, G) int64: how many context tokens each head holds."""
        return torch.stack([torch.cat([(p.positions >= 0).sum(-1).expand(-1, p.k.shape[1]) for p in parts], 1)
                            for parts in self.layers], 1)

    def nbytes(self) -> int:
        """Bytes of keys, values, biases and positions as stored, padding included."""
        return sum(x.numel() * x.element_size() for parts in self.layers for p in parts for x in p.tensors())


# ------------------------------------------------------------------------------------------------------ the parts

class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):  # (..., D); the mean of squares is taken in fp32, also under bf16
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def rope_frequencies(cfg: Config, device=None) -> torch.Tensor:
    """Radians per position of each of the d/2 rotating pairs, fp32 (d/2,). For long contexts, pairs that turn often
    within the length first trained on are kept, and slow ones, or all, slowed down further by `factor`."""
    d, s = cfg.head_dim, cfg.rope_scaling
    freq = cfg.rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    if not s:
        return freq
    kind, turns = s.get("rope_type", "llama3"), s["original_max_position_embeddings"] * freq / (2 * math.pi)
    kept = torch.zeros_like(freq)                                              # linear: none
    if kind == "llama3":                                                       # a ramp over turns
        kept = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    if kind == "yarn":                                                         # a ramp over pairs
        edges = [d / 2 * math.log(s["original_max_position_embeddings"] / (2 * math.pi * n)) / math.log(cfg.rope_theta)
                 for n in (s["beta_fast"], s["beta_slow"])]                    # the pairs that turn n times
        first, last = max(0, math.floor(edges[0])), min(d - 1, math.ceil(edges[1]))
        kept = 1 - ((torch.arange(d // 2, device=device) - first) / (last - first or 1e-3)).clamp(0, 1)
    return freq * (kept + (1 - kept) / s["factor"])


def rotate(x, rope):
    """Apply rotary positions to x (B, heads, T, d): Hugging Face's order, the pair of dimension i is i + d/2."""
    cos, sin, *_ = rope  # (B, 1, T, d) each
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q, k, v, own=None, bias=None, far=None):
    """softmax(q·kᵀ/√d + bias)·v with G ≤ H: (B, H, T, d), (B, G, S, d), (B, G, S, d) -> (B, H, T, d).
    The last T keys are the queries' own; own: (B or 1, 1, T, T) bool, who sees whom among them, None: causal.
    bias: (B, 1 or G, S) fp32, or None. Its gradient is summed over layers in fp32.
    far: for a sliding window, where the keys stand, (B, 1 or G, S), and up to where a query sees nothing, (B, 1, T).
    """
    if q.shape[2] == 1:  # decoding: the query heads that share a key head become rows of one product; keys read once
        rows = q.reshape(k.shape[0], k.shape[1], -1, q.shape[3])                       # (B, G, H/G, d)
        bias = bias if far is None else torch.where(far[0] <= far[1], NEG, 0.0 if bias is None else bias)
        bias = None if bias is None else bias[:, :, None].to(q.dtype)
        if by_products(k):
            logits = (k @ (rows * q.shape[3] ** -0.5).transpose(2, 3)).transpose(2, 3).contiguous()
            weights = (logits if bias is None else logits + bias).softmax(-1, dtype=torch.float32)
            return (weights.to(v.dtype) @ v).view(q.shape)                             # (B, H, 1, d)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=bias).reshape(q.shape)
    blocks = far is not None or q.device.type == "cpu" and q.dtype == torch.bfloat16  # where they are faster (LOG.md)
    return attend_in_blocks(q, k, v, own, bias, far) if blocks else attend_by_kernel(q, k, v, own, bias)


def by_products(k) -> bool:  # is one query faster so than by SDPA? Compiled for each length: a buffer is seen whole
    return k.device.type == "cpu" and k.dtype == torch.bfloat16 and k.shape[:3].numel() >= 2500


def attend_by_kernel(q, k, v, own=None, bias=None):
    """`attend` by SDPA's fused kernels, which on a GPU keep no weights in memory."""
    T, d = q.shape[2:]
    if own is None and k.shape[2] > T:  # SDPA's is_causal aligns to the top left when there are more keys than queries
        own = own_mask(q[:, 0, :, 0])
    mask = None if own is None else F.pad(own, (k.shape[2] - T, 0), value=True)
    if mask is not None or q.dtype == torch.float32:  # kernels that take a mask, or fp32, want as many key heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        bias = bias if bias is None or bias.shape[1] == 1 else bias.repeat_interleave(k.shape[1] // bias.shape[1], 1)
    how = dict(attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] < q.shape[1], scale=d ** -0.5)
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, **how)
    # A bias belongs to a key, so it can be one more column of the keys, met by ones in the queries: q·k + 1·bias. No
    # mask per head is needed, and the fast kernels stay in use, which want a width that is a multiple of 8.
    column, width = (bias * d ** 0.5).to(k.dtype)[..., None].expand(*k.shape[:3], 1), 8 - d % 8
    q = torch.cat([q, F.pad(q.new_ones(*q.shape[:3], 1), (0, width - 1))], -1)
    k, v = torch.cat([k, F.pad(column, (0, width - 1))], -1), F.pad(v, (0, width))
    return F.scaled_dot_product_attention(q, k, v, **how)[..., :d]


def attend_in_blocks(q, k, v, own=None, bias=None, far=None, watch=None, block: int = 128):
    """`attend`, spelled out, some queries at a time, without the keys that come after them: in bf16 on a CPU twice as
    fast as SDPA (LOG.md). watch: called as watch(weights (B, G, H/G, t, s) fp32, first) with the weights of t queries,
    the first of them query `first`, over the keys that the last of them may see."""
    (B, H, T, d), G, before, out = q.shape, k.shape[1], k.shape[2] - q.shape[2], []
    q, keys = (q * d ** -0.5).view(B, G, H // G, T, d), k.transpose(2, 3).contiguous()
    for i in range(0, T, block):
        rows = q[:, :, :, i:i + block]                                                     # (B, G, H/G, t, d)
        t, upto = rows.shape[3], i + rows.shape[3]
        logits = (rows.flatten(2, 3) @ keys[..., :before + upto]).view(B, G, H // G, t, before + upto)
        if own is None:
            logits[..., before + i:] += logits.new_full((t, t), NEG).triu(1)
        else:
            logits[..., before:].masked_fill_(~own[:, :, None, i:upto, :upto], NEG)
        if far is not None:
            logits.masked_fill_((far[0][:, :, None, :before + upto] <= far[1][..., i:upto, None])[:, :, None], NEG)
        if bias is not None:
            logits = logits + bias[:, :, None, None, :before + upto]
        weights = logits.softmax(-1, dtype=None if watch is None else torch.promote_types(q.dtype, torch.float32))
        if watch is not None:
            watch(weights, i)
        out.append((weights.to(v.dtype).flatten(2, 3) @ v[:, :, :before + upto]).view(B, G, H // G, t, d))
    return torch.cat(out, 3).flatten(1, 2)


@dataclass
class Route:
    """One layer's low-rank addition to W_Q and W_O for the tokens that will be kept: the method's part 4."""
    mask: torch.Tensor  # (B, T, 1), how strongly: 0 for a token that nobody keeps
    a_q: torch.Tensor   # (r, D)
    b_q: torch.Tensor   # (H·d, r)
    a_o: torch.Tensor   # (r, H·d)
    b_o: torch.Tensor   # (D, r); α = r, so no scale

    def q(self, x):     # (B, T, D) -> (B, T, H·d)
        return F.linear(self.mask * F.linear(x, self.a_q), self.b_q)

    def o(self, y):     # (B, T, H·d) -> (B, T, D)
        return F.linear(self.mask * F.linear(y, self.a_o), self.b_o)


class Attention(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.window = cfg.sliding_window if layer in cfg.sliding_layers else None
        self.cfg, inner, kv = cfg, cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
        self.wq = nn.Linear(cfg.n_embd, inner, bias="q" in cfg.bias)
        self.wk = nn.Linear(cfg.n_embd, kv, bias="k" in cfg.bias)
        self.wv = nn.Linear(cfg.n_embd, kv, bias="v" in cfg.bias)
        self.wo = nn.Linear(inner, cfg.n_embd, bias="o" in cfg.bias)
        self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.head_norm else nn.Identity()
                                    for _ in range(2))

    def heads(self, x):  # (B, T, heads·d) -> (B, heads, T, d)
        return x.unflatten(2, (-1, self.cfg.head_dim)).transpose(1, 2)

    def keys_values(self, x, rope):  # (B, G, T, d) each
        return rotate(self.k_norm(self.heads(self.wk(x))), rope), self.heads(self.wv(x))

    def forward(self, x, rope, own, cache, layer, route, watch):
        k, v = self.keys_values(x, rope)
        q = self.wq(x) if route is None else self.wq(x) + route.q(x)          # before the norm: it is part of W_Q
        q = rotate(self.q_norm(self.heads(q)), rope)                           # (B, H, T, d)
        see = attend if watch is None else partial(attend_in_blocks, watch=partial(watch, layer))
        at, beyond = (None, False) if self.window is None else rope[2:]
        far = lambda places: (places, at - self.window) if beyond else None  # noqa: E731
        if cache is None:
            y = see(q, k, v, own, far=far(at))
        else:
            parts, ys = cache.layers[layer], []
            cut = lambda x: [x] if len(parts) == 1 else x.split(  # noqa: E731
                [p.k.shape[1] * x.shape[1] // k.shape[1] for p in parts], 1)
            for part, *qkv in zip(parts, cut(q), cut(k), cut(v)):
                keys, values, places, bias = cache.extend(part, *qkv[1:], at)
                ys.append(see(qkv[0], keys, values, own, bias, far(places)))
            y = ys[0] if len(ys) == 1 else torch.cat(ys, 1)
        y = y.transpose(1, 2).flatten(2)                                       # (B, T, H·d)
        return self.wo(y) if route is None else self.wo(y) + route.o(y), k, v


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.gate = nn.Linear(cfg.n_embd, cfg.n_ffn, bias=False)
        self.up = nn.Linear(cfg.n_embd, cfg.n_ffn, bias=False)
        self.down = nn.Linear(cfg.n_ffn, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.n_embd, cfg.norm_eps), Attention(cfg, layer)
        self.mlp_norm, self.mlp = RMSNorm(cfg.n_embd, cfg.norm_eps), MLP(cfg)

    def forward(self, h, rope, own=None, cache=None, layer=0, route=None, watch=None, kv_only=False):
        """One layer. h: (B, T, D) -> h, and this layer's own keys and values of the T tokens, (B, G, T, d) each.
        kv_only: nothing else is computed, and h comes back unchanged: all that a cache needs of the last layer."""
        x = self.attn_norm(h)
        if kv_only:
            return h, *self.attn.keys_values(x, rope)
        y, k, v = self.attn(x, rope, own, cache, layer, route, watch)
        h = h + y
        return h + self.mlp(self.mlp_norm(h)), k, v


# ------------------------------------------------------------------------------------------------------ the whole

class Llama(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        if not cfg.tied:
            self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.recompute = False  # in passes with a gradient: keep only each block's input, compute the rest again
        self.fingerprint = None  # of the weights; run.files.base_of fills it in

    head_weight = property(lambda self: self.embed.weight if self.cfg.tied else self.head.weight)  # (V, D)
    device = property(lambda self: self.embed.weight.device)
    dtype = property(lambda self: self.embed.weight.dtype)

    def rope(self, positions, largest: int | None = None):
        """cos and ∓sin of every position's angles: (B, T) -> two (B, 1, T, d) in the model's dtype. A pair (a, b) turns
        to (a·cos − b·sin, b·cos + a·sin), so sin is negative in the first half. Then the positions, (B, 1, T),
        and whether some lie beyond the sliding window, if there is one.
        largest: the largest position, from a caller who knows it; asking a GPU for it means waiting for the GPU.
        """
        largest = (int(positions.max()) if positions.numel() else 0) if largest is None else largest
        if largest >= self.cfg.max_positions:
            raise BadInput(f"{largest + 1} tokens are more than {self.cfg.max_positions} positions; use a shorter text")
        angle = positions[:, None, :, None].float() * rope_frequencies(self.cfg, positions.device)
        scale = (self.cfg.rope_scaling or {}).get("attention_factor", 1.0)    # YaRN's: softmax a little sharper
        cos, sin = angle.cos() * scale, angle.sin() * scale
        return (torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype),
                positions[:, None], largest >= (self.cfg.sliding_window or math.inf))

    def block(self, layer: int, h, *args, **kwargs):
        """One layer, through Block.forward: h, k, v. Where memory is short, what its backward needs is not kept."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.layers[layer], h, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self.layers[layer](h, *args, **kwargs)

    def forward(self, tokens, cache: Cache | None = None, segments=None, lengths=None, watch=None,
                largest: int | None = None):
        """Hidden states of `tokens` after the last norm; `logits` turns the ones that are wanted into logits.

        tokens: (B, T) int64, padded on the right.
        cache: what the tokens may look back at. A buffer with room is appended to, any other is left alone.
        segments: (B, T) int64, for several continuations of one cache in one row: a token sees its own segment only,
            and each segment starts at the cache's next position. -1 is padding.
        lengths: (B,) int64, the real tokens of each row, where rows differ (not together with segments).
        watch: called as watch(layer, weights, first) with the attention weights of a whole cache's layers; see
            `attend_in_blocks`. largest: the largest position among the tokens, if it is known; see `rope`.
        Returns: (B, T, D) in the model's dtype.
        """
        at = offsets(tokens, segments)
        if lengths is not None:
            at = at.minimum(lengths[:, None] - 1)  # padding takes no position of its own
        at = at if cache is None else at + cache.next_position[:, None]
        rope = self.rope(at, largest)
        own, h = None if segments is None else own_mask(tokens, segments), self.embed(tokens)
        for layer in range(self.cfg.n_layer):
            h, _, _ = self.block(layer, h, rope, own, cache, layer, watch=watch)
        if cache is not None and cache.free is not None:
            cache.mark_appended(tokens.shape[1], lengths)
        return self.norm(h)

    def logits(self, h):
        """fp32 logits of hidden states: (..., D) -> (..., V)."""
        return F.linear(h, self.head_weight).float()

    def run_layers(self, h, first: int = 0, last: int | None = None, route=None, store=lambda layer, k, v: (k, v)):
        """Run layers first … last−1 over a whole context, causally, and collect its keys and values.
        h: (B, N, D), the hidden states before layer `first`; padding, if any, is on the right. route(layer): the
        layer's Route or None. store(layer, k, v): keys and values (B, G, N, d) come, what it returns is collected.
        Returns: h after layer last−1 (not after the model's last: no cache needs it), and what was collected."""
        rope = self.rope(torch.arange(h.shape[1], device=h.device)[None], largest=h.shape[1] - 1)
        stored = []
        for layer in range(first, self.cfg.n_layer if last is None else last):
            h, k, v = self.block(layer, h, rope, route=route and route(layer), kv_only=layer == self.cfg.n_layer - 1)
            stored.append(store(layer, k, v))
        return h, stored

    @torch.no_grad()
    def prefill(self, tokens, lengths=None) -> Cache:
        """Read a context: (B, N) int64, padded on the right, with `lengths` (B,) real tokens -> its whole cache."""
        return whole_cache(self.run_layers(self.embed(tokens))[1], lengths)


def whole_cache(kvs, lengths=None, bias=None) -> Cache:
    """The cache in which every head holds all N tokens of its context.
    kvs: (k, v) of every layer, (B, G, N, d) each; lengths: (B,) int64, the real tokens of each row, None: all; bias:
    (B, L or 1, G or 1, N) fp32, for entries that are decayed, or that a head is to do without.
    """
    (B, _, N, _), device = kvs[0][0].shape, kvs[0][0].device
    positions = torch.arange(N, dtype=torch.int32, device=device).expand(B, 1, N)
    if lengths is not None:
        real = positions < lengths[:, None, None]
        bias = torch.where(real[:, None], 0.0 if bias is None else bias, NEG)               # (B, L or 1, G or 1, N)
        positions = torch.where(real, positions, -1)
    else:
        lengths = torch.full((B,), N, device=device)
    per_layer = [None] * len(kvs) if bias is None else bias.expand(-1, len(kvs), -1, -1).unbind(1)
    return Cache([[Part(k, v, positions, b)] for (k, v), b in zip(kvs, per_layer)], lengths)


def offsets(tokens, segments=None):
    """How far each token stands from the start of its row, or of its segment: (B, T) int64."""
    i = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    if segments is None:
        return i
    new = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)  # the first token of each segment
    return i - torch.where(new, i, 0).cummax(1).values


def own_mask(tokens, segments=None):
    """Who sees whom among the new tokens: causal, within a segment. (B or 1, 1, T, T) bool.
    Two continuations, x and y, of a cache of three entries, in one row; what is masked is the right part:

             cached   x0 x1 y0 y1
        x0   1 1 1    1  .  .  .
        x1   1 1 1    1  1  .  .
        y0   1 1 1    .  .  1  .
        y1   1 1 1    .  .  1  1
    """
    T = tokens.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()[None, None]
    return causal if segments is None else causal & (segments[:, None, :, None] == segments[:, None, None, :])


# ------------------------------------------------------------------------------------------------ public weights

def our_name(theirs: str) -> str:
    """Hugging Face's tensor name -> ours."""
    for a, b in {"model.": "", "embed_tokens": "embed", "self_attn.": "attn.", "input_layernorm": "attn_norm",
                 "post_attention_layernorm": "mlp_norm", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
                 "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "lm_head": "head"}.items():
        theirs = theirs.replace(a, b)
    return theirs


def own_rows(tensor) -> tuple[torch.Tensor, int]:
    """The part of a parameter that lies in this process, and the row it begins at: all of it, unless it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh, own = tensor.device_mesh, tensor.to_local()
    return own, min(tensor.shape[0], mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()))


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that an index names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise BadInput(f"{folder}: neither model.safetensors nor its index .json; download the weights again")
    with reading(index, "download it again"):
        return [folder / name for name in sorted({*read_json(index)["weight_map"].values()})]


def load_llama(folder, device="cpu", dtype=torch.float32, shard=None) -> Llama:
    """A frozen model from a folder with config.json and model.safetensors, or shards; taken to be sound (run.models).
    The model is made without memory ("meta"), each tensor copied into place as it is read. shard: called with the model
    while it has no memory; it may spread parameters over processes by rows (FSDP2), and then each reads its own.
    """
    with torch.device("meta"):
        model = Llama(Config.from_json(Path(folder) / "config.json")).to(dtype).requires_grad_(False).eval()
    if shard is not None:
        shard(model)
    parameters = dict(model.to_empty(device=device).named_parameters())
    for file in weight_files(Path(folder)):
        with safe_open(file, "pt") as f:
            for key in f.keys():
                if our_name(key) in parameters:  # not so: rotary tables of old files, a tied head stored twice
                    own, first = own_rows(parameters[our_name(key)])
                    own.copy_(f.get_slice(key)[first:first + len(own)])
    return model


# ------------------------------------------------------------------------------------------------------ generation

def pad_right(rows: list[list[int]], device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> tokens (B, T) int64, padded on the right with 0, and lengths (B,)."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(r, dtype=torch.long) for r in rows], batch_first=True)
    return tokens.to(device), torch.tensor([len(r) for r in rows], device=device)


@torch.inference_mode()
def generate(model: Llama, cache: Cache, prompts: list[list[int]], max_new_tokens: int = 64, stop_ids=frozenset(),
             temperature: float = 0.0, seed: int = 0) -> Iterator[list[int | None]]:
    """Continue each prompt after its row of the cache; yields one new token per row, None for a row that has ended.
    The cache is copied first and stays as it was. Prompts may differ in length; none may be empty. temperature 0 is
    greedy. A stop token ends its row and is not yielded. Generation also ends at the model's last position.
    """
    tokens, lengths = pad_right(prompts, model.device)
    if not all(prompts):
        raise BadInput("an empty prompt cannot be continued; ask something")
    left = model.cfg.max_positions - int((cache.next_position + lengths).max())
    max_new_tokens = min(max_new_tokens, left + 1)  # the last token needs no position: nothing follows it
    cache = cache.with_room(tokens.shape[1] + max(0, max_new_tokens), ragged=len({*map(len, prompts)}) > 1)
    rng = torch.Generator(model.device).manual_seed(seed)
    last = model(tokens, cache, lengths=lengths)[torch.arange(len(prompts)), lengths - 1]  # (B, D), each row's last
    alive = [True] * len(prompts)
    for i in range(max_new_tokens):
        logits = model.logits(last)                                        # (B, V)
        if not logits.isfinite().all():
            raise BadInput("the logits are not finite: weights or adapter are damaged, or try --dtype fp32")
        if temperature > 0:  # the largest becomes 0: what a low temperature makes of the others is −∞ at worst
            logits = (logits - logits.amax(-1, keepdim=True)) / temperature
            new = torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]
        else:
            new = logits.argmax(-1)
        step = new.tolist()
        alive = [a and t not in stop_ids for a, t in zip(alive, step)]
        if not any(alive):
            return
        yield [t if a else None for a, t in zip(alive, step)]
        if i + 1 < max_new_tokens:
            last = model(new[:, None], cache)[:, -1]


def answer(model: Llama, tokenizer, cache: Cache, questions: list[str], max_new_tokens: int = 64,
           temperature: float = 0.0, seed: int = 0) -> list[str]:
    """Text answers to questions about one cached context (a cache of one row), in one ragged batch."""
    rows, prompts = cache.rows([0] * len(questions)), [tokenizer.ask(q) for q in questions]
    steps = [*generate(model, rows, prompts, max_new_tokens, tokenizer.stop_ids, temperature, seed)]
    return [tokenizer.decode([s[i] for s in steps if s[i] is not None]).strip() for i in range(len(questions))]
