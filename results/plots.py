"""Draw the figures of results/*.json (needs matplotlib):

    python results/plots.py          # README's figures, results/*.png

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

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run.errors import BadInput, read_json, reading, run_program  # noqa: E402
from data.tasks import METRICS  # noqa: E402

NAMES = {"kl": "KL to the full cache, nats per token", "f1": "SQuAD F1", "match": "values found", "rougeL": "ROUGE-L F",
         "accuracy": "accuracy"}
COLOURS = {"kvdistill": "#c1121f", "kvdistill:random": "#e9a6a6", "no-routing": "#b5838d", "kvzip": "#1d4e89",
           "snapkv": "#3a86c8", "h2o": "#6a994e", "tova": "#a7c957", "streaming": "#f4a259", "knorm": "#8d99ae",
           "random": "#adb5bd", "truncate": "#9c6644", "question": "#000000", "kvdistill:kvzip": "#7b9cc4",
           "untrained": "#d4b996"}


def style(method: str) -> dict:
    return {"color": COLOURS.get(method, "#7b2cbf"), "lw": 2.4 if method == "kvdistill" else 1.2,
            "ls": ":" if method == "question" else "--" if method.startswith("kvdistill:") else "-",
            "label": "question (sees the question)" if method == "question" else method,
            "zorder": 3 if method == "kvdistill" else 2}


def save(fig, path: Path) -> Path:
    fig.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(fig)
    return path


def quality(result: dict, task: str, path: Path) -> Path:
    """Headline metric against kept fraction, with intervals; the full cache as ceiling, no document as floor. Fidelity
    has a second panel: the kind that training never saw."""
    cells = [c for c in result["cells"] if c["task"] == task]
    kinds = [k for k in ("all", "squad") if k == "all" or task == "fidelity" and any(c["kind"] == k for c in cells)]
    fig, axes = plt.subplots(1, len(kinds), figsize=(6.4 * len(kinds), 4.2), squeeze=False)
    fig.subplots_adjust(wspace=0.32)
    for ax, kind in zip(axes[0], kinds):
        panel(ax, task, [c for c in cells if c["kind"] == kind])
    axes[0][-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.2, 0.5))
    fig.suptitle(f"{result['model']}, {result['settings']['dtype']}; bars: 95 % bootstrap over documents", fontsize=7)
    return save(fig, path)


def panel(ax, task: str, cells: list[dict]) -> None:
    """One kind's curves, a point per kept fraction."""
    metric, some = next(iter(METRICS[task])), cells[0]
    for method in dict.fromkeys(c["method"] for c in cells):
        mine = sorted((c for c in cells if c["method"] == method), key=lambda c: c["keep"])
        if method in ("full", "none"):
            name = {"full": "full cache", "none": "no document"}[method]
            ax.axhline(mine[0]["mean"][metric], color="#444444", lw=1, ls=(0, (1, 2)))
            ax.annotate(name, (1, mine[0]["mean"][metric]), xycoords=("axes fraction", "data"), va="center", fontsize=8,
                        xytext=(4, 0), textcoords="offset points")
            continue
        y = np.array([c["mean"][metric] for c in mine])
        low, high = (np.array([(c["ci95"][metric] or [v, v])[i] for c, v in zip(mine, y)]) for i in (0, 1))
        shift = 1.008 ** (list(COLOURS).index(method) - 6 if method in COLOURS else 7)  # so that bars do not overlap
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
    ax.minorticks_off()
    ax.set_xlabel("kept fraction (compression)")
    ax.set_ylabel(NAMES.get(metric, metric))
    kind = "" if task != "fidelity" else "all kinds: " if some["kind"] == "all" else "squad, never trained on: "
    ax.set_title(f"{kind}{some['n']} answers, {some['contexts']} documents of {some['N']:.0f} tokens", fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def needles(result: dict, path: Path) -> Path:
    """Share of single needles found: depth against length, a panel per method, a row of panels per keep."""
    cells = [c for c in result["cells"] if c["task"] == "niah" and c["kind"].startswith("single/")
             and c["kind"].count("/") == 2]
    at = {(c["method"], c["keep"], c["kind"]): c["mean"]["match"] for c in cells}
    lengths = sorted({int(c["kind"].split("/")[1]) for c in cells})
    depths = sorted({float(c["kind"].split("/")[2]) for c in cells})
    methods = list(dict.fromkeys(c["method"] for c in cells))
    keeps = sorted({c["keep"] for c in cells if 0 < c["keep"] < 1}, reverse=True) or [1.0]
    rows = [(keep, methods[i:i + 8]) for keep in keeps for i in range(0, len(methods), 8)]
    fig, axes = plt.subplots(len(rows), min(8, len(methods)), figsize=(1.4 * min(8, len(methods)) + 1, 1.7 * len(rows)),
                             squeeze=False, sharex=True, sharey=True, layout="constrained")
    for (keep, part), line in zip(rows, axes):
        for ax, m in zip(line, part):
            key = {"full": 1.0, "none": 0.0}.get(m, keep)
            grid = [[at.get((m, key, f"single/{x}/{d}"), np.nan) for x in lengths] for d in depths]
            ax.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            ax.set_title(m, fontsize=8)
            ax.set_xticks(range(len(lengths)), lengths, fontsize=7, rotation=90)
            ax.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
        for ax in line[len(part):]:
            ax.axis("off")
        line[0].set_ylabel(f"keep {keep:g}\ndepth", fontsize=8)
    axes[-1][0].set_xlabel("tokens", fontsize=8)
    fig.suptitle(f"{result['model']}; needle found: red 0, green 1; n = {cells[0]['n']} a field", fontsize=8)
    return save(fig, path)


def cost_rows(result: dict) -> list[dict]:
    """Per length and method: bytes, (prefill + compression) / plain prefill, rates, and the break-even: after how many
    questions of one short answer each compressing has paid (None: never).

    Rates and what a question saves are means over the caches with as many tokens: they have the same work to do. H2O's
    second reading of the document is left out (see `eval.h2o`). `question` compresses for one question only and keeps
    the full cache: it has no bytes and no break-even.
    """
    cells = {(int(c["kind"]), c["method"], c["keep"]): c for c in result["cells"]
             if c["task"] == "cost" and c["kind"] != "all"}
    if not any(method == "full" for _, method, _ in cells):
        raise BadInput("cost is drawn against the method full; measure it too")
    alike = {}
    for (length, _, _), c in cells.items():
        alike.setdefault((length, round(c["K"])), []).append(c["mean"])
    rows = []
    for (length, method, keep), c in sorted(cells.items(), key=lambda x: x[0][0]):
        full, once = cells[length, "full", 1.0], method == "question"
        spent, plain = c["seconds"]["prefill"] + c["seconds"]["compress"], full["seconds"]["prefill"]
        spent -= full["seconds"]["prefill"] if method == "h2o" else 0
        mean = {x: np.mean([m[x] for m in alike[length, round(c["K"])]]) for x in METRICS["cost"]}
        gain = full["mean"]["question_s"] - mean["question_s"]
        rows.append({"length": length, "method": method, "keep": keep, "bytes": None if once else c["cache_bytes"],
                     "seconds": spent, "ratio": spent / plain, "tokens_per_s": mean["tokens_per_s"],
                     "tokens_per_s_8": mean["tokens_per_s_8"],
                     "break_even": max(0.0, (spent - plain) / gain) if gain > 0 and not once else None})
    return rows


def cost(result: dict, path: Path) -> Path:
    """Bytes, time to a cache, decoding speed and break-even against context length. Caches of one size coincide in
    bytes and speed."""
    rows = cost_rows(result)
    fig, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for key, ax, title in zip(("bytes", "ratio", "tokens_per_s_8", "break_even"), axes, (
            "megabytes of the cache", "(prefill + compression) / prefill", "tokens per second, batch 8",
            "questions until compressing paid")):
        for method in dict.fromkeys(r["method"] for r in rows):
            mine = [r for r in rows if r["method"] == method and r[key] is not None]
            if mine and not (key == "break_even" and method in ("full", "none")):
                look = style(method) | ({"color": "#444444", "ls": "--"} if method in ("full", "none") else {})
                values = [r[key] / (1e6 if key == "bytes" else 1) for r in mine]
                ax.plot([r["length"] for r in mine], values, marker="o", ms=3, **look)
        ax.set_xscale("log", base=2)
        if key == "break_even":
            ax.set_yscale("symlog", linthresh=1)  # 0 is a value: compressing was no slower than reading
            ax.set_ylim(bottom=-0.2)
        elif key == "bytes":
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("context, tokens", fontsize=7)
        ax.tick_params(which="both", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    fig.legend(lines.values(), lines.keys(), fontsize=7, frameon=False, loc="outside right center")
    keep = sorted({r["keep"] for r in rows if 0 < r["keep"] < 1})
    fig.suptitle(f"{result['model']}, {result['settings']['dtype']}, {result['threads']} threads; keep "
                 f"{', '.join(f'{k:g}' for k in keep)}", fontsize=7)
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
    for name in ("fidelity", "squad", "niah", "cost"):
        path = ROOT / "results" / f"{name}.json"
        with reading(path, "make it again with eval.py"):
            for made in draw(read_json(path), path):
                print(made)


if __name__ == "__main__":
    run_program(main)
