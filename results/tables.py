"""Rewrite the tables of the pages:  python results/tables.py

A page has a block `<!-- table: NAME -->` … `<!-- end -->` for each table.
results/README.md has one for each result of eval.py. README.md and the card of
the adapter have one named `headline`. What these tables claim was measured on
the test half of the texts, in results/test/.
"""
import math
import re
import signal
import sys
import textwrap
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends them

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run.errors import BadInput, expect, read_json, reading, run_program, write_atomic  # noqa: E402
from run.records import MIN_UNITS, keeps_of  # noqa: E402

RESULTS = ROOT / "results"
CARD = ROOT / "adapters" / "smollm2-135m-instruct" / "README.md"
KINDS = ("recite", "cloze", "title", "squad", "continue")
# the figure of a result, in its folder
FIGURES = {
    "test/fidelity": ("fidelity-quality.png", "KL against the kept fraction"),
    "test/squad": ("squad-quality.png", "F1 against the kept fraction"),
    "test/niah": ("niah-needles.png", "Needles found, by depth and length"),
    "cost": ("cost-cost.png", "Bytes, seconds and rates against length"),
}
MISSING = "Not measured with this version yet."
HEADLINE = ("full", "none", "random", "h2o", "kvzip:equal", "kvzip", "kvzip:recent",
            "no-routing", "kvdistill")


# ------------------------------------------------------------------- numbers and text

def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def number(x: float) -> str:
    return f"{x:.2f}" if abs(x) >= 0.0995 or not x else f"{x:.3f}"


def three(x: float) -> str:
    return f"{x:.3f}"


def signed(x: float) -> str:
    if abs(x) < 0.0005:
        return "0"
    sign = "+" if x > 0 else "−"
    return sign + number(abs(x))


def command_block(command: str) -> str:
    """The commands that made a result, each broken before its flags."""
    blocks = []
    for part in command.split("; "):
        glued = re.sub(" (?!--)", "\0", part)  # a flag and its value stay together
        lines = textwrap.wrap(glued, 92, break_long_words=False, break_on_hyphens=False)
        blocks.append(" \\\n    ".join(lines).replace("\0", " "))
    return "\n".join(["```bash", *blocks, "```"])


def source(result: dict, name: str) -> str:
    """Where the numbers of a table come from."""
    return paragraph(
        f"`results/{name}.json`: {result['model']}, {result['settings']['dtype']}, "
        f"threads: {result['threads']}, processes: {result['processes']}, "
        f"{result['seconds'] / 60:.0f} minutes, commit {result['commit']}:"
    ) + f"\n\n{command_block(result['command'])}"


class Cells:
    """The cells of one task, found by kind, method and kept fraction."""

    def __init__(self, result: dict, task: str):
        mine = [cell for cell in result["cells"] if cell["task"] == task]
        self.found = {(c["kind"], c["method"], expect(c["keep"], int, float)): c for c in mine}
        self.methods = list(dict.fromkeys(c["method"] for c in mine))
        keeps = {c["keep"] for c in mine if c["method"] not in ("full", "none")}
        self.keeps = sorted(keeps, reverse=True)
        if not {"full", "none"} <= set(self.methods):
            raise BadInput(f"no cells of {task} for the methods full and none, its ceiling "
                           "and floor; measure them too")

    def __call__(self, kind: str, method: str, keep: float) -> dict | None:
        return self.found.get((kind, method, keeps_of(method, [keep])[0]))

    def measured(self, keep: float) -> list[str]:
        return [method for method in self.methods if self("all", method, keep)]

    def fewer_bytes(self, keep: float) -> str:
        """How many times fewer bytes a compressed cache takes, as stored."""
        full = self("all", "full", 1)
        some = next(c for (kind, method, k), c in self.found.items()
                    if kind == "all" and k == keep and method not in ("full", "none"))
        return f"{full['cache_bytes'] / some['cache_bytes']:.1f}× fewer bytes"

    def size(self, keep: float) -> str:
        """What stands under a table of one kept fraction."""
        k = next(c["K"] for (kind, _, x), c in self.found.items() if kind == "all" and x == keep)
        n = self("all", "full", 1)["N"]
        return (f"keep {keep:g}: {self.fewer_bytes(keep)}; K = {k:.0f} of N = {n:.0f} tokens "
                "on average.")

    def text(self, kind: str, method: str, keep: float, metric: str, form=number,
             interval: bool = True, best=None) -> str:
        """The mean and its interval; in bold if it is the best of the methods.

        best: min or max; None: nothing is bold. Ceiling and floor do not
        compete.
        """
        cell = self(kind, method, keep)
        if cell is None:
            return "–"
        mean = cell["mean"][metric]
        text = form(mean)
        if best and method not in ("full", "none"):
            rivals = [self(kind, m, keep) for m in self.methods if m not in ("full", "none")]
            if text == form(best(rival["mean"][metric] for rival in rivals if rival)):
                text = f"**{text}**"
        if interval and cell["units"] >= MIN_UNITS:
            low, high = cell["ci95"][metric]
            if low < high:
                text += f" ({form(low)}–{form(high)})"
        return text

    def difference(self, kind: str, method: str, keep: float, metric: str) -> str:
        """The paired difference; nothing for the method that the others are
        compared with."""
        cell = self(kind, method, keep)
        difference = (cell or {}).get("difference")
        if difference is None or difference["against"] == method:
            return ""
        text = signed(difference["mean"][metric])
        if cell["units"] >= MIN_UNITS:
            low, high = difference["ci95"][metric]
            text += f" ({signed(low)} to {signed(high)})"
        return text


# ------------------------------------------------------------------------- the tables

def headline_table(result: dict, name: str = "test/fidelity") -> str:
    """KL over all kinds and of SQuAD's answers, for few methods and kept
    fractions."""
    cells = Cells(result, "fidelity")
    keeps = [keep for keep in (0.25, 0.1, 0.05) if keep in cells.keeps]
    rows = []
    for method in HEADLINE:
        if method not in cells.methods:
            continue
        row = [method]
        row += [cells.text("all", method, keep, "kl", best=min) for keep in keeps]
        row += [cells.text("squad", method, keep, "kl", interval=False, best=min)
                for keep in keeps]
        rows.append(row)

    head = ["KL, nats per token"]
    head += [f"keep {keep:g}, {cells.fewer_bytes(keep)}" for keep in keeps]
    head += [f"SQuAD answers, keep {keep:g}" for keep in keeps]
    all_kinds = cells("all", "full", 1)
    note = f"n = {all_kinds['n']} answers about {all_kinds['contexts']} test documents"
    squad = cells("squad", "full", 1)
    if squad:
        note += (f"; {squad['n']} of them answer SQuAD's questions about {squad['contexts']} "
                 "documents, a kind of question that training never saw")
    return f"{markdown(head, rows)}\n\n{paragraph(f'{note}. From `results/{name}.json`.')}"


def fidelity_table(result: dict, name: str = "test/fidelity") -> str:
    """KL by kind of question, agreement and paired differences: a table per
    kept fraction."""
    cells = Cells(result, "fidelity")
    kinds = [kind for kind in KINDS if cells(kind, "full", 1)]
    parts = []
    for keep in cells.keeps:
        head = [f"keep {keep:g}: KL, nats per token"]
        head += [f"{kind} (95 %)" if kind == "squad" else kind for kind in kinds]
        head += ["all kinds (95 %)", "top-1 agreement"]
        if result["against"]:
            paired = f"paired difference to {result['against']}"
            head += [f"{paired}, all kinds", f"{paired}, squad"]
        rows = []
        for method in cells.measured(keep):
            row = [method]
            row += [cells.text(kind, method, keep, "kl", interval=kind == "squad", best=min)
                    for kind in kinds]
            row.append(cells.text("all", method, keep, "kl", best=min))
            row.append(f"{cells('all', method, keep)['mean']['agree']:.0%}")
            if result["against"]:
                row += [cells.difference(kind, method, keep, "kl") for kind in ("all", "squad")]
            rows.append(row)
        parts.append(f"{markdown(head, rows)}\n\n{cells.size(keep)}")

    counts = []
    for kind in (*kinds, "all"):
        cell = cells(kind, "full", 1)
        counts.append(f"{kind} {cell['n']} about {cell['contexts']} documents")
    note = paragraph(f"Answers: {', '.join(counts)}.")
    return "\n\n".join([*parts, note, source(result, name)])


def gap(cells: Cells, method: str, keep: float) -> str:
    """(method − none) / (full − none), of F1."""
    floor = cells("all", "none", 0)["mean"]["f1"]
    ceiling = cells("all", "full", 1)["mean"]["f1"]
    if ceiling <= floor:
        return "–"
    return f"{(cells('all', method, keep)['mean']['f1'] - floor) / (ceiling - floor):.0%}"


def squad_table(result: dict, name: str = "test/squad") -> str:
    """F1 and its share of the gap, exact match, contained answers: a table per
    kept fraction."""
    cells = Cells(result, "squad")
    parts = []
    for keep in cells.keeps:
        head = [f"SQuAD, keep {keep:g}", "F1 (95 %)", "share of the gap"]
        if result["against"]:
            head.append(f"F1, paired difference to {result['against']}")
        head += ["exact match", "answer contained"]
        rows = []
        for method in cells.measured(keep):
            row = [method, cells.text("all", method, keep, "f1", three, best=max),
                   gap(cells, method, keep)]
            if result["against"]:
                row.append(cells.difference("all", method, keep, "f1"))
            row += [cells.text("all", method, keep, metric, three, interval=False)
                    for metric in ("em", "contains")]
            rows.append(row)
        parts.append(f"{markdown(head, rows)}\n\n{cells.size(keep)}")

    cell = cells("all", "full", 1)
    note = f"{cell['n']} questions about {cell['contexts']} documents."
    return "\n\n".join([*parts, note, source(result, name)])


def niah_table(result: dict, name: str = "test/niah") -> str:
    """How many values are found, by depth, and of four in one document: a table
    per keep."""
    cells = Cells(result, "niah")
    singles = [kind for kind, _, _ in cells.found if kind.count("/") == 2]
    depths = sorted({kind.split("/")[2] for kind in singles}, key=float)
    lengths = sorted({kind.split("/")[1] for kind in singles}, key=int)

    def found(kinds, method, keep) -> str:
        """How many of how many."""
        some = [cells(kind, method, keep) for kind in kinds]
        count = sum(cell["mean"]["match"] * cell["n"] for cell in some)
        return f"{count:.0f} of {sum(cell['n'] for cell in some)}"

    parts = []
    for keep in cells.keeps:
        head = [f"values found, keep {keep:g}", *(f"depth {depth}" for depth in depths),
                "all depths", "four needles"]
        rows = []
        for method in cells.measured(keep):
            row = [found([f"single/{length}/{depth}" for length in lengths], method, keep)
                   for depth in depths]
            row += [found([kind], method, keep) for kind in ("single", "multi")]
            rows.append([method, *row])
        parts.append(f"{markdown(head, rows)}\n\nkeep {keep:g}: {cells.fewer_bytes(keep)}.")

    note = paragraph(
        "Depth 0 is the beginning of a document, 1 its end. Four needles: four stand in one document, and "
        f"each is asked for. Documents of {', '.join(lengths)} tokens, together.")
    return "\n\n".join([*parts, note, source(result, name)])


def ends_table(result: dict, name: str = "test/ends") -> str:
    """KL of facts and passages at the beginning and the end of a document."""
    cells = Cells(result, "ends")
    kinds = [f"{kind}/{place}" for kind in ("fact", "recite") for place in ("first", "last")]
    parts = []
    for keep in cells.keeps:
        head = [f"keep {keep:g}: KL, nats per token"]
        head += [kind.replace("/", ", ") + " sentence" for kind in kinds]
        rows = [[method, *(cells.text(kind, method, keep, "kl", best=min) for kind in kinds)]
                for method in cells.measured(keep)]
        parts.append(f"{markdown(head, rows)}\n\n{cells.size(keep)}")
    note = f"n = {cells(kinds[0], 'full', 1)['n']} documents for each column."
    return "\n\n".join([*parts, note, source(result, name)])


def cost_rows(result: dict) -> list[dict]:
    """Per length and method: bytes, seconds, rates, and after how many short
    questions compressing has paid (None: never). H2O's second reading is left
    out (see eval.h2o)."""
    cells = {(int(c["kind"]), c["method"], c["keep"]): c for c in result["cells"]
             if c["task"] == "cost" and c["kind"] != "all"}
    if not any(method == "full" for _, method, _ in cells):
        raise BadInput("cost is shown against the method full; measure it too")
    rows = []
    for (length, method, keep), cell in sorted(cells.items(), key=lambda item: item[0][0]):
        full = cells[length, "full", 1.0]
        prefill = full["seconds"]["prefill"]
        seconds = cell["seconds"]["prefill"] + cell["seconds"]["compress"]
        if method == "h2o":
            seconds -= prefill
        gain = full["mean"]["question_s"] - cell["mean"]["question_s"]
        rows.append({"length": length, "method": method, "keep": keep, "K": cell["K"],
                     "bytes": cell["cache_bytes"],
                     "fewer": full["cache_bytes"] / cell["cache_bytes"],
                     "seconds": seconds, "ratio": seconds / prefill,
                     "tokens_per_s": cell["mean"]["tokens_per_s"],
                     "tokens_per_s_8": cell["mean"]["tokens_per_s_8"],
                     "break_even": max(0.0, (seconds - prefill) / gain) if gain > 0 else None})
    return rows


def cost_table(result: dict, name: str = "cost") -> str:
    rows = []
    for row in cost_rows(result):
        pays = "never" if row["break_even"] is None else str(math.ceil(row["break_even"]))
        if row["method"] in ("full", "none"):
            pays = "–"
        rows.append([
            str(row["length"]), row["method"], f"{row['keep']:g}", f"{row['K']:.0f}",
            f"{row['bytes'] / 1e6:.1f}", f"{row['fewer']:.1f}×", f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}", f"{row['tokens_per_s']:.1f}", f"{row['tokens_per_s_8']:.1f}",
            pays])
    head = ["tokens", "method", "keep", "K", "MB", "fewer bytes", "seconds",
            "seconds / prefill", "tokens/s, batch 1", "tokens/s, batch 8",
            "pays after … questions"]
    return f"{markdown(head, rows)}\n\n{source(result, name)}"


TABLES = {"test/fidelity": fidelity_table, "test/fidelity-200": fidelity_table,
          "test/fidelity-1600": fidelity_table, "test/ends": ends_table,
          "test/squad": squad_table, "test/niah": niah_table, "cost": cost_table}


# ------------------------------------------------------------------------ the program

def load(name: str) -> dict:
    return read_json(RESULTS / f"{name}.json")


def made(name: str) -> str:
    """The content of a block, its figure first."""
    if not (RESULTS / f"{name}.json").exists():
        return MISSING
    path = RESULTS / f"{name}.json"
    with reading(path, "make it again with eval.py"):
        table = TABLES[name](load(name), name)
    if name in FIGURES:
        figure, title = FIGURES[name]
        figure = path.with_name(figure)
        if figure.exists():
            return f"![{title}]({figure.relative_to(RESULTS)})\n\n{table}"
    return table


def headline() -> str:
    path = RESULTS / "test" / "fidelity.json"
    if not path.exists():
        return MISSING
    with reading(path, "make it again with eval.py"):
        return headline_table(load("test/fidelity"))


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put the tables into the blocks of their names."""
    with reading(page):
        text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        _, found_end, after = rest.partition(end)
        if not found or not found_end:
            raise BadInput(f"{page}: no block '{start.strip()}' … '{end}'; add it")
        text = f"{before}{start}{table}\n{end}{after}"
    write_atomic(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main() -> None:
    """Figures are shown if plots.py has drawn them before."""
    fill(RESULTS / "README.md", {name: made(name) for name in TABLES})
    for page in (ROOT / "README.md", CARD):
        fill(page, {"headline": headline()})


if __name__ == "__main__":
    run_program(main)
