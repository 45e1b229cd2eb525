"""The page of compress.py --html, opened in a real browser: what the slider, pointer and keys change, that no text of
a stranger becomes markup, and that nothing is asked of the network. And what goes into it."""
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

from conftest import ROOT, tiny_compressor
from data.tokenizer import Tokenizer
from model import Cache, Part, load_llama
from run.ask import main
from run.files import save_adapter
from run.page import KEEPS, highlight, kept_map, units, write_page
from test_programs import write_model

# what ends scripts, starts markup or asks for something, in a text that is shown; é and 😀 are several tokens
HOSTILE = """</script><script>window.hacked = 1</script><b>bold</b>
<img src="http://127.0.0.1:9/x" onerror="hacked = 2"> "quotes" 'and' `ticks` ${hacked = 3} &lt;&amp;
<!-- \\u003c/script> café 😀 naïve\ttab "SHOWN" \u202egnirts \u2028 \ufffd
""" + "The mill on the river was built by Ada Stone, and nobody knows when. " * 6
QUESTION = "<i>Who</i> built </script> it? 😀"


class Browser:
    """Chromium without a window, spoken to over a pipe. browser("Page.navigate", url=…) -> what it answers."""

    def __init__(self, binary: str, profile):
        replies, theirs = os.pipe()
        mine, self.requests = os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}")
        self.process = subprocess.Popen(["bash", "-c", f'exec "$0" "$@" 3<&{mine} 4>&{theirs}', binary, *flags],
                                        pass_fds=(mine, theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(mine)
        os.close(theirs)
        self.replies, self.read, self.events, self.asked, self.target = replies, b"", [], 0, {}
        tab = self("Target.createTarget", url="about:blank")["targetId"]
        self.target = {"sessionId": self("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}
        for part in ("Network", "Page", "Runtime"):
            self(f"{part}.enable")
        self("Page.setLifecycleEventsEnabled", enabled=True)

    def __call__(self, method: str, **params) -> dict:
        self.asked += 1
        request = {"id": self.asked, "method": method, "params": params} | self.target
        os.write(self.requests, json.dumps(request).encode() + b"\0")
        while (message := self.message()).get("id") != self.asked:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def message(self) -> dict:
        while b"\0" not in self.read:
            assert select.select([self.replies], [], [], 60)[0], "the browser says nothing"
            self.read += (got := os.read(self.replies, 1 << 16))
            assert got, "the browser is gone"
        message, _, self.read = self.read.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        for address in ("about:blank", url):  # from a page to itself, only the address would change
            self.events = []
            loader = self("Page.navigate", url=address)["loaderId"]
            while not any(e["method"] == "Page.lifecycleEvent" and e["params"]["name"] == "load"
                          and e["params"]["loaderId"] == loader for e in self.events):
                self.events.append(self.message())

    def js(self, expression: str):
        got = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def key(self, key: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27}
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def point(self, selector: str) -> None:
        x, y = self.js(f"""(() => {{ const e = {selector}; e.scrollIntoView({{block: "center"}});
                       const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2] }})()""")
        for _ in range(100):  # what lies under the pointer is known once a frame is drawn
            self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            if self.js(f"{selector}.matches(':hover')"):
                return
            time.sleep(0.02)
        raise AssertionError(f"{selector} is not where the pointer is")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.requests)
        os.close(self.replies)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    assert found, "CI is set, and there is no Chromium"
    browser = Browser(found, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module", params=["head", "token"])
def page(request, tmp_path_factory):
    """A page that the program wrote, and what is in it: our choice and random's, of heads and of tokens."""
    folder = tmp_path_factory.mktemp("page")
    tiny = write_model(folder)
    model = load_llama(tiny)
    save_adapter(folder / "a", tiny_compressor(model, recent=4, choice=request.param), model, Tokenizer(tiny), {})
    (folder / "text.txt").write_text(HOSTILE, encoding="utf-8")
    out = folder / "out.html"
    args = ("--weights", tiny, "--adapter", folder / "a", "--context", folder / "text.txt", "--question", QUESTION,
            "--method", "random", "--keep", "0.2", "--html", out, "--max-new-tokens", "4", "--dtype", "fp32")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["compress.py", *map(str, args), "--device", "cpu"])
        main()
    assert f"page     {out} ({out.stat().st_size:,} bytes)" in said.getvalue()
    return out, shown_in(out), request.param


def shown_in(path) -> dict:
    return json.loads(re.search(r'id="shown">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


def bits(shown: dict, method: int, keep: int):
    """(tokens, layers, heads) bool, decoded anew here."""
    flat = np.frombuffer(base64.b64decode(shown["methods"][method]["map"]), np.uint8)
    return (flat.reshape(shown["n"], shown["layers"], shown["heads"]) >> keep & 1).astype(bool)


def test_what_is_in_a_page_is_what_caches_keep(page):
    """At every kept fraction a budget's worth of bits, and the bytes and answers of a cache of that size."""
    _, shown, choice = page
    assert shown["keeps"] == sorted({*KEEPS, 0.2}, reverse=True) and shown["keeps"][shown["start"]] == 0.2
    assert [m["name"] for m in shown["methods"]] == ["kvdistill", "random"]
    for m, method in enumerate(shown["methods"]):
        for i, k in enumerate(shown["kept"]):
            kept = bits(shown, m, i)
            assert kept.sum() == k * shown["layers"] * shown["heads"]
            assert (kept == kept[:, :1, :1]).all() == (choice == "token"), "are all heads alike?"
            if choice == "head":
                assert kept[-min(4, max(1, k // 8)):].all(), "recent tokens"
        assert method["bytes"] == sorted(method["bytes"], reverse=True) and len(set(method["bytes"])) == 7
        assert [len(a) for a in method["answers"]] == [1] * 7
    assert "".join(text for text, _ in shown["units"]) == HOSTILE.strip()
    assert sum(count for _, count in shown["units"]) == shown["n"] and ["😀", 4] in shown["units"]


def state(browser) -> dict:
    return browser.js("""({keep: $("keep").textContent, facts: $("facts").textContent,
        caption: $("caption").textContent, heads: $("grid").getAttribute("aria-label"),
        shades: spans.map(s => +s.style.getPropertyValue("--s")),
        boxes: boxes.map(s => +s.style.getPropertyValue("--s")),
        gone: document.querySelectorAll("#text .gone").length,
        answers: [...document.querySelectorAll("dd")].map(e => e.textContent)})""")


def check(browser, shown: dict, method: int, keep: int) -> dict:
    """The browser shows what Python says of this method and kept fraction."""
    now, kept, at = state(browser), bits(shown, method, keep), 0
    assert now["keep"] == f"{100 * shown['keeps'][keep]:g} %"
    assert f"{shown['kept'][keep]} of {shown['n']} tokens per head" in now["facts"]
    shares = []
    for _, count in shown["units"]:
        shares.append(kept[at:at + count].mean())
        at += count
    assert now["shades"] == pytest.approx([x ** 0.6 for x in shares], abs=1e-3)
    assert now["gone"] == sum(x == 0 for x in shares)
    assert now["answers"] == shown["answers"] + [m["answers"][keep][0] for m in shown["methods"]]
    return now


def test_the_slider_changes_shades_counts_and_answers(browser, page):
    """By keys, as a user moves it; and by the address."""
    path, shown, _ = page
    browser.open(f"{path.as_uri()}#keep=0.1")
    before = check(browser, shown, 0, shown["keeps"].index(0.1))
    browser.js("$('slider').focus()")
    browser.key("ArrowRight")
    after = check(browser, shown, 0, shown["keeps"].index(0.05))
    assert sum(after["shades"]) < 0.8 * sum(before["shades"]) and after["gone"] > before["gone"]
    assert after["boxes"] != before["boxes"]
    browser.js("document.querySelectorAll('#methods input')[1].click()")
    check(browser, shown, 1, shown["keeps"].index(0.05))
    browser.js("location.hash = 'keep=0.5&method=kvdistill'")
    time.sleep(0.2)  # the event comes after it
    check(browser, shown, 0, 0)
    browser.open(path.as_uri())
    check(browser, shown, 0, shown["start"])


def test_a_token_shows_its_heads_and_a_head_its_tokens(browser, page):
    path, shown, _ = page
    browser.open(f"{path.as_uri()}#keep=0.2")
    kept, cells = bits(shown, 0, shown["start"]), shown["layers"] * shown["heads"]
    starts = np.cumsum([0] + [count for _, count in shown["units"]])
    letters = [u for u, (text, count) in enumerate(shown["units"]) if text.isalpha() and count == 1]
    heads = lambda u: kept[starts[u]]  # noqa: E731
    u = max(letters[5:-5], key=lambda u: (0 < heads(u).sum() < cells, heads(u).sum()))
    browser.point(f"spans[{u}]")
    now = state(browser)
    assert now["caption"] == f"“{shown['units'][u][0]}” is kept by {heads(u).sum()} of {cells} heads."
    said = {(int(layer) - 1, int(h) - 1) for layer, those in re.findall(r"layer (\d+): ([\d, ]+)", now["heads"])
            for h in those.split(",")}
    assert said == set(zip(*map(np.ndarray.tolist, np.nonzero(heads(u))))) and said
    assert np.array(now["boxes"]).reshape(shown["heads"], -1).T.tolist() == heads(u).tolist()
    emoji = shown["units"].index(["😀", 4])
    browser.point(f"spans[{emoji}]")
    assert "“😀”, 4 tokens, is kept by" in state(browser)["caption"]

    browser.point("boxes[1]")  # layer 2, head 1
    now, share = state(browser), kept[:, 1, 0].mean()
    assert now["caption"].startswith("Layer 2, head 1 keeps") and set(np.round(now["shades"], 3)) >= {0, 1}
    assert re.search(r"keeps ([\d.]+) %", now["caption"])[1] == f"{float(f'{100 * share:.3g}'):g}"

    browser.js("$('text').focus()")
    for _ in range(3):
        browser.key("ArrowRight")
    assert state(browser)["caption"].startswith(f"“{shown['units'][2][0]}”")
    assert browser.js("spans[2].className").endswith("here")
    browser.key("Escape")
    assert state(browser)["caption"] == f"{cells} heads, each filled by the share it keeps."
    browser.js("$('grid').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        browser.key(key)
    assert state(browser)["caption"].startswith("Layer 2, head 2 keeps")


def test_a_strangers_text_is_text_and_nothing_is_fetched(browser, page):
    path, shown, _ = page
    browser.open(path.as_uri())
    assert browser.js("$('text').textContent") == HOSTILE.strip()
    assert browser.js("typeof hacked") == "undefined"
    assert browser.js("new Set([...document.querySelectorAll('#text *')].map(e => e.tagName)).size") == 1
    assert browser.js("document.querySelectorAll('img, b:not(#keep), #questions i').length") == 0
    assert browser.js("document.querySelector('article strong').textContent") == QUESTION
    time.sleep(0.2)
    browser.js("0")
    urls = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("file:", "data:")) for url in urls)
    assert not [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    # what would be noticed: the page forbids all requests, and a browser reports those it is asked for
    template = (ROOT / "run" / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in template and not re.search(r"https?:|//\w+\.|@import|url\(|innerHTML", template)


def test_a_page_fits_a_phone_and_the_dark(browser, page):
    path, _, _ = page
    browser.open(path.as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.js(paper)
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    try:
        assert browser.js("document.documentElement.scrollWidth") <= 360
        mean = [np.mean([*map(int, re.findall(r"\d+", x))]) for x in (light, browser.js(paper))]
        assert mean[0] > 230 and mean[1] < 40
    finally:
        browser("Emulation.clearDeviceMetricsOverride")
        browser("Emulation.setEmulatedMedia", features=[])


def test_a_page_is_small_and_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """2,000 tokens of 90 heads, two methods: 3/4 of a byte's base64 for each; a failure leaves the old file."""
    shown = {"units": [["token ", 1]] * 2000, "methods": [
        {"map": base64.b64encode(bytes(2000 * 90)).decode()} for _ in range(2)]}
    write_page(tmp_path / "p.html", shown)
    assert (tmp_path / "p.html").stat().st_size < 600_000 and shown_in(tmp_path / "p.html") == shown
    write_page(tmp_path / "p.html", {"questions": ["\udcff"]})  # what a command line makes of a byte that is no UTF-8
    before = (tmp_path / "p.html").read_bytes()
    assert shown_in(tmp_path / "p.html") == {"questions": ["?"]}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(Exception, match="what was there before is still there"):
        write_page(tmp_path / "p.html", shown | {"n": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"] and (tmp_path / "p.html").read_bytes() == before


def test_what_caches_keep_and_how_a_terminal_shows_it():
    """Two layers of two heads, five tokens: the first is kept by all four, the second by three, the last by none."""
    def part(heads, *positions):
        at = torch.tensor([positions], dtype=torch.int32).view(1, -1, len(positions[0]))
        return Part(torch.zeros(1, heads, at.shape[2], 4), torch.zeros(1, heads, at.shape[2], 4), at)
    cache = Cache([[part(2, [0, 1])], [part(1, [0, 1, 2, 3]), part(1, [0, -1])]], torch.tensor([5]))
    kept = kept_map(cache, 5)
    assert kept.int().tolist() == [[[1, 1, 0, 0, 0]] * 2, [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]]
    shares = kept.float().mean((0, 1)).tolist()
    assert shares == [1, 0.75, 0.25, 0.25, 0]

    class Letters:
        decode = staticmethod(lambda ids: "".join("abcde"[i] for i in ids))
    assert highlight(Letters, list(range(5)), shares, False) == "[ab]cde"
    dim, bold, full, off = "\033[2m", "\033[1m", "\033[7m", "\033[0m"
    assert highlight(Letters, list(range(5)), shares, True) == f"{full}a{off}{full}b{off}cd{dim}e{off}".replace(
        f"{off}{full}", "")
    assert highlight(Letters, list(range(5)), [1.0] * 5, False) == "abcde"
    assert bold in highlight(Letters, list(range(5)), [1, 0.5, 0.25, 0.25, 0], True)


def test_units_are_whole_characters():
    """Tokens of one byte each: characters of one to four of them, one that is cut off, and none at all."""
    class Bytes:
        decode = staticmethod(lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert units(Bytes, [*"aé😀b".encode()]) == [("a", 1), ("é", 2), ("😀", 4), ("b", 1)]
    assert units(Bytes, [*"a😀".encode()][:-1]) == [("a", 1), ("\ufffd", 3)]
    assert units(Bytes, []) == []
    assert units(Bytes, [255, 97]) == [("\ufffda", 2)]
