"""KV-Distill: turn the cache of a long context into a short one, once, before any question is known.

The five parts of the method (arXiv 2503.10337), four of them here and the fifth, the loss, in train.py:
  1. Scorer            a small network reads each token's hidden state after layer η and gives one score
  2. select, gather    the K best-scored tokens stay, the same in every layer
  3. decay             a kept token's attention logits get β, a function of its score: how the loss reaches the scorer
  4. routes            while the context is encoded, kept tokens go through LoRA-adapted W_Q and W_O
`compress` puts them together. As a program, this file compresses a text and answers questions about it:

    python compress.py --keep 0.1 --question "Who built the lighthouse?"

Shapes: B batch, N context tokens, K kept tokens, D width, G key-value heads, d head width; layers count from 1 in text.
"""
import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import NEG, Cache, Llama, Route, answer, gather, whole_cache
from run.errors import BadInput, read_json, run_program
from run.files import ROOT, load_cache, newest_adapter, read_adapter, save_cache
from run.models import add_model_flags, open_model, seed_flag


@dataclass
class CompressorConfig:
    eta: int = 6               # the scorer reads the hidden state after this many layers
    rank: int = 32             # of the adapters on W_Q and W_O
    decay: str = "centred"     # or "sigmoid": what a score does to attention
    two_pass: bool = False     # route every layer, after a first pass that only scores
    positions: bool = True     # the scorer also sees where a token stands


class Scorer(nn.Module):
    """Part 1. s = W₂·GELU(W₁·x), fp32; x is the RMS-normalised hidden state and, with `positions`, how much text lies
    behind and before the token: a causal hidden state cannot know how much is still to come (LOG.md)."""

    def __init__(self, n_embd: int, positions: bool):
        super().__init__()
        self.positions = positions
        self.w1 = nn.Linear(n_embd + 2 * positions, n_embd)
        self.w2 = nn.Linear(n_embd, 1)
        nn.init.zeros_(self.w2.bias)

    def forward(self, h, lengths):
        """Hidden states (B, N, D) of contexts of `lengths` (B,) tokens -> scores (B, N)."""
        x = F.rms_norm(h.to(self.w1.weight.dtype), h.shape[-1:])
        if self.positions:
            before = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
            behind = (lengths[:, None] - 1 - before).clamp(min=0)
            x = torch.cat([x, torch.stack([behind, before], -1).to(x.dtype).log1p()], -1)
        return self.w2(F.gelu(self.w1(x)))[..., 0]


def kept_count(n, keep: float | None = None, tokens: int | None = None):
    """K = ceil(keep·N), or the absolute number `tokens`, never more than N. n: (B,) int64 -> (B,) int64."""
    if (keep is None) == (tokens is None):
        raise BadInput("give either keep (a fraction) or tokens (a number), not both and not neither")
    if keep is not None and not 0 < keep <= 1:
        raise BadInput(f"keep is {keep}, expected a fraction above 0 and at most 1, such as 0.1")
    if tokens is not None and tokens < 1:
        raise BadInput(f"tokens is {tokens}, expected at least 1")
    if keep is None:
        return n.clamp(max=min(tokens, 1 << 62))  # int64 holds it
    k = (keep * n.cpu().double() - 1e-9).ceil().clamp(min=1).long()  # on the CPU: not every device has float64
    return k.to(n.device).minimum(n)


def select(scores, candidates, k, check: bool = True):
    """Part 2. The k best-scored candidates of each row; of equal scores the earlier token.

    Args: scores (B, N) fp32; candidates (B, N) bool, the compressible tokens; k (B,) int64; check: look at the scores.
    Returns: kept (B, N) bool. Errors: BadInput, with check, for a score that is not a finite number.
    """
    if check and not torch.isfinite(scores[candidates]).all():
        raise BadInput("a score is not a finite number; the adapter is damaged, or training diverged (--scorer-lr)")
    order = scores.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1)  # of a permutation: its inverse
    return candidates & (place < k[:, None])


def positions_of(mask, slots: int | None = None):
    """The True positions of each row in ascending order: (B, N) bool -> index (B, M) int64, real (B, M) bool.

    M is the largest count; shorter rows are filled up with positions that `real` disowns. A caller who knows M gives
    it as `slots`: asking a GPU for it means waiting for the GPU.
    """
    counts = mask.sum(1)
    slots = int(counts.max()) if slots is None else slots
    index = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :slots]
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
        mean = scores.masked_fill(~kept, NEG).logsumexp(1) - k.log()
        beta = scores - mean[:, None] + gamma * (n.clamp(min=1) / k).log()[:, None]
    return torch.where(kept, beta, 0.0)


def soft_decay(scores, candidates, k, tau: float):
    """Decayed, not dropped (training only): β = log σ((s̃ − θ)/τ) for *every* candidate, kept or not: (B, N).

    s̃ are the scores standardised per row, so that they cannot flatten to let everything through; θ lies midway
    between the k-th and the next. So dropped tokens are heard a little too, and learn whether they are missed.
    """
    n = candidates.sum(1, keepdim=True).clamp(min=1)
    s = torch.where(candidates, scores, 0.0)
    mean = s.sum(1, keepdim=True) / n
    var = (torch.where(candidates, s - mean, 0.0) ** 2).sum(1, keepdim=True) / n
    s = (s - mean) * (var + 1e-6).rsqrt()
    ranked = s.detach().masked_fill(~candidates, -math.inf).sort(dim=1, descending=True).values
    next_best = ranked.gather(1, k[:, None].clamp(max=scores.shape[1] - 1))
    last_kept = ranked.gather(1, (k[:, None] - 1).clamp(min=0))
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
    pad = real[:, None, :, None]
    ks, vs = [k * pad for k in ks], [v * pad for v in vs]
    return Cache(ks, vs, torch.where(real, beta.gather(1, index), NEG), torch.where(real, index, -1), ctx.lengths)


def drop_from(full: Cache, ctx: Context, kept) -> Cache:
    """The tokens `kept` (B, N) bool and the protected ones of an uncompressed cache: what training-free methods do."""
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
        if not (isinstance(cfg.eta, int) and 1 <= cfg.eta <= c.n_layer - 2):  # a layer to adapt, and the last
            raise BadInput(f"eta is {cfg.eta!r}, expected 1 … {c.n_layer - 2} for a model of {c.n_layer} layers")
        if cfg.decay not in ("centred", "sigmoid"):
            raise BadInput(f"decay is {cfg.decay!r}, expected 'centred' or 'sigmoid'")
        self.cfg = cfg
        self.first = 0 if cfg.two_pass else cfg.eta          # index of the first adapted layer
        n, r, inner = c.n_layer - 1 - self.first, cfg.rank, c.n_head * c.head_dim
        self.scorer = Scorer(c.n_embd, cfg.positions)
        self.gamma = nn.Parameter(torch.zeros(()))
        # A ~ N(0, 1/D), B = 0: routing changes nothing until it has learned something
        self.a_q = nn.Parameter(torch.randn(n, r, c.n_embd) * c.n_embd ** -0.5)
        self.b_q = nn.Parameter(torch.zeros(n, inner, r))
        self.a_o = nn.Parameter(torch.randn(n, r, inner) * c.n_embd ** -0.5)
        self.b_o = nn.Parameter(torch.zeros(n, c.n_embd, r))

    def scores(self, ctx: Context):
        return self.scorer(ctx.h, ctx.lengths)                # (B, N) fp32

    def routes(self, kept, dtype):
        """Part 4. layer -> Route for the kept tokens; None for a layer without adapters. kept: (B, N) bool."""
        mask = kept[..., None].to(dtype)                      # (B, N, 1)
        def route(layer):
            i = layer - self.first
            if not 0 <= i < len(self.a_q):
                return None
            return Route(mask, self.a_q[i].to(dtype), self.b_q[i].to(dtype), self.a_o[i].to(dtype),
                         self.b_o[i].to(dtype))
        return route

    @torch.no_grad()
    def read(self, model: Llama, tokens, lengths=None, protect=None) -> Context:
        """The context up to layer η. tokens (B, N) int64; lengths (B,); protect (B, N) bool, tokens to keep whole."""
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

    def encode(self, model: Llama, ctx: Context, kept, beta, everything: bool = False,
               slots: int | None = None) -> Cache:
        """Read the context again from layer η+1 on with `kept` (B, N) bool routed; keep those tokens' keys and values.

        beta: (B, N) fp32, the decay of the kept tokens. Protected tokens stay too, unrouted, with β = 0. With
        `everything` no token is dropped from the cache (decayed, not dropped). slots: see `positions_of`.
        """
        stay = ctx.real if everything else kept | ctx.protected
        index, real = positions_of(stay, slots)
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
        own = self.scores(ctx)
        kept = select(own if scores is None else scores, ctx.candidates, k)
        beta = decay(own, kept, n, self.cfg.decay, self.gamma) if scores is None else torch.zeros_like(own)
        return self.encode(model, ctx, kept, beta)


def open_text(comp: Compressor, model: Llama, tokenizer, text: str) -> Context:
    """A text as the user's turn of a chat, read up to layer η; the chat header before it is protected."""
    if not text.strip():
        raise BadInput("the context is empty; there is nothing to compress")
    ids = torch.tensor([tokenizer.header + tokenizer.encode(text.strip())], device=model.device)
    protect = torch.arange(ids.shape[1], device=model.device)[None] < max(1, len(tokenizer.header))
    return comp.read(model, ids, protect=protect)


def load_adapter(folder, model: Llama, tokenizer) -> Compressor:
    """The compressor in `folder`, on the model's device. Errors: BadInput for a missing, damaged or foreign adapter."""
    meta, tensors = read_adapter(folder, model, tokenizer)
    try:
        comp = Compressor(model.cfg, CompressorConfig(**meta["config"]))
    except (KeyError, TypeError) as e:
        raise BadInput(f"{Path(folder) / 'adapter.json'}: no usable configuration ({e}); train or copy it again"
                       ) from None
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in comp.state_dict().items()}:
        raise BadInput(f"{folder}: the tensors are not those that adapter.json describes; train or copy it again")
    comp.load_state_dict(tensors)
    return comp.to(model.device).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- the program

def highlight(tokenizer, ids: list[int], kept: list[bool], colour: bool) -> str:
    """The text of ids with runs of kept tokens marked: in reverse video, or between [ and ] without a terminal."""
    on, off = ("\033[7m", "\033[0m") if colour else ("[", "]")
    out, i = "", 0
    while i < len(ids):
        j = i
        while j < len(ids) and kept[j] == kept[i]:
            j += 1
        text = tokenizer.decode(ids[i:j])
        out += on + text + off if kept[i] else text
        i = j
    return out


def read_text(path: str) -> str:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (UnicodeDecodeError, OSError) as e:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({e})") from None
    if not text.strip():
        raise BadInput(f"{path}: the context is empty; there is nothing to compress")
    return text.strip()


DEMO = ROOT / "data" / "lighthouse.txt"
DEMO_QUESTIONS = ["Who built the lighthouse?", "What did Ruth Abernathy do after she left the lighthouse?",
                  'Repeat the part of the text that starts with "The first keeper was".']


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Compress the cache of a text and answer questions from it.")
    p.add_argument("--context", metavar="FILE", help="text to compress, - for standard input; default: one in data/")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--keep", type=float, help="kept fraction of the compressible tokens; default 0.1")
    size.add_argument("--tokens", type=int, help="kept tokens, as an absolute number")
    p.add_argument("--question", action="append", metavar="TEXT", help="asked of both caches; repeatable")
    p.add_argument("--adapter", metavar="DIR", help="trained compressor; default: the newest in adapters/ and out/")
    p.add_argument("--save", metavar="FILE", help="write the short cache to this safetensors file")
    p.add_argument("--load", metavar="FILE", help="ask a saved cache: no document, no prefill")
    p.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens; default 64")
    p.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy decoding")
    p.add_argument("--seed", type=seed_flag, default=0, help="of the sampling, and of an untrained compressor")
    add_model_flags(p)
    a = p.parse_args()
    if a.load is not None and any(x is not None for x in (a.context, a.keep, a.tokens, a.adapter, a.save)):
        p.error("--load asks a cache as it is: no --context, --keep, --tokens, --adapter or --save goes with it")
    if a.load is not None and not a.question:
        p.error("--load needs at least one --question")
    if a.max_new_tokens < 1:
        p.error(f"--max-new-tokens is {a.max_new_tokens}: at least 1 is needed")
    if a.save is not None and (not a.save or Path(a.save).is_dir()):
        p.error(f"--save {a.save!r}: expected the name of a file")
    return a


def open_compressor(path, model: Llama, tokenizer, seed: int = 0) -> tuple[Compressor, Path | None]:
    """The adapter in `path`, or the newest that fits, and its folder; or an untrained one, and None. Says which."""
    folder = Path(path) if path else newest_adapter(model, tokenizer)
    if folder is None:
        print("adapter: none found for this model, so an untrained one; train.py makes one")
        torch.manual_seed(seed)
        return Compressor(model.cfg, CompressorConfig(eta=min(6, model.cfg.n_layer - 2))).to(model.device), None
    comp, meta = load_adapter(folder, model, tokenizer), read_json(folder / "adapter.json")
    print(f"adapter: {folder} ({meta.get('train', {}).get('steps', '?')} steps, {meta.get('created', '')})")
    return comp, folder


@torch.no_grad()
def main() -> None:
    a = parse_args()
    if a.keep is None and a.tokens is None:
        a.keep = 0.1
    kept_count(torch.tensor([1]), a.keep, a.tokens)  # complain before the weights are loaded
    text = None if a.load is not None else read_text(DEMO if a.context is None else a.context)
    model, tokenizer = open_model(a)

    def ask(cache, questions):
        start = time.perf_counter()
        out = answer(model, tokenizer, cache, questions, a.max_new_tokens, a.temperature, a.seed)
        return out, time.perf_counter() - start

    if a.load is not None:
        cache = load_cache(a.load, model, tokenizer)
        print(f"{a.load}: {cache.n_slots} of {int(cache.next_position[0])} tokens, {cache.nbytes():,} bytes")
        for question, reply in zip(a.question, ask(cache, a.question)[0]):
            print(f"\n? {question}\n  {reply}")
        return

    comp, _ = open_compressor(a.adapter, model, tokenizer, a.seed)
    t0 = time.perf_counter()
    ctx = open_text(comp, model, tokenizer, text)
    full = comp.full(model, ctx)
    t1 = time.perf_counter()
    cache = comp.compress(model, ctx, a.keep, a.tokens)
    t2 = time.perf_counter()

    body = ctx.candidates[0]
    here = torch.zeros_like(body).index_fill(0, cache.positions[0], True)[body].tolist()
    print("\n" + highlight(tokenizer, ctx.tokens[0, body].tolist(), here, sys.stdout.isatty()) + "\n")
    n, k = len(here), sum(here)
    print(f"tokens   {n} compressible -> {k} kept, {n / max(k, 1):.1f} x fewer; {int(ctx.protected.sum())} protected")
    print(f"bytes    {full.nbytes():,} -> {cache.nbytes():,} as stored, the header included")
    print(f"seconds  {t1 - t0:.2f} to read the text, {t2 - t1:.2f} to compress it")
    if a.save is not None:
        save_cache(a.save, cache, model, tokenizer)
        print(f"saved    {a.save} ({os.path.getsize(a.save):,} bytes)")
    questions = a.question or (["What is this text about?"] if a.context else DEMO_QUESTIONS)
    (long, long_s), (short, short_s) = ask(full, questions), ask(cache, questions)
    for q, x, y in zip(questions, long, short):
        print(f"\n? {q}\n  full   {x}\n  short  {y}")
    print(f"\nanswers took {long_s:.1f} s from the full cache, {short_s:.1f} s from the short one")


if __name__ == "__main__":
    run_program(main)
