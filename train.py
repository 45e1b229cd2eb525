"""Train a KV-cache compressor for a frozen Llama.

    python train.py                       # about half an hour of two CPU cores
    python train.py --preset small        # two to three hours of two CPU cores
    python train.py --preset paper-small  # the paper's own method
    python train.py --init-adapter FOLDER --sources my/texts --scorer-steps 0 \
        --steps 60 --lr 2e-4              # go on from an adapter
    torchrun --nproc_per_node=8 train.py --preset 8b

A run has two phases:

1. `--scorer-steps`: the scorer learns by regression how much attention each
   cache entry will get, and how much the likelihood of later text depends on it.
   A backward pass through the frozen Llama measures the latter.
2. `--steps`: distillation. The teacher is the frozen model with its full cache.
   The student is the same model with a compressed cache. The loss pulls the
   student's predictions towards the teacher's. It trains the LoRA matrices and,
   with `--scorer-lr-phase2`, the scorer.

The paper has the second phase only (`--preset paper`).

Shapes are as in compress.py. M is the number of supervised tokens of a forward
pass: those whose prediction of the next token is distilled.

The file reads from the top: one training step, its loss, the processes that share
a step, the loop, the program. The settings are in run/train_flags.py. The step
itself uses compress.py for the method, model.py for the Llama and data/samples.py
for the questions. run/README.md explains presets, clusters, memory and resuming.
"""
import argparse
import json
import math
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from run.errors import BadInput, provenance, read_json, run_program
from run.train_flags import LLAMA_8B, TrainConfig, check_batch, parse_args, parse_mix

if __name__ == "__main__":
    run_program(parse_args, is_last=False)  # a typo is answered before torch is imported

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from compress import (
    Compressor, CompressorConfig, Context, attention_and_effect, decay, kept_count,
    load_adapter, max_attention)
from data.batches import Batch, collate
from data.fetch import fetch
from data.prepare import SHARDS, Shard, fingerprint, prepare
from data.samples import REPEAT, Samples
from eval import held_out_table
from model import Cache, Llama, relative_positions
from run.checkpoint import (
    Signals, append_line, base_of, check_run, open_run, read_adapter_json, resume,
    save_adapter, save_state, show_progress)
from run.dist import World
from run.loading import open_model, open_tokenizer, read_config
from run.memory_plan import (
    LLAMA_8B_SHAPE, choose_parallel, out_of_memory, print_plan, step_flops)
from run.records import write_result


# ------------------------------------------------------------- one training step

# How many queries of each kind a context gets at most in the first phase. (A query is a
# question, or the start of a continuation: see data/samples.py.) The scorer learns from
# what the model looks at while it repeats the whole document ("replay"), while it reads
# how the text goes on, and while it answers.
SCORER_MIX = {"replay": 1, "continue": 1, "cloze": 4, "title": 2}


@dataclass
class MicroBatch:
    """The contexts of one forward pass.

    Sizes are computed here, on the CPU: asking a GPU for them means waiting.
    batch: see data/batches.py. All queries about a context, each with its answer,
        stand in one row of `continuation`; `segments` numbers them, so that they
        do not see each other.
    """
    batch: Batch
    supervised_at: torch.Tensor  # (M,) int64, where the supervised tokens stand in
                                 # the flattened (B·T)
    k: torch.Tensor              # (B,) int64, tokens to keep, per head on average
    max_position: int            # an upper bound of the positions in the continuations
    padded: bool                 # whether contexts differ in length

    @classmethod
    def of(cls, batch: Batch, keep: float) -> "MicroBatch":
        """batch: on the CPU; keep: the keep ratio."""
        supervised_at = batch.supervised.flatten().nonzero()[:, 0]
        k = kept_count(batch.lengths - batch.protect.sum(1), keep)
        offsets = relative_positions(batch.continuation, batch.segments)
        longest = offsets[batch.segments >= 0].max()
        max_position = int(batch.lengths.max() + longest)
        padded = bool((batch.lengths < batch.tokens.shape[1]).any())
        return cls(batch, supervised_at, k, max_position, padded)

    def to(self, device) -> "MicroBatch":
        def send(x):
            x = x.pin_memory() if device.type == "cuda" else x
            return x.to(device, non_blocking=True)

        batch = Batch(*[send(x) for x in vars(self.batch).values()])
        return replace(
            self, batch=batch, supervised_at=send(self.supervised_at), k=send(self.k))


@dataclass
class StepCounts:
    """Token counts of a whole step: of all forward passes of all processes.

    Losses are divided by these. A mean per pass would weigh tokens unequally.
    fp32 scalars.
    """
    supervised: torch.Tensor    # tokens whose prediction is distilled
    answers: torch.Tensor       # those of them whose next token belongs to an answer
    compressible: torch.Tensor  # context tokens that may be dropped
    context: torch.Tensor       # all context tokens
    continuation: torch.Tensor  # tokens of questions and answers

    @classmethod
    def of(cls, micro_batches: list[MicroBatch], world: World) -> "StepCounts":
        total = torch.zeros(5)
        for m in micro_batches:
            b = m.batch
            total += torch.stack([
                b.supervised.sum(), b.answers.sum(), (b.lengths - b.protect.sum(1)).sum(),
                b.lengths.sum(), (b.segments >= 0).sum()])
        total = total.to(world.device, non_blocking=True)
        return cls(*world.all_reduce(total))


class Distiller(nn.Module):
    """The loss of one forward pass, in either phase.

    It is a module so that DistributedDataParallel can wrap it.
    """

    def __init__(self, model: Llama, compressor: Compressor, lam: float, chunk: int):
        super().__init__()
        self.compressor = compressor
        self.model = [model]  # a list hides its weights from self.parameters()
        self.lam = lam
        self.chunk = chunk

    def forward(self, m: MicroBatch, counts: StepCounts, phase: str) -> dict:
        """This pass's share of the step's loss, and numbers for the log: scalars.

        phase: "scorer", or one of the second phase's two kinds of step: "hard"
            (dropped entries get no attention) and "soft" (no entry is dropped; all
            that the scorer ranks are decayed).
        """
        b = m.batch
        model = self.model[0]
        lengths = b.lengths if m.padded else None
        # layers 1 … η of the context
        ctx = self.compressor.read(model, b.tokens, lengths, b.protect)
        # The full cache. The scorer's targets are measured on it, or the teacher
        # reads it.
        full = self.compressor.full_cache(model, ctx)
        if phase == "scorer":
            return self.scorer_loss(m, counts, ctx, full)

        with torch.no_grad():
            teacher = self.ask(m, full)  # (M, D)
        del full  # the student needs its memory
        return self.distillation_loss(m, counts, ctx, teacher, soft=phase == "soft")

    def scorer_loss(
        self, m: MicroBatch, counts: StepCounts, ctx: Context, full: Cache,
    ) -> dict:
        """The squared error of the scores, as predictions of log(attention · effect),
        or of log(attention) with `--target attention`: a mean over the heads and
        over the compressible tokens of the step.

        The attention of a cache entry is the largest weight that it gets while the
        model reads the queries of SCORER_MIX and their answers. Its effect is how
        much the likelihood of these depends on it. With the replay alone, the
        attention would be KVzip's importance score (arXiv 2505.23416). KVzip measures
        it by a second reading of each context; the scorer learns to predict it.
        """
        b = m.batch
        model = self.model[0]
        if self.compressor.cfg.target == "both":
            factors = attention_and_effect(
                model, full, b.continuation, b.segments, m.max_position)
        else:
            factors = [max_attention(
                model, full, b.continuation, segments=b.segments,
                max_position=m.max_position)]

        target = 0  # (B, L, G, N); with token selection (B, 1, 1, N)
        for factor in factors:
            if self.compressor.cfg.selection == "token":
                factor = factor.mean((1, 2), keepdim=True)
            # the logarithm of a factor is at least −13.8
            target = target + factor.clamp(min=1e-6).log()
        error = self.compressor.scorer(ctx.h, ctx.lengths) - target
        error = torch.where(ctx.compressible[:, None, None], error, 0)
        # the mean over heads, (B, N), and the sum over tokens, a scalar
        loss = error.square().mean((1, 2)).sum()
        return {"loss": loss / counts.compressible}

    def distillation_loss(
        self, m: MicroBatch, counts: StepCounts, ctx: Context, teacher, soft: bool,
    ) -> dict:
        """KL divergence between the teacher and the student.

        teacher: its hidden states at the supervised tokens, (M, D).
        soft: see `decay`.

        With `--routing-strength growing`, the gradient of the LoRA is 0 in a step that
        keeps a quarter or more, because its strength is 0 up to 4×.

        In the quick experiment B = 1, M is about 290, and L, G, D are 30, 3, 576.
        N = 424: 400 tokens of the document and 24 of the chat header.
        """
        model = self.model[0]
        compressor = self.compressor
        cfg = compressor.cfg
        # (B, L, G, N); with token selection (B, 1, 1, N)
        scores = compressor.scorer(ctx.h, ctx.lengths)
        # check=False: checking would wait for the GPU
        selection = compressor.select(scores, ctx, m.k, registers=True, check=False)
        beta = decay(scores, selection, cfg.decay, cfg.tau, soft)

        # The remaining layers are computed again, with LoRA for selected tokens
        # and registers.
        kvs = compressor.encode(model, ctx, selection, m.k)
        student = self.ask(m, compressor.training_cache(ctx, kvs, beta, m.k))  # (M, D)

        loss, kl, agree = DistillKL.apply(  # (M,) each
            student, teacher, model.head_weight, self.lam, self.chunk)
        predicts_answer = m.batch.answers.flatten()[m.supervised_at]
        return {
            "loss": loss.sum() / counts.supervised,
            "kl": (kl * predicts_answer).sum() / counts.answers,
            "agree": (agree * predicts_answer).sum() / counts.answers,
        }

    def ask(self, m: MicroBatch, cache: Cache):
        """Hidden states of the supervised tokens, read after a cache: (M, D)."""
        b = m.batch
        hidden = self.model[0](
            b.continuation, cache, b.segments, max_position=m.max_position)
        return hidden.flatten(0, 1)[m.supervised_at]


class DistillKL(torch.autograd.Function):
    """λ·KL(p‖q) + (1−λ)·KL(q‖p) of each row; p is the teacher, q the student.

    student, teacher: (M, D), hidden states after the last norm.
    head: (V, D), the output head, which makes logits of them; z are those of the student.
    Returns three (M,) in fp32 (fp64 for fp64 inputs): the loss, KL(p‖q),
    and 1 where teacher and student rank the same token first, else 0.

    All logits at once would take too much memory (M·V numbers), so `chunk` rows
    are computed at a time, and their gradient as well, while they exist:
        ∂KL(p‖q)/∂z = q − p
        ∂KL(q‖p)/∂z = q·(log q − log p − KL(q‖p))
    Only the loss has a gradient, and only towards `student`.
    """

    @staticmethod
    def forward(ctx, student, teacher, head, lam, chunk):
        M = len(student)
        dtype = torch.promote_types(student.dtype, torch.float32)  # fp64 stays fp64
        loss, kl, agree = torch.empty(3, M, device=student.device, dtype=dtype)
        grad = torch.empty_like(student)
        for start in range(0, M, chunk):
            rows = slice(start, start + chunk)
            log_q = F.linear(student[rows], head).to(dtype).log_softmax(-1)
            log_p = F.linear(teacher[rows], head).to(dtype).log_softmax(-1)
            agree[rows] = (log_q.argmax(-1) == log_p.argmax(-1)).to(dtype)
            q = log_q.exp()  # (chunk, V)
            p = log_p.exp()

            # from here on in place, because V is large
            log_ratio = log_q.sub_(log_p)
            kl[rows] = -torch.linalg.vecdot(p, log_ratio)
            reverse = torch.linalg.vecdot(q, log_ratio)
            loss[rows] = lam * kl[rows] + (1 - lam) * reverse

            # dz = λ·(q − p) + (1−λ)·q·(log_ratio − reverse)
            weight = log_ratio.sub_(reverse[:, None]).mul_(1 - lam).add_(lam)
            dz = q.mul_(weight).sub_(p, alpha=lam)
            grad[rows] = dz.to(head.dtype) @ head

        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(kl, agree)
        return loss, kl, agree

    @staticmethod
    def backward(ctx, d_loss, *_):
        grad, = ctx.saved_tensors
        return grad * d_loss[:, None].to(grad.dtype), None, None, None, None


# --------------------------------------------- the processes that share a step

def my_samples(first: int, batch: int, micro: int, world: World) -> list[list[int]]:
    """The numbers of this process's samples in a step, by forward pass.

    The step consists of the samples first … first + batch − 1, whatever the number
    of processes.
    """
    each = batch // world.world_size
    first += world.rank * each
    numbers = list(range(first, first + each))
    return [numbers[i:i + micro] for i in range(0, each, micro)]


def start_phase(distiller: Distiller, phase: str, learn_scores: bool, world: World):
    """Let the gradient reach what the phase trains, and nothing else.

    The first phase trains the scorer. The second trains the LoRA and, with
    learn_scores, the scorer. With several processes, torch's
    DistributedDataParallel shares the gradients.
    """
    compressor = distiller.compressor
    compressor.requires_grad_(phase != "scorer")
    compressor.scorer.requires_grad_(phase == "scorer" or learn_scores)
    if world.world_size == 1:
        return distiller
    return DistributedDataParallel(distiller)


def forward_backward(
    distiller, micro_batches: list[MicroBatch], phase: str, world: World, signals=None,
) -> dict[str, torch.Tensor]:
    """The gradient of a step, of all forward passes of all processes together.

    distiller: what start_phase returned.
    Returns scalars for the log: what the Distiller returned, the StepCounts, and
    "stop", how many processes were asked to stop.
    """
    counts = StepCounts.of(micro_batches, world)
    metrics = {}
    for i, m in enumerate(micro_batches):
        # The processes exchange gradients in the last pass only. A single process
        # is not wrapped in DistributedDataParallel, so it has no no_sync().
        is_last = i + 1 == len(micro_batches)
        exchange = is_last or world.world_size == 1
        with nullcontext() if exchange else distiller.no_sync():
            found = distiller(m.to(world.device), counts, phase)
            # DistributedDataParallel averages gradients over processes. Each loss
            # is already divided by the counts of all processes, so their sum is
            # wanted: hence the factor.
            (found["loss"] * world.world_size).backward()
        for name, x in found.items():
            metrics[name] = metrics.get(name, 0) + x.detach()

    stop = signals is not None and signals.received > 0
    metrics["stop"] = torch.tensor(float(stop), device=world.device)
    total = world.all_reduce(torch.stack(list(metrics.values())))
    return dict(zip(metrics, total)) | vars(counts)


# --------------------------------------------------------------------- the loop

def lr_schedule(step: int, steps: int, warmup: int) -> float:
    """The learning rate as a fraction of its peak: linear warm-up, and a cosine
    decay to a tenth."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1, (step + 1) / warmup) * (0.1 + 0.9 * cosine)


def set_learning_rates(optimizer, c: TrainConfig, step: int) -> float:
    """Set the learning rates of the scorer and of the LoRA for a step.

    Returns the rate for the log: the scorer's in the first phase, the LoRA's in
    the second.
    """
    lora, scorer = optimizer.param_groups
    if step < c.scorer_steps:
        scorer["lr"] = c.scorer_lr * lr_schedule(step, c.scorer_steps, c.warmup)
        return scorer["lr"]
    factor = lr_schedule(step - c.scorer_steps, c.steps, c.warmup)
    scorer["lr"] = c.scorer_lr_phase2 * factor
    lora["lr"] = c.lr * factor
    return lora["lr"]


class BatchSampler:
    """The batch of any step. It does not depend on the batches before it, so a
    resumed run draws what it would have drawn."""

    def __init__(self, c: TrainConfig, tokenizer, world: World):
        self.c = c
        self.world = world
        with world.local_rank0_first():
            folders = prepare(c.sources.split(","), tokenizer, c.shards or SHARDS)
        self.texts_hash = fingerprint(folders)
        shards = [Shard(folder, "train", tokenizer) for folder in folders]

        def samples(mix):
            return Samples(
                shards, tokenizer, c.context, mix, c.answer, c.seed, c.min_context)

        self.scorer_samples = samples(SCORER_MIX)
        self.distillation_samples = samples(parse_mix(c.mix))

    def __call__(self, step: int) -> tuple[str, float, list[MicroBatch]]:
        """The step's phase and keep ratio, and this process's forward passes.

        The first phase drops nothing, so it does not use the keep ratio.
        """
        c = self.c
        rng = random.Random(f"{c.seed}/step/{step}")
        keep = math.exp(rng.uniform(math.log(c.keep_min), math.log(c.keep_max)))
        if step < c.scorer_steps:
            phase = "scorer"
            samples = self.scorer_samples
            first = step * c.batch_of("scorer")
        else:
            phase = "soft" if rng.random() < c.soft_fraction else "hard"
            samples = self.distillation_samples
            # the numbers continue after those of the first phase
            first = c.scorer_steps * c.batch_of("scorer") + (step - c.scorer_steps) * c.batch

        micro_batches = []
        for numbers in my_samples(first, c.batch_of(phase), c.micro, self.world):
            batch = collate([samples(i) for i in numbers], c.prompts)
            micro_batches.append(MicroBatch.of(batch, keep))
        return phase, keep, micro_batches


def train(
    c: TrainConfig, sampler: BatchSampler, compressor: Compressor, model: Llama,
    out: Path, world: World,
) -> None:
    """Train the compressor to the end, from where the run in `out` stopped.

    Every `save_every` steps the compressor, the optimizer and the step are saved.
    A signal (SIGTERM, Ctrl-C) saves them at the end of the step and stops. A
    harder kill loses the steps since the last save; when the run is resumed,
    their lines are dropped from the log.
    Errors: BadInput if the training diverges; SystemExit after a signal.
    """
    lora = compressor.lora_parameters()
    scorer = list(compressor.scorer.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": lora}, {"params": scorer}], lr=0.0, betas=(0.9, 0.98),
        weight_decay=c.weight_decay)
    total = c.scorer_steps + c.steps
    begin = resume(out, compressor, optimizer, sampler.texts_hash, total, world)
    distiller = Distiller(model, compressor, c.lam, c.chunk)
    sizes = [sum(p.numel() for p in x.parameters()) for x in (compressor, model)]
    print("training {:,} parameters; {:,} are frozen".format(*sizes))

    is_first = world.rank == 0
    log_path = out / "log.jsonl" if is_first else os.devnull
    bar = tqdm(range(begin, total), initial=begin, total=total, unit="step",
               mininterval=1, disable=not is_first)
    means = {}
    stop = False
    sys.setswitchinterval(1e-4)  # so that the loader does not hold up the GPU's thread
    with (
        open(log_path, "ab", buffering=0) as log, ThreadPoolExecutor(1) as loader,
        Signals(begin, is_first) as signals,
    ):
        next_batch = loader.submit(sampler, begin)
        for step in bar:
            start = time.perf_counter()
            phase, keep, micro_batches = next_batch.result()
            # The last step draws its own batch once more, which nobody uses.
            next_batch = loader.submit(sampler, min(step + 1, total - 1))
            # the first step of this process, or of the second phase
            if step in (begin, c.scorer_steps):
                wrapped = start_phase(distiller, phase, c.scorer_lr_phase2 > 0, world)

            metrics = forward_backward(wrapped, micro_batches, phase, world, signals)
            metrics["grad_lora"] = nn.utils.clip_grad_norm_(lora, c.clip)
            metrics["grad_scorer"] = nn.utils.clip_grad_norm_(scorer, c.clip)
            metrics = to_numbers(metrics, world.device)  # here we wait for the GPU
            check_finite(metrics, step, phase)
            lr = set_learning_rates(optimizer, c, step)
            optimizer.step()
            optimizer.zero_grad()

            stop = metrics.pop("stop") > 0
            save = stop or (step + 1) % c.save_every == 0 or step + 1 == total
            line = {"step": step, "phase": phase, "keep": round(keep, 4), **metrics, "lr": lr}
            line |= speed(model, compressor, c, line, time.perf_counter() - start)
            show_progress(bar, means, line)
            if is_first:
                append_line(log, line, sync=save)  # first, so that no state is newer
            if is_first and save:
                about = {"processes": world.world_size, "texts": sampler.texts_hash}
                save_state(out, step + 1, compressor, optimizer, about)
            if save:
                signals.saved = step + 1
            if stop:
                break

    if stop:
        # All wait here until process 0, which saves, is done. Without this, torchrun
        # would end it as soon as another process leaves.
        world.broadcast(None)
        print(f"stopped after {step + 1} of {total} steps; go on with --resume")
        raise SystemExit(128 + (signals.received or signal.SIGTERM))


def to_numbers(metrics: dict[str, torch.Tensor], device) -> dict[str, float]:
    """Scalars as Python numbers, in one transfer."""
    values = torch.stack([x.to(device) for x in metrics.values()])
    return dict(zip(metrics, values.tolist()))


def check_finite(metrics: dict[str, float], step: int, phase: str) -> None:
    """Errors: BadInput for a loss or a gradient that is not finite."""
    names = ("loss", "grad_lora", "grad_scorer")
    if not all(math.isfinite(metrics[name]) for name in names):
        found = ", ".join(f"{name} is {metrics[name]}" for name in names)
        flags = "--scorer-lr" if phase == "scorer" else "--lr or --scorer-lr-phase2"
        raise BadInput(f"step {step}: {found}; use a lower {flags}")


def speed(
    model: Llama, compressor: Compressor, c: TrainConfig, line: dict, seconds: float,
) -> dict:
    """How fast a step was; line: its other numbers in the log."""
    tokens = line["context"] + line["continuation"]
    flops = step_flops(
        model.cfg, compressor, c.batch_of(line["phase"]), line["context"], line["continuation"],
        line["supervised"], line["phase"], c.scorer_lr_phase2 > 0)
    return {
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds),
        "gflop_per_s": round(flops / seconds / 1e9, 1),
    }


# ------------------------------------------------------------------ the program

def compressor_config(c: TrainConfig) -> CompressorConfig:
    return CompressorConfig(**{f.name: getattr(c, f.name) for f in fields(CompressorConfig)})


QUESTION_ROOM = 128  # the longest are cloze questions, a sentence of up to 45 words


def check_context(c: TrainConfig, tokenizer, max_positions: int) -> None:
    """Refuse contexts that leave the model no positions for what is asked.

    A question is assumed to have at most QUESTION_ROOM tokens. If a longer one does not
    fit, the model refuses it, and the run ends.
    Errors: BadInput.
    """
    room = max_positions - len(tokenizer.header)
    longest = room - QUESTION_ROOM - c.answer
    asked = f"a question and its answer (--answer {c.answer})"
    if c.scorer_steps:
        repeat = len(tokenizer.encode(REPEAT, joined=True) + tokenizer.turn)
        if (room - repeat) // 2 < longest:
            longest = (room - repeat) // 2
            asked = "its repetition (--scorer-steps)"
    if c.context > longest:
        raise BadInput(
            f"--context is {c.context}, expected at most {longest}: the model has "
            f"{max_positions} positions, for the context and {asked}")


def run(a: argparse.Namespace, c: TrainConfig, about: dict, world: World) -> None:
    """What every process does: open the model, train, and measure the result.

    about: where the run comes from, for config.json, adapter.json and result.json.
    """
    start = time.perf_counter()
    out = Path(a.out)
    adapter = out / "adapter"
    usage = f"python compress.py --adapter {adapter}"
    if a.weights:
        usage += f" --weights {a.weights}"

    # What can be refused is refused before the model is loaded.
    about = {"train": asdict(c), "system": a.system, **about}
    world.on_rank0(lambda: check_run(out, about, a.resume))
    with world.local_rank0_first():
        a.weights = a.weights or fetch()
    a.device = str(world.device)
    c.parallel = world.broadcast(choose_parallel(c.parallel, a.weights, a.dtype, world))
    about["train"]["parallel"] = c.parallel
    tokenizer, cfg = open_tokenizer(a)
    check_context(c, tokenizer, cfg.max_positions)
    model, _ = open_model(a, world.shard if c.parallel == "fsdp" else None, tokenizer)
    model.activation_checkpointing = c.activation_checkpointing
    dtype = str(model.dtype).removeprefix("torch.")  # such as bfloat16

    torch.manual_seed(c.seed)
    if c.init_adapter:
        compressor = load_adapter(c.init_adapter, model, tokenizer)
    else:
        compressor = Compressor(model.cfg, compressor_config(c)).to(model.device)
    sampler = BatchSampler(c, tokenizer, world)

    config = {**about, "dtype": dtype, "base": base_of(model, tokenizer)}
    with ExitStack() as stack:
        # Process 0 alone locks the folder, until the end of this block.
        finished = world.on_rank0(
            lambda: stack.enter_context(open_run(out, config, a.resume)))
        if finished:
            print(f"{out}: this run is finished; its adapter is {adapter}")
            if a.json:
                print(json.dumps(read_json(out / "result.json")))
            return
        print(f"writing to {out}; its config.json has the settings")
        train(c, sampler, compressor, model, out, world)
        compressor.requires_grad_(False)
        if world.rank == 0:
            save_adapter(adapter, compressor, model, tokenizer, about)
        print(f"adapter saved in {adapter} after {time.perf_counter() - start:.0f} s")

        cells = []
        if c.eval_contexts:
            # under fsdp a forward pass needs all processes: all measure all documents
            cells = held_out_table(
                model, tokenizer, compressor, c.sources, c.shards or SHARDS, c.context,
                c.eval_contexts, c.seed, world=world, share=c.parallel != "fsdp")
        seconds = round(time.perf_counter() - start, 1)
        result = {**about, "cells": cells, "dtype": dtype, "context": c.context,
                  "seconds": seconds}
        if world.rank == 0:
            write_result(out / "result.json", result)

    if cells:
        print(f"\nall numbers, by kind of question, too: {out / 'result.json'}")
    print(f"use the adapter: {usage}")
    if a.json:
        print(json.dumps(result))


def plan(a: argparse.Namespace, c: TrainConfig) -> None:
    """--plan. It reads config.json only, or nothing for the 8B Llama of a preset."""
    path = Path(a.weights or fetch()) / "config.json"
    if a.weights == LLAMA_8B["weights"] and not path.exists():
        cfg = LLAMA_8B_SHAPE
    else:
        cfg = read_config(path)
    with torch.device("meta"):
        model = Llama(cfg)
        compressor = Compressor(cfg, compressor_config(c))
    print_plan(a, c, model, compressor, SCORER_MIX, parse_mix(c.mix))


def main() -> None:
    a, c = parse_args()
    if a.plan:
        check_batch(c, a.gpus)
        return plan(a, c)
    about = provenance(c.seed)
    if c.init_adapter:
        about["from"] = read_adapter_json(Path(c.init_adapter) / "adapter.json")

    world = World.start(a.device)
    check_batch(c, world.world_size)
    try:
        run(a, c, about, world)
    except RuntimeError as error:
        raise out_of_memory(error, c, world.world_size) or error
    world.end()


if __name__ == "__main__":
    run_program(main)
