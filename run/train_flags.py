"""What a training run can be told: every field a flag, presets, and what is refused before anything is loaded."""
import argparse
from dataclasses import asdict, fields

from run.compress_flags import find_adapter
from run.errors import BadInput, Parser, expect, reading
from run.files import read_about
from data.samples import KINDS
from run.models import add_model_flags


def parse_args(TrainConfig, PRESETS: dict) -> argparse.Namespace:
    """The flags, --preset's under those that were given; `.config` is the TrainConfig among them."""
    p = Parser(description="Distil a KV-cache compressor. Without flags: the quick experiment.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="quick", help="flags to start from; others override them")
    for f in fields(TrainConfig):
        name = "--" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            p.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=f.metadata["help"])
        else:
            p.add_argument(name, type=type(f.default), default=f.default, help=f.metadata["help"])
    add_model_flags(p)
    p.add_argument("--plan", action="store_true", help="print memory, FLOPs and seconds, from config.json alone; stop")
    p.add_argument("--json", action="store_true", help="end with all of result.json in one line")
    p.add_argument("--profile", type=int, default=0, metavar="STEPS",
                   help="train so many steps of each phase, writing nothing, and compare with matrix products; stop")
    p.add_argument("--gpus", type=int, default=1, help="processes that --plan assumes")
    p.add_argument("--gpus-per-host", type=int, default=8, help="for --plan: fsdp spreads weights within a host only")
    p.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU, in 10^9 bytes, for --plan")
    p.add_argument("--gpu-tflops", type=float, default=312.0, help="of one GPU, for --plan; an A100 has 312 in bf16")
    p.add_argument("--utilisation", type=float, default=0.4, help="share of --gpu-tflops that --plan counts on")
    known, shape = p.parse_known_args()[0], {}
    if known.init_adapter:  # its shape is what the flags are by default
        folder = find_adapter(known.init_adapter, "--init-adapter")
        found, plain = read_about(folder / "adapter.json").get("config", {}), asdict(TrainConfig().compressor())
        with reading(folder / "adapter.json"):
            shape = {"init_adapter": str(folder)} | {k: expect(found[k], type(x)) for k, x in plain.items()}
    p.set_defaults(**PRESETS[known.preset] | shape)
    a = p.parse_args()
    for name in shape.keys() & vars(a).keys() - {"init_adapter"}:
        if getattr(a, name) != shape[name]:
            p.error(f"--{name} is {getattr(a, name)}, but {a.init_adapter} has {shape[name]}; leave the flag out")
    a.init_adapter = shape.get("init_adapter", "")
    for name in ("gpus", "gpus_per_host", "gpu_memory", "gpu_tflops", "utilisation"):
        if not getattr(a, name) > 0:
            p.error(f"--{name.replace('_', '-')} is {getattr(a, name)}: a number above 0 is needed")
    if a.profile < 0:
        p.error(f"--profile is {a.profile}: at least 1 step is needed")
    a.config = TrainConfig(**{f.name: getattr(a, f.name) for f in fields(TrainConfig)})
    return a


def check(c) -> dict[str, int]:
    """Refuse what cannot work before anything is loaded; returns the parsed mix."""
    def need(ok, flag_name, text):
        if not ok:
            raise BadInput(f"--{flag_name.replace('_', '-')} is {getattr(c, flag_name.replace('-', '_'))}: {text}")
    for name in ("chunk", "rank", "hidden", "warmup", "save_every"):
        need(getattr(c, name) >= 1, name, "at least 1 is needed")
    for name in ("lr", "teach_lr", "clip", "tau"):
        need(getattr(c, name) > 0, name, "a number above 0 is needed")
    for name in ("reconstruct", "steps", "recent", "scorer_lr", "eval_contexts", "weight_decay"):
        need(getattr(c, name) >= 0, name, "0 or more is needed")
    need(c.steps + c.reconstruct > 0, "steps", "--reconstruct is 0, too; a step of either is needed")
    need(0 <= c.soft <= 1, "soft", "a share, 0 … 1, is needed")
    need(0 <= c.seed < 1 << 32, "seed", "a whole number from 0 to 2^32 - 1 is needed")
    need(1 <= c.micro <= c.batch and c.batch % c.micro == 0, "micro", f"it must divide --batch ({c.batch})")
    need(c.context >= 16, "context", "at least 16 tokens are needed")
    need(c.shortest == 0 or 16 <= c.shortest <= c.context, "shortest", f"16 … --context ({c.context}), or 0, is needed")
    need(c.answer >= 2, "answer", "at least 2 tokens are needed")
    need(0 < c.keep_low <= c.keep_high < 1, "keep-low", f"0 < keep-low <= keep-high ({c.keep_high}) < 1 is needed")
    need(c.choice in ("head", "token"), "choice", "expected head or token")
    need(c.decay in ("threshold", "sigmoid"), "decay", "expected threshold or sigmoid")
    need(c.scorer_lr > 0 or (c.reconstruct or c.init_adapter) and c.decay == "threshold" and not c.soft, "scorer-lr",
         "with --reconstruct 0, --soft or --decay sigmoid the scorer learns by distillation; give 1e-3, for example")
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
