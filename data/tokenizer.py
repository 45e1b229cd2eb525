"""Text to token ids and back, on tiktoken, from a byte-level-BPE tokenizer.json (SmolLM2, Llama 3); chat formats.

Text from a user can never become a special token: `encode` is tiktoken's encode_ordinary, and the special tokens of
the chat format are put in by id, by the functions below, and nowhere else.
"""
import hashlib
from pathlib import Path

import tiktoken

from run.errors import BadInput, read_json

# How text is cut before BPE. GPT-2's pattern, and what SmolLM2 makes of it: a digit is always a piece of its own, and
# the white space before a digit is one piece (GPT-2 would keep its last blank for the number).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each of the 256 bytes: character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def pattern_of(pre: dict | None, path) -> str:
    """The regular expression of a tokenizer.json's pre_tokenizer; BadInput for one that we do not know."""
    steps = pre.get("pretokenizers", [pre]) if pre else []
    kinds = [s.get("type") for s in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        own_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_regex:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and own_regex and steps[0].get("individual_digits"):
            return SMOLLM
        if kinds == ["Split", "ByteLevel"] and not own_regex and "Regex" in steps[0].get("pattern", {}):
            return steps[0]["pattern"]["Regex"]
    raise BadInput(f"{path}: pre-tokenizer {kinds or None} is not one of ByteLevel, Digits + ByteLevel (SmolLM2), "
                   "Split + ByteLevel (Llama 3); its ids would be wrong, so it is refused")


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`, and the pieces of a chat: `header`, `ask(question)`, `stop_ids`.

    Args: folder: where tokenizer.json lies. Errors: BadInput for anything but byte-level BPE.
    """

    def __init__(self, folder):
        path = Path(folder) / "tokenizer.json"
        if not path.exists() and (Path(folder) / "tokenizer.model").exists():
            raise BadInput(f"{folder}: a SentencePiece tokenizer (tokenizer.model: Llama 2, Mistral) is not supported; "
                           "use a model with a byte-level-BPE tokenizer.json, such as SmolLM2 or Llama 3")
        spec = read_json(path)
        model = spec.get("model", {})
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            how = " with byte fallback (SentencePiece)" if model.get("byte_fallback") else ""
            raise BadInput(f"{path}: a {model.get('type')} model{how}, expected byte-level BPE (SmolLM2, Llama 3)")
        if spec.get("normalizer"):
            raise BadInput(f"{path}: normalizer {spec['normalizer'].get('type')} is not supported, expected none")
        self.special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        alphabet = byte_alphabet()
        try:
            ranks = {bytes(alphabet[c] for c in token): i for token, i in model["vocab"].items()
                     if token not in self.special}
        except KeyError as e:
            raise BadInput(f"{path}: character {e} is not in the byte-level alphabet; is this a SentencePiece "
                           "vocabulary?") from None
        # tiktoken merges by id, the file lists merges by priority: both agree when ids rise along the list
        last = -1
        for merge in model["merges"]:
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            i = model["vocab"].get(a + b, -1)
            if i < last and not model.get("ignore_merges"):  # Llama 3 lists every split of a token, ordered by itself
                raise BadInput(f"{path}: merge {merge!r} is out of the order of the ids; tiktoken cannot reproduce it")
            last = i
        vocabulary = repr((sorted(ranks.items()), sorted(self.special.items())))
        self.fingerprint = hashlib.sha256(vocabulary.encode()).hexdigest()
        self.known = {*ranks.values(), *self.special.values()}
        self.n_vocab = max(self.known) + 1
        # SmolLM2 has no token for 21 bytes: 13 that UTF-8 never uses, six control characters, two unassigned planes.
        # tiktoken wants all 256, so the missing ones get ids above the vocabulary, which `encode` drops.
        for b in range(256):
            ranks.setdefault(bytes([b]), self.n_vocab + b)
        self.bpe = tiktoken.Encoding(name=str(path), pat_str=pattern_of(spec.get("pre_tokenizer"), path),
                                     mergeable_ranks=ranks, special_tokens=self.special)

        # The chat format is known by its marks: ChatML (SmolLM2), Llama 3's, or none (a base model: plain text).
        if "<|im_start|>" in self.special:
            start, end = self.special["<|im_start|>"], self.special["<|im_end|>"]
            self.stop_ids = {end, self.special.get("<|endoftext|>", end)}
            self.header = [start, *self.encode(f"system\n{SMOLLM_SYSTEM}"), end, *self.encode("\n"),
                           start, *self.encode("user\n")]
            self.turn = [end, *self.encode("\n"), start, *self.encode("assistant\n")]
        elif "<|start_header_id|>" in self.special:
            start, end = self.special["<|start_header_id|>"], self.special["<|end_header_id|>"]
            eot, bos = self.special["<|eot_id|>"], self.special["<|begin_of_text|>"]
            self.stop_ids = {eot, self.special.get("<|end_of_text|>", eot)}
            self.header = [bos, start, *self.encode("user"), end, *self.encode("\n\n")]
            self.turn = [eot, start, *self.encode("assistant"), end, *self.encode("\n\n")]
        else:
            bos = self.special.get("<|begin_of_text|>")
            self.stop_ids = {i for name, i in self.special.items() if name in ("<|endoftext|>", "<|end_of_text|>")}
            self.header, self.turn = ([] if bos is None else [bos]), self.encode("\n")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; "<|im_end|>" in it stays ten letters, a byte that the vocabulary lacks is dropped."""
        return [i for i in self.bpe.encode_ordinary(text) if i < self.n_vocab]

    def decode(self, ids) -> str:
        """Text of ids; what is no UTF-8 (a character cut in two), or no token (a padded vocabulary), becomes U+FFFD."""
        parts = (self.bpe.decode_bytes([i]) if i in self.known else b"\xff" for i in ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def ask(self, question: str) -> list[int]:
        """What follows a document in the user's turn: the question, and the opening of the model's turn.

        header + document + ask(question) + answer is one conversation; header + document is what gets compressed.
        """
        return self.encode("\n\n" + question) + self.turn
