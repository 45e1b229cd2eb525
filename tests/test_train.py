"""One training step of either phase: what gets a gradient and what does not, accumulation, what the scorer is taught;
that both phases together learn a choice; and the devices and processes they run on."""
import json
import math
import signal

import pytest
import torch

import model as model_file
from conftest import save_llama, tiny_compressor, tiny_llama
from data.prepare import Shard
from data.samples import Case, Query, Samples, collate
from data.tokenizer import Tokenizer
from run.errors import BadInput
from run.folders import Signals
from run.models import open_model, pick_dtype
from run.plan import choose_parallel
from run.world import World
from test_tokenizer import tiny_tokenizer_json
from train import Distiller, Draw, MicroBatch, Totals, TrainConfig, add_gradients, main, train

ALONE = World(torch.device("cpu"))
PHASES = ["reconstruct", "hard", "soft"]


def sample(seed, n_context=40, lengths=(9, 6)):
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(0, 97, (n,), generator=g).tolist()  # noqa: E731
    return Case(ids(n_context), 3, [Query(k, ids(3), ids(n - 3)) for k, n in zip(("recite", "title"), lengths)])


def distiller(model, comp, learn_scores=True):
    return Distiller(model, comp, lam=0.6, chunk=7, learn_scores=learn_scores)


def gradients(model, parts, phase, keep=0.1, learn_scores=True, **changes):
    """One step's numbers, and the gradient of every trained tensor. parts: samples by forward pass."""
    comp = tiny_compressor(model, **changes)
    got = add_gradients(distiller(model, comp, learn_scores), [MicroBatch.of(collate(p), keep) for p in parts], phase,
                        ALONE)
    return got, {name: p.grad for name, p in comp.named_parameters()}


@pytest.mark.parametrize("choice", ["head", "token"])
@pytest.mark.parametrize("phase", PHASES)
def test_accumulation_is_one_large_batch(model, phase, choice):
    """Unequal contexts and unequal numbers of supervised tokens: a mean per micro-batch would be wrong here."""
    samples = [sample(0), sample(1, n_context=25, lengths=(4, 4)), sample(2, lengths=(15, 5)), sample(3, n_context=33)]
    one = gradients(model, [samples], phase, choice=choice)
    many = gradients(model, [[s] for s in samples], phase, choice=choice)
    assert one[0].keys() == many[0].keys() and all(torch.allclose(one[0][k], many[0][k], rtol=1e-4) for k in one[0])
    for name, g in one[1].items():
        if g is not None and name != "scorer.w2.bias":  # with one output, shifting all scores changes next to nothing
            assert (g - many[1][name]).norm() <= 1e-4 * g.norm() + 1e-7, name


def test_a_phase_reaches_what_it_trains_and_no_more(model):
    """Teaching: the scorer. Distillation: the adapters, and the scorer too where its rate is not 0."""
    def reached(phase, learn_scores=True):
        got = gradients(model, [[sample(0), sample(1)]], phase, learn_scores=learn_scores)[1]
        return {name.split(".")[0] for name, g in got.items() if g is not None and g.abs().max() > 0}
    adapters = {"a_q", "b_q", "a_o", "b_o"}
    assert reached("reconstruct") == reached("reconstruct", False) == {"scorer"}
    for phase in ("hard", "soft"):
        assert reached(phase) == adapters | {"scorer"} and reached(phase, False) == adapters


def test_5_the_frozen_model_gets_no_gradient_and_keeps_every_bit(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    comp = tiny_compressor(model)
    optimizer = torch.optim.AdamW(comp.parameters(), lr=1e-2)
    step = distiller(model, comp)
    for phase in (*PHASES, *PHASES):
        add_gradients(step, [MicroBatch.of(collate([sample(0)]), 0.1)], phase, ALONE)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in step.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("choice", ["head", "token"])
def test_the_error_is_that_of_the_logarithm_of_the_most_attention(model, monkeypatch, choice):
    """Against a softmax written out, layer by layer; two continuations, which do not see each other."""
    comp, s = tiny_compressor(model, choice=choice), sample(0)
    b, ids = collate([s]), torch.tensor([s.context])
    m = MicroBatch.of(b, 0.1)
    got = distiller(model, comp)(m, Totals.of([m], ALONE), "reconstruct")["loss"]
    received, rotated, rotate = torch.zeros(6, 2, 40), [], model_file.rotate
    monkeypatch.setattr(model_file, "rotate", lambda x, rope: rotated.append(rotate(x, rope)) or rotated[-1])
    for q in s.queries:
        rotated.clear()
        model(torch.cat([ids, torch.tensor([q.prompt + q.answer])], 1))
        for layer, (keys, queries) in enumerate(zip(rotated[::2], rotated[1::2])):  # in every layer first the keys
            queries, keys = queries[0], keys[0]
            for h in range(4):
                logits = queries[h] @ keys[h // 2].T / math.sqrt(12)
                weights = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf).softmax(-1)[40:, :40]
                received[layer, h // 2] = received[layer, h // 2].maximum(weights.amax(0))
    wanted = received if choice == "head" else received.mean((0, 1), keepdim=True)
    scores = comp.scores(comp.read(model, ids))[0]
    assert torch.isclose(got, (scores - wanted.clamp(min=1e-6).log())[..., 3:].square().mean(), rtol=1e-4)


def test_11_selection_learns(tmp_path):
    """Both phases on a tiny model, through the loop itself: on held-out contexts the trained choice is then clearly
    better than a random one of the same budget under the same routing. A fresh scorer's is not (it is worse). The
    model's attention is sharp, and largely the same for all queries, as words have a part in common: where it is
    diffuse, random tokens are a fair sample and nothing can be learned."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()), encoding="utf-8")
    tok, model, g = Tokenizer(tmp_path), tiny_llama(vocab_size=310, rope_theta=1e8, seed=3), torch.Generator()
    model.embed.weight += 1
    for block in model.layers:
        block.attn.wq.weight *= 8
    words = "mill stone river light tower keeper north island harbour winter letter engine garden window".split()
    for i in range(60):
        at = torch.randint(0, len(words), (150,), generator=g.manual_seed(i)).tolist()
        (tmp_path / f"{i}.txt").write_text(" ".join(words[j] for j in at))
    mix, c = {"continue": 1}, TrainConfig(
        reconstruct=80, steps=20, batch=4, micro=4, context=48, answer=8, rank=4, eta=2, hidden=64, keep_low=0.1,
        keep_high=0.5, teach_lr=1e-2, sources=str(tmp_path), shards=str(tmp_path / "shards"))
    fresh, comp = (tiny_compressor(model, trained=False, **vars(c.compressor())) for _ in range(2))
    train(c, Draw(c, mix, tok, ALONE), comp, model, tmp_path / "run", ALONE)

    shard, = map(lambda f: Shard(f, "val", tok), (tmp_path / "shards").iterdir())
    samples = Samples([shard], tok, c.context, mix, c.answer, seed=1)
    b = collate([samples(i) for i in range(64)])
    with torch.no_grad():
        ctx = comp.read(model, b.tokens, b.lengths, b.protect)

        def logits(cache):
            return model.logits(model(b.cont, cache, b.segments))[b.answers].view(64, 7, -1).log_softmax(-1)
        p = logits(comp.full(model, ctx))

        def kl(scores):                                                                         # (64,), by document
            q = logits(comp.compress(model, ctx, tokens=10, scores=scores))
            return (p.exp() * (p - q)).sum(-1).mean(1)
        chance = kl(torch.rand(64, 6, 2, b.tokens.shape[1], generator=g))
        gain, none = chance - kl(comp.scores(ctx)), chance - kl(fresh.scores(ctx))
    print(f"random {chance.mean():.2f}, gain {gain.mean():.2f} ± {gain.std() / 8:.2f}, fresh {none.mean():.2f}")
    assert gain.mean() > 4 * gain.std() / 8 and none.mean() < 0.5 * gain.mean()


# devices and processes ----------------------------------------------------------------------------------------------

def test_a_gpu_without_bf16_gets_fp32_or_a_clear_word(monkeypatch):
    """As on a T4 or a V100; auto is bf16 on a GPU that has it."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert pick_dtype("auto", gpu) == pick_dtype("fp32", gpu) == torch.float32
    with pytest.raises(BadInput, match="Tesla T4 has no units for it; use --dtype fp32"):
        pick_dtype("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_dtype("auto", gpu) == pick_dtype("bf16", gpu) == torch.bfloat16
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


def test_what_cannot_be_shared_is_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1",
                        "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="mps is one GPU"):
        World.start("mps")
    with pytest.raises(BadInput, match="--device cuda:0 with torchrun: expected cuda"):
        World.start("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="3 processes and 1 GPUs on this host"):
        World.start("cuda")
    monkeypatch.setattr(World, "start", lambda device: World(torch.device("cpu"), world_size=3))
    monkeypatch.setattr("sys.argv", ["train.py", "--batch", "4"])
    with pytest.raises(BadInput, match="--batch 4 cannot be shared by 3 processes"):
        main()
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(BadInput, match="8 tasks of one job step would each work alone"):
        World.start("cpu")
    with pytest.raises(BadInput, match="spreads the model over processes and there is one"):
        choose_parallel("fsdp", None, "bf16", 1, torch.device("cpu"))


def test_a_model_that_does_not_fit_into_the_device_says_who_can_spread_it(tmp_path, monkeypatch):
    """compress.py and eval.py need one device that holds it; train.py does not."""
    save_llama(tiny_llama(vocab_size=310), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()), encoding="utf-8")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr("run.models.load_llama", full)
    args = type("Args", (), dict(device="cpu", dtype="fp32", weights=tmp_path, system=None))
    with pytest.raises(BadInput, match="does not fit into cpu.*Only train.py spreads.*--parallel fsdp"):
        open_model(args)


def test_a_second_ctrl_c_does_not_wait(capfd):
    """The first says at once that the step is being finished, the second what is lost."""
    before = signal.getsignal(signal.SIGINT)
    with Signals(saved=25) as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.got == signal.SIGINT
        assert "finishing this step and saving it; Ctrl-C again" in capfd.readouterr().err
        signals.saved = 50
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert "what was trained after step 50 is lost" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
