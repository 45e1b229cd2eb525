"""KV-Distill: turn the cache of a long context into a short one, once, before any question is known.

The five parts of the method (arXiv 2503.10337), four of them here and the fifth, the loss, in train.py:
  1. Scorer            a small network reads each token's hidden state after layer η and gives a score for every head
  2. select, gather    the best-scored entries of all heads together stay: one budget, shared
  3. decay             attention to an entry gets β, a function of its score: how the loss reaches the scorer
  4. routes            while the context is encoded, kept tokens go through LoRA-adapted W_Q and W_O
`compress` puts them together; `attention_received` is what the scorer is taught to foresee. As a program (run/ask.py)
this file compresses a text and answers questions about it:

    python compress.py --keep 0.1 --question "Who built the lighthouse?"

Shapes: B batch, N context tokens, K kept of them per head on average, L layers, G key-value heads, d head width, D
width. Scores, choices and β are (B, l, g, N): l = L and g = G where each head chooses (`head`), l = g = 1 where a token
stays in all heads or in none (`token`, the paper's way). Layers count from 1 in text: index i is layer i + 1.
"""
import math
import signal
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import NEG, Cache, Llama, Part, Route, answer, whole_cache
from run.compress_flags import find_adapter
from run.errors import BadInput, read_json, run_program
from run.files import ROOT, default_adapter, read_adapter


@dataclass
class CompressorConfig:
    choice: str = "head"       # each head keeps tokens of its own; or "token": all heads keep the same ones
    eta: int = 6               # the scorer reads the hidden state after this many layers
    hidden: int = 1024         # width of the scorer's hidden layer
    recent: int = 4            # last tokens that every head keeps (`head` only): K/8 of them, 1 … this many (LOG.md)
    decay: str = "threshold"   # or "sigmoid", the paper's: what a score does to attention
    tau: float = 0.5           # nats of score over which `threshold` goes from dropped to kept
    rank: int = 32             # of the adapters on W_Q and W_O


# ------------------------------------------------------------------------------------------------- 1. who is needed

class Scorer(nn.Module):
    """Part 1. s = W₂·GELU(W₁·x), fp32; x is the RMS-normalised hidden state and how much text lies after and before the
    token: a causal hidden state cannot know how much is still to come (LOG.md)."""

    def __init__(self, n_embd: int, hidden: int, n_layer: int, n_kv_head: int):
        super().__init__()
        self.heads = n_layer, n_kv_head
        self.w1 = nn.Linear(n_embd + 2, hidden)
        self.w2 = nn.Linear(hidden, n_layer * n_kv_head)

    def forward(self, h, lengths):
        """Hidden states (B, N, D) of contexts of `lengths` (B,) tokens -> scores (B, l, g, N) fp32."""
        before = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
        after = (lengths[:, None] - 1 - before).clamp(min=0)
        places = torch.stack([after, before], -1).to(self.w1.weight.dtype).log1p()
        x = torch.cat([F.rms_norm(h.to(self.w1.weight.dtype), h.shape[-1:]), places], -1)
        return self.w2(F.gelu(self.w1(x))).transpose(1, 2).unflatten(1, self.heads)


# ------------------------------------------------------------------------------------------------------ 2. who stays

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


@dataclass
class Choice:
    kept: torch.Tensor    # (B, l, g, N) bool; protected tokens are not in it, they stay anyway
    fixed: torch.Tensor   # (B, 1, 1, N) bool: what no score moves: recent tokens, and all that is not compressible
    theta: torch.Tensor   # (B, 1, 1, 1) fp32, midway between the last kept score and the next

    @property
    def share(self):      # (B, l, N) fp32: of a layer's heads, how many keep the token
        return self.kept.float().mean(2)


def select(scores, candidates, k, recent=0, check: bool = True) -> Choice:
    """Part 2. The k·l·g best-scored entries of a row, all heads together; of equal ones the earlier layer, head, token.

    Args: scores (B, l, g, N) fp32; candidates (B, N) bool, the compressible tokens; k (B,) int64, kept tokens per head
    on average; recent: of them, the last ones that every head keeps, a number or (B,) int64; check: look at the scores.
    Errors: BadInput, with check, for a score that is not a finite number.
    """
    B, l, g, N = scores.shape
    scores = scores.detach()
    if check and not torch.isfinite(scores.masked_fill(~candidates[:, None, None], 0)).all():
        raise BadInput("a score is not a finite number; the adapter is damaged, or training diverged (--scorer-lr)")
    from_end = candidates.flip(1).cumsum(1).flip(1)                                        # 1 for the last candidate
    forced = (candidates & (from_end <= k.clamp(max=recent)[:, None]))[:, None, None]
    ranked = scores.masked_fill(forced, math.inf).masked_fill(~candidates[:, None, None], -math.inf)
    ranked, order = ranked.flatten(1).sort(dim=1, descending=True, stable=True)            # (B, l·g·N)
    budget = (k * l * g)[:, None]
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    kept.scatter_(1, order, torch.arange(l * g * N, device=k.device) < budget)
    last = ranked.gather(1, (budget - 1).clamp(min=0))
    after = ranked.gather(1, budget.clamp(max=l * g * N - 1))
    last = torch.where(last == math.inf, after + 1, last)                                  # all that is kept is forced
    after = torch.where(after == -math.inf, last - 1, after)                               # nothing is dropped
    fixed = forced | ~candidates[:, None, None]
    return Choice(kept.view_as(scores), fixed, ((last + after) / 2)[..., None, None])


def gather(stay, beta=None):
    """A choice -> store(layer, k, v), which makes the parts of a short cache of a layer's keys and values (B, G, N, d).

    stay: (B, L or 1, G or 1, N) bool; beta: as large, fp32, or None. Heads that hold equally many and lie side by side
    share a part. Rows of a batch that keep fewer than others are padded.
    """
    counts = stay.sum(-1)                                                                  # (B, l, g)
    order = stay.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)             # those that stay come first
    real = torch.arange(stay.shape[-1], device=stay.device) < counts[..., None]
    positions = torch.where(real, order, -1).to(torch.int32)
    widths, least = counts.amax(0).tolist(), counts.amin(0).tolist()

    def store(layer, k, v) -> list[Part]:
        layer, parts = layer if len(widths) > 1 else 0, []                                 # one choice serves all
        row, head = (torch.arange(n, device=k.device)[:, None] for n in k.shape[:2])
        for width, same in groupby(range(stay.shape[2]), widths[layer].__getitem__):
            heads = [*same]
            block = slice(heads[0], heads[-1] + 1)
            places, bias = positions[:, layer, block, :width], None                        # (B, g or 1, S)
            if beta is not None:
                bias = beta[:, layer, block].gather(2, order[:, layer, block, :width])
            if beta is not None or min(least[layer][block]) < width:
                bias = torch.where(places < 0, NEG, 0.0 if beta is None else bias)
            index = row[..., None], head[block] if stay.shape[2] > 1 else head, places.clamp(min=0)
            parts.append(Part(k[index], v[index], places.clone(), bias))                   # (B, g, S, d)
        return parts
    return store


# ------------------------------------------------------------------------------- 3. how the loss hears of the scores

def decay(scores, choice: Choice, kind: str, tau: float, soft: bool = False):
    """Part 3. β, what is added to every attention logit towards a context entry: (B, l, g, N) fp32.

    The chain by which the loss reaches the scorer:
        Scorer → s → decay: β → whole_cache(…, bias=β): one column more of the keys → attend: softmax(q·kᵀ/√d + β)·v
    sigmoid: β = log σ(s). threshold: β = log σ((s − θ)/τ), θ a constant: no gradient flows through it. Three entries,
    θ = −4, τ = 0.5, s = −3, −4.2, −7: β = −0.13, −0.91, −6.0.
    In a hard step, and in a finished cache, dropped entries get −1e9, and with `threshold` those that stay have the
    *value* 0: what is left of β is its gradient. In a soft step (training) every entry is heard through its β.
    Recent and protected entries have β = 0.
    """
    beta = F.logsigmoid(scores if kind == "sigmoid" else (scores - choice.theta) / tau)
    beta = torch.where(choice.fixed, 0.0, beta)
    if soft:
        return beta
    return torch.where(choice.kept | choice.fixed, beta if kind == "sigmoid" else beta - beta.detach(), NEG)


# ------------------------------------------------------------------------------------- what the scorer is to foresee

@torch.no_grad()
def attention_received(model: Llama, cache: Cache, tokens, lengths=None, segments=None, first: int = 0,
                       end: int | None = None, sinks: int = 0, largest: int | None = None):
    """The most attention that entries first … end−1 of a whole cache get from any of `tokens`: (B, L, G, end−first).

    Maximum over the tokens and over the query heads of a group. Of a part of the cache, attention is counted as if
    there were only it, the first `sinks` entries, and the tokens themselves. With tokens that repeat the context this
    is KVzip's importance (arXiv 2505.23416).
    tokens: (B, T) int64, padded on the right to `lengths` (B,), or `segments`, and `largest`, as in Llama.forward.
    """
    S, best = cache.layers[0][0].k.shape[2], {}
    end, real = S if end is None else end, None
    if segments is not None or lengths is not None:
        real = segments >= 0 if lengths is None else (
            torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])        # (B, T)

    def watch(layer, weights, i):                                                          # (B, G, H/G, t, s)
        received = weights[..., first:end]
        if end - first < S:
            seen = received.sum(-1) + weights[..., S:].sum(-1) + weights[..., :min(sinks, first)].sum(-1)
            received = received / seen.clamp(min=1e-30)[..., None]
        if real is not None:
            received = received.masked_fill(~real[:, None, None, i:i + weights.shape[3], None], 0)
        received = received.amax((2, 3))                                                   # (B, G, end − first)
        best[layer] = torch.maximum(best[layer], received) if layer in best else received

    model(tokens, cache, segments, lengths, watch, largest)
    return torch.stack(list(best.values()), 1)


# -------------------------------------------------------------------------------------------------------- the method

@dataclass
class Context:
    """A batch of documents read up to layer η: what teacher and student share. Padding is on the right."""
    h: torch.Tensor           # (B, N, D) after layer η
    kvs: list                 # keys and values of layers 1…η, a pair of (B, G, N, d) each
    tokens: torch.Tensor      # (B, N) int64
    lengths: torch.Tensor     # (B,) int64, real tokens
    candidates: torch.Tensor  # (B, N) bool: compressible; the rest is padding or protected, which is kept whole
    padded: bool              # rows differ in length

    @property
    def protected(self):      # (B, N) bool
        return (torch.arange(self.h.shape[1], device=self.h.device) < self.lengths[:, None]) & ~self.candidates

    def whole_cache(self, kvs, bias=None) -> Cache:
        return whole_cache(kvs, self.lengths if self.padded else None, bias)


class Compressor(nn.Module):
    """All that is trained: the scorer and the adapters (fp32). The Llama is passed in, and stays frozen.

    Adapted layers: η+1 … L−1; in layer L an adapter would reach no key or value.
    """

    def __init__(self, model_cfg, cfg: CompressorConfig):
        super().__init__()
        c = model_cfg
        if not (isinstance(cfg.eta, int) and 1 <= cfg.eta <= c.n_layer - 2):  # a layer to adapt, and the last
            raise BadInput(f"eta is {cfg.eta!r}, expected 1 … {c.n_layer - 2} for a model of {c.n_layer} layers")
        if not all(type(x) is int and x >= 0 for x in (cfg.hidden, cfg.recent, cfg.rank)) or type(cfg.tau) is not float:
            raise BadInput(f"hidden, recent, rank, tau are {cfg.hidden!r:.20}, {cfg.recent!r:.20}, {cfg.rank!r:.20}, "
                           f"{cfg.tau!r:.20}: expected whole numbers and a fraction")
        for name, known in (("choice", ("head", "token")), ("decay", ("threshold", "sigmoid"))):
            if getattr(cfg, name) not in known:
                raise BadInput(f"{name} is {getattr(cfg, name)!r}, expected {known[0]!r} or {known[1]!r}")
        self.cfg, n, r, inner = cfg, self.n_adapted(c, cfg), cfg.rank, c.n_head * c.head_dim
        self.scorer = Scorer(c.n_embd, cfg.hidden, *((c.n_layer, c.n_kv_head) if cfg.choice == "head" else (1, 1)))
        # about the mean of a log attention; or a σ(s) near 1, so that all tokens are heard at first
        nn.init.constant_(self.scorer.w2.bias, -4.0 if cfg.decay == "threshold" else 4.0)
        # A ~ N(0, 1/D), B = 0: routing changes nothing until it has learned something
        self.a_q = nn.Parameter(torch.randn(n, r, c.n_embd) * c.n_embd ** -0.5)
        self.b_q = nn.Parameter(torch.zeros(n, inner, r))
        self.a_o = nn.Parameter(torch.randn(n, r, inner) * c.n_embd ** -0.5)
        self.b_o = nn.Parameter(torch.zeros(n, c.n_embd, r))

    @staticmethod
    def n_adapted(model_cfg, cfg: CompressorConfig) -> int:
        return model_cfg.n_layer - 1 - cfg.eta

    def adapters(self) -> list[nn.Parameter]:
        return [self.a_q, self.b_q, self.a_o, self.b_o]

    @torch.no_grad()
    def read(self, model: Llama, tokens, lengths=None, protect=None) -> Context:
        """The context up to layer η. tokens (B, N) int64; lengths (B,); protect (B, N) bool, tokens to keep whole."""
        (B, N), padded = tokens.shape, lengths is not None
        lengths = lengths if padded else torch.full((B,), N, device=tokens.device)
        candidates = torch.arange(N, device=tokens.device) < lengths[:, None]
        if protect is not None:
            candidates = candidates & ~protect
        h, kvs = model.run_layers(model.embed(tokens), 0, self.cfg.eta)
        return Context(h, kvs, tokens, lengths, candidates, padded)

    @torch.no_grad()
    def full(self, model: Llama, ctx: Context) -> Cache:
        """The uncompressed cache: the frozen layers after η, over the same hidden states. The teacher's."""
        return ctx.whole_cache(ctx.kvs + model.run_layers(ctx.h, self.cfg.eta)[1])

    def scores(self, ctx: Context):
        return self.scorer(ctx.h, ctx.lengths)                # (B, l, g, N) fp32

    def choose(self, scores, ctx: Context, k, check: bool = True) -> Choice:
        recent = (k // 8).clamp(1, self.cfg.recent) if self.cfg.choice == "head" else 0  # a recent of 0 stays 0
        return select(scores, ctx.candidates, k, recent, check)

    def rho(self, n, k):
        """How strongly anything is routed, by the compression N/K: not at all up to 4×, where it costs more than it
        brings (LOG.md), then as the logarithm grows, up to 1 at 100×. n, k: (B,) candidates, and kept of them."""
        return ((n.clamp(min=1) / k.clamp(min=1) / 4).log() / math.log(25)).clamp(0, 1)

    def routes(self, choice: Choice, n, k, dtype):
        """Part 4. layer index -> Route, or None for a layer without adapters.

        A token is routed as strongly as the next layer's heads keep it, for these are the first whose key and value the
        addition reaches; times ρ.
        """
        strength = (choice.share * self.rho(n, k)[:, None, None]).to(dtype)[..., None]         # (B, l, N, 1)
        def route(layer):
            i, next_layer = layer - self.cfg.eta, layer + 1 if strength.shape[1] > 1 else 0
            if not 0 <= i < len(self.a_q):
                return None
            return Route(strength[:, next_layer], *(x[i].to(dtype) for x in self.adapters()))
        return route

    def encode(self, model: Llama, ctx: Context, choice: Choice, k, store) -> list:
        """Read the context again from layer η+1 on, its kept tokens routed. Every layer's store(layer, k, v), as in
        run_layers: what is made of a layer's keys and values before the next one's come.

            layer   1 … η             η+1 … L−1              L
                    read once,        frozen for dropped     keys and values only
                    for teacher       tokens, + LoRA for
                    and student       kept ones
        """
        below = [store(layer, *kv) for layer, kv in enumerate(ctx.kvs)]
        route = self.routes(choice, ctx.candidates.sum(1), k, model.dtype)
        return below + model.run_layers(ctx.h, self.cfg.eta, route=route, store=store)[1]

    def compress(self, model: Llama, ctx: Context, keep=None, tokens=None, scores=None) -> Cache:
        """A context's short cache. keep = 1 is no compression at all: no routes, no β, the pretrained model.

        scores: (B, l, g, N) in place of the scorer's own, with β = 0 (other ways to choose, under the trained routing).
        """
        n = ctx.candidates.sum(1)
        k = kept_count(n, keep, tokens)
        if bool((k == n).all()):
            return self.full(model, ctx)
        given = self.scores(ctx) if scores is None else scores
        choice, beta = self.choose(given, ctx, k), None
        if self.cfg.decay == "sigmoid" and scores is None:
            beta = decay(given, choice, "sigmoid", self.cfg.tau) * (choice.kept & (k < n)[:, None, None, None])
        store = gather(choice.kept | ctx.protected[:, None, None], beta)
        return Cache(self.encode(model, ctx, choice, k, store), ctx.lengths)


def drop_from(full: Cache, ctx: Context, kept) -> Cache:
    """What training-free methods do: of an uncompressed cache the entries `kept` (B, l, g, N), and protected ones."""
    store = gather(kept | ctx.protected[:, None, None])
    return Cache([store(layer, part.k, part.v) for layer, (part,) in enumerate(full.layers)], full.next_position)


def open_text(comp: Compressor, model: Llama, tokenizer, text: str) -> Context:
    """A text as the user's turn of a chat, read up to layer η; the chat header before it is protected."""
    if not text.strip():
        raise BadInput("the context is empty; there is nothing to compress")
    ids = torch.tensor([tokenizer.header + tokenizer.document(text.strip())], device=model.device)
    protect = torch.arange(ids.shape[1], device=model.device)[None] < max(1, len(tokenizer.header))
    return comp.read(model, ids, protect=protect)


def load_adapter(folder, model: Llama, tokenizer) -> Compressor:
    """The compressor in `folder`, on the model's device. Errors: BadInput for a missing, damaged or foreign adapter."""
    meta, tensors = read_adapter(folder, model, tokenizer)
    found, known = set(meta.get("config") or ()), set(CompressorConfig.__dataclass_fields__)
    if found != known:
        raise BadInput(f"{folder}: an adapter of another version of this program ({', '.join(sorted(found ^ known))} "
                       "are settings of one and not of the other); train it again")
    try:
        with torch.device("meta"):  # so that no size is believed before it is compared
            comp = Compressor(model.cfg, CompressorConfig(**meta["config"]))
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in comp.state_dict().items()}:
            raise BadInput("its tensors are not those that adapter.json describes")
    except (BadInput, TypeError, RuntimeError, OverflowError) as e:
        raise BadInput(f"{folder}: no usable adapter ({e}); train or copy it again") from None
    comp.load_state_dict(tensors, assign=True)
    return comp.to(model.device).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- the program

DEMO = ROOT / "data" / "lighthouse.txt"
DEMO_QUESTIONS = ["How tall is the tower?", "Who was the first keeper of the lighthouse?", "Who built the lighthouse?"]


def open_compressor(path, model: Llama, tokenizer, seed: int = 0) -> tuple[Compressor, Path | None]:
    """The adapter in `path`, or the default one, and its folder; or an untrained one, and None. Says which."""
    folder = find_adapter(path) if path is not None else default_adapter(model, tokenizer)
    if folder is None:
        print("adapter: none found for this model, so an untrained one; train.py makes one")
        torch.manual_seed(seed)
        return Compressor(model.cfg, CompressorConfig(eta=min(6, model.cfg.n_layer - 2))).to(model.device), None
    comp, meta = load_adapter(folder, model, tokenizer), read_json(folder / "adapter.json")
    steps = [str(meta.get("train", {}).get(name, "?")) for name in ("reconstruct", "steps")]
    print(f"adapter: {folder} ({' + '.join(steps)} steps, {meta.get('created', '')})")
    return comp, folder


def show_answers(model: Llama, tokenizer, caches: dict[str, Cache], questions: list[str], *how) -> None:
    """Every question, and below it a line with each cache's answer. how: as in model.answer."""
    replies, seconds = {}, []
    for name, cache in caches.items():
        start = time.perf_counter()
        replies[name] = answer(model, tokenizer, cache, questions, *how)
        seconds.append(f"{time.perf_counter() - start:.1f}")
    for i, question in enumerate(questions):
        print(f"\n? {question}")
        for name, reply in replies.items():
            print(f"  {name:{max(map(len, replies))}}  {reply[i]}")
    print(f"\nanswers took {', '.join(seconds)} s")


if __name__ == "__main__":
    from run.ask import main  # which needs eval.py, for baselines, which needs this file
    run_program(main)
