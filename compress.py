"""KV-Distill: compress the cache of a long context, before any question is known.

The method (arXiv 2503.10337) has five parts. Four are here, in this order, and
the fifth, the loss, is in train.py:
  1. Scorer           a small network reads each token's hidden state after
                      layer η and gives scores for every head
  2. select, gather   the entries with the highest scores of all heads together
                      are kept, under one shared budget
  3. decay            attention to an entry is decayed by its score, so that a
                      gradient of the loss can reach the scorer; by default decay
                      only masks, and the scorer learns by regression (train.py)
  4. encode           while the context is encoded, selected tokens get a low-rank
                      addition to W_Q and W_O (`token_lora`)
`Compressor` puts them together. An entry is the key and the value of one token
in one head. As a program, this file compresses a text and answers questions:

    python compress.py --keep 0.1 --question "What did the first lamp burn?"

How a gradient passes through a top-k selection, in ten lines (part 3):

>>> import torch
>>> from compress import decay, select
>>> from model import attention
>>> scores = torch.tensor([[[[2.0, 1.0, -1.0, 0.0]]]], requires_grad=True)
>>> selection = select(scores, torch.ones(1, 4, dtype=torch.bool), torch.tensor([2]))
>>> beta = decay(scores, selection, "threshold", tau=0.5)  # 0, 0, -1e9, -1e9
>>> q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
>>> loss = attention(q, k, v, bias=beta[:, 0]).square().sum()
>>> loss.backward()
>>> scores.grad.flatten() != 0  # the two kept entries have a gradient
tensor([ True,  True, False, False])

This is a hard step, in which dropped entries are masked. In a soft step nothing
is dropped, only decayed: with `soft=True` in `decay`, all four have a gradient.

Shapes: B rows of a batch, N context tokens, R registers, K kept tokens per head
on average, T tokens read afterwards, L layers, H query heads, G key-value heads
per layer, d head width, D model width, r LoRA rank, S entries of a cache. Scores,
selections and biases are (B, l, g, N). With a selection per head, l = L and g = G.
With a selection per token, the paper's way, l = g = 1: one score stands for all heads.
Where registers are added (`Compressor.with_registers`), l becomes L and N becomes
N + R. Layers count from 1 in the prose: layer η is `layers[eta - 1]`.
"""
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from run.errors import ROOT, BadInput, read_json, reading, run_program
from run.flags import find_adapter, parse_compress_flags

if __name__ == "__main__":
    run_program(parse_compress_flags, is_last=False)  # a typo is answered before torch is imported

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.tasks import SQUAD_ANSWER, SQUAD_END, SQUAD_PROMPT, tokens_with
from model import NEG, Cache, HeadGroup, Llama, TokenLoRA, answer_ids, full_cache
from run.chat import Conversation, NextTurn, chat
from run.checkpoint import cache_header, load_cache, read_adapter, save_cache
from run.html_report import (
    answer_text, can_color, in_column, kept_map, make_report, terminal_width, view, write_report)
from run.loading import model_name, open_model, open_tokenizer


@dataclass
class CompressorConfig:
    selection: str = "head"      # "head": each head keeps tokens of its own;
                                 # "token": all heads keep the same, as in the paper
    eta: int = 6                 # the scorer reads hidden states after this layer
    hidden: int = 1024           # width of the scorer's hidden layer
    target: str = "both"         # what a score predicts of an entry. "attention": the
                                 # attention that it gets; "both": that times its effect
                                 # on the likelihood of what is read later
    recent: int = 4              # with selection "head", every head keeps the last K/8
                                 # tokens, at least 1 and at most this many; 0: none.
                                 # Heads with registers keep the registers instead
    decay: str = "threshold"     # or "sigmoid", the paper's
    tau: float = 0.5             # temperature of "threshold", in nats of score
    rank: int = 32               # of LoRA on W_Q and W_O
    routing_strength: str = "growing"  # LoRA is stronger the more is dropped; "full":
                                       # always at full strength, the paper's way
    registers: int = 1           # where LoRA is on, every head above layer η keeps
                                 # copies of this many of the last tokens, which LoRA can
                                 # fill with what is dropped; 0: none


# ------------------------------------------------------------ part 1: the scorer

class Scorer(nn.Module):
    """A network with one hidden layer, in fp32: a score for each token and head.

    With the target "both", the score predicts log(attention · effect). The attention
    is the largest attention weight that the entry will get. The effect is how much the
    likelihood of what is read later depends on it (see `attention_and_effect`). The
    input is the RMS-normalised hidden state, log(1 + tokens after it) and log(1 +
    tokens before it): a causal hidden state cannot know how much text is to come.
    """

    def __init__(self, n_embd: int, hidden: int, n_layer: int, n_kv_head: int):
        super().__init__()
        self.shape = (n_layer, n_kv_head)
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
        y = self.w2(F.gelu(self.w1(x)))        # (B, N, l·g)
        return y.transpose(1, 2).unflatten(1, self.shape)


# ----------------------------------------------- part 2: selection under a budget
#
# Some tokens are kept whatever their score. Forced ones, the last few of a document,
# use up budget. Protected ones, the chat header and passages that the user names, do
# not: every head keeps them on top.

def kept_count(n, keep: float | None = None, tokens: int | None = None):
    """K, the number of tokens that each head keeps on average.

    n: (B,) int64, compressible tokens.
    keep: the kept fraction; K = ceil(keep·n).
    tokens: an absolute number instead; K = min(tokens, n).
    Returns: (B,) int64. Errors: BadInput for a value that makes no sense.
    """
    if (keep is None) == (tokens is None):
        raise BadInput("give either keep (a fraction) or tokens (a number), not both")
    if keep is not None and not 0 < keep <= 1:
        raise BadInput(f"keep is {keep}, expected a fraction such as 0.1, at most 1")
    if tokens is not None and tokens < 1:
        raise BadInput(f"tokens is {tokens}, expected at least 1")
    if keep is None:
        return n.clamp(max=min(tokens, 1 << 62))  # a huge number would overflow int64
    # on the CPU, as not every device has float64; 1e-9 because 0.07·100 comes out above 7
    k = (keep * n.cpu().double() - 1e-9).ceil().clamp(min=1).long()
    return k.to(n.device).minimum(n)


@dataclass
class Selection:
    """Which entries of the cache are kept."""
    kept: torch.Tensor           # (B, l, g, N) bool; forced tokens are in it,
                                 # protected ones and registers are not
    score_ignored: torch.Tensor  # (B, 1 or l, 1, N) bool: forced and protected
                                 # tokens, and padding
    theta: torch.Tensor          # (B, 1, 1, 1) fp32, the threshold: midway between
                                 # the lowest kept score and the highest dropped one


def last_tokens(compressible, count):
    """The last `count` compressible tokens of each row: (B, N) bool.

    compressible: (B, N) bool. count: an int or (B,) int64.
    """
    if torch.is_tensor(count):
        count = count[:, None]
    from_end = compressible.flip(1).cumsum(1).flip(1)  # 1 for the last token
    return compressible & (from_end <= count)


def select(
    scores, compressible, k, forced=None, reserved=0, check: bool = True,
) -> Selection:
    """Part 2: keep the k·l·g − reserved highest scores of each row, of all heads
    together.

    scores: (B, l, g, N) fp32. Of equal ones, the earlier layer, head and token
        goes first.
    compressible: (B, N) bool, the tokens to select from.
    k: (B,) int64, kept tokens per head on average.
    forced: (B, 1 or l, 1, N) bool, compressible tokens that are kept whatever
        their score; they use up budget.
    reserved: entries of the budget that registers fill; an int or (B,) int64. At
        least l·g others are kept besides, so the cache may have more than k·l·g.
    check: whether to look for scores that are not finite, which waits for a GPU.
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

    # +∞ ranks forced tokens first, −∞ ranks protected tokens and padding last
    ranked = scores.masked_fill(others, -math.inf)
    score_ignored = others
    if forced is not None:
        ranked = ranked.masked_fill(forced, math.inf)
        score_ignored = others | forced

    # (B, l·g·N): the heads of a row, one after the other
    ranked, order = ranked.flatten(1).sort(dim=1, descending=True, stable=True)
    least = k.clamp(max=1) * l * g  # one entry per head; none for an empty row
    budget = (k * l * g - reserved).maximum(least)[:, None]
    rank = torch.arange(l * g * N, device=k.device)
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    kept.scatter_(1, order, rank < budget)

    last = ranked.gather(1, (budget - 1).clamp(min=0))
    next_ = ranked.gather(1, budget.clamp(max=l * g * N - 1))
    # θ must be finite also where all kept entries are forced, or none is dropped.
    # Where both hold it is infinite, but then `decay` sets β to 0 for all entries.
    last = torch.where(last == math.inf, next_ + 1, last)
    next_ = torch.where(next_ == -math.inf, last - 1, next_)
    theta = ((last + next_) / 2)[..., None, None]
    return Selection(kept.view_as(scores), score_ignored, theta)


def gather(keep_mask, beta=None, position=None):
    """Part 2: how a layer's keys and values become a compressed cache.

    Returns store(layer, keys, values), which takes those of a layer, (B, G, N, d),
    and returns its head groups. Neighbouring heads that keep equally many
    entries share a group. In a batch, a head is as long as in the row where it
    keeps most; the other rows are padded.

    keep_mask: (B, L or 1, G or 1, N or N + R) bool, all that is kept. A layer without
        registers keeps none of them, and may give `store` only N keys and values.
    beta: of the shape of keep_mask, fp32, a bias of the kept entries; or None.
    position: (B, N or N + R) int64, where the token of a column stands in the text;
        None: its column.
    """
    counts = keep_mask.sum(-1)  # (B, l, g)
    # kept tokens first, in their order
    order = keep_mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    is_kept = torch.arange(keep_mask.shape[-1], device=keep_mask.device) < counts[..., None]
    positions = order
    if position is not None:
        positions = position[:, None, None].expand(order.shape).gather(-1, order)
    positions = torch.where(is_kept, positions, -1).to(torch.int32)
    index = torch.where(is_kept, order, 0)  # padding is a copy of the first token
    row = torch.arange(len(index), device=index.device)[:, None, None]
    # (l, g) numbers: the most and the fewest entries of a head in any row. This
    # waits for a GPU once, and `store` does not.
    most, least = torch.stack([counts.amax(0), counts.amin(0)]).tolist()
    per_head = keep_mask.shape[2] > 1

    def store(layer: int, keys, values) -> list[HeadGroup]:
        if len(most) == 1:
            layer = 0  # one selection for all layers
        head = torch.arange(keys.shape[1], device=keys.device)[:, None]

        groups = []
        first = 0
        # runs of neighbouring heads of one size: sizes 12, 4, 4 are two groups
        for size, run in groupby(most[layer]):
            heads = slice(first, first + len(list(run)))
            first = heads.stop
            # (B, 1 or m, S) for a group of m heads; cloned, because a view would hold all
            # of `positions` in memory
            group_positions = positions[:, layer, heads, :size].clone()
            group_index = index[:, layer, heads, :size]
            # one selection for all heads: its (B, 1, S) positions serve all of them
            own_heads = head[heads] if per_head else head
            bias = None
            if beta is not None:
                bias = beta[:, layer, heads].gather(2, group_index)
            if min(least[layer][heads]) < size:  # some rows are padded
                real = 0.0 if bias is None else bias
                bias = torch.where(group_positions < 0, NEG, real)
            entries = (row, own_heads, group_index)
            # keys[entries], values[entries]: (B, m or G, S, d)
            groups.append(HeadGroup(keys[entries], values[entries], group_positions, bias))
        return groups

    return store


# ------------------------------------------- part 3: decay, which carries the gradient

def decay(scores, selection: Selection, kind: str, tau: float, soft: bool = False):
    """Part 3: β, which is added to the attention logits of question and answer
    tokens towards an entry. The context is encoded without it.

    A selection has no gradient. β has one. It flows back to the scorer along

        Scorer → scores → decay → β → full_cache(…, bias=β) → attention → loss

    kind "sigmoid": β = log σ(s). It is stored in the finished cache, as a bias.
    kind "threshold": β = log σ((s − θ)/τ), with θ as a constant: no gradient
        passes through it. For θ = −4, τ = 0.5, the scores −3, −4.2 and −7
        become −0.13, −0.91 and −6.0.
    soft: nothing is dropped, and every entry is decayed by its β. Otherwise (a
        hard step) dropped entries have −1e9, which masks them. Under "threshold",
        kept ones then have a β of 0, with the gradient of log σ((s − θ)/τ), a
        straight-through estimator.
    Returns: (B, l, g, N) fp32; 0 where `selection.score_ignored`.
    """
    if kind == "sigmoid":
        beta = F.logsigmoid(scores)
    else:
        beta = F.logsigmoid((scores - selection.theta) / tau)
    beta = torch.where(selection.score_ignored, 0.0, beta)
    if soft:
        return beta
    if kind == "threshold":
        beta = beta - beta.detach()
    return torch.where(selection.kept | selection.score_ignored, beta, NEG)


# -------------------------------------------------- what the scorer learns to predict

@torch.no_grad()
def max_attention(
    model: Llama, cache: Cache, tokens, segments=None, first: int = 0,
    end: int | None = None, sinks: int = 0, max_position: int | None = None,
):
    """The most attention that entries of a full cache get from any of `tokens`.

    The maximum is over the tokens and over the query heads that share the entry. With
    tokens that repeat the context, this is KVzip's importance score (arXiv
    2505.23416).

    tokens, segments: (B, T) int64, see Llama.forward; padding has the segment −1.
    first, end: look at entries first … end−1. If these are not all, attention is
        normalised again over them, the first `sinks` entries and the tokens
        themselves.
    max_position: see Llama.forward.
    Returns: (B, L, G, end − first) fp32.
    """
    S = cache.layers[0][0].k.shape[2]
    if end is None:
        end = S
    largest = {}

    def on_weights(layer: int, weights, first_query: int):  # (B, G, H/G, t, s)
        received = weights[..., first:end]
        if end - first < S:
            total = received.sum(-1) + weights[..., S:].sum(-1)
            total = total + weights[..., :min(sinks, first)].sum(-1)
            received = received / total.clamp(min=1e-30)[..., None]
        if segments is not None:
            is_token = segments[:, first_query:first_query + weights.shape[3]] >= 0
            received = received.masked_fill(~is_token[:, None, None, :, None], 0)
        received = received.amax((2, 3))  # (B, G, end − first)
        # a layer comes once for each block of queries
        largest[layer] = torch.maximum(largest.get(layer, received), received)

    model(tokens, cache, segments, on_weights=on_weights, max_position=max_position)
    return torch.stack([largest[layer] for layer in range(model.cfg.n_layer)], 1)


def attention_and_effect(model: Llama, full: Cache, tokens, segments, max_position=None):
    """How strongly each entry of a full cache is attended to while the model reads
    `tokens`, and how much their likelihood depends on it.

    The first is the largest attention weight, as in `max_attention`. The second is
    derived from the gradient with respect to a bias β, as in `decay`. Let query t attend
    to entry c with weight A, let o = Σ_c A_c·v_c be the output, and g the gradient of
    the log-likelihood of `tokens` with respect to o (see `log_likelihood`). The gradient
    with respect to a bias β on that one logit is A·g·(v_c − o). If the entry is left
    out, the log-likelihood falls, to first order, by
        δ = A/(1 − A) · g·(v_c − o).
    δ is added up over the query heads that share the entry. Its squares are added up
    over the queries t, and the entry's effect is the root of that. (Compare the
    empirical Fisher information.)

    tokens, segments: (B, T) int64, see Llama.forward.
    Returns: two tensors (B, L, G, N) fp32.
    """
    N = full.layers[0][0].k.shape[2]
    largest = {}
    squares = {}

    def on_weights(layer: int, weights, first_query: int):  # (B, G, H/G, t, s)
        A = weights.detach()
        is_token = segments[:, first_query:first_query + A.shape[3]] >= 0
        received = A[..., :N].masked_fill(~is_token[:, None, None, :, None], 0)
        # a layer comes once for each block of queries
        received = received.amax((2, 3))
        largest[layer] = torch.maximum(largest.get(layer, received), received)

        def on_gradient(grad):  # with respect to the weights: g·v_c
            average = (A * grad).sum(-1, keepdim=True)  # g·o
            odds = A[..., :N] / (1 - A[..., :N]).clamp(min=1e-3)  # finite for A = 1
            change = odds * (grad[..., :N] - average)
            change = change.sum(2)  # of all query heads that share the entry
            squares[layer] = squares.get(layer, 0) + change.square().sum(2)

        weights.register_hook(on_gradient)

    # All weights are frozen, so autograd would record nothing. This bias of 0 requires
    # a gradient only so that the attention weights get one, for `on_gradient`.
    beta = torch.zeros(len(tokens), model.cfg.n_layer, 1, N, device=tokens.device)
    kvs = [(group.k, group.v) for (group,) in full.layers]
    with torch.enable_grad():
        cache = full_cache(kvs, full.next_position, beta.requires_grad_())
        hidden = model(tokens, cache, segments, on_weights=on_weights, max_position=max_position)
        log_likelihood(model, hidden, tokens, segments).backward()

    layers = range(model.cfg.n_layer)
    effect = torch.stack([squares[layer] for layer in layers], 1).sqrt()
    return torch.stack([largest[layer] for layer in layers], 1), effect


def log_likelihood(model: Llama, hidden, tokens, segments, rows: int = 256):
    """The sum of log p(token) over all tokens but the first of each segment.

    hidden: (B, T, D), of the tokens. `rows` logits are computed at a time, and
    again in the backward pass, because all of them would take too much memory.
    """
    is_predicted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    labels = torch.where(is_predicted, tokens[:, 1:], -100)  # cross_entropy skips −100
    hidden = hidden[:, :-1].flatten(0, 1)

    def part(hidden, labels):
        return -F.cross_entropy(model.logits(hidden), labels, reduction="sum")

    total = 0
    for h, y in zip(hidden.split(rows), labels.flatten().split(rows)):
        total = total + checkpoint(part, h, y, use_reentrant=False)
    return total


# -------------------------------------------------------------------- the method

@dataclass
class Context:
    """Documents that were read up to layer η, padded on the right."""
    h: torch.Tensor             # (B, N, D), hidden states after layer η
    kvs: list                   # keys and values of layers 1 … η, (B, G, N, d) each
    tokens: torch.Tensor        # (B, N) int64
    lengths: torch.Tensor       # (B,) int64, real tokens of each row
    compressible: torch.Tensor  # (B, N) bool; the others are padding or protected
    padded: bool                # whether rows may differ in length

    @property
    def protected(self):
        """Tokens that every head keeps, outside of the budget: (B, N) bool."""
        columns = torch.arange(self.h.shape[1], device=self.h.device)
        return (columns < self.lengths[:, None]) & ~self.compressible


class Compressor(nn.Module):
    """All that is trained, in fp32: the scorer and the LoRA matrices.

    The Llama is an argument of the methods, and stays frozen. Layers η+1 … L−1
    have LoRA: in layer L it would reach no key or value.

    A register is a copy of one of the last tokens, made after layer η. Its column stands
    after the last token, and it runs through the layers above η with the document, at
    the rotary position of the token that it copies.
    Where LoRA is on, every head of these layers keeps it. LoRA can move into it what
    dropped tokens say. The last tokens themselves cannot take up so much without
    losing what they say. In layer η+1 a register is still an exact copy; LoRA shows in
    it from layer η+2 on.
    """

    def __init__(self, model_cfg, cfg: CompressorConfig):
        super().__init__()
        check_compressor_config(cfg, model_cfg.n_layer)
        self.cfg = cfg
        self.n_layer = model_cfg.n_layer
        heads = (1, 1)
        if cfg.selection == "head":
            heads = (model_cfg.n_layer, model_cfg.n_kv_head)
        self.scorer = Scorer(model_cfg.n_embd, cfg.hidden, *heads)
        # Scores begin near what they will learn: with SmolLM2, log(attention) is about
        # −4 on average, and log(attention · effect) −11. With decay σ(s), they begin
        # where attention hardly decays.
        start = -11.0 if cfg.target == "both" else -4.0
        if cfg.decay == "sigmoid":
            start = 4.0
        nn.init.constant_(self.scorer.w2.bias, start)

        # a ~ N(0, 1/width of its input) and b = 0, so that at first LoRA changes nothing
        n = model_cfg.n_layer - 1 - cfg.eta  # layers with LoRA
        D = model_cfg.n_embd
        inner = model_cfg.n_head * model_cfg.head_dim
        self.a_q = nn.Parameter(torch.randn(n, cfg.rank, D) * D ** -0.5)
        self.b_q = nn.Parameter(torch.zeros(n, inner, cfg.rank))
        self.a_o = nn.Parameter(torch.randn(n, cfg.rank, inner) * inner ** -0.5)
        self.b_o = nn.Parameter(torch.zeros(n, D, cfg.rank))

    def lora_parameters(self) -> list[nn.Parameter]:
        return [self.a_q, self.b_q, self.a_o, self.b_o]

    @torch.no_grad()
    def read(self, model: Llama, tokens, lengths=None, protect=None) -> Context:
        """Read contexts up to layer η.

        tokens: (B, N) int64, padded on the right.
        lengths: (B,) int64, the real tokens of each row; None: all N.
        protect: (B, N) bool, tokens that every head keeps.
        """
        B, N = tokens.shape
        padded = lengths is not None
        if not padded:
            lengths = torch.full((B,), N, device=tokens.device)
        compressible = torch.arange(N, device=tokens.device) < lengths[:, None]
        if protect is not None:
            compressible = compressible & ~protect
        h, kvs = model.run_layers(model.embed(tokens), 0, self.cfg.eta)
        return Context(h, kvs, tokens, lengths, compressible, padded)

    @torch.no_grad()
    def full_cache(self, model: Llama, ctx: Context) -> Cache:
        """The full cache. Layers 1 … η were run once for both caches; this runs
        the others, without LoRA and registers."""
        _, kvs = model.run_layers(ctx.h, self.cfg.eta)
        return full_cache(ctx.kvs + kvs, ctx.lengths if ctx.padded else None)

    def select(
        self, scores, ctx: Context, k, registers: bool = False, check: bool = True,
    ) -> Selection:
        """The function `select`, with this compressor's recent tokens and registers.

        k: (B,) int64, kept tokens per head on average.
        registers: whether registers are part of the budget. They take the place
            of recent tokens in the layers that have them.
        """
        per_head = self.cfg.selection == "head"
        forced = None
        if per_head:
            recent = (k // 8).clamp(1, self.cfg.recent)  # 0 if cfg.recent is 0
            forced = last_tokens(ctx.compressible, recent)[:, None, None]

        reserved = 0
        if registers and self.cfg.registers > 0:
            has_registers = self.layers_with_registers(ctx, k)  # (B, L)
            # A token that all heads of all layers keep costs l·g of the budget. A
            # register is in some of the L layers, and costs that fraction of l·g,
            # rounded up.
            _, l, g, _ = scores.shape
            reserved = self.cfg.registers * has_registers.sum(1) * l * g
            reserved = -(-reserved // self.n_layer)
            if per_head:
                forced = forced & ~has_registers[..., None, None]
        return select(scores, ctx.compressible, k, forced, reserved, check)

    def routing_strength(self, n, k):
        """The strength of LoRA by how much is dropped: (B,) fp32, from 0 to 1.

        n, k: (B,) int64, compressible tokens, and how many tokens are kept.
        "full": 1 as soon as a token is dropped. "growing": 0 up to 4×, where
        LoRA costs more than it brings, then with the logarithm of the
        compression, up to 1 at 100×.
        """
        if self.cfg.routing_strength == "full":
            return (k < n).float()
        compression = n.clamp(min=1) / k.clamp(min=1)
        return ((compression / 4).log() / math.log(25)).clamp(0, 1)

    def layers_with_registers(self, ctx: Context, k):
        """Which layers of a row's cache have registers: (B, L) bool.

        All above η, in rows whose LoRA is on; without it registers are of no use.
        """
        is_on = self.routing_strength(ctx.compressible.sum(1), k) > 0
        is_above = torch.arange(self.n_layer, device=k.device) >= self.cfg.eta
        return is_on[:, None] & is_above

    def token_lora(self, head_fraction, n, k, dtype):
        """Part 4: a function that maps a layer to its TokenLoRA, or to None.

        head_fraction: (B, l, N + R) fp32, the fraction of a layer's heads that keep
            a token; 1 for a register. A token's strength is `routing_strength` times
            the fraction of the *next* layer: LoRA changes the hidden state after a layer,
            and with it first the keys and values of the next one.
        """
        # (B, l, N + R) · (B, 1, 1)
        strength = head_fraction * self.routing_strength(n, k)[:, None, None]
        strength = strength.to(dtype)[..., None]  # (B, l, N + R, 1)

        # all layers in one conversion: one for each would be many small kernels
        matrices = [x.to(dtype).unbind() for x in self.lora_parameters()]

        def of_layer(layer: int) -> TokenLoRA | None:
            i = layer - self.cfg.eta
            if not 0 <= i < len(self.a_q):
                return None
            next_layer = layer + 1 if strength.shape[1] > 1 else 0
            return TokenLoRA(strength[:, next_layer], *[x[i] for x in matrices])

        return of_layer

    def places(self, ctx: Context):
        """The N + R columns of a document and the registers behind it.

        Returns two tensors (B, N + R). `source`, int64, is the token of a column,
        for a register the token that it copies. It is the rotary position, too.
        `is_register` is bool.
        """
        R = self.cfg.registers
        N = ctx.h.shape[1]
        place = torch.arange(N + R, device=ctx.h.device)
        behind = place - ctx.lengths[:, None]
        is_register = (behind >= 0) & (behind < R)
        source = torch.where(is_register, place - R, place).clamp(0, N - 1)
        return source, is_register

    def encode(self, model: Llama, ctx: Context, selection: Selection, k, store=None) -> list:
        """Part 4: encode the context and the registers above layer η, selected
        tokens and registers with LoRA.

            layers 1 … η:       were read before, for the full cache as well
            layers η+1 … L−1:   the frozen weights; selected tokens and registers
                                have LoRA besides
            layer L:            its keys and values only, so no LoRA

        Every token still attends to every earlier one; entries are dropped when
        the cache is stored.
        store(layer, keys, values): see Llama.run_layers.
        Returns, for each layer, what `store` returned for it. Without `store`, these
        are its keys and values, (B, G, N + R, d), and in layers 1 … η the columns of
        registers hold nothing real and must be masked (`with_registers`).
        """
        R = self.cfg.registers
        source, is_register = self.places(ctx)
        h = ctx.h.gather(1, source[..., None].expand(-1, -1, ctx.h.shape[2]))
        fraction = F.pad(selection.kept.float().mean(2), (0, R))  # (B, l, N + R)
        fraction = torch.where(is_register[:, None], 1.0, fraction)

        if store is not None:
            lower = [store(i, keys, values) for i, (keys, values) in enumerate(ctx.kvs)]
        else:
            lower = [tuple(F.pad(x, (0, 0, 0, R)) for x in kv) for kv in ctx.kvs]
        lora = self.token_lora(fraction, ctx.compressible.sum(1), k, model.dtype)
        # a register has the position of the token that it is a copy of
        _, upper = model.run_layers(
            h, self.cfg.eta, token_lora=lora, store=store, positions=source)
        return lower + upper

    def with_registers(self, x, ctx: Context, k, on, off):
        """Give a (B, l, g, N) tensor a column for each register: (B, l, g, N + R).

        on, off: what the column holds in layers with and without registers. With
            registers, l becomes L.
        """
        R = self.cfg.registers
        if R == 0:
            return x
        _, is_register = self.places(ctx)
        has = self.layers_with_registers(ctx, k)[..., None, None]  # (B, L, 1, 1)
        value = torch.where(has, on, off)
        return torch.where(is_register[:, None, None], value, F.pad(x, (0, R)))

    def training_cache(self, ctx: Context, kvs: list, beta, k) -> Cache:
        """The compressed cache as training needs it: nothing is gathered, all
        entries are there. In a hard step β (B, l, g, N) is −1e9 for those that a head
        dropped. This gives the same attention as gathering, and shapes that do not
        depend on the selection."""
        beta = self.with_registers(beta, ctx, k, on=0.0, off=NEG)
        lengths = ctx.lengths + self.cfg.registers if ctx.padded else None
        cache = full_cache(kvs, lengths, beta)
        cache.next_position = ctx.lengths  # a question begins where the text ends
        return cache

    def compress(self, model: Llama, ctx: Context, keep=None, tokens=None, scores=None) -> Cache:
        """The compressed cache of a context. keep = 1 gives the full cache.

        keep, tokens: see `kept_count`.
        scores: (B, l, g, N), to select by other scores than the scorer's, with
            no decay.
        """
        n = ctx.compressible.sum(1)
        k = kept_count(n, keep, tokens)
        if bool((k == n).all()):
            return self.full_cache(model, ctx)
        decays = self.cfg.decay == "sigmoid" and scores is None
        if scores is None:
            scores = self.scorer(ctx.h, ctx.lengths)
        selection = self.select(scores, ctx, k, registers=True)

        beta = None
        if decays:
            beta = decay(scores, selection, "sigmoid", self.cfg.tau)
            # a row that keeps everything is a full cache, without decay
            beta = torch.where((k < n)[:, None, None, None], beta, 0.0)
            beta = self.with_registers(beta, ctx, k, on=0.0, off=NEG)
        kept = selection.kept | ctx.protected[:, None, None]
        kept = self.with_registers(kept, ctx, k, on=True, off=False)
        position, _ = self.places(ctx)
        store = gather(kept, beta, position)
        return Cache(self.encode(model, ctx, selection, k, store), ctx.lengths)


def check_compressor_config(cfg: CompressorConfig, n_layer: int) -> None:
    """Errors: BadInput for a setting that no compressor can have."""
    if not (type(cfg.eta) is int and 1 <= cfg.eta <= n_layer - 2):
        raise BadInput(
            f"eta is {cfg.eta!r:.20}, expected 1 … {n_layer - 2} for a model of "
            f"{n_layer} layers"
        )
    for name in ("hidden", "recent", "rank", "registers"):
        value = getattr(cfg, name)
        if type(value) is not int or value < 0:
            raise BadInput(f"{name} is {value!r:.20}, expected a whole number, at least 0")
    if type(cfg.tau) is not float or not 0 < cfg.tau < math.inf:
        raise BadInput(f"tau is {cfg.tau!r:.20}, expected a number such as 0.5")
    for name, known in (
        ("selection", ("head", "token")),
        ("target", ("both", "attention")),
        ("decay", ("threshold", "sigmoid")),
        ("routing_strength", ("growing", "full")),
    ):
        value = getattr(cfg, name)
        if value not in known:
            raise BadInput(f"{name} is {value!r:.20}, expected {' or '.join(known)}")


def prune_cache(full: Cache, ctx: Context, kept) -> Cache:
    """The entries `kept` (B, l, g, N) of a full cache, and the protected tokens.

    For methods that select from the plain cache, without LoRA and registers.
    """
    store = gather(kept | ctx.protected[:, None, None])
    layers = []
    for layer, (group,) in enumerate(full.layers):
        layers.append(store(layer, group.k, group.v))
    return Cache(layers, full.next_position)


# ------------------------------------------------------------- texts and adapters

DEMO = ROOT / "data" / "lighthouse.txt"
DEMO_QUESTIONS = [
    "What did the first lamp burn?",
    "How many steps does the tower have?",
    "When was the lighthouse built?",
]
SHIPPED_ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct"


def open_text(compressor: Compressor, model: Llama, tokenizer, text: str, keep=()) -> Context:
    """A text as the user's turn of a chat, read up to layer η.

    Protects the chat header, or the first token if there is none.
    keep: spans of the text that every head keeps, too, as (start, end) in
        characters. Errors: BadInput for one that is not in the text.
    """
    if not text.strip():
        raise BadInput("the text is empty; there is nothing to compress")
    n_header = len(tokenizer.header)
    ids = tokenizer.document(text.strip())
    tokens = torch.tensor([tokenizer.header + ids], device=model.device)
    protect = torch.zeros_like(tokens, dtype=torch.bool)
    protect[0, :max(1, n_header)] = True
    for first, end in tokenizer.token_spans(ids, text, keep):
        protect[0, n_header + first:n_header + end] = True
    return compressor.read(model, tokens, protect=protect)


def load_adapter(folder, model: Llama, tokenizer) -> Compressor:
    """The compressor in a folder, on the model's device.

    Errors: BadInput for one that is missing, damaged, or of another model.
    """
    meta, tensors = read_adapter(folder, model, tokenizer)
    settings = meta["config"]
    known = CompressorConfig.__dataclass_fields__.keys()
    if settings.keys() != known:
        differing = ", ".join(sorted(settings.keys() ^ known))
        raise BadInput(
            f"{folder}: an adapter of another version of this program (its settings "
            f"differ in {differing}); train it again"
        )
    with reading(folder, "train the adapter again"):
        with torch.device("meta"):  # no memory before the sizes are compared
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
    folder = adapter_folder(adapter, weights)
    return load_adapter(folder, model, tokenizer), folder


def adapter_folder(adapter, weights) -> Path:
    """The folder of the adapter that the flags name; see `open_compressor`."""
    if adapter is not None:
        return find_adapter(adapter)
    if weights is not None:
        raise BadInput(
            f"no adapter is shipped for {weights}; give --adapter, a folder that "
            f"`python train.py --weights {weights}` has made"
        )
    return SHIPPED_ADAPTER


# -------------------------------------------------------- questions and their answers

class Extracting:
    """A tokenizer for `model.answer` by which the default model answers in few words.

    The question asks to extract the answer from the text, and the model's turn begins
    with `The answer is "`. A quotation mark or a line break ends the answer.
    (The log of 2026-11-28, *how a question is worded*, compares wordings.)
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decode = tokenizer.decode
        self.stop_ids = tokenizer.stop_ids | tokens_with(tokenizer, SQUAD_END)

    def ask(self, question: str) -> list[int]:
        prompt = self.tokenizer.ask(SQUAD_PROMPT.format(question))
        return prompt + self.tokenizer.encode(SQUAD_ANSWER)


@torch.no_grad()
def kl_of_answer(
    model: Llama, full: Cache, cache: Cache, prompt: list[int], ids: list[int],
) -> float:
    """KL(full ‖ cache) in nats per token, over the full cache's own answer: the
    mean over the predictions of its tokens, and of the token after the last."""
    tokens = torch.tensor([prompt + ids], device=model.device)
    room = model.cfg.max_positions - int(full.next_position[0])
    tokens = tokens[:, :room]  # the last id may be past the last position
    log_p, log_q = [
        model.logits(model(tokens, c)[:, len(prompt) - 1:]).log_softmax(-1)
        for c in (full, cache)
    ]
    kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
    return max(0.0, float(kl.mean()))


def pick_wording(args, tokenizer):
    """The tokenizer by which --plain and --weights word a question."""
    if args.weights is None and not args.plain:
        return Extracting(tokenizer)
    return tokenizer


def ask_all(
    model: Llama, tokenizer, caches: dict[str, Cache], questions: list[str],
    max_new_tokens: int, *settings,
):
    """Print every question with the answer of each cache.

    If a cache is called "full", also print how far each other cache is from it.
    tokenizer, max_new_tokens, settings: as in `model.answer_ids`.
    """
    answers = {}
    seconds = []
    for name, cache in caches.items():
        start = time.perf_counter()
        answers[name] = answer_ids(
            model, tokenizer, cache, questions, max_new_tokens, *settings)
        seconds.append(f"{time.perf_counter() - start:.1f} s ({name})")

    full = caches.get("full")
    width = max(map(len, answers))
    for i, question in enumerate(questions):
        print(f"\n? {in_column(question, 2)}")
        for name, cache in caches.items():
            ids = answers[name][i]
            text = answer_text(tokenizer, ids, max_new_tokens)
            print(f"  {name:{width}}  {in_column(text, width + 4)}")
            if full is None or name == "full":
                continue
            own = answers["full"][i]
            kl = kl_of_answer(model, full, cache, tokenizer.ask(question), own)
            same = "the same answer" if ids == own else "another answer"
            print(f"  {'':{width}}  ({same}, KL {kl:.3f})")
    print(f"\nanswering took {', '.join(seconds)}")


# -------------------------------------------------------------------- the program

WHAT_TO_EXPECT = (
    "The default model has 135M parameters. Even from the full cache it answers only one question\n"
    "in three correctly on a paragraph, and one in six on several. So look whether both caches\n"
    "say the same."
)


def read_text(path) -> str:
    """The text of a file, or of standard input for "-"."""
    with reading(path, "expected a file of UTF-8 text"):
        if path == "-":
            text = sys.stdin.read()
        else:
            text = Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise BadInput(f"{path}: the text is empty; there is nothing to compress")
    return text


def spans_to_keep(text: str, passages: list[str], lines: list[tuple[int, int]]) -> list:
    """What --keep-text and --keep-lines name, as spans (start, end) of characters."""
    spans = []
    for passage in passages:
        # a passage may go over a line's end
        words = r"\s+".join(re.escape(word) for word in passage.split())
        found = [m.span() for m in re.finditer(words, text)]
        if not found:
            raise BadInput(f"--keep-text {passage!r}: these words are not in the text")
        spans += found

    all_lines = text.removesuffix("\n").split("\n")
    for first, last in lines:
        if last > len(all_lines):
            raise BadInput(
                f"--keep-lines {first}-{last}: the text has {len(all_lines)} lines"
            )
        start = sum(len(line) + 1 for line in all_lines[:first - 1])
        end = start + len("\n".join(all_lines[first - 1:last]))
        if start < end:  # not an empty line
            spans.append((start, end))
    return spans


def check_length(
    asking, tokenizer, text: str, questions: list[str], max_positions: int, room: int = 0,
) -> None:
    """Refuse a text that leaves no room for a question, as `asking` words it.

    room: positions to leave at least; eval.py needs some for KVzip.
    """
    n = len(tokenizer.document(text.strip()))
    room = max(room, *(len(asking.ask(question)) for question in questions))
    largest = max_positions - len(tokenizer.header) - room
    if n > largest:
        raise BadInput(
            f"the text has {n} tokens, and at most {largest} fit: of the model's "
            f"{max_positions} positions, {len(tokenizer.header)} are for the chat's header and "
            f"{room} for what is asked; use a shorter text"
        )


def check_save(path) -> None:
    """Refuse to overwrite a file that is not a saved cache."""
    if path is not None and Path(path).exists():
        try:
            cache_header(path)
        except BadInput:
            raise BadInput(
                f"--save {path}: a file is there that is no saved cache; give another name"
            ) from None


def timed(function, *args):
    """What the function returns, and its seconds."""
    start = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    args = parse_compress_flags()
    check_save(args.save)
    if args.load is not None:
        return use_saved_cache(args)

    text = read_text(DEMO if args.context is None else args.context)
    spans = spans_to_keep(text, args.keep_text or [], args.keep_lines or [])
    questions = args.question or DEMO_QUESTIONS
    if args.context and not args.question:
        questions = ["What is this text about?"]
        args.plain = True  # no extract of the text answers that
    tokenizer, model_cfg = open_tokenizer(args)
    # an adapter that is missing is reported before the weights are loaded
    folder = adapter_folder(args.adapter, args.weights)
    read_json(folder / "adapter.json")
    asking = pick_wording(args, tokenizer)
    check_length(asking, tokenizer, text, questions, model_cfg.max_positions)
    model, _ = open_model(args, tokenizer=tokenizer)
    compressor = load_adapter(folder, model, tokenizer)
    adapter = str(folder.relative_to(ROOT) if folder == SHIPPED_ADAPTER else folder)
    print(f"adapter  {adapter}")

    def compress():
        ctx = open_text(compressor, model, tokenizer, text, spans)
        return ctx, compressor.compress(model, ctx, args.keep, args.tokens)

    ids = tokenizer.header + tokenizer.document(text.strip())
    n_header = max(1, len(tokenizer.header))
    full, prefill_seconds = timed(model.prefill, torch.tensor([ids], device=model.device))
    (ctx, cache), compress_seconds = timed(compress)

    ids = ids[n_header:]
    # From here on, nothing includes the header. For each token of the text: did
    # --keep-text or --keep-lines name it?
    own = ctx.protected[0, n_header:].cpu()
    kept = kept_map(cache, ctx.tokens.shape[1])[..., n_header:]  # (L, G, N)
    heads_of_token = kept.sum((0, 1)).tolist()
    n_heads = kept.shape[0] * kept.shape[1]
    print()
    marking = (own.tolist(), n_heads, can_color(), terminal_width())
    print(view(tokenizer, ids, heads_of_token, *marking))
    # (L, G), with the registers
    per_head = cache.entries()[0].cpu() - n_header - int(own.sum())
    counts = token_counts(per_head, int(own.sum()), len(ids), n_header)
    ratio = full.nbytes() / cache.nbytes()
    print(
        f"\ntokens   {counts}\n"
        f"bytes    {full.nbytes():,} -> {cache.nbytes():,}, {ratio:.1f}x fewer, with "
        f"header and positions\n"
        f"seconds  {compress_seconds:.2f} to read and compress the text, "
        f"{prefill_seconds:.2f} to read it only"
    )

    about = {
        "adapter": adapter,
        "tokens": counts,
        "keep": round(float(per_head.float().mean()) / max(1, int((~own).sum())), 4),
        "begins": " ".join(text.split())[:60],
    }
    settings = (args.max_new_tokens, args.temperature, args.seed)
    if args.chat:
        return talk(args, Conversation(model, tokenizer, cache), about, settings)
    if args.save is not None:
        save(args.save, cache, model, tokenizer, about)

    print("" if args.weights else f"\n{WHAT_TO_EXPECT}")
    print("KL: nats per token of the full cache's answer, from full to compressed; 0 is equal.")
    ask_all(model, asking, {"full": full, "compressed": cache}, questions, *settings)

    if args.html is not None:
        print("\nanswering again at all keep ratios of the page …", flush=True)
        report = make_report(
            model, asking, full, ids, own.tolist(), n_header, questions, settings,
            kept=float(per_head.float().mean()),
            make_cache=lambda k: compressor.compress(model, ctx, tokens=k),
        )
        report["model"] = model_name(args.weights)
        write_report(args.html, report)
        print(f"page     {args.html}, {os.path.getsize(args.html):,} bytes")


def token_counts(per_head, n_own: int, n: int, n_header: int) -> str:
    """What is kept of a text, in words.

    per_head: (L, G), the kept tokens and registers of each head, without the n_own
    ones that the user wanted kept; n: tokens of the text, those n_own included.
    """
    counts = (
        f"{n - n_own} -> {per_head.float().mean():.0f} per head on average "
        f"({per_head.min()} to {per_head.max()}), and always {n_header} of the header"
    )
    if n_own > 0:
        return f"{n} in the text: {counts} and {n_own} that you asked for"
    return counts


def save(path, cache: Cache, model: Llama, tokenizer, about: dict) -> None:
    save_cache(path, cache, model, tokenizer, about)
    print(f"saved    {path}, {os.path.getsize(path):,} bytes")


def talk(args, conversation: Conversation, about: dict, settings) -> None:
    """--chat. What was said is saved also if Ctrl-C ends it."""
    before = conversation.turns
    try:
        chat(conversation, *settings)
    finally:
        if args.save is None and conversation.turns > before:
            print("not saved; --save FILE keeps a conversation")
        elif args.save is not None:
            about = {**about, "turns": conversation.turns}
            save(args.save, conversation.cache, conversation.model, conversation.tokenizer, about)


def use_saved_cache(args) -> None:
    about = cache_header(args.load)["about"]  # first, so that a bad file is reported at once
    turns = about.get("turns", 0)
    model, tokenizer = open_model(args)
    cache = load_cache(args.load, model, tokenizer)
    print(
        f"{args.load}: {cache.entries().float().mean():.0f} of "
        f"{int(cache.next_position[0])} tokens per head, with the header and all turns, "
        f"{cache.nbytes():,} bytes"
    )
    for name in ("adapter", "keep", "tokens", "begins", "turns"):
        if name in about:
            print(f"{name:8} {in_column(str(about[name])[:200], 9)}")

    settings = (args.max_new_tokens, args.temperature, args.seed)
    if args.chat:
        return talk(args, Conversation(model, tokenizer, cache, turns), about, settings)
    asking = NextTurn(tokenizer) if turns > 0 else pick_wording(args, tokenizer)
    ask_all(model, asking, {"saved": cache}, args.question, *settings)


if __name__ == "__main__":
    run_program(main)
