"""compress.py as a program: questions, spans to keep, conversations, saved caches."""
import contextlib
import io
import re
import subprocess
import sys

import pytest
import torch

import compress
from compress import (
    DEMO, Extracting, ask_all, kl_of_answer, kept_count, open_text, spans_to_keep,
)
from conftest import ROOT, save_llama, tiny_compressor, tiny_llama
from data.tokenizer import Tokenizer
from model import answer, generate
from run.chat import Conversation
from run.checkpoint import load_cache, save_adapter, save_cache
from run.errors import BadInput
from run.html_report import answer_text, in_column, kept_map
from test_tokenizer import TEMPLATES, folder_of, write_tokenizer

TEXT = "\n The mill on the river was built by Ada Stone.\nNobody knows when: café 😀.\n" * 5
SMALL = ("--dtype=fp32", "--device=cpu", "--max-new-tokens=5")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The folder of a tiny model, with an adapter that has registers, and a text."""
    folder = tmp_path_factory.mktemp("house")
    model = save_and_load(folder)
    tokenizer = Tokenizer(folder)
    compressor = tiny_compressor(model, recent=4, registers=2)
    save_adapter(folder / "adapter", compressor, model, tokenizer, {})
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder, model, tokenizer, compressor


def save_and_load(folder, **changes):
    model = tiny_llama(vocab_size=310, **{"max_positions": 2048} | changes)
    save_llama(model, folder)
    write_tokenizer(folder)
    return model


def call(folder, *args, stdin="") -> str:
    """What compress.py prints."""
    flags = [f"--weights={folder}", *SMALL]
    if not str(args[0]).startswith("--load"):
        flags += [f"--adapter={folder / 'adapter'}", f"--context={folder / 'text.txt'}"]
    flags += args
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["compress.py", *flags])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        compress.main()
    return out.getvalue()


# ------------------------------------------------------------------------------ flags

@pytest.mark.parametrize("args, code, message", [
    (["--help"], 0, "--keep-text"),
    (["--kep", "1"], 2, "unrecognized arguments: --kep 1; did you mean --keep?"),
    (["--keep", "10%"], 2, "'10%': expected a fraction such as 0.1"),
    (["--device", "foo"], 2, "'foo': expected auto, cpu, cuda or mps"),
    (["--html", __file__], 2, "a file is there that is no page"),
    (["--context", __file__, "--save", __file__], 2, "is the text itself"),
    (["--keep-lines", "9-3"], 2, "expected lines such as 10-20"),
    (["--keep-text", ""], 2, "--keep-text is empty"),
    (["--chat", "--question", "Why?"], 2, "--question does not go with --chat"),
    (["--chat", "--context", "-"], 2, "reads standard input"),
    (["--load", "x", "--keep-text", "a", "--chat"], 2, "--keep-text does not go with --load"),
    (["--load", "x"], 2, "--load needs --chat"),
    (["--load", "x", "--question", "q", "--save", "y"], 2, "only a conversation"),
    (["--load", "x", "--question", "q", "--system", "y"], 2, "--system does not go with --load"),
    (["--chat", "--plain"], 2, "--plain does not go with --chat"),
    (["--seed", "1"], 2, "give a --temperature above 0"),
    (["--context", "nowhere.txt"], 2, "nowhere.txt: no such file"),
    (["--adapter", "nowhere"], 2, "no adapter.json in it"),
    (["--weights", "nowhere"], 2, "there is no such folder"),
    (["What is it?"], 2, "unrecognized arguments: What is it?; a value stands behind its flag"),
])
def test_flags_are_checked_before_torch_is_imported(tmp_path, args, code, message):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, ROOT / "compress.py", *args]
    env = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == code and message in done.stdout + done.stderr
    assert done.stdout.count("usage:") == (code == 0)


def test_a_text_too_long_is_refused_before_the_model_is_loaded(house, monkeypatch, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 2000)
    monkeypatch.setattr(compress, "open_model", None)
    with pytest.raises(BadInput, match="at most (\\d+) fit: of the model's 2048") as error:
        call(house[0], f"--context={tmp_path / 'long.txt'}")
    tokenizer = house[2]
    largest = 2048 - len(tokenizer.header) - len(tokenizer.ask("What is this text about?"))
    assert f"at most {largest} fit" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_device_that_is_not_there_is_one_line(house):
    with pytest.raises(BadInput, match="'cuda' cannot be used"):
        call(house[0], "--device=cuda")


def test_a_file_that_is_no_cache_is_not_overwritten(house, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "open_model", None)
    path = tmp_path / "diary.txt"
    path.write_text("Dear diary")
    with pytest.raises(BadInput, match="a file is there that is no saved cache"):
        call(house[0], f"--save={path}")
    assert path.read_text() == "Dear diary"


# -------------------------------------------------------------- questions and answers

@torch.no_grad()
def test_kl_is_that_of_the_full_caches_answer(house):
    """0 for the full cache itself; for another one, the mean of one KL per prediction."""
    _, model, tokenizer, compressor = house
    ctx = open_text(compressor, model, tokenizer, TEXT)
    full = compressor.full_cache(model, ctx)
    cache = compressor.compress(model, ctx, keep=0.1)
    prompt, ids = [5, 6, 7], [8, 9]
    assert kl_of_answer(model, full, full, prompt, ids) == 0

    def predictions(c):
        h = model(torch.tensor([prompt + ids]), c)[0, 2:]
        return model.logits(h).log_softmax(-1)

    p, q = predictions(full), predictions(cache)
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert kl_of_answer(model, full, cache, prompt, ids) == pytest.approx(float(expected), rel=1e-4)


def test_a_question_shows_whether_both_caches_say_the_same(house, capsys):
    _, model, tokenizer, compressor = house
    ctx = open_text(compressor, model, tokenizer, TEXT)
    full = compressor.full_cache(model, ctx)
    empty = model.prefill(torch.tensor([tokenizer.header]))
    ask_all(model, tokenizer, {"full": full, "copy": full, "none": empty}, ["Why?"], 20, 2.0, 0)
    out = capsys.readouterr().out
    assert re.search(r"answering took [\d.]+ s \(full\), [\d.]+ s \(copy\), ", out)
    notes = re.findall(r"\((the same|another) answer, KL ([\d.]+)\)", out)
    assert notes[0] == ("the same", "0.000")
    assert notes[1][0] == "another" and float(notes[1][1]) > 0


def test_answers_stay_in_their_column(monkeypatch):
    monkeypatch.setattr("run.html_report.terminal_width", lambda: 40)
    shown = in_column("one\n\n\ttwo\x1b[2J\n" + "words " * 9, 12)
    first, blank, *others = shown.split("\n")
    assert blank == "" and others[1:] == [" " * 12 + " ".join(["words"] * n) for n in (4, 4, 1)]
    assert first == "one" and others[0] == " " * 12 + "    two\ufffd[2J"
    assert all(len(line) <= 40 for line in others)


def test_an_answer_that_was_cut_off_shows_it(house):
    tokenizer = house[2]
    ids = tokenizer.encode("Ada Stone")
    assert answer_text(tokenizer, ids, len(ids)) == "Ada Stone …"
    assert answer_text(tokenizer, ids, len(ids) + 1) == "Ada Stone"


@pytest.mark.weights
def test_extracting_is_evals_wording(tokenizer):
    from data.tasks import squad_query
    asking = Extracting(tokenizer)
    assert asking.ask("Who?") == squad_query(tokenizer, "Who?", ["x"]).prompt
    assert tokenizer.encode('"')[0] in asking.stop_ids


@pytest.mark.weights
def test_the_demo_shows_what_it_is_for(smollm, tokenizer):
    """The default model answers the demo's questions right from the full cache."""
    text = DEMO.read_text(encoding="utf-8").strip()
    full = smollm.prefill(torch.tensor([tokenizer.header + tokenizer.document(text)]))
    asking = Extracting(tokenizer)
    answers = answer(smollm, asking, full, compress.DEMO_QUESTIONS, max_new_tokens=32, seed=1)
    for found, right in zip(answers, ("rapeseed oil", "152", "1871")):
        assert right in found


# ------------------------------------------------------------------------ spans to keep

def test_spans_of_passages_and_lines():
    text = "a b\n\nb c\nlast"
    assert [text[i:j] for i, j in spans_to_keep(text, ["b"], [(3, 4), (2, 2)])] == [
        "b", "b", "b c\nlast"]
    with pytest.raises(BadInput, match="not in the text"):
        spans_to_keep(text, ["B"], [])
    with pytest.raises(BadInput, match="4-5: the text has 4 lines"):
        spans_to_keep(text + "\n", [], [(4, 5)])


def test_spans_become_the_tokens_that_hold_them(house):
    """Where tokens are longer than the span, and where a character is four tokens."""
    tokenizer = house[2]
    ids = tokenizer.document(TEXT.strip())
    for passage in ("Ada Stone", "é", "😀", "ll on"):
        start = TEXT.index(passage)
        (first, end), = tokenizer.token_spans(ids, TEXT, [(start, start + len(passage))])
        inside = b"".join(tokenizer.pieces[i] for i in ids[first:end])
        assert passage.encode() in inside
        assert passage.encode() not in b"".join(tokenizer.pieces[i] for i in ids[first + 1:end])
        assert passage.encode() not in b"".join(tokenizer.pieces[i] for i in ids[first:end - 1])
    for span in ((3, 3), (-1, 2), (0, len(TEXT) + 1)):
        with pytest.raises(BadInput, match="keep has"):
            tokenizer.token_spans(ids, TEXT, [span])


def test_a_blank_that_the_tokenizer_puts_first_shifts_nothing(tmp_path):
    tokenizer = Tokenizer(folder_of(tmp_path, "mistral", TEMPLATES["mistral-v0.3"]))
    ids = tokenizer.document("The house")
    assert tokenizer.decode(ids) == " The house"
    (first, end), = tokenizer.token_spans(ids, "The house", [(4, 9)])
    assert tokenizer.decode(ids[first:end]).strip() == "house"


def test_a_text_that_the_tokenizer_changes_is_refused(house):
    tokenizer = house[2]
    ids = tokenizer.document("other words")
    with pytest.raises(BadInput, match="changes letters"):
        tokenizer.token_spans(ids, "some words", [(0, 4)])


def test_every_head_keeps_a_span_beside_its_budget(house):
    _, model, tokenizer, compressor = house
    start = TEXT.index("Ada Stone")
    ctx = open_text(compressor, model, tokenizer, TEXT, keep=[(start, start + 9)])
    plain = open_text(compressor, model, tokenizer, TEXT)
    own = (ctx.protected & ~plain.protected)[0]
    assert "Ada Stone" in tokenizer.decode(ctx.tokens[0, own].tolist())

    k = int(kept_count(ctx.compressible.sum(1), 0.1))
    cache = compressor.compress(model, ctx, keep=0.1)
    assert kept_map(cache, ctx.tokens.shape[1])[..., own].all()
    assert cache.entries().float().mean() == k + ctx.protected.sum()


def test_a_passage_may_go_over_the_end_of_a_line():
    text = "It was built\nby Ada  Stone."
    assert spans_to_keep(text, ["built by Ada Stone"], []) == [(7, 26)]
    with pytest.raises(BadInput, match="these words are not in the text"):
        spans_to_keep(text, ["builtby"], [])


def test_the_program_keeps_passages_and_lines(house):
    out = call(house[0], "--keep=0.1", "--keep-text=Ada Stone", "--keep-lines=3-3")
    line = r"tokens +(\d+) in the text: (\d+) ->.* and (\d+) that you asked for"
    n, n_compressible, n_own = map(int, re.search(line, out).groups())
    assert n == n_compressible + n_own == len(house[2].document(TEXT.strip())) and n_own > 5 * 5
    marked = out.splitlines()
    line = next(i for i, text in enumerate(marked) if "Ada Stone" in text)
    column = marked[line].index("Ada Stone")
    assert marked[line + 1][column:column + 9].startswith("===")
    assert "= what you asked to keep" in out


# ------------------------------------------------------------------------ conversations

@pytest.mark.parametrize("template, kind, expected", [
    ("smollm2", "smollm2", "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
    ("llama3", "llama3", "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
                         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("mistral-v0.3", "mistral", "</s>[INST] Why?[/INST]"),
    ("nemo", "tekken", "</s>[INST]Why?[/INST]"),
])
def test_the_next_turn_is_the_templates(tmp_path, template, kind, expected):
    tokenizer = Tokenizer(folder_of(tmp_path, kind, TEMPLATES[template]))
    assert tokenizer.decode(tokenizer.next_turn("Why?")) == expected


@pytest.mark.parametrize("keep, kind", [(1, "head"), (0.2, "head"), (0.2, "token")])
def test_a_conversation_equals_one_long_prompt(house, keep, kind):
    _, model, tokenizer, _ = house
    compressor = tiny_compressor(model, recent=4, selection=kind)
    cache = compressor.compress(model, open_text(compressor, model, tokenizer, TEXT), keep=keep)
    talk = Conversation(model, tokenizer, cache)
    said = []
    for question in ("Who?", "And when?", "Why?"):
        talk.say(question, 6)
        prompt = [tokenizer.ask, tokenizer.next_turn][bool(said)](question)
        ids, = zip(*generate(model, cache, [said + prompt], 6, tokenizer.stop_ids))
        said += prompt + list(ids)

    assert int(talk.cache.next_position) == int(cache.next_position) + len(said)
    assert (talk.cache.entries() == cache.entries() + len(said)).all()
    tokens = torch.tensor([[5, 6]])
    long = model(torch.tensor([said + [5, 6]]), cache)[:, -2:]
    torch.testing.assert_close(model(tokens, talk.cache), long, rtol=1e-4, atol=1e-4)


def test_a_saved_conversation_goes_on(house, tmp_path):
    """Two programs say together what one says; the saved cache tells what it holds."""
    saved, longer = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    once = tmp_path / "c.safetensors"
    flags = ("--chat", "--temperature=2")
    call(house[0], *flags, f"--save={once}", stdin="Who?\n\nAnd when?\nWhy?\n")
    first = call(house[0], *flags, f"--save={saved}", stdin="Who?\n")
    assert "\n> Who?\n" in first, "what no terminal has shown is shown"
    second = call(
        house[0], f"--load={saved}", *flags, f"--save={longer}", stdin="And when?\nWhy?")
    assert once.read_bytes() == longer.read_bytes()
    assert re.search(r"begins   The mill on the river.*\nturns    1\n", second)
    third = call(house[0], f"--load={longer}", "--question=Why?")
    assert "turns    3" in third and re.search(r"  saved  ", third)


def test_a_question_to_a_saved_conversation_is_its_next_turn(house, tmp_path):
    folder, model, tokenizer, compressor = house
    cache = compressor.compress(model, open_text(compressor, model, tokenizer, TEXT), keep=0.2)
    talk = Conversation(model, tokenizer, cache)
    talk.say("Who?", 5)
    save_cache(tmp_path / "c", talk.cache, model, tokenizer, {"turns": 1})
    out = call(folder, f"--load={tmp_path / 'c'}", "--question=Why?")
    expected = Conversation(model, tokenizer, talk.cache, turns=1).say("Why?", 5)
    assert re.search(r"  saved  (.*)", out)[1] == in_column(expected, 9)


def test_what_was_said_has_positions_in_the_saved_cache(house, tmp_path):
    _, model, tokenizer, compressor = house
    cache = compressor.compress(model, open_text(compressor, model, tokenizer, TEXT), keep=0.2)
    longer = model.extend(cache, torch.tensor([[5, 6, 7]]))
    save_cache(tmp_path / "c", longer, model, tokenizer)
    again = load_cache(tmp_path / "c", model, tokenizer)
    kept = kept_map(again, int(again.next_position))
    assert int(again.next_position) == int(cache.next_position) + 3
    assert kept[..., -3:].all() and (again.entries() == cache.entries() + 3).all()


def test_a_conversation_that_fills_the_model_says_so(tmp_path):
    model = save_and_load(tmp_path, max_positions=120)
    tokenizer = Tokenizer(tmp_path)
    compressor = tiny_compressor(model)
    save_adapter(tmp_path / "adapter", compressor, model, tokenizer, {})
    (tmp_path / "text.txt").write_text("A few words.")
    out = call(tmp_path, "--chat", f"--save={tmp_path / 'c'}", stdin="Why?\n" * 50)
    assert "of the model's 120 positions are used" in out
    assert "the conversation is full" in out and "saved" in out
    assert load_cache(tmp_path / "c", model, tokenizer).next_position <= 120


def test_ctrl_c_keeps_what_was_said(house, tmp_path, monkeypatch):
    lines = iter(["Who?"])

    def type_line(_):
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", type_line)
    with pytest.raises(KeyboardInterrupt):
        call(house[0], "--chat", f"--save={tmp_path / 'c'}")
    assert compress.cache_header(tmp_path / "c")["about"]["turns"] == 1


# ------------------------------------------------------------------------- saved caches

def test_a_saved_cache_says_what_it_holds(house, tmp_path):
    saved = tmp_path / "c.safetensors"
    before = call(house[0], "--keep=0.25", "--keep-text=Ada Stone", f"--save={saved}")
    out = call(house[0], f"--load={saved}", "--question=Why?")
    assert f"adapter  {house[0] / 'adapter'}\n" in out
    counts = re.search(r"tokens   .*", before)[0]
    assert counts in " ".join(out.split()).replace("tokens ", "tokens   ")
    keep = float(re.search(r"keep     (.*)", out)[1])
    assert 0.2 < keep < 0.26 and "begins   The mill on the river was built by Ada Stone." in out


@pytest.mark.parametrize("content", [b"The mill on the river.\n" * 9, b"", b"\x08" * 100])
def test_a_file_that_is_no_cache_is_called_that(house, tmp_path, capsys, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        call(house[0], f"--load={path}", "--question=Why?")
    assert "not a saved cache" in str(error.value) and "--context" in str(error.value)


def test_an_adapter_is_no_saved_cache(house):
    path = house[0] / "adapter" / "adapter.safetensors"
    with pytest.raises(BadInput, match="not a saved cache, but other tensors"):
        call(house[0], f"--load={path}", "--question=Why?")
