"""Tokenizers: ids equal to the reference library's, chats equal to the public templates."""
import json
import random
import time
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference
from transformers import PreTrainedTokenizerFast

from conftest import ROOT
from data.tokenizer import LLAMA3, MAX_BLANKS, QWEN2, TEKKEN, Tokenizer, byte_alphabet
from run.errors import BadInput

# Each can be checked by hand in SmolLM2's vocabulary (Ġ stands for a blank).
PINNED = {
    "1": [33],
    "12345": [33, 34, 35, 36, 37],  # every digit is its own token
    " 1": [216, 33],                # and the blanks before it are a piece of their own
    "  1": [256, 33],
    "hello world": [28120, 905],
    "": [],
    "<|im_end|>": [44, 108, 306, 79, 486, 108, 46],
    "a\x04b": [81, 82],              # a byte without a token is dropped
}
TEXTS = [
    "", "Plain prose, with commas; and 'quotes' don't hurt.",
    "def f(x):\n    return x ** 2  # 3.14\n\n\n", "a  b   c    ",
    "1 22 333  4444 1,234.56", "\t\t\n \n  x", "naïve café Ångström ſ", "汉字と仮名 한국어",
    "🙂👨‍👩‍👧🏳️‍🌈", "½²①٣", "\x00\x07\x1b\x7f\x85", "end with space ", " \u00a0\u2003x",
    "it's IT'S we'll WE'LL", "…—“”", "x" * 300, "  1", "a\r\nb",
]


# ------------------------------------------------------------------ SmolLM2

@pytest.mark.weights
def test_smollm2_ids_are_the_pinned_ones(tokenizer):
    assert {text: tokenizer.encode(text) for text in PINNED} == PINNED


@pytest.mark.weights
def test_smollm2_equals_the_tokenizers_library(tokenizer, weights):
    reference = Reference.from_file(str(weights / "tokenizer.json"))
    for text in [plain(text) for text in TEXTS] + [corpus()] + random_texts(300):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@pytest.mark.weights
def test_text_never_becomes_a_special_token(tokenizer):
    special = set(tokenizer.special.values())
    for name in tokenizer.special:
        question = tokenizer.ask(f"x{name}")[:-len(tokenizer.turn)]
        assert not special & set(tokenizer.encode(f"a{name}b") + question)
    assert tokenizer.decode(tokenizer.encode("<|im_start|>")) == "<|im_start|>"


@pytest.mark.weights
def test_smollm2_has_its_chat_and_its_fingerprint(tokenizer, weights):
    config = json.loads((weights / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == TEMPLATES["smollm2"] and len(tokenizer.header) == 24
    # Adapters and shards hold it.
    assert tokenizer.fingerprint.startswith("263df728e7bedc95")


# ----------------------------- other families: small vocabularies, trained here

CHAT_MARKS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
]
SPM_MARKS = ["<unk>", "<s>", "</s>"]
BYTE_KINDS = ["smollm2", "llama3", "qwen2", "tekken"]
SPM_KINDS = ["llama2", "mistral", "crossing"]  # crossing: tokens with a blank inside
KINDS = BYTE_KINDS + SPM_KINDS


@cache
def corpus() -> str:
    """Prose, code, accents, Chinese, Japanese, Korean and emoji."""
    files = [ROOT / "data" / "lighthouse.txt", *sorted((ROOT / "data").glob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in files]
    rng = random.Random(0)
    for _ in range(400):
        texts.append("".join(rng.choices("汉字仮名漢語한국어", k=rng.randint(1, 6))))
    words = "naïve café Ångström 🙂 👨‍👩‍👧 über señor ½ e\u0301te\u0301 Ελλάδα мир".split()
    texts.append(" ".join(rng.choices(words, k=600)))
    return plain("\n".join(texts))


def plain(text: str) -> str:
    """Without special tokens: the library would find them in a text, ours never does."""
    for mark in SPM_MARKS + CHAT_MARKS:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def random_texts(n: int, length: int = 40) -> list[str]:
    rng = random.Random(0)
    alphabet = "   \n\t\r0123456789abcXYZÀé'’s.,-_()/漢字한🙂²▁e\u0301ßµ\u0644\u0651\u200d\u00a0"
    return ["".join(rng.choices(alphabet, k=length)) for _ in range(n)]


def split(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def train_byte_level(kind: str) -> Reference:
    steps = {
        "smollm2": pre_tokenizers.Digits(individual_digits=True), "llama3": split(LLAMA3),
        "qwen2": split(QWEN2), "tekken": split(TEKKEN),
    }
    t = Reference(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
    t.pre_tokenizer = pre_tokenizers.Sequence([steps[kind], level])
    t.normalizer = normalizers.NFC() if kind == "qwen2" else None
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus().split("\n"), trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPM_MARKS + CHAT_MARKS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return t


def train_sentencepiece(kind: str) -> Reference:
    t = Reference(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    prepend = normalizers.Prepend("▁")
    t.normalizer = normalizers.Sequence([prepend, normalizers.Replace(" ", "▁")])
    t.pre_tokenizer = None if kind == "crossing" else split("▁*[^▁\n]+|\n+")
    text = corpus()[:20000] if kind == "crossing" else corpus()
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    t.train_from_iterator(text.split("\n"), trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPM_MARKS + bytes_, show_progress=False,
        limit_alphabet=200,
    ))

    t.pre_tokenizer = None
    if kind == "mistral":
        t.normalizer = None
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    # In public files the bytes are plain tokens, and Mistral's newer ones have marks.
    spec = json.loads(t.to_str())
    spec["added_tokens"] = [x for x in spec["added_tokens"] if x["content"] in SPM_MARKS]
    t = Reference.from_str(json.dumps(spec))
    t.add_special_tokens(CHAT_MARKS if kind == "mistral" else [])
    return t


@cache
def trained(kind: str) -> str:
    """The tokenizer.json of a kind, with about 1,500 tokens."""
    train = train_byte_level if kind in BYTE_KINDS else train_sentencepiece
    return train(kind).to_str()


def unchanged(spec: dict) -> None:
    pass


def add_words(spec: dict, *words: str, **flags) -> None:
    """Added tokens that are not special, behind all ids."""
    for word in words:
        n = 1 + max(spec["model"]["vocab"].values())
        n = max([n] + [1 + token["id"] for token in spec["added_tokens"]])
        plain = dict.fromkeys(["special", "normalized", "lstrip", "rstrip", "single_word"], False)
        spec["added_tokens"].append({"id": n, "content": word} | plain | flags)


def folder_of(folder, kind: str, template=None, change=unchanged, **config) -> Path:
    """A tokenizer's folder; `change` may change its tokenizer.json."""
    spec = json.loads(trained(kind))
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_tokenizers_library(tmp_path, kind):
    ours = Tokenizer(folder_of(tmp_path, kind))
    reference = Reference.from_str(trained(kind))
    texts = [plain(text) for text in TEXTS] + corpus().split("\n\n") + random_texts(300)
    for text in [*texts, corpus(), *random_texts(3, 10_000)]:
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids, text[:200]

    for text in ("汉字 and ½ é🙂", "x\ny"):
        begin = " " if kind in SPM_KINDS else ""  # SentencePiece begins a text with it
        assert ours.decode(ours.encode(text)) == begin + text


def test_sentencepiece_joined_text_has_no_blank_of_its_own(tmp_path):
    for kind in ("llama2", "mistral"):
        t = Tokenizer(folder_of(tmp_path, kind))
        both = t.encode("The house") + t.encode(" is", joined=True)
        assert both == t.encode("The house is")
        assert 2 not in t.encode("a</s>b", joined=True)  # never a special token


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_schemes_equal_the_tokenizers_library(tmp_path, scheme):
    def change(spec):
        spec["pre_tokenizer"]["prepend_scheme"] = scheme

    ours = Tokenizer(folder_of(tmp_path, "mistral", change=change))
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("", " ", "a", " a", "  a   b", "▁a", "The house  is"):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("kind", ["qwen2", "llama3", "mistral", "llama2"])
def test_added_words_are_found_in_text_as_the_library_finds_them(tmp_path, kind):
    def change(spec):
        add_words(spec, "<think>", "</think>", "<thi")
        add_words(spec, "<|fim|>")  # which looks like a mark: never from text

    ours = Tokenizer(folder_of(tmp_path, kind, change=change))
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<think>", "a <think>\n\n</think> b", "<thin <think><think>é</think", " <think>\u0338"):
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids, text
        assert ours.special["<thi"] in ids or ours.special["<think>"] in ids
    assert ours.special["<|fim|>"] not in ours.encode("<|fim|>")

    plain = Tokenizer(folder_of(tmp_path, kind))
    assert plain.fingerprint != ours.fingerprint


@pytest.mark.parametrize("kind, flags", [
    ("llama3", {"lstrip": True}), ("llama3", {"single_word": True}), ("qwen2", {"normalized": True}),
])
def test_added_words_that_we_would_find_elsewhere_are_refused(tmp_path, kind, flags):
    def change(spec):
        add_words(spec, "word", **flags)

    with pytest.raises(BadInput, match="the added token .* is not a plain word"):
        Tokenizer(folder_of(tmp_path, kind, change=change))


# ------------------------------------------------------------- chat formats

# The public templates on the Hugging Face hub, without their branches for tools.
CHATML = ("{%% for message in messages %%}{%% if loop.first and messages[0]['role'] != 'system' %%}"
          "{{ '<|im_start|>system\n%s<|im_end|>\n' }}{%% endif %%}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{%% endfor %%}"
          "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}")
TEMPLATES = {
    # HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2": CHATML % "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    # Qwen/Qwen2-7B-Instruct
    "qwen2": CHATML % "You are a helpful assistant.",
    # Qwen/Qwen2.5-7B-Instruct
    "qwen2.5": r"""{%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    # Qwen/Qwen3-8B
    "qwen3": r"""{%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
    # meta-llama/Meta-Llama-3-8B-Instruct
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}"
              "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
              "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
              "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # meta-llama/Llama-3.1-8B-Instruct (3.2 and 3.3 are alike, with today's date where transformers knows it)
    "llama3.1": r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    # meta-llama/Llama-2-7b-chat-hf
    "llama2": r"""{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"""
              r"""{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"""
              r"""{% set system_message = false %}{% endif %}{% for message in loop_messages %}"""
              r"""{% if loop.index0 == 0 and system_message != false %}"""
              r"""{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"""
              r"""{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"""
              r"""{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"""
              r"""{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    # mistralai/Mistral-7B-Instruct-v0.2, as it first was: no system prompt
    "mistral-v0.2": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
                    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
                    "{{ message['content'] + eos_token}}{% endif %}{% endfor %}",
    # mistralai/Mistral-7B-Instruct-v0.3
    "mistral-v0.3": r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}""",
    # mistralai/Mistral-Small-24B-Instruct-2501, whose own system prompt holds the day's date: only with one of ours
    "mistral-v7": r"""{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are Mistral Small 3. The current date is " + today + "." %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}""",
}
# mistralai/Mistral-Nemo-Instruct-2407 (tekken): v0.3's without the blank
TEMPLATES["nemo"] = TEMPLATES["mistral-v0.3"].replace('"[INST] "', '"[INST]"')
# Qwen/QwQ-32B, which always thinks
TEMPLATES["qwq"] = TEMPLATES["qwen2.5"].replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
# A template that writes its first token out
TEMPLATES["literal"] = TEMPLATES["nemo"].replace("{{- bos_token }}", "{{- '<s>' }}")
SYSTEMS = (None, "Be brief.")


@pytest.mark.parametrize("template, kind, systems", [
    ("smollm2", "smollm2", SYSTEMS), ("qwen2", "qwen2", SYSTEMS), ("qwen2.5", "qwen2", SYSTEMS),
    ("qwen3", "qwen2", SYSTEMS), ("llama3", "llama3", SYSTEMS), ("llama3.1", "llama3", SYSTEMS),
    ("nemo", "tekken", SYSTEMS), ("mistral-v7", "tekken", SYSTEMS[1:]),
    ("qwen3", "thinking", SYSTEMS), ("qwq", "thinking", SYSTEMS), ("literal", "tekken", SYSTEMS),
    # SentencePiece: a document begins with a blank behind a special token, not behind text.
    ("llama2", "llama2", SYSTEMS), ("mistral-v0.2", "llama2", (None,)),
    ("mistral-v0.3", "mistral", SYSTEMS), ("qwen3", "mistral", SYSTEMS),
    ("nemo", "mistral", SYSTEMS), ("mistral-v7", "mistral", SYSTEMS[1:]),
    # Older files of Mistral put that blank behind every special token.
    ("mistral-v0.3", "legacy", SYSTEMS), ("qwen3", "legacy", SYSTEMS),
    ("mistral-v0.2", "legacy", (None,)),
])
def test_chats_are_the_templates(tmp_path, template, kind, systems):
    """Our pieces end to end have the ids of the model's own chat template."""
    def change(spec):
        if kind == "legacy":
            spec["normalizer"] = json.loads(trained("llama2"))["normalizer"]
            spec["pre_tokenizer"] = None
        if kind == "thinking":
            add_words(spec, "<think>", "</think>")

    layout = TEMPLATES[template]
    bos = "<|begin_of_text|>" if kind == "llama3" else "<s>"
    trained_kind = {"legacy": "mistral", "thinking": "qwen2"}.get(kind, kind)
    folder = folder_of(tmp_path, trained_kind, layout, change, bos_token=bos)
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=bos, eos_token="</s>",
        chat_template=layout,
    )
    end = "</s>" if "[INST]" in layout else "<|im_end|>"
    end = "<|eot_id|>" if kind == "llama3" else end

    for system in systems:
        t = Tokenizer(folder, system)
        ids = t.header + t.document("The house at the café") + t.ask("Who built it?")
        messages = [{"role": "user", "content": "The house at the café\n\nWho built it?"}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        assert ids == reference.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=False,
        )
        assert t.end == [t.special[end]] and t.end[0] in t.stop_ids


@pytest.mark.parametrize("template, kind", [("qwen3", "qwen2"), ("nemo", "tekken")])
def test_a_system_prompt_never_becomes_a_special_token(tmp_path, template, kind):
    folder = folder_of(tmp_path, kind, TEMPLATES[template])
    system = "<|im_end|>[INST]{}[/INST]</s>"
    brief = Tokenizer(folder, "x")
    t = Tokenizer(folder, system)
    special = set(t.special.values())
    assert [i for i in t.header if i in special] == [i for i in brief.header if i in special]
    assert system in t.decode(t.header)


def test_a_base_model_is_asked_in_plain_text(tmp_path):
    """Its vocabulary holds the marks of a chat, which mean nothing to it."""
    t = Tokenizer(folder_of(tmp_path, "smollm2"))
    assert t.header == [] and t.end == t.encode("\n")
    assert t.ask("Q?") == t.encode("\n\nQ?") + t.encode("\n")
    assert t.special["<|endoftext|>"] in t.stop_ids
    with pytest.raises(BadInput, match="no place for a system prompt"):
        Tokenizer(tmp_path, "Be brief.")


def test_a_base_model_begins_as_its_library_does(tmp_path):
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    steps = [{"type": "ByteLevel"}, json.loads(begin.__getstate__())]

    def change(spec):
        spec["post_processor"] = {"type": "Sequence", "processors": steps}

    assert Tokenizer(folder_of(tmp_path, "llama3", change=change)).header == [1]


def test_templates_are_found_where_transformers_puts_them(tmp_path):
    def header():
        t = Tokenizer(tmp_path)
        return t.decode(t.header)

    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML % "Hi."}]
    folder_of(tmp_path, "qwen2", named)
    expected = "<|im_start|>system\nHi.<|im_end|>\n<|im_start|>user\n"
    assert header() == expected
    (tmp_path / "chat_template.jinja").write_text(CHATML % "Moin.")
    assert header() == expected.replace("Hi.", "Moin.")


@pytest.mark.parametrize("config", [
    {"chat_template": 5}, {"chat_template": [{"name": "default"}]}, {"chat_template": "<|im_start|>"},
    {"chat_template": "[INST][/INST]"}, {"chat_template": "[INST] [/INST]"},
    {"chat_template": "bos_token [INST] [/INST]", "bos_token": "<nowhere>"},
    {"bos_token": {"text": 5}},
])
def test_odd_chats_are_refused(tmp_path, config):
    def change(spec):
        spec["added_tokens"] = []

    folder_of(tmp_path, "smollm2", change=change, **config)
    with pytest.raises(BadInput, match="tokenizer_config.json: .* files of one model"):
        Tokenizer(tmp_path)


def test_an_unknown_template_is_refused_with_advice(tmp_path):
    folder_of(tmp_path, "smollm2", "{{ '<｜User｜>' + x }}")
    with pytest.raises(BadInput, match=f"^{tmp_path}: .* delete chat_template from tokenizer_config"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("generation, model, expected", [
    ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {7, 8}),
    ({}, {"eos_token_id": 9}, {9}), (None, {"eos_token_id": [9, 0]}, {9, 0}),
    ({"eos_token_id": 0}, None, {0}), ({"eos_token_id": None}, {}, set()),
])
def test_stop_ids_of_the_model_count(tmp_path, generation, model, expected):
    """transformers reads config.json only without a generation_config.json's own."""
    write_tokenizer(tmp_path)
    for name, config in {"generation_config": generation, "config": model}.items():
        if config is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).stop_ids == {304, 301} | expected


@pytest.mark.parametrize("ids", ["2", [None], [[2]], {"id": 2}, 2.5])
def test_odd_stop_ids_are_refused(tmp_path, ids):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(BadInput, match="generation_config.json: .* where int was expected"):
        Tokenizer(tmp_path)


# ------------------------------------------- refused files, and long texts

def tiny_tokenizer_json(**changes) -> dict:
    """Bytes, three merges and Llama 3's marks."""
    vocab = {c: i for i, c in enumerate(sorted(byte_alphabet()))}
    vocab |= {"he": 256, "ll": 257, "hell": 258}
    marks = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>",
    ]
    cut = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }
    spec = {
        "added_tokens": [{"content": mark, "id": 300 + i} for i, mark in enumerate(marks)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level]},
        "model": {
            "type": "BPE", "byte_fallback": False, "ignore_merges": True, "vocab": vocab,
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"]],
        },
    }
    return spec | changes


def write_tokenizer(folder, **changes) -> Path:
    """A tiny tokenizer with Llama 3's chat, for tests of anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = tiny_tokenizer_json(**changes)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"bos_token": "<|begin_of_text|>", "chat_template": TEMPLATES["llama3"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_llama3_by_hand(tmp_path):
    t = Tokenizer(write_tokenizer(tmp_path))
    assert t.decode(t.header + t.encode("DOC") + t.ask("Q")) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nDOC\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert t.encode("hello") == [258, t.encode("o")[0]]
    assert t.stop_ids == {304, 301} and t.end == [304]


def bpe(**changes) -> dict:
    return {"model": tiny_tokenizer_json()["model"] | changes}


def pre(first=(), last=()) -> dict:
    """The pre-tokenizer with changes in its two steps."""
    cut, level = tiny_tokenizer_json()["pre_tokenizer"]["pretokenizers"]
    steps = [cut | dict(first), level | dict(last)]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}


def small_bpe(more: list[str], merges: list[str], ignore_merges: bool) -> dict:
    """A tokenizer.json with every byte and a few tokens."""
    vocab = {c: i for i, c in enumerate([*sorted(byte_alphabet()), *more])}
    model = bpe(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    return tiny_tokenizer_json(**model, added_tokens=[])


@pytest.mark.parametrize("more, merges, ignore_merges, text, n", [
    (["ab", "abc", "bc"], ["a b"], False, "abc", 2),
    (["bc", "ab", "abc"], ["b c", "a b", "ab c"], False, "abc", 2),  # b c comes before a b
    (["ab", "bc", "abc"], ["a b", "b c", "ab c", "a bc"], True, "xabc", 2),
])
def test_tokens_are_made_by_merges_only(tmp_path, more, merges, ignore_merges, text, n):
    spec = small_bpe(more, merges, ignore_merges)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ids = Tokenizer(tmp_path).encode(text)
    assert ids == Reference.from_str(json.dumps(spec)).encode(text).ids and len(ids) == n


def test_random_merges_are_reproduced_or_refused(tmp_path):
    rng = random.Random(0)
    equal = 0
    for _ in range(300):
        tokens = list("ab")
        merges = []
        for _ in range(rng.randint(1, 8)):
            a, b = rng.choice(tokens), rng.choice(tokens)
            if a + b not in tokens:
                tokens.append(a + b)
                merges += [f"{a} {b}"] * (rng.random() < 0.8)
        spec = small_bpe(tokens[2:], merges, rng.random() < 0.5)
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        try:
            ours = Tokenizer(tmp_path)
        except BadInput:
            assert spec["model"]["ignore_merges"]
            continue
        equal += 1
        reference = Reference.from_str(json.dumps(spec))
        for _ in range(20):
            text = "".join(rng.choices("ab", k=12))
            assert ours.encode(text) == reference.encode(text).ids, (text, tokens, merges)
    assert equal > 150


@pytest.mark.parametrize("change", [
    # What we could not reproduce
    {"model": {"type": "Unigram"}}, bpe(dropout=0.1), {"normalizer": {"type": "NFKC"}},
    {"pre_tokenizer": {"type": "Metaspace"}}, pre(first={"pattern": {"Regex": "(a+)+$"}}),
    pre(first={"behavior": "Removed"}), pre(last={"add_prefix_space": True}),
    bpe(vocab={"▁a": 0}, merges=[]), bpe(byte_fallback=True),
    bpe(byte_fallback=True, ignore_merges=False) | {"pre_tokenizer": METASPACE},
    bpe(byte_fallback=True, ignore_merges=False) | {"pre_tokenizer": METASPACE | {"split": True}},
    bpe(vocab={"a": 0, "b": 1, "ab": 3, "ba": 2}, merges=["a b", "b a"], ignore_merges=False),
    bpe(vocab={"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, merges=["a b"]),
    # Ids that are no ids
    *[{"added_tokens": [{"content": "x", "id": i}]} for i in ("1", 258, 1 << 40)],
    *[bpe(vocab={"a": i}) for i in (1.5, True, -1)], bpe(vocab={}, merges=[]),
    # Wrong types
    {"pre_tokenizer": 5}, {"pre_tokenizer": None}, {"pre_tokenizer": {"pretokenizers": 5}},
    {"model": []}, {"model": {}}, {"added_tokens": 3}, {"added_tokens": [3]},
    {"added_tokens": [{"content": [], "id": 1}]}, {"added_tokens": [{"content": "\ud800", "id": 400}]},
    bpe(vocab=[]), bpe(merges=[5]), bpe(merges=["a b c"]), bpe(merges=None), {"normalizer": 7},
    {"post_processor": 3},
])
def test_odd_tokenizers_are_refused(tmp_path, change):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json(**change)))
    with pytest.raises(BadInput, match=f"^{tmp_path}/tokenizer.*json: ") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_tokenizer_model_alone_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(BadInput, match="tokenizer.model without a tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("kind, change", [
    ("llama3", lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=QWEN2)),
    ("llama3", lambda s: s.update(normalizer={"type": "NFC"})),
    ("llama3", lambda s: s.update(pre_tokenizer={"type": "ByteLevel"})),
    ("mistral", lambda s: s["pre_tokenizer"].update(prepend_scheme="never")),
    ("mistral", lambda s: s["model"]["merges"].reverse()),
])
def test_the_fingerprint_covers_what_ids_depend_on(tmp_path, kind, change):
    before = Tokenizer(folder_of(tmp_path, kind)).fingerprint
    assert Tokenizer(folder_of(tmp_path, kind)).fingerprint == before
    assert Tokenizer(folder_of(tmp_path, kind, change=change)).fingerprint != before


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_long_runs_of_blanks_have_the_ids_of_the_library(tmp_path, kind):
    """tiktoken panics at a million blanks in a row."""
    ours = Tokenizer(folder_of(tmp_path, kind))
    reference = Reference.from_str(trained(kind))
    n = 3 * MAX_BLANKS + 77
    for text in (" " * n, "a" + " " * n + "b", "\n" * n + "x", " " * n + "7"):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids, text[:9]


@pytest.mark.parametrize("kind, length", [("smollm2", 1_000_000), ("llama2", 100_000)])
def test_very_long_runs_of_anything_take_seconds(tmp_path, kind, length):
    t = Tokenizer(folder_of(tmp_path, kind))
    start = time.perf_counter()
    for run in (" ", "\n", "汉"):
        text = run * (length // len(run))
        assert t.decode(t.encode(text, joined=True)) == text
    blocks = (" " * (MAX_BLANKS - 9) + "x") * 20  # each is nearly too long
    assert t.decode(t.encode(blocks, joined=True)) == blocks
    assert time.perf_counter() - start < 30
