"""The settings of a training run: every one is a flag of train.py.

They stand apart so that they are checked before torch is imported, which takes
seconds.
"""
import argparse
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from data.samples import KINDS
from run.errors import LARGEST_NUMBER, ROOT, BadInput, Parser, expect, read_json, reading
from run.flags import add_model_flags, check_readable, find_adapter


def number(kind, low, high=LARGEST_NUMBER):
    """An argparse type: an int or a float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            limits = f"{low} to {high}"
            if high == LARGEST_NUMBER:
                limits = f"at least {low}, and finite"
            raise argparse.ArgumentTypeError(f"{text}, expected {limits}")
        return value

    parse.__name__ = kind.__name__  # for METAVARS, and for argparse's "invalid int value"
    return parse


COUNT = number(int, 1)
COUNT_OR_0 = number(int, 0)
POSITIVE = number(float, 1e-12)
POSITIVE_OR_0 = number(float, 0)
FRACTION = number(float, 0, 1)
METAVARS = {"int": "N", "float": "X", "str": "TEXT"}


def flag(default, help, type=str, choices=None):
    """A field of TrainConfig that is also a flag of the command line."""
    argument = {"help": help, "type": type, "choices": choices}
    if not choices:
        argument["metavar"] = METAVARS[type.__name__]
    return field(default=default, metadata=argument)


@dataclass
class TrainConfig:
    """Every field is a flag. The defaults are the quick experiment."""
    # how long, and on what
    scorer_steps: int = flag(300, "steps of the first phase", COUNT_OR_0)
    steps: int = flag(220, "steps of the second phase, distillation", COUNT_OR_0)
    batch: int = flag(1, "contexts per step", COUNT)
    scorer_batch: int = flag(
        0, "contexts per step of the first phase; 0: as many as --batch", COUNT_OR_0)
    micro: int = flag(1, "contexts per forward pass of a process", COUNT)
    context: int = flag(400, "compressible tokens per context", number(int, 16))
    min_context: int = flag(
        0, "draw lengths from here to --context; 0: all are --context", COUNT_OR_0)
    answer: int = flag(
        40, "tokens of the answer to a recite query, and of a continuation with its first "
        "token, which is given", number(int, 2))
    mix: str = flag(
        "continue=1,recite=2,cloze=2,title=2",
        "questions per context in the second phase, at most, by kind: continue, recite, "
        "cloze, title, fact; the first phase has its own, SCORER_MIX in train.py")
    prompts: bool = flag(True, "distil the words of a question, not only its answer")
    sources: str = flag("wiki,sotu", "texts: wiki, sotu, or paths, comma-separated")
    shards: str = flag("", "folder for the tokens of the texts; default: data/shards")

    # the compressor: CompressorConfig in compress.py has the same defaults
    selection: str = flag(
        "head", "head: each head keeps tokens of its own; "
        "token: all heads keep the same", choices=("head", "token"))
    eta: int = flag(
        6, "the scorer reads the output of this layer", COUNT)
    hidden: int = flag(
        1024, "width of the scorer's hidden layer", COUNT)
    target: str = flag(
        "both", "what scores predict; attention: the attention that entries get; both: "
        "that times their effect on the likelihood of what is read later",
        choices=("both", "attention"))
    recent: int = flag(
        4, "with --selection head, every head keeps the last K/8 tokens, 1 to this many "
        "(0: none), where K is what heads keep on average; heads with registers keep "
        "these instead", COUNT_OR_0)
    decay: str = flag(
        "threshold", "how a score becomes β, the bias on attention; sigmoid is the paper's",
        choices=("threshold", "sigmoid"))
    tau: float = flag(0.5, "temperature of threshold decay", POSITIVE)
    rank: int = flag(32, "rank of the LoRA on W_Q and W_O", COUNT)
    routing_strength: str = flag(
        "growing", "strength of the LoRA: growing with "
        "the compression, or full, as in the paper", choices=("growing", "full"))
    registers: int = flag(
        1, "where the LoRA is on, every head above layer eta keeps copies of this many "
        "of the last tokens, which the LoRA may fill with what is dropped; 0: none",
        COUNT_OR_0)

    # the loss
    lam: float = flag(
        0.6, "weight of KL(teacher || student); the rest is on the reverse KL", FRACTION)
    keep_min: float = flag(
        0.01, "smallest keep ratio; each step draws one, log-uniformly", POSITIVE)
    keep_max: float = flag(
        0.25, "largest keep ratio; with --routing-strength growing the LoRA is off at "
        "0.25 and above", POSITIVE)
    soft_fraction: float = flag(
        0.0, "fraction of the distillation steps in which entries are decayed, "
        "not dropped", FRACTION)
    chunk: int = flag(128, "rows of logits computed at a time", COUNT)

    # the optimizer, AdamW
    scorer_lr: float = flag(1e-3, "peak learning rate of the scorer", POSITIVE)
    scorer_lr_phase2: float = flag(
        0.0, "peak learning rate of the scorer in the second phase; 0: the scorer "
        "stays as the first phase left it", POSITIVE_OR_0)
    lr: float = flag(2e-3, "peak learning rate of the LoRA matrices", POSITIVE)
    warmup: int = flag(10, "warm-up steps of each phase", COUNT)
    weight_decay: float = flag(0.0, "weight decay", POSITIVE_OR_0)
    clip: float = flag(
        1.0, "largest gradient norm; LoRA and scorer are clipped apart", POSITIVE)

    # the run
    init_adapter: str = flag("", "folder of an adapter to go on from")
    seed: int = flag(
        0, "seed of initialisation, contexts and keep ratios", number(int, 0, 2**32 - 1))
    out: str = flag("", "folder of the run; default: out/PRESET")
    save_every: int = flag(25, "steps between checkpoints", COUNT)
    eval_contexts: int = flag(
        8, "held-out documents for each kind of question in the final table; 0: no table",
        COUNT_OR_0)
    parallel: str = flag(
        "auto", "under torchrun, each process holds the whole frozen model (ddp) or "
        "a part (fsdp); auto: ddp if it takes up to half of a GPU", choices=("auto", "ddp", "fsdp"))
    activation_checkpointing: bool = flag(
        False, "compute activations again in the backward pass, to save memory")

    def batch_of(self, phase: str) -> int:
        """The number of contexts in a step of a phase."""
        if phase == "scorer" and self.scorer_batch > 0:
            return self.scorer_batch
        return self.batch


LLAMA_8B = {
    "weights": str(ROOT / "weights" / "llama-3.1-8b-instruct"),
    "dtype": "bf16",
    "steps": 10000,
    "batch": 32,
    "context": 2048,
    "answer": 128,
    "mix": "continue=1,recite=2,cloze=4,title=4",
    "target": "attention",  # the effect would keep 33 GB of attention weights: not tried
    "hidden": 4096,
    "rank": 128,
    "lr": 5e-5,
    "warmup": 200,
    "chunk": 256,
    "activation_checkpointing": True,
    "save_every": 50,
    "eval_contexts": 100,
}

# the paper's method; it does not say how many steps, nor which questions
PAPER = {
    "scorer_steps": 0,
    "selection": "token",
    "decay": "sigmoid",
    "routing_strength": "full",
    "registers": 0,
    "eta": 6,
    "rank": 128,
    "lam": 0.6,
    "lr": 5e-5,
    "scorer_lr_phase2": 5e-5,
    "batch": 32,
}

# The values of --preset: flags to start from. A flag that is given as well wins.
PRESETS = {
    "quick": {},
    "small": {
        "scorer_steps": 500,
        "scorer_batch": 2,
        "steps": 260,
        "batch": 4,
        "context": 1024,
        "min_context": 64,
        "lr": 2e-3,
        "warmup": 20,
        "mix": "continue=1,recite=2,cloze=3,title=2,fact=2",
        "eval_contexts": 25,
    },
    "8b": LLAMA_8B | {"scorer_steps": 2000, "scorer_lr": 2e-4},
    "paper": LLAMA_8B | PAPER,
    # rates for a short run; at 1e-3 the sigmoids of all scores are 1 after 25 steps
    "paper-small": PAPER | {
        "target": "attention",
        "steps": 500,
        "batch": 4,
        "lr": 1e-3,
        "scorer_lr_phase2": 1e-4,
        "warmup": 30,
    },
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but an empty one."""

    def _get_help_string(self, action):
        if action.default in (None, ""):
            return action.help
        return super()._get_help_string(action)


def parse_args() -> tuple[argparse.Namespace, TrainConfig]:
    """The command line, and the TrainConfig in it."""
    p = Parser(
        description="Train a KV-cache compressor; by default, the quick experiment.",
        formatter_class=HelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="quick",
                   help="flags to start from; a flag that is given as well wins")
    for f in fields(TrainConfig):
        name = "--" + f.name.replace("_", "-")
        argument = f.metadata
        if isinstance(f.default, bool):
            argument = {"help": argument["help"], "action": argparse.BooleanOptionalAction}
        p.add_argument(name, default=f.default, **argument)
    add_model_flags(p)
    p.add_argument("--resume", action="store_true",
                   help="go on with the run in --out; start it if there is none")
    p.add_argument("--json", action="store_true",
                   help="print result.json in one line at the end")
    p.add_argument("--plan", action="store_true",
                   help="print the memory and time that the run needs, and stop")
    p.add_argument("--gpus", type=COUNT, metavar="N", default=1, help="for --plan")
    p.add_argument("--gpu-memory", type=POSITIVE, metavar="X", default=80.0,
                   help="for --plan: GB of one GPU")
    p.add_argument("--gpu-tflops", type=POSITIVE, metavar="X", default=312.0,
                   help="for --plan: peak of one GPU; an A100 has 312 in bf16")

    # A preset and an adapter change the defaults, also those that --help shows.
    known, _ = p.parse_known_args([x for x in sys.argv[1:] if x not in ("-h", "--help")])
    adapter_settings = {}
    if known.init_adapter:
        folder = find_adapter(known.init_adapter, "--init-adapter")
        with reading(folder / "adapter.json"):
            config = expect(read_json(folder / "adapter.json")["config"], dict)
            unknown = config.keys() - {f.name for f in fields(TrainConfig)}
            if unknown:
                raise ValueError(f"its config has {min(unknown)!r:.50}, which no flag sets")
        adapter_settings = config
    p.set_defaults(**PRESETS[known.preset] | adapter_settings)

    a = p.parse_args()
    a.out = a.out or f"out/{a.preset}"
    c = TrainConfig(**{f.name: getattr(a, f.name) for f in fields(TrainConfig)})
    if c.init_adapter:
        c.init_adapter = str(folder)
        differing = [(name, value) for name, value in sorted(adapter_settings.items())
                     if vars(c)[name] != value]
        if differing:
            flags = ", ".join(f"--{name} {value}" for name, value in differing)
            flags = flags.replace("_", "-")
            p.error(
                f"--init-adapter {folder} has {flags}, which is taken over; give no other value")
    if not a.plan:
        check_readable(weights=a.weights)
        for name in ("gpus", "gpu_memory", "gpu_tflops"):
            if getattr(a, name) != p.get_default(name):
                p.error(f"--{name.replace('_', '-')} is for --plan; torchrun starts several "
                        "processes")
    check(c)
    return a, c


def check(c: TrainConfig) -> None:
    """Refuse flags that do not go together. Errors: BadInput."""
    if c.steps + c.scorer_steps == 0:
        raise BadInput("--steps and --scorer-steps are both 0; give one of them steps")
    if c.min_context and not 16 <= c.min_context <= c.context:
        raise BadInput(f"--min-context is {c.min_context}, expected 0, or 16 to "
                       f"--context ({c.context})")
    if not c.keep_min <= c.keep_max < 1:
        raise BadInput(f"--keep-min {c.keep_min}, --keep-max {c.keep_max}: expected "
                       "keep-min <= keep-max < 1")
    if not all(source.strip() for source in c.sources.split(",")):
        raise BadInput("--sources has an empty entry; expected wiki, sotu, or paths")
    for source in c.sources.split(","):
        if source not in ("wiki", "sotu") and not Path(source).exists():
            raise BadInput(
                f"--sources {source!r}: no such file or folder; expected wiki, sotu, or paths "
                "to text files")
    parse_mix(c.mix)

    if c.decay == "sigmoid" and (c.scorer_steps or c.target == "both"):
        raise BadInput(
            "--decay sigmoid takes a score for a logit, but the first phase fits scores to "
            "logarithms; add --scorer-steps 0 --target attention --scorer-lr-phase2 1e-3")
    reasons = {
        "--scorer-steps 0": not c.scorer_steps and not c.init_adapter,
        "--soft-fraction": c.soft_fraction > 0,
        "--decay sigmoid": c.decay == "sigmoid",
    }
    for flags, given in reasons.items():
        if given and not c.scorer_lr_phase2:
            raise BadInput(
                f"--scorer-lr-phase2 is 0, but with {flags} only the second phase can train "
                "the scorer; try --scorer-lr-phase2 1e-3")


def check_batch(c: TrainConfig, processes: int) -> None:
    """Refuse batches that the processes cannot share. Errors: BadInput."""
    together = processes * c.micro
    if c.batch % together:
        raise BadInput(
            f"--batch {c.batch} cannot be shared by {processes} processes with "
            f"--micro {c.micro}: expected a multiple of {together}")
    if c.scorer_batch % processes:
        raise BadInput(
            f"--scorer-batch {c.scorer_batch} cannot be shared by {processes} "
            f"processes: expected a multiple of {processes}")


def parse_mix(text: str) -> dict[str, int]:
    """--mix as a dict: "continue=1,recite=2" -> {"continue": 1, "recite": 2}."""
    mix = {}
    for entry in text.split(","):
        kind, _, count = entry.partition("=")
        if kind not in KINDS or not count.isdecimal():
            raise BadInput(f"--mix is {text!r}, expected KIND=COUNT,… with the kinds "
                           f"{', '.join(KINDS)}")
        mix[kind] = int(count)
    if mix.get("continue", 0) > 1:
        raise BadInput(f"--mix continue={mix['continue']}: expected 0 or 1, since a text goes on "
                       "in one way only; for more of it give a larger --answer")
    if not any(mix.values()):
        raise BadInput(f"--mix is {text!r}, expected at least one question")
    return mix
