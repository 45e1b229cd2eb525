"""What is kept of a text, shown: in a terminal, and as a page of its own.

html_report.html is the template of the page, which needs no network.
"""
import base64
import json
import math
from pathlib import Path

import torch

from model import Cache, answer
from run.errors import write_atomic

KEEPS = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)  # the page's, beside the user's own
TEMPLATE = Path(__file__).with_suffix(".html")


def kept_map(cache: Cache, n: int):
    """Which of a context's n tokens each head holds: (L, G, n) bool.

    cache: of one row.
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


def highlight(tokenizer, ids: list[int], fractions: list[float], in_color: bool) -> str:
    """The text of the ids, marked where more heads keep a token than on average.

    fractions: of the heads, how many keep each token.
    in_color: dim, plain, bold and inverse text, from few heads to many;
        otherwise brackets around what more heads keep than on average.
    """
    mean = sum(fractions) / max(1, len(fractions))
    if in_color:
        limits = (mean / 2, mean, min(2 * mean, (mean + 1) / 2))
        marks = [("\033[2m", "\033[0m"), ("", ""), ("\033[1m", "\033[0m"), ("\033[7m", "\033[0m")]
    else:
        limits = (mean,)
        marks = [("", ""), ("[", "]")]
    levels = [sum(fraction > limit for limit in limits) for fraction in fractions]

    text = ""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or levels[end] != levels[start]:
            opening, closing = marks[levels[start]]
            text += opening + tokenizer.decode(ids[start:end]) + closing
            start = end
    return text


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


def make_report(
    model, tokenizer, full: Cache, ids: list[int], n_protected: int,
    questions: list[str], settings: tuple, keep: float, make_cache,
) -> dict:
    """What a page shows: the text, sizes and answers at several kept fractions.

    ids: the compressible tokens, behind the n_protected first ones.
    settings: of `answer`. keep: the fraction to begin with.
    make_cache(k): the compressed cache of k tokens per head.
    In `map` is a byte for each token, layer and head: its bit i says whether the
    head keeps the token at the i-th fraction.
    """
    n = len(ids)
    count_of = {}
    for fraction in sorted({*KEEPS, keep}, reverse=True):
        count_of[max(1, math.ceil(fraction * n - 1e-6))] = fraction
    counts = list(count_of)

    bits = torch.zeros(n, model.cfg.n_layer, model.cfg.n_kv_head, dtype=torch.uint8)
    sizes = []
    answers = []
    for i, k in enumerate(counts):
        cache = make_cache(k)
        end = n_protected + n
        kept = kept_map(cache, int(cache.next_position))[..., n_protected:end]
        bits |= kept.permute(2, 0, 1).to(torch.uint8) << i
        sizes.append(cache.nbytes())
        answers.append(answer(model, tokenizer, cache, questions, *settings))

    return {
        "n": n,
        "layers": model.cfg.n_layer,
        "heads": model.cfg.n_kv_head,
        "keeps": list(count_of.values()),
        "kept": counts,
        "start": counts.index(max(1, math.ceil(keep * n - 1e-6))),
        "units": text_units(tokenizer, ids),
        "questions": questions,
        "methods": [{
            "name": "kvdistill",
            "map": base64.b64encode(bits.numpy().tobytes()).decode(),
            "bytes": sizes,
            "answers": answers,
        }],
        "bytes": full.nbytes(),
        "answers": answer(model, tokenizer, full, questions, *settings),
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
