"""Cases: a context and several queries that a short cache of it must serve; and how training makes them of plain text.

What the student must answer decides what the compressor learns, so there are five kinds, each in the model's chat
format, each made of the text alone:
  continue   the text goes on
  recite     "Repeat the part of the text that starts with …"
  cloze      a sentence of the text with a word or two blanked out
  title      "What is TITLE?" -> the article's one-line description
  fact       a sentence of our own making, put between two sentences of the text, is asked for
A context is one window of a long document, or several short articles one after the other, so that a question about
one of them has to find it. Sample i of a seed is always the same sample, whoever asks for it.
"""
import random
import re
from dataclasses import dataclass, field

import torch

from data.prepare import Shard
from data.tokenizer import Tokenizer

KINDS = ("continue", "recite", "cloze", "title", "fact")
REPEAT = "\n\nRepeat the previous context exactly."
BLANK = "____"

# sentences that no text holds, and what they answer
FACTS = (
    ("The parcel for {name} weighs {number} grams.", "How many grams does the parcel for {name} weigh?", "{number}"),
    ("{name} grew up in {town} and later kept bees.", "In which town did {name} grow up?", "{town}"),
    ("On the {day} of May the ferry to {town} is {word}.", "How is the ferry to {town} on the {day} of May?", "{word}"),
    ("In the drawer of {name} lay a {word} {thing}.", "What lay in the drawer of {name}?", "a {word} {thing}"),
    ("The {thing} was sold to {name} for {number} crowns.", "Who bought the {thing}?", "{name}"),
)
WORDS = {
    "name": [f"{a} {b}" for a in "Tomas Ines Yusuf Greta Oskar Meera Pavel Lucia Hugo Noor Edith Karim".split()
             for b in "Brandt Okafor Lindqvist Moreau Castellan Ivarsson Whitlock Sato Dumitru Halloran".split()],
    "town": "Varnholt Escalona Tarnby Orsova Kilmore Beaugency Hallstrom Pirna Zadorra Mosty Ulverton Calder".split(),
    "word": "late full crooked green cancelled empty velvet free cracked heavy painted slow copper doubtful".split(),
    "thing": "lantern compass violin teapot ledger barometer saddle clock whistle atlas mirror sledge".split(),
    "day": "2nd 5th 9th 11th 14th 17th 20th 23rd 26th 30th".split(),
}


@dataclass
class Query:
    kind: str
    prompt: list[int]                                # ids after the document: the question, the model's turn opened
    answer: list[int] = field(default_factory=list)  # ids that the student must predict as the teacher does
    gold: list[str] = field(default_factory=list)    # accepted answers (of `choice`: the right option)
    options: list[str] = field(default_factory=list)


@dataclass
class Case:
    context: list[int]  # chat header and document
    n_protect: int      # its first tokens, the header, are kept whole
    queries: list[Query]
    unit: str = ""      # what the bootstrap draws: the document, or the article that several documents share

    @property
    def n(self) -> int:  # N: compressible tokens
        return len(self.context) - self.n_protect


def case(tok: Tokenizer, document: list[int], queries: list[Query], unit: str = "") -> Case:
    """The document behind the chat header. Without a header its first token is protected: attention rests there."""
    return Case(tok.header + document, max(1, len(tok.header)), queries, unit)


def sentences(text: str) -> list[str]:
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", text) if 6 <= len(s.split()) <= 45]


def recite(rng, text: str, tok: Tokenizer, n_answer: int) -> Query | None:
    """Ask for a passage by its first words. The passage starts with a sentence where it can."""
    early = text[:-5 * n_answer]  # a token is about five characters: from here on, enough text follows
    starts = [m.end() for m in re.finditer(r"(?:[.!?]\s+|^|\n)(?=\S)", early)]
    starts = starts or [m.start() for m in re.finditer(r"\b\w", early)]
    if not starts:
        return None
    passage = text[rng.choice(starts):]
    cue = " ".join(passage.split()[:4])
    prompt = tok.ask(f'Repeat the part of the text that starts with "{cue}".')
    return Query("recite", prompt, tok.encode(passage)[:n_answer])


def cloze(rng, text: str, tok: Tokenizer) -> Query | None:
    """Blank out a name, a number or a long word of one sentence, and ask for it."""
    picks = []
    for s in sentences(text):
        for m in re.finditer(r"(?<=\s)(?:[A-Z][\w’'-]*(?: [A-Z][\w’'-]*)?|\d[\d,.]*\d|[a-z]{7,})(?=[\s,.;])", s):
            picks.append((s, m.start(), m.end()))
    if not picks:
        return None
    s, i, j = rng.choice(picks)
    prompt = tok.ask(f"Fill in the blank with words from the text: {s[:i]}{BLANK}{s[j:]}")
    return Query("cloze", prompt, tok.encode(s[i:j]) + tok.end)


def fact(rng, tok: Tokenizer) -> tuple[str, Query]:
    """A sentence to put into a text, and the question about it."""
    words = {k: rng.choice(v) for k, v in WORDS.items()} | {"number": f"{rng.randrange(1000, 100_000):,}"}
    sentence, question, answer = (x.format(**words) for x in rng.choice(FACTS))
    return sentence, Query("fact", tok.ask(f"{question} Answer in a few words."), tok.encode(answer) + tok.end)


def put_in(rng, ids: list[int], n: int, sentence: str, tok: Tokenizer) -> list[int]:
    """The ids with the sentence between two sentences that end within the first n; as they were if there is none."""
    ends, starts = [tok.decode([i]) for i in ids[:n]], [tok.decode([i]) for i in ids[1:n + 1]]
    places = [j + 1 for j, (a, b) in enumerate(zip(ends, starts)) if a.endswith((".", "!", "?")) and b[:1].isspace()]
    if not places:
        return ids
    at = rng.choice(places)
    return ids[:at] + tok.encode(" " + sentence, joined=True) + ids[at:]


def about(title: str, description: str, tok: Tokenizer) -> Query:
    prompt = tok.ask(f"What is {title}? Answer in a few words.")
    return Query("title", prompt, tok.encode(description) + tok.end)


class Samples:
    """An endless, addressable stream: `samples(i)` -> Case.

    Args: shards: one per source, drawn with equal chance; n_context: compressible tokens per context;
    mix: queries per context, {kind: how many}; n_answer: tokens of text that goes on or is recited; shortest: lengths
    are drawn evenly from here to n_context, 0: all are n_context.
    """

    def __init__(self, shards: list[Shard], tokenizer: Tokenizer, n_context: int, mix: dict[str, int],
                 n_answer: int = 48, seed: int = 0, shortest: int = 0):
        self.shards, self.tok, self.n_context, self.shortest = shards, tokenizer, n_context, shortest
        self.mix, self.n_answer, self.seed = mix, n_answer, seed

    def window(self, rng, n: int, facts: list[str]) -> tuple[list[int], list[int], list[dict]]:
        """A context of n tokens with the facts in it, the tokens that follow it, and the articles that lie in it as a
        whole."""
        shard, gap = self.shards[rng.randrange(len(self.shards))], self.tok.encode("\n\n", joined=True)
        need, ids, inside = n + self.n_answer, [], []
        room = n - sum(len(self.tok.encode(" " + s, joined=True)) for s in facts)
        while len(ids) < need:
            i = rng.randrange(len(shard))
            doc = shard.tokens(i)
            at = rng.randrange(max(1, len(doc) - need + 1))  # any part of a document longer than the window
            piece = doc[at:at + need].tolist()
            ids += gap if ids else []
            if len(ids) + len(piece) <= room and shard.docs[i]["about"]:
                inside.append(shard.docs[i])
            ids += piece
        for s in facts:
            ids = put_in(rng, ids, n, s, self.tok)
        return ids[:n], ids[n:need], inside

    def __call__(self, i: int) -> Case:
        rng = random.Random(f"{self.seed}/{i}")
        facts = [fact(rng, self.tok) for _ in range(self.mix.get("fact", 0))]
        n = rng.randint(self.shortest, self.n_context) if self.shortest else self.n_context
        ids, following, inside = self.window(rng, n, [sentence for sentence, _ in facts])
        text = self.tok.decode(ids)
        out = [query for sentence, query in facts if sentence in text]  # not those that were cut off
        for kind, count in self.mix.items():
            if kind == "title":
                out += [about(d["title"], d["about"], self.tok) for d in rng.sample(inside, min(count, len(inside)))]
            elif kind == "replay":  # what the scorer is taught from: the whole context, once more
                out += [Query(kind, self.tok.encode(REPEAT, joined=True) + self.tok.turn, ids)] * count
            elif kind == "continue":
                out += [Query(kind, following[:1], following[1:])] * count
            elif kind != "fact":
                made = [recite(rng, text, self.tok, self.n_answer) if kind == "recite" else cloze(rng, text, self.tok)
                        for _ in range(count)]
                out += [c for c in made if c is not None]
        if not out:  # no title, no sentence to blank out: a context without any query would teach nothing
            out = [Query("continue", following[:1], following[1:])]
        return case(self.tok, ids, out)


@dataclass
class Batch:
    tokens: torch.Tensor        # (B, N) int64 contexts, padded on the right
    lengths: torch.Tensor       # (B,) int64
    protect: torch.Tensor       # (B, N) bool
    cont: torch.Tensor          # (B, T) int64, prompts and answers of a context one after the other
    segments: torch.Tensor      # (B, T) int64, which query; -1 for padding
    supervised: torch.Tensor    # (B, T) bool: the prediction made *at* this token counts
    answers: torch.Tensor       # (B, T) bool: and it is that of an answer's token


def collate(cases: list[Case], prompts: bool = False) -> Batch:
    """Cases as tensors. With `prompts`, the words of a question are supervised too: the teacher has an opinion on
    them as well, and a cloze sentence is nearly all copied from the document."""
    B = len(cases)
    N = max(len(c.context) for c in cases)
    T = max(sum(len(q.prompt) + len(q.answer) for q in c.queries) for c in cases)
    no = torch.zeros(B, T, dtype=torch.bool)
    b = Batch(torch.zeros(B, N, dtype=torch.long), torch.tensor([len(c.context) for c in cases]),
              torch.zeros(B, N, dtype=torch.bool), torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -1),
              no, no.clone())
    for i, c in enumerate(cases):
        b.tokens[i, :len(c.context)] = torch.tensor(c.context)
        b.protect[i, :c.n_protect] = True
        at = 0
        for j, q in enumerate(c.queries):
            middle, end = at + len(q.prompt), at + len(q.prompt) + len(q.answer)
            b.cont[i, at:end] = torch.tensor(q.prompt + q.answer)
            b.segments[i, at:end] = j
            b.answers[i, middle - 1:end - 1] = True  # position t predicts token t + 1
            b.supervised[i, (at if prompts else middle - 1):end - 1] = True
            at = end
    return b
