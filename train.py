"""Train a compressor by distillation: the short cache must make the frozen model answer as the long one does.

    python train.py                                            # the quick experiment: two CPU cores, ten minutes
    python train.py --preset small                             # the same model, longer: one GPU, or a night on a CPU
    torchrun --nproc_per_node=8 train.py --preset paper        # an 8B Llama on eight GPUs
    python train.py --preset paper --plan --gpus 8             # what that takes: bytes, FLOPs, seconds

Part 5 of the method, the loss, comes first: λ·KL(p‖q) + (1−λ)·KL(q‖p), p the model with the whole cache, q with the
short one. Then one training step as one `forward`, and the loop, in one process or in many (data/world.py). A run that
was cut off goes on where it was when the same command is given again.
"""
import hashlib
import json
import math
import os
import random
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from compress import DEMO, Compressor, CompressorConfig, decay, kept_count, open_text, select, soft_decay
from run.errors import BadInput, provenance, run_program, write_json
from run.files import ROOT, base_of, load_state, save_adapter, save_state
from run.folders import Signals, alone_in, append_line, claim, dtype_of, set_aside, sign, trim_log
from data.fetch import fetch
from run.train_flags import check, parse_args
from run.plan import choose_parallel, gemm_rate, out_of_memory, parameters, print_plan, rates, step_flops
from data.prepare import SHARDS, Shard, prepare
from data.samples import Batch, Samples, collate
from run.models import open_model, pick_dtype
from run.world import World, share
from eval import held_out_table
from model import Llama, answer, attention_mask


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Every field is a flag. The defaults are the quick experiment."""
    steps: int = flag(110, "optimiser steps")
    batch: int = flag(1, "contexts per step")
    micro: int = flag(1, "contexts per forward pass, in each process; the passes of a step are accumulated")
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
    eval_contexts: int = flag(8, "held-out documents per kind in the final table; 0: no table")
    seed: int = flag(0, "of initialisation, data order, and kept fractions")
    out: str = flag("", "folder of the run; an unfinished one is taken up again. Empty: out/PRESET, or the next free")
    save_every: int = flag(25, "steps between states that a run can be taken up from; also the most that can be lost")
    parallel: str = flag("auto", "under torchrun, ddp: the frozen model whole in each process; fsdp: spread over them")
    recompute: bool = flag(False, "keep only the inputs of blocks and compute the rest again in backward: less memory")
    compile: bool = flag(False, "compile the blocks' MLPs with torch.compile; on a CPU it needs a C++ compiler")


# Flags that --preset sets at once; a flag given as well has the last word.
PRESETS = {
    "quick": {},
    "small": dict(steps=1800, batch=4, context=400, rank=64, lr=1e-3, scorer_lr=1e-3, warmup=50, save_every=50,
                  eval_contexts=40),
    # eta, rank, lam, lr, batch and bf16 are the paper's; the rest, steps and context included, is our choice
    "paper": dict(weights=str(ROOT / "weights" / "llama-3.1-8b-instruct"), dtype="bf16", steps=10000, batch=32,
                  context=2048, answer=128, mix="continue=1,recite=2,cloze=4,title=4", eta=6, rank=128, lam=0.6,
                  lr=5e-5, scorer_lr=5e-5, keep_low=0.01, warmup=200, chunk=256, recompute=True, save_every=50,
                  eval_contexts=100),
}


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
        logits = (q @ k.transpose(2, 3)).view(B, H, T, -1).float().mul_(d ** -0.5).add_(self.mask)  # large: in place
        self.sum = self.sum + logits.softmax(-1)[..., :self.n].mean(1)       # (B, T, N)
        self.layers += 1

    def result(self):                                                        # (B, N)
        mean = self.sum / self.layers
        return mean.masked_fill(~self.supervised[..., None], 0).amax(1)


@dataclass
class Work:
    """One forward pass's share of a step, and what must be known of it beforehand: with it, nothing in the pass has to
    wait for a number to come back from the device."""
    batch: Batch
    at: torch.Tensor              # (R,) int64, the supervised places among the B·T
    k: torch.Tensor               # (B,) int64, tokens to keep
    noise: torch.Tensor           # (B, N) fp32, added to the scores when choosing
    slots: int                    # of the short cache: the most tokens that a row keeps, protected ones included
    last: int                     # the largest position of a continuation

    @classmethod
    def of(cls, b: Batch, keep: float, soft: bool = False, noise=None) -> "Work":
        """b: on the CPU. keep: kept fraction; soft: all tokens stay, decayed; noise: (B, N), none if not given."""
        n = b.lengths - b.protect.sum(1)
        k = kept_count(n, keep)
        longest = max(int((b.segments == j).sum(1).max()) for j in range(int(b.segments.max()) + 1))
        noise = torch.zeros(b.tokens.shape) if noise is None else noise
        return cls(b, b.supervised.flatten().nonzero()[:, 0], k, noise,
                   int((b.lengths if soft else b.lengths - n + k).max()), int(b.lengths.max()) + longest - 1)

    def to(self, device) -> "Work":
        def send(x):
            return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
        return Work(Batch(*map(send, vars(self.batch).values())), send(self.at), send(self.k), send(self.noise),
                    self.slots, self.last)


class Distiller(nn.Module):
    """One training step as one forward: teacher, scores, encoding, student, loss. Layers 1…η are run once for both."""

    def __init__(self, model: Llama, compressor: Compressor, lam: float, chunk: int, target: float, tau: float):
        super().__init__()
        self.compressor = compressor
        self.model = [model]  # in a list, so that the frozen model is no part of this module's parameters
        self.lam, self.chunk, self.target, self.tau = lam, chunk, target, tau

    def forward(self, work: Work, soft: bool, rows, contexts: int) -> dict[str, torch.Tensor]:
        """This work's share of a step's loss, and what the log wants to know: scalars, still on the device.

        Args: soft: decayed, not dropped; rows, contexts: supervised tokens and contexts of the *whole* step (all
        forward passes, all processes), by which sums are divided. A mean per pass would weigh tokens unequally.
        """
        model, comp, b = self.model[0], self.compressor, work.batch
        with torch.no_grad():
            ctx = comp.read(model, b.tokens, b.lengths, b.protect)
            full = comp.full(model, ctx)
            mask = attention_mask(b.cont, full, b.segments)
            watch = AttentionTarget(mask, b.supervised, comp.cfg.eta, b.tokens.shape[1]) if self.target else None
            teacher = model(b.cont, full, b.segments, watch=watch, last=work.last).flatten(0, 1)[work.at]  # (R, D)
            wanted = torch.where(ctx.candidates, watch.result(), 0) if watch else None                    # (B, N)
            del full, mask, watch  # the largest things so far; the student needs their room

        scores, n = comp.scores(ctx), ctx.candidates.sum(1)                              # (B, N), (B,)
        kept = select(scores.detach() + work.noise, ctx.candidates, work.k, check=False)
        beta = (soft_decay(scores, ctx.candidates, work.k, self.tau) if soft else
                decay(scores, kept, n, comp.cfg.decay, comp.gamma))
        cache = comp.encode(model, ctx, kept, beta, everything=soft, slots=work.slots)
        student = model(b.cont, cache, b.segments, last=work.last).flatten(0, 1)[work.at]  # (R, D)

        losses, kl, agree = DistillKL.apply(student, teacher, model.head_weight, self.lam, self.chunk)
        loss = losses.sum() / rows
        missed = torch.zeros_like(loss)
        if wanted is not None:  # cross-entropy of softmax(s) against the attention that the continuation really paid
            log_chosen = scores.masked_fill(~ctx.candidates, -1e9).log_softmax(1)
            missed = -(wanted / wanted.sum(1, keepdim=True).clamp(min=1e-9) * log_chosen).sum() / contexts
            loss = loss + self.target * missed
        return {"loss": loss, "kl": kl.sum() / rows, "agree": agree.sum() / rows, "target": missed}


# -------------------------------------------------------------------------------------------------------- the loop

def add_gradients(distil: Distiller, works: list[Work], soft: bool, contexts: int, world: World, signals=None):
    """One step's gradient, of all forward passes in all processes, in the .grad of what is trained; returns fp32 (9,):

    supervised tokens, context tokens, continuation tokens; loss, KL, agreement, target; processes asked to stop by
    SIGTERM, and by Ctrl-C. contexts: in the whole step. In several processes as in one, to rounding: every sum is
    divided by the count of the whole step before it is added up.
    """
    device = world.device
    counts = [sum(len(w.at) for w in works), sum(int(w.batch.lengths.sum()) for w in works),
              sum(int((w.batch.segments >= 0).sum()) for w in works)]  # of this process; fp32 counts exactly to 2^24
    counts = world.sum(torch.tensor(counts, dtype=torch.float32).to(device, non_blocking=True))
    sums = torch.zeros(4, device=device)
    for work in works:
        got = distil(work.to(device), soft, counts[0], contexts)
        got["loss"].backward()
        sums += torch.stack([x.detach() for x in got.values()])
    got = signals.got if signals else 0  # asked as late as can be: torchrun grants 30 seconds
    stop = torch.tensor([float(got == s) for s in (signal.SIGTERM, signal.SIGINT)]).to(device, non_blocking=True)
    return torch.cat([counts, world.sum_gradients(distil.parameters(), torch.cat([sums, stop]))])


def train(c: TrainConfig, mix: dict, model: Llama, tokenizer, out: Path, about: dict, world: World) -> Compressor:
    """Train a compressor, from where the run in `out` stopped, and leave it in out/adapter, described by `about`.

    Errors: BadInput for settings that diverge, or need more memory than there is.
    """
    torch.manual_seed(c.seed)
    config = CompressorConfig(c.eta, c.rank, c.decay, c.two_pass, not c.no_positions)
    comp = Compressor(model.cfg, config).to(model.device)
    distil = Distiller(model, comp, c.lam, c.chunk, c.target, c.tau)
    with world.one_first():
        folders = prepare(c.sources.split(","), tokenizer, c.shards or SHARDS)
    samples = Samples([Shard(f, "train", tokenizer) for f in folders], tokenizer, c.context, mix, c.answer, c.seed)

    scorer = list(comp.scorer.parameters())
    adapters = [p for name, p in comp.named_parameters() if not name.startswith("scorer.")]
    print(f"training {sum(p.numel() for p in comp.parameters()):,} parameters: {sum(p.numel() for p in scorer):,} in "
          f"the scorer, the rest in adapters of rank {c.rank} in layers {comp.first + 1}…{model.cfg.n_layer - 1}; "
          f"{sum(p.numel() for p in model.parameters()):,} are frozen")
    groups = [{"params": adapters, "peak": c.lr}, {"params": scorer, "peak": c.scorer_lr}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=c.weight_decay)

    texts = hashlib.sha256(b"".join((f / "train.json").read_bytes() for f in folders)).hexdigest()[:16]
    state = load_state(out, comp, optimizer) or {"step": 0, "processes": world.size, "texts": texts}
    begin = state["step"]
    if state["texts"] != texts:
        raise BadInput(f"{out}: the texts of --sources are not those that this run began with; give a new --out")
    if world.agree(begin) != begin:
        raise BadInput(f"{out}: process {world.rank} sees the state of another step than process 0; give an --out on a "
                       "disk that all hosts share")
    if begin:
        print(f"resuming {out} after {begin} of {c.steps} steps")
    if state["processes"] != world.size:
        print(f"processes: {world.size}, and {state['processes']} before: the same contexts in the same order, but "
              "sums are rounded differently from here on")
    if not world.rank:
        set_aside(out, begin)
        trim_log(out / "log.jsonl", begin)

    def draw(step):
        """What a step is made of: kept fraction, soft or not, this process's work. It depends on nothing before it."""
        rng = random.Random(f"{c.seed}/step/{step}")
        keep = math.exp(rng.uniform(math.log(c.keep_low), math.log(c.keep_high)))
        soft, works = rng.random() < c.soft, []
        for part in share(step, c.batch, c.micro, world):
            b = collate([samples(i) for i in part], prompts=True)
            noise = torch.zeros(b.tokens.shape)
            for row, n, i in zip(noise, b.lengths, part if c.noise else ()):  # Gumbel, of a sample's own
                g = torch.Generator().manual_seed(random.Random(f"{c.seed}/noise/{i}").getrandbits(63))
                row[:n] = -c.noise * torch.log(-torch.log(torch.rand(int(n), generator=g).clamp(1e-9, 1 - 1e-7)))
            works.append(Work.of(b, keep, soft, noise))
        return keep, soft, works

    recent, stop = {}, 0  # running KL per bucket of kept fractions, for the progress bar
    bar = tqdm(range(begin, c.steps), initial=begin, total=c.steps, unit="step", mininterval=1, disable=world.rank > 0)
    path = os.devnull if world.rank else out / "log.jsonl"
    with open(path, "ab", buffering=0) as log, ThreadPoolExecutor(1) as reader, Signals() as signals:
        ahead = reader.submit(draw, begin)
        for step in bar:
            start = time.perf_counter()
            keep, soft, works = ahead.result()
            ahead = reader.submit(draw, step + 1)
            try:
                numbers = add_gradients(distil, works, soft, c.batch, world, signals)
            except BadInput as e:
                raise BadInput(f"step {step}: {e}") from None
            norms = [nn.utils.clip_grad_norm_(g["params"], c.clip) for g in optimizer.param_groups]
            # the one place where a step waits for the device
            numbers = torch.cat([numbers, torch.stack([*norms, comp.gamma.detach()])]).tolist()
            rows, ctx, cont, loss, kl, agree, target, term, interrupt, *norms, gamma = numbers
            if not all(map(math.isfinite, (loss, *norms))):
                raise BadInput(f"step {step}: the loss is {loss}, its gradient {max(norms)}; lower --lr ({c.lr}) or "
                               f"--scorer-lr ({c.scorer_lr})")
            rate = min(1, (step + 1) / c.warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / c.steps)))
            for g in optimizer.param_groups:
                g["lr"] = g["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - start
            flops = step_flops(model.cfg, config, ctx, cont, ctx if soft else keep * ctx, rows, c.batch, c.target > 0)
            line = {"step": step, "keep": round(keep, 4), "soft": soft, "loss": loss, "kl": kl, "agree": agree,
                    "target": target, "grad_adapters": norms[0], "grad_scorer": norms[1], "gamma": gamma,
                    "lr": c.lr * rate, "seconds": round(seconds, 3), **rates(ctx + cont, flops, seconds)}
            stop = 128 + signal.SIGTERM if term else 128 + signal.SIGINT if interrupt else 0
            if not world.rank:
                save = stop or (step + 1) % c.save_every == 0 or step + 1 == c.steps
                append_line(log, line, sync=save)  # first the lines, then the state that says they are there
                if save:
                    save_state(out, step + 1, comp, optimizer, {"processes": world.size, "texts": texts})
            if stop:
                break
            bucket = next(b for b in (0.1, 0.25, 1.0) if keep <= b)
            recent[bucket] = 0.9 * recent.get(bucket, kl) + 0.1 * kl
            bar.set_postfix_str(" ".join(f"kl<={b}: {recent[b]:.2f}" for b in sorted(recent))
                                + f" {line['tokens_per_s']} tok/s {line['gflop_per_s']:.0f} GFLOP/s")
    if stop:
        world.agree(None)  # nobody ends before the state is written: torchrun would stop the writer
        print(f"stopped after {step + 1} of {c.steps} steps; the same command goes on from there")
        raise SystemExit(stop)
    if not world.rank:
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


def profile(c: TrainConfig, mix: dict, model: Llama, tokenizer, about: dict, world: World, steps: int) -> None:
    """A few steps, the first of them not counted, against the speed of bare matrix products in the same minute."""
    tokens = c.micro * (c.context + len(tokenizer.header))
    before = gemm_rate(model, tokens)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = world.agree(Path(tmp))
        train(replace(c, steps=steps + 1), mix, model, tokenizer, tmp, about, world)
        lines = [] if world.rank else list(map(json.loads, (tmp / "log.jsonl").read_text().splitlines()[1:]))
    rate = (before + gemm_rate(model, tokens)) / 2 * world.size
    if lines:
        reached = sum(x["gflop_per_s"] * x["seconds"] for x in lines) / sum(x["seconds"] for x in lines) * 1e9
        print(json.dumps({"steps": steps, "seconds_per_step": round(sum(x["seconds"] for x in lines) / steps, 3),
                          "gflop_per_s": round(reached / 1e9, 1), "gemm_gflop_per_s": round(rate / 1e9, 1),
                          "utilisation": round(reached / rate, 3), "micro": c.micro, "context": c.context,
                          "dtype": str(model.dtype)[6:], "processes": world.size, **about}))


def run(a, c: TrainConfig, mix: dict, about: dict, world: World) -> None:
    """What every process does once all know each other: the model, the training, the table."""
    start = time.perf_counter()
    with world.one_first():
        a.weights = a.weights or fetch()
    a.device, default = str(world.device), f"out/{a.preset}"
    if a.dtype == "auto":  # all processes must come to the same, and a run that goes on to what it was
        a.dtype = world.agree(None if world.rank else dtype_of(c.out, default) or
                              {torch.float32: "fp32", torch.bfloat16: "bf16"}[pick_dtype("auto", world.device)])
    c.parallel = world.agree(choose_parallel(c.parallel, a.weights, a.dtype, world.size, world.device))
    model, tokenizer = open_model(a, world.shard if c.parallel == "fsdp" else None)
    model.recompute = c.recompute
    if c.compile:
        for block in model.layers:
            block.mlp.compile()
    # base_of brings sharded weights together, so all processes call it; later calls remember
    wanted = {"train": asdict(c), "dtype": str(model.dtype)[6:], "base": base_of(model, tokenizer)}
    if a.profile:
        return profile(c, mix, model, tokenizer, about, world, a.profile)

    out, finished = world.first(lambda: claim(wanted, c.out, default))
    if finished:
        return print(f"{out}: this run is finished, its adapter is in {out / 'adapter'}; for another, give a new --out")
    print(" ".join(f"{k}={v}" for k, v in asdict(c).items()) + f"\nwriting to {out}")
    with nullcontext() if world.rank else alone_in(out):
        if not world.rank:
            trained = parameters(model.cfg, CompressorConfig(c.eta, c.rank, c.decay, c.two_pass, not c.no_positions))[0]
            sign(out, wanted | {"trained_parameters": trained} | about)
        comp = train(c, mix, model, tokenizer, out, about, world)
        print(f"adapter saved in {out / 'adapter'} after {time.perf_counter() - start:.0f} s")
        result = {"cells": []}
        if c.eval_contexts:
            # Under ddp the processes share the documents out. Under fsdp each goes through all of them: a forward pass
            # needs everybody, and documents differ in how many they take.
            alone = world.size == 1 or c.parallel == "fsdp"
            result["cells"] = held_out_table(model, tokenizer, comp, c.sources, c.shards or SHARDS, c.context,
                                             c.eval_contexts, c.seed, world=None if alone else world)
        result |= {"dtype": str(model.dtype)[6:], "context": c.context,
                   "seconds": round(time.perf_counter() - start, 1), **about}
        if not world.rank:
            write_json(out / "result.json", result)
            if c.eval_contexts and c.parallel != "fsdp":  # one process alone cannot run a sharded model
                show_answers(comp, model, tokenizer)
        print(json.dumps(result))


def main() -> None:
    a = parse_args(TrainConfig, PRESETS)
    c, mix, about = a.config, check(a.config), provenance(a.config.seed)
    if a.plan:
        return print_plan(a, mix)
    world = World.start(a.device)
    if c.batch % (world.size * c.micro):
        raise BadInput(f"--batch {c.batch} cannot be shared by {world.size} processes with --micro {c.micro}; "
                       f"expected a multiple of {world.size * c.micro}")
    try:
        run(a, c, mix, about, world)
    except RuntimeError as e:
        raise out_of_memory(e, c, world.size) or e
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
