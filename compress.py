"""KV-Distill: turn the cache of a long context into a short one, once, before any question is known.

The five parts of the method (arXiv 2503.10337), four of them here and the fifth, the loss, in train.py:
  1. Scorer            a small network reads each token's hidden state after layer η and gives one score
  2. select, gather    the K best-scored tokens stay, the same in every layer
  3. decay             a kept token's attention logits get β, a function of its score; the scorer's only gradient
  4. routes            while the context is encoded, kept tokens go through LoRA-adapted W_Q and W_O
`compress` puts them together. As a program, this file compresses a text and answers questions about it:

    python compress.py --keep 0.1 --question "Who built the lighthouse?"

Shapes: B batch, N context tokens, K kept tokens, D width, G key-value heads, d head width; layers count from 1 in text.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import BadInput
from model import NEG, Cache, Llama, Route, gather, whole_cache


@dataclass
class CompressorConfig:
    eta: int = 6               # the scorer reads the hidden state after this many layers
    rank: int = 32             # of the adapters on W_Q and W_O
    decay: str = "centred"     # or "sigmoid": what a score does to attention
    two_pass: bool = False     # route every layer, after a first pass that only scores


class Scorer(nn.Module):
    """Part 1. s = W₂·GELU(W₁·rmsnorm(h)): hidden states (B, N, D) -> scores (B, N), fp32 throughout."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.w1 = nn.Linear(n_embd, n_embd)
        self.w2 = nn.Linear(n_embd, 1)
        nn.init.zeros_(self.w2.bias)

    def forward(self, h):
        h = F.rms_norm(h.float(), h.shape[-1:])
        return self.w2(F.gelu(self.w1(h)))[..., 0]


def kept_count(n, keep: float | None = None, tokens: int | None = None):
    """K = ceil(keep·N), or the absolute number `tokens`, never more than N. n: (B,) int64 -> (B,) int64."""
    if (keep is None) == (tokens is None):
        raise BadInput("give either keep (a fraction) or tokens (a number), not both and not neither")
    if keep is not None and not 0 < keep <= 1:
        raise BadInput(f"keep is {keep}, expected a fraction above 0 and at most 1, such as 0.1")
    if tokens is not None and tokens < 1:
        raise BadInput(f"tokens is {tokens}, expected at least 1")
    k = torch.full_like(n, tokens) if keep is None else (keep * n.double() - 1e-9).ceil().long()
    return k.minimum(n)


def select(scores, candidates, k):
    """Part 2. The k best-scored candidates of each row; of equal scores the earlier token.

    Args: scores (B, N) fp32; candidates (B, N) bool, the compressible tokens; k (B,) int64.
    Returns: kept (B, N) bool. Errors: ValueError for a score that is not a finite number.
    """
    if not torch.isfinite(scores[candidates]).all():
        raise ValueError("a score is not a finite number; the adapter is damaged or the training diverged")
    order = scores.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return candidates & (place < k[:, None])


def positions_of(mask):
    """The True positions of each row in ascending order: (B, N) bool -> index (B, M) int64, real (B, M) bool.

    M is the largest count; shorter rows are filled up with positions that `real` disowns.
    """
    counts = mask.sum(1)
    index = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :int(counts.max())]
    return index, torch.arange(index.shape[1], device=mask.device) < counts[:, None]


def decay(scores, kept, n, kind: str, gamma):
    """Part 3. β, what is added to the attention logits of kept tokens: (B, N) fp32; 0 elsewhere.

    sigmoid: β = log σ(s). centred: β = s − log mean exp(s over kept) + γ·log(N/K): the first two terms only compare
    kept tokens with each other, and γ takes up the wish, common to them all, for the attention the dropped ones had.
    Args: scores (B, N); kept (B, N) bool; n (B,) the number of compressible tokens; gamma: learned scalar.
    """
    if kind == "sigmoid":
        beta = F.logsigmoid(scores)
    else:
        k = kept.sum(1).clamp(min=1)
        mean = scores.masked_fill(~kept, -math.inf).logsumexp(1) - k.log()
        beta = scores - mean[:, None] + gamma * (n / k).log()[:, None]
    return torch.where(kept, beta, 0.0)


def soft_decay(scores, candidates, k, tau: float):
    """Decayed, not dropped (training only): β = log σ((s̃ − θ)/τ) for *every* candidate, kept or not: (B, N).

    s̃ are the scores standardised per row, so that they cannot flatten to let everything through; θ lies midway
    between the k-th and the next. So dropped tokens are heard a little too, and learn whether they are missed.
    """
    n = candidates.sum(1, keepdim=True)
    s = torch.where(candidates, scores, 0.0)
    mean = s.sum(1, keepdim=True) / n
    var = (torch.where(candidates, s - mean, 0.0) ** 2).sum(1, keepdim=True) / n
    s = (s - mean) * (var + 1e-6).rsqrt()
    ranked = s.detach().masked_fill(~candidates, -math.inf).sort(dim=1, descending=True).values
    next_best = ranked.gather(1, k[:, None].clamp(max=scores.shape[1] - 1))
    last_kept = ranked.gather(1, k[:, None] - 1)
    theta = torch.where((k[:, None] < n), (last_kept + next_best) / 2, last_kept - 10 * tau)  # nothing dropped: all in
    return torch.where(candidates, F.logsigmoid((s - theta) / tau), 0.0)


@dataclass
class Context:
    """A batch of documents read up to layer η: what teacher and student share. Padding is on the right."""
    h: torch.Tensor           # (B, N, D) after layer η
    ks: list[torch.Tensor]    # keys of layers 1…η, (B, G, N, d) each
    vs: list[torch.Tensor]
    tokens: torch.Tensor      # (B, N) int64
    lengths: torch.Tensor     # (B,) int64, real tokens
    candidates: torch.Tensor  # (B, N) bool: compressible; the rest is padding or protected, which is kept whole

    @property
    def real(self):           # (B, N) bool
        return torch.arange(self.h.shape[1], device=self.h.device) < self.lengths[:, None]

    @property
    def protected(self):      # (B, N) bool
        return self.real & ~self.candidates


def short_cache(ks, vs, index, real, beta, ctx: Context) -> Cache:
    """The cache of gathered keys and values. A padded slot holds zeros, and its bias keeps everybody away from it."""
    if not real.all():
        pad = real[:, None, :, None]
        ks, vs = [k * pad for k in ks], [v * pad for v in vs]
    return Cache(ks, vs, torch.where(real, beta.gather(1, index), NEG), torch.where(real, index, -1), ctx.lengths)


def drop_from(full: Cache, ctx: Context, kept) -> Cache:
    """The tokens `kept` (B, N) bool, and the protected ones, of an uncompressed cache: what training-free methods do."""
    index, real = positions_of(kept | ctx.protected)
    return short_cache([gather(k, index) for k in full.k], [gather(v, index) for v in full.v], index, real,
                       torch.zeros_like(full.bias), ctx)


class Compressor(nn.Module):
    """All that is trained: the scorer, the adapters (fp32), and γ. The Llama is passed in, and stays frozen.

    adapted layers: η+1 … L−1; in layer L an adapter would reach no key or value. With two_pass, 1 … L−1.
    """

    def __init__(self, model_cfg, cfg: CompressorConfig):
        super().__init__()
        c = model_cfg
        if not 1 <= cfg.eta <= c.n_layer - 1:
            raise BadInput(f"eta is {cfg.eta}, expected 1 … {c.n_layer - 1} for a model of {c.n_layer} layers")
        self.cfg = cfg
        self.first = 0 if cfg.two_pass else cfg.eta          # index of the first adapted layer
        n, r, inner = c.n_layer - 1 - self.first, cfg.rank, c.n_head * c.head_dim
        self.scorer = Scorer(c.n_embd)
        self.gamma = nn.Parameter(torch.zeros(()))
        # A ~ N(0, 1/D), B = 0: routing changes nothing until it has learned something
        self.a_q = nn.Parameter(torch.randn(n, r, c.n_embd) * c.n_embd ** -0.5)
        self.b_q = nn.Parameter(torch.zeros(n, inner, r))
        self.a_o = nn.Parameter(torch.randn(n, r, inner) * c.n_embd ** -0.5)
        self.b_o = nn.Parameter(torch.zeros(n, c.n_embd, r))

    def routes(self, kept, dtype):
        """Part 4. layer -> Route for the kept tokens; None for a layer without adapters. kept: (B, N) bool."""
        mask = kept[..., None].to(dtype)                      # (B, N, 1)
        def route(layer):
            i = layer - self.first
            if not 0 <= i < len(self.a_q):
                return None
            return Route(mask, self.a_q[i].to(dtype), self.b_q[i].to(dtype), self.a_o[i].to(dtype),
                         self.b_o[i].to(dtype), scale=1.0)    # α = r
        return route

    @torch.no_grad()
    def read(self, model: Llama, tokens, lengths=None, protect=None) -> Context:
        """The context up to layer η. tokens (B, N) int64; lengths (B,); protect (B, N) bool, the tokens to keep whole."""
        B, N = tokens.shape
        lengths = torch.full((B,), N, device=tokens.device) if lengths is None else lengths
        candidates = torch.arange(N, device=tokens.device) < lengths[:, None]
        if protect is not None:
            candidates = candidates & ~protect
        h, ks, vs = model.read(model.embed(tokens), 0, self.cfg.eta)
        return Context(h, ks, vs, tokens, lengths, candidates)

    @torch.no_grad()
    def full(self, model: Llama, ctx: Context) -> Cache:
        """The uncompressed cache: the frozen layers after η, over the same hidden states. The teacher's."""
        _, ks, vs = model.read(ctx.h, self.cfg.eta)
        return whole_cache(ctx.ks + ks, ctx.vs + vs, ctx.lengths)

    def encode(self, model: Llama, ctx: Context, kept, beta, everything: bool = False) -> Cache:
        """Read the context again from layer η+1 on with `kept` (B, N) bool routed; keep those tokens' keys and values.

        beta: (B, N) fp32, the decay of the kept tokens. Protected tokens stay too, unrouted, with β = 0. With
        `everything` no token is dropped from the cache (decayed, not dropped).
        """
        stay = ctx.real if everything else kept | ctx.protected
        index, real = positions_of(stay)
        some = (kept.sum(1) < ctx.candidates.sum(1))[:, None]  # a row that keeps all of its tokens is not compressed
        beta, route = beta * some, self.routes(kept & some, model.dtype)
        if self.cfg.two_pass:
            _, ks, vs = model.read(model.embed(ctx.tokens), 0, route=route, index=index)
        else:
            _, ks, vs = model.read(ctx.h, self.cfg.eta, route=route, index=index)
            ks = [gather(k, index) for k in ctx.ks] + ks
            vs = [gather(v, index) for v in ctx.vs] + vs
        return short_cache(ks, vs, index, real, beta, ctx)

    def compress(self, model: Llama, ctx: Context, keep=None, tokens=None, scores=None) -> Cache:
        """A context's short cache. keep = 1 is no compression at all: no routes, no β, the pretrained model.

        scores: (B, N) in place of the scorer's own, with β = 0 (other ways to choose, under the trained routing).
        """
        n = ctx.candidates.sum(1)
        k = kept_count(n, keep, tokens)
        if bool((k == n).all()):
            return self.full(model, ctx)
        own = self.scorer(ctx.h)
        kept = select(own if scores is None else scores, ctx.candidates, k)
        beta = decay(own, kept, n, self.cfg.decay, self.gamma) if scores is None else torch.zeros_like(own)
        return self.encode(model, ctx, kept, beta)
