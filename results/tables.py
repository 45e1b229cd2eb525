"""Rewrite README's tables from results/*.json:  python results/tables.py"""
import math
import re
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run.errors import read_json, reading, run_program  # noqa: E402

KINDS = ("recite", "cloze", "title", "squad", "continue")
SEES = {"question": "question (sees the question)"}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(name: str) -> dict:
    return read_json(ROOT / "results" / f"{name}.json")


def source(result: dict, name: str) -> str:
    """Where a table comes from, as README says it under the table."""
    threads, minutes, processes = result["threads"], result["seconds"] / 60, result.get("processes", 1)
    each = f"{processes} processes of " if processes != 1 else ""
    return (f"`results/{name}.json`: {result['settings']['dtype']}, {each}{threads} thread{'s' * (threads != 1)}, "
            f"{minutes:.0f} minutes, commit {result['commit']}: `{result['command']}`")


class Cells:
    """Look cells up by method and nominal kept fraction; the full cache and no document have one each."""

    def __init__(self, result: dict, task: str):
        mine = [c for c in result["cells"] if c["task"] == task]
        self.at = {(c["kind"], c["method"], c["keep"]): c for c in mine}
        self.methods = list(dict.fromkeys(c["method"] for c in mine))
        own = {m: {c["keep"] for c in mine if c["method"] == m} for m in self.methods if m not in ("full", "none")}
        # those that every method was asked at; what only some were stands in the figures alone
        self.keeps = sorted(set.intersection(*own.values()) if own else (), reverse=True)

    def __call__(self, kind: str, method: str, keep: float) -> dict:
        return self.at[kind, method, {"full": 1.0, "none": 0.0}.get(method, keep)]

    def text(self, kind, method, keep, metric, lowest=None, interval=False, form="{:.2f}") -> str:
        """A mean, in bold where it is its column's best. Ceiling, floor and what sees the question do not compete."""
        c = self(kind, method, keep)
        out = form.format(c["mean"][metric])
        rivals = [self(kind, m, keep)["mean"][metric] for m in self.methods if m not in ("full", "none", "question")]
        if lowest is not None and method not in ("full", "none", "question"):
            if c["mean"][metric] == (min if lowest else max)(rivals):
                out = f"**{out}**"
        if interval:
            low, high = c["ci95"][metric]
            out += f" ({form.format(low)}–{form.format(high)})"
        return out


def paired(cell: dict, metric: str, form: str = "{:+.2f}") -> str:
    """The paired difference to another method with its interval; nothing in that method's own row."""
    d = cell.get("difference")
    if not d or cell["method"] == d["against"]:
        return ""
    low, high = d["ci95"][metric]
    return f"{form.format(d['mean'][metric])} ({form.format(low)} to {form.format(high)})"


def fidelity_table(result: dict, name: str = "fidelity") -> str:
    """KL by kind and over all kinds, top-1 agreement, and the paired difference to kvdistill: a table per keep."""
    cells, parts = Cells(result, "fidelity"), []
    for keep in cells.keeps:
        rows = []
        for m in cells.methods:
            c = cells("all", m, keep)
            rows.append([SEES.get(m, m)] + [cells.text(k, m, keep, "kl", lowest=True) for k in KINDS]
                        + [cells.text("all", m, keep, "kl", lowest=True, interval=True), f"{c['mean']['agree']:.0%}",
                           paired(c, "kl"), paired(cells("squad", m, keep), "kl")])
        k = cells("all", "kvdistill", keep)["K"]
        parts.append(markdown([f"keep {keep:g}: KL, nats per token", *KINDS, "all kinds (95 %)", "top-1 agreement",
                               "minus kvdistill, paired: all kinds", "squad"], rows)
                     + f"\n\nK = {k:.0f} of N = {cells('all', 'full', keep)['N']:.0f} tokens on average.")
    n = ", ".join(f"{k} {c['n']} answers to {c['contexts']} documents of {c['units']} units"
                  for k in (*KINDS, "all") for c in [cells(k, "full", 1)])
    return "\n\n".join([*parts, "Documents: encyclopedia lead sections and annual messages to Congress that training "
                        f"held out, and SQuAD's; n: {n}. From {source(result, name)}"])


def gap(cells: Cells, method: str, keep: float, metric: str) -> str:
    """(ours − none) / (full − none)."""
    floor, ceiling = (cells("all", m, keep)["mean"][metric] for m in ("none", "full"))
    return f"{(cells('all', method, keep)['mean'][metric] - floor) / (ceiling - floor):.0%}"


def squad_table(result: dict, name: str = "squad") -> str:
    """F1, exact match and contained answers, and the share of the gap between no document and the full cache: a table
    per keep."""
    cells, parts = Cells(result, "squad"), []
    c, pack = cells("all", "full", 1), result["settings"]["tasks"]["squad"]["pack"]
    for keep in cells.keeps:
        rows = [[SEES.get(m, m), cells.text("all", m, keep, "f1", lowest=False, interval=True, form="{:.3f}"),
                 gap(cells, m, keep, "f1"), paired(cells("all", m, keep), "f1", "{:+.3f}"),
                 cells.text("all", m, keep, "em", form="{:.3f}"), cells.text("all", m, keep, "contains", form="{:.3f}")]
                for m in cells.methods]
        parts.append(markdown([f"SQuAD, keep {keep:g}", "F1 (95 %)", "share of the gap", "F1 minus kvdistill, paired",
                               "exact match", "answer contained"], rows)
                     + f"\n\nK = {cells('all', 'kvdistill', keep)['K']:.0f} of N = {c['N']:.0f} tokens on average.")
    return "\n\n".join([*parts, f"{c['n']} questions about {c['contexts']} documents of {pack} paragraphs. "
                        f"From {source(result, name)}"])


def niah_table(result: dict, name: str = "niah") -> str:
    """Share of values found, by length for one needle, and for four."""
    cells = Cells(result, "niah")
    lengths = sorted({int(k.split("/")[1]) for k, _, _ in cells.at if k.startswith("single/")})
    kinds = [*(f"single/{x}" for x in lengths), "single", "multi"]
    head = ["values found"] + [f"{k.replace('single/', '')} · {keep:g}" for keep in cells.keeps for k in kinds]
    rows = [[SEES.get(m, m)] + [cells.text(k, m, keep, "match", lowest=False, interval=k in ("single", "multi"))
                                for keep in cells.keeps for k in kinds] for m in cells.methods]
    one, four = cells(kinds[0], "full", 1), cells("multi", "full", 1)
    return (f"{markdown(head, rows)}\n\nColumns: length in tokens (one needle), *single* (those together, 95 %) or "
            f"*multi* (four needles, all lengths, 95 %), and keep; K is N times keep; n = {one['n']} per length, "
            f"{four['n']} for multi. From {source(result, name)}")


def cost_table(result: dict, name: str = "cost") -> str:
    from results.plots import cost_rows
    rows = []
    for r in cost_rows(result):
        pays = "never" if r["break_even"] is None else str(math.ceil(r["break_even"]))
        rows.append([str(r["length"]), SEES.get(r["method"], r["method"]),
                     "–" if r["bytes"] is None else f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.1f}",
                     f"{r['ratio']:.2f}", f"{r['tokens_per_s']:.1f}", f"{r['tokens_per_s_8']:.1f}",
                     "–" if r["method"] in ("full", "none", "question") else pays])
    keep, = {r["keep"] for r in cost_rows(result) if 0 < r["keep"] < 1}
    n = result["settings"]["tasks"]["cost"]["n"]
    sizes = {(round(c["N"]), round(c["K"])) for c in result["cells"] if 0 < c["keep"] < 1 and c["kind"] != "all"}
    sizes = ", ".join(f"{k} of {length}" for length, k in sorted(sizes))
    return markdown(["tokens", f"method, keep {keep:g}", "MB", "seconds", "(prefill + compression) / prefill",
                     "tokens/s, batch 1", "tokens/s, batch 8", "pays after … questions"], rows) + (
        f"\n\nK = {sizes}. MB: the header's 24 tokens included, and positions, of which a cache with another choice in "
        f"each head holds more. Seconds: prefill and compression, median of {n}. Tokens per second, and what a question "
        "of one short answer saves, are means over the caches of one size: their work is the same. Ratios within a few "
        "hundredths of 1 are noise. H2O's second reading of the document, an ease of ours, is left out. "
        f"From {source(result, name)}")


TABLES = {"fidelity": fidelity_table, "squad": squad_table, "squad-all": squad_table, "niah": niah_table,
          "cost": cost_table}


def made(name: str) -> str:
    with reading(ROOT / "results" / f"{name}.json", "make it again with eval.py"):
        return TABLES[name](load(name), name)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name in TABLES:
        table, block = made(name), rf"(<!-- table: {name} -->\n).*?\n?(<!-- end -->)"
        text, n = re.subn(block, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
        assert n == 1, f"README.md needs one '<!-- table: {name} -->' … '<!-- end -->'"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
