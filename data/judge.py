"""How an answer from a short cache is judged: against the full cache's distribution, by likelihood, or as text."""
import time

import numpy as np
import torch

from data.samples import Continuation, Sample, collate
from data.tasks import MAX_NEW_TOKENS, METRICS, SQUAD_END, Case, tokens_with
from model import Cache, Llama, generate


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


class Judge:
    """Asks a case's queries of a cache and scores the answers: judge(cache) -> one dict per query, with "kind",
    "weight", the task's metrics, and for generated answers the "prediction"."""

    def __init__(self, task: str, model: Llama, tokenizer, case: Case, full: Cache):
        self.task, self.model, self.tok, self.case = task, model, tokenizer, case
        if task in ("fidelity", "choice"):  # continuations with given tokens, teacher-forced
            if task == "fidelity":
                self.parts = [(q.prompt, q.answer) for q in case.queries]
            else:
                self.parts = [(q.prompt, tokenizer.encode(o.strip()) + tokenizer.turn[:1]) for q in case.queries
                              for o in q.options]
            parts = [Continuation("answer", prompt + ids, len(prompt)) for prompt, ids in self.parts]
            sample = [Sample(case.context, case.n_protect, parts)]            # one row, a segment each
            samples = [Sample(case.context, case.n_protect, [p]) for p in parts]  # or a row each
            self.one, self.rows = (collate(x, kinds=["answer"]).to(model.device) for x in (sample, samples))
            self.which = torch.cat([torch.full((len(ids),), i) for i, (_, ids) in enumerate(self.parts)])
            self.teacher = self.model.logits(self.hidden(full)).log_softmax(-1) if task == "fidelity" else None

    def hidden(self, cache: Cache):
        """Hidden states (R, D) where an answer's tokens are predicted."""
        b = self.one if cache.bias.shape[0] == 1 else self.rows
        if b is self.rows and len(self.rows.cont) != cache.bias.shape[0]:  # `choice`: a row of the cache per option
            cache = cache.rows([i for i, q in enumerate(self.case.queries) for _ in q.options])
        return self.model(b.cont, cache, b.segments)[b.supervised]

    def __call__(self, cache: Cache) -> list[dict]:
        special = {"fidelity": self.fidelity, "choice": self.choice, "cost": self.cost}
        return special.get(self.task, self.generated)(cache)

    def fidelity(self, cache):
        per_token = divergence(self.model.logits(self.hidden(cache)).log_softmax(-1), self.teacher).cpu()
        return [{"kind": q.kind, "weight": len(q.answer),
                 **dict(zip(METRICS["fidelity"], per_token[:, self.which == i].mean(1).tolist()))}
                for i, q in enumerate(self.case.queries)]

    def choice(self, cache):
        ids = torch.tensor([t for _, part in self.parts for t in part], device=self.model.device)
        h = self.hidden(cache)
        got = torch.cat([self.model.logits(x).log_softmax(-1).gather(1, y[:, None])[:, 0].cpu()
                         for x, y in zip(h.split(128), ids.split(128))])
        likely = [float(got[self.which == i].mean()) for i in range(len(self.parts))]  # per token: lengths differ
        out = []
        for q in self.case.queries:
            mine, likely = likely[:len(q.options)], likely[len(q.options):]
            best = q.options[int(np.argmax(mine))]
            out.append({"kind": q.kind, "weight": 1, "accuracy": float(best in q.gold), "chance": 1 / len(q.options),
                        "prediction": best})
        return out

    def cost(self, cache):
        """Tokens per second at batch 1 and 8, decoding alone, and seconds for one question with its answer."""
        prompt, new, stop = self.case.queries[0].prompt, MAX_NEW_TOKENS["cost"], frozenset()
        rate, start = {}, clock(self.model)
        for batch in (1, 8):
            steps = generate(self.model, cache.rows([0] * batch), [prompt] * batch, new + 1, stop)
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
