"""compress.py as a program: a text, its caches, and questions to them. See `python compress.py --help`.

It does not stand in compress.py because the baselines, which it can show beside ours, are eval.py's.
"""
import os
import sys

import torch

from compress import DEMO, DEMO_QUESTIONS, kept_count, open_compressor, show_answers
from data.samples import case
from eval import BASELINES, Document, replay_overhead
from run.compress_flags import find_adapter, parse_args, read_text
from run.errors import BadInput, read_json
from run.files import cache_header, load_cache, save_cache
from run.models import model_name, open_model
from run.page import describe, highlight, kept_map, write_page

METHODS = [name for name in BASELINES if name != "question"]  # which knows the question beforehand


@torch.no_grad()
def main() -> None:
    a = parse_args()
    kept_count(torch.tensor([1]), a.keep, a.tokens)  # what can be wrong is looked at before the weights are loaded
    if a.method is not None and a.method not in METHODS:
        raise BadInput(f"--method {a.method!r} is unknown, expected one of {', '.join(METHODS)}")
    if a.load is not None:
        cache_header(a.load)
    else:
        text = read_text(DEMO if a.context is None else a.context)
        if a.adapter is not None:
            read_json(find_adapter(a.adapter) / "adapter.json")
    model, tokenizer = open_model(a)

    how = a.max_new_tokens, a.temperature, a.seed
    if a.load is not None:
        cache = load_cache(a.load, model, tokenizer)
        print(f"{a.load}: {cache.entries().float().mean():.0f} of {int(cache.next_position[0])} tokens per head, "
              f"{cache.nbytes():,} bytes")
        return show_answers(model, tokenizer, {"saved": cache}, a.question, *how)

    comp, folder = open_compressor(a.adapter, model, tokenizer, a.seed)
    document = case(tokenizer, tokenizer.document(text), [])
    n, protected = document.n, document.n_protect
    over = n + protected + replay_overhead(tokenizer) + min(n, 256) - model.cfg.max_positions
    if a.method is not None and "kvzip" in a.method and over > 0:
        raise BadInput(f"--method {a.method} reads the text twice: with {n} tokens that is {over} more than the "
                       f"model's {model.cfg.max_positions} positions; use a shorter text, or another method")
    doc = Document(model, tokenizer, {"kvdistill": comp}, document, str(a.seed))
    keep = a.keep if a.tokens is None else min(1, a.tokens / max(1, n))
    cache, seconds = doc.timed_cache("kvdistill", keep)
    caches = {"full": doc.full, "short": cache}

    def count(cache):
        kept = cache.entries().float() - protected  # (1, L, G)
        return (f"{kept.mean():.0f} kept per head on average ({kept.min():.0f} to {kept.max():.0f}), "
                f"{n / max(float(kept.mean()), 1):.1f} x fewer")
    shares = kept_map(cache, n + protected)[..., protected:].float().mean((0, 1)).tolist()
    print("\n" + highlight(tokenizer, document.context[protected:], shares, sys.stdout.isatty()) + "\n")
    print(f"tokens   {n} compressible -> {count(cache)}; {protected} protected in all heads")
    print(f"bytes    {doc.full.nbytes():,} -> {cache.nbytes():,} as stored, the header included")
    print(f"seconds  {doc.seconds['prefill']:.2f} to read the text, {seconds['compress']:.2f} to compress it")
    if a.method is not None:
        caches[a.method], seconds = doc.timed_cache(a.method, keep)
        print(f"\n{a.method}, a training-free choice: {count(caches[a.method])}\n"
              f"bytes    {caches[a.method].nbytes():,}\nseconds  {seconds['compress']:.2f} to compress")
    if a.save is not None:
        save_cache(a.save, cache, model, tokenizer)
        print(f"saved    {a.save} ({os.path.getsize(a.save):,} bytes)")
    questions = a.question or (["What is this text about?"] if a.context else DEMO_QUESTIONS)
    show_answers(model, tokenizer, caches, questions, *how)
    if a.html is not None:
        print("\npage     asking at all its kept fractions …", flush=True)
        shown = describe(doc, ["kvdistill"] + [a.method] * (a.method is not None), keep, questions, *how)
        shown["model"] = model_name(a.weights) + ("" if folder else ", an untrained compressor")
        write_page(a.html, shown)
        print(f"page     {a.html} ({os.path.getsize(a.html):,} bytes)")
