"""The page of compress.py --html, opened in a real browser, and what goes into it."""
import base64
import contextlib
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from compress import main
from conftest import save_llama, tiny_compressor, tiny_llama
from data.tokenizer import Tokenizer
from model import Cache, HeadGroup
from run.checkpoint import save_adapter
from run.errors import BadInput
from run.html_report import (
    KEEPS, header_bytes, kept_map, step_limits, text_units, view, write_report,
)
from test_tokenizer import write_tokenizer

# What ends scripts, starts markup or asks for something; é and 😀 are several tokens.
HOSTILE = """</script><script>window.hacked = 1</script><b>bold</b>
<img src="http://127.0.0.1:9/x" onerror="hacked = 2"> "quotes" 'and' `ticks` ${hacked = 3} &lt;&amp;
<!-- \\u003c/script> café 😀 naïve\ttab "SHOWN" \u202egnirts \u2028 \ufffd
""" + "The mill on the river was built by Ada Stone, and nobody knows when. " * 6
QUESTION = "<i>Who</i> built </script> it? 😀"
OWN = "café 😀 naïve"  # what is kept in every head

# file descriptors 3 and 4 are those that --remote-debugging-pipe uses
START = 'exec "$0" "$@" 3<&{} 4>&{}'
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)
KEY_CODES = {"Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """Chromium without a window, spoken to over a pipe.

    browser("Page.navigate", url=…) returns what the browser answers.
    """

    def __init__(self, binary: str, profile):
        self.replies, theirs = os.pipe()
        ours, self.requests = os.pipe()
        flags = (*FLAGS, f"--user-data-dir={profile}")
        self.process = subprocess.Popen(
            ["bash", "-c", START.format(ours, theirs), binary, *flags],
            pass_fds=(ours, theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(ours)
        os.close(theirs)
        self.received = b""
        self.events = []
        self.n_requests = 0
        self.target = {}
        tab = self("Target.createTarget", url="about:blank")["targetId"]
        session = self("Target.attachToTarget", targetId=tab, flatten=True)
        self.target = {"sessionId": session["sessionId"]}
        for domain in ("Network", "Page", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params) -> dict:
        self.n_requests += 1
        request = {"id": self.n_requests, "method": method, "params": params, **self.target}
        os.write(self.requests, json.dumps(request).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.n_requests:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def message(self) -> dict:
        while b"\0" not in self.received:
            assert select.select([self.replies], [], [], 60)[0], "the browser says nothing"
            more = os.read(self.replies, 1 << 16)
            assert more, "the browser is gone"
            self.received += more
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Load a page anew, even if only the part after # changes."""
        for address in ("about:blank", url):
            self.events = []
            self("Page.navigate", url=address)
            while not any(e["method"] == "Page.loadEventFired" for e in self.events):
                self.events.append(self.message())

    def js(self, expression: str):
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def keys(self, *keys: str) -> None:
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                self("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                     windowsVirtualKeyCode=KEY_CODES[key])

    def point(self, element: str) -> None:
        """Move the pointer there, and wait until the browser has noticed."""
        self.js(f"{element}.scrollIntoView({{block: 'center'}})")
        box = f"{element}.getClientRects()[0]"
        x, y = self.js(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
        for _ in range(100):
            self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            if self.js(f"{element}.matches(':hover')"):
                return
            time.sleep(0.02)
        raise AssertionError(f"{element} is not where the pointer is")

    def wait_for(self, expression: str) -> None:
        for _ in range(100):
            if self.js(expression):
                return
            time.sleep(0.02)
        raise AssertionError(expression)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.requests)
        os.close(self.replies)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    assert binary, "CI is set, and there is no Chromium"
    browser = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def report_in(path) -> dict:
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="shown">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope="module", params=["head", "token"])
def page(request, tmp_path_factory):
    """A page that the program wrote, and the report in it."""
    folder = tmp_path_factory.mktemp("page")
    model = tiny_llama(vocab_size=310, max_positions=4096)
    write_tokenizer(save_llama(model, folder))
    compressor = tiny_compressor(model, recent=4, registers=0, selection=request.param)
    save_adapter(folder / "adapter", compressor, model, Tokenizer(folder), {})
    (folder / "text.txt").write_text(HOSTILE, encoding="utf-8")
    out = folder / "out.html"
    flags = {
        "weights": folder, "adapter": folder / "adapter", "context": folder / "text.txt",
        "question": QUESTION, "keep": 0.2, "html": out, "max-new-tokens": 4, "keep-text": OWN,
        "dtype": "fp32", "device": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["compress.py", *(f"--{k}={v}" for k, v in flags.items())])
        main()
    return out, report_in(out)


def kept_at(report: dict, i: int):
    """What is kept at the i-th fraction: (tokens, layers, heads) bool."""
    data = np.frombuffer(base64.b64decode(report["map"]), np.uint8)
    data = data.reshape(report["n"], report["layers"], report["heads"])
    return (data >> i & 1).astype(bool)


def test_a_page_has_what_the_caches_keep(page):
    _, report = page
    keeps = [round(keep, 2) for keep in report["keeps"]]
    assert keeps == sorted({*KEEPS, 0.2}) and keeps[report["start"]] == 0.2
    for i, k in enumerate(report["kept"]):
        per_head = k + report["own"]
        assert kept_at(report, i).sum() == per_head * report["layers"] * report["heads"]
    for sizes in zip(*report["bytes"]):
        assert list(sizes) == sorted(set(sizes))
    assert [len(answers) for answers in report["answers"]] == [1] * 7
    assert "".join(text for text, _ in report["units"]) == HOSTILE.strip()
    assert sum(count for _, count in report["units"]) == report["n"]
    assert ["😀", 4] in report["units"]


def state(browser) -> dict:
    return browser.js("""({
        keep: $("keep").textContent,
        facts: $("facts").textContent,
        caption: $("caption").textContent,
        heads: $("grid").getAttribute("aria-label"),
        shades: spans.map(s => +s.style.getPropertyValue("--s")),
        boxes: boxes.map(s => +s.style.getPropertyValue("--s")),
        gone: document.querySelectorAll("#text .gone").length,
        answers: [...document.querySelectorAll("dd")].map(e => e.textContent),
    })""")


def check(browser, report: dict, i: int) -> dict:
    """The browser shows what the report says of the i-th fraction."""
    shown = state(browser)
    starts = np.cumsum([0] + [count for _, count in report["units"]])
    kept = kept_at(report, i)
    fractions = [kept[a:b].mean() for a, b in zip(starts, starts[1:])]
    assert shown["keep"] == f"{100 * report['keeps'][i]:.3g} %"
    amount = f"{report['kept'][i]} of {report['n'] - report['own']} tokens per head"
    assert f"{amount}, and {report['own']} that were asked to be kept" in shown["facts"]
    assert shown["shades"] == pytest.approx([x ** 0.6 for x in fractions], abs=1e-3)
    assert shown["gone"] == fractions.count(0)
    assert shown["answers"] == report["full_answers"] + report["answers"][i]
    return shown


def test_the_slider_changes_shades_counts_and_answers(browser, page):
    path, report = page
    tenth = report["keeps"].index(0.1)
    browser.open(f"{path.as_uri()}#keep=0.1")
    before = check(browser, report, tenth)
    browser.js("$('slider').focus()")
    browser.keys("ArrowRight")
    after = check(browser, report, tenth + 1)
    assert sum(after["shades"]) > 1.2 * sum(before["shades"])
    assert after["boxes"] != before["boxes"]
    browser.js("location.hash = 'keep=0.5'")
    browser.wait_for("$('keep').textContent === '50 %'")
    check(browser, report, keeps_index(report, 0.5))


def keeps_index(report: dict, keep: float) -> int:
    return [round(x, 2) for x in report["keeps"]].index(keep)


def test_a_token_shows_its_heads(browser, page):
    path, report = page
    kept = kept_at(report, report["start"])
    browser.open(path.as_uri())
    starts = np.cumsum([0] + [count for _, count in report["units"]])
    n_heads = [int(kept[start].sum()) for start in starts[:-1]]
    units = [text for text, _ in report["units"]]
    letters = [u for u, text in enumerate(units) if text.isascii() and text.isalpha()]
    u = max(letters[5:-9], key=lambda u: (0 < n_heads[u] < kept[0].size, n_heads[u]))
    browser.point(f"spans[{u}]")
    shown = state(browser)
    assert shown["caption"] == f"“{units[u]}” is kept by {n_heads[u]} of {kept[0].size} heads."
    boxes = np.array(shown["boxes"]).reshape(report["heads"], report["layers"])
    assert (boxes.T == kept[starts[u]]).all()
    for layer, heads in re.findall(r"layer (\d+): ([\d, ]+)", shown["heads"]):
        named = [int(head) - 1 for head in heads.split(",")]
        assert named == kept[starts[u], int(layer) - 1].nonzero()[0].tolist()

    emoji = report["units"].index(["😀", 4])
    browser.point(f"spans[{emoji}]")
    assert "“😀”, 4 tokens, is kept by" in state(browser)["caption"]


def test_a_head_shows_its_tokens(browser, page):
    path, report = page
    browser.open(path.as_uri())
    browser.point("boxes[1]")
    shown = state(browser)
    percent = 100 * kept_at(report, report["start"])[:, 1, 0].mean()
    assert shown["caption"].startswith(f"Layer 2, head 1 keeps {percent:.3g} %")
    assert {0, 1} <= set(shown["shades"])


def test_arrow_keys_go_over_tokens_and_heads(browser, page):
    path, report = page
    browser.open(path.as_uri())
    browser.js("$('text').focus()")
    browser.keys("ArrowRight", "ArrowRight", "ArrowRight")
    assert state(browser)["caption"].startswith(f"“{report['units'][2][0]}”")
    browser.keys("Escape")
    assert state(browser)["caption"].startswith("12 heads")
    browser.js("$('grid').focus()")
    browser.keys("ArrowRight", "ArrowRight", "ArrowDown")
    assert state(browser)["caption"].startswith("Layer 2, head 2 keeps")


def test_a_strangers_text_stays_text_and_nothing_is_fetched(browser, page):
    path, _ = page
    browser.open(path.as_uri())
    assert browser.js("$('text').textContent") == HOSTILE.strip()
    assert browser.js("document.querySelector('article strong').textContent") == QUESTION
    assert browser.js("typeof hacked") == "undefined"
    assert browser.js("document.querySelectorAll('#text :not(span), #answers i').length") == 0
    time.sleep(0.2)
    browser.js("0")  # receives the events of that time
    requests = [e for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    urls = [e["params"]["request"]["url"] for e in requests]
    assert urls and all(url.startswith(("file:", "data:")) for url in urls)
    assert not [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    policy = "document.querySelector('meta[http-equiv]').content"
    assert browser.js(policy).startswith("default-src 'none'")


def test_a_page_fits_a_phone_and_the_dark(browser, page):
    def brightness():
        color = browser.js("getComputedStyle(document.body).backgroundColor")
        return np.mean([int(x) for x in re.findall(r"\d+", color)])

    path, _ = page
    browser.open(path.as_uri())
    assert brightness() > 230
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser("Emulation.setEmulatedMedia", features=[dark])
    browser("Emulation.setDeviceMetricsOverride",
            width=360, height=740, deviceScaleFactor=2, mobile=True)
    try:
        assert brightness() < 40
        assert browser.js("document.documentElement.scrollWidth") <= 360
    finally:
        browser("Emulation.clearDeviceMetricsOverride")
        browser("Emulation.setEmulatedMedia", features=[])


# ------------------------------------------------------------------ without a browser

def test_a_page_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_report(path, {"questions": ["\udcff"]})  # from a command line that is not UTF-8
    assert report_in(path) == {"questions": ["?"]}

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(BadInput, match="what was there before is still there"):
        write_report(path, {"questions": []})
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert report_in(path) == {"questions": ["?"]}


class Bytes:
    @staticmethod
    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")


def test_kept_map_says_which_head_holds_which_token():
    def group(n_heads, positions):
        kv = torch.zeros(1, n_heads, len(positions), 4)
        return HeadGroup(kv, kv, torch.tensor([[positions]], dtype=torch.int32))

    layers = [[group(2, [0, 1])], [group(1, [0, 1, 2, 3]), group(1, [0, -1])]]
    kept = kept_map(Cache(layers, torch.tensor([5])), 5).int().tolist()
    assert kept == [[[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]]


def test_bytes_of_the_header_are_those_of_its_entries():
    kv = torch.zeros(1, 2, 5, 4)
    full = HeadGroup(kv, kv, torch.arange(5, dtype=torch.int32).expand(1, 1, 5))
    assert header_bytes(Cache([[full], [full]], torch.tensor([5])), 3) == 2 * 3 * (2 * 2 * 4 * 4 + 4)


# ------------------------------------------------------------------ in the terminal

def shown(text: str, counts: str, own: str = "", in_color=False, width=80) -> list[str]:
    """The lines of a view of a text of one-byte tokens; counts: a digit for each."""
    ids = list(text.encode())
    own = [c == "=" for c in own.ljust(len(ids))]
    return view(Bytes, ids, list(map(int, counts)), own, 9, in_color, width).split("\n")


def test_a_terminal_marks_what_many_heads_keep():
    lines = shown("abcdefghij klmnopqrs", "01234567890000000000", "          ==")
    legend = "marks    . 4 to 7, + 8, # 9 of 9 heads keep the token; none: fewer; = what you asked to keep"
    assert lines == ["abcdefghij klmnopqrs", "    ....+#==", "", legend]


@pytest.mark.parametrize("counts, marked", [
    ("0" * 40 + "1" * 60, 0),                       # keep 0.01: many ties at one head
    ("0" * 70 + "1" * 20 + "2" * 6 + "9" * 4, 30),
    ("9" * 100, 100),                               # everything is kept
])
def test_at_most_a_third_of_a_text_is_marked_unless_all_heads_keep_it(counts, marked):
    limits = step_limits(list(map(int, counts)), 9)
    assert limits == sorted(limits) and limits[0] >= 1
    assert sum(int(c) >= limits[0] for c in counts) == marked


def test_marks_stand_under_their_characters():
    """Also of code, with its brackets and tabs, and of characters of two columns."""
    text = "\tf[0](x)\n博物館 a"
    counts = ["9" if c in "f(館" else "0" for c in text for _ in c.encode()]
    lines = shown(text, "".join(counts), width=20)
    assert lines[:4] == ["    f[0](x)", "    #   #", "博物館 a", "    ##"]


def test_colours_change_no_character():
    text = "if x[0]:\n    return 博"
    ids = text.encode()
    lines = shown(text, "".join(str(i % 10) for i in range(len(ids))), in_color=True)
    plain = re.sub("\033\\[\\d+m", "", "\n".join(lines))
    assert plain.startswith(text + "\n\n") and "\033[7m" in "".join(lines)


def test_long_lines_are_cut_behind_blanks_and_control_characters_do_nothing():
    lines = shown("one two three\033[31m four", "0" * 23, width=10)
    assert lines[:3] == ["one two", "three\ufffd[31m", " four"]


@pytest.mark.parametrize("ids, expected", [
    ("aé😀b".encode(), [("a", 1), ("é", 2), ("😀", 4), ("b", 1)]),
    ("a😀".encode()[:-1], [("a", 1), ("\ufffd", 3)]),
    (b"", []),
], ids=["characters", "cut off", "none"])
def test_units_are_whole_characters(ids, expected):
    assert text_units(Bytes, list(ids)) == expected
