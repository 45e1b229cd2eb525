"""Text to token ids and back, and the chat format of the model's family.

A tokenizer.json holds byte-pair encoding (BPE) of one of two kinds:
  ByteLevel      merges bytes: SmolLM2, Llama 3, Qwen 2 and 3, Mistral's tekken
  SentencePiece  merges characters: Llama 2, Mistral 7B
The ids are those of the tokenizers library. What we cannot reproduce is refused.

Text from a user never becomes a special token, because `encode` knows none. Only
the chat format puts special tokens in, by their ids. Added tokens that are words,
such as Qwen3's <think>, are found in text, as the library finds them.
"""
import hashlib
import heapq
import re
import unicodedata
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import tiktoken

from run.errors import BadInput, expect, read_json, reading

# How a text is split before BPE. Only these public patterns are run: one from a
# stranger's file could take minutes for a word. SMOLLM is GPT-2's behind `Digits`:
# each digit is a piece of its own, and so are the blanks before it.
GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
SMOLLM = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tiktoken panics at a million blanks in a row, so longer runs are cut. The ids stay
# the same: tokens of many blanks have a power of two of them.
MAX_BLANKS = 1 << 14
LONG_BLANKS = re.compile(rf"(?<!\s)\s{{{MAX_BLANKS + 1},}}")


@dataclass(frozen=True)
class ChatFormat:
    user: str         # opens the user's turn
    with_system: str  # opens it behind a system prompt, {}
    reply: str        # ends the user's turn and opens the model's
    end: str          # ends an answer
    between: str = ""  # stands between an answer and the user's next turn


# A family is known by a mark in its chat template; the first one found counts.
CHATS = {
    # SmolLM2 and Qwen
    "<|im_start|>": ChatFormat(
        user="<|im_start|>user\n",
        with_system="<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n",
        reply="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        between="\n",
    ),
    # Llama 3
    "<|start_header_id|>": ChatFormat(
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        with_system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
                    "<|start_header_id|>user<|end_header_id|>\n\n",
        reply="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
    # Llama 2
    "<<SYS>>": ChatFormat(
        "[INST]", "[INST] <<SYS>>\n{}\n<</SYS>>\n\n", "[/INST]", "</s>", "<s>",
    ),
    # Mistral from version 7 of its tokenizer on, and before
    "[SYSTEM_PROMPT]": ChatFormat(
        "[INST]", "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT][INST]", "[/INST]", "</s>",
    ),
    "[INST]": ChatFormat("[INST]", "[INST]{}\n\n", "[/INST]", "</s>"),
}
# These never come out of text, even where a file calls them words.
MARK = re.compile(r"<\|\w+\|>|\[/?[A-Z_]+\]|</?s>|<unk>|<pad>")

# A template may bring a system prompt along. Llama 3.1's has dates in it; these
# are the ones that it takes where nobody knows the day.
DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system\n([^'\"{}|]+)<\|im_end\|>")
LLAMA31_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

# What else opens the model's turn: the empty block by which Qwen3 does not think, or
# the start of a block in a model that always thinks.
THINKING = re.compile(
    r"<think>\n\n</think>\n\n(?=['\"])|(?<=<\|im_start\|>assistant\n)<think>\n(?=['\"])"
)


# ------------------------------------------------------------ BPE of bytes

def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each of the 256 bytes, as {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    return alphabet | {chr(256 + i): b for i, b in enumerate(rest)}


def split_pattern(pre_tokenizer: dict) -> str:
    """The pattern that a tokenizer.json's pre_tokenizer stands for."""
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        steps = [step["type"] for step in before]
        if last.get("use_regex", True):
            if steps == []:
                return GPT2
            if steps == ["Digits"] and before[0].get("individual_digits"):
                return SMOLLM
        elif steps == ["Split"]:
            step = before[0]
            regex = step["pattern"].get("Regex")
            isolated = step["behavior"] == "Isolated" and not step.get("invert")
            if isolated and regex in (LLAMA3, QWEN2, TEKKEN):
                return regex
    raise ValueError(f"the pre-tokenizer {pre_tokenizer!r:.300} is not known here")


def read_merge(merge: str | list) -> tuple:
    """A pair of tokens. Older files write it as one text."""
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)


def made_by_merges(merges: list[tuple], vocab: dict[str, int]) -> set[str]:
    """The tokens that the library makes of their own bytes.

    A merge of a and b is never reached where an earlier one joins the end of a to
    the start of b. heads and tails: what begins and ends a token while it grows,
    each with the id of the token that takes it up.
    """
    # A merge whose part has a higher id is never reached, if each token is made.
    result = {(a, b): vocab[a + b] for a, b in merges}
    result = {pair: i for pair, i in result.items() if i > max(map(vocab.get, pair))}
    heads = {byte: [] for byte in byte_alphabet()}
    tails = dict(heads)
    for (a, b), i in result.items():
        if a + b in heads or a not in heads or b not in heads:
            continue

        left = [(a, i), *tails[a]]
        right = [(b, i), *heads[b]]
        crossed = any(
            result.get((x, y), i) < min(x_end, y_end + 1)
            for x, x_end in left for y, y_end in right
        )
        if not crossed:
            heads[a + b] = [(a, i), *heads[a]]
            tails[a + b] = [(b, i), *tails[b]]

    made = set(heads)
    if len(result) < len(merges) and not made.issuperset(vocab):
        raise ValueError("some tokens have no merge, some a lower id than their parts")
    return made


def has_all_merges(merges: list[tuple], vocab: dict[str, int]) -> bool:
    """Whether any two tokens that spell a third one have a merge."""
    cuts = ((token[:i], token[i:]) for token in vocab for i in range(1, len(token)))
    return sum(a in vocab and b in vocab for a, b in cuts) == len(set(merges))


def cut_long_blanks(text: str) -> Iterator[str]:
    start = 0
    for run in LONG_BLANKS.finditer(text):
        for cut in range(run.start() + MAX_BLANKS, run.end(), MAX_BLANKS):
            yield text[start:cut]
            start = cut
    yield text[start:]


class ByteLevel:
    """BPE of the bytes of a text, by tiktoken.

    pieces: {id: bytes}. rules: what the ids depend on besides the vocabulary.
    """

    blank_after_special = False  # see SentencePiece

    def __init__(self, spec: dict, special: dict[str, int]):
        model = spec["model"]
        normalizer = spec.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            raise ValueError(f"normalizer {normalizer!r:.100}, expected none or NFC")
        self.nfc = normalizer is not None
        pattern = split_pattern(spec["pre_tokenizer"])
        self.rules = [pattern, self.nfc]

        # tiktoken merges by id, the file lists merges by priority.
        vocab = {t: i for t, i in model["vocab"].items() if t not in special}
        merges = [read_merge(merge) for merge in model["merges"]]
        order = [vocab[a + b] for a, b in merges]
        if order != sorted(order):
            raise ValueError("the merges are not in the order of their ids")

        # tiktoken makes a token of any two that spell it, so it gets only tokens that
        # merges make. With ignore_merges any token may be a whole piece: it gets all,
        # which is right if any two have a merge (Llama 3).
        usable = set(vocab)
        whole_pieces = model.get("ignore_merges")
        if not whole_pieces or not has_all_merges(merges, vocab):
            usable = made_by_merges(merges, vocab)
        if whole_pieces and not usable.issuperset(vocab):
            raise ValueError("ignore_merges is true, and some tokens have no merge")
        alphabet = byte_alphabet()
        self.pieces = {i: bytes(alphabet[c] for c in t) for t, i in vocab.items()}
        ranks = {self.pieces[i]: i for t, i in vocab.items() if t in usable}
        self.vocabulary = sorted(ranks.items())

        # tiktoken wants a token for each byte, and SmolLM2 lacks 21: 13 that UTF-8
        # never uses, six control characters, two unassigned planes. They get ids
        # above the vocabulary, which `encode` drops. (The library drops them before it
        # merges, so it may join their neighbours.)
        self.n_ids = max(self.pieces) + 1
        for b in range(256):
            ranks.setdefault(bytes([b]), self.n_ids + b)
        self.bpe = tiktoken.Encoding(
            name="", pat_str=pattern, mergeable_ranks=ranks, special_tokens={},
        )

    def encode(self, text: str, joined: bool) -> list[int]:
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        ids = []
        for piece in cut_long_blanks(text):
            ids += [i for i in self.bpe.encode_ordinary(piece) if i < self.n_ids]
        return ids


# ------------------------------------------------------- BPE of characters

def blank_scheme(spec: dict) -> str:
    """Where a SentencePiece tokenizer puts a blank of its own before a text.

    prepend: always. always: unless there is one. first: as always, but not after
    a special token. never.
    """
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}

    normalizer = spec.get("normalizer") or {"normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    before = spec.get("pre_tokenizer")
    if before is None and steps == [prepend, replace]:
        return "prepend"
    if before is None and steps == [replace]:
        return "never"
    if not steps and metaspace.items() <= before.items():
        scheme = before.get("prepend_scheme", "always")
        if scheme in ("always", "first", "never"):
            return scheme
    raise ValueError(
        f"normalizer {steps!r:.200} and pre-tokenizer {before!r:.200}, expected "
        "Prepend and Replace, or a Metaspace that does not split (Llama 2, Mistral)"
    )


class SentencePiece:
    """BPE of characters. A blank is written ▁; what has no token is spelt in bytes.

    The attributes are those of ByteLevel.
    """

    def __init__(self, spec: dict, special: dict[str, int]):
        model = spec["model"]
        if model.get("ignore_merges"):
            raise ValueError("ignore_merges is true, expected false")
        self.scheme = blank_scheme(spec)
        self.blank_after_special = self.scheme in ("prepend", "always")
        self.vocab = {t: i for t, i in model["vocab"].items() if t not in special}
        self.bytes = [self.vocab[f"<0x{b:02X}>"] for b in range(256)]

        merges = [read_merge(merge) for merge in model["merges"]]
        self.ranks = {}
        for rank, (a, b) in enumerate(merges):
            if a + b in self.vocab:
                self.ranks[a, b] = rank
        self.rules = [self.scheme, merges]
        self.vocabulary = sorted(self.vocab.items())
        self.pieces = {i: t.replace("▁", " ").encode() for t, i in self.vocab.items()}
        self.pieces |= {i: bytes([b]) for b, i in enumerate(self.bytes)}

        # Where no token has a blank inside, words do not influence each other.
        crossing = any(re.search("[^▁]▁", a + b) for a, b in self.ranks)
        self.words = re.compile("(?s).+" if crossing else "▁+[^▁]*|[^▁]+")
        self.merge = lru_cache(1 << 16)(self.merge_word)  # for short words

    def merge_word(self, word: str) -> list[int]:
        """The ids of a word.

        Of all pairs of neighbours the one with the lowest rank is joined, the
        leftmost first, until no pair has a rank. A joined pair lies at the place
        of its left part; the places are a linked list.
        """
        n = len(word)
        parts = list(word)
        left = list(range(-1, n - 1))
        right = list(range(1, n + 1))
        heap = []

        def consider(i: int) -> None:
            if i >= 0 and right[i] < n:
                pair = (parts[i], parts[right[i]])
                if pair in self.ranks:
                    heapq.heappush(heap, (self.ranks[pair], i, pair))

        for i in range(n):
            consider(i)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = right[i]
            if j == n or pair != (parts[i], parts[j]):
                continue  # one of the two was joined to another part since

            parts[i] += parts[j]
            parts[j] = ""
            right[i] = right[j]
            if right[i] < n:
                left[right[i]] = i
            consider(i)
            consider(left[i])

        ids = []
        for part in parts:
            if part in self.vocab:
                ids.append(self.vocab[part])
            else:
                ids += [self.bytes[b] for b in part.encode("utf-8", "replace")]
        return ids

    def encode(self, text: str, joined: bool) -> list[int]:
        text = text.replace(" ", "▁")
        if text and not joined and self.scheme != "never":
            if self.scheme == "prepend" or text[0] != "▁":
                text = "▁" + text

        ids = []
        for word in self.words.findall(text):
            ids += self.merge(word) if len(word) < 64 else self.merge_word(word)
        return ids


# ---------------------------------------------------------------- tokenizer

def chat_template(folder: Path, config: dict) -> str:
    """The chat template of a model, or "" for a base model."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template") or ""
    if isinstance(found, list):  # several, by name
        by_name = {template["name"]: template["template"] for template in found}
        found = by_name.get("default", "")
    return expect(found, str)


def stop_ids_of_model(folder: Path) -> set[int]:
    """What ends an answer by generation_config.json, or else by config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        with reading(path, "expected the files of one model"):
            ids = read_json(path).get("eos_token_id") if path.exists() else None
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                return {expect(i, int) for i in ids}
    return set()


class Tokenizer:
    """Token ids of texts and of the pieces of a chat.

    A conversation is header + document(text) + ask(question) + answer +
    next_turn(question) + answer and so on. The header and the document are what is
    compressed. A model without a chat template is asked in plain text.

    folder: where tokenizer.json lies. system: a system prompt, in place of the
    one that the template brings along. Mistral's own one, which has the day's
    date in it, is left out.
    """

    def __init__(self, folder, system: str | None = None):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists() and (folder / "tokenizer.model").exists():
            raise BadInput(
                f"{folder}: tokenizer.model without a tokenizer.json; transformers "
                "writes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        with reading(path, "expected the tokenizer of SmolLM2, Llama, Qwen or Mistral"):
            spec = read_json(path)
            self.read_vocabulary(spec)

        path = folder / "tokenizer_config.json"
        with reading(path, "expected the tokenizer files of one model"):
            config = read_json(path) if path.exists() else {}
            template = chat_template(folder, config)
            names = [config.get("bos_token"), config.get("eos_token")]
            bos, eos = [t["content"] if isinstance(t, dict) else t for t in names]

            ends = {eos, "<|endoftext|>", "<|end_of_text|>", "</s>"}
            self.stop_ids = {i for name, i in self.special.items() if name in ends}
            self.stop_ids |= stop_ids_of_model(folder)
            self.system = system
            if template:
                self.set_chat(template, bos, folder)
            elif system is None:
                self.set_plain(spec)
            else:
                raise BadInput(
                    f"{folder}: no chat template, so no place for a system prompt; "
                    "use a chat model"
                )

    def read_vocabulary(self, spec: dict) -> None:
        model = spec["model"]
        if model["type"] != "BPE":
            raise ValueError(f"a {model['type']!r:.50} model")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise ValueError(f"{key} is {model[key]!r:.50}, expected none")

        added = spec.get("added_tokens") or []
        self.special = {t["content"]: t["id"] for t in added}
        words = [t for t in added if not t.get("special", True)]
        words = [t for t in words if not MARK.fullmatch(t["content"])]
        self.words = sorted(t["content"] for t in words)
        for word in words:
            flags = {key for key, value in word.items() if value is True}
            if flags - {"normalized"} or flags and spec.get("normalizer"):
                raise ValueError(f"the added token {word!r:.200} is not a plain word")
        ids = (model["vocab"] | self.special).values()
        in_range = all(0 <= expect(i, int) < 1 << 22 for i in ids)
        if not in_range or len(set(ids)) < len(ids):
            raise ValueError("the ids are not different numbers from 0 on")

        kind = SentencePiece if model.get("byte_fallback") else ByteLevel
        self.bpe = kind(spec, self.special)
        self.pieces = self.bpe.pieces | {i: t.encode() for t, i in self.special.items()}
        self.n_vocab = max(self.pieces) + 1

        # SmolLM2's fingerprint leaves its rules out. It is older than all other rules,
        # and shards and adapters hold it.
        hashed = [self.bpe.vocabulary, sorted(self.special.items())]
        if self.bpe.rules != [SMOLLM, False]:
            hashed.append(self.bpe.rules)
        if self.words:
            hashed.append(self.words)
        self.fingerprint = hashlib.sha256(repr(tuple(hashed)).encode()).hexdigest()

    def set_plain(self, spec: dict) -> None:
        """Plain text for a base model.

        Its header is the special token that it puts before any text, if any.
        """
        self.header = []
        post = spec.get("post_processor") or {}
        for step in post.get("processors", [post]):
            if step.get("type") == "TemplateProcessing":
                first = step["single"][0]
                if "SpecialToken" in first:
                    self.header = [self.special[first["SpecialToken"]["id"]]]
        self.document_prefix = ""
        self.document_joined = False
        self.turn = self.encode("\n", joined=True)
        self.end = self.turn
        self.next_user = self.end
        self.next_prefix = "\n"
        self.next_joined = True

    def set_chat(self, template: str, bos: str | None, folder: Path) -> None:
        family = next((mark for mark in CHATS if mark in template), None)
        if family is None:
            raise BadInput(
                f"{folder}: the chat template has none of the marks {', '.join(CHATS)}; "
                "delete chat_template from tokenizer_config.json, or the file "
                "chat_template.jinja, and the model is asked in plain text"
            )
        chat = CHATS[family]
        template = template.replace("\\n", "\n")
        system = self.system
        default = DEFAULT_SYSTEM.search(template)
        if system is None and default:
            system = default[1]
        if "Cutting Knowledge Date" in template:
            system = LLAMA31_SYSTEM + (system or "")

        # Some templates of Mistral put blanks after their marks. The first ones,
        # and Llama 2's, also put one before [/INST]: there the marks may be text.
        with_system = chat.with_system
        for mark in ("[INST]", "[SYSTEM_PROMPT]"):
            if mark + " " in template:
                with_system = with_system.replace(mark + "{", mark + " {")
        self.marks_are_text = " [/INST]" in template
        reply = " [/INST]" if self.marks_are_text else chat.reply
        thinking = THINKING.search(template)
        reply += thinking[0] if thinking else ""
        layout = chat.user if system is None else with_system

        begins = bos and ("bos_token" in template or bos in template.replace(family, ""))
        begin = [self.special[bos]] if begins else []
        no_blank = not self.bpe.blank_after_special
        self.header = begin + self.marked(layout, bool(begin) and no_blank, system)
        self.turn = self.marked(reply, True)
        self.end = [self.special[chat.end]]
        self.stop_ids.add(self.end[0])

        # A document may follow text, or a special token.
        after_blank = layout.endswith("[INST]") and "[INST] " in template
        self.document_prefix = " " if after_blank else ""
        after_text = layout.endswith("\n") or "[INST]" not in self.special
        self.document_joined = no_blank or after_text

        # And so may the user's next turn.
        in_brackets = chat.user == "[INST]"
        self.next_user = self.end + self.marked(chat.between + chat.user, no_blank)
        self.next_prefix = " " if in_brackets and "[INST] " in template else ""
        self.next_joined = no_blank or not in_brackets or "[INST]" not in self.special

    def marked(self, layout: str, joined: bool, system: str | None = None) -> list[int]:
        """Ids of a layout, whose marks become special tokens.

        The system prompt is filled in afterwards, so no mark in it does.
        """
        names = set(self.special)
        if not self.marks_are_text:
            names.update(MARK.findall(layout))

        def fill(section: str, joined: bool) -> list[int]:
            return self.encode(section.replace("{}", system or ""), joined)

        return self.split_at(names, layout, joined, fill)

    def split_at(self, names, text: str, joined: bool, encode) -> list[int]:
        """Ids of a text in which each of the names is one id."""
        longest_first = sorted(names, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # which never matches
        ids = []
        for section in re.split(f"({pattern})", text):
            if section in names:
                ids.append(self.special[section])
                joined = not self.bpe.blank_after_special
            elif section:
                ids += encode(section, joined)
        return ids

    def encode(self, text: str, joined: bool = False) -> list[int]:
        """Ids of plain text: "<|im_end|>" in it stays ten letters.

        joined: the text goes on from other text. (SentencePiece begins a new text
        with a blank of its own.)
        """
        return self.split_at(self.words, text, joined, self.bpe.encode)

    def decode(self, ids) -> str:
        """Text of ids. What is no UTF-8, such as half a character, becomes U+FFFD."""
        pieces = [self.pieces.get(i, b"\xff") for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_spans(self, ids: list[int], text: str, spans) -> list[tuple[int, int]]:
        """Spans (start, end) of a text's characters -> of the ids that hold them.

        ids: document(text.strip()). Errors: BadInput for a span that is not in the
        text, or a text that cannot be found in its ids.
        """
        pieces = [self.pieces[i] for i in ids]
        encoded = text.strip().encode()
        ends = list(accumulate(map(len, pieces)))  # in bytes
        n_before = ends[-1] - len(encoded)  # of the blank that some tokenizers put first
        if spans and (n_before > 1 or not b"".join(pieces).endswith(encoded)):
            raise BadInput(
                "the tokenizer changes letters of this text, so parts of it cannot be "
                "found; write it in Unicode's form NFC, without control characters"
            )
        n_before -= len(text.encode()) - len(text.lstrip().encode())

        found = []
        for start, end in spans:
            if not 0 <= start < end <= len(text):
                raise BadInput(
                    f"keep has ({start}, {end}), expected a start and a larger end "
                    f"within the {len(text)} characters of the text"
                )
            first = bisect(ends, n_before + len(text[:start].encode()))
            last = bisect(ends, n_before + len(text[:end].encode()) - 1)
            found.append((first, last + 1))
        return found

    def document(self, text: str) -> list[int]:
        """Ids of a text that follows the header."""
        return self.encode(self.document_prefix + text, self.document_joined)

    def ask(self, question: str) -> list[int]:
        """Ids of a question that follows the document, and of the model's turn."""
        return self.encode("\n\n" + question, joined=True) + self.turn

    def next_turn(self, question: str) -> list[int]:
        """Ids of what follows an answer: its end, a question, and the model's turn."""
        question = self.encode(self.next_prefix + question, self.next_joined)
        return self.next_user + question + self.turn
