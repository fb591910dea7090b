"""A headless Chromium, spoken to through a pipe (its DevTools protocol); nothing but the browser is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


def find_browser() -> str | None:
    """The browser's program: FLIX_CHROMIUM, or one in the path."""
    return os.environ.get("FLIX_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


def needed_browser() -> str:
    """The same; a test that has none is skipped."""
    if (found := find_browser()) is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, or set FLIX_CHROMIUM)")
    return found


class Browser:
    """A browser of its own; ends with the ``with`` that it is opened by."""

    def __init__(self, program: str) -> None:
        asked, self._to = os.pipe()
        self._from, answered = os.pipe()

        def placed() -> None:  # the browser reads its handle 3 and writes to its handle 4
            one, two = os.dup(asked), os.dup(answered)
            os.dup2(one, 3)
            os.dup2(two, 4)

        self._process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--disable-background-networking", "--disable-dev-shm-usage", "about:blank"],
            close_fds=False, preexec_fn=placed, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(asked)
        os.close(answered)
        self._number, self._read = 0, b""
        self.pages: dict[str, Page] = {}

    def call(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        """A method of the protocol; what pages tell meanwhile is handed to them."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        left = memoryview(json.dumps(message).encode() + b"\0")
        while left:
            left = left[os.write(self._to, left[:60_000]) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            if (page := self.pages.get(answer.get("sessionId", ""))) is not None:
                page.told(answer)

    def _next(self) -> Any:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], 60)
            assert ready, "the browser says nothing"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser ended"
            self._read += part
        text, _, self._read = self._read.partition(b"\0")
        return json.loads(text)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)


class Page:
    """A page in a browser, with what it wrote to the console and what it asked of a network.

    Args:
        browser: the browser.
        width, height: of the window, in CSS pixels.
        dark: whether the reader prefers dark pages.
    """

    def __init__(self, browser: Browser, width: int, height: int = 900, dark: bool = False) -> None:
        self._browser, self._session = browser, ""
        self.console: list[str] = []
        self.requests: list[str] = []
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)[
            "sessionId"
        ]
        browser.pages[self._session] = self
        for name in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{name}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        self.media(dark=dark)

    def media(self, dark: bool = False, kind: str = "") -> None:
        """Screen or ``"print"``, light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def open(self, file: Path) -> float:
        """Open a file; gives the seconds until it was loaded and drawn."""
        began = time.perf_counter()
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.run("new Promise(done => { const drawn = () => requestAnimationFrame(() => setTimeout(done));"
                 "document.readyState === 'complete' ? drawn() : addEventListener('load', drawn) })")  # fmt: skip
        return time.perf_counter() - began

    def run(self, script: str) -> Any:
        """The value of a script, or of the promise that it gives."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, file: Path, whole: bool = False) -> None:
        """A PNG of what the window shows, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the protocol."""
        return self._browser.call(method, parameters, self._session)

    def told(self, event: Any) -> None:
        """Keep what the browser says of the page."""
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.console.append(str(told["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.console.append(str(told["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        del self._browser.pages[self._session]
        self._session = ""
        self.call("Target.closeTarget", targetId=self._target)
