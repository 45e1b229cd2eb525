"""What results/ablations.py compares with the method as it is: a linear scorer, and other ways to tell kept tokens that
they are kept, each `compress.Compressor` but for a method or two.
"""
import math
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from compress import Compressor, Context, Scorer
from model import Block, Cache, Route


class Read(Context):
    """A context whose whole cache may hold more entries behind its own: learned slots, which take no positions."""

    def whole_cache(self, kvs, bias=None) -> Cache:
        bias = None if bias is None else F.pad(bias, (0, kvs[0][0].shape[2] - bias.shape[-1]))
        return replace(super().whole_cache(kvs, bias), next_position=self.lengths)


class Linear(Scorer):
    """`Scorer` without a hidden layer."""

    def __init__(self, n_embd: int, n_layer: int, n_kv_head: int):
        super().__init__(n_embd, 1, n_layer, n_kv_head)
        self.w1, self.w2 = nn.Identity(), nn.Linear(n_embd + 2, n_layer * n_kv_head)

    def forward(self, h, lengths):
        before = torch.arange(h.shape[1]).expand(h.shape[:2])
        places = torch.stack([lengths[:, None] - 1 - before, before], -1).float().log1p()
        x = torch.cat([F.rms_norm(h.float(), h.shape[-1:]), places], -1)
        return self.w2(x).transpose(1, 2).unflatten(1, self.heads)


class Routing(Compressor):
    """As shipped, but for ρ, a power of log(N/K) / log 100, and whose share of heads says how strongly a token is
    routed."""

    def __init__(self, model_cfg, cfg, power: float | None = None, where: str = "next"):
        super().__init__(model_cfg, cfg)
        self.power, self.where = power, where

    def trained(self) -> list[nn.Parameter]:
        return self.adapters()

    def rho(self, n, k):
        return super().rho(n, k) if self.power is None else ((n / k).log() / math.log(100)).clamp(max=1) ** self.power

    def share(self, choice):
        """(B, l, N): strength by layer, but for ρ."""
        share = choice.share
        if self.where == "later":        # of all heads of this and later layers, not of this layer's alone
            share = share.flip(1).cumsum(1).flip(1) / torch.arange(share.shape[1], 0, -1)[:, None]
        elif self.where == "everywhere":
            share = share.mean(1, keepdim=True).expand_as(share)
        return share

    def routes(self, choice, n, k, dtype):
        return super().routes(SimpleNamespace(share=self.share(choice)), n, k, dtype)


class Kept(Routing):
    """A learned embedding tells kept tokens so, after layer η, as strongly as they would be routed; nothing else."""

    def __init__(self, model_cfg, cfg):
        super().__init__(model_cfg, cfg)
        self.kept = nn.Parameter(torch.zeros(model_cfg.n_embd))

    def trained(self):
        return [self.kept]

    def encode(self, model, ctx, choice, k, store):
        m = self.share(choice)[:, self.cfg.eta] * self.rho(ctx.candidates.sum(1), k)[:, None]  # (B, N)
        told = replace(ctx, h=ctx.h + (m[..., None] * self.kept).to(ctx.h.dtype))
        return super().encode(model, told, choice, k, store)

    def routes(self, *_):
        return lambda layer: None


class Adapted(Routing):
    """Adapters on any of a block's linear maps, where and as strongly as routing has them on W_Q and W_O."""

    def __init__(self, model_cfg, cfg, maps: str):
        super().__init__(model_cfg, cfg)
        self.maps, block, n = maps.split(), Block(model_cfg, 0), len(self.a_q)
        sizes = [block.get_submodule(name).weight.shape for name in self.maps]
        self.a = nn.ParameterList(torch.randn(n, cfg.rank, width) * width ** -0.5 for _, width in sizes)
        self.b = nn.ParameterList(torch.zeros(n, out, cfg.rank) for out, _ in sizes)

    def trained(self):
        return [*self.a, *self.b]

    def encode(self, model, ctx, choice, k, store):
        route, hooks = super().routes(choice, ctx.candidates.sum(1), k, model.dtype), []
        for i in range(len(self.a_q)):
            mask = route(self.cfg.eta + i).mask
            for name, a, b in zip(self.maps, self.a, self.b):
                def add(_, x, y, mask=mask, a=a[i].to(model.dtype), b=b[i].to(model.dtype)):
                    return y + mask * F.linear(F.linear(x[0], a), b)
                hooks.append(model.layers[self.cfg.eta + i].get_submodule(name).register_forward_hook(add))
        try:
            return super().encode(model, ctx, choice, k, store)
        finally:
            for hook in hooks:
                hook.remove()

    routes = Kept.routes


class Slots(Routing):
    """Learned embeddings are read after the context, through adapters on W_Q and W_O of all layers but the last. Their
    keys and values stay in every head, and as many of the context's entries less. They stand where its last tokens do,
    so that what is asked stands where it would."""
    most = 8

    def __init__(self, model_cfg, cfg):
        super().__init__(model_cfg, cfg)
        self.slots = nn.Parameter(torch.randn(self.most, model_cfg.n_embd) * 0.1)

    @staticmethod
    def n_adapted(model_cfg, cfg) -> int:
        return model_cfg.n_layer - 1

    def trained(self):
        return [*self.adapters(), self.slots]

    def count(self, k):
        return (k // 2).clamp(max=self.most)  # where fewer than 16 are kept, half of them

    def choose(self, scores, ctx, k, check=True):
        return super().choose(scores, ctx, k - self.count(k), check)

    def encode(self, model, ctx, choice, k, store):
        n, end, full, out = int(self.count(k)), ctx.tokens.shape[1], self.full(model, ctx), []
        h, rope = self.slots[None, :n].to(model.dtype), model.rope(torch.arange(end - n, end)[None])
        for layer, (part,) in enumerate(full.layers):
            last = layer == model.cfg.n_layer - 1
            route = None if last else Route(h.new_ones(1, n, 1), *(x[layer].to(h.dtype) for x in self.adapters()))
            h, keys, values = model.block(layer, h, rope, None, full, layer, route, kv_only=last)
            out.append(store(layer, torch.cat([part.k, keys], 2), torch.cat([part.v, values], 2)))
        return out
