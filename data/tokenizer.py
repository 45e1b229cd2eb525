"""Text to token ids and back, from a tokenizer.json; and how the model's family writes a chat.

Two kinds of byte-pair encoding: of bytes (SmolLM2, Llama 3, Qwen2 and 3, Mistral's tekken), by tiktoken; and
SentencePiece's of characters (Llama 2, Mistral 7B), below. A tokenizer that would get other ids than its own library
gives is refused.

Text from a user can never become a special token: `encode` knows none, and the special tokens of the chat format are
put in by id, by `marked`, and nowhere else.
"""
import hashlib
import heapq
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import tiktoken

from run.errors import BadInput, read_json, reading

# How text is cut before BPE: the public patterns. A pattern from a stranger's file could run for minutes on a word, so
# no other is run. SMOLLM is GPT-2's after `Digits`: a digit is always a piece of its own, and the white space before a
# digit is one piece (GPT-2 would keep its last blank for the number).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# A run of that many characters with, or without, white space is cut: tiktoken panics at a million blanks. A power of
# two, for tokens of blanks are that long: cut or whole, their ids are the same.
RUN = 1 << 14
LONG = re.compile(rf"(?<!\s)\s{{{RUN + 1},}}|(?<!\S)\S{{{RUN + 1},}}")
SAFE = re.compile(r"(?<=[^\W\d_])(?=[\d,.;:!?()，。；：！？、「」])")  # between these every pattern above cuts as well

# A family by a mark of its chat template: what opens the user's turn, the same with a system prompt, what ends it and
# opens the model's, and what ends an answer.
CHATS = {
    "<|im_start|>": (  # SmolLM2, Qwen
        "<|im_start|>user\n", "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "<|start_header_id|>": (  # Llama 3
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "<<SYS>>": ("[INST]", "[INST] <<SYS>>\n{}\n<</SYS>>\n\n", "[/INST]", "</s>"),                  # Llama 2
    "[SYSTEM_PROMPT]": ("[INST]", "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT][INST]", "[/INST]", "</s>"),  # Mistral, v7
    "[INST]": ("[INST]", "[INST]{}\n\n", "[/INST]", "</s>"),                                      # Mistral before
}
MARK = re.compile(r"<\|\w+\|>|\[/?INST\]|\[/?SYSTEM_PROMPT\]")
DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}|]+)<\|im_end\|>")  # the literal in a template
LLAMA31 = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # where no date is known


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
        if kinds == ["Split", "ByteLevel"] and not own_regex:
            regex = steps[0]["pattern"].get("Regex")
            isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
            if regex in (LLAMA3, QWEN2, TEKKEN) and isolated:
                return regex
            raise BadInput(f"{path}: the pre-tokenizer's pattern {str(regex)[:60]!r} is not Llama 3's, Qwen2's or "
                           "tekken's; a pattern that is not known is not run")
    raise BadInput(f"{path}: pre-tokenizer {kinds or None} is not one of ByteLevel, Digits + ByteLevel (SmolLM2), "
                   "Split + ByteLevel (Llama 3, Qwen2, tekken); its ids would be wrong, so it is refused")


def parts(text: str) -> Iterator[str]:
    """The text, cut in very long runs only: where every pattern cuts too, or if there is no such place, by length."""
    start = 0
    for run in LONG.finditer(text):
        cut = run.start()
        while run.end() - cut > RUN:
            safe = [m.start() for m in SAFE.finditer(text, cut + 1, cut + RUN)]
            cut = safe[-1] if safe else cut + RUN
            yield text[start:cut]
            start = cut
    yield text[start:]


class ByteLevel:
    """BPE of the bytes of a text's pieces. `pieces`: id -> bytes; `how`: all else that ids depend on."""

    first = True  # nothing is put before a text (see SentencePiece)

    def __init__(self, spec: dict, special: dict[str, int], path):
        model, normalizer = spec["model"], spec.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            raise BadInput(f"{path}: normalizer {normalizer['type']} is not supported, expected none or NFC")
        pattern, self.nfc = pattern_of(spec.get("pre_tokenizer"), path), normalizer is not None
        self.how = [pattern, self.nfc]
        alphabet = byte_alphabet()
        try:
            ranks = {bytes(alphabet[c] for c in token): i for token, i in model["vocab"].items()
                     if token not in special}
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
        self.vocabulary = sorted(ranks.items())
        self.pieces = {i: token for token, i in ranks.items()}
        # SmolLM2 has no token for 21 bytes: 13 that UTF-8 never uses, six control characters, two unassigned planes.
        # tiktoken wants all 256, so the missing ones get ids above the vocabulary, which `encode` drops.
        self.end = max(self.pieces) + 1
        for b in range(256):
            ranks.setdefault(bytes([b]), self.end + b)
        self.bpe = tiktoken.Encoding(name=str(path), pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, joined: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return [i for part in parts(text) for i in self.bpe.encode_ordinary(part) if i < self.end]


class SentencePiece:
    """BPE of characters, a blank being ▁; what the vocabulary lacks is spelt in bytes. Attributes as ByteLevel's."""

    def __init__(self, spec: dict, special: dict[str, int], path):
        model, normalizer, pre = spec["model"], spec.get("normalizer"), spec.get("pre_tokenizer")
        prepend = {"type": "Prepend", "prepend": "▁"}
        blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
        scheme, meta = None, {"type": "Metaspace", "replacement": "▁", "split": False}
        if pre is None and steps in ([prepend, blank], [blank]):
            scheme = "prepend" if len(steps) == 2 else "never"
        elif not steps and pre and meta.items() <= pre.items():
            scheme = pre.get("prepend_scheme", "always")
        if scheme not in ("prepend", "always", "first", "never") or model.get("ignore_merges"):
            raise BadInput(f"{path}: normalizer {[s.get('type') for s in steps]}, pre-tokenizer {pre!r:.200}, "
                           f"ignore_merges {model.get('ignore_merges')!r}; expected Prepend + Replace, or Metaspace "
                           "that does not split, of ▁ (Llama 2, Mistral), and false")
        vocab = {t: i for t, i in model["vocab"].items() if t not in special}
        self.bytes = [vocab[f"<0x{b:02X}>"] for b in range(256)]
        self.vocab, self.scheme, self.first = vocab, scheme, scheme in ("first", "never")
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        self.ranks = {(a, b): r for r, (a, b) in enumerate(pairs) if a + b in vocab}
        crossing = any(re.search("[^▁]▁", a + b) for a, b in self.ranks)  # else a text falls into words
        self.words = re.compile("(?s).+" if crossing else "▁+[^▁]*|[^▁]+")
        self.how, self.vocabulary = [scheme, pairs], sorted(vocab.items())
        self.pieces = {i: t.replace("▁", " ").encode() for t, i in vocab.items()}
        self.pieces |= {i: bytes([b]) for b, i in enumerate(self.bytes)}
        self.word = lru_cache(1 << 16)(self.merged)

    def merged(self, word: str) -> list[int]:
        """Ids of a word: of all neighbours the pair with the lowest rank is joined, the leftmost first, and again."""
        at, n, heap = list(word), len(word), []
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))

        def consider(i: int) -> None:
            if i >= 0 and right[i] < n and (pair := (at[i], at[right[i]])) in self.ranks:
                heapq.heappush(heap, (self.ranks[pair], i, pair))

        for i in range(n):
            consider(i)
        while heap:
            _, i, (a, b) = heapq.heappop(heap)
            j = right[i]
            if at[i] == a and j < n and at[j] == b:  # else one of them has been joined to another since
                at[i], at[j], right[i] = a + b, "", right[j]
                if right[j] < n:
                    left[right[j]] = i
                consider(i)
                consider(left[i])
        return [i for t in at if t for i in ([self.vocab[t]] if t in self.vocab else
                                             [self.bytes[b] for b in t.encode("utf-8", "replace")])]

    def encode(self, text: str, joined: bool) -> list[int]:
        text = text.replace(" ", "▁")
        if text and not joined and (self.scheme == "prepend" or self.scheme != "never" and text[0] != "▁"):
            text = "▁" + text
        return [i for word in self.words.findall(text)
                for i in (self.word if len(word) < 64 else self.merged)(word)]


def chat_template(folder: Path, config: dict) -> str:
    """The model's own, in any of the places that transformers has kept it; "" for a base model."""
    path = folder / "chat_template.jinja"
    if path.exists():
        with reading(path):
            return path.read_text(encoding="utf-8")
    path, found = folder / "chat_template.json", config.get("chat_template")
    if found is None and path.exists():
        found = read_json(path).get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((t["template"] for t in found if t["name"] == "default"), None)
    if not isinstance(found, str | None):
        raise BadInput(f"{folder}: chat_template is a JSON {type(found).__name__}, expected a text")
    return found or ""


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`, and the pieces of a chat: `header`, `document(text)`,
    `ask(question)`, `end` (of an answer), `stop_ids`. A model without a chat template is asked in plain text.

    Args: folder: where tokenizer.json lies; system: a system prompt, in place of the one that the template brings
    along (Mistral's, with the day's date in it, is left out). Errors: BadInput for anything that is not understood.
    """

    def __init__(self, folder, system: str | None = None):
        folder, path = Path(folder), Path(folder) / "tokenizer.json"
        if not path.exists() and (folder / "tokenizer.model").exists():
            raise BadInput(f"{folder}: tokenizer.model without a tokenizer.json; transformers writes one: "
                           f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        with reading(path):
            spec = read_json(path)
            model = spec["model"]
            if model["type"] != "BPE":
                raise BadInput(f"{path}: a {model['type']} model, expected BPE (SmolLM2, Llama, Qwen, Mistral)")
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
                if model.get(key):
                    raise BadInput(f"{path}: {key} is {model[key]!r}, expected none")
            self.special = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
            ids = model["vocab"] | self.special
            if not all(type(i) is int and 0 <= i < 1 << 22 for i in ids.values()) or len({*ids.values()}) < len(ids):
                raise BadInput(f"{path}: the ids of the vocabulary are not all different whole numbers from 0 on")
            self.bpe = (SentencePiece if model.get("byte_fallback") else ByteLevel)(spec, self.special, path)
            self.pieces = self.bpe.pieces | {i: t.encode() for t, i in self.special.items()}
            self.n_vocab = max(self.pieces) + 1
            # what SmolLM2 does is left out: shards and adapters made before `how` was looked at hold
            how = () if self.bpe.how == [SMOLLM, False] else (self.bpe.how,)
            vocabulary = repr((self.bpe.vocabulary, sorted(self.special.items()), *how))
            self.fingerprint = hashlib.sha256(vocabulary.encode()).hexdigest()
        path = folder / "tokenizer_config.json"
        with reading(path):
            self.set_chat(folder, spec, read_json(path) if path.exists() else {}, system)

    def set_chat(self, folder: Path, spec: dict, config: dict, system: str | None) -> None:
        self.system, self.before, self.joined = system, "", False  # the latter two: how a document follows the header
        bos, eos = (t["content"] if isinstance(t, dict) else t for t in map(config.get, ("bos_token", "eos_token")))
        template = chat_template(folder, config)
        ends = {eos, "<|endoftext|>", "<|end_of_text|>", "</s>"}
        self.stop_ids = {i for name, i in self.special.items() if name in ends}
        if not template:
            if system is not None:
                raise BadInput(f"{folder}: no chat template, so no place for a system prompt; use a chat model")
            post = spec.get("post_processor") or {}
            starts = [s["single"][0] for s in post.get("processors", [post]) if s.get("type") == "TemplateProcessing"]
            self.header = [self.special[s["SpecialToken"]["id"]] for s in starts[:1] if "SpecialToken" in s]
            self.turn = self.end = self.encode("\n", joined=True)
            return
        family = next((mark for mark in CHATS if mark in template), None)
        if family is None:
            raise BadInput(f"{folder}: the chat template has none of the marks known here ({', '.join(CHATS)}); "
                           "without a chat_template the model is asked in plain text")
        alone, with_system, turn, end = CHATS[family]
        if system is None and (found := DEFAULT_SYSTEM.search(template)):
            system = found[1]
        if "Cutting Knowledge Date" in template:  # Llama 3.1 on
            system = LLAMA31 + (system or "")
        for name in ("[INST]", "[SYSTEM_PROMPT]"):  # some templates have a blank after them, and before the last one
            if name + " " in template:
                with_system = with_system.replace(name + "{", name + " {")
        text_marks = " [/INST]" in template  # the first Mistrals and Llama 2 write these as text
        turn = " [/INST]" if text_marks else turn

        def mark(name: str) -> int:
            if name not in self.special:
                raise BadInput(f"{folder}: the chat template's mark {name} is no special token of tokenizer.json; "
                               "expected files of one model")
            return self.special[name]

        def marked(layout: str, joined: bool) -> list[int]:
            """Ids of a layout: marks become special tokens; the system prompt, filled in after, cannot."""
            ids, marks = [], [m for m in MARK.findall(layout) if m in self.special or not text_marks]
            for section in re.split(f"({'|'.join(map(re.escape, marks))})", layout) if marks else [layout]:
                if section in marks:
                    ids.append(mark(section))
                    joined = self.bpe.first
                elif section:
                    ids += self.encode(section.replace("{}", system or ""), joined)
            return ids

        begin, layout = [mark(bos)] if "bos_token" in template and bos else [], alone if system is None else with_system
        self.header = begin + marked(layout, bool(begin) and self.bpe.first)
        self.before = " " * (layout.endswith("[INST]") and "[INST] " in template)
        self.joined = self.bpe.first or layout.endswith("\n") or "[INST]" not in self.special  # it follows text
        self.turn = marked(turn, True)
        self.end = [mark(end)]
        self.stop_ids.add(self.end[0])

    def encode(self, text: str, joined: bool = False) -> list[int]:
        """Ids of plain text; "<|im_end|>" in it stays ten letters, a byte that the vocabulary lacks is dropped.
        joined: it goes on from other text (SentencePiece begins a text with a blank of its own)."""
        return self.bpe.encode(text, joined)

    def document(self, text: str) -> list[int]:
        """Ids of a text that follows the header."""
        return self.encode(self.before + text, self.joined)

    def decode(self, ids) -> str:
        """Text of ids; what is no UTF-8 (a character cut in two), or no token (a padded vocabulary), becomes U+FFFD."""
        return b"".join(self.pieces.get(i, b"\xff") for i in ids).decode("utf-8", errors="replace")

    def ask(self, question: str) -> list[int]:
        """What follows a document in the user's turn: the question, and the opening of the model's turn.

        header + document(text) + ask(question) + answer + end is one conversation; header + document are compressed.
        """
        return self.encode("\n\n" + question, joined=True) + self.turn
