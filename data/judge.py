"""How an answer from a short cache is judged: against the full cache's distribution, by likelihood, or as text."""
import time

import torch

from data.samples import Continuation, Sample, collate
from data.tasks import MAX_NEW_TOKENS, METRICS, SQUAD_END, Case, tokens_with
from model import Cache, Llama, generate

AT_ONCE = 8  # caches in one batch: the logits of each take 14 MB for 70 answer tokens in fp32


def clock(model: Llama) -> float:
    """Seconds, once the device has done all that it was asked to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def divergence(log_q, log_p):
    """KL(p ‖ q) and Jensen-Shannon divergence in nats, and top-1 agreement (1 or 0), per row: (R, V) fp32 -> (3, R)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).clamp(min=1e-38).log()
    kl = torch.linalg.vecdot(p, log_p - log_q)
    js = (torch.linalg.vecdot(p, log_p - log_m) + torch.linalg.vecdot(q, log_q - log_m)) / 2
    return torch.stack([kl.clamp(min=0), js.clamp(min=0), (log_q.argmax(-1) == log_p.argmax(-1)).float()])


def stack(caches: list[Cache]) -> Cache:
    """Caches of equal shapes as the rows of one."""
    layers = lambda name: [torch.cat(x) for x in zip(*(getattr(c, name) for c in caches))]  # noqa: E731
    return Cache(layers("k"), layers("v"),
                 *(torch.cat([getattr(c, x) for c in caches]) for x in ("bias", "positions", "next_position")))


class Judge:
    """Asks a case's queries of caches and scores the answers: judge(caches) -> for each cache, one dict per query, with
    "kind", "weight", the task's metrics, and for generated answers the "prediction".

    at_once: how many caches of equal shapes may come together. Fidelity reads the same few tokens on top of each of
    them, so they are the rows of one batch (of long documents fewer: they wait for each other, and are copied); what
    generates or is timed comes one by one.
    """

    def __init__(self, task: str, model: Llama, tokenizer, case: Case, full: Cache):
        self.task, self.model, self.tok, self.case = task, model, tokenizer, case
        self.at_once = max(1, min(AT_ONCE, 4096 // case.n)) if task == "fidelity" else 1
        if task == "fidelity":
            parts = [(q.prompt, q.answer) for q in case.queries]
            self.forms = self.packed(parts)
            self.which = torch.cat([torch.full((len(ids),), i) for i, (_, ids) in enumerate(parts)])
            self.teacher, = self.log_probabilities(self.forms, [full])

    def packed(self, parts: list[tuple[list[int], list[int]]]):
        """Teacher-forced (prompt, answer) pairs as tensors, in two forms: all in one row, a segment each, for a cache
        of one row; and a row each, for a cache with a row for each (`question`)."""
        made = [Continuation("answer", prompt + ids, len(prompt)) for prompt, ids in parts]
        sample = lambda x: Sample(self.case.context, self.case.n_protect, x)  # noqa: E731
        return tuple(collate(x, kinds=["answer"]).to(self.model.device) for x in (
            [sample(made)], [sample([m]) for m in made]))

    def log_probabilities(self, forms, caches: list[Cache]):
        """log p of the vocabulary where the R tokens of all answers are predicted: for each cache, fp32 (R, V)."""
        one = caches[0].bias.shape[0] == 1
        b = forms[0 if one else 1]
        h = self.model(b.cont.repeat(len(caches), 1), caches[0] if len(caches) == 1 else stack(caches),
                       b.segments.repeat(len(caches), 1))
        return self.model.logits(h[b.supervised.repeat(len(caches), 1)]).log_softmax(-1).chunk(len(caches))

    def __call__(self, caches: list[Cache]) -> list[list[dict]]:
        if self.task == "fidelity":
            return [self.fidelity(log_q) for log_q in self.log_probabilities(self.forms, caches)]
        answer = {"choice": self.choice, "cost": self.cost}.get(self.task, self.generated)
        return [answer(cache) for cache in caches]

    def fidelity(self, log_q):
        per_token = divergence(log_q, self.teacher).cpu()
        return [{"kind": q.kind, "weight": len(q.answer),
                 **dict(zip(METRICS["fidelity"], per_token[:, self.which == i].mean(1).tolist()))}
                for i, q in enumerate(self.case.queries)]

    def choice(self, cache):
        out = []
        for i, q in enumerate(self.case.queries):
            ids = [self.tok.encode(o.strip()) + self.tok.turn[:1] for o in q.options]
            own = cache if cache.bias.shape[0] == 1 else cache.rows([i])
            log_p, = self.log_probabilities(self.packed([(q.prompt, x) for x in ids]), [own])
            wanted = torch.tensor([t for x in ids for t in x], device=log_p.device)
            per_token = log_p.gather(1, wanted[:, None])[:, 0].split([len(x) for x in ids])
            likely = [float(x.mean()) for x in per_token]  # a mean, as options differ in length
            best = q.options[likely.index(max(likely))]
            out.append({"kind": q.kind, "weight": 1, "accuracy": float(best in q.gold), "chance": 1 / len(q.options),
                        "prediction": best})
        return out

    def cost(self, cache):
        """Tokens per second at batch 1 and 8, decoding alone, and seconds for one question with its answer."""
        prompt, new, stop = self.case.queries[0].prompt, MAX_NEW_TOKENS["cost"], frozenset()
        rate, start = {}, clock(self.model)
        for batch in (1, 8):
            steps = generate(self.model, cache if batch == 1 else cache.rows([0] * 8), [prompt] * batch, new + 1, stop)
            next(steps)
            begin = clock(self.model)
            done = sum(1 for _ in steps)
            rate[batch] = batch * done / (clock(self.model) - begin)
            if batch == 1:
                question = clock(self.model) - start
        return [{"kind": self.case.queries[0].kind, "weight": 1, "tokens_per_s": rate[1], "tokens_per_s_8": rate[8],
                 "question_s": question}]

    def generated(self, cache):
        queries = self.case.queries
        cache = cache if cache.bias.shape[0] == len(queries) else cache.rows([0] * len(queries))
        ids = [[] for _ in queries]
        prompts, new = [q.prompt for q in queries], MAX_NEW_TOKENS[self.task]
        ends = self.tok.stop_ids | (tokens_with(self.tok, SQUAD_END) if self.task == "squad" else frozenset())
        for step in generate(self.model, cache, prompts, new, ends):
            for row, t in zip(ids, step):
                if t is not None:
                    row.append(t)
        texts = [self.tok.decode(row).strip() for row in ids]
        metrics = METRICS[self.task].items()
        return [{"kind": q.kind, "weight": 1, "prediction": text, **{name: f(text, q.gold) for name, f in metrics}}
                for q, text in zip(queries, texts)]
