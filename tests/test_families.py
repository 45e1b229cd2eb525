"""Mistral and Qwen beside Llama: tiny random models that transformers makes and saves, read from their folder alone.
The logits are its logits, and the whole method runs on each."""
import argparse
import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress import Compressor, attention_received, kept_count
from conftest import save_llama, tiny_compressor, tiny_llama
from model import Llama, generate, load_llama, pad_right, rope_frequencies
from run import files, models
from run.errors import BadInput
from run.files import base_of, check_base, load_cache, default_adapter, read_adapter, save_adapter, save_cache
from run.models import load_checked, open_model, read_config
from run.plan import HEADER, continuation_tokens, memory, step_flops
from test_compress import chosen, context, continuation, logits, masked
from test_model import greedy_by_hand
from test_plan import KINDS, MIX, SMOLLM, Peak, one_pass
from test_tokenizer import tiny_tokenizer_json
from test_train import gradients, sample
from train import TrainConfig

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
KINDS_OF_MODEL = {
    "llama, biases": ("Llama", {"attention_bias": True}),
    "llama 3, tied": ("Llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear": ("Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, wide heads, window": ("Mistral", {"head_dim": 20, "sliding_window": 24}),
    "mistral, a longer window": ("Mistral", {"sliding_window": 400}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn, mha": ("Qwen2", {"rope_scaling": {"type": "yarn"} | YARN, "num_key_value_heads": 4}),
    "qwen2, yarn, spelled out": ("Qwen2", {"rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0,
                                                                   "attention_factor": 1.3}}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, window, by name": ("Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 17,
                                         "layer_types": ["sliding_attention", "full_attention"] * 3}),
    "qwen3, tied, yarn, biases": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_scaling": YARN,
                                            "attention_bias": True})}


class Tok:
    fingerprint, system = "t", None


@pytest.fixture(scope="module", params=KINDS_OF_MODEL, ids=str)
def family(request, tmp_path_factory):
    """transformers' model, and the folder it was saved in: sharded, with no parameter left at its plain default."""
    kind, settings = KINDS_OF_MODEL[request.param]
    config = dict(vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=512) | settings
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config)).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0,
                              std=1.0 if "embed" in name else 0.3 if p.dim() == 1 else 0.15)
    folder = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return theirs, folder


@torch.no_grad()
def test_logits_are_those_of_transformers(family):
    theirs, folder = family
    ours = load_checked(folder)
    tokens = torch.randint(0, 97, (2, 300), generator=torch.Generator().manual_seed(1))
    want = theirs(tokens).logits
    assert want.std() > 0.3
    assert torch.allclose(ours.logits(ours(tokens)), want, atol=1e-4)
    room = ours.prefill(tokens[:, :290]).with_room(10)
    steps = torch.cat([ours.logits(ours(tokens[:, i:i + 1], room)) for i in range(290, 300)], 1)
    assert torch.allclose(steps, want[:, 290:], atol=1e-4)


@torch.no_grad()
def test_the_method_runs_on_each(family, tmp_path):
    """What is gathered answers as what is masked does; keep = 1 is the plain model; files give back what was saved."""
    model = load_checked(family[1])
    for choice in ("head", "token"):
        comp = tiny_compressor(model, choice=choice)
        ctx, cont = context(model, comp), continuation(model)
        plain = model.logits(model(torch.cat([ctx.tokens, cont], 1)))[:, ctx.tokens.shape[1]:]
        assert torch.allclose(logits(model, comp.compress(model, ctx, keep=1.0), cont), plain, atol=1e-4)
        short = comp.compress(model, ctx, keep=0.1)
        which, k = chosen(comp, ctx, 0.1)
        assert torch.equal(k, kept_count(ctx.candidates.sum(1), 0.1))
        beta = torch.where(which.kept | which.fixed, 0.0, -1e9)
        got = logits(model, short, cont)
        assert torch.allclose(got, logits(model, masked(model, comp, ctx, which, k, beta), cont), atol=1e-4)
        assert (got - plain).abs().max() > 0.05, "compression that changes nothing would prove nothing"

        save_adapter(tmp_path / choice, comp, model, Tok, {})
        again = Compressor(model.cfg, comp.cfg)
        again.load_state_dict(read_adapter(tmp_path / choice, model, Tok)[1])
        save_cache(tmp_path / "c.safetensors", short, model, Tok)
        for cache in (load_cache(tmp_path / "c.safetensors", model, Tok), again.compress(model, ctx, keep=0.1)):
            assert torch.equal(logits(model, cache, cont), got)


@pytest.mark.parametrize("phase", ["reconstruct", "hard", "soft"])
def test_a_step_trains_the_compressor_and_nothing_else(family, phase):
    model = load_checked(family[1])
    numbers, got = gradients(model, [[sample(0), sample(1)]], phase)
    assert numbers["loss"].isfinite()
    reached = {name for name, g in got.items() if g is not None and g.isfinite().all() and g.abs().max() > 0}
    assert reached == {name for name in got if phase != "reconstruct" or name.startswith("scorer")}
    assert all(p.grad is None for p in model.parameters())


# What config.json says ------------------------------------------------------------------------------------------------

def test_the_plan_counts_wide_heads_biases_and_norms():
    """Operations within 10 % of torch's count, bytes within 15 %, for head norms, biases and wide heads."""
    cfg = replace(SMOLLM, n_layer=12, head_dim=128, bias="qkv", head_norm=True)
    c = TrainConfig(micro=4, batch=4, rank=64, scorer_lr=1e-3)
    for phase in ("reconstruct", "hard"):
        asked, n = round(continuation_tokens(KINDS[phase], c)), c.context + HEADER
        counter, peak = FlopCounterMode(display=False), Peak()
        with sdpa_kernel(SDPBackend.MATH):
            one_pass(cfg, c, asked, phase, counter)
        one_pass(cfg, c, asked, phase, peak)
        ours = step_flops(cfg, c.compressor(), 4 * n, 4 * asked, 4 * asked, 4, phase, c.scorer_lr > 0)
        assert 0.9 < ours / counter.get_total_flops() < 1.1
        bytes_ = sum(list(memory(cfg, c, MIX, "bf16", 1, "ddp").values())[4:])
        assert peak.most < 1.15 * bytes_ and (phase == "reconstruct" or peak.most > 0.85 * bytes_)


def write(folder, **changes):
    """The config.json of a tiny Llama with other settings."""
    save_llama(tiny_llama(), folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WINDOW = {"sliding_window": 100, "use_sliding_window": True}
NAMED = ["full_attention"] * 5 + ["sliding_attention"]


@pytest.mark.parametrize("changes, layers", [
    ({"model_type": "mistral"}, []), ({"model_type": "mistral", "sliding_window": None}, []),
    ({"model_type": "mistral", "sliding_window": 100}, [0, 1, 2, 3, 4, 5]), ({"sliding_window": 100}, []),
    ({"model_type": "mistral", "sliding_window": 512}, []), ({"model_type": "qwen2", "sliding_window": 100}, []),
    ({"model_type": "mistral", "sliding_window": 100, "layer_types": NAMED}, [0, 1, 2, 3, 4, 5]),
    ({"model_type": "qwen3", **WINDOW}, []), ({"model_type": "qwen2", "max_window_layers": 4, **WINDOW}, [4, 5]),
    ({"model_type": "qwen2", "max_window_layers": 0, "layer_types": NAMED, **WINDOW}, [5]), ({"max_window_layers": 0, **WINDOW}, [])], ids=str)
def test_the_layers_with_a_window_are_those_of_transformers(tmp_path, changes, layers):
    cfg = read_config(write(tmp_path, **changes) / "config.json")
    assert [*cfg.sliding_layers] == layers and (cfg.sliding_window == 100 or not layers) and cfg.max_positions == 512
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    if changes.get("model_type", "llama").startswith("qwen"):
        assert [i for i, kind in enumerate(theirs.layer_types) if kind == "sliding_attention"] == layers


def test_yarn_adds_positions(tmp_path):
    changes = {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert read_config(write(tmp_path, **changes) / "config.json").max_positions == 2048


# A sliding window -----------------------------------------------------------------------------------------------------

def sliding(window=10, **changes) -> Llama:
    return tiny_llama(sliding_window=window, sliding_layers=[1, 2, 4, 5], **changes)


@torch.no_grad()
def test_a_window_that_nothing_reaches_beyond_is_said_once_and_costs_nothing(tmp_path, capsys):
    """Up to its length attention is what it is without one, to the bit, by the same kernels; one token more is not."""
    model = load_checked(write(tmp_path, model_type="mistral", sliding_window=100))
    assert capsys.readouterr().err.count("sliding window of 100 tokens in 6 of 6 layers") == 1
    load_checked(write(tmp_path, model_type="mistral", sliding_window=512))
    assert capsys.readouterr().err == "", "a window that no text can reach is not worth a line"
    plain, tokens = tiny_llama(), torch.arange(101)[None] % 97
    assert torch.equal(model(tokens[:, :100]), plain(tokens[:, :100])) and model.rope(tokens[:, :97])[3] is False
    a, b = (m(tokens[:, 90:100], m.prefill(tokens[:, :90])) for m in (model, plain))
    assert torch.equal(a, b)
    a, b = model(tokens), plain(tokens)
    assert torch.allclose(a[:, :100], b[:, :100], atol=1e-5)
    assert (a[:, 100] - b[:, 100]).abs().max() > 1e-3, "it no longer sees the first"


@torch.no_grad()
@pytest.mark.parametrize("choice", ["head", "token"])
def test_of_a_short_cache_a_window_shows_what_lies_in_it(choice):
    """By positions, not by how many entries are left: against the same weights without a window, that get the same
    keys, step by step, with a bias of −1e9 on those that stand ten or more positions back."""
    model, plain = sliding(), tiny_llama()
    comp = tiny_compressor(model, choice=choice)
    cache, cont = comp.compress(model, context(model, comp), keep=0.1), continuation(model, t=14)
    together, room = logits(model, cache, cont), cache.with_room(15)
    steps = torch.cat([logits(model, room, cont[:, i:i + 1]) for i in range(14)], 1)
    assert torch.allclose(steps, together, atol=1e-4)
    half = cache.with_room(14)
    halves = [logits(model, half, x) for x in (cont[:, :6], cont[:, 6:])]
    assert torch.allclose(torch.cat(halves, 1), together, atol=1e-4)
    for t in range(14):
        layers = []
        for layer, (parts, found) in enumerate(zip(cache.layers, room.layers)):
            layers.append([])
            for part, grown in zip(parts, found):
                own = torch.arange(40, 40 + t).expand(*part.positions.shape[:2], -1)
                at = torch.cat([part.positions, own], 2)
                there = at > 40 + t - 10 if layer in (1, 2, 4, 5) else at >= 0
                entries = slice(0, at.shape[2])
                layers[-1].append(replace(grown, k=grown.k[:, :, entries], v=grown.v[:, :, entries], positions=at,
                                          bias=torch.where(there, 0.0, -1e9)))
        want = logits(plain, replace(cache, layers=layers, next_position=cache.next_position + t), cont[:, t:t + 1])
        assert torch.allclose(want[:, 0], together[:, t], atol=1e-4), t
    swapped = logits(model, room.rows([1, 0]), cont[[1, 0], :1])
    assert torch.allclose(swapped, logits(model, room, cont[:, :1])[[1, 0]], atol=1e-4)
    assert (logits(plain, cache, cont) - together).abs().max() > 0.1


@torch.no_grad()
def test_a_ragged_batch_under_a_window_is_its_rows():
    """Contexts and prompts of different lengths: padding stands nowhere, and answers are those of one long pass."""
    model, g = sliding(window=7), torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 97, (n,), generator=g).tolist() for n in (20, 5, 13)]
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5]]
    steps = list(generate(model, model.prefill(*pad_right(rows)), prompts, 12))
    for i, (row, prompt) in enumerate(zip(rows, prompts)):
        assert [s[i] for s in steps] == greedy_by_hand(model, torch.tensor([row + prompt]), 12)
    cont, cache = torch.randint(0, 97, (1, 14), generator=g), model.prefill(torch.tensor([rows[0]]))
    alone = torch.cat([model(part, cache) for part in cont.split([9, 5], 1)], 1)  # two continuations in a row
    assert torch.allclose(model(cont, cache, torch.tensor([[0] * 9 + [1] * 5])), alone, atol=1e-4)


@torch.no_grad()
def test_what_no_token_sees_receives_no_attention():
    """The scorer's target: of 40 tokens, in layers with a window of 10 positions, the last nine alone are seen."""
    model = sliding()
    cache = model.prefill(torch.arange(40)[None])
    got = attention_received(model, cache, torch.arange(12)[None])
    assert (got[:, [1, 2, 4, 5], :, :31] == 0).all() and (got[:, [1, 2, 4, 5], :, 31:] > 0).all()
    assert (got[:, [0, 3]] > 0).all()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, why", [
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, expected a whole number"),
    ({"model_type": "mistral", "sliding_window": "x"}, "config.json: not as expected"),
    ({"model_type": "mistral", "sliding_window": 1.5}, "sliding_window is 1.5, expected a whole number"),
    ({"model_type": "qwen2", **WINDOW, "layer_types": NAMED[1:]}, "layer_types .* expected 6 times full_attention or"),
    ({"model_type": "qwen2", **WINDOW, "layer_types": NAMED * 2}, "layer_types .* expected 6 times full_attention or"),
    ({"model_type": "qwen3", **WINDOW, "layer_types": ["chunked_attention"] * 6}, "layer_types is .*chunked"),
    ({"model_type": "qwen3", "layer_types": NAMED}, "layer_types is .*, expected 6 times full_attention;"),
    ({"model_type": "qwen3", **WINDOW, "layer_types": 5}, "config.json: not as expected"),
    ({"model_type": "qwen3", **WINDOW, "max_window_layers": None}, "config.json: not as expected"),
    ({"model_type": "qwen3", **WINDOW, "max_window_layers": 0, "num_hidden_layers": 1 << 60}, "num_hidden_layers"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "type 'longrope' is not supported"),
    ({"rope_scaling": {"type": 5}}, "5 where str was expected"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', expected a number above 0"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}}, "beta_fast is -1, expected a number above 0"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "config.json: not as expected"),
    ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text', expected 'llama' or 'mistral' or"),
    ({"model_type": "mixtral"}, "model_type is 'mixtral'"), ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
], ids=str)
def test_what_is_not_supported_is_one_line(tmp_path, changes, why):
    with pytest.raises(BadInput, match=why) as e:
        read_config(write(tmp_path, **changes) / "config.json")
    assert str(e.value).startswith(str(tmp_path)) and len(str(e.value)) < 400


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(models, "load_checked", lambda *x: pytest.fail("the weights are loaded before it is said"))
    (write(tmp_path) / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()))
    a = argparse.Namespace(weights=str(tmp_path), device="cpu", dtype="fp32", system=None)
    with pytest.raises(BadInput, match="the tokenizer has [0-9]+ ids, the model 97; they do not belong together"):
        open_model(a)
    a.system = "Be brief."
    with pytest.raises(BadInput, match="no chat template, so no place for a system prompt"):
        open_model(a)


def test_yarn_by_hand():
    """θ = 10⁴, d = 48, 128 positions: pairs that turn more than 8 times keep their frequency, those below one get a
    quarter of it, and the ramp between is over pairs."""
    plain = rope_frequencies(tiny_llama(head_dim=48).cfg)
    scaling = YARN | {"beta_fast": 8, "beta_slow": 1, "attention_factor": 1.0}
    ratio = rope_frequencies(tiny_llama(head_dim=48, rope_scaling=scaling).cfg) / plain
    turns = 128 * plain / (2 * torch.pi)                       # 20.4, 13.9, 9.5 | 6.4, 4.4, 3.0, 2.0, 1.4 | 0.94 …
    assert (turns > 8).sum() == 3 and (turns > 1).sum() == 8
    want = torch.tensor([1, 1, 1] + [1 - 0.75 * i / 6 for i in range(1, 6)] + [0.25] * 16)
    assert torch.allclose(ratio, want, atol=1e-6)


# What is bound to a model ---------------------------------------------------------------------------------------------

def test_adapters_of_before_load_for_llamas_and_for_nothing_else(tmp_path, monkeypatch):
    """They do not say whether heads are normalised; a Llama's are not."""
    llama = tiny_llama()
    base = base_of(llama, Tok)
    assert base["architecture"].keys() == {
        "vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_ffn", "max_positions", "norm_eps",
        "rope_theta", "rope_scaling", "tied"}
    for other in (tiny_llama(head_norm=True), tiny_llama(bias="qkv"), tiny_llama(sliding_window=512)):
        with pytest.raises(BadInput, match="made for a model with (head_norm|bias|sliding_window) = None"):
            check_base("x", base, other, Tok)
        with pytest.raises(BadInput, match="this one has None; pass the --weights"):
            check_base("x", base_of(other, Tok), llama, Tok)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    save_adapter(tmp_path / "adapters" / "a", tiny_compressor(llama), llama, Tok, {})
    assert default_adapter(llama, Tok) and not default_adapter(tiny_llama(head_norm=True), Tok)


def test_logits_that_are_no_numbers_end_generation_with_one_line(model):
    cache = model.prefill(torch.tensor([[7, 8, 9]]))
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(BadInput, match="logits are not finite"):
            next(generate(model, cache, [[1]], 3, temperature=temperature))


@torch.no_grad()
def test_a_temperature_near_zero_is_greedy(model):
    cache = model.prefill(torch.tensor([[7, 8, 9]]))
    greedy = list(generate(model, cache, [[1]], 6))
    assert list(generate(model, cache, [[1]], 6, temperature=1e-40)) == greedy


@torch.no_grad()
def test_a_layer_of_one_part_is_not_taken_apart(model, monkeypatch):
    """Decoding from a whole cache splits and joins nothing; heads of different lengths need it."""
    cache, token = model.prefill(torch.tensor([[7, 8, 9]])).with_room(1), torch.tensor([[1]])
    monkeypatch.setattr(torch.Tensor, "split", lambda *x: pytest.fail("split"))
    model(token, cache)


def test_plain_loading_gives_what_checked_loading_gives(family):
    a, b = load_llama(family[1], dtype=torch.bfloat16), load_checked(family[1], dtype=torch.bfloat16)
    assert isinstance(a, Llama) and a.cfg == b.cfg
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
