"""Rewrite the tables from results/*.json:  python results/tables.py

results/README.md has a block `<!-- table: NAME -->` … `<!-- end -->` for each result of eval.py; README.md and the
adapter's card have one, `headline`.
"""
import math
import re
import signal
import sys
import textwrap
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eval import BASELINES  # noqa: E402
from run.errors import BadInput, expect, read_json, reading, run_program, write_atomic  # noqa: E402

RESULTS, CARD = ROOT / "results", ROOT / "adapters" / "smollm2-135m-instruct" / "README.md"
KINDS = ("recite", "cloze", "title", "squad", "continue")
LABELS = {"question": "question (sees the question)", "no-routing": "no-routing: our choice alone"}
MISSING = "Not measured with this version yet."
OURS = ("no-routing", "untrained", "kvdistill")
BUDGETS = {"all": "one for all heads", "layer": "one for each layer", "head": "each head its own",
           "ours": "as the adapter's (one for all heads, unless it was trained with `--choice token`)"}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def number(x: float) -> str:
    return f"{x:.2f}" if abs(x) >= 0.0995 or not x else f"{x:.3f}"


def signed(x: float) -> str:
    return ("+" if x > 0 else "−" if x < 0 else "") + number(abs(x))


def command_lines(command: str) -> str:
    """A result's command as a block; a result that several runs made has several, in one line."""
    lines = [" \\\n    ".join(textwrap.wrap(re.sub(" (?!--)", "\0", part), 112, break_long_words=False,
                                        break_on_hyphens=False)).replace("\0", " ") for part in command.split("; ")]
    return "\n".join(["```bash", *lines, "```"])


def source(result: dict, name: str, note: str) -> str:
    """What stands under a table: the note, whose budgets are which, and where the numbers come from."""
    threads, minutes, processes = result["threads"], result["seconds"] / 60, result["processes"]
    each = f"{processes} processes of " if processes != 1 else ""
    return (paragraph(f"{note} {budgets(result)} `results/{name}.json`: {result['model']}, "
                      f"{result['settings']['dtype']}, {each}{threads} thread{'s' * (threads != 1)}, {minutes:.0f} "
                      f"minutes, commit {result['commit']}:") + f"\n\n{command_lines(result['command'])}")


def budgets(result: dict) -> str:
    """Who shares a budget, for every method with one."""
    found = {}
    for m in dict.fromkeys(c["method"] for c in result["cells"]):
        if m in BASELINES or m.startswith(OURS):
            found.setdefault(BASELINES[m][1] if m in BASELINES else "ours", []).append(m)
    return "Budgets: " + "; ".join(f"{BUDGETS[x]}: {', '.join(found[x])}" for x in BUDGETS if x in found) + "."


class Cells:
    """Look cells up by kind, method and nominal kept fraction; the full cache and no document have one each."""

    def __init__(self, result: dict, task: str):
        mine = [c for c in result["cells"] if c["task"] == task]
        self.at = {(c["kind"], c["method"], expect(c["keep"], int, float)): c for c in mine}
        self.methods = list(dict.fromkeys(c["method"] for c in mine))
        self.keeps = sorted({c["keep"] for c in mine if c["method"] not in ("full", "none")}, reverse=True)
        if mine and not {"full", "none"} <= set(self.methods):
            raise BadInput(f"no cells of {task} for the methods full and none, its ceiling and floor; measure them too")

    def __call__(self, kind: str, method: str, keep: float) -> dict | None:
        return self.at.get((kind, method, {"full": 1.0, "none": 0.0}.get(method, keep)))

    def measured(self, keep: float) -> list[str]:
        return [m for m in self.methods if self("all", m, keep)]

    def sizes(self, *keeps) -> str:
        k = [next(c["K"] for (kind, _, x), c in self.at.items() if kind == "all" and x == keep) for keep in keeps]
        return f"K = {', '.join(f'{x:.0f}' for x in k)} of N = {self('all', 'full', 1)['N']:.0f} tokens on average"

    def text(self, kind, method, keep, metric, among=None, lowest=False, interval=False, form=number) -> str:
        """A mean, in bold where it is its column's best. Ceiling, floor and what sees the question do not compete.
        among: the methods that do, or None; interval: with its 95 % interval."""
        c = self(kind, method, keep)
        if c is None:
            return "–"
        out, not_these = form(c["mean"][metric]), ("full", "none", "question")
        rivals = [self(kind, m, keep) for m in among or () if m not in not_these]
        best = (min if lowest else max)((r["mean"][metric] for r in rivals if r), default=None)
        if method not in not_these and c["mean"][metric] == best:
            out = f"**{out}**"
        if interval and c["ci95"][metric]:
            out += " ({}–{})".format(*map(form, c["ci95"][metric]))
        return out


def paired(cell: dict | None, metric: str, form=signed) -> str:
    """The paired difference to another method with its interval; nothing in that method's own row."""
    d = (cell or {}).get("difference")
    if not d or cell["method"] == d["against"]:
        return ""
    return form(d["mean"][metric]) + (" ({} to {})".format(*map(form, d["ci95"][metric])) if d["ci95"][metric] else "")


def headline_table(result: dict, name: str = "fidelity") -> str:
    """KL over all kinds with its interval and of SQuAD's answers, and bytes; few methods. Of SnapKV and H2O the better
    at 0.1."""
    cells, keeps = Cells(result, "fidelity"), (0.25, 0.1, 0.05)
    old = [m for m in ("snapkv", "h2o") if cells("all", m, 0.1)]
    old = sorted(old, key=lambda m: cells("all", m, 0.1)["mean"]["kl"])[:1]
    methods = [m for m in ("full", "none", "random", *old, "kvzip:equal", "kvzip", "no-routing", "kvdistill")
               if m in cells.methods]
    rows = []
    for m in methods:
        text = lambda kind, keep, interval: "0" if m == "full" else (  # noqa: E731, B023
            cells.text(kind, m, keep, "kl", methods, True, interval))  # noqa: B023
        size = cells("all", m, 0.1)
        rows.append([LABELS.get(m, m).replace("no-routing: ", ""), *(text("all", keep, True) for keep in keeps),
                     *(text("squad", keep, False) for keep in keeps),
                     f"{size['cache_bytes'] / 1e6:.2f}" if size else "–"])
    head = ["KL, nats per token", "keep 0.25 (95 %)", "0.1", "0.05", "SQuAD 0.25", "0.1", "0.05", "MB at 0.1"]
    n, squad = cells("all", "full", 1), cells("squad", "full", 1)
    note = f"n = {n['n']} answers to {n['contexts']} held-out documents" + (
        f", {squad['n']} to {squad['contexts']} of them SQuAD's, a kind that training never saw" if squad else "")
    note += f"; {cells.sizes(*(x for x in keeps if x in cells.keeps))}."
    return f"{markdown(head, rows)}\n\n{paragraph(note + f' From `results/{name}.json`.')}"


def fidelity_table(result: dict, name: str = "fidelity") -> str:
    """KL by kind and over all kinds, top-1 agreement, and the paired difference to `--against`: a table per keep."""
    cells, parts, other = Cells(result, "fidelity"), [], result.get("against")
    kinds = [k for k in KINDS if cells(k, "full", 1)]
    for keep in cells.keeps:
        rows, methods = [], cells.measured(keep)
        for m in methods:
            text = lambda k, interval: cells.text(k, m, keep, "kl", methods, True, interval)  # noqa: E731, B023
            rows.append([LABELS.get(m, m), *(text(k, k == "squad") for k in kinds), text("all", True),
                         f"{cells('all', m, keep)['mean']['agree']:.0%}",
                         *([paired(cells(k, m, keep), "kl") for k in ("all", "squad")] if other else [])])
        head = [f"keep {keep:g}: KL, nats per token", *(k + " (95 %)" * (k == "squad") for k in kinds),
                "all kinds (95 %)", "top-1 agreement",
                *([f"minus {other}, paired: all kinds", "squad"] if other else [])]
        parts.append(f"{markdown(head, rows)}\n\n{cells.sizes(keep)}.")
    n = ", ".join(f"{k} {c['n']} answers to {c['contexts']} documents of {c['units']} units"
                  for k in (*kinds, "all") for c in [cells(k, "full", 1)])
    return "\n\n".join([*parts, source(result, name, f"n: {n}.")])


def gap(cells: Cells, method: str, keep: float, metric: str) -> str:
    """(ours − none) / (full − none)."""
    floor, ceiling = (cells("all", m, keep)["mean"][metric] for m in ("none", "full"))
    if ceiling <= floor:
        return "–"
    return f"{(cells('all', method, keep)['mean'][metric] - floor) / (ceiling - floor):.0%}"


def squad_table(result: dict, name: str = "squad") -> str:
    """F1, exact match and contained answers, and the share of the gap between no document and the full cache: a table
    per keep."""
    cells, parts, three = Cells(result, "squad"), [], "{:.3f}".format
    c, other = cells("all", "full", 1), result.get("against")
    for keep in cells.keeps:
        methods = cells.measured(keep)
        rows = [[LABELS.get(m, m), cells.text("all", m, keep, "f1", methods, interval=True, form=three),
                 gap(cells, m, keep, "f1"), *([paired(cells("all", m, keep), "f1")] if other else []),
                 *(cells.text("all", m, keep, metric, form=three) for metric in ("em", "contains"))] for m in methods]
        head = [f"SQuAD, keep {keep:g}", "F1 (95 %)", "share of the gap",
                *([f"F1 minus {other}, paired"] if other else []), "exact match", "answer contained"]
        parts.append(f"{markdown(head, rows)}\n\n{cells.sizes(keep)}.")
    pack = result["settings"]["tasks"]["squad"]["pack"]
    note = f"{c['n']} questions about {c['contexts']} documents of {pack} paragraph{'s' * (pack != 1)}."
    return "\n\n".join([*parts, source(result, name, note)])


def niah_table(result: dict, name: str = "niah") -> str:
    """Share of values found, by length for one needle, and for four: a table per keep."""
    cells, parts = Cells(result, "niah"), []
    lengths = sorted({int(k.split("/")[1]) for k, _, _ in cells.at if k.startswith("single/")})
    kinds = [*(f"single/{x}" for x in lengths), "single", "multi"]
    for keep in cells.keeps:
        methods = cells.measured(keep)
        rows = [[LABELS.get(m, m), *(cells.text(k, m, keep, "match", methods, interval=k in ("single", "multi"),
                                                form="{:.2f}".format) for k in kinds)] for m in methods]
        head = [f"values found, keep {keep:g}", *map(str, lengths), "all lengths (95 %)", "four needles (95 %)"]
        parts.append(markdown(head, rows))
    one, four = cells(kinds[0], "full", 1), cells("multi", "full", 1)
    note = ("Columns: tokens of the document, with one needle; four needles: all lengths together. K is keep times "
            f"the length. n = {one['n']} for each length, {four['n']} values for four needles.")
    return "\n\n".join([*parts, source(result, name, note)])


def cost_table(result: dict, name: str = "cost") -> str:
    from results.plots import cost_rows
    rows, keeps = [], sorted({c["keep"] for c in result["cells"] if 0 < c["keep"] < 1}, reverse=True)
    for r in cost_rows(result):
        pays = "never" if r["break_even"] is None else str(math.ceil(r["break_even"]))
        kept = f" {r['keep']:g}" if len(keeps) > 1 and 0 < r["keep"] < 1 else ""
        rows.append([str(r["length"]), LABELS.get(r["method"], r["method"]) + kept,
                     "–" if r["bytes"] is None else f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.1f}",
                     f"{r['ratio']:.2f}", f"{r['tokens_per_s']:.1f}", f"{r['tokens_per_s_8']:.1f}",
                     "–" if r["method"] in ("full", "none", "question") else pays])
    sizes = {(round(c["N"]), round(c["K"])) for c in result["cells"] if 0 < c["keep"] < 1 and c["kind"] != "all"}
    head = ["tokens", f"method, keep {', '.join(f'{k:g}' for k in keeps)}", "MB", "seconds",
            "(prefill + compression) / prefill", "tokens/s, batch 1", "tokens/s, batch 8", "pays after … questions"]
    sizes = ", ".join(f"{k} of {length}" for length, k in sorted(sizes))
    note = (f"K = {sizes}. MB: as stored, header and bookkeeping included. Seconds: prefill and compression, median of "
            f"{result['settings']['tasks']['cost']['n']} repeats; tokens per second, and what a question of one short "
            "answer saves: means. Differences of a few per cent are noise. H2O's second reading of the document is "
            "left out.")
    return f"{markdown(head, rows)}\n\n{source(result, name, note)}"


TABLES = {"fidelity": fidelity_table, "squad": squad_table, "niah": niah_table, "cost": cost_table}
FIGURES = {"fidelity": ("fidelity-quality.png", "KL against kept fraction"),
           "squad": ("squad-quality.png", "F1 against kept fraction"),
           "niah": ("niah-needles.png", "Needles found, by depth and length"),
           "cost": ("cost-cost.png", "Bytes, seconds and rates against length")}


def load(name: str) -> dict:
    return read_json(RESULTS / f"{name}.json")


def made(name: str, table=None) -> str:
    """The content of a block, its figure first; a result that does not exist is said to be missing."""
    path, (figure, title) = RESULTS / f"{name}.json", FIGURES[name]
    if not path.exists():
        return MISSING
    with reading(path, "make it again with eval.py"):
        shown = f"![{title}]({figure})\n\n" if table is None and (RESULTS / figure).exists() else ""
        return shown + (table or TABLES[name])(load(name), name)


def fill(path: Path, tables: dict[str, str]) -> None:
    """Put the tables into the blocks of their names."""
    with reading(path):
        text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        block = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, n = re.subn(block, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)  # noqa: B023
        if n != 1:
            raise BadInput(f"{path}: {n} blocks '<!-- table: {name} -->' … '<!-- end -->', expected one; add it")
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def main() -> None:
    """Of the figures, those are shown that plots.py has drawn before."""
    fill(RESULTS / "README.md", {name: made(name) for name in TABLES})
    for page in (ROOT / "README.md", CARD):
        fill(page, {"headline": made("fidelity", headline_table)})


if __name__ == "__main__":
    run_program(main)
