"""Each row of results/ablations.py changes what it says and nothing else; what is measured is what is shown."""
import math
import sys
from dataclasses import replace

import pytest
import torch

from compress import attention_received, decay, drop_from, kept_count
from conftest import ROOT, tiny_compressor
from data.samples import Case, Query, collate
from eval import choose
from model import NEG, whole_cache
from run.errors import BadInput, read_json
from train import MicroBatch

sys.path.insert(0, str(ROOT))
import results.ablations as ab  # noqa: E402
from results.ablations_variants import Adapted, Kept, Linear, Routing, Slots  # noqa: E402

ETAS = 1, 2, 3
PLAIN = ab.Variant("")


def case(seed=0, n=40) -> Case:
    g = torch.Generator().manual_seed(seed)
    ids = lambda m: torch.randint(0, 97, (m,), generator=g).tolist()  # noqa: E731
    return Case(ids(n), 3, [Query(kind, ids(3), ids(4)) for kind in ("recite", "squad")], f"unit {seed}")


def document(model, seed=0) -> ab.Document:
    c = case(seed)
    return ab.Document.read(model, c.context, c.n_protect, ETAS).with_judge(model, None, c)


def variant(model, make=Routing, *settings, **changes):
    """A variant with the tiny compressor's scorer, and its adapters where it has such."""
    comp = tiny_compressor(model, **changes)
    torch.manual_seed(5)
    mine = make(model.cfg, comp.cfg, *settings)
    mine.scorer.load_state_dict(comp.scorer.state_dict())
    if make in (Routing, Kept):
        mine.load_state_dict(comp.state_dict(), strict=False)
    return mine, comp


def said(model, d, cache):
    return d.judge.log_probabilities(d.judge.case.queries, cache)


def short(comp, model, d, keep, v=PLAIN):
    return ab.short_cache(v, comp, model, d.ctx, kept_count(d.ctx.candidates.sum(1), keep))


# who should stay ------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 12])
def test_a_masked_cache_is_the_gathered_one(model, heads):
    d, scores = document(model), torch.rand(1, 6, 2, 40, generator=torch.Generator().manual_seed(3))
    kept = choose(scores, d.ctx.candidates, torch.tensor([5]), heads, 2)
    gathered = drop_from(whole_cache(d.kvs), d.ctx, kept)
    assert torch.allclose(said(model, d, d.masked(kept)), said(model, d, gathered), atol=1e-5)
    assert (said(model, d, gathered) - d.judge.teacher).abs().max() > 0.01  # and not the whole one


def test_windows_hold_the_target_of_training(model, tmp_path, monkeypatch):
    """Replay and what follows, watched apart: their maximum is what one pass over both is taught."""
    ids = [*range(10, 30)]
    cases = [Case([1, 2, 3, *ids], 3, [Query("replay", [4, 5], ids), Query("continue", [6], [7, 8])])]
    monkeypatch.setattr(ab, "WORK", tmp_path)
    monkeypatch.setattr(ab, "Samples", lambda *_: cases.__getitem__)
    data = ab.windows(model, None, [], 1, 20, ETAS)
    full, b = whole_cache(ab.Document.read(model, cases[0].context, 3, ETAS).kvs), collate(cases)
    both = attention_received(model, full, b.cont, segments=b.segments)
    mine = ab.target(ab.Taught(), data, 0)
    assert torch.allclose(mine.exp(), both.clamp(min=1e-6), atol=2e-3)
    assert (ab.target(ab.Taught(following=False), data, 0) <= mine).all()
    per_layer = ab.target(ab.Taught(per="layer"), data, 0)
    assert torch.allclose(per_layer.exp(), mine.exp().mean(2, keepdim=True))
    assert ab.target(ab.Taught(per="token"), data, 0).shape == (1, 1, 1, 23)
    monkeypatch.setattr(ab, "Samples", None)  # the second time it is read from the file
    assert ab.windows(model, None, [], 1, 20, ETAS).keys() == data.keys() == {"replay", "following", "h1", "h2", "h3",
                                                                             "n_protect"}


def test_scorers_see_what_their_row_says(model):
    g = torch.Generator().manual_seed(0)
    data = {"replay": -torch.rand(6, 6, 2, 20, generator=g), "following": torch.full((6, 6, 2, 20), -9.0),
            "h2": torch.randn(6, 20, 48, generator=g), "n_protect": torch.tensor(3)}
    memo, short, long = {"windows": data}, torch.tensor([20]), torch.tensor([90])
    made = {name: ab.taught(ab.Taught(eta=2, **x), 0, model, memo) for name, x in {
        "head": dict(hidden=8), "blind": dict(hidden=8, distances=False), "linear": dict(hidden=0),
        "layer": dict(hidden=8, per="layer"), "token": dict(hidden=8, per="token")}.items()}
    h = data["h2"][:1]
    assert (made["head"](h, short) != made["head"](h, long)).any()
    assert torch.equal(made["blind"](h, short), made["blind"](h, long))
    assert [tuple(made[x](h, short).shape[1:3]) for x in ("head", "layer", "token")] == [(6, 2), (6, 1), (1, 1)]
    assert isinstance(made["linear"], Linear)
    flat = made["linear"](torch.cat([h[:, :1], h[:, :1]], 1), torch.tensor([2]))[0, ..., 0]
    x = torch.cat([torch.nn.functional.rms_norm(h[0, 0], (48,)), torch.tensor([1.0, 0.0]).log1p()])
    assert torch.allclose(flat, made["linear"].w2(x).view(6, 2), atol=1e-5)
    again = ab.taught(ab.Taught(eta=2, hidden=8), 0, model, {"windows": data})
    assert torch.equal(again.w1.weight, made["head"].w1.weight), "a row that is taken up again is the same row"


def test_rows_share_budgets_and_force_recent_tokens_as_they_say(model, monkeypatch):
    """Of 37 tokens, K is 10, 4, and 2."""
    d, seen = document(model), []
    monkeypatch.setattr(ab, "choose", lambda s, c, k, heads, recent: seen.append((heads, recent)) or choose(
        s, c, k, heads, recent))
    for row in (ab.Row("", "random"), ab.Row("", "random", shared=False, recent=0), ab.Row("", "random", recent=0.5)):
        made = ab.choice_row(row, 0, model, None, [d], {})
    assert seen == [(12, 4)] * 3 + [(1, 0)] * 3 + [(12, 5), (12, 2), (12, 1)]
    assert set(made) == {"kl", "js", "agree"} and all(len(x) == 2 and min(x) > 0 for x in made["kl"].values())
    assert ab.choice_row(ab.Row("", "random"), 1, model, None, [d], {}) != made


# what happens to those that stay --------------------------------------------------------------------------------------

@torch.no_grad()
def test_base_is_the_compressor_as_shipped(model):
    mine, comp = variant(model)
    d = document(model)
    k = kept_count(d.ctx.candidates.sum(1), 0.2)
    assert torch.allclose(said(model, d, short(mine, model, d, 0.2)),
                          said(model, d, comp.compress(model, d.ctx, tokens=int(k))), atol=1e-5)


@torch.no_grad()
def test_strength_and_whose_share(model):
    d = document(model)
    n, k = torch.tensor([37]), torch.tensor([4])
    log, ramp = math.log(37 / 4) / math.log(100), math.log(37 / 16) / math.log(25)
    masks = {}
    for settings in [(), (0,), (1,), (2,), (None, "later"), (None, "everywhere")]:
        comp, _ = variant(model, Routing, *settings)
        choice = comp.choose(comp.scores(d.ctx), d.ctx, k)
        masks[settings] = comp.routes(choice, n, k, torch.float32)(2).mask[0, :, 0]  # of layer 3: the fourth's heads
    share = choice.share[0]
    wanted = {(): share[3] * ramp, (0,): share[3], (1,): share[3] * log, (2,): share[3] * log ** 2,
              (None, "later"): share[3:].mean(0) * ramp, (None, "everywhere"): share.mean(0) * ramp}
    assert all(torch.allclose(masks[x], wanted[x], atol=1e-6) for x in wanted)


@torch.no_grad()
def test_a_kept_embedding_of_zero_changes_nothing_and_routes_nothing(model):
    (mine, comp), d = variant(model, Kept), document(model)
    choice = comp.choose(comp.scores(d.ctx), d.ctx, kept_count(d.ctx.candidates.sum(1), 0.2))
    assert torch.allclose(said(model, d, short(mine, model, d, 0.2)), said(model, d, d.masked(choice.kept)), atol=1e-5)
    mine.kept.fill_(1.0)
    keys = torch.stack([p.k[0] for p, in short(mine, model, d, 0.2).layers])                   # (L, G, N, d)
    changed = (keys - torch.stack([k[0] for k, _ in d.kvs])).abs().amax((1, 3)) > 1e-5         # (L, N)
    assert not changed[:2].any() and torch.equal(changed[2], choice.share[0, 2] > 0)
    assert mine.trained() == [mine.kept]


@torch.no_grad()
def test_adapters_on_q_and_o_are_routing_and_leave_no_hook(model):
    (base, _), (mine, _), d = variant(model), variant(model, Adapted, "attn.wq attn.wo"), document(model)
    choice = base.choose(base.scores(d.ctx), d.ctx, kept_count(d.ctx.candidates.sum(1), 0.2))
    assert torch.allclose(said(model, d, short(mine, model, d, 0.2)), said(model, d, d.masked(choice.kept)), atol=1e-5)
    for p, q in zip(mine.trained(), [base.a_q, base.a_o, base.b_q, base.b_o], strict=True):
        p.copy_(q)
    assert torch.allclose(said(model, d, short(mine, model, d, 0.2)), said(model, d, short(base, model, d, 0.2)),
                          atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())
    every, _ = variant(model, Adapted, "attn.wk attn.wv mlp.gate mlp.up mlp.down")
    before = said(model, d, short(every, model, d, 0.2))
    for b in every.b:
        old, _ = b.clone(), b.normal_(std=0.2)
        assert (said(model, d, short(every, model, d, 0.2)) - before).abs().max() > 1e-4
        b.copy_(old)


@torch.no_grad()
@pytest.mark.parametrize("keep, slots", [(0.5, 8), (0.2, 4)])
def test_slots_stay_inside_the_budget(model, keep, slots):
    (mine, _), d = variant(model, Slots), document(model)
    k = int(kept_count(d.ctx.candidates.sum(1), keep))
    cache = short(mine, model, d, keep)
    held = torch.stack([p.bias[0].expand(2, -1) == 0 for p, in cache.layers])                   # (L, G, N + slots)
    assert held.shape[2] == 40 + slots and held[..., 40:].all() and int(held.sum()) == (k + 3) * 12
    assert cache.next_position.tolist() == [40]
    assert all(torch.equal(p.k[:, :, :40], k) for (p,), (k, _) in zip(cache.layers, d.kvs)), "the context is as it was"
    before = said(model, d, cache)
    mine.b_o.normal_(std=0.2)
    assert (said(model, d, short(mine, model, d, keep)) - before).abs().max() > 1e-4


@torch.no_grad()
def test_beta_at_inference_weighs_what_stays_and_nothing_else(model):
    (mine, _), d = variant(model), document(model)
    plain, weighed = (torch.stack([p.bias[0] for p, in short(mine, model, d, 0.2, v).layers])
                      for v in (PLAIN, replace(PLAIN, beta=True)))
    scores = mine.scores(d.ctx)
    choice = mine.choose(scores, d.ctx, kept_count(d.ctx.candidates.sum(1), 0.2))
    soft = decay(scores, choice, "threshold", 0.5, soft=True)[0]
    assert torch.equal(weighed, torch.where(choice.kept[0], soft, plain)) and (weighed != plain).any()
    assert torch.equal(plain == NEG, weighed == NEG)


def test_what_a_row_trains_and_what_its_loss_is(model):
    """λ reaches the loss, --scorer-lr the scorer, and the same row is the same row."""
    d = document(model)
    m = MicroBatch.of(collate([d.judge.case], True), 0.2)
    teacher = model(m.batch.cont, whole_cache(d.kvs), m.batch.segments, largest=m.largest).flatten(0, 1)[m.rows].detach()
    memo = {"lessons": [(m, d.ctx, teacher)] * 3}

    def trained(make=Routing, *settings, **changes):
        comp, _ = variant(model, make, *settings)
        before = {name: p.clone() for name, p in comp.named_parameters()}
        ab.distil(ab.Variant("", make, settings, **changes), comp, memo["lessons"], model, 0)
        return comp, {name.split(".")[0] for name, p in comp.named_parameters() if not torch.equal(p, before[name])}
    routing = {"a_q", "b_q", "a_o", "b_o"}
    base, moved = trained()
    assert moved == routing and torch.equal(base.b_q, trained()[0].b_q)
    for lam in (0.0, 1.0):
        assert not torch.equal(base.b_q, trained(lam=lam)[0].b_q)
    assert trained(scorer_lr=1e-3)[1] == routing | {"scorer"}
    soft, moved = trained(scorer_lr=1e-3, soft=1.0)
    assert moved == routing | {"scorer"} and not torch.equal(soft.b_q, trained(scorer_lr=1e-3)[0].b_q)
    assert trained(Kept)[1] == {"kept"}
    assert trained(Slots)[1] == routing | {"slots"}
    assert trained(Adapted, "attn.wk mlp.up")[1] == {"a", "b"}


# the tables -----------------------------------------------------------------------------------------------------------

def result() -> dict:
    """Two short documents that judge `choice` and `routing`, one that judges `choice` alone, and a long one."""
    answers = [[0, "u0", "recite", 1], [0, "u0", "squad", 3], [1, "u1", "squad", 1], [2, "u2", "recite", 1]]

    def row(part, name, seed, kl):
        values = {f"{keep:g}": kl for keep in ab.PARTS[part].keeps}
        about = {"part": part, "row": name, "seed": seed, "commit": "abc1234"}
        return about | dict.fromkeys(("kl", "js", "agree"), values)
    return {"answers": {"400": answers, "1600": [[0, "u3", "squad", 2]]}, "memory": {"1": 1000, "0.5": 520, "0.01": 12}, "rows": [
        row("choice", "base", 0, [1.0, 2.0, 3.0, 4.0]), row("choice", "random", 0, [2.0, 3.0, 4.0, 5.0]),
        row("choice", "recent 0", 0, [0.0, 2.5, 3.0, 4.0]),
        row("routing", "base", 0, [1.0, 2.0, 4.0]), row("routing", "base", 1, [1.0, 2.0, 4.0]),
        row("routing", "lambda 1", 0, [0.5, 1.5, 3.5]), row("routing", "lambda 1", 1, [1.5, 2.5, 4.5]),
        row("routing", "MLP", 0, [0.5, 1.5, 3.5]), row("long", "base", 0, [1.0]), row("long", "slots", 0, [0.5])]}


def test_estimates_by_hand():
    mean, (low, high), seeds = ab.estimate(result(), "choice", "base", 0.1)
    assert mean == pytest.approx((1 + 3 * 2 + 3 + 4) / 6) and low < mean < high and seeds == [pytest.approx(mean)]
    assert ab.estimate(result(), "choice", "base", 0.1, "squad")[0] == pytest.approx(9 / 4)
    assert ab.estimate(result(), "routing", "base", 0.02)[0] == pytest.approx((1 + 6 + 4) / 5), "documents 0 and 2"
    assert ab.estimate(result(), "choice", "random", 0.1, less="base")[:2] == (1.0, [1.0, 1.0])
    assert ab.estimate(result(), "routing", "lambda 1", 0.1, less="base")[2] == [-0.5, 0.5]
    assert not ab.estimate(result(), "routing", "slots", 0.1)
    assert ab.estimate(result(), "long", "slots", 0.01, "squad", less="base")[0] == -0.5


def test_the_page_says_what_was_measured_what_is_sure_and_what_is_missing(tmp_path, monkeypatch):
    page = tmp_path / "ablations.md"
    monkeypatch.setattr(ab, "PAGE", page)
    blocks = [f"<!-- table: {x} -->\n<!-- end -->\n" for x in (*ab.PARTS, "memory")]
    page.write_text("by hand\n" + "".join(blocks))
    ab.render(result())
    text = page.read_text()
    less = text.split("| minus base, paired |")[1]
    lines = {line.split(" | ")[0]: line for line in less.split("\n") if line.startswith("| ")}
    assert text.startswith("by hand\n") and "| 99% | 12 | 0.0120 | 0.01 |" in text
    assert "**+1.00**" in lines["| random"] and "**" not in lines["| recent 0"], "its interval begins at 0"
    assert "**−0.50**" in text and "| lambda 1 | 0.00" in text, "seeds that disagree are not sure"
    assert "Base with seed 1 less seed 0: 0.00," in text.replace("+0.00", "0.00")
    assert "Two seeds: base, lambda 1." in text and "slots (seed 0)" in text and "abc1234" in text


def test_rows_come_first_seeds_first_and_in_the_order_asked():
    rows = {"rows": [{"part": "choice", "row": "base", "seed": 0}]}
    assert ab.missing(rows, ["routing/lambda", "choice/base"]) == [
        ("routing", "lambda 1", 0), ("routing", "lambda 0", 0), ("routing", "lambda 1", 1), ("routing", "lambda 0", 1),
        ("choice", "base", 1)]
    assert ("choice", "kvzip", 1) not in ab.missing({"rows": []}, [""]), "it has no seed"


def test_a_result_is_written_a_line_for_each_row(tmp_path, monkeypatch):
    monkeypatch.setattr(ab, "RESULT", tmp_path / "a.json")
    ab.save(result())
    assert read_json(ab.RESULT) == result() and len(ab.RESULT.read_text().split("\n")) == 3 + 10 + 1


@pytest.mark.parametrize("part", ab.PARTS)
def test_the_committed_page_shows_what_the_file_says(part):
    assert ab.tables(read_json(ab.RESULT), part) in ab.PAGE.read_text(encoding="utf-8")


def test_a_row_that_there_is_not_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ablations.py", "routing/MLP", "nosuch"])
    with pytest.raises(BadInput, match="no row's name begins with 'nosuch'"):
        ab.main()
