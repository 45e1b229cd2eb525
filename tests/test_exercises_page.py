"""exercises.md keeps its word: an emptied function, and a plausible mistake, are noticed by the test that it names."""
import math
import re
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

import test_exercises as lesson
from compress import Choice
from conftest import ROOT
from model import NEG

PAGE = (ROOT / "exercises.md").read_text(encoding="utf-8")
STEPS = [(re.search(r"\*\*Empty\*\* `([\w.]+)`", part)[1], re.search(r"tests/test_exercises\.py::(\w+)", part)[1])
         for part in re.split(r"^## (?=\d)", PAGE, flags=re.M)[1:]]


def function(name: str):
    module, *path = name.split(".")
    found = import_module(module)
    for part in path:
        found = getattr(found, part)
    return found


def emptied(*_, **__):
    raise NotImplementedError


# The mistakes replace a function's code, not its name, so all who imported it have them; names are its module's.

def padding_counts(self, h, lengths):
    before = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
    after = h.shape[1] - 1 - before
    x = torch.cat([F.rms_norm(h.float(), h.shape[-1:]), torch.stack([after, before], -1).float().log1p()], -1)
    return self.w2(F.gelu(self.w1(x))).transpose(1, 2).unflatten(1, self.heads)


def each_head_its_own(scores, candidates, k, recent=0, check=True):
    forced = torch.zeros_like(candidates)[:, None, None]
    forced[..., -recent:] = True
    best = scores.masked_fill(forced, math.inf).topk(int(k[0]), -1).indices
    return Choice(torch.zeros_like(scores).bool().scatter(-1, best, True), forced, scores.mean((1, 2, 3), True))


def padded_to_the_longest(stay, beta=None):
    longest = int(stay.sum(-1).max())
    index = (~stay).to(torch.uint8).argsort(dim=-1, stable=True)[:, 0, :, :longest]
    real = stay[:, 0].gather(2, index)

    def store(layer, k, v):
        row, head = torch.arange(k.shape[0])[:, None, None], torch.arange(k.shape[1])[:, None]
        return [Part(k[row, head, index], v[row, head, index], torch.where(real, index, -1),  # noqa: F821
                     torch.where(real, 0.0, NEG))]
    return store


def no_gradient_when_hard(scores, choice, kind, tau, soft=False):
    beta = F.logsigmoid(scores if kind == "sigmoid" else (scores - choice.theta) / tau).where(~choice.fixed, 0)
    return beta if soft else torch.where(choice.kept | choice.fixed, beta if kind == "sigmoid" else beta * 0, NEG)


def this_layers_share(self, choice, n, k, dtype):
    strength = choice.share * ((n / k).log() / math.log(100)).clamp(max=1).square()[:, None, None]
    return lambda layer: None if not 0 <= layer - self.cfg.eta < len(self.a_q) else Route(  # noqa: F821
        strength[:, layer, :, None], *(x[layer - self.cfg.eta] for x in self.adapters()))


def the_other_way_round(ctx, student, teacher, head, lam, chunk):
    log_q, log_p = (F.linear(x, head).log_softmax(-1) for x in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    ctx.save_for_backward((q - p) @ head)  # the whole loss has the gradient of its first half
    ctx.mark_non_differentiable(forward)
    return lam * forward + (1 - lam) * reverse, forward.clone(), (log_q.argmax(-1) == log_p.argmax(-1)).float()


MISTAKES = [padding_counts, each_head_its_own, padded_to_the_longest, no_gradient_when_hard, this_layers_share,
            the_other_way_round]


def test_the_page_names_the_six_tests_in_order():
    assert [test for _, test in STEPS] == [name for name in vars(lesson) if re.match(r"test_\d", name)]
    assert len(STEPS) == len(MISTAKES) == 6


@pytest.mark.parametrize("step", range(len(STEPS)), ids=[name for name, _ in STEPS])
def test_an_emptied_function_and_a_mistake_are_noticed_where_the_page_says(step, monkeypatch):
    """And what comes later on the page is not needed yet."""
    for name, _ in STEPS[step + 1:]:
        monkeypatch.setattr(function(name), "__code__", emptied.__code__)
    name, test = STEPS[step]
    getattr(lesson, test)()
    monkeypatch.setattr(function(name), "__code__", emptied.__code__)
    with pytest.raises(NotImplementedError):
        getattr(lesson, test)()
    monkeypatch.setattr(function(name), "__code__", MISTAKES[step].__code__)
    with pytest.raises(AssertionError) as noticed:
        getattr(lesson, test)()
    assert not str(noticed.value).startswith("assert"), "a failure begins with a sentence that teaches"
