"""Train a compressor: first what the frozen model looks at, then to answer from the short cache as from the long one.

    python train.py                                            # the quick experiment: two CPU cores, ten minutes
    python train.py --preset small                             # the same model, two hours of one core
    python train.py --init-adapter FOLDER --sources my/texts   # go on from an adapter, on texts of a domain
    torchrun --nproc_per_node=8 train.py --preset paper        # an 8B Llama on eight GPUs

In `reconstruct` steps the scorer learns by regression which entries of the cache the model attends to while it repeats
the context. In `steps` steps the whole is distilled, part 5 of the method: the loss is λ·KL(p‖q) + (1−λ)·KL(q‖p), p the
model with the whole cache, q with the short one. The order here: what can be set, one step as one `forward`, its loss,
the processes that share a step, the loop. A run that was cut off goes on with the same command.
"""
import json
import math
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from compress import (DEMO, DEMO_QUESTIONS, Compressor, CompressorConfig, attention_received, decay, kept_count,
                      load_adapter, open_text, show_answers)
from data.fetch import fetch
from data.prepare import SHARDS, Shard, fingerprint, prepare
from data.samples import Batch, Samples, collate
from eval import held_out_table
from model import Llama
from run.errors import BadInput, provenance, run_program
from run.files import ROOT, base_of, read_about, save_adapter, save_state
from run.folders import Signals, alone_in, append_line, dtype_of, find_run_folder, resume, show, write_config
from run.models import open_model, pick_dtype
from run.plan import TEACH, choose_parallel, out_of_memory, print_plan, profile, speed
from run.records import write_result
from run.train_flags import check, parse_args
from run.world import World


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Every field is a flag. The defaults are the quick experiment."""
    reconstruct: int = flag(300, "steps of the first phase: the scorer learns what the model attends to; 0: none")
    steps: int = flag(220, "steps of the second phase: distillation")
    batch: int = flag(1, "contexts per step")
    micro: int = flag(1, "contexts per forward pass, in each process; the passes of a step are accumulated")
    context: int = flag(400, "compressible tokens per context")
    shortest: int = flag(0, "lengths are drawn evenly from here to --context; 0: all contexts are of that length")
    answer: int = flag(40, "tokens of a continuation or a recited passage")
    mix: str = flag("continue=1,recite=2,cloze=2,title=2", "continuations per context, by kind")
    prompts: bool = flag(True, "distil the words of a question, too, not its answer alone")
    sources: str = flag("wiki,sotu", "training texts: wiki, sotu, or paths, comma-separated")
    shards: str = flag("", "folder for their tokens; empty: data/shards of this repository")
    choice: str = flag("head", "each head keeps tokens of its own under one budget; or token: all heads keep the same")
    eta: int = flag(6, "the scorer reads the hidden state after this many layers")
    hidden: int = flag(1024, "width of the scorer's hidden layer")
    recent: int = flag(4, "last tokens that every head keeps: K/8 of them, 1 … this many; --choice head")
    decay: str = flag("threshold", "what a score does to attention: threshold, or the paper's sigmoid")
    tau: float = flag(0.5, "nats of score over which threshold goes from dropped to kept")
    rank: int = flag(32, "of the adapters on W_Q and W_O")
    lam: float = flag(0.6, "weight of KL(teacher || student); the rest is on the reverse")
    keep_low: float = flag(0.01, "smallest kept fraction drawn; log-uniform, anew for each step")
    keep_high: float = flag(0.25, "largest kept fraction drawn; above, nothing is routed")
    soft: float = flag(0.0, "share of distillation steps in which entries are decayed, not dropped")
    teach_lr: float = flag(1e-3, "peak rate of the scorer in the first phase")
    scorer_lr: float = flag(0.0, "its peak rate in the second, through the decay; 0: it stays as it is")
    lr: float = flag(2e-3, "peak rate of the adapters")
    warmup: int = flag(10, "steps over which the rates rise, in each phase")
    weight_decay: float = flag(0.0, "of AdamW")
    clip: float = flag(1.0, "largest gradient norm, of the adapters and of the scorer")
    chunk: int = flag(128, "rows of logits made at a time in the loss")
    eval_contexts: int = flag(8, "held-out documents per kind in the final table; 0: no table")
    init_adapter: str = flag("", "folder of an adapter to go on from, whose shape is taken; empty: a new compressor")
    seed: int = flag(0, "of initialisation, data order, and kept fractions")
    out: str = flag("", "folder of the run; an unfinished one is taken up again. Empty: out/PRESET, or the next free")
    save_every: int = flag(25, "steps between states that a run can be taken up from; also the most that can be lost")
    parallel: str = flag("auto", "under torchrun, ddp: the frozen model whole in each process; fsdp: spread over them")
    recompute: bool = flag(False, "keep only the inputs of blocks and compute the rest again in backward: less memory")
    compile: bool = flag(False, "compile the blocks' MLPs with torch.compile; on a CPU it needs a C++ compiler")

    def compressor(self) -> CompressorConfig:
        return CompressorConfig(**{name: getattr(self, name) for name in CompressorConfig.__dataclass_fields__})


# Flags that --preset sets at once; a flag given as well has the last word.
PRESETS = {
    "quick": {},
    "small": dict(reconstruct=700, steps=1400, context=1024, shortest=128, lr=1e-3, warmup=20, eval_contexts=25,
                  mix="continue=1,recite=2,cloze=3,title=2,fact=2"),
    # rank, lr, batch and bf16 are the paper's, as are eta and lam above; the rest, steps and context too, is our choice
    "paper": dict(weights=str(ROOT / "weights" / "llama-3.1-8b-instruct"), dtype="bf16", reconstruct=2000, steps=10000,
                  batch=32, context=2048, answer=128, mix="continue=1,recite=2,cloze=4,title=4", rank=128, hidden=4096,
                  lr=5e-5, teach_lr=2e-4, warmup=200, chunk=256, recompute=True, save_every=50, eval_contexts=100),
}


# -------------------------------------------------------------------------------------------------------- one step

@dataclass
class MicroBatch:
    """One forward pass's share of a step, and every size in it that the device would otherwise be asked for."""
    batch: Batch
    rows: torch.Tensor            # (R,) int64, the supervised places among the B·T
    k: torch.Tensor               # (B,) int64, tokens to keep, per head on average
    largest: int                  # position of a continuation
    padded: bool                  # contexts differ in length

    @classmethod
    def of(cls, b: Batch, keep: float) -> "MicroBatch":
        """b: on the CPU; keep: kept fraction."""
        longest = max(int((b.segments == j).sum(1).max()) for j in range(int(b.segments.max()) + 1))
        return cls(b, b.supervised.flatten().nonzero()[:, 0], kept_count(b.lengths - b.protect.sum(1), keep),
                   int(b.lengths.max()) + longest - 1, bool((b.lengths < b.tokens.shape[1]).any()))

    def to(self, device) -> "MicroBatch":
        def send(x):
            return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
        return replace(self, batch=Batch(*map(send, vars(self.batch).values())), rows=send(self.rows), k=send(self.k))


@dataclass
class Totals:
    """Of a whole step, all forward passes in all processes: what sums are divided by (a mean per pass would weigh
    tokens unequally), and what the rates are counted from. fp32 scalars, which count exactly to 2^24."""
    supervised: torch.Tensor      # tokens whose prediction is learned
    answers: torch.Tensor         # of them, those of answers
    candidates: torch.Tensor      # compressible context tokens
    context: torch.Tensor         # context tokens
    continuation: torch.Tensor    # tokens asked about the contexts

    @classmethod
    def of(cls, micro_batches: list[MicroBatch], world: World) -> "Totals":
        counts = [[x.supervised.sum(), x.answers.sum(), x.lengths.sum() - x.protect.sum(), x.lengths.sum(),
                   (x.segments >= 0).sum()] for x in (m.batch for m in micro_batches)]
        counts = torch.tensor(counts, dtype=torch.float32).sum(0).to(world.device, non_blocking=True)
        return cls(*world.sum(counts))


class Distiller(nn.Module):
    """One training step as one forward, of either phase. The frozen model runs layers 1…η once for all that follows."""

    def __init__(self, model: Llama, compressor: Compressor, lam: float, chunk: int, learn_scores: bool):
        super().__init__()
        self.compressor = compressor
        self.model = [model]  # in a list, so that the frozen model is no part of this module's parameters
        self.lam, self.chunk, self.learn_scores = lam, chunk, learn_scores

    def forward(self, m: MicroBatch, totals: Totals, phase: str) -> dict[str, torch.Tensor]:
        """This pass's share of a step's loss, and what the log wants to know: scalars, still on the device.

        phase: "reconstruct"; "hard": entries are dropped; "soft": they are decayed.
        """
        b = m.batch
        ctx = self.compressor.read(self.model[0], b.tokens, b.lengths if m.padded else None, b.protect)
        full = self.compressor.full(self.model[0], ctx)
        if phase == "reconstruct":
            return self.reconstruct(m, totals, ctx, full)
        with torch.no_grad():
            teacher = self.model[0](b.cont, full, b.segments, largest=m.largest).flatten(0, 1)[m.rows]  # (R, D)
        del full  # the student needs its room
        return self.distil(m, totals, ctx, teacher, phase == "soft")

    def reconstruct(self, m, totals, ctx, full):
        """The scorer's regression: the logarithm of the most attention that an entry gets while the context is repeated
        from its whole cache and the text goes on. No gradient runs through the Llama."""
        model, b = self.model[0], m.batch
        wanted = attention_received(model, full, b.cont, segments=b.segments, largest=m.largest)          # (B, L, G, N)
        if self.compressor.cfg.choice == "token":
            wanted = wanted.mean((1, 2), keepdim=True)
        error = self.compressor.scores(ctx) - wanted.clamp(min=1e-6).log()
        error = torch.where(ctx.candidates[:, None, None], error, 0).square().mean((1, 2)).sum()
        return {"loss": error / totals.candidates}

    def distil(self, m, totals, ctx, teacher, soft: bool):
        """Shapes of the quick experiment's pass, B = 1, SmolLM2: context (1, 424), h (1, 424, 576), scores and β
        (1, 30, 3, 424), keys of a layer (1, 3, 424, 64); continuations (1, ~300), of which R ≈ 290 are supervised:
        student and teacher (R, 576), their logits (R, 49152), a chunk at a time."""
        model, comp, b = self.model[0], self.compressor, m.batch
        with torch.set_grad_enabled(self.learn_scores):
            scores = comp.scores(ctx)                                                          # (B, l, g, N)
            choice = comp.choose(scores, ctx, m.k, check=False)
            beta = decay(scores, choice, comp.cfg.decay, comp.cfg.tau, soft)
        # nothing is gathered: an entry that a head dropped gets a bias of −1e9 in that head, which is the same function
        kvs = comp.encode(model, ctx, choice, m.k, lambda layer, k, v: (k, v))
        short = ctx.whole_cache(kvs, beta)
        student = model(b.cont, short, b.segments, largest=m.largest).flatten(0, 1)[m.rows]          # (R, D)
        losses, kl, agree = DistillKL.apply(student, teacher, model.head_weight, self.lam, self.chunk)
        answers = b.answers.flatten()[m.rows]
        return {"loss": losses.sum() / totals.supervised, "kl": (kl * answers).sum() / totals.answers,
                "agree": (agree * answers).sum() / totals.answers}


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


# ----------------------------------------------------- the processes that share a step; run/world.py says how and why

def share(first: int, batch: int, micro: int, world: World) -> list[list[int]]:
    """Sample numbers of this process's part of a step, by forward pass. A step is the `batch` samples from `first` on,
    whoever works on them: no sample is seen twice, and the order does not depend on the number of processes."""
    each = batch // world.world_size
    mine = first + world.rank * each
    return [list(range(i, min(i + micro, mine + each))) for i in range(mine, mine + each, micro)]


def sum_gradients(parameters, numbers, world: World):
    """Every gradient and the fp32 `numbers` (n,), summed over the processes in one go; returns the latter."""
    if world.world_size > 1:
        grads = [p.grad for p in parameters if p.grad is not None]  # in all processes the same ones
        flat = torch.cat([*(g.flatten() for g in grads), numbers])
        *summed, numbers = world.sum(flat).split([*(g.numel() for g in grads), len(numbers)])
        for g, x in zip(grads, summed):
            g.copy_(x.view_as(g))
    return numbers


def add_gradients(distil: Distiller, micro_batches: list[MicroBatch], phase: str, world: World, signals=None):
    """One step's gradient, of all forward passes in all processes, in the .grad of what is trained.

    Returns its numbers by name, fp32 scalars still on the device: what `Distiller` returns, the totals, and how many
    processes were asked to stop, by SIGTERM and by Ctrl-C.
    """
    totals, sums = Totals.of(micro_batches, world), {}
    for m in micro_batches:
        got = distil(m.to(world.device), totals, phase)
        got["loss"].backward()
        sums = {name: sums.get(name, 0) + x.detach() for name, x in got.items()}
    got = signals.got if signals else 0  # asked as late as can be: torchrun grants 30 seconds
    stop = torch.tensor([float(got == s) for s in (signal.SIGTERM, signal.SIGINT)])
    flat = torch.cat([torch.stack(list(sums.values())), stop.to(world.device, non_blocking=True)])
    flat = sum_gradients(distil.parameters(), flat, world)
    return dict(zip([*sums, "term", "interrupt"], flat)) | vars(totals)


# -------------------------------------------------------------------------------------------------------- the loop

def rate(step: int, steps: int, warmup: int) -> float:
    """Of the peak: a linear rise, then half a cosine down to a tenth."""
    return min(1, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


class Draw:
    """What steps are made of; none depends on the ones before it, so a resumed run draws what it would have drawn."""

    def __init__(self, c: TrainConfig, mix: dict, tokenizer, world: World):
        with world.one_first():
            folders = prepare(c.sources.split(","), tokenizer, c.shards or SHARDS)
        shards = [Shard(folder, "train", tokenizer) for folder in folders]
        make = lambda m: Samples(shards, tokenizer, c.context, m, c.answer, c.seed, c.shortest)  # noqa: E731
        self.c, self.world, self.replays, self.samples = c, world, make(TEACH), make(mix)
        self.texts = fingerprint(folders)

    def __call__(self, step: int) -> tuple[str, float, list[MicroBatch]]:
        """Phase, kept fraction, and this process's forward passes."""
        c, rng = self.c, random.Random(f"{self.c.seed}/step/{step}")
        keep = math.exp(rng.uniform(math.log(c.keep_low), math.log(c.keep_high)))
        phase = "reconstruct" if step < c.reconstruct else "soft" if rng.random() < c.soft else "hard"
        source = self.replays if phase == "reconstruct" else self.samples
        parts = share(step * c.batch, c.batch, c.micro, self.world)
        return phase, keep, [MicroBatch.of(collate([source(i) for i in part], c.prompts), keep) for part in parts]


def train(c: TrainConfig, draw: Draw, comp: Compressor, model: Llama, out: Path, world: World) -> None:
    """Train `comp` to the end, from where the run in `out` stopped. Errors: BadInput for settings that diverge;
    SystemExit after a signal, when the state is saved."""
    distil = Distiller(model, comp, c.lam, c.chunk, c.scorer_lr > 0)
    scorer, total = list(comp.scorer.parameters()), c.reconstruct + c.steps
    count = [sum(p.numel() for p in x) for x in (comp.parameters(), scorer, model.parameters())]
    print("training {:,} parameters, {:,} of them the scorer's; {:,} are frozen".format(*count))
    optimizer = torch.optim.AdamW([{"params": comp.adapters()}, {"params": scorer}], lr=0.0, betas=(0.9, 0.98),
                                  weight_decay=c.weight_decay)
    begin, stop, recent = resume(out, comp, optimizer, draw.texts, total, world), 0, {}
    bar = tqdm(range(begin, total), initial=begin, total=total, unit="step", mininterval=1, disable=world.rank > 0)
    path = os.devnull if world.rank else out / "log.jsonl"
    sys.setswitchinterval(1e-4)  # the reader's Python may not keep the thread that feeds a GPU waiting for 5 ms
    with open(path, "ab", 0) as log, ThreadPoolExecutor(1) as reader, Signals(begin, not world.rank) as signals:
        ahead = reader.submit(draw, begin)
        for step in bar:
            start = time.perf_counter()
            phase, keep, micro_batches = ahead.result()
            ahead = reader.submit(draw, min(step + 1, total - 1))
            teaching = phase == "reconstruct"
            try:
                got = add_gradients(distil, micro_batches, phase, world, signals)
            except BadInput as e:
                raise BadInput(f"step {step}: {e}") from None
            now = rate(step, c.reconstruct, c.warmup) if teaching else rate(step - c.reconstruct, c.steps, c.warmup)
            for g, name, peak in zip(optimizer.param_groups, ("grad_adapters", "grad_scorer"),
                                     (c.lr, c.teach_lr if teaching else c.scorer_lr)):
                g["lr"] = peak * now
                got[name] = nn.utils.clip_grad_norm_(g["params"], c.clip)
            got = dict(zip(got, torch.stack([x.to(world.device) for x in got.values()]).tolist()))  # we wait here
            if not all(map(math.isfinite, (got["loss"], got["grad_adapters"], got["grad_scorer"]))):
                raise BadInput(f"step {step}: the loss is {got['loss']}, gradients {got['grad_adapters']} and "
                               f"{got['grad_scorer']}; lower --{'teach-lr' if teaching else 'lr or --scorer-lr'}")
            optimizer.step()
            optimizer.zero_grad()
            term, interrupt = got.pop("term"), got.pop("interrupt")
            stop = 128 + signal.SIGTERM if term else 128 + signal.SIGINT if interrupt else 0
            save = stop or (step + 1) % c.save_every == 0 or step + 1 == total
            line = {"step": step, "phase": phase, "keep": round(keep, 4), **got,
                    "lr": optimizer.param_groups[teaching]["lr"],
                    **speed(model.cfg, comp.cfg, got, c.batch, phase, distil.learn_scores, time.perf_counter() - start)}
            if not world.rank:
                append_line(log, line, sync=save)  # first the lines, then the state that says they are there
                if save:
                    save_state(out, step + 1, comp, optimizer, {"processes": world.world_size, "texts": draw.texts})
            signals.saved = step + 1 if save else signals.saved
            show(bar, recent, line)
            if stop:
                break
    if stop:
        world.broadcast(None)  # nobody ends before the state is written: torchrun would stop the writer
        print(f"stopped after {step + 1} of {total} steps; the same command goes on from there")
        raise SystemExit(stop)


def demonstrate(comp: Compressor, model: Llama, tokenizer) -> None:
    """Three questions about a text of our own, answered from three caches."""
    with torch.no_grad():
        ctx = open_text(comp, model, tokenizer, DEMO.read_text(encoding="utf-8"))
        caches = [comp.compress(model, ctx, keep) for keep in (1, 0.25, 0.1)]
    names = [f"{name}, {x.nbytes():,} bytes" for name, x in zip(("whole", "4 x smaller", "10 x smaller"), caches)]
    show_answers(model, tokenizer, dict(zip(names, caches)), DEMO_QUESTIONS, 40)


def run(a, c: TrainConfig, mix: dict, about: dict, world: World) -> None:
    """What every process does once all know each other: the model, the training, the table."""
    start, defaults = time.perf_counter(), asdict(TrainConfig())
    with world.one_first():
        a.weights = a.weights or fetch()
    a.device, default = str(world.device), f"out/{a.preset}"
    if a.dtype == "auto":  # all processes must come to the same, and a run that goes on to what it was
        a.dtype = world.on_rank0(lambda: dtype_of({"train": asdict(c), "system": a.system}, c.out, default, defaults) or
                                 {torch.float32: "fp32", torch.bfloat16: "bf16"}[pick_dtype("auto", world.device)])
    c.parallel = world.broadcast(choose_parallel(c.parallel, a.weights, a.dtype, world.world_size, world.device))
    model, tokenizer = open_model(a, world.shard if c.parallel == "fsdp" else None)
    model.recompute = c.recompute
    for block in model.layers if c.compile else ():
        block.mlp.compile()
    # base_of brings sharded weights together, so all processes call it; later calls remember
    wanted = {"train": asdict(c), "system": a.system, "dtype": str(model.dtype)[6:], "base": base_of(model, tokenizer),
              "from": about.get("from")}
    if a.profile:  # so many steps of each phase that there is, and one before them
        c = replace(c, reconstruct=min(c.reconstruct, a.profile + 1), steps=min(c.steps, a.profile + 1))
    else:
        out, finished = world.on_rank0(lambda: find_run_folder(wanted, c.out, default, defaults))
        if finished:
            return print(f"{out}: this run is finished, see {out / 'adapter'}; for another, give a new --out")
    torch.manual_seed(c.seed)
    comp = (load_adapter(c.init_adapter, model, tokenizer).requires_grad_(True) if c.init_adapter else
            Compressor(model.cfg, c.compressor()).to(model.device))
    draw = Draw(c, mix, tokenizer, world)
    if a.profile:
        return profile(c, model, about, world, lambda folder: train(c, draw, comp, model, folder, world))

    print(" ".join(f"{k}={v}" for k, v in asdict(c).items()) + f"\nwriting to {out}")
    with nullcontext() if world.rank else alone_in(out):
        if not world.rank:
            write_config(out, wanted | {"trained_parameters": sum(p.numel() for p in comp.parameters())} | about)
        train(c, draw, comp, model, out, world)
        comp.requires_grad_(False)
        if not world.rank:
            save_adapter(out / "adapter", comp, model, tokenizer, {"train": asdict(c), "system": a.system, **about})
        print(f"adapter saved in {out / 'adapter'} after {time.perf_counter() - start:.0f} s")
        cells = []
        if c.eval_contexts:
            # Under ddp the processes share the documents out. Under fsdp each goes through all of them: a forward pass
            # needs everybody, and documents differ in how many they take.
            alone = world.world_size == 1 or c.parallel == "fsdp"
            cells = held_out_table(model, tokenizer, comp, c.sources, c.shards or SHARDS, c.context, c.eval_contexts,
                                   c.seed, world=None if alone else world)
        result = {"cells": cells, "dtype": str(model.dtype)[6:], "context": c.context,
                  "seconds": round(time.perf_counter() - start, 1), **about}
        if not world.rank:
            write_result(out / "result.json", result)
            if c.eval_contexts and c.parallel != "fsdp":  # one process alone cannot run a sharded model
                demonstrate(comp, model, tokenizer)
        print(json.dumps(result) if a.json else f"\nall numbers: {out / 'result.json'}")


def main() -> None:
    a = parse_args(TrainConfig, PRESETS)
    c, mix, about = a.config, check(a.config), provenance(a.config.seed)
    about |= {"from": read_about(Path(c.init_adapter) / "adapter.json")} if c.init_adapter else {}
    if a.plan:
        return print_plan(a, mix)
    world = World.start(a.device)
    if c.batch % (world.world_size * c.micro):
        raise BadInput(f"--batch {c.batch} cannot be shared by {world.world_size} processes with --micro {c.micro}: "
                       f"expected a multiple of {world.world_size * c.micro}")
    try:
        run(a, c, mix, about, world)
    except RuntimeError as e:
        raise out_of_memory(e, c, world.world_size) or e
    world.end()


if __name__ == "__main__":
    run_program(main)
