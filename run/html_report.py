"""What is kept of a text, shown: in a terminal, and as a page of its own.

html_report.html is the template of the page, which needs no network.
"""
import base64
import json
import math
import os
import shutil
import sys
import textwrap
import unicodedata
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from model import Cache, answer_ids
from run.errors import write_atomic

KEEPS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)  # the page's, beside the user's own
TEMPLATE = Path(__file__).with_suffix(".html")

# The fractions of tokens that get each of the terminal's three marks or a stronger one,
# at most, so that there is something to see at any keep ratio.
SHARES = (0.35, 0.15, 0.05)
# By level: no step, the three steps, and what the user wanted to be kept.
MARKS = " .+#="
STYLES = ("\033[2m", "", "\033[1m", "\033[7m", "\033[4m")  # dim, plain, bold, inverse, underlined
OWN = 4


# ---------------------------------------------------------------- what is kept

def kept_map(cache: Cache, n: int):
    """Which of a context's n tokens each head holds: (L, G, n) bool.

    cache: of one row. A register counts as the token of which it is a copy, one of
    the last ones.
    """
    layers = []
    for groups in cache.layers:
        heads = []
        for group in groups:
            g = group.k.shape[1]
            positions = group.positions[0].cpu().long().expand(g, -1)
            kept = torch.zeros(g, n + 1, dtype=torch.bool)
            # padding, at −1, goes to a column that is cut off
            kept.scatter_(1, positions % (n + 1), True)
            heads.append(kept[:, :n])
        layers.append(torch.cat(heads))
    return torch.stack(layers)


def header_bytes(cache: Cache, n_header: int) -> int:
    """The bytes of the first n_header tokens, which every head holds."""
    total = 0
    for groups in cache.layers:
        for group in groups:
            stored = sum(x.numel() * x.element_size() for x in group.tensors())
            total += stored // group.k.shape[2] * n_header
    return total


def text_units(tokenizer, ids: list[int]) -> list[tuple[str, int]]:
    """The text of the ids in pieces, each with its number of tokens: one, or the
    few that share the bytes of one character."""
    units = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        is_cut = text.endswith("\ufffd") and end - start < 4 and end < len(ids)
        if not is_cut:
            units.append((text, end - start))
            start = end
    return units


# --------------------------------------------------------------- in a terminal

def step_limits(counts: list[int], n_heads: int) -> list[int]:
    """For each mark, how many heads must keep a token that gets it.

    At most the fraction SHARES of the tokens get it, unless all heads keep more.
    counts: how many heads keep each token.
    """
    ordered = sorted(counts, reverse=True)
    limits = []
    for share in SHARES:
        most = int(share * len(ordered))  # so many tokens may be marked
        limit = ordered[most] + 1 if ordered else 1
        limits.append(min(limit, n_heads))
    return limits


def view(tokenizer, ids: list[int], counts: list[int], own: list[bool], n_heads: int,
         in_color: bool, width: int = 80) -> str:
    """The text of the ids, marked by how many heads keep a token, and a legend.

    counts: of n_heads, how many keep each token. own: what the user wanted kept.
    in_color: marked by styles; otherwise by a row of marks under each line.
    """
    limits = step_limits([c for c, is_own in zip(counts, own) if not is_own], n_heads)
    cells = []  # (character, level)
    start = 0
    for text, size in text_units(tokenizer, ids):
        end = start + size
        count = round(sum(counts[start:end]) / size)
        level = sum(count >= limit for limit in limits)
        if any(own[start:end]):
            level = OWN
        blank = not text.strip()
        for c in text.replace("\t", "    "):
            # a blank before a word has no mark, and a control character no effect
            shown = c if c.isprintable() or c == "\n" else "\ufffd"
            cells.append((shown, level if blank or not c.isspace() else 0))
        start = end

    legend = legend_of(limits, n_heads, any(own), in_color)
    if in_color:
        runs = groupby(cells, key=lambda cell: cell[1])
        shown = "".join(styled("".join(c for c, _ in run), level) for level, run in runs)
    else:
        shown = with_marks(cells, width)
    return f"{shown}\n\n{legend}"


def styled(text: str, level: int) -> str:
    return f"{STYLES[level]}{text}\033[0m"


def legend_of(limits: list[int], n_heads: int, has_own: bool, in_color: bool) -> str:
    ends = [*(limit - 1 for limit in limits[1:]), n_heads]
    parts = []
    for level, (first, last) in enumerate(zip(limits, ends), start=1):
        if first <= last:
            amount = f"{first} to {last}" if first < last else f"{first}"
            parts.append((level, amount))
    names = [styled(amount, i) if in_color else f"{MARKS[i]} {amount}" for i, amount in parts]
    legend = f"marks    {', '.join(names)} of {n_heads} heads keep the token; none: fewer"
    if has_own:
        name = "what you asked to keep"
        legend += f"; {styled(name, OWN) if in_color else f'{MARKS[OWN]} {name}'}"
    return legend


def columns(c: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.category(c) in ("Mn", "Me"):
        return 0  # an accent that stands over the letter before it
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def with_marks(cells: list[tuple[str, int]], width: int) -> str:
    """The lines of a text, each above the marks of its characters."""
    rows = []
    for is_end, line in groupby(cells, key=lambda cell: cell[0] == "\n"):
        line = list(line)
        if is_end:
            rows += [""] * (len(line) - 1)
            continue
        for part in wrap(line, width):
            rows.append("".join(c for c, _ in part).rstrip())
            marks = "".join(MARKS[level] * columns(c) for c, level in part).rstrip()
            if marks:
                rows.append(marks)
    return "\n".join(rows)


def wrap(cells: list[tuple[str, int]], width: int) -> list:
    """A line in parts of at most `width` columns, cut behind blanks if there are any."""
    parts = []
    start = 0
    after_blank = 0
    used = 0
    for i, (c, _) in enumerate(cells):
        if used + columns(c) > width:
            end = after_blank if after_blank > start else i
            parts.append(cells[start:end])
            start = end
            used = sum(columns(c) for c, _ in cells[start:i])
        used += columns(c)
        if c == " ":
            after_blank = i + 1
    parts.append(cells[start:])
    return parts


def in_column(text: str, column: int) -> str:
    """A text whose lines all begin in one column of the terminal."""
    lines = []
    width = max(20, terminal_width() - column)
    for line in text.splitlines() or [""]:
        shown = "".join(c if c.isprintable() else "\ufffd" for c in line.expandtabs(4))
        lines += textwrap.wrap(shown, width) or [""]
    indent = " " * column
    return textwrap.indent("\n".join(lines), indent).removeprefix(indent)


def answer_text(tokenizer, ids: list[int], max_new_tokens: int) -> str:
    """The text of an answer. One that was cut off ends with "…"."""
    text = tokenizer.decode(ids).strip()
    return f"{text} …" if len(ids) == max_new_tokens else text


def terminal_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def can_color() -> bool:
    is_dumb = os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ
    return sys.stdout.isatty() and not is_dumb


# -------------------------------------------------------------------- the page

def make_report(
    model, tokenizer, full: Cache, ids: list[int], own: list[bool], n_header: int,
    questions: list[str], settings: tuple, kept: float, make_cache,
) -> dict:
    """What a page shows: the text, sizes and answers at several keep ratios.

    tokenizer, settings: of `answer_ids`. ids: the text's, behind the n_header first
    tokens. own: of these, what the user wanted kept.
    kept: tokens per head to begin with. make_cache(k): the compressed cache of
    k tokens per head.
    In `map` is a byte for each token, layer and head: its bit i says whether the
    head keeps the token at the i-th keep ratio.
    """
    def answers_from(cache: Cache) -> list[str]:
        found = answer_ids(model, tokenizer, cache, questions, *settings)
        return [answer_text(tokenizer, answer, settings[0]) for answer in found]

    n = len(ids) - sum(own)
    ratio_of = {}  # by tokens per head; where two ratios have as many, the rounder one
    for ratio in (kept / max(1, n), *KEEPS):
        ratio_of[max(1, math.ceil(ratio * n - 1e-6))] = ratio
    counts = sorted(ratio_of)

    bits = torch.zeros(len(ids), model.cfg.n_layer, model.cfg.n_kv_head, dtype=torch.uint8)
    sizes = []
    answers = []
    for i, k in enumerate(tqdm(counts, desc="page", unit="cache")):
        cache = make_cache(k)
        end = n_header + len(ids)
        held = kept_map(cache, int(cache.next_position))[..., n_header:end]
        bits |= held.permute(2, 0, 1).to(torch.uint8) << i
        sizes.append([cache.nbytes(), cache.nbytes() - header_bytes(cache, n_header)])
        answers.append(answers_from(cache))

    units = text_units(tokenizer, ids)
    is_own = []
    start = 0
    for _, size in units:
        is_own.append(any(own[start:start + size]))
        start += size
    return {
        "n": len(ids),
        "own": sum(own),
        "header": n_header,
        "layers": model.cfg.n_layer,
        "heads": model.cfg.n_kv_head,
        "keeps": [ratio_of[k] for k in counts],
        "kept": counts,
        "start": counts.index(max(1, math.ceil(kept - 1e-6))),
        "units": units,
        "unit_is_own": is_own,
        "questions": questions,
        "map": base64.b64encode(bits.numpy().tobytes()).decode(),
        "bytes": sizes,
        "answers": answers,
        "full_bytes": [full.nbytes(), full.nbytes() - header_bytes(full, n_header)],
        "full_answers": answers_from(full),
    }


def write_report(path, report: dict) -> None:
    """Write the page, with all that it shows inside.

    No text can end the script that it stands in: every < is spelt \\u003c. The
    page makes text nodes of it, never markup.
    """
    data = json.dumps(report, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace('"SHOWN"', data, 1)
    # odd bytes of a question become question marks
    write_atomic(path, lambda tmp: tmp.write_text(page, encoding="utf-8", errors="replace"))
