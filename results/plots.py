"""Draw the figures of results (needs matplotlib):

    python results/plots.py                    # of the results that the pages show
    python results/plots.py out/fidelity.json  # of any result of eval.py, beside it
    python results/plots.py --heads ADAPTER    # results/heads.png: how much each head keeps
    python results/plots.py --targets          # results/targets.png: the scorer's two targets
"""
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends them

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
try:
    import matplotlib
except ImportError:
    sys.exit("plots.py: error: matplotlib is not installed: pip install matplotlib")
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from compress import (  # noqa: E402
    DEMO, attention_and_effect, kept_count, last_tokens, load_adapter,
    select)
from data.samples import REPEAT  # noqa: E402
from data.tasks import METRICS, fidelity  # noqa: E402
from results.tables import FIGURES, RESULTS, cost_rows  # noqa: E402
from run.errors import BadInput, Parser, read_json, reading, run_program  # noqa: E402
from run.flags import add_model_flags  # noqa: E402
from run.loading import open_model  # noqa: E402
from run.records import MIN_UNITS, UNITS  # noqa: E402

# Figures show the first eight of their methods, in this order; the tables show all.
COLOURS = {"kvdistill": "#c1121f", "no-routing": "#e07a7a", "kvzip:recent": "#1d4e89",
           "kvzip": "#6fa8dc", "kvzip:equal": "#a9c9e8", "snapkv": "#2a9d8f",
           "h2o": "#6a994e", "random": "#7a7f85", "adasnapkv": "#8fd0c7",
           "kvdistill:random": "#e9a6a6", "streaming": "#f4a259"}
SENTENCE = "Its first lamp burned rapeseed oil and could be seen from a distance of sixteen miles"
GREY = "#444444"
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 9,
                     "axes.spines.top": False, "axes.spines.right": False})


def shown(methods, most: int = 8) -> list[str]:
    """The methods of a figure; the full cache and no document are drawn
    apart."""
    return [method for method in COLOURS if method in methods][:most]


def style(method: str) -> dict:
    main = method == "kvdistill"
    return {"color": COLOURS.get(method, GREY), "lw": 2.4 if main else 1.4,
            "ls": "--" if ":" in method else "-", "label": method, "zorder": 3 if main else 2}


def save(fig, path: Path) -> Path:
    fig.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(fig)
    return path


# ------------------------------------------------------- quality against kept fraction

def quality(result: dict, task: str, path: Path) -> Path:
    """A panel with the first metric of a task; fidelity has a second one for
    the kind squad."""
    cells = [cell for cell in result["cells"] if cell["task"] == task]
    kinds = ["all"]
    if task == "fidelity" and any(cell["kind"] == "squad" for cell in cells):
        kinds.append("squad")
    fig, axes = plt.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 4.2), squeeze=False,
                             layout="constrained")
    for ax, kind in zip(axes[0], kinds):
        panel(ax, task, kind, [cell for cell in cells if cell["kind"] == kind])
    fig.legend(*axes[0][0].get_legend_handles_labels(), frameon=False,
               loc="outside lower center", ncol=2 * len(kinds))
    fig.suptitle(f"{result['model']}, {result['settings']['dtype']}; bars: 95 % intervals",
                 fontsize=9)
    return save(fig, path)


def panel(ax, task: str, kind: str, cells: list[dict]) -> None:
    """A curve per method. KL is on a logarithmic axis, where the full cache, 0,
    has no place."""
    metric = next(iter(METRICS[task]))
    methods = shown({cell["method"] for cell in cells})
    for name, method in (("full cache", "full"), ("no document", "none")):
        level = next((cell["mean"][metric] for cell in cells if cell["method"] == method), 0)
        if level:
            level_line(ax, name, level)
    if "chance" in METRICS[task]:
        level_line(ax, "chance", cells[0]["mean"]["chance"])

    for i, method in enumerate(methods):
        mine = sorted((c for c in cells if c["method"] == method), key=lambda c: c["keep"])
        shift = 1.012 ** (i - len(methods) / 2)  # so that bars do not overlap
        x = [cell["keep"] * shift for cell in mine]
        y = np.array([cell["mean"][metric] for cell in mine])
        ends = [cell["ci95"][metric] if cell["units"] >= MIN_UNITS else [mean, mean]
                for cell, mean in zip(mine, y)]
        bars = abs(np.array(ends).reshape(-1, 2).T - y)
        ax.errorbar(x, y, yerr=bars, marker="o", ms=3.5, capsize=2, elinewidth=0.8, **style(method))

    if task == "fidelity":
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    full = next((c["cache_bytes"] for c in cells if c["method"] == "full"), None)
    ticks = {c["keep"]: c["cache_bytes"] for c in cells if 0 < c["keep"] < 1}
    labels = [f"{keep:g}\n({full / size:.1f}×)" if full else f"{keep:g}"
              for keep, size in ticks.items()]
    ax.set_xscale("log")
    ax.set_xticks(list(ticks), labels)
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if ticks:
        ax.set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)
    ax.set_xlabel("kept fraction (times fewer bytes, as stored)")
    ax.set_ylabel(UNITS[metric].replace(", ", "\n", 1))
    what = {"all": "all kinds of questions", "squad": "SQuAD's questions, never trained on"}
    ax.set_title((f"{what[kind]}\n" if task == "fidelity" else "") + f"{cells[0]['n']} answers, "
                 f"{cells[0]['contexts']} documents of {cells[0]['N']:.0f} tokens")


def level_line(ax, name: str, level: float) -> None:
    ax.axhline(level, color=GREY, lw=1, ls=(0, (1, 2)))
    ax.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=8)


# ----------------------------------------------------------------- needles, and cost

def needles(result: dict, path: Path) -> Path:
    """The share of single needles found: depth against length, a panel per
    method and keep."""
    cells = [c for c in result["cells"] if c["task"] == "niah" and c["kind"].count("/") == 2
             and c["kind"].startswith("single/")]
    found = {(c["method"], c["keep"], c["kind"]): c["mean"]["match"] for c in cells}
    lengths = sorted({c["kind"].split("/")[1] for c in cells}, key=int)
    depths = sorted({c["kind"].split("/")[2] for c in cells}, key=float)
    keeps = sorted({c["keep"] for c in cells if 0 < c["keep"] < 1}, reverse=True) or [1.0]
    methods = ["full", *shown({c["method"] for c in cells}, 7)]
    size = (1.3 * len(methods) + 0.4, 1.7 * len(keeps) + 0.6)
    fig, axes = plt.subplots(len(keeps), len(methods), figsize=size, squeeze=False, sharex=True,
                             sharey=True, layout="constrained")
    for keep, row in zip(keeps, axes):
        for ax, method in zip(row, methods):
            kept = 1.0 if method == "full" else keep
            grid = [[found.get((method, kept, f"single/{length}/{depth}"), np.nan)
                     for length in lengths] for depth in depths]
            ax.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            ax.set_title(method)
            ax.set_xticks(range(len(lengths)), lengths, rotation=90)
            ax.set_yticks(range(len(depths)), [f"{float(depth):.0%}" for depth in depths])
        row[0].set_ylabel(f"keep {keep:g}\ndepth")
    axes[-1][0].set_xlabel("tokens")
    fig.suptitle(f"{result['model']}; needles found: red none, green all; "
                 f"n = {cells[0]['n']} a field", fontsize=9)
    return save(fig, path)


def cost(result: dict, path: Path) -> Path:
    """Bytes, seconds, rate and break-even against length, at the smallest kept
    fraction."""
    rows = cost_rows(result)
    keep = min((row["keep"] for row in rows if 0 < row["keep"] < 1), default=1.0)
    titles = {"bytes": "bytes of the cache", "ratio": "(prefill + compression) / prefill",
              "tokens_per_s_8": "tokens per second, batch 8",
              "break_even": "questions until compressing has paid"}
    fig, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for ax, (key, title) in zip(axes.flat, titles.items()):
        for method in ("full", *shown({row["method"] for row in rows}, 7)):
            mine = [row for row in rows if row["method"] == method and row["keep"] in (keep, 1)
                    and row[key] is not None]
            if key != "break_even" or method != "full":
                x, y = [row["length"] for row in mine], [row[key] for row in mine]
                ax.plot(x, y, marker="o", ms=3, **style(method))
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        if key == "bytes":
            ax.set_yscale("log")
        elif key == "break_even":
            ax.set_yscale("symlog", linthresh=1)  # 0 is a value
        else:
            ax.set_ylim(bottom=0)
        ax.set(title=title, xlabel="context, tokens")
    fig.legend(*axes[0][0].get_legend_handles_labels(), frameon=False,
               loc="outside lower center", ncol=4)
    fig.suptitle(f"{result['model']}, {result['settings']['dtype']}, threads: "
                 f"{result['threads']}; keep {keep:g}", fontsize=9)
    return save(fig, path)


# ------------------------------------------------------------------ what heads keep

def budget_shares(compressor, model, cases, keep: float):
    """How much each head keeps of each document; an equal share is 1.
    (documents, L, G)."""
    rows = []
    for case in cases:
        tokens = torch.tensor([case.context], device=model.device)
        protect = torch.arange(tokens.shape[1], device=model.device)[None] < case.n_protect
        ctx = compressor.read(model, tokens, protect=protect)
        k = kept_count(ctx.compressible.sum(1), keep)
        scores = compressor.scorer(ctx.h, ctx.lengths)
        kept = compressor.select(scores, ctx, k, registers=True).kept          # (1, L, G, N)
        rows.append(kept[0].sum(-1).cpu() / int(k))
    return torch.stack(rows).numpy()


@torch.no_grad()
def head_map(compressor, model, cases, path: Path, keeps=(0.25, 0.05)) -> Path:
    """The part of a document that each head keeps; prints which heads hold the
    most."""
    if compressor.cfg.selection != "head":
        raise BadInput("--heads: with this adapter all heads keep the same tokens")
    G = model.cfg.n_kv_head
    fig, axes = plt.subplots(len(keeps), 1, figsize=(9, len(keeps) * (0.7 + 0.28 * G)),
                             sharex=True, layout="constrained")
    for keep, ax in zip(keeps, axes):
        shares = budget_shares(compressor, model, cases, keep)
        mean = shares.mean(0)                                                  # (L, G)
        largest = np.argsort(-mean, axis=None)[:max(1, mean.size // 10)]
        part = mean.flat[largest].sum() / mean.sum()
        names = ", ".join(f"{i // G + 1}.{i % G + 1}" for i in largest)
        print(f"keep {keep:g}: {len(largest)} of {mean.size} heads hold {part:.0%} of the budget: "
              f"{names} (layer.head)\n    standard deviation of a head's share, in equal shares: "
              f"{shares.std(0).mean():.2f} between {len(cases)} documents, {mean.std():.2f} "
              "between heads")
        image = ax.imshow(mean.T * keep, vmin=0, vmax=1, aspect="auto")
        ax.set(title=f"keep {keep:g}, mean over {len(cases)} documents", ylabel="head")
        ax.set_xticks(range(0, len(mean), 3), range(1, len(mean) + 1, 3))
        ax.set_yticks(range(G), range(1, G + 1))
    axes[-1].set_xlabel("layer")
    fig.colorbar(image, ax=axes, label="part of the document\nthat a head keeps", format="{x:.0%}")
    return save(fig, path)


# ------------------------------------------------------------------ the scorer's targets

def two_targets(model, tokenizer, text: str):
    """What a scorer learns about a text, as measured: its ids, and log(attention)
    and log(effect), (1, L, G, N) each."""
    ids = tokenizer.document(text)
    tokens = torch.tensor([tokenizer.header + ids], device=model.device)
    repeat = tokenizer.encode(REPEAT, joined=True) + tokenizer.turn + ids
    replay = torch.tensor([repeat], device=model.device)
    full = model.prefill(tokens)
    measured = attention_and_effect(model, full, replay, torch.zeros_like(replay))
    first = len(tokenizer.header)
    return ids, *[x[..., first:].clamp(min=1e-6).log() for x in measured]


def targets_map(model, tokenizer, text: str, sentence: str, path: Path, keep=0.1) -> Path:
    """How many heads keep each token of a sentence, by the attention alone and by
    both targets. Prints the tokens about which they disagree most."""
    ids, attention, effect = two_targets(model, tokenizer, text)
    compressible = torch.ones(1, len(ids), dtype=torch.bool)
    k = kept_count(compressible.sum(1), keep)
    counts = []
    for scores in (attention, attention + effect):
        forced = last_tokens(compressible, min(4, int(k) // 8))[:, None, None]
        kept = select(scores, compressible, k, forced).kept
        counts.append(kept[0].sum((0, 1)).numpy())
    before, after = counts

    pieces = [tokenizer.decode([i]) for i in ids]
    start = text.index(sentence)
    ends = np.cumsum([len(piece) for piece in pieces])
    inside = np.flatnonzero((ends > start) & (ends <= start + len(sentence)))
    order = np.argsort(after - before)
    for name, some in (("only attention", order[:8]), ("only both", order[:-9:-1])):
        print(f"{name}:", ", ".join(f"{pieces[i]!r} {before[i]} -> {after[i]}" for i in some))

    fig, ax = plt.subplots(figsize=(9, 2.6), layout="constrained")
    x = np.arange(len(inside))
    ax.bar(x - 0.2, before[inside], 0.4, color=COLOURS["kvzip:recent"], label="attention")
    ax.bar(x + 0.2, after[inside], 0.4, color=COLOURS["kvdistill"],
           label="attention and effect")
    ax.set_xticks(x, [pieces[i].strip() for i in inside], rotation=60, ha="right")
    ax.set_ylabel(f"heads of {attention[0, ..., 0].numel()}")
    ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return save(fig, path)


# ------------------------------------------------------------------------ the program

def draw(result: dict, out: Path) -> list[Path]:
    """Draw a figure for each task of a result, as PNG files beside `out`."""
    paths = []
    for task in dict.fromkeys(cell["task"] for cell in result["cells"]):
        prefix = out.stem if out.stem == task else f"{out.stem}-{task}"
        if task == "niah":
            paths.append(needles(result, out.with_name(f"{prefix}-needles.png")))
        elif task == "cost":
            paths.append(cost(result, out.with_name(f"{prefix}-cost.png")))
        elif task != "ends":  # a few numbers, which the table shows
            paths.append(quality(result, task, out.with_name(f"{prefix}-quality.png")))
    return paths


def main() -> None:
    p = Parser(description="Draw the figures of results, or of an adapter's heads.")
    p.add_argument("results", nargs="*", metavar="FILE", help="results of eval.py; default: "
                   "those in results/")
    p.add_argument("--heads", metavar="ADAPTER", help="draw results/heads.png of this adapter")
    p.add_argument("--targets", action="store_true", help="draw results/targets.png")
    p.add_argument("--documents", type=int, default=20, help="held-out documents for --heads; "
                   "default 20")
    add_model_flags(p)
    args = p.parse_args()
    if args.heads is not None:
        model, tokenizer = open_model(args)
        compressor = load_adapter(args.heads, model, tokenizer)
        cases = fidelity(tokenizer, args.documents, 0)[:args.documents]
        print(head_map(compressor, model, cases, RESULTS / "heads.png"))
        return

    if args.targets:
        model, tokenizer = open_model(args)
        text = DEMO.read_text(encoding="utf-8").strip()
        print(targets_map(model, tokenizer, text, SENTENCE, RESULTS / "targets.png"))
        return

    standard = [RESULTS / f"{name}.json" for name in FIGURES]
    for path in map(Path, args.results or [path for path in standard if path.exists()]):
        with reading(path, "make it again with eval.py"):
            for figure in draw(read_json(path), path):
                print(figure)


if __name__ == "__main__":
    run_program(main)
