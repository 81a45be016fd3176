"""The live page in a real browser, where there is one: wide, on a phone, in the dark."""

import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tiny_server import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe"

SIX = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 6}
SHOWN = """[...document.querySelectorAll('#flight tr')].map(
  row => [...row.children].filter(cell => cell.offsetParent !== null).length)"""


class Browser:
    """The DevTools protocol over a pair of pipes: JSON documents that end in a zero byte."""

    def __init__(self, read: int, write: int) -> None:
        self._from, self._to = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._numbers = itertools.count(1)
        self.session: str | None = None
        self.complaints: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        message = {"id": next(self._numbers), "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = json.loads(b"".join(iter(lambda: self._from.read(1), b"\0")))
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    redirected = f"exec {CHROMIUM} {OPTIONS} --user-data-dir={profile} 3<&{to_browser} 4>&{from_browser}"
    process = subprocess.Popen(
        ["bash", "-c", redirected],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        found = Browser(to_us, from_us)
        target = found.call("Target.createTarget", url="about:blank")["targetId"]
        found.session = found.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        yield found
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_what_the_feed_says(served: Served, tmp_path: Path) -> None:
    body = {"prompt": "hello", "max_tokens": 5, "ignore_eos": True}
    httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    with browser(tmp_path) as page:
        for domain in ("Runtime", "Log", "Page"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=f"{served.url}/")
        deadline_s = time.monotonic() + 60
        while page.evaluate("document.querySelectorAll('#speed polyline').length") != 2:
            assert time.monotonic() < deadline_s, page.evaluate("document.body.innerText")
            time.sleep(0.5)
        text = page.evaluate("document.body.innerText")
        for part in ("live", "tiny", "prefill-0 · prefill", "decode-0 · decode", "model(idle_w=5,busy_w=20)"):
            assert part in text
        ledgers = "document.querySelectorAll('#recent td.ledger').length"
        assert page.evaluate(ledgers) >= 1
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        phone = {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
        page.call("Emulation.setDeviceMetricsOverride", **phone)
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.call("Emulation.setEmulatedMedia", features=dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out"
        with httpx.stream("POST", f"{served.url}/v1/completions", json=SIX, timeout=60) as busy:
            pieces = busy.iter_raw()
            next(pieces)
            while page.evaluate("document.querySelectorAll('#flight tr').length") < 7:
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
            assert page.evaluate(SHOWN) == [5] * 7, "the workers' column is hidden, and no request"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        assert page.complaints == []
