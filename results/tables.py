"""Rewrite README's tables from results/*.json:  python results/tables.py"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("recite", "cloze", "title", "continue", "all")
KEEPS = (0.5, 0.25, 0.1, 0.05)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quick_tables(result: dict) -> str:
    """KL by kind at two kept fractions; then KL and top-1 agreement over all kinds at every kept fraction."""
    cell = {(r["method"], r["keep"], r["kind"]): r for r in result["table"]}
    methods = list(dict.fromkeys(r["method"] for r in result["table"]))

    def kl(method, keep, kind):  # the best of a column in bold
        value = cell[method, keep, kind]["kl"]
        best = min(cell[m, keep, kind]["kl"] for m in methods)
        return f"**{value:.2f}**" if value == best else f"{value:.2f}"

    kinds = markdown(["KL, nats per token"] + [f"{kind} {keep}" for keep in (0.25, 0.1) for kind in KINDS],
                     [[m] + [kl(m, keep, kind) for keep in (0.25, 0.1) for kind in KINDS] for m in methods])
    def both(method, keep):
        c = cell[method, keep, "all"]
        low, high = c["ci95"]
        return f"{kl(method, keep, 'all')} ({low:.2f}–{high:.2f}), {c['agree']:.0%}"

    keeps = markdown(["all kinds: KL (95 %), top-1 agreement"] + [f"keep {keep}" for keep in KEEPS],
                     [[m] + [both(m, keep) for keep in KEEPS] for m in methods])
    counts = ", ".join(f"{cell[methods[0], 0.25, k]['n']} {k}" for k in KINDS)
    source = (f"From `results/quick.json`: `{result['command']}`, {result['seconds'] / 60:.1f} minutes on "
              f"{result['threads']} threads, {result['dtype']}, seed {result['seed']}, commit {result['commit']}; "
              f"answer tokens: {counts}. Intervals: bootstrap over the contexts.")
    return f"{kinds}\n\n{keeps}\n\n{source}"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    tables = quick_tables(json.loads((ROOT / "results" / "quick.json").read_text(encoding="utf-8")))
    new, n = re.subn(r"(<!-- table: quick -->\n).*?(\n?<!-- end -->)", lambda m: m[1] + tables + "\n<!-- end -->", text,
                     flags=re.S)
    assert n == 1, "README.md needs one '<!-- table: quick -->' … '<!-- end -->'"
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
