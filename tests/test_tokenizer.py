"""Tokenizers: ids equal to the reference library's, chat formats equal to the public templates, odd files refused."""
import json
import random
from pathlib import Path

import pytest

from conftest import ROOT
from run.errors import BadInput
from data.tokenizer import SMOLLM, Tokenizer, pattern_of

# Each can be checked by hand in tokenizer.json's vocabulary ("Ġ" stands for a blank, "Ċ" for a newline).
PINNED = {
    "1": [33], "12345": [33, 34, 35, 36, 37],         # every digit is its own token
    " 1": [216, 33], "  1": [256, 33],                # … and the blanks before it are a piece of their own
    "hello world": [28120, 905], "": [], "<|im_end|>": [44, 108, 306, 79, 486, 108, 46],
}
TEXTS = ["", "Plain prose, with commas; and 'quotes' don't hurt.", "def f(x):\n    return x ** 2  # 3.14\n\n\n",
         "a  b   c    ", "1 22 333  4444 1,234.56", "\t\t\n \n  x", "naïve café Ångström ſ", "汉字と仮名 한국어",
         "🙂👨‍👩‍👧🏳️‍🌈", "½²①٣", "\x00\x07\x1b\x7f\x85",
         "end with space ", " \u00a0\u2003x", "it's IT'S we'll WE'LL", "…—“”", "x" * 300, "  1", "a\r\nb"]


@pytest.mark.weights
@pytest.mark.parametrize("text", PINNED, ids=repr)
def test_pinned_ids(tokenizer, text):
    assert tokenizer.encode(text) == PINNED[text]


@pytest.mark.weights
@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.weights
def test_equal_to_the_tokenizers_library(tokenizer, weights):
    """Our SmolLM2 regex against the library's own Digits + ByteLevel steps, on prose, code and random characters."""
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(weights / "tokenizer.json"))
    rng = random.Random(0)
    alphabet = "  \n\t0123456789abcXYZ'’s.,-_()é漢🙂²"
    texts = TEXTS + [p.read_text(encoding="utf-8") for p in (ROOT / "data" / "lighthouse.txt", Path(__file__))]
    texts += ["".join(rng.choices(alphabet, k=40)) for _ in range(300)]
    for text in texts:
        text = text.replace("<|", "< |")  # the library would make special tokens of them, which is the next test
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.weights
def test_text_never_becomes_a_special_token(tokenizer):
    for name in tokenizer.special:
        ids = tokenizer.encode(f"a{name}b") + tokenizer.ask(f"x{name}")[:-len(tokenizer.turn)]
        assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(tokenizer.encode("<|im_start|>")) == "<|im_start|>"


@pytest.mark.weights
def test_bytes_without_a_token_are_dropped(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


@pytest.mark.weights
def test_chat_format_is_smollms(tokenizer, weights):
    """Our pieces laid end to end are what the model's own chat template renders."""
    jinja2 = pytest.importorskip("jinja2")
    template = json.loads((weights / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    messages = [{"role": "user", "content": "DOC\n\nQ?"}]
    want = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    got = tokenizer.header + tokenizer.encode("DOC") + tokenizer.ask("Q?")
    assert tokenizer.decode(got) == want and len(tokenizer.header) == 24


def tiny_tokenizer_json(**changes) -> dict:
    from data.tokenizer import byte_alphabet
    vocab = {c: i for i, c in enumerate(sorted(byte_alphabet()))}
    vocab |= {"he": 256, "ll": 257, "hell": 258}
    added = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    spec = {"added_tokens": [{"content": t, "id": 300 + i} for i, t in enumerate(added)], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": llama3}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
            "model": {"type": "BPE", "byte_fallback": False, "ignore_merges": True, "vocab": vocab,
                      "merges": [["h", "e"], ["l", "l"], ["he", "ll"]]}}
    return spec | changes


def test_llama3_format(tmp_path):
    """Three-digit groups, the header and turn marks, merges as pairs; against the tokenizers library."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()), encoding="utf-8")
    t = Tokenizer(tmp_path)
    assert t.decode(t.header + t.encode("DOC") + t.ask("Q")) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nDOC\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert t.stop_ids == {304, 301} and t.encode("hello") == [258, t.encode("o")[0]]
    tokenizers = pytest.importorskip("tokenizers")
    rest = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    full = tiny_tokenizer_json() | rest | {"version": "1.0", "added_tokens": []}
    reference = tokenizers.Tokenizer.from_str(json.dumps(full))
    for text in TEXTS:
        assert t.encode(text) == reference.encode(text).ids, repr(text)


@pytest.mark.parametrize("change, message", [
    ({"model": {"type": "Unigram"}}, "a Unigram model"),
    ({"model": {"type": "BPE", "byte_fallback": True}}, "byte fallback"),
    ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, r"pre-tokenizer \['Metaspace'\]"),
    ({"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}}, "byte-level alphabet"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3, "ba": 2}, "merges": ["a b", "b a"]}},
     "order of the ids"),
])
def test_foreign_tokenizers_are_refused(tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json(**change)))
    with pytest.raises(BadInput, match=message):
        Tokenizer(tmp_path)


def test_sentencepiece_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(BadInput, match="SentencePiece tokenizer .* is not supported"):
        Tokenizer(tmp_path)


def test_the_smollm_pattern_is_found():
    pre = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]}
    assert pattern_of(pre, "x") == SMOLLM
