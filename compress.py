"""KV-Distill: compress the cache of a long context, before any question is known.

The method (arXiv 2503.10337) has five parts. Four are here, in this order, and
the fifth, the loss, is in train.py:
  1. Scorer           a small network reads each token's hidden state after
                      layer η and gives a score for every head
  2. select, gather   the highest scores of all heads together are kept, under
                      one shared budget
  3. decay            attention to an entry is decayed by its score, so that the
                      gradient of the loss reaches the scorer
  4. TokenLoRA        while the context is encoded, kept tokens go through
                      LoRA-adapted W_Q and W_O
`Compressor` puts them together. As a program, this file compresses a text and
answers questions about it:

    python compress.py --keep 0.1 --question "Who built the lighthouse?"

How a gradient passes through a top-k selection, in ten lines (part 3):

>>> import torch
>>> from compress import decay, select
>>> from model import attention
>>> scores = torch.tensor([[[[2.0, 1.0, -1.0, 0.0]]]], requires_grad=True)
>>> selection = select(scores, torch.ones(1, 4, dtype=torch.bool), torch.tensor([2]))
>>> beta = decay(scores, selection, "threshold", tau=0.5)
>>> q, k, v = torch.arange(72.0).sin().view(1, 1, 9, 8).split([1, 4, 4], dim=2)
>>> loss = attention(q, k, v, bias=beta[:, 0]).square().sum()
>>> loss.backward()
>>> scores.grad.flatten() != 0  # a hard step: the two kept entries
tensor([ True,  True, False, False])

With `soft=True` in `decay`, all four have a gradient.

Shapes: B batch, N context tokens, K kept tokens per head on average, L layers,
G key-value heads per layer, d head width, D model width, r LoRA rank. Scores,
selections and biases are (B, l, g, N). With a selection per head, l = L and
g = G. With a selection per token, the paper's way, l = g = 1.
"""
import argparse
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports just ends them

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import NEG, Cache, HeadGroup, Llama, TokenLoRA, answer, full_cache
from run.checkpoint import ROOT, cache_header, load_cache, read_adapter, save_cache
from run.errors import BadInput, Parser, read_json, reading, run_program
from run.html_report import highlight, kept_map, make_report, write_report
from run.loading import add_model_flags, model_name, open_model, seed_flag


@dataclass
class CompressorConfig:
    selection: str = "head"      # "head": each head keeps tokens of its own;
                                 # "token": all heads keep the same, as in the paper
    eta: int = 6                 # the scorer reads hidden states after this layer
    hidden: int = 1024           # width of the scorer's hidden layer
    recent: int = 4              # every head keeps its last tokens: K/8 of them,
                                 # at least 1, at most this many ("head" only)
    decay: str = "threshold"     # or "sigmoid", the paper's
    tau: float = 0.5             # temperature of "threshold", in nats of score
    rank: int = 32               # of LoRA on W_Q and W_O
    routing_strength: str = "growing"  # with the compression; or "full", the paper's
    registers: int = 0           # tokens that are read behind the document, and
                                 # kept in every head, to carry what is dropped
    register_id: int = 0         # their token: train.py takes a blank line


# ------------------------------------------------------------ part 1: the scorer

class Scorer(nn.Module):
    """s = W₂·GELU(W₁·x), in fp32: a score for each token and head.

    x is the RMS-normalised hidden state, and how many tokens stand after and
    before it: a causal hidden state cannot know how much text is still to come.
    """

    def __init__(self, n_embd: int, hidden: int, n_layer: int, n_kv_head: int):
        super().__init__()
        self.heads = (n_layer, n_kv_head)
        self.w1 = nn.Linear(n_embd + 2, hidden)
        self.w2 = nn.Linear(hidden, n_layer * n_kv_head)

    def forward(self, h, lengths):
        """h: (B, N, D), of contexts of `lengths` (B,) tokens -> (B, l, g, N)."""
        dtype = self.w1.weight.dtype
        before = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
        after = (lengths[:, None] - 1 - before).clamp(min=0)
        distances = torch.stack([after, before], -1).to(dtype).log1p()

        x = F.rms_norm(h.to(dtype), h.shape[-1:])
        x = torch.cat([x, distances], -1)      # (B, N, D + 2)
        scores = self.w2(F.gelu(self.w1(x)))   # (B, N, l·g)
        return scores.transpose(1, 2).unflatten(1, self.heads)


# ----------------------------------------------- part 2: selection under a budget

def kept_count(n, keep: float | None = None, tokens: int | None = None):
    """K, the number of tokens that each head keeps on average.

    n: (B,) int64, compressible tokens. Give either keep, the kept fraction, or
    tokens, an absolute number. K = ceil(keep·n), never more than n: (B,) int64.
    """
    if (keep is None) == (tokens is None):
        raise BadInput("give either keep (a fraction) or tokens (a number), not both")
    if keep is not None and not 0 < keep <= 1:
        raise BadInput(f"keep is {keep}, expected a fraction such as 0.1, at most 1")
    if tokens is not None and tokens < 1:
        raise BadInput(f"tokens is {tokens}, expected at least 1")
    if keep is None:
        return n.clamp(max=min(tokens, 1 << 62))
    # on the CPU, as not every device has float64
    k = (keep * n.cpu().double() - 1e-9).ceil().clamp(min=1).long()
    return k.to(n.device).minimum(n)


@dataclass
class Selection:
    """Which entries of the cache are kept."""
    kept: torch.Tensor        # (B, l, g, N) bool, without the protected tokens
    not_scored: torch.Tensor  # (B, 1, 1, N) bool, what no score can change:
                              # recent tokens, protected tokens, and padding
    theta: torch.Tensor       # (B, 1, 1, 1) fp32, the threshold: midway between
                              # the last kept score and the next
    registers: torch.Tensor | None = None  # (B, N) bool, if there are any

    @property
    def head_fraction(self):
        """The fraction of a layer's heads that keep a token: (B, l, N) fp32.

        With registers, these are kept by all, and the recent tokens do not
        count: they are kept whatever they say, and have to stay what they are.
        """
        if self.registers is None:
            return self.kept.float().mean(2)
        fraction = (self.kept & ~self.not_scored).float().mean(2)
        return torch.where(self.registers[:, None], 1.0, fraction)


def select(scores, compressible, k, recent=0, check: bool = True) -> Selection:
    """Part 2: keep the k·l·g highest scores of each row, of all heads together.

    scores: (B, l, g, N) fp32. Of equal ones, the earlier layer, head and token
        goes first.
    compressible: (B, N) bool, the tokens to select from.
    k: (B,) int64, kept tokens per head on average.
    recent: how many of the last tokens every head keeps; an int or (B,) int64.
    check: whether to look for scores that are not finite.
    Errors: BadInput, with `check`, for a score that is not finite.
    """
    B, l, g, N = scores.shape
    scores = scores.detach()
    others = ~compressible[:, None, None]
    if check and not scores.masked_fill(others, 0).isfinite().all():
        raise BadInput(
            "a score is not finite; the adapter is damaged, or its training "
            "diverged: use a lower --scorer-lr"
        )

    # every head's recent tokens come first, what is not compressible last
    from_end = compressible.flip(1).cumsum(1).flip(1)  # 1 for the last token
    is_recent = compressible & (from_end <= k.clamp(max=recent)[:, None])
    is_recent = is_recent[:, None, None]
    ranked = scores.masked_fill(is_recent, math.inf).masked_fill(others, -math.inf)

    # (B, l·g·N): the heads of a row, one after the other
    ranked, order = ranked.flatten(1).sort(dim=1, descending=True, stable=True)
    budget = (k * l * g)[:, None]
    rank = torch.arange(l * g * N, device=k.device)
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    kept.scatter_(1, order, rank < budget)

    last = ranked.gather(1, (budget - 1).clamp(min=0))
    next_ = ranked.gather(1, budget.clamp(max=l * g * N - 1))
    last = torch.where(last == math.inf, next_ + 1, last)      # all kept are recent
    next_ = torch.where(next_ == -math.inf, last - 1, next_)   # nothing is dropped
    theta = ((last + next_) / 2)[..., None, None]
    return Selection(kept.view_as(scores), is_recent | others, theta)


def gather(keep_mask, beta=None):
    """Part 2: how a layer's keys and values become a compressed cache.

    Returns store(layer, k, v), which takes the keys and values (B, G, N, d) of a
    layer and returns its head groups. Neighbouring heads that keep equally many
    entries share a group. Rows of a batch that keep fewer are padded.

    keep_mask: (B, L or 1, G or 1, N) bool, all that is kept.
    beta: as large, fp32, a bias of the kept entries; or None.
    """
    counts = keep_mask.sum(-1)  # (B, l, g)
    # kept tokens first, in their order
    order = keep_mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    is_kept = torch.arange(keep_mask.shape[-1], device=keep_mask.device) < counts[..., None]
    positions = torch.where(is_kept, order, -1).to(torch.int32)
    most = counts.amax(0).tolist()    # entries of each head, in its longest row
    least = counts.amin(0).tolist()
    per_head = keep_mask.shape[2] > 1

    def store(layer: int, k, v) -> list[HeadGroup]:
        if len(most) == 1:
            layer = 0  # one selection for all layers
        row = torch.arange(k.shape[0], device=k.device)[:, None, None]
        head = torch.arange(k.shape[1], device=k.device)[:, None]

        groups = []
        for size, same in groupby(range(len(most[layer])), key=most[layer].__getitem__):
            same = list(same)
            heads = slice(same[0], same[-1] + 1)
            group_positions = positions[:, layer, heads, :size].clone()  # (B, g, S)
            index = group_positions.clamp(min=0)
            own_heads = head[heads] if per_head else head
            bias = None
            if beta is not None:
                bias = beta[:, layer, heads].gather(2, order[:, layer, heads, :size])
            if bias is not None or min(least[layer][heads]) < size:
                real = 0.0 if bias is None else bias
                bias = torch.where(group_positions < 0, NEG, real)
            groups.append(HeadGroup(
                k[row, own_heads, index], v[row, own_heads, index],  # (B, g, S, d)
                group_positions, bias,
            ))
        return groups

    return store


# ------------------------------------------- part 3: decay, which carries the gradient

def decay(scores, selection: Selection, kind: str, tau: float, soft: bool = False):
    """Part 3: β, which is added to every attention logit towards an entry.

    A selection has no gradient. β has one, and this is its way to the scorer:

        Scorer → scores → decay → β → full_cache(…, bias=β) → attention → loss

    kind "sigmoid": β = log σ(s), also in the finished cache.
    kind "threshold": β = log σ((s − θ)/τ), with θ as a constant: no gradient
        passes through it. For θ = −4, τ = 0.5, the scores −3, −4.2 and −7
        become −0.13, −0.91 and −6.0.
    soft: nothing is dropped, and every entry is decayed by its β. Otherwise (a
        hard step, and a finished cache) dropped entries have −1e9, and under
        "threshold" the *value* of β is 0 for kept ones, which leaves its
        gradient.
    Returns: (B, l, g, N) fp32; 0 for recent and protected tokens.
    """
    if kind == "sigmoid":
        beta = F.logsigmoid(scores)
    else:
        beta = F.logsigmoid((scores - selection.theta) / tau)
    beta = torch.where(selection.not_scored, 0.0, beta)
    if soft:
        return beta
    if kind == "threshold":
        beta = beta - beta.detach()
    return torch.where(selection.kept | selection.not_scored, beta, NEG)


# -------------------------------------------------- what the scorer learns to predict

@torch.no_grad()
def max_attention(
    model: Llama, cache: Cache, tokens, lengths=None, segments=None,
    first: int = 0, end: int | None = None, sinks: int = 0,
    max_position: int | None = None,
):
    """The most attention that entries of a full cache get from any of `tokens`.

    The maximum is over the tokens and over the query heads of a group. With
    tokens that repeat the context, this is KVzip's importance score (arXiv
    2505.23416).

    tokens: (B, T) int64, padded on the right to `lengths` (B,) or with -1 in
        `segments`; see Llama.forward.
    first, end: look at entries first … end−1. Attention is then counted as if
        only these, the first `sinks` entries and the tokens themselves existed.
    Returns: (B, L, G, end − first) fp32.
    """
    S = cache.layers[0][0].k.shape[2]
    if end is None:
        end = S
    is_token = None
    if segments is not None:
        is_token = segments >= 0  # (B, T)
    elif lengths is not None:
        is_token = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    best = {}

    def on_weights(layer: int, weights, first_query: int):  # (B, G, H/G, t, s)
        received = weights[..., first:end]
        if end - first < S:
            visible = received.sum(-1) + weights[..., S:].sum(-1)
            visible = visible + weights[..., :min(sinks, first)].sum(-1)
            received = received / visible.clamp(min=1e-30)[..., None]
        if is_token is not None:
            queries = is_token[:, first_query:first_query + weights.shape[3]]
            received = received.masked_fill(~queries[:, None, None, :, None], 0)
        received = received.amax((2, 3))  # (B, G, end − first)
        if layer in best:
            received = torch.maximum(best[layer], received)
        best[layer] = received

    model(tokens, cache, segments, lengths, on_weights, max_position)
    return torch.stack(list(best.values()), 1)


# -------------------------------------------------------------------- the method

@dataclass
class Context:
    """Documents that were read up to layer η, padded on the right."""
    h: torch.Tensor             # (B, N, D), hidden states after layer η
    kvs: list                   # keys and values of layers 1 … η, (B, G, N, d) each
    tokens: torch.Tensor        # (B, N) int64
    lengths: torch.Tensor       # (B,) int64, real tokens of each row
    compressible: torch.Tensor  # (B, N) bool; the others are padding or protected
    padded: bool                # whether rows differ in length
    n_registers: int = 0        # the last tokens of each row, not compressible

    @property
    def protected(self):
        """The tokens that every head keeps by rule: (B, N) bool."""
        columns = torch.arange(self.h.shape[1], device=self.h.device)
        return (columns < self.lengths[:, None]) & ~self.compressible

    @property
    def registers(self):
        """(B, N) bool"""
        columns = torch.arange(self.h.shape[1], device=self.h.device)
        ends = self.lengths[:, None]
        return (columns >= ends - self.n_registers) & (columns < ends)

    def without_registers(self) -> "Context":
        """The documents alone, as any other method reads them."""
        if self.n_registers == 0:
            return self
        N = self.h.shape[1] - self.n_registers
        return Context(
            self.h[:, :N], [(k[:, :, :N], v[:, :, :N]) for k, v in self.kvs],
            self.tokens[:, :N], self.lengths - self.n_registers,
            self.compressible[:, :N], self.padded,
        )

    def full_cache(self, kvs, bias=None) -> Cache:
        return full_cache(kvs, self.lengths if self.padded else None, bias)


class Compressor(nn.Module):
    """All that is trained, in fp32: the scorer and the LoRA matrices.

    The Llama is an argument of the methods, and stays frozen. Layers η+1 … L−1
    have LoRA: in layer L it would reach no key or value.
    """

    def __init__(self, model_cfg, cfg: CompressorConfig):
        super().__init__()
        check_compressor_config(cfg, model_cfg.n_layer)
        self.cfg = cfg
        heads = (1, 1)
        if cfg.selection == "head":
            heads = (model_cfg.n_layer, model_cfg.n_kv_head)
        self.scorer = Scorer(model_cfg.n_embd, cfg.hidden, *heads)
        # about the mean of a log attention weight; or a σ(s) near 1
        start = -4.0 if cfg.decay == "threshold" else 4.0
        nn.init.constant_(self.scorer.w2.bias, start)

        # A ~ N(0, 1/D) and B = 0, so that at first LoRA changes nothing
        n = self.n_adapted(model_cfg, cfg)
        D = model_cfg.n_embd
        inner = model_cfg.n_head * model_cfg.head_dim
        self.a_q = nn.Parameter(torch.randn(n, cfg.rank, D) * D ** -0.5)
        self.b_q = nn.Parameter(torch.zeros(n, inner, cfg.rank))
        self.a_o = nn.Parameter(torch.randn(n, cfg.rank, inner) * D ** -0.5)
        self.b_o = nn.Parameter(torch.zeros(n, D, cfg.rank))

    @staticmethod
    def n_adapted(model_cfg, cfg: CompressorConfig) -> int:
        """The number of layers with LoRA."""
        return model_cfg.n_layer - 1 - cfg.eta

    def lora_parameters(self) -> list[nn.Parameter]:
        return [self.a_q, self.b_q, self.a_o, self.b_o]

    @torch.no_grad()
    def read(self, model: Llama, tokens, lengths=None, protect=None) -> Context:
        """Read contexts up to layer η.

        tokens: (B, N) int64, padded on the right to `lengths` (B,), if given.
        protect: (B, N) bool, tokens that every head keeps.
        """
        B, N = tokens.shape
        padded = lengths is not None
        if not padded:
            lengths = torch.full((B,), N, device=tokens.device)
        compressible = torch.arange(N, device=tokens.device) < lengths[:, None]
        if protect is not None:
            compressible = compressible & ~protect

        R = self.cfg.registers
        if R > 0:
            columns = lengths[:, None] + torch.arange(R, device=tokens.device)
            tokens = F.pad(tokens, (0, R)).scatter(1, columns, self.cfg.register_id)
            lengths = lengths + R
            compressible = F.pad(compressible, (0, R))
        h, kvs = model.run_layers(model.embed(tokens), 0, self.cfg.eta)
        return Context(h, kvs, tokens, lengths, compressible, padded, R)

    @torch.no_grad()
    def full_cache(self, model: Llama, ctx: Context) -> Cache:
        """The full cache of the documents, without registers: the frozen layers
        after η read the same hidden states."""
        ctx = ctx.without_registers()
        _, kvs = model.run_layers(ctx.h, self.cfg.eta)
        return ctx.full_cache(ctx.kvs + kvs)

    def scores(self, ctx: Context):
        """(B, l, g, N) fp32"""
        return self.scorer(ctx.h, ctx.lengths - ctx.n_registers)

    def select(self, scores, ctx: Context, k, check: bool = True) -> Selection:
        """`select` with this compressor's number of recent tokens.

        k: (B,) int64, kept tokens per head on average, registers included.
        """
        if ctx.n_registers > 0:
            k = (k - ctx.n_registers).clamp(min=1)
        recent = 0
        if self.cfg.selection == "head":
            recent = (k // 8).clamp(1, self.cfg.recent)
        selection = select(scores, ctx.compressible, k, recent, check)
        if ctx.n_registers > 0:
            selection.registers = ctx.registers
        return selection

    def routing_strength(self, n, k):
        """The strength of LoRA by how much is dropped: (B,) fp32, from 0 to 1.

        n, k: (B,) int64, compressible tokens and how many of them are kept.
        "full": 1 as soon as a token is dropped. "growing": 0 up to 4×, where
        LoRA costs more than it brings, then with the logarithm of the
        compression, up to 1 at 100×.
        """
        if self.cfg.routing_strength == "full":
            return (k < n).float()
        compression = n.clamp(min=1) / k.clamp(min=1)
        return ((compression / 4).log() / math.log(25)).clamp(0, 1)

    def token_lora(self, selection: Selection, n, k, dtype):
        """Part 4: a function that maps a layer to its TokenLoRA, or to None.

        A token has the strength of the fraction of the *next* layer's heads that
        keep it: theirs are the first keys and values that LoRA changes.
        """
        strength = selection.head_fraction * self.routing_strength(n, k)[:, None, None]
        strength = strength.to(dtype)[..., None]  # (B, l, N, 1)

        def of_layer(layer: int) -> TokenLoRA | None:
            i = layer - self.cfg.eta
            if not 0 <= i < len(self.a_q):
                return None
            next_layer = layer + 1 if strength.shape[1] > 1 else 0
            matrices = [x[i].to(dtype) for x in self.lora_parameters()]
            return TokenLoRA(strength[:, next_layer], *matrices)

        return of_layer

    def encode(self, model: Llama, ctx: Context, selection: Selection, k, store=None) -> list:
        """Part 4: encode the context above layer η, its kept tokens with LoRA.

            layer   1 … η             η+1 … L−1                L
                    read once, for    dropped tokens: frozen   keys and values
                    full and          kept tokens: frozen      only
                    compressed cache  plus LoRA

        store(layer, k, v): see Llama.run_layers. Returns what it returned, for
        all layers.
        """
        lower = ctx.kvs
        if store is not None:
            lower = [store(layer, k_, v) for layer, (k_, v) in enumerate(ctx.kvs)]
        n = ctx.compressible.sum(1)
        lora = self.token_lora(selection, n, k, model.dtype)
        _, upper = model.run_layers(ctx.h, self.cfg.eta, token_lora=lora, store=store)
        return lower + upper

    def compress(self, model: Llama, ctx: Context, keep=None, tokens=None, scores=None) -> Cache:
        """The compressed cache of a context. keep = 1 gives the full cache.

        keep, tokens: see `kept_count`.
        scores: (B, l, g, N), to select by other scores than the scorer's; of
            the documents alone.
        """
        n = ctx.compressible.sum(1)
        k = kept_count(n, keep, tokens)
        if bool((k == n).all()):
            return self.full_cache(model, ctx)
        if scores is None:
            own_scores = self.scores(ctx)
        else:
            own_scores = F.pad(scores, (0, ctx.n_registers))
        selection = self.select(own_scores, ctx, k)

        beta = None
        if self.cfg.decay == "sigmoid" and scores is None:
            beta = decay(own_scores, selection, "sigmoid", self.cfg.tau)
            decayed = selection.kept & (k < n)[:, None, None, None]
            beta = torch.where(decayed, beta, 0.0)
        store = gather(selection.kept | ctx.protected[:, None, None], beta)
        return Cache(self.encode(model, ctx, selection, k, store), ctx.lengths)


def check_compressor_config(cfg: CompressorConfig, n_layer: int) -> None:
    """Errors: BadInput for a setting that no compressor can have."""
    if not (type(cfg.eta) is int and 1 <= cfg.eta <= n_layer - 2):
        raise BadInput(
            f"eta is {cfg.eta!r:.20}, expected 1 … {n_layer - 2} for a model of "
            f"{n_layer} layers"
        )
    for name in ("hidden", "recent", "rank", "registers", "register_id"):
        value = getattr(cfg, name)
        if type(value) is not int or value < 0:
            raise BadInput(f"{name} is {value!r:.20}, expected a whole number")
    if type(cfg.tau) is not float:
        raise BadInput(f"tau is {cfg.tau!r:.20}, expected a number such as 0.5")
    for name, known in (
        ("selection", ("head", "token")),
        ("decay", ("threshold", "sigmoid")),
        ("routing_strength", ("growing", "full")),
    ):
        value = getattr(cfg, name)
        if value not in known:
            raise BadInput(f"{name} is {value!r:.20}, expected {' or '.join(known)}")


def prune_cache(full: Cache, ctx: Context, kept) -> Cache:
    """The entries `kept` (B, l, g, N) of a full cache, and the protected tokens.

    This is what methods without training do.
    """
    store = gather(kept | ctx.protected[:, None, None])
    layers = []
    for layer, (group,) in enumerate(full.layers):
        layers.append(store(layer, group.k, group.v))
    return Cache(layers, full.next_position)


# ------------------------------------------------------------- texts and adapters

DEMO = ROOT / "data" / "lighthouse.txt"
DEMO_QUESTIONS = [
    "How tall is the tower?",
    "Who was the first keeper of the lighthouse?",
    "Who built the lighthouse?",
]
SHIPPED_ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct"


def open_text(compressor: Compressor, model: Llama, tokenizer, text: str) -> Context:
    """A text as the user's turn of a chat, read up to layer η.

    The header of the chat is protected, or without one the first token.
    """
    if not text.strip():
        raise BadInput("the text is empty; there is nothing to compress")
    ids = tokenizer.header + tokenizer.document(text.strip())
    tokens = torch.tensor([ids], device=model.device)
    columns = torch.arange(len(ids), device=model.device)
    protect = columns[None] < max(1, len(tokenizer.header))
    return compressor.read(model, tokens, protect=protect)


def find_adapter(path, flag: str = "--adapter") -> Path:
    """The folder of an adapter, or the adapter in the folder of a training run."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / "adapter.json").exists():
            return folder
    raise BadInput(
        f"{flag} {path}: no adapter.json in it, nor in {Path(path) / 'adapter'}; "
        "expected a folder that train.py has written, or its --out"
    )


def load_adapter(folder, model: Llama, tokenizer) -> Compressor:
    """The compressor in a folder, on the model's device.

    Errors: BadInput for one that is missing, damaged, or of another model.
    """
    meta, tensors = read_adapter(folder, model, tokenizer)
    settings = meta.get("config") or {}
    known = CompressorConfig.__dataclass_fields__.keys()
    if settings.keys() != known:
        differing = ", ".join(sorted(settings.keys() ^ known))
        raise BadInput(
            f"{folder}: an adapter of another version of this program (its settings "
            f"differ in {differing}); train it again"
        )
    with reading(folder, "train the adapter again"):
        with torch.device("meta"):  # no size is believed before it is compared
            compressor = Compressor(model.cfg, CompressorConfig(**settings))
        expected = {name: x.shape for name, x in compressor.state_dict().items()}
        if {name: x.shape for name, x in tensors.items()} != expected:
            raise ValueError("its tensors are not those that adapter.json describes")
    compressor.load_state_dict(tensors, assign=True)
    return compressor.to(model.device).requires_grad_(False)


def open_compressor(adapter, weights, model: Llama, tokenizer) -> tuple[Compressor, Path]:
    """The compressor that the flags name, and its folder.

    adapter: --adapter, or None for the shipped one, which belongs to the default
    model. weights: --weights, or None for the default model.
    """
    if adapter is None and weights is not None:
        raise BadInput(
            f"no adapter is shipped for {weights}; give --adapter, a folder that "
            f"`python train.py --weights {weights}` has made"
        )
    folder = SHIPPED_ADAPTER if adapter is None else find_adapter(adapter)
    return load_adapter(folder, model, tokenizer), folder


# -------------------------------------------------------------------- the program

def parse_args() -> argparse.Namespace:
    p = Parser(description="Compress the cache of a text and answer questions from it.")
    p.add_argument("--context", metavar="FILE", help="text to compress; - for standard "
                   "input; default: data/lighthouse.txt")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--keep", type=float, help="fraction of the text's tokens to keep, "
                      "on average over heads; default 0.1")
    size.add_argument("--tokens", type=int, help="the same as a number of tokens")
    p.add_argument("--question", action="append", metavar="TEXT", help="repeatable")
    p.add_argument("--adapter", metavar="DIR", help="a trained compressor; default: the "
                   "shipped one, for the default model")
    p.add_argument("--html", metavar="FILE", help="write a page that shows which heads "
                   "keep which token, and the answers, at several kept fractions")
    p.add_argument("--save", metavar="FILE", help="write the compressed cache to a file")
    p.add_argument("--load", metavar="FILE", help="ask a saved cache; no text is read")
    p.add_argument("--max-new-tokens", type=int, default=64, help="default 64")
    p.add_argument("--temperature", type=float, default=0.0, help="0, the default, is "
                   "greedy decoding")
    p.add_argument("--seed", type=seed_flag, default=0, help="of sampling")
    add_model_flags(p)
    args = p.parse_args()

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise BadInput("this program is one process; start it without torchrun")
    if args.load is not None:
        for flag in ("context", "keep", "tokens", "adapter", "save", "html"):
            if getattr(args, flag) is not None:
                p.error(f"--{flag} does not go with --load, which asks a cache as it is")
        if not args.question:
            p.error("--load needs at least one --question")
    if not all(question.strip() for question in args.question or ()):
        p.error("--question is empty; ask something")
    if args.max_new_tokens < 1:
        p.error(f"--max-new-tokens is {args.max_new_tokens}, expected at least 1")
    if not 0 <= args.temperature < math.inf:
        p.error(f"--temperature is {args.temperature}, expected 0 or more")
    for flag in ("save", "html"):
        path = getattr(args, flag)
        if path is not None and (not path or Path(path).is_dir()):
            p.error(f"--{flag} {path!r}: expected the name of a file")
    if args.keep is None and args.tokens is None:
        args.keep = 0.1
    kept_count(torch.tensor([1]), args.keep, args.tokens)  # refuses what it cannot use
    return args


def read_text(path) -> str:
    """The text of a file, or of standard input for "-"."""
    with reading(path, "expected a file of UTF-8 text"):
        if path == "-":
            text = sys.stdin.read()
        else:
            text = Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise BadInput(f"{path}: the text is empty; there is nothing to compress")
    return text.strip()


def ask_all(model: Llama, tokenizer, caches: dict[str, Cache], questions: list[str], *settings):
    """Print every question with the answer of each cache. settings: as in `answer`."""
    answers = {}
    seconds = []
    for name, cache in caches.items():
        start = time.perf_counter()
        answers[name] = answer(model, tokenizer, cache, questions, *settings)
        seconds.append(f"{time.perf_counter() - start:.1f}")

    width = max(map(len, answers))
    for i, question in enumerate(questions):
        print(f"\n? {question}")
        for name in answers:
            print(f"  {name:{width}}  {answers[name][i]}")
    print(f"\nanswering took {', '.join(seconds)} s")


def timed(function, *args):
    """What the function returns, and its seconds."""
    start = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    args = parse_args()
    settings = (args.max_new_tokens, args.temperature, args.seed)
    if args.load is not None:
        return ask_saved_cache(args, settings)
    text = read_text(DEMO if args.context is None else args.context)
    if args.adapter is not None:
        read_json(find_adapter(args.adapter) / "adapter.json")  # before the weights
    model, tokenizer = open_model(args)
    compressor, folder = open_compressor(args.adapter, args.weights, model, tokenizer)
    print(f"adapter: {folder}")

    def compress():
        ctx = open_text(compressor, model, tokenizer, text)
        return ctx, compressor.compress(model, ctx, args.keep, args.tokens)

    tokens = torch.tensor([tokenizer.header + tokenizer.document(text)], device=model.device)
    full, prefill_seconds = timed(model.prefill, tokens)
    (ctx, cache), compress_seconds = timed(compress)

    text_ctx = ctx.without_registers()
    n_protected = int(text_ctx.protected.sum())
    ids = text_ctx.tokens[0, n_protected:].tolist()
    kept = kept_map(cache, ctx.tokens.shape[1])[..., n_protected:tokens.shape[1]]  # (L, G, N)
    in_color = sys.stdout.isatty()
    print("\n" + highlight(tokenizer, ids, kept.float().mean((0, 1)).tolist(), in_color))
    per_head = kept.sum(-1)
    ratio = full.nbytes() / cache.nbytes()
    print(
        f"\ntokens   {len(ids)} -> {per_head.float().mean():.0f} per head on average "
        f"({per_head.min()} to {per_head.max()}), and {n_protected} of the header in "
        f"every head\n"
        f"bytes    {full.nbytes():,} -> {cache.nbytes():,}, {ratio:.1f}x fewer, with "
        f"header and positions\n"
        f"seconds  {compress_seconds:.2f} to read and compress the text, "
        f"{prefill_seconds:.2f} to read it only"
    )
    if args.save is not None:
        save_cache(args.save, cache, model, tokenizer)
        print(f"saved    {args.save}, {os.path.getsize(args.save):,} bytes")

    questions = args.question
    if not questions:
        questions = ["What is this text about?"] if args.context else DEMO_QUESTIONS
    ask_all(model, tokenizer, {"full": full, "compressed": cache}, questions, *settings)

    if args.html is not None:
        print("\nanswering again at all kept fractions of the page …", flush=True)
        report = make_report(
            model, tokenizer, full, ids, n_protected, questions, settings,
            keep=float(per_head.float().mean()) / len(ids),
            make_cache=lambda k: compressor.compress(model, ctx, tokens=k),
        )
        report["model"] = model_name(args.weights)
        write_report(args.html, report)
        print(f"page     {args.html}, {os.path.getsize(args.html):,} bytes")


def ask_saved_cache(args, settings) -> None:
    cache_header(args.load)  # before the weights
    model, tokenizer = open_model(args)
    cache = load_cache(args.load, model, tokenizer)
    print(
        f"{args.load}: {cache.entries().float().mean():.0f} of "
        f"{int(cache.next_position[0])} tokens per head, {cache.nbytes():,} bytes"
    )
    ask_all(model, tokenizer, {"saved": cache}, args.question, *settings)


if __name__ == "__main__":
    run_program(main)
