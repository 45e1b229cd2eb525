"""Rewrite README's tables from results/*.json:  python results/tables.py"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("recite", "cloze", "title", "continue", "all")


def quick_table(result: dict) -> str:
    cell = {(r["method"], r["keep"], r["kind"]): r for r in result["table"]}
    methods = list(dict.fromkeys(r["method"] for r in result["table"]))
    n = {k: cell[methods[0], 0.25, k]["n"] for k in KINDS}
    lines = ["| KL(full ‖ short), nats per answer token | " + " | ".join(
        f"{k} {keep}" for keep in (0.25, 0.1) for k in KINDS) + " |", "|---" * (1 + 2 * len(KINDS)) + "|"]
    best = {(keep, k): min(cell[m, keep, k]["kl"] for m in methods) for keep in (0.25, 0.1) for k in KINDS}
    for m in methods:
        values = []
        for keep in (0.25, 0.1):
            for k in KINDS:
                kl = cell[m, keep, k]["kl"]
                values.append(f"**{kl:.2f}**" if kl == best[keep, k] else f"{kl:.2f}")
        lines.append(f"| {m} | " + " | ".join(values) + " |")
    counts = ", ".join(f"{k} {n[k]}" for k in KINDS)
    return "\n".join(lines) + (f"\n\n`results/quick.json`: {result['command']}, {result['seconds'] / 60:.1f} minutes "
                               f"on {result['threads']} threads; answer tokens per kind: {counts}.")


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = quick_table(json.loads((ROOT / "results" / "quick.json").read_text(encoding="utf-8")))
    new, n = re.subn(r"(<!-- table: quick -->\n).*?(\n<!-- end -->)", lambda m: m[1] + table + m[2], text, flags=re.S)
    assert n == 1, "README.md needs one '<!-- table: quick -->' … '<!-- end -->'"
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
