"""A Llama in one file, with the key-value cache that KV-Distill compresses.

Mistral and Qwen are Llamas with a few switches: biases of the projections,
a norm of each head's queries and keys, heads of any width.

Three things differ from the plainest Llama, because the compressor needs them. (An
*entry* of the cache is the key and the value of one token in one head. compress.py
explains the method and its parts.)
  - the heads of a cache may hold different tokens, and different numbers of
    them; a bias per entry is added to every attention logit towards it
  - an attention layer takes an optional `TokenLoRA`: a low-rank addition to W_Q
    and W_O, of its own strength for each token
  - a caller may look at the attention weights while they are computed

This file needs nothing else of this repository. What it refuses, it refuses with a
ValueError of one line. It does not check everything: run/loading.py checks files.

Shapes: B rows of a batch, N context tokens, T new tokens, S keys that they see, L
layers, D model width, H query heads, G key-value heads, g of them in a head group, d
head width, V vocabulary, r LoRA rank. Each key-value head serves H / G query
heads. The code counts layers from 0, the prose from 1.

References: Llama 3, arXiv 2407.21783; Qwen3, arXiv 2505.09388; rotary
positions, arXiv 2104.09864.
"""
import json
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# An attention logit that means "not there". It is finite, so that a row in
# which nothing is visible stays a number.
NEG = -1e9


# ---------------------------------------------------------------- configuration

# our names -> the names in a Hugging Face config.json
CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_embd": "hidden_size",
    "n_ffn": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}

# the values of other settings for which this file computes the right thing; None: absent
SUPPORTED = {
    "model_type": ("llama", "mistral", "qwen2", "qwen3"),
    "hidden_act": ("silu", None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}

LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass
class Config:
    vocab_size: int
    n_layer: int
    n_head: int              # query heads, H
    n_kv_head: int           # key-value heads, G
    head_dim: int            # d
    n_embd: int              # model width, D
    n_ffn: int               # inner width of the MLP
    max_positions: int       # in tokens; longer inputs are refused
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # the four numbers of LLAMA3_SCALING
    tied: bool = True        # the output head is the embedding matrix
    bias: str = ""           # which projections have a bias, of "qkvo"
    head_norm: bool = False  # normalise each head's queries and keys (Qwen3)

    @classmethod
    def from_json(cls, path) -> "Config":
        """Read a Hugging Face config.json.

        Errors: ValueError for a model that this file would compute wrongly.
        Run run.loading.read_config on files of strangers: it checks the rest.
        """
        raw = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        # transformers 5 writes rope_parameters, earlier versions rope_scaling. If a file
        # has both, transformers 5 reads rope_scaling, and so do we.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        for key, known in SUPPORTED.items():
            value = rope.get(key, raw.get(key))  # partial_rotary_factor may be in rope
            if value not in known:
                expected = " or ".join(map(repr, known))
                raise ValueError(f"{path}: {key} is {value!r:.50}, expected {expected}")

        family = raw["model_type"]
        fields = {ours: raw.get(theirs) for ours, theirs in CONFIG_NAMES.items()}
        if fields["norm_eps"] is None:
            raise ValueError(f"{path}: no rms_norm_eps, expected a number such as 1e-5")
        fields["n_kv_head"] = fields["n_kv_head"] or fields["n_head"]
        fields["tied"] = fields["tied"] or False
        if not fields["head_dim"]:
            default = fields["n_embd"] // fields["n_head"]
            fields["head_dim"] = 128 if family == "qwen3" else default
        if raw.get("attention_bias"):
            fields["bias"] = "qkvo"
        if family == "qwen2":
            fields["bias"] = "qkv"
        fields["head_norm"] = family == "qwen3"

        theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
        fields["rope_theta"] = theta
        fields["rope_scaling"] = llama3_scaling(path, rope)

        # A model with a sliding window is used up to its window, where the
        # window hides nothing.
        windowed = family == "mistral" or raw.get("use_sliding_window")
        window = raw.get("sliding_window", 4096) if windowed else None  # transformers' default
        if window is not None and family != "llama":
            fields["max_positions"] = min(fields["max_positions"], window)
        return cls(**fields)


def llama3_scaling(path, rope: dict) -> dict | None:
    """The numbers by which Llama 3.1 slows down rotary positions, or None."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{path}: rotary positions of type {kind!r:.50} are not supported, "
            "expected 'default' or 'llama3'"
        )
    return {key: rope.get(key) for key in LLAMA3_SCALING}


# -------------------------------------------------------------------- the cache

@dataclass
class HeadGroup:
    """Neighbouring heads of one layer that hold equally many entries: g of G."""
    k: torch.Tensor          # (B, g, S, d), rotated to the original positions
    v: torch.Tensor          # (B, g, S, d)
    positions: torch.Tensor  # (B, 1 or g, S) int32, in the context; -1: padding, or a
                             # slot, also when it is written
    bias: torch.Tensor | None = None  # (B, 1 or g, S), added to the logits

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in vars(self).values() if x is not None]

    def map(self, function) -> "HeadGroup":
        """A group of the results of `function` on each tensor."""
        new = {name: x if x is None else function(x) for name, x in vars(self).items()}
        return HeadGroup(**new)


@dataclass
class Cache:
    """Keys and values of every layer for the tokens that were already read.

    A layer is a list of head groups, in the order of its heads. In a full cache
    all heads hold all tokens, so that a layer is one group. In a compressed
    cache each head holds tokens of its own, and no head is padded to the
    longest one:

        layer 18   [head 1: ▮▮▮▮▮▮▮▮▮▮▮▮] [heads 2, 3: ▮▮▮▮]
        layer 19   [heads 1, 2, 3: ▮▮▮▮]

    A forward pass changes only a cache with slots (see `reserve`), which new
    tokens fill. Any other cache stays as it was, and gradients flow through it.
    """
    layers: list[list[HeadGroup]]
    next_position: torch.Tensor  # (B,) int64, of the next token: how many tokens were
                                 # read so far, kept or not
    slots: "Slots | None" = None

    def reserve(self, extra: int) -> "Cache":
        """A copy with `extra` free slots at the end of every head, for `generate`."""
        added = [add_slots(groups, extra) for groups in self.layers]
        layers, keys, values, starts = map(list, zip(*added))
        biases = add_biases([group for groups in layers for group in groups], extra)
        n_written = torch.zeros(1, dtype=torch.long, device=self.next_position.device)
        starts = torch.tensor(starts, device=n_written.device)
        slots = Slots(extra, n_written, starts, keys, values, biases)
        return Cache(layers, self.next_position.clone(), slots)

    def update(self, layer: int, index, k, v) -> list[tuple]:
        """Store the keys and values of new tokens, and return what these tokens see in
        each head group of a layer: its entries, and themselves.

        k, v: (B, G, T, d).
        index: (L, G·T), the slots that they are written to; None for a cache without
            slots, where they are appended to a copy.
        Returns: keys, values and bias of each group; a bias may be None.
        """
        groups = self.layers[layer]
        if index is not None:
            self.slots.keys[layer].index_copy_(1, index[layer], k.flatten(1, 2))
            self.slots.values[layer].index_copy_(1, index[layer], v.flatten(1, 2))
            return [(group.k, group.v, group.bias) for group in groups]

        seen = []
        sizes = [group.k.shape[1] for group in groups]
        for group, own_k, own_v in zip(groups, k.split(sizes, 1), v.split(sizes, 1)):
            bias = group.bias
            if bias is not None:
                bias = F.pad(bias, (0, k.shape[2]))
            keys = torch.cat([group.k, own_k], 2)
            values = torch.cat([group.v, own_v], 2)
            seen.append((keys, values, bias))
        return seen

    def advance(self, T: int, lengths=None) -> None:
        """Count T tokens as written; `lengths` (B,) of them are real in each row."""
        self.slots.n_written.add_(T)
        self.next_position.add_(T if lengths is None else lengths)

    def rows(self, index: list[int]) -> "Cache":
        """A new cache of these rows. An index may repeat, where several questions
        are asked about one context."""
        i = torch.as_tensor(index, device=self.next_position.device)
        layers = [[group.map(lambda x: x[i]) for group in groups] for groups in self.layers]
        return Cache(layers, self.next_position[i])

    def state(self) -> list[torch.Tensor]:
        """Every tensor of a reserved cache that a decoding step reads or writes."""
        slots = self.slots
        stored = [*slots.keys, *slots.values, *slots.biases]
        return [*stored, slots.n_written, self.next_position]

    def layout(self) -> list:
        """The shapes of a reserved cache, and which groups share a bias. A captured
        step can be replayed for another cache of an equal layout."""
        groups = [group for groups in self.layers for group in groups]
        memory = [bias.untyped_storage().data_ptr() for bias in self.slots.biases]
        layout = []
        for group in groups:
            own = memory.index(group.bias.untyped_storage().data_ptr())
            layout.append((group.k.shape, group.bias.shape, own))
        return [self.slots.n, layout]

    def entries(self) -> torch.Tensor:
        """How many entries each head holds, without padding and slots: (B, L, G) int64."""
        layers = []
        for groups in self.layers:
            counts = [
                (group.positions >= 0).sum(-1).expand(-1, group.k.shape[1])
                for group in groups
            ]
            layers.append(torch.cat(counts, 1))
        return torch.stack(layers, 1)

    def nbytes(self) -> int:
        """Bytes as saved in a file: keys, values, positions, biases, padding included."""
        tensors = [x for groups in self.layers for group in groups for x in group.tensors()]
        return sum(x.numel() * x.element_size() for x in tensors)


def full_cache(kvs, lengths=None, bias=None) -> Cache:
    """The cache in which every head holds all N tokens of its context.

    kvs: (k, v) of every layer, (B, G, N, d) each.
    lengths: (B,) int64, the real tokens of each row; None: all of them.
    bias: (B, L or 1, G or 1, N) fp32, the decay of entries, or NEG for an entry
        that a head has to do without. With L = 1 it serves all layers, and its
        gradient is the sum of the layers' gradients, in fp32.
    """
    k, _ = kvs[0]
    B, _, N, _ = k.shape
    positions = torch.arange(N, dtype=torch.int32, device=k.device)
    positions = positions.expand(B, 1, N)
    if lengths is None:
        lengths = torch.full((B,), N, device=k.device)
    else:
        is_token = positions < lengths[:, None, None]
        bias = torch.where(is_token[:, None], 0.0 if bias is None else bias, NEG)
        positions = torch.where(is_token, positions, -1)

    biases = [None] * len(kvs)
    if bias is not None:
        biases = bias.expand(-1, len(kvs), -1, -1).unbind(1)
    layers = [[HeadGroup(k, v, positions, b)] for (k, v), b in zip(kvs, biases)]
    return Cache(layers, lengths)


# ----------------------------------------------------- positions, masks, and norms

class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # the mean of squares is computed in fp32, also for bf16 input
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def rope_frequencies(cfg: Config, device=None) -> torch.Tensor:
    """Radians per position of each of the d/2 rotating pairs: (d/2,) fp32.

    Llama 3.1 keeps the pairs that turn often within the length that was first
    trained on, slows the others down by `factor`, and has a ramp in between.
    """
    exponents = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = cfg.rope_theta ** -(exponents / cfg.head_dim)
    if cfg.rope_scaling is None:
        return frequencies
    factor, low, high, length = (cfg.rope_scaling[key] for key in LLAMA3_SCALING)
    turns = length * frequencies / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (ramp + (1 - ramp) / factor)


def rotate(x, rope):
    """Apply rotary positions to x (B, heads, T, d).

    Dimension i is paired with i + d/2, as in the Hugging Face layout. A pair
    (a, b) becomes (a·cos − b·sin, b·cos + a·sin); `rope` has the
    cosines, and the sines with a minus in the first half.
    """
    cos, sin = rope  # (B, 1, T, d) each
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin)


def relative_positions(tokens, segments=None):
    """How far each token stands from the start of its row or segment: (B, T)."""
    i = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    if segments is None:
        return i
    is_first = segments[:, 1:] != segments[:, :-1]
    is_first = F.pad(is_first, (1, 0), value=True)
    starts = torch.where(is_first, i, 0).cummax(1).values
    return i - starts


def segment_mask(segments):
    """Which new tokens see each other: causal within a segment, (B, 1, T, T).

    Two continuations, x and y, of a cache of three entries, in one row. The
    mask is the part on the right:

             cached   x0 x1 y0 y1
        x0   1 1 1    1  .  .  .
        x1   1 1 1    1  1  .  .
        y0   1 1 1    .  .  1  .
        y1   1 1 1    .  .  1  1
    """
    T = segments.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return causal & same


# -------------------------------------------------------------------- attention

def attention(q, k, v, mask=None, bias=None, on_weights=None):
    """softmax(q·kᵀ/√d + bias)·v: (B, H, T, d) for queries q (B, H, T, d).

    k, v: (B, G, S, d), G ≤ H.
    mask: (B or 1, 1, T, M) bool, which of the last M keys a query sees, where M is
        T or the number of slots; earlier keys are seen by all. None: the last T
        keys are the queries' own, and attention to them is causal. Unless
        on_weights is given, a single query ignores the mask: hide keys by a bias
        of NEG.
    bias: (B, 1 or G, S), added to the logits towards a key.
    on_weights: see `attention_blockwise`.
    """
    on_cpu = q.device.type == "cpu"
    if on_weights is not None:
        return attention_blockwise(q, k, v, mask, bias, on_weights)
    if q.shape[2] == 1:
        return attention_one_query(q, k, v, bias)
    if on_cpu and q.dtype == torch.bfloat16:
        return attention_blockwise(q, k, v, mask, bias)  # twice as fast there
    return attention_sdpa(q, k, v, mask, bias)


def attention_one_query(q, k, v, bias=None):
    """`attention` of a single token, which sees everything: a decoding step.

    The query heads that share a key-value head become the rows of one matrix,
    so that keys and values are read once.
    """
    B, G, S, d = k.shape
    rows = q.reshape(B, G, -1, d)  # (B, G, H/G, d)
    if bias is not None:
        bias = bias[:, :, None].to(q.dtype)
        bias = bias.expand(-1, -1, rows.shape[2], -1)  # (B, 1 or G, H/G, S)

    # as measured on a CPU in bf16, SDPA is faster for small caches only
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or B * G * S < 2500:
        y = sdpa(rows, k, v, attn_mask=bias)
        return y.reshape(q.shape)
    # keys first, as they lie in memory
    logits = k @ (rows * d ** -0.5).transpose(2, 3)
    logits = logits.transpose(2, 3).contiguous()  # (B, G, H/G, S)
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).view(q.shape)


def attention_sdpa(q, k, v, mask=None, bias=None):
    """`attention` by PyTorch's fused kernels, which never store the weights."""
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    if mask is None and S > T:
        # is_causal would align its triangle to the top left; one segment is plain causal
        mask = segment_mask(torch.zeros(1, T, device=q.device))
    if mask is not None:
        mask = F.pad(mask, (S - mask.shape[3], 0), value=True)

    # with a mask, or in fp32, the fast kernels want as many key as query heads
    if mask is not None or q.dtype == torch.float32:
        k = k.repeat_interleave(H // G, 1)
        v = v.repeat_interleave(H // G, 1)
        if bias is not None and bias.shape[1] > 1:
            bias = bias.repeat_interleave(H // G, 1)
    options = {
        "attn_mask": mask,
        "is_causal": mask is None,
        "enable_gqa": k.shape[1] < H,
        "scale": d ** -0.5,
    }
    if bias is None:
        return sdpa(q, k, v, **options)

    # A bias belongs to a key, so it can be one more column of the keys, which
    # meets a one in the queries: q·k + 1·bias. (`scale` divides it by √d.) This
    # needs no mask per head and keeps the fast kernels, which want a width that
    # is a multiple of 8.
    width = 8 - d % 8
    ones = q.new_ones(B, H, T, 1)
    column = (bias * d ** 0.5).to(k.dtype)[..., None]
    column = column.expand(B, k.shape[1], S, 1)
    q = torch.cat([q, F.pad(ones, (0, width - 1))], -1)
    k = torch.cat([k, F.pad(column, (0, width - 1))], -1)
    v = F.pad(v, (0, width))
    return sdpa(q, k, v, **options)[..., :d]


def sdpa(q, k, v, **options):
    """PyTorch's attention. On a GPU the cuDNN kernel is left out: it plans again
    for every new shape, and each text has a shape of its own."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options)
    kernels = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(kernels):
        return F.scaled_dot_product_attention(q, k, v, **options)


def attention_blockwise(q, k, v, mask=None, bias=None, on_weights=None, block=128):
    """`attention` spelled out, a block of queries at a time.

    on_weights: called as on_weights(weights, first) with the attention weights
    (B, G, H/G, t, s) in fp32 of t queries, from query `first` on, over the s
    keys that the last of them may see.
    """
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    n_before = S - T  # keys before the queries' own, or slots, if a mask covers them
    q = (q * d ** -0.5).view(B, G, H // G, T, d)
    keys = k.transpose(2, 3).contiguous()
    softmax_dtype = None
    if on_weights is not None:
        softmax_dtype = torch.promote_types(q.dtype, torch.float32)

    outputs = []
    for first in range(0, T, block):
        rows = q[:, :, :, first:first + block]  # (B, G, H/G, t, d)
        t = rows.shape[3]
        # keys that come later need not be computed
        s = n_before + first + t
        if mask is not None and mask.shape[3] > T:
            s = S  # a mask over reserved slots covers more than the new tokens
        logits = rows.flatten(2, 3) @ keys[..., :s]
        logits = logits.view(B, G, H // G, t, s)

        if mask is None:
            later = logits.new_full((t, t), NEG).triu(1)
            logits[..., n_before + first:] += later
        else:
            first_masked = S - mask.shape[3]
            visible = mask[:, :, None, first:first + t, :s - first_masked]
            logits[..., first_masked:].masked_fill_(~visible, NEG)
        if bias is not None:
            logits = logits + bias[:, :, None, None, :s]

        weights = logits.softmax(-1, dtype=softmax_dtype)
        if on_weights is not None:
            on_weights(weights, first)
        weights = weights.to(v.dtype).flatten(2, 3)
        outputs.append((weights @ v[:, :, :s]).view(B, G, H // G, t, d))
    return torch.cat(outputs, 3).flatten(1, 2)


@dataclass
class TokenLoRA:
    """One layer's low-rank addition to W_Q and W_O, of its own strength for
    each token: part 4 of the method. α = r, so that there is no other scale."""
    strength: torch.Tensor  # (B, T, 1); 0: the token has no LoRA. compress.py sets it
    a_q: torch.Tensor       # (r, D)
    b_q: torch.Tensor       # (H·d, r)
    a_o: torch.Tensor       # (r, H·d)
    b_o: torch.Tensor       # (D, r)

    def query_delta(self, x):
        """(B, T, D) -> (B, T, H·d)"""
        return F.linear(self.strength * F.linear(x, self.a_q), self.b_q)

    def output_delta(self, y):
        """(B, T, H·d) -> (B, T, D)"""
        return F.linear(self.strength * F.linear(y, self.a_o), self.b_o)


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.head_dim = cfg.head_dim
        inner = cfg.n_head * cfg.head_dim
        kv = cfg.n_kv_head * cfg.head_dim
        self.wq = nn.Linear(cfg.n_embd, inner, bias="q" in cfg.bias)
        self.wk = nn.Linear(cfg.n_embd, kv, bias="k" in cfg.bias)
        self.wv = nn.Linear(cfg.n_embd, kv, bias="v" in cfg.bias)
        self.wo = nn.Linear(inner, cfg.n_embd, bias="o" in cfg.bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if cfg.head_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)

    def split_heads(self, x):
        """(B, T, heads·d) -> (B, heads, T, d)"""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, x, rope):
        """(B, T, D) -> keys and values, (B, G, T, d) each"""
        k = self.k_norm(self.split_heads(self.wk(x)))
        return rotate(k, rope), self.split_heads(self.wv(x))

    def forward(self, x, rope, mask, update, token_lora, on_weights):
        """x: (B, T, D) -> (B, T, D), and the new keys and values (B, G, T, d).

        Head groups differ in their number of entries, so each is one call: of its g
        key-value heads and their g·H/G query heads.
        """
        k, v = self.keys_values(x, rope)
        q = self.wq(x)
        if token_lora is not None:
            q = q + token_lora.query_delta(x)
        q = rotate(self.q_norm(self.split_heads(q)), rope)  # (B, H, T, d)

        outputs = []
        queries_per_head = q.shape[1] // k.shape[1]
        first = 0
        groups = [(k, v, None)] if update is None else update(k, v)
        for keys, values, bias in groups:
            end = first + keys.shape[1] * queries_per_head
            own_q = q[:, first:end]
            outputs.append(attention(own_q, keys, values, mask, bias, on_weights))
            first = end
        y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        y = y.transpose(1, 2).flatten(2)  # (B, T, H·d)
        out = self.wo(y)
        if token_lora is not None:
            out = out + token_lora.output_delta(y)
        return out, k, v


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.gate = nn.Linear(cfg.n_embd, cfg.n_ffn, bias=False)
        self.up = nn.Linear(cfg.n_embd, cfg.n_ffn, bias=False)
        self.down = nn.Linear(cfg.n_ffn, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(
        self, h, rope, mask=None, update=None,
        token_lora=None, on_weights=None, kv_only=False,
    ):
        """One layer: h (B, T, D) -> h, and its keys and values (B, G, T, d).

        update: update(k, v) is Cache.update for this layer; None: there is no
            cache.
        kv_only: compute only keys and values, and return h unchanged; a cache
            needs no more of the last layer.
        """
        x = self.attn_norm(h)
        if kv_only:
            return h, *self.attn.keys_values(x, rope)
        y, k, v = self.attn(x, rope, mask, update, token_lora, on_weights)
        h = h + y
        h = h + self.mlp(self.mlp_norm(h))
        return h, k, v


# -------------------------------------------------------------------- the model

class Llama(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        if not cfg.tied:
            self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # keep only the input of each layer for backward, compute the rest again
        self.activation_checkpointing = False
        self.fingerprint = None  # of the weights; see run.checkpoint.base_of
        # of the rotary positions, once they are needed; as a buffer they would be rounded
        self.frequencies = None
        self.captured = None     # the last captured decoding step, and its cache

    @property
    def head_weight(self):
        """(V, D)"""
        return self.embed.weight if self.cfg.tied else self.head.weight

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype

    def rope(self, positions):
        """Cosines and sines for `rotate`: (B, T) -> two (B, 1, T, d)."""
        if self.frequencies is None or self.frequencies.device != positions.device:
            self.frequencies = rope_frequencies(self.cfg, positions.device)
        angles = positions[:, None, :, None].float() * self.frequencies
        cos = angles.cos()
        sin = angles.sin()
        cos = torch.cat([cos, cos], -1).to(self.dtype)
        sin = torch.cat([-sin, sin], -1).to(self.dtype)
        return cos, sin

    def check_position(self, largest: int) -> None:
        if largest >= self.cfg.max_positions:
            raise ValueError(
                f"{largest + 1} tokens are more than the model's "
                f"{self.cfg.max_positions} positions; use a shorter text"
            )

    def run_block(self, layer: int, h, *args, **kwargs):
        block = self.layers[layer]
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(
                block, h, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        return block(h, *args, **kwargs)

    def forward(
        self, tokens, cache: Cache | None = None, segments=None, lengths=None,
        on_weights=None, max_position: int | None = None,
    ):
        """Hidden states of new tokens after the last norm: (B, T, D).

        Call `logits` on those that you need.

        tokens: (B, T) int64, padded on the right.
        cache: what the tokens may look back at. One with reserved slots is
            written to, any other is left as it is.
        segments: (B, T) int64, for several continuations of a cache in one row:
            a token sees its own segment, and every segment starts at the
            cache's next position. -1 is padding. Not allowed together with lengths
            or reserved slots.
        lengths: (B,) int64, the real tokens of each row, where rows differ.
        on_weights: called as on_weights(layer, weights, first_query) with the
            weights of attention; see `attention_blockwise`. The cache, if any,
            must be a full one.
        max_position: a position that no token exceeds, if the caller knows one; it
            is checked in place of the largest position, which a GPU would have to be
            asked for. 0 skips the check.
        Errors: ValueError for more tokens than the model has positions, and for
            segments with lengths or slots.
        """
        has_slots = cache is not None and cache.slots is not None
        if segments is not None and (lengths is not None or has_slots):
            raise ValueError("segments go neither with lengths nor with reserved slots")
        positions = relative_positions(tokens, segments)
        if lengths is not None:
            positions = positions.minimum(lengths[:, None] - 1)  # padding must not count
        if cache is not None:
            positions = positions + cache.next_position[:, None]
        if max_position is None:
            real = positions if segments is None else positions[segments >= 0]
            max_position = int(real.max()) if real.numel() else 0
        self.check_position(max_position)
        rope = self.rope(positions)

        mask = None
        index = None
        if segments is not None:
            mask = segment_mask(segments)
        if has_slots:
            index, mask = self.open_slots(tokens, cache.slots, lengths)

        h = self.embed(tokens)
        update = None
        for layer in range(self.cfg.n_layer):
            if cache is not None:
                update = partial(cache.update, layer, index)
            watch = None if on_weights is None else partial(on_weights, layer)
            h, _, _ = self.run_block(layer, h, rope, mask, update, on_weights=watch)

        if has_slots:
            cache.advance(tokens.shape[1], lengths)
        return self.norm(h)

    def open_slots(self, tokens, slots: "Slots", lengths):
        """Make the slots of new tokens visible.

        Returns: where the tokens are to be written in each layer, (L, G·T), and their
        mask over all n slots, (1, 1, T, n): a token sees the slots up to its own.
        """
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        own = slots.n_written + columns  # (T,)
        is_padding = torch.zeros_like(tokens, dtype=torch.bool)
        if lengths is not None:
            is_padding = columns >= lengths[:, None]
        slots.reveal(own, is_padding[:, None])

        all_slots = torch.arange(slots.n, device=tokens.device)
        mask = all_slots <= own[:, None]  # (T, n)
        index = slots.starts[..., None] + own  # (L, G, T)
        return index.flatten(1), mask[None, None]

    def logits(self, h):
        """(..., D) -> (..., V): computed in the model's dtype, then converted to fp32."""
        return F.linear(h, self.head_weight).float()

    def run_layers(
        self, h, first=0, end=None, token_lora=None, store=None, positions=None,
    ):
        """Run layers first … end−1 over whole contexts, and collect keys and values.

        h: (B, N, D), hidden states before layer `first`; padding on the right.
        end: None for the end of the model; of its last layer only keys and
            values are computed, as no cache needs more.
        token_lora(layer): the layer's TokenLoRA, or None.
        store(layer, k, v): called with each layer's keys and values,
            (B, G, N, d); what it returns is collected. None: the pair itself.
        positions: (B, N) int64, of the tokens; None: 0 … N−1.
        Returns: the hidden states after these layers (the model's last does not
            change them), and the list.
        Errors: ValueError for more tokens than the model has positions; `positions`,
            if given, are not checked.
        """
        N = h.shape[1]
        if positions is None:
            self.check_position(N - 1)
            positions = torch.arange(N, device=h.device)[None]
        rope = self.rope(positions)
        if end is None:
            end = self.cfg.n_layer

        stored = []
        for layer in range(first, end):
            h, k, v = self.run_block(
                layer, h, rope,
                token_lora=token_lora and token_lora(layer),
                kv_only=layer == self.cfg.n_layer - 1,
            )
            stored.append((k, v) if store is None else store(layer, k, v))
        return h, stored

    @torch.no_grad()
    def prefill(self, tokens, lengths=None) -> Cache:
        """The full cache of contexts (B, N) int64, padded on the right."""
        _, kvs = self.run_layers(self.embed(tokens))
        return full_cache(kvs, lengths)

    @torch.no_grad()
    def extend(self, cache: Cache, tokens) -> Cache:
        """The cache after it has read more tokens, (B, T) int64, which become
        entries of every head. The given cache stays as it was."""
        T = tokens.shape[1]
        longer = cache.reserve(T)
        self(tokens, longer)
        new = cache.next_position[:, None, None] + torch.arange(T, device=tokens.device)

        def with_entries(before: HeadGroup, after: HeadGroup) -> HeadGroup:
            shared = new.expand(-1, before.positions.shape[1], -1).to(torch.int32)
            positions = torch.cat([before.positions, shared], 2)
            bias = before.bias
            if bias is not None:
                bias = F.pad(bias, (0, T))
            return HeadGroup(after.k, after.v, positions, bias)

        layers = []
        for before, after in zip(cache.layers, longer.layers):
            layers.append([with_entries(*pair) for pair in zip(before, after)])
        return Cache(layers, longer.next_position)


# --------------------------------------------------------------- public weights

RENAMED = {
    "model.": "",
    "embed_tokens": "embed",
    "self_attn.": "attn.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "lm_head": "head",
}


def hf_to_ours(name: str) -> str:
    """The name of a tensor in the Hugging Face layout -> its name here."""
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def local_shard(tensor) -> tuple[torch.Tensor, int]:
    """The rows of a parameter that this process holds, and the first one's
    number: all of them, unless FSDP has spread the parameter."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh = tensor.device_mesh
    rows_per_process = math.ceil(tensor.shape[0] / mesh.size())
    first = mesh.get_local_rank() * rows_per_process
    return tensor.to_local(), min(tensor.shape[0], first)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that an index names."""
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise ValueError(
            f"{folder}: neither model.safetensors nor its index .json; "
            "download the weights again"
        )
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in sorted(set(weight_map.values()))]


def load_llama(folder, device="cpu", dtype=torch.float32, shard=None) -> Llama:
    """A frozen model from a folder with config.json and model.safetensors.

    The model is made without memory ("meta"), and each tensor is copied into
    place while it is read. run.loading.load_checked checks the files first, and then
    calls this.
    shard: called with the model while it has no memory, to spread its
        parameters over processes by rows; each then reads its own rows.
    Errors: ValueError for a parameter that the files do not have.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Llama(Config.from_json(folder / "config.json"))
    model = model.to(dtype).requires_grad_(False).eval()
    if shard is not None:
        shard(model)

    parameters = dict(model.to_empty(device=device).named_parameters())
    missing = set(parameters)
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                name = hf_to_ours(key)
                if name not in parameters:
                    continue  # rotary tables of old files, a tied head
                missing.discard(name)
                rows, first = local_shard(parameters[name])
                rows.copy_(tensors.get_slice(key)[first:first + len(rows)])
    if missing:
        raise ValueError(f"{folder}: no tensor for {min(missing)}; download the weights again")
    return model


# ------------------------------------------------- slots: room for new tokens

@dataclass
class Slots:
    """Room for n new tokens behind every head of a cache.

    The keys of a layer are one tensor, head after head, so that new ones are
    written to all heads at once; its head groups are views of it:

        layer 18   [head 1: ▮▮▮▮▮▮▮▮▮▮▮▮▯▯▯, head 2: ▮▮▮▮▯▯▯, head 3: ▮▮▮▮▯▯▯]

    A bias of NEG hides a slot until it is written. How many are written is a tensor, not
    a Python number, so that a CUDA graph can repeat a decoding step.
    """
    n: int
    n_written: torch.Tensor     # (1,) int64
    starts: torch.Tensor        # (L, G) int64: where each head's slots start
    keys: list[torch.Tensor]    # of each layer: (B, entries of all heads, d)
    values: list[torch.Tensor]
    biases: list[torch.Tensor]  # (B, 1 or g, S or more) each, without repetition

    def reveal(self, index, is_padding) -> None:
        """Make the slots `index` (T,) visible, but not where the new token is padding.

        is_padding: (B, 1, T) bool.
        """
        new = torch.where(is_padding, NEG, 0.0).to(self.biases[0].dtype)
        for bias in self.biases:
            own = new.expand(-1, bias.shape[1], -1)
            bias[:, :, -self.n:].index_copy_(2, index, own)


def add_slots(groups: list[HeadGroup], extra: int):
    """A layer with `extra` free slots behind every head.

    Returns: its head groups, whose keys and values are views; the keys and the
    values of the layer, (B, entries of all heads, d); and where in these the
    slots of each head start: G numbers.
    """
    sizes = [group.k.shape[1] * (group.k.shape[2] + extra) for group in groups]
    B, _, _, d = groups[0].k.shape
    k = groups[0].k.new_zeros(B, sum(sizes), d)
    v = torch.zeros_like(k)

    views = []
    starts = []
    first = 0
    for group, own_k, own_v in zip(groups, k.split(sizes, 1), v.split(sizes, 1)):
        _, g, S, _ = group.k.shape
        own_k = own_k.unflatten(1, (g, S + extra))
        own_v = own_v.unflatten(1, (g, S + extra))
        own_k[:, :, :S] = group.k
        own_v[:, :, :S] = group.v
        positions = F.pad(group.positions, (0, extra), value=-1)
        # add_biases will lengthen the bias
        views.append(HeadGroup(own_k, own_v, positions, group.bias))
        for _ in range(g):
            starts.append(first + S)
            first += S + extra
    return views, k, v, starts


def add_biases(groups: list[HeadGroup], extra: int) -> list[torch.Tensor]:
    """Give every group of a cache a bias that hides its last `extra` entries.

    A group's own bias is padded. A group without one needs zeros, and NEG for its
    slots. Seen from the end, these look the same for all groups. So groups share one
    long tensor, and each takes its last S numbers (S: entries, slots included). GPU
    kernels want these to start at a multiple of 8, hence one tensor for each S mod 8.
    Returns: the different tensors.
    """
    longest = max(group.k.shape[2] for group in groups)
    biases = []
    shared = {}
    for group in groups:
        B, _, S, _ = group.k.shape
        if group.bias is not None:
            bias = group.bias.to(group.k.dtype)
            group.bias = aligned(F.pad(bias, (0, extra), value=NEG))
            biases.append(group.bias)
            continue
        if S % 8 not in shared:
            bias = group.k.new_zeros(B, 1, longest + (S - longest) % 8)
            bias[..., bias.shape[2] - extra:] = NEG
            shared[S % 8] = aligned(bias)
            biases.append(shared[S % 8])
        group.bias = shared[S % 8][..., -S:]
    return biases


def aligned(bias):
    """The same, with rows that start at multiples of 8 numbers in memory."""
    S = bias.shape[-1]
    return F.pad(bias, (0, -S % 8))[..., :S]


# ------------------------------------------------------------------- generation

def pad_right(rows: list[list[int]], device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> tokens (B, T) int64, padded with 0, and lengths (B,)."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens.to(device), lengths.to(device)


def sample(logits, temperature: float, rng):
    """The next token of each row: (B, V) -> (B,). Temperature 0 is greedy.

    −1 stands for a row whose logits are not finite.
    """
    is_finite = logits.isfinite().all(-1)
    if temperature == 0:
        new = logits.argmax(-1)
    else:
        # the largest becomes 0, so that a tiny temperature makes no number infinite
        logits = logits - logits.amax(-1, keepdim=True)
        probabilities = (logits / max(temperature, 1e-6)).softmax(-1)
        probabilities = probabilities.nan_to_num(1.0)  # rows that become −1 below
        # torch.multinomial without its checks, which would wait for a GPU
        noise = torch.empty_like(probabilities).exponential_(generator=rng)
        new = (probabilities / noise).argmax(-1)
    return torch.where(is_finite, new, -1)


def decode_step(model: Llama, tokens, cache: Cache):
    """Logits (B, V) after one more token of each row, tokens (B,).

    Every step is the same computation on tensors of the same shapes, whatever
    was written before.
    """
    # 0 passes the check of positions, which `generate` has made for all steps
    h = model(tokens[:, None], cache, max_position=0)
    return model.logits(h[:, -1])


def next_token(model: Llama, cache: Cache, temperature: float, rng, tokens):
    """(B,) tokens -> the (B,) tokens that follow them."""
    return sample(decode_step(model, tokens, cache), temperature, rng)


class CapturedStep:
    """A decoding step on a GPU, captured once and then replayed.

    A step of a model with 30 layers is about a thousand kernels, and if the model is
    small, starting them takes longer than running them. A CUDA graph starts all of
    them at once. It always works on the same memory: the tokens, the cache and the
    result. The weights must stay where they are, too.
    """

    def __init__(self, step, cache: Cache, rng, layout: list):
        """step: (B,) tokens -> the result, from `cache` and `rng` alone.

        layout: what another cache must have in common with this one; see `capture`.
        """
        self.layout = layout
        self.cache = cache
        self.rng = rng
        self.tokens = torch.zeros_like(cache.next_position)
        n_written = cache.slots.n_written.clone()
        next_position = cache.next_position.clone()
        random_state = rng.get_state()

        # One real step first: libraries allocate memory in their first call, which a
        # capture must not.
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            step(self.tokens)
        torch.cuda.current_stream().wait_stream(side_stream)

        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(rng)
        with torch.cuda.graph(self.graph):
            self.result = step(self.tokens)

        # undo what the real step counted; capturing runs nothing
        cache.slots.n_written.copy_(n_written)
        cache.next_position.copy_(next_position)
        rng.set_state(random_state)

    def __call__(self, tokens):
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.result

    def start(self, cache: Cache, rng) -> None:
        """Use the graph for another cache, which has the same layout."""
        for own, other in zip(self.cache.state(), cache.state()):
            own.copy_(other)
        self.rng.set_state(rng.get_state())


@torch.inference_mode()
def generate(
    model: Llama, cache: Cache, prompts: list[list[int]], max_new_tokens: int = 64,
    stop_ids=frozenset(), temperature: float = 0.0, seed: int = 0,
) -> Iterator[list[int | None]]:
    """Continue each prompt after its row of the cache.

    Yields one new token per row, None for a row that has ended. A stop token
    ends its row and is not yielded; the model's last position ends all rows.
    The cache stays as it was. Prompts may differ in length.
    Errors: ValueError for an empty prompt, for one beyond the model's
    positions, and for logits that are not finite.
    """
    if not all(prompts):
        raise ValueError("an empty prompt cannot be continued; ask something")
    tokens, lengths = pad_right(prompts, model.device)
    longest = int((cache.next_position + lengths).max())
    # the last token needs no position: nothing follows it
    max_new_tokens = min(max_new_tokens, model.cfg.max_positions - longest + 1)

    cache = cache.reserve(tokens.shape[1] + max(0, max_new_tokens))
    h = model(tokens, cache, lengths=lengths)
    logits = model.logits(h[torch.arange(len(prompts)), lengths - 1])  # (B, V)
    rng = torch.Generator(model.device).manual_seed(seed)
    new = sample(logits, temperature, rng)  # (B,)

    if model.device.type == "cuda" and max_new_tokens > 1:
        step = capture(model, cache, temperature, rng)
    else:
        step = partial(next_token, model, cache, temperature, rng)
    del cache  # a replayed step has its own copy, so this one can be freed

    alive = [True] * len(prompts)
    for i in range(max_new_tokens):
        ids = new.tolist()  # the only time that a step waits for the device
        if -1 in ids:
            raise ValueError(
                "the logits are not finite: weights or adapter are damaged, "
                "or try --dtype fp32"
            )
        alive = [a and token not in stop_ids for a, token in zip(alive, ids)]
        if not any(alive):
            break
        yield [token if a else None for a, token in zip(alive, ids)]
        if i + 1 < max_new_tokens:
            new = step(new)
    if isinstance(step, CapturedStep):
        model.captured = step  # for the next call


def capture(model: Llama, cache: Cache, temperature: float, rng) -> CapturedStep:
    """A CapturedStep for this cache: that of the last call, if it fits."""
    layout = [cache.layout(), temperature]
    previous = model.captured
    model.captured = None  # nobody else may use it meanwhile
    if previous is not None and previous.layout == layout:
        previous.start(cache, rng)
        return previous
    del previous  # and its cache, before another one is captured

    step = partial(next_token, model, cache, temperature, rng)
    return CapturedStep(step, cache, rng, layout)


def answer(
    model: Llama, tokenizer, cache: Cache, questions: list[str],
    max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0,
) -> list[str]:
    """Answers to questions about one cached context. See `answer_ids`."""
    answers = answer_ids(
        model, tokenizer, cache, questions, max_new_tokens, temperature, seed
    )
    return [tokenizer.decode(ids).strip() for ids in answers]


def answer_ids(
    model: Llama, tokenizer, cache: Cache, questions: list[str],
    max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0,
) -> list[list[int]]:
    """Answers as token ids, without the one that ends them. All questions are
    asked in one ragged batch.

    tokenizer: anything with ask(question), decode(ids) and stop_ids.
    cache: of one row.
    """
    rows = cache.rows([0] * len(questions))
    prompts = [tokenizer.ask(question) for question in questions]
    steps = list(generate(
        model, rows, prompts, max_new_tokens, tokenizer.stop_ids, temperature, seed
    ))
    return [
        [step[i] for step in steps if step[i] is not None]
        for i in range(len(questions))
    ]
