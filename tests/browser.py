"""A headless Chromium, spoken to through two pipes: what a page asks for, and how it looks."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-pipe", "about:blank"),
)
_SECONDS = 60.0


def chromium() -> str | None:
    """The browser's program, if it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Tab:
    """One tab; commands and events are those of the Chrome DevTools Protocol."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._held = b""
        self._last = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []

    def attach(self) -> None:
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": arguments, **self._session}
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._reader, 1 << 20)
            assert part, "the browser has ended"
            self._held += part
        text, _, self._held = self._held.partition(b"\0")
        return json.loads(text)

    def show(self, page: Path, width: int = 1280, *, dark: bool = False) -> None:
        """Open a file at a width in CSS pixels, and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=2 if width < 600 else 1, mobile=width < 600)  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[theme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def close(self) -> None:
        """End the browser and everything it started."""
        self._session = {}
        self.call("Browser.close")
        # The last of its processes closes the pipe.
        while os.read(self._reader, 1 << 20):
            pass

    def requests(self) -> list[str]:
        """What was asked for since the page was opened, the page itself included."""
        sent = (e for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """What the browser has to say about the page."""
        entries = (e for e in self.events if e.get("method") == "Log.entryAdded")
        return [event["params"]["entry"]["text"] for event in entries]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page as it is printed on A4."""
        found = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69,
                          preferCSSPageSize=False, printBackground=False)  # fmt: skip
        return base64.b64decode(found["data"])


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A tab of a browser that ends with the block."""
    program = chromium()
    assert program
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    process = _started([program, *_FLAGS, f"--user-data-dir={profile}"], commands, answers)
    os.close(commands)
    os.close(answers)
    try:
        found = Tab(from_browser, to_browser)
        found.attach()
        yield found
        found.close()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(to_browser)
        os.close(from_browser)


def _started(words: list[str], commands: int, answers: int) -> int:
    """The process of a browser, which reads commands from descriptor 3 and answers on 4."""
    high = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in (commands, answers)]
    silent = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    try:
        return os.posix_spawn(
            words[0],
            words,
            os.environ,
            file_actions=[
                silent,
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, high[0], 3),
                (os.POSIX_SPAWN_DUP2, high[1], 4),
            ],
        )
    finally:
        for one in high:
            os.close(one)
