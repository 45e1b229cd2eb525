"""A case: a context, and several queries that its compressed cache must serve.

A *document* is a text that is compressed. A *context* is the chat header and the
document, as token ids. A *case* is a context with the queries about it. An
*article* is one text of a source; data/prepare.py, which stores them, calls it a
document.

Training makes its cases of plain text. What the student must answer decides what
the compressor learns. Five kinds of query can be in --mix, and all but `continue`
are questions in the chat format:
  continue   the text goes on
  recite     "Repeat the part of the text that starts with …"
  cloze      a sentence of the text with a word or two blanked out
  title      "What is TITLE?", answered by the article's one-line description
  fact       a sentence that we made up and put into the text is asked for
A sixth kind is asked only in the first phase, beside continue, cloze and title:
  replay     the document is repeated exactly
The document is one window of a long article, or several short articles in a row.
Then a question about one article has to find it. Sample i of a seed is the same
sample for everybody who asks for it.
"""
import math
import os
import random
import re
import sys
from dataclasses import dataclass, field

from data.prepare import Shard
from data.tokenizer import Tokenizer

KINDS = ("continue", "recite", "cloze", "title", "fact")
REPEAT = "\n\nRepeat the previous context exactly."
BLANK = "____"
# Where training asks for passages: a quarter at each end of the document, where
# compression may treat tokens differently, and the rest anywhere. Of the facts in a
# document, one is placed so, and the others anywhere. Of blanks, a quarter is in the
# last sentence.
PLACES = (None, None, "first", "last")

# Sentences that no text holds: (sentence, question, answer)
FACTS = (
    (
        "The parcel for {name} weighs {number} grams.",
        "How many grams does the parcel for {name} weigh?",
        "{number}",
    ),
    (
        "{name} grew up in {town} and later kept bees.",
        "In which town did {name} grow up?",
        "{town}",
    ),
    (
        "On the {day} of May the ferry to {town} is {word}.",
        "How is the ferry to {town} on the {day} of May?",
        "{word}",
    ),
    (
        "In the drawer of {name} lay a {word} {thing}.",
        "What lay in the drawer of {name}?",
        "a {word} {thing}",
    ),
    (
        "The {thing} was sold to {name} for {number} crowns.",
        "Who bought the {thing}?",
        "{name}",
    ),
    (
        "The locker of {name} opens with the code {code}.",
        "What is the code of the locker of {name}?",
        "{code}",
    ),
    (
        "In {town} the prize was won by ticket {code}.",
        "Which ticket won the prize in {town}?",
        "{code}",
    ),
)
FIRST_NAMES = "Tomas Ines Yusuf Greta Oskar Meera Pavel Lucia Hugo Noor Edith Karim"
LAST_NAMES = (
    "Brandt Okafor Lindqvist Moreau Castellan Ivarsson Whitlock Sato Dumitru Halloran"
)
WORDS = {
    "name": [f"{a} {b}" for a in FIRST_NAMES.split() for b in LAST_NAMES.split()],
    "town": (
        "Varnholt Escalona Tarnby Orsova Kilmore Beaugency Hallstrom Pirna Zadorra "
        "Mosty Ulverton Calder"
    ).split(),
    "word": (
        "late full crooked green cancelled empty velvet free cracked heavy painted "
        "slow copper doubtful"
    ).split(),
    "thing": (
        "lantern compass violin teapot ledger barometer saddle clock whistle atlas "
        "mirror sledge"
    ).split(),
    "day": "2nd 5th 9th 11th 14th 17th 20th 23rd 26th 30th".split(),
}


@dataclass
class Query:
    kind: str
    # Ids after the document: the question, and the opening of the model's turn. Of
    # `continue`, it is the first id of what follows.
    prompt: list[int]
    # The ids after the prompt, which the student must predict as the teacher does
    answer: list[int] = field(default_factory=list)
    # The accepted answers in evaluation; of the task `choice`, the right option
    gold: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)


@dataclass
class Case:
    context: list[int]  # the chat header and the document
    n_protect: int      # the first tokens, which are never dropped: the header
    queries: list[Query]
    unit: str = ""      # what the bootstrap draws: a document, or an article

    @property
    def n(self) -> int:
        """The number of compressible tokens."""
        return len(self.context) - self.n_protect


def make_case(
    tok: Tokenizer, document: list[int], queries: list[Query], unit: str = "",
) -> Case:
    """The document behind the chat header, which is protected.

    Without a header the first token is protected: attention rests there.
    """
    return Case(tok.header + document, max(1, len(tok.header)), queries, unit)


# ------------------------------------------------------------------ queries

def recite_query(
    rng, text: str, tok: Tokenizer, n_answer: int, at: str | None = None,
) -> Query | None:
    """Ask for a passage by its first words.

    The passage starts with a sentence, or else with any word.
    at: "first" for the beginning of the text, "last" for its last sentences;
        None for any place that n_answer tokens follow.
    Returns None if the text has no such place.
    """
    # A token has about five characters.
    late = max(0, len(text) - 5 * n_answer)
    begin, end = 0, late
    if at == "last":
        begin, end = late, len(text) - 40  # a few words must follow

    if at == "first":
        starts = [len(text) - len(text.lstrip())]
    else:
        # where a sentence or a line starts: after ". ", at the beginning, after "\n"
        sentences = re.finditer(r"(?:[.!?]\s+|^|\n)(?=\S)", text)
        words = re.finditer(r"\b(?=\w)", text)
        starts = [m.end() for m in sentences if begin <= m.end() < end]
        starts = starts or [m.end() for m in words if begin <= m.end() < end]
    if not starts:
        return None

    passage = text[rng.choice(starts):]
    cue = " ".join(passage.split()[:4])
    # Without blanks between words, these would be whole sentences.
    most = max(1, n_answer // 2)
    cue_ids = tok.encode(cue)
    if len(cue_ids) > most:
        cue = tok.decode(cue_ids[:most]).rstrip("\ufffd")  # half a character, at most
    prompt = tok.ask(f'Repeat the part of the text that starts with "{cue}".')
    # without tok.end: usually the passage is cut off, and the answer does not end there
    return Query("recite", prompt, tok.encode(passage)[:n_answer])


def cloze_query(rng, text: str, tok: Tokenizer, at: str | None = None) -> Query | None:
    """Blank out a name, a number or a long word of a sentence, and ask for it.

    at: "last" for the last sentence that has one; otherwise any sentence.
    """
    # one or two words with a capital: "Ada", "New York"
    names = r"[A-Z][\w’'-]*(?: [A-Z][\w’'-]*)?"
    # a name, a number or a word of 7 letters or more, but not as the first word
    blanks = re.compile(rf"(?<=\s)(?:{names}|\d[\d,.]*\d|[a-z]{{7,}})(?=[\s,.;])")

    found = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", text):
        sentence = sentence.strip()
        if 6 <= len(sentence.split()) <= 45:
            found += [(sentence, *m.span()) for m in blanks.finditer(sentence)]
    if not found:
        return None
    if at == "last":
        found = [blank for blank in found if blank[0] == found[-1][0]]

    sentence, begin, end = rng.choice(found)
    question = sentence[:begin] + BLANK + sentence[end:]
    prompt = tok.ask(f"Fill in the blank with words from the text: {question}")
    return Query("cloze", prompt, tok.encode(sentence[begin:end]) + tok.end)


def title_query(article: dict, tok: Tokenizer) -> Query:
    """article: an entry of Shard.docs, with "title" and "about"."""
    prompt = tok.ask(f"What is {article['title']}? Answer in a few words.")
    return Query("title", prompt, tok.encode(article["about"]) + tok.end)


def fact_query(rng, tok: Tokenizer) -> tuple[str, Query]:
    """A sentence to put into a text, and the question about it."""
    words = {kind: rng.choice(choices) for kind, choices in WORDS.items()}
    words["number"] = f"{rng.randrange(1000, 100_000):,}"
    words["code"] = str(rng.randrange(10 ** 4, 10 ** 9))
    sentence, question, answer = [part.format(**words) for part in rng.choice(FACTS)]

    prompt = tok.ask(f"{question} Answer in a few words.")
    return sentence, Query("fact", prompt, tok.encode(answer) + tok.end)


def insert_sentence(
    rng, ids: list[int], n: int, sentence: str, tok: Tokenizer, at: str | None = None,
) -> list[int]:
    """Put the sentence into the first n tokens.

    at: "first" for the beginning; "last" for the end of the n tokens, whatever it
        cuts; None for any place between two sentences, if there is one.
    """
    # joined=True: the ids stand in the middle of a text
    new = tok.encode(" " + sentence, joined=True)
    if at == "first":
        return tok.document(sentence) + tok.encode("\n\n", joined=True) + ids
    if at == "last":
        place = max(0, n - len(new))
        return ids[:place] + new + ids[place:]

    pieces = [tok.decode([i]) for i in ids[:n + 1]]
    places = []
    for place, (before, after) in enumerate(zip(pieces, pieces[1:]), start=1):
        if before.endswith((".", "!", "?")) and after[:1].isspace():
            places.append(place)
    if not places:
        return ids
    place = rng.choice(places)
    return ids[:place] + new + ids[place:]


# ------------------------------------------------------------------ samples

@dataclass
class Samples:
    """An endless stream of training cases: `samples(i)` is case i."""

    shards: list[Shard]   # one per source, drawn with equal chance
    tokenizer: Tokenizer
    n_context: int        # tokens of a document, which are the compressible ones
    mix: dict[str, int]   # queries per context, by kind, at most: a text without
                          # a description, or too short, has fewer
    n_answer: int = 48    # tokens of an answer to `recite`, and of a continuation
                          # with its first token
    seed: int = 0
    min_context: int = 0  # if it is not 0, lengths are drawn between it and
                          # n_context, with equal chance for each doubling

    def __post_init__(self):
        self.mix = dict(self.mix)
        described = any(d["about"] for shard in self.shards for d in shard.docs)
        if self.mix.get("title") and not described:
            self.replace_title_queries()

    def replace_title_queries(self) -> None:
        """Give the places of the title queries to the other kinds in turn."""
        n_title = self.mix.pop("title")
        # A text goes on in one way only, and is repeated in one way only.
        others = [k for k in self.mix
                  if k not in ("continue", "replay") and self.mix[k] > 0]
        if others:
            for i in range(n_title):
                self.mix[others[i % len(others)]] += 1
        else:
            self.mix["continue"] = 1

        # Of torchrun's processes, only the first one speaks.
        # The replay of the scorer's phase is no kind of --mix.
        if os.environ.get("RANK", "0") == "0" and "replay" not in self.mix:
            counts = ", ".join(f"{kind} {count}" for kind, count in self.mix.items())
            print(
                "no text has a description, so nothing can be asked about titles; "
                f"the queries of a context are {counts}",
                file=sys.stderr,
            )

    def window(self, rng, n: int, facts: list[str]) -> tuple:
        """A document of n tokens, with the sentences `facts` put into it: the last
        of them at an end of the document in half of all cases.

        Articles are drawn from one source until there are enough tokens. Of a
        long one a random part is taken. A fact may find no place, or be cut off
        at the end.
        Returns the document's ids, the n_answer ids that follow, and those
        articles with a description that lie in the document from beginning to end.
        """
        shard = self.shards[rng.randrange(len(self.shards))]
        gap = self.tokenizer.encode("\n\n", joined=True)
        # The facts will push what follows them to the right, so only articles
        # that end in the first `room` tokens are sure to lie in the document.
        room = n
        for sentence in facts:
            new = self.tokenizer.encode(" " + sentence, joined=True)
            room -= len(new) + len(gap)
        need = n + self.n_answer

        ids = []
        inside = []
        while len(ids) < need:
            i = rng.randrange(len(shard))
            text_ids = shard.tokens(i)
            start = rng.randrange(max(1, len(text_ids) - need + 1))
            piece = text_ids[start:start + need].tolist()
            if ids:
                ids += gap
            if len(ids) + len(piece) <= room and shard.docs[i]["about"]:
                inside.append(shard.docs[i])
            ids += piece

        for i, sentence in enumerate(facts):
            at = rng.choice(PLACES) if i == len(facts) - 1 else None
            ids = insert_sentence(rng, ids, n, sentence, self.tokenizer, at)
        return ids[:n], ids[n:need], inside

    def __call__(self, i: int) -> Case:
        tok = self.tokenizer
        rng = random.Random(f"{self.seed}/{i}")
        facts = [fact_query(rng, tok) for _ in range(self.mix.get("fact", 0))]
        n = self.n_context
        if self.min_context:
            low, high = math.log(self.min_context), math.log(self.n_context)
            n = round(math.exp(rng.uniform(low, high)))
        sentences = [sentence for sentence, _ in facts]
        ids, following, inside = self.window(rng, n, sentences)
        text = tok.decode(ids)
        goes_on = Query("continue", following[:1], following[1:])

        # A fact that found no place, or was cut off at the end, is not asked for.
        queries = [query for sentence, query in facts if sentence in text]
        for kind, count in self.mix.items():
            if kind == "continue":
                queries += [goes_on] * count
            elif kind == "recite":
                for _ in range(count):
                    at = rng.choice(PLACES)
                    queries.append(recite_query(rng, text, tok, self.n_answer, at))
            elif kind == "cloze":
                for _ in range(count):
                    queries.append(cloze_query(rng, text, tok, rng.choice(PLACES)))
            elif kind == "title":
                chosen = rng.sample(inside, min(count, len(inside)))
                queries += [title_query(article, tok) for article in chosen]
            elif kind == "replay":
                # joined=True: the request stands right behind the document
                prompt = tok.encode(REPEAT, joined=True) + tok.turn
                queries += [Query("replay", prompt, ids)] * count

        # A text may have no sentence to ask for, but it always goes on.
        queries = [query for query in queries if query is not None] or [goes_on]
        return make_case(tok, ids, queries)
