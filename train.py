"""Train a compressor by distillation: the short cache must make the frozen model answer as the long one does.

    python train.py                       # the quick experiment: SmolLM2-135M on two CPU cores, about ten minutes
    python train.py --steps 2000 --batch 8 --out out/longer

Part 5 of the method, the loss, comes first: λ·KL(p‖q) + (1−λ)·KL(q‖p), p the model with the whole cache, q with the
short one. Then one training step as one `forward`, the configuration, and the loop.
"""
import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from compress import (DEMO, Compressor, CompressorConfig, decay, kept_count, open_text, save_adapter, select,
                      soft_decay)
from data import BadInput, provenance, run_program, write_json
from data.prepare import SHARDS, Shard, prepare
from data.samples import KINDS, Batch, Samples, collate
from data.weights import add_model_flags, open_model
from eval import held_out_table
from model import Llama, answer, attention_mask


class DistillKL(torch.autograd.Function):
    """λ·KL(p‖q) + (1−λ)·KL(q‖p) per row, from hidden states, with logits made a few hundred rows at a time.

    student, teacher: (R, D) hidden states after the last norm; head: (V, D). Returns fp32 (R,) each: loss, KL(p‖q) and
    whether both put the same token first (1 or 0). Only `loss` has a gradient, and only towards `student`:
        ∂KL(p‖q)/∂z = q − p        ∂KL(q‖p)/∂z = q·(log q − log p − KL(q‖p))        z the student's logits
    It is computed here, in the forward pass, while a chunk's logits exist; autograd would keep every chunk's.
    """

    @staticmethod
    def forward(ctx, student, teacher, head, lam, chunk):
        rows = student.shape[0]
        dtype = torch.promote_types(student.dtype, torch.float32)  # fp32; fp64 stays fp64
        loss, kl, agree = (torch.empty(rows, device=student.device, dtype=dtype) for _ in range(3))
        grad = torch.empty_like(student)
        for i in range(0, rows, chunk):
            part = slice(i, i + chunk)
            log_q = F.linear(student[part], head).to(dtype).log_softmax(-1)   # (chunk, V)
            log_p = F.linear(teacher[part], head).to(dtype).log_softmax(-1)
            agree[part] = (log_q.argmax(-1) == log_p.argmax(-1)).to(dtype)
            q, p = log_q.exp(), log_p.exp()
            gap = log_q.sub_(log_p)                                           # in place from here on: V is large
            forward, reverse = -torch.linalg.vecdot(p, gap), torch.linalg.vecdot(q, gap)
            loss[part], kl[part] = lam * forward + (1 - lam) * reverse, forward
            # dz = λ·(q − p) + (1−λ)·q·(gap − reverse)
            dz = q.mul_(gap.sub_(reverse[:, None]).mul_(1 - lam).add_(lam)).sub_(p, alpha=lam)
            grad[part] = dz.to(head.dtype) @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(kl, agree)
        return loss, kl, agree

    @staticmethod
    def backward(ctx, d_loss, *_):
        grad, = ctx.saved_tensors
        return grad * d_loss[:, None].to(grad.dtype), None, None, None, None


class AttentionTarget:
    """How much attention each context token gets from the continuation in the teacher's own pass.

    Mean over heads and over layers from `eta` on, maximum over the supervised positions. The teacher's `watch`.
    """

    def __init__(self, mask, supervised, eta: int, n_context: int):
        self.mask, self.supervised, self.eta, self.n = mask, supervised, eta, n_context
        self.sum, self.layers = 0.0, 0

    def __call__(self, layer, q, k):
        if layer < self.eta - 1:  # counted from 0 here
            return
        B, H, T, d = q.shape
        q = q.view(B, k.shape[1], -1, d)                                     # (B, G, H/G·T, d)
        logits = (q @ k.transpose(2, 3)).view(B, H, T, -1).float() * d ** -0.5 + self.mask
        self.sum = self.sum + logits.softmax(-1)[..., :self.n].mean(1)       # (B, T, N)
        self.layers += 1

    def result(self):                                                        # (B, N)
        mean = self.sum / self.layers
        return mean.masked_fill(~self.supervised[..., None], 0).amax(1)


class Distiller(nn.Module):
    """One training step as one forward: teacher, scores, encoding, student, loss. Layers 1…η are run once for both."""

    def __init__(self, model: Llama, compressor: Compressor, lam: float, chunk: int, target: float, noise: float,
                 tau: float):
        super().__init__()
        self.compressor = compressor
        self.model = [model]  # in a list, so that the frozen model is no part of this module's parameters
        self.lam, self.chunk, self.target, self.noise, self.tau = lam, chunk, target, noise, tau

    def forward(self, b: Batch, keep: float, soft: bool, rows: int, contexts: int) -> dict:
        """This batch's share of a step's loss, and what the log wants to know.

        Args: keep: kept fraction; soft: decayed, not dropped; rows, contexts: supervised tokens and contexts of the
        *whole* step (all micro-batches, all ranks), by which sums are divided.
        """
        model, comp = self.model[0], self.compressor
        with torch.no_grad():
            ctx = comp.read(model, b.tokens, b.lengths, b.protect)
            full = comp.full(model, ctx)
            mask = attention_mask(b.cont, full, b.segments)
            watch = AttentionTarget(mask, b.supervised, comp.cfg.eta, b.tokens.shape[1]) if self.target else None
            teacher = model(b.cont, full, b.segments, watch=watch)[b.supervised]      # (R, D)

        scores, n = comp.scores(ctx), ctx.candidates.sum(1)                              # (B, N), (B,)
        k = kept_count(n, keep)
        chosen_by = scores.detach()
        if self.noise:  # Gumbel
            chosen_by = chosen_by - self.noise * torch.log(-torch.log(torch.rand_like(scores).clamp(1e-9, 1 - 1e-7)))
        kept = select(chosen_by, ctx.candidates, k)
        beta = (soft_decay(scores, ctx.candidates, k, self.tau) if soft else
                decay(scores, kept, n, comp.cfg.decay, comp.gamma))
        cache = comp.encode(model, ctx, kept, beta, everything=soft)
        student = model(b.cont, cache, b.segments)[b.supervised]                       # (R, D)

        losses, kl, agree = DistillKL.apply(student, teacher, model.head_weight, self.lam, self.chunk)
        loss = losses.sum() / rows
        missed = torch.zeros(())
        if watch is not None:  # cross-entropy of softmax(s) against the attention that the continuation really paid
            wanted = torch.where(ctx.candidates, watch.result(), 0)
            log_chosen = scores.masked_fill(~ctx.candidates, -1e9).log_softmax(1)
            missed = -(wanted / wanted.sum(1, keepdim=True).clamp(min=1e-9) * log_chosen).sum() / contexts
            loss = loss + self.target * missed
        return {"loss": loss, "kl": kl.sum() / rows, "agree": agree.sum() / rows, "target": missed}


# --------------------------------------------------------------------------------------------------- configuration

def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Every field is a flag. The defaults are the quick experiment."""
    steps: int = flag(110, "optimiser steps")
    batch: int = flag(1, "contexts per step")
    micro: int = flag(1, "contexts per forward pass; batch / micro passes are accumulated")
    context: int = flag(300, "compressible tokens per context")
    answer: int = flag(40, "tokens of a continuation or a recited passage")
    mix: str = flag("continue=1,recite=2,cloze=2,title=2", "continuations per context, by kind")
    sources: str = flag("wiki,sotu", "training texts: wiki, sotu, or paths, comma-separated")
    shards: str = flag("", "folder for their tokens; empty: data/shards of this repository")
    eta: int = flag(6, "the scorer reads the hidden state after this many layers")
    rank: int = flag(32, "of the adapters on W_Q and W_O")
    decay: str = flag("centred", "what a score does to attention: centred or sigmoid")
    two_pass: bool = flag(False, "route all layers, in a second pass over the context")
    no_positions: bool = flag(False, "let the scorer see the hidden state alone, not where a token stands")
    lam: float = flag(0.6, "weight of KL(teacher || student); the rest is on the reverse")
    keep_low: float = flag(0.05, "smallest kept fraction drawn; log-uniform, anew for each step")
    keep_high: float = flag(0.5, "largest kept fraction drawn")
    soft: float = flag(0.0, "share of steps in which tokens are decayed, not dropped")
    tau: float = flag(0.15, "how sharply those steps tell kept from dropped, in standard deviations of the scores")
    target: float = flag(1.0, "weight of the attention target, which teaches the scorer what was attended to; 0: off")
    noise: float = flag(0.0, "Gumbel noise on the scores when choosing, in units of score")
    lr: float = flag(2e-3, "peak rate of the adapters")
    scorer_lr: float = flag(2e-3, "peak rate of the scorer")
    warmup: int = flag(10, "steps over which the rates rise")
    weight_decay: float = flag(0.0, "of AdamW")
    clip: float = flag(1.0, "largest gradient norm, of the adapters and of the scorer")
    chunk: int = flag(128, "rows of logits made at a time in the loss")
    eval_contexts: int = flag(8, "held-out contexts per kind in the final table; 0: no table")
    seed: int = flag(0, "of initialisation, data order, and kept fractions")
    out: str = flag("out/quick", "folder for log.jsonl and adapter/; a number is added if it is taken")


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Distil a KV-cache compressor. Without flags: the quick experiment.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(TrainConfig):
        name = "--" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            p.add_argument(name, action="store_true", help=f.metadata["help"])
        else:
            p.add_argument(name, type=type(f.default), default=f.default, help=f.metadata["help"])
    add_model_flags(p)
    return p.parse_args()


def check(c: TrainConfig) -> dict[str, int]:
    """Refuse what cannot work before anything is loaded; returns the parsed mix."""
    def need(ok, flag_name, text):
        if not ok:
            raise BadInput(f"--{flag_name.replace('_', '-')} is {getattr(c, flag_name.replace('-', '_'))}: {text}")
    for name in ("steps", "chunk", "rank", "warmup"):
        need(getattr(c, name) >= 1, name, "at least 1 is needed")
    for name in ("lr", "scorer_lr", "clip", "tau"):
        need(getattr(c, name) > 0, name, "a number above 0 is needed")
    for name in ("eval_contexts", "target", "noise", "weight_decay"):
        need(getattr(c, name) >= 0, name, "0 or more is needed")
    need(0 <= c.soft <= 1, "soft", "a share, 0 … 1, is needed")
    need(0 <= c.seed < 1 << 32, "seed", "a whole number from 0 to 2^32 - 1 is needed")
    need(1 <= c.micro <= c.batch and c.batch % c.micro == 0, "micro", f"it must divide --batch ({c.batch})")
    need(c.context >= 16, "context", "at least 16 tokens are needed")
    need(c.answer >= 2, "answer", "at least 2 tokens are needed")
    need(0 < c.keep_low <= c.keep_high < 1, "keep-low", f"0 < keep-low <= keep-high ({c.keep_high}) < 1 is needed")
    need(c.decay in ("centred", "sigmoid"), "decay", "expected centred or sigmoid")
    need(0 <= c.lam <= 1, "lam", "expected 0 … 1")
    mix = {}
    for part in c.mix.split(","):
        kind, _, count = part.partition("=")
        need(kind in KINDS and count.isdigit(), "mix", f"expected KIND=COUNT,… with the kinds {', '.join(KINDS)}")
        mix[kind] = int(count)
    need(sum(mix.values()) > 0, "mix", "at least one continuation is needed")
    return mix


def step_flops(model: Llama, eta: int, ctx: int, cont: int, kept: int, rows: int, contexts: int) -> float:
    """Floating-point operations of one step, a multiply-add as two: ctx, cont, rows in tokens of the whole step.

    Frozen weights need no gradient, so a backward pass through them costs one forward, not two; through attention, two.
    Context: η layers once, the others for teacher, student and its backward. Continuation: all layers three times.
    The scorer and the adapters are not counted.
    """
    c = model.cfg
    matrices = 2 * sum(p.numel() for p in model.layers[0].parameters())                 # per token and layer
    pair = 4 * c.n_head * c.head_dim                                                    # per query-key pair and layer
    n, t = ctx / contexts, cont / contexts
    after = c.n_layer - eta - 1
    read = ctx * (matrices * (eta + 3 * after) + pair * n / 2 * (eta + 4 * after))
    ask = cont * c.n_layer * (3 * matrices + pair * (n + t / 2 + 3 * (kept / contexts + t / 2)))
    return read + ask + 3 * 2 * rows * c.n_embd * c.vocab_size


# -------------------------------------------------------------------------------------------------------- the loop

def free_folder(path: str) -> Path:
    folder, i = Path(path), 1
    while (folder / "log.jsonl").exists():
        i += 1
        folder = Path(f"{path}-{i}")
    return folder


def train(c: TrainConfig, mix: dict, model: Llama, tokenizer, out: Path, about: dict) -> Compressor:
    """Train a compressor and leave it in out/adapter, described by `about`; each step is a line of out/log.jsonl."""
    torch.manual_seed(c.seed)
    config = CompressorConfig(c.eta, c.rank, c.decay, c.two_pass, not c.no_positions)
    comp = Compressor(model.cfg, config).to(model.device)
    distil = Distiller(model, comp, c.lam, c.chunk, c.target, c.noise, c.tau)
    shards = [Shard(f, "train", tokenizer) for f in prepare(c.sources.split(","), tokenizer, c.shards or SHARDS)]
    samples = Samples(shards, tokenizer, c.context, mix, c.answer, seed=c.seed)

    scorer = list(comp.scorer.parameters())
    adapters = [p for name, p in comp.named_parameters() if not name.startswith("scorer.")]
    trained, frozen = (sum(p.numel() for p in m.parameters()) for m in (comp, model))
    print(f"training {trained:,} parameters: {sum(p.numel() for p in scorer):,} in the scorer, the rest in adapters of "
          f"rank {c.rank} in layers {comp.first + 1}…{model.cfg.n_layer - 1}; {frozen:,} are frozen")
    groups = [{"params": adapters, "peak": c.lr}, {"params": scorer, "peak": c.scorer_lr}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=c.weight_decay)

    recent = {}  # running KL per bucket of kept fractions, for the progress bar
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "w", encoding="utf-8") as log, tqdm(range(c.steps), unit="step", mininterval=1) as bar:
        for step in bar:
            start = time.perf_counter()
            rng = random.Random(f"{c.seed}/step/{step}")  # what it draws depends on its number alone
            keep = math.exp(rng.uniform(math.log(c.keep_low), math.log(c.keep_high)))
            soft = rng.random() < c.soft
            drawn = [samples(step * c.batch + i) for i in range(c.batch)]
            parts = [collate(drawn[i:i + c.micro], prompts=True).to(model.device) for i in range(0, c.batch, c.micro)]
            rows = sum(int(b.supervised.sum()) for b in parts)

            sums = {"loss": 0.0, "kl": 0.0, "agree": 0.0, "target": 0.0}
            for b in parts:
                try:
                    got = distil(b, keep, soft, rows, c.batch)
                except BadInput as e:
                    raise BadInput(f"step {step}: {e}") from None
                got["loss"].backward()
                sums = {key: sums[key] + float(got[key].detach()) for key in sums}
            if not math.isfinite(sums["loss"]):
                raise BadInput(f"step {step}: the loss is {sums['loss']}; lower --lr ({c.lr}) or "
                               f"--scorer-lr ({c.scorer_lr})")
            norms = [float(nn.utils.clip_grad_norm_(g["params"], c.clip)) for g in optimizer.param_groups]
            rate = min(1, (step + 1) / c.warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / c.steps)))
            for g in optimizer.param_groups:
                g["lr"] = g["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - start
            ctx, cont = (sum(int(x.sum()) for x in xs) for xs in (
                [b.lengths for b in parts], [b.segments >= 0 for b in parts]))
            flops = step_flops(model, c.eta, ctx, cont, ctx if soft else int(keep * ctx), rows, c.batch)
            line = {"step": step, "keep": round(keep, 4), "soft": soft, **sums,
                    "grad_adapters": norms[0], "grad_scorer": norms[1], "gamma": float(comp.gamma.detach()),
                    "lr": c.lr * rate, "seconds": round(seconds, 3),
                    "tokens_per_s": round((ctx + cont) / seconds), "gflop_per_s": round(flops / seconds / 1e9, 1)}
            log.write(json.dumps(line) + "\n")
            log.flush()
            bucket = next(b for b in (0.1, 0.25, 1.0) if keep <= b)
            recent[bucket] = 0.9 * recent.get(bucket, line["kl"]) + 0.1 * line["kl"]
            bar.set_postfix_str(" ".join(f"kl<={b}: {recent[b]:.2f}" for b in sorted(recent))
                                + f" {line['tokens_per_s']} tok/s {line['gflop_per_s']:.0f} GFLOP/s")
    save_adapter(out / "adapter", comp, model, tokenizer, {"train": asdict(c), **about})
    return comp.requires_grad_(False)


def show_answers(comp: Compressor, model: Llama, tokenizer, keep: float = 0.1) -> None:
    """One question about a text of our own, from the full cache and from one ten times shorter."""
    question = "Who built the lighthouse?"
    with torch.no_grad():
        ctx = open_text(comp, model, tokenizer, DEMO.read_text(encoding="utf-8"))
        full, short = comp.full(model, ctx), comp.compress(model, ctx, keep)
    print(f"\n{question}")
    for name, cache in (("full", full), ("short", short)):
        print(f"  {name:5} ({cache.nbytes():,} bytes)  {answer(model, tokenizer, cache, [question], 40)[0]}")


def main() -> None:
    a = parse_args()
    c = TrainConfig(**{f.name: getattr(a, f.name) for f in fields(TrainConfig)})
    mix, start, about = check(c), time.perf_counter(), provenance(c.seed)
    model, tokenizer = open_model(a)
    out = free_folder(c.out)
    print(" ".join(f"{k}={v}" for k, v in asdict(c).items()) + f"\nwriting to {out}")
    comp = train(c, mix, model, tokenizer, out, about)
    print(f"adapter saved in {out / 'adapter'} after {time.perf_counter() - start:.0f} s")
    result = {"cells": []}
    if c.eval_contexts:
        result["cells"] = held_out_table(model, tokenizer, comp, c.sources, c.shards or SHARDS, c.context,
                                         c.eval_contexts, c.seed)
        show_answers(comp, model, tokenizer)
    result |= {"dtype": str(model.dtype)[6:], "context": c.context,
               "seconds": round(time.perf_counter() - start, 1), **about}
    write_json(out / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
