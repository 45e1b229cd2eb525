"""What stays of a text, shown: in a terminal, and as a page to look at, which run/page.html is the template of."""
import base64
import json
from pathlib import Path

import torch

from compress import kept_count
from model import Cache, answer
from run.errors import write_atomic

KEEPS = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)  # of a page, beside the one that was asked for
TEMPLATE = Path(__file__).with_suffix(".html")


def kept_map(cache: Cache, n: int):
    """Which of a context's n tokens each head holds (of a cache of one row): (L, G, n) bool."""
    kept = torch.zeros(len(cache.layers), sum(p.k.shape[1] for p in cache.layers[0]), n + 1, dtype=torch.bool)
    for layer, parts in zip(kept, cache.layers):
        first = 0
        for p in parts:
            g = p.k.shape[1]
            at = p.positions[0].cpu().long().expand(g, -1) % (n + 1)  # -1, padding, is the one behind the last
            layer[first:first + g].scatter_(1, at, True)
            first += g
    return kept[..., :n]


def highlight(tokenizer, ids: list[int], shares: list[float], colour: bool) -> str:
    """The text of ids, brighter where more heads keep it: dim, plain, bold, reverse; without a terminal, [ and ] stand
    around what more heads keep than on average."""
    mean = sum(shares) / max(1, len(shares))
    steps = (mean / 2, mean, min(2 * mean, (mean + 1) / 2))
    marks = [("\033[2m", "\033[0m"), ("", ""), ("\033[1m", "\033[0m"), ("\033[7m", "\033[0m")] if colour else [
        ("", ""), ("", ""), ("[", "]"), ("[", "]")]
    out, i, mark = "", 0, [marks[sum(share > step for step in steps)] for share in shares]
    while i < len(ids):
        j = i
        while j < len(ids) and mark[j] == mark[i]:
            j += 1
        out, i = out + mark[i][0] + tokenizer.decode(ids[i:j]) + mark[i][1], j
    return out


def units(tokenizer, ids: list[int]) -> list[tuple[str, int]]:
    """The text of ids in pieces, and how many tokens each has: one, or the few that share out the bytes of an emoji."""
    out, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if not text.endswith("\ufffd") or end - start == 4 or end == len(ids):
            out.append((text, end - start))
            start = end
    return out


def describe(doc, methods: list[str], keep: float, questions: list[str], *how) -> dict:
    """What a page shows of an eval.Document: texts, sizes and answers (how: as in model.answer) at several kept
    fractions. A method's `map` has a byte for each token, layer and head: its bit i says whether the i-th keeps it."""
    n, protected, cfg = doc.case.n, doc.case.n_protect, doc.model.cfg
    count = lambda x: int(kept_count(torch.tensor([n]), x))  # noqa: E731
    keeps = dict(reversed({count(x): x for x in sorted({*KEEPS, keep})}.items()))  # of equal counts one
    shown = []
    for method in methods:
        bits, sizes, answers = torch.zeros(n, cfg.n_layer, cfg.n_kv_head, dtype=torch.uint8), [], []
        for i, x in enumerate(keeps.values()):
            cache = doc.cache(method, x)
            bits |= kept_map(cache, n + protected)[..., protected:].permute(2, 0, 1).to(torch.uint8) << i
            sizes.append(cache.nbytes())
            answers.append(answer(doc.model, doc.tok, cache, questions, *how))
        shown.append({"name": method, "map": base64.b64encode(bits.numpy().tobytes()).decode(), "bytes": sizes,
                      "answers": answers})
    return {"n": n, "layers": cfg.n_layer, "heads": cfg.n_kv_head, "keeps": list(keeps.values()), "kept": list(keeps),
            "start": list(keeps).index(count(keep)), "units": units(doc.tok, doc.case.context[protected:]),
            "questions": questions, "methods": shown, "bytes": doc.full.nbytes(),
            "answers": answer(doc.model, doc.tok, doc.full, questions, *how)}


def write_page(path, shown: dict) -> None:
    """The page at `path`, with all that it shows in it. No text can end the script that it stands in: its < are
    spelt \\u003c; what the page makes of it are text nodes, never markup."""
    text = json.dumps(shown, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace('"SHOWN"', text, 1)
    write_atomic(path, lambda tmp: tmp.write_text(page, encoding="utf-8", errors="replace"))  # odd bytes of a question
