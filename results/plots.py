"""Draw the figures of results/*.json (needs matplotlib):

    python results/plots.py                      # of every result that is there, results/*.png
    python results/plots.py --heads ADAPTER      # results/heads.png: which heads hold how much

`eval.py --plot --out FILE.json` draws the same for one result.
"""
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

try:
    import matplotlib
except ImportError:
    print("plots.py: error: matplotlib is not installed: pip install matplotlib", file=sys.stderr)
    sys.exit(2)
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compress import kept_count, open_compressor  # noqa: E402
from data.tasks import METRICS, fidelity  # noqa: E402
from run.errors import BadInput, Parser, read_json, reading, run_program  # noqa: E402
from run.models import add_model_flags, open_model  # noqa: E402

NAMES = {"kl": "KL to the full cache, nats per token", "f1": "SQuAD F1", "match": "values found", "rougeL": "ROUGE-L F",
         "accuracy": "accuracy"}
# the most important first: a figure shows the first eight of its methods, the tables all
COLOURS = {"kvdistill": "#c1121f", "no-routing": "#e07a7a", "kvzip": "#1d4e89", "kvzip:equal": "#6fa8dc",
           "adasnapkv": "#2a9d8f", "snapkv": "#8fd0c7", "h2o": "#6a994e", "random": "#7a7f85",
           "kvdistill:random": "#e9a6a6", "streaming": "#f4a259", "random:token": "#b9bec4", "tova": "#a7c957",
           "knorm": "#8d99ae", "truncate": "#9c6644", "question": "#000000", "kvdistill:kvzip": "#7b9cc4",
           "untrained": "#d4b996"}
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 9, "axes.spines.top": False,
                     "axes.spines.right": False})


def style(method: str) -> dict:
    return {"color": COLOURS.get(method, "#7b2cbf"), "lw": 2.4 if method == "kvdistill" else 1.4,
            "ls": ":" if method == "question" else "--" if ":" in method else "-",
            "label": "question (sees the question)" if method == "question" else method,
            "zorder": 3 if method == "kvdistill" else 2}


def chosen(methods, most: int = 8) -> list[str]:
    """At most so many of the methods, in the order of COLOURS; full and none are not among them."""
    order = [*COLOURS, *methods]
    return sorted(set(methods) - {"full", "none"}, key=order.index)[:most]


def save(fig, path: Path) -> Path:
    fig.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(fig)
    return path


def quality(result: dict, task: str, path: Path) -> Path:
    """Headline metric against kept fraction, with intervals; the full cache as ceiling, no document as floor. Fidelity
    has a second panel: the kind that training never saw."""
    cells = [c for c in result["cells"] if c["task"] == task]
    kinds = [k for k in ("all", "squad") if k == "all" or task == "fidelity" and any(c["kind"] == k for c in cells)]
    fig, axes = plt.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 4), squeeze=False, layout="constrained")
    for ax, kind in zip(axes[0], kinds):
        panel(ax, task, [c for c in cells if c["kind"] == kind])
    fig.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncol=2 * len(kinds))
    fig.suptitle(f"{result['model']}, {result['settings']['dtype']}; bars: 95 % intervals", fontsize=9)
    return save(fig, path)


def panel(ax, task: str, cells: list[dict]) -> None:
    """One kind's curves, a point per kept fraction; KL on a logarithmic axis, where the full cache, 0, has no place."""
    metric, some, methods = next(iter(METRICS[task])), cells[0], chosen(dict.fromkeys(c["method"] for c in cells))
    if task == "fidelity":
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    for name, method in (("full cache", "full"), ("no document", "none")):
        level = next((c["mean"][metric] for c in cells if c["method"] == method), 0)
        if level or task != "fidelity":
            ax.axhline(level, color="#444444", lw=1, ls=(0, (1, 2)))
            ax.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    for i, method in enumerate(methods):
        mine = sorted((c for c in cells if c["method"] == method), key=lambda c: c["keep"])
        y = np.array([c["mean"][metric] for c in mine])
        low, high = (np.array([(c["ci95"][metric] or [v, v])[i] for c, v in zip(mine, y)]) for i in (0, 1))
        shift = 1.012 ** (i - len(methods) / 2)  # so that bars do not overlap
        ax.errorbar([c["keep"] * shift for c in mine], y, yerr=[y - low, high - y], marker="o", ms=3.5, capsize=2,
                    elinewidth=0.8, **style(method))
    if "chance" in METRICS[task]:
        ax.axhline(some["mean"]["chance"], color="#444444", lw=0.8)
        ax.annotate("chance", (0, some["mean"]["chance"]), xycoords=("axes fraction", "data"), fontsize=8,
                    xytext=(4, 3), textcoords="offset points")
    keeps = sorted({c["keep"] for c in cells if 0 < c["keep"] < 1})
    ax.set_xscale("log")
    if keeps:
        ax.set_xlim(keeps[0] / 1.3, keeps[-1] * 1.3)
    ax.set_xticks(keeps, [f"{k:g}\n({1 / k:g}×)" for k in keeps])
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.set_xlabel("kept fraction (compression)")
    ax.set_ylabel(NAMES.get(metric, metric))
    kind = "" if task != "fidelity" else "all kinds: " if some["kind"] == "all" else "SQuAD, never trained on: "
    ax.set_title(f"{kind}{some['n']} answers, {some['contexts']} documents\nof {some['N']:.0f} tokens")


def needles(result: dict, path: Path) -> Path:
    """Share of single needles found: depth against length, a panel per method, a row of panels per keep."""
    cells = [c for c in result["cells"] if c["task"] == "niah" and c["kind"].startswith("single/")
             and c["kind"].count("/") == 2]
    at = {(c["method"], c["keep"], c["kind"]): c["mean"]["match"] for c in cells}
    lengths = sorted({int(c["kind"].split("/")[1]) for c in cells})
    depths = sorted({float(c["kind"].split("/")[2]) for c in cells})
    methods = ["full", *chosen(dict.fromkeys(c["method"] for c in cells), 7)]
    keeps = sorted({c["keep"] for c in cells if 0 < c["keep"] < 1}, reverse=True) or [1.0]
    fig, axes = plt.subplots(len(keeps), len(methods), figsize=(1.2 * len(methods) + 0.4, 1.7 * len(keeps) + 0.6),
                             squeeze=False, sharex=True, sharey=True, layout="constrained")
    for keep, line in zip(keeps, axes):
        for ax, m in zip(line, methods):
            grid = [[at.get((m, 1.0 if m == "full" else keep, f"single/{x}/{d}"), np.nan) for x in lengths]
                    for d in depths]
            ax.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            ax.set_title(m)
            ax.set_xticks(range(len(lengths)), lengths, rotation=90)
            ax.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        line[0].set_ylabel(f"keep {keep:g}\ndepth")
    axes[-1][0].set_xlabel("tokens")
    fig.suptitle(f"{result['model']}; needle found: red 0, green 1; n = {cells[0]['n']} a field", fontsize=9)
    return save(fig, path)


def cost_rows(result: dict) -> list[dict]:
    """Per length and method: bytes, (prefill + compression) / plain prefill, rates, and the break-even: after how many
    questions of one short answer each compressing has paid (None: never).

    Each method's own: caches with as many tokens need not have as much work to do, for heads differ. H2O's second
    reading of the document is left out (see `eval.h2o`). `question` compresses for one question only and keeps the full
    cache: it has no bytes and no break-even.
    """
    cells = {(int(c["kind"]), c["method"], c["keep"]): c for c in result["cells"]
             if c["task"] == "cost" and c["kind"] != "all"}
    if not any(method == "full" for _, method, _ in cells):
        raise BadInput("cost is drawn against the method full; measure it too")
    rows = []
    for (length, method, keep), c in sorted(cells.items(), key=lambda x: x[0][0]):
        full, once, mean = cells[length, "full", 1.0], method == "question", c["mean"]
        spent, plain = c["seconds"]["prefill"] + c["seconds"]["compress"], full["seconds"]["prefill"]
        spent -= full["seconds"]["prefill"] if method == "h2o" else 0
        gain = full["mean"]["question_s"] - mean["question_s"]
        rows.append({"length": length, "method": method, "keep": keep, "bytes": None if once else c["cache_bytes"],
                     "seconds": spent, "ratio": spent / plain, "tokens_per_s": mean["tokens_per_s"],
                     "tokens_per_s_8": mean["tokens_per_s_8"],
                     "break_even": max(0.0, (spent - plain) / gain) if gain > 0 and not once else None})
    return rows


def cost(result: dict, path: Path) -> Path:
    """Bytes, time to a cache, decoding speed and break-even against context length, at the smallest kept fraction."""
    rows = cost_rows(result)
    keep = min((r["keep"] for r in rows if 0 < r["keep"] < 1), default=1.0)
    methods = ["full", *chosen([r["method"] for r in rows], 7)]
    fig, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for key, ax, title in zip(("bytes", "ratio", "tokens_per_s_8", "break_even"), axes.flat, (
            "megabytes of the cache", "(prefill + compression) / prefill", "tokens per second, batch 8",
            "questions until compressing paid")):
        for method in methods:
            mine = [r for r in rows if r["method"] == method and r["keep"] in (keep, 1) and r[key] is not None]
            if mine and not (key == "break_even" and method == "full"):
                look = style(method) | ({"color": "#444444", "ls": "--"} if method == "full" else {})
                values = [r[key] / (1e6 if key == "bytes" else 1) for r in mine]
                ax.plot([r["length"] for r in mine], values, marker="o", ms=3, **look)
        ax.set_xscale("log", base=2)
        if key == "break_even":
            ax.set_yscale("symlog", linthresh=1)  # 0 is a value: compressing was no slower than reading
            ax.set_ylim(-0.2, max(2, ax.get_ylim()[1]))
        elif key == "bytes":
            ax.set_yscale("log")
            ax.yaxis.set_minor_formatter("")
        else:
            ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(title)
        ax.set_xlabel("context, tokens")
    lines = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    fig.legend(lines.values(), lines.keys(), frameon=False, loc="outside lower center", ncol=4)
    fig.suptitle(f"{result['model']}, {result['settings']['dtype']}, threads: {result['threads']}; keep {keep:g}",
                 fontsize=9)
    return save(fig, path)


def budget_shares(comp, model, cases, keep: float):
    """How many entries each head keeps of each document, an equal share being 1: (documents, L, G)."""
    rows = []
    for case in cases:
        tokens = torch.tensor([case.context], device=model.device)
        protect = torch.arange(tokens.shape[1], device=model.device)[None] < case.n_protect
        ctx = comp.read(model, tokens, protect=protect)
        k = kept_count(ctx.candidates.sum(1), keep)
        rows.append(comp.choose(comp.scores(ctx), ctx, k).kept[0].sum(-1).cpu() / int(k))
    return torch.stack(rows).numpy()


@torch.no_grad()
def head_map(comp, model, cases, path: Path, keeps=(0.25, 0.05)) -> Path:
    """How much of a document each head keeps (its share of the budget, times keep), heads against layers, mean over
    the documents; says which heads hold most, and how much shares depend on the document."""
    if comp.cfg.choice != "head":
        raise BadInput("--heads: under this adapter all heads keep the same tokens; it was trained with --choice token")
    G = model.cfg.n_kv_head
    fig, axes = plt.subplots(len(keeps), 1, figsize=(9, len(keeps) * (0.7 + 0.28 * G)), sharex=True,
                             layout="constrained")
    for keep, ax in zip(keeps, axes):
        shares = budget_shares(comp, model, cases, keep)
        mean, vary = shares.mean(0), shares.std(0)
        most = np.argsort(-mean, axis=None)[:max(1, mean.size // 10)]
        print(f"keep {keep:g}: {len(most)} of {mean.size} heads hold {mean.flat[most].sum() / mean.sum():.0%} of the "
              f"budget: " + ", ".join(f"{i // G + 1}.{i % G + 1}" for i in most) + " (layer.head)")
        print(f"    between {len(cases)} documents a head's share varies by {vary.mean():.2f} of an equal share, these "
              f"heads' by {vary.flat[most].mean():.2f}; between heads by {mean.std():.2f} (standard deviations)")
        image = ax.imshow(mean.T * keep, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        ax.set(title=f"keep {keep:g} ({1 / keep:g}×), mean over {len(cases)} documents", ylabel="head")
        for axis, size, each in ((ax.xaxis, len(mean), 3), (ax.yaxis, G, 1)):
            axis.set_ticks(range(0, size, each), range(1, size + 1, each))
    axes[-1].set_xlabel("layer")
    fig.colorbar(image, ax=axes, label="part of the document\nthat a head keeps", format="{x:.0%}",
                 ticks=[0, 0.25, 0.5, 0.75, 1])
    return save(fig, path)


def draw(result: dict, out: Path) -> list[Path]:
    """All figures that a result has cells for, as PNG files beside `out`."""
    made = []
    for task in dict.fromkeys(c["task"] for c in result["cells"]):
        where = {"niah": "needles", "cost": "cost"}.get(task, "quality")
        path = Path(out).with_name(f"{Path(out).stem}-{where}.png" if len(made) == 0 or where != "quality" else
                                   f"{Path(out).stem}-{task}-{where}.png")
        made.append({"niah": lambda: needles(result, path), "cost": lambda: cost(result, path)}.get(
            task, lambda: quality(result, task, path))())
    return made


def main() -> None:
    p = Parser(description="Draw the figures of results/*.json, or of an adapter's heads.")
    p.add_argument("--heads", metavar="ADAPTER", help="draw results/heads.png from this adapter and held-out documents")
    p.add_argument("--documents", type=int, default=20, help="held-out documents for --heads; default 20")
    add_model_flags(p)
    a = p.parse_args()
    if a.heads is not None:
        model, tokenizer = open_model(a)
        comp, _ = open_compressor(a.heads, model, tokenizer)
        cases = fidelity(tokenizer, a.documents, 0)[:a.documents]
        return print(head_map(comp, model, cases, ROOT / "results" / "heads.png"))
    for name in ("fidelity", "squad", "niah", "cost"):
        path = ROOT / "results" / f"{name}.json"
        if path.exists():
            with reading(path, "make it again with eval.py"):
                for made in draw(read_json(path), path):
                    print(made)


if __name__ == "__main__":
    run_program(main)
