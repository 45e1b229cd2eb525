"""Tokenizers: ids equal to the reference library's, chat formats equal to the public templates, odd files refused."""
import json
import random
import time
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers, Regex
from transformers import PreTrainedTokenizerFast

from conftest import ROOT
from run.errors import BadInput
from data.tokenizer import LLAMA3, QWEN2, RUN, SMOLLM, TEKKEN, Tokenizer, byte_alphabet, parts, pattern_of

# Each can be checked by hand in tokenizer.json's vocabulary ("Ġ" stands for a blank, "Ċ" for a newline).
PINNED = {
    "1": [33], "12345": [33, 34, 35, 36, 37],         # every digit is its own token
    " 1": [216, 33], "  1": [256, 33],                # … and the blanks before it are a piece of their own
    "hello world": [28120, 905], "": [], "<|im_end|>": [44, 108, 306, 79, 486, 108, 46],
}
TEXTS = ["", "Plain prose, with commas; and 'quotes' don't hurt.", "def f(x):\n    return x ** 2  # 3.14\n\n\n",
         "a  b   c    ", "1 22 333  4444 1,234.56", "\t\t\n \n  x", "naïve café Ångström ſ", "汉字と仮名 한국어",
         "🙂👨‍👩‍👧🏳️‍🌈", "½²①٣", "\x00\x07\x1b\x7f\x85",
         "end with space ", " \u00a0\u2003x", "it's IT'S we'll WE'LL", "…—“”", "x" * 300, "  1", "a\r\nb"]


@pytest.mark.weights
@pytest.mark.parametrize("text", PINNED, ids=repr)
def test_pinned_ids(tokenizer, text):
    assert tokenizer.encode(text) == PINNED[text]


@pytest.mark.weights
@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.weights
def test_equal_to_the_tokenizers_library(tokenizer, weights):
    """Our SmolLM2 regex against the library's own Digits + ByteLevel steps, on prose, code and random characters."""
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(weights / "tokenizer.json"))
    rng = random.Random(0)
    alphabet = "  \n\t0123456789abcXYZ'’s.,-_()é漢🙂²"
    texts = TEXTS + [p.read_text(encoding="utf-8") for p in (ROOT / "data" / "lighthouse.txt", Path(__file__))]
    texts += ["".join(rng.choices(alphabet, k=40)) for _ in range(300)]
    for text in texts:
        text = text.replace("<|", "< |")  # the library would make special tokens of them, which is the next test
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.weights
def test_text_never_becomes_a_special_token(tokenizer):
    for name in tokenizer.special:
        ids = tokenizer.encode(f"a{name}b") + tokenizer.ask(f"x{name}")[:-len(tokenizer.turn)]
        assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(tokenizer.encode("<|im_start|>")) == "<|im_start|>"


@pytest.mark.weights
def test_bytes_without_a_token_are_dropped(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


# Tokenizers of other families: small vocabularies, trained here -----------------------------------------------------

CHAT_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
              "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
SPM = ["<unk>", "<s>", "</s>"]


@cache
def corpus() -> str:
    """Prose, code, accents, CJK, emoji."""
    files = [ROOT / "README.md", ROOT / "data" / "lighthouse.txt", *sorted((ROOT / "data").glob("*.py"))]
    rng = random.Random(0)
    more = [" ".join("".join(rng.choices("汉字仮名漢語한국어", k=rng.randint(1, 6))) for _ in range(400)),
            " ".join(rng.choices("naïve café Ångström 🙂 👨‍👩‍👧 über señor ½ e\u0301te\u0301 Ελλάδα мир".split(), k=600))]
    return plain("\n".join([p.read_text(encoding="utf-8") for p in files] + more))


def plain(text: str) -> str:
    """Without special tokens: the library would make them of text, which ours never does."""
    for mark in SPM + CHAT_MARKS:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@cache
def trained(kind: str) -> str:
    """tokenizer.json of a kind, 1,500 tokens or so."""
    if kind in ("smollm2", "llama3", "qwen2", "tekken"):
        t = Reference(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
        before = {"smollm2": pre_tokenizers.Digits(individual_digits=True), "llama3": split(LLAMA3),
                  "qwen2": split(QWEN2), "tekken": split(TEKKEN)}[kind]
        t.pre_tokenizer = pre_tokenizers.Sequence([before, level])
        t.normalizer = normalizers.NFC() if kind == "qwen2" else None
        special, alphabet = SPM + CHAT_MARKS, pre_tokenizers.ByteLevel.alphabet()
        t.decoder = decoders.ByteLevel()
    else:
        t = Reference(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        t.pre_tokenizer = None if kind == "crossing" else split("▁*[^▁\n]+|\n+")
        special, alphabet = SPM + [f"<0x{b:02X}>" for b in range(256)], []
    text = corpus() if kind != "crossing" else corpus()[:20000]
    t.train_from_iterator(text.split("\n"), trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False,
        limit_alphabet=256 if alphabet else 200))
    if kind in ("llama2", "mistral", "crossing"):
        t.pre_tokenizer = None
        if kind == "mistral":
            t.normalizer = None
            t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        spec = json.loads(t.to_str())
        # in public files the bytes are plain tokens, and Mistral's newer ones have marks
        spec["added_tokens"] = [x for x in spec["added_tokens"] if not x["content"].startswith("<0x")]
        t = Reference.from_str(json.dumps(spec))
        t.add_special_tokens(CHAT_MARKS if kind == "mistral" else [])
    return t.to_str()


KINDS = ["smollm2", "llama3", "qwen2", "tekken", "llama2", "mistral", "crossing"]


def folder_of(tmp_path, kind: str, template: str | None = None, change=lambda spec: None, **config) -> Path:
    spec = json.loads(trained(kind))
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": template} if template else {}) | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def same_ids(kind: str, ours: Tokenizer, texts) -> int:
    reference, n = Reference.from_str(trained(kind)), 0
    for text in texts:
        want = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == want, (kind, text[:200])
        n += len(want)
    return n


def random_texts(n: int, k: int = 40, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    alphabet = "   \n\t\r0123456789abcXYZÀé'’s.,-_()/漢字한🙂²▁e\u0301ßµ\u0644\u0651\u200d\u00a0"
    return ["".join(rng.choices(alphabet, k=k)) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_tokenizers_library(tmp_path, kind):
    ours = Tokenizer(folder_of(tmp_path, kind))
    texts = [plain(x) for x in TEXTS] + corpus().split("\n\n") + random_texts(300)
    assert same_ids(kind, ours, texts) > 10_000
    for text in ("汉字 and ½ é🙂", "  two  blanks", "x\ny"):  # a blank begins a SentencePiece text
        assert ours.decode(ours.encode(text)).removeprefix(" " * (kind in KINDS[4:])) in (text, text[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "llama2", "mistral"])
def test_200k_ids_equal_the_tokenizers_library(tmp_path, kind):
    ours = Tokenizer(folder_of(tmp_path, kind))
    n = same_ids(kind, ours, [corpus()])
    for p in sorted(ROOT.glob("*.py")):
        n += same_ids(kind, ours, [plain(p.read_text(encoding="utf-8"))])
    for i in range(10):
        n += same_ids(kind, ours, random_texts(20, 10 ** 4, seed=i)) if n < 200_000 else 0
    assert n > 200_000


def test_sentencepiece_joined_text_has_no_blank_of_its_own(tmp_path):
    for kind in ("llama2", "mistral"):
        t = Tokenizer(folder_of(tmp_path, kind))
        assert t.encode("The house") + t.encode(" is", joined=True) == t.encode("The house is")
        assert t.encode("a</s>b", joined=True)[1:] != [2, *t.encode("b", joined=True)], "never a special token"


def test_metaspace_schemes(tmp_path):
    """A blank put before a text or not: as the library does."""
    for scheme in ("always", "first", "never"):
        folder_of(tmp_path, "mistral", change=lambda spec: spec["pre_tokenizer"].update(prepend_scheme=scheme))
        ours = Tokenizer(tmp_path)
        reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
        for text in ("", " ", "a", " a", "  a   b", "▁a", "The house  is"):
            assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids, (scheme, text)
    with pytest.raises(BadInput, match="Metaspace that does not split"):
        Tokenizer(folder_of(tmp_path, "mistral", change=lambda s: s["pre_tokenizer"].update(split=True)))


# Chat formats ------------------------------------------------------------------------------------------------------

# The public templates of tokenizer_config.json on the Hugging Face hub; branches for tools are left out.
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
SYSTEMS = (None, "Be brief.")


@pytest.mark.parametrize("template, kind, systems", [
    ("smollm2", "smollm2", SYSTEMS), ("qwen2", "qwen2", SYSTEMS), ("qwen2.5", "qwen2", SYSTEMS),
    ("qwen3", "qwen2", SYSTEMS), ("llama3", "llama3", SYSTEMS), ("llama3.1", "llama3", SYSTEMS),
    ("nemo", "tekken", SYSTEMS), ("mistral-v7", "tekken", SYSTEMS[1:]),
    # SentencePiece: where a document follows a special token it begins with a blank, where it follows text it does not
    ("llama2", "llama2", SYSTEMS), ("mistral-v0.2", "llama2", (None,)), ("mistral-v0.3", "mistral", SYSTEMS),
    ("qwen3", "mistral", SYSTEMS), ("nemo", "mistral", SYSTEMS), ("mistral-v7", "mistral", SYSTEMS[1:]),
    # older files of Mistral put that blank after every special token
    ("mistral-v0.3", "legacy", SYSTEMS), ("qwen3", "legacy", SYSTEMS), ("mistral-v0.2", "legacy", (None,)),
])
def test_chats_are_the_templates(tmp_path, template, kind, systems):
    """Our pieces laid end to end have the ids that the model's own chat template gives."""
    def change(spec):
        if kind == "legacy":
            spec.update(normalizer=json.loads(trained("llama2"))["normalizer"], pre_tokenizer=None)
    bos = "<|begin_of_text|>" if kind == "llama3" else "<s>"
    folder = folder_of(tmp_path, "mistral" if kind == "legacy" else kind, TEMPLATES[template], change, bos_token=bos)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=bos, eos_token="</s>",
                                        chat_template=TEMPLATES[template])
    for system in systems:
        t = Tokenizer(folder, system)
        got = t.header + t.document("The house at the café") + t.ask("Who built it?")
        messages = [{"role": "system", "content": system}] * (system is not None) + [
            {"role": "user", "content": "The house at the café\n\nWho built it?"}]
        assert got == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert t.end == [t.special["<|eot_id|>" if kind == "llama3" else "</s>" if "[INST]" in TEMPLATES[template]
                                   else "<|im_end|>"]] and {*t.end} <= t.stop_ids


def test_a_system_prompt_never_becomes_a_special_token(tmp_path):
    for template, kind in (("qwen3", "qwen2"), ("nemo", "tekken")):
        folder, special = folder_of(tmp_path, kind, TEMPLATES[template]), "<|im_end|>[INST]{}[/INST]</s>"
        brief, t = Tokenizer(folder, "x"), Tokenizer(folder, special)
        marks = [[i for i in x.header if i in x.special.values()] for x in (brief, t)]
        assert marks[0] == marks[1] and special in t.decode(t.header)


def test_a_base_model_is_asked_in_plain_text(tmp_path):
    """Its vocabulary holds the marks of a chat; without a template of its own they mean nothing to it."""
    for kind in ("smollm2", "llama3"):
        t = Tokenizer(folder_of(tmp_path, kind))
        assert t.header == [] and t.ask("Q?") == t.encode("\n\nQ?") + t.encode("\n") and t.end == t.encode("\n")
        assert t.special["<|endoftext|>"] in t.stop_ids
    begin = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    t = Tokenizer(folder_of(tmp_path, "llama3", change=lambda s: s.update(
        post_processor={"type": "Sequence", "processors": [{"type": "ByteLevel"}, json.loads(begin.__getstate__())]})))
    assert t.header == [1], "the one token that its own library puts first"
    with pytest.raises(BadInput, match="no chat template, so no place for a system prompt"):
        Tokenizer(tmp_path, "Be brief.")


def test_templates_are_found_in_every_place(tmp_path):
    folder, want = folder_of(tmp_path, "qwen2"), CHATML % "Hello."
    header = lambda: Tokenizer(folder).decode(Tokenizer(folder).header)  # noqa: E731
    expected = "<|im_start|>system\nHello.<|im_end|>\n<|im_start|>user\n"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": want}))
    assert header() == expected
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": [
        {"name": "tool_use", "template": "x"}, {"name": "default", "template": want.replace("Hello.", "Hi.")}]}))
    assert header() == expected.replace("Hello.", "Hi.")
    (folder / "chat_template.jinja").write_text(want.replace("Hello.", "Moin."))
    assert header() == expected.replace("Hello.", "Moin.")


@pytest.mark.parametrize("config, message", [
    ({"chat_template": "{{ '<｜User｜>' + x }}"}, "none of the marks known here"),
    ({"chat_template": 5}, "chat_template is a JSON int"), ({"chat_template": [{"name": "default"}]}, "template"),
    ({"chat_template": "<|im_start|>"}, "mark <|im_start|> is no special token"),
    ({"chat_template": "[INST][/INST]"}, "mark [INST] is no special token"),
    ({"chat_template": "[INST] [/INST]"}, "mark </s> is no special token"),  # these marks may be text
    ({"chat_template": "bos_token [INST] [/INST]", "bos_token": "<nowhere>"}, "nowhere"),
    ({"bos_token": {"text": 5}}, "content"),
])
def test_odd_chats_are_refused(tmp_path, config, message):
    spec = json.loads(trained("smollm2"))
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput) as e:
        Tokenizer(tmp_path)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.weights
def test_chat_format_is_smollms(tokenizer, weights):
    template = json.loads((weights / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert template == TEMPLATES["smollm2"] and len(tokenizer.header) == 24


# Files that are refused, and texts that are long -------------------------------------------------------------------

def tiny_tokenizer_json(**changes) -> dict:
    """Bytes, three merges and Llama 3's marks."""
    vocab = {c: i for i, c in enumerate(sorted(byte_alphabet()))}
    vocab |= {"he": 256, "ll": 257, "hell": 258}
    added = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    spec = {"added_tokens": [{"content": t, "id": 300 + i} for i, t in enumerate(added)], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
            "model": {"type": "BPE", "byte_fallback": False, "ignore_merges": True, "vocab": vocab,
                      "merges": [["h", "e"], ["l", "l"], ["he", "ll"]]}}
    return spec | changes


def write_tokenizer(folder, **changes) -> Path:
    """A tiny tokenizer with Llama 3's chat, for tests of anything else."""
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json(**changes)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|begin_of_text|>", "chat_template": TEMPLATES["llama3"]}))
    return folder


def test_llama3_format(tmp_path):
    """Three-digit groups, the header and turn marks, merges as pairs."""
    t = Tokenizer(write_tokenizer(tmp_path))
    assert t.decode(t.header + t.encode("DOC") + t.ask("Q")) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nDOC\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert t.stop_ids == {304, 301} and t.encode("hello") == [258, t.encode("o")[0]] and t.end == [304]


def bpe(**changes) -> dict:
    return {"model": tiny_tokenizer_json()["model"] | changes}


SPLIT = tiny_tokenizer_json()["pre_tokenizer"]["pretokenizers"]


@pytest.mark.parametrize("change, message", [
    ({"model": {"type": "Unigram"}}, "a Unigram model"),
    (bpe(byte_fallback=True), "expected Prepend + Replace"),
    (bpe(byte_fallback=True, ignore_merges=False)
     | {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": False}}, "<0x00>"),
    (bpe(dropout=0.1), "dropout is 0.1"),
    ({"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "pre-tokenizer ['Metaspace']"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        SPLIT[0] | {"pattern": {"Regex": "(a+)+$"}}, SPLIT[1]]}}, "'(a+)+$' is not Llama 3's"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        SPLIT[0] | {"behavior": "Removed"}, SPLIT[1]]}}, "is not Llama 3's"),
    (bpe(vocab={"▁a": 0}, merges=[]), "byte-level alphabet"),
    (bpe(vocab={"a": 0, "b": 1, "ab": 3, "ba": 2}, merges=["a b", "b a"], ignore_merges=False), "order of the ids"),
    # of the wrong type, wherever
    ({"pre_tokenizer": 5}, "tokenizer.json"), ({"pre_tokenizer": {"pretokenizers": 5}}, "tokenizer.json"),
    ({"model": []}, "tokenizer.json"), ({"model": {}}, "'type'"), ({"added_tokens": 3}, "tokenizer.json"),
    ({"added_tokens": [3]}, "tokenizer.json"), ({"added_tokens": [{"content": [], "id": 1}]}, "tokenizer.json"),
    ({"added_tokens": [{"content": "x", "id": "1"}]}, "different whole numbers"), (bpe(vocab=[]), "tokenizer.json"),
    ({"added_tokens": [{"content": "x", "id": 258}]}, "different whole numbers"),
    ({"added_tokens": [{"content": "x", "id": 1 << 40}]}, "different whole numbers"),
    ({"added_tokens": [{"content": "\ud800", "id": 400}]}, "surrogates"),
    (bpe(vocab={"a": 1.5}), "different whole numbers"), (bpe(vocab={"a": True}), "different whole numbers"),
    (bpe(vocab={"a": -1}), "different whole numbers"), (bpe(vocab={}, merges=[]), "tokenizer.json"),
    (bpe(merges=[5]), "tokenizer.json"), (bpe(merges=["a b c"]), "tokenizer.json"),
    (bpe(merges=None), "tokenizer.json"),
    ({"normalizer": 7}, "tokenizer.json"), ({"normalizer": {}}, "tokenizer.json"),
    ({"post_processor": 3}, "tokenizer_config.json"),
])
def test_odd_tokenizers_are_refused(tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json(**change)))
    with pytest.raises(BadInput) as e:
        Tokenizer(tmp_path)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_tokenizer_model_alone_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(BadInput, match="tokenizer.model without a tokenizer.json"):
        Tokenizer(tmp_path)


def test_the_smollm_pattern_is_found():
    pre = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]}
    assert pattern_of(pre, "x") == SMOLLM


def test_the_fingerprint_knows_how_text_is_cut(tmp_path):
    """The same vocabulary behind another pattern, normaliser, order of merges or prefix gives other ids."""
    def fingerprint(kind, change=lambda spec: None):
        return Tokenizer(folder_of(tmp_path, kind, change=change)).fingerprint

    def cut(pattern):
        return lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=pattern)
    marks = [fingerprint("llama3"), fingerprint("llama3", cut(QWEN2)), fingerprint("llama3", cut(TEKKEN)),
             fingerprint("llama3", lambda s: s.update(normalizer={"type": "NFC"})),
             fingerprint("llama3", lambda s: s.update(pre_tokenizer={"type": "ByteLevel"})),
             fingerprint("mistral"),
             fingerprint("mistral", lambda s: s["pre_tokenizer"].update(prepend_scheme="never")),
             fingerprint("mistral", lambda s: s["model"]["merges"].reverse())]
    assert len(set(marks)) == 8 and fingerprint("llama3") == marks[0]


@pytest.mark.weights
def test_the_default_models_fingerprint_is_the_one_in_adapters(tokenizer):
    assert tokenizer.fingerprint.startswith("263df728e7bedc95")


@pytest.mark.parametrize("kind", ["smollm2", "llama3", "tekken"])
def test_very_long_runs(tmp_path, kind):
    """A million blanks panicked tiktoken. Where they can be known, ids are those of the text in one piece."""
    t, n = Tokenizer(folder_of(tmp_path, kind)), 3 * RUN + 77
    rng, start = random.Random(0), time.perf_counter()
    sentences = "".join("".join(rng.choices("汉字仮名漢語", k=rng.randint(3, 9))) + "，" for _ in range(n // 6))
    base64 = "".join(rng.choices("abcdefghijklmnopXYZ0123456789", k=n))
    for text in (" " * n, "a" + " " * n + "b", "\n" * n + "x", " " * n + "7", sentences, base64):
        assert len([*parts(text)]) > 2 and "".join(parts(text)) == text
        assert t.encode(text) == [i for i in t.bpe.bpe.encode_ordinary(text) if i < t.bpe.end], text[:20]
    for c in (" ", "\n", "x", "e\u0301", "-", "1", "汉", " \n"):
        text = c * (1_000_000 // len(c))
        assert t.decode(t.encode(text)) == text
    for text in (("x" * (RUN - 9) + " ") * 60, (" " * (RUN - 9) + "x") * 60):  # nearly too long, again and again
        assert [*parts(text)] == [text]
    assert [*parts("a b " * RUN)] == ["a b " * RUN] and time.perf_counter() - start < 20


def test_very_long_sentencepiece_words(tmp_path):
    t, start = Tokenizer(folder_of(tmp_path, "llama2")), time.perf_counter()
    for c in (" ", "e", "\n", "汉"):
        assert t.decode(t.encode(c * 100_000, joined=True)) == c * 100_000
    assert time.perf_counter() - start < 10
