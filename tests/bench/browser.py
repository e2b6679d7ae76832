"""A headless Chromium, spoken to in the DevTools protocol: what a page looks like, and what it complains of."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
_COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
_LOCAL = ("file:", "data:")


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def browser(program: str) -> Iterator[Tab]:
    """A tab of a fresh browser without a profile. It reads its requests from file 3 and answers into file 4."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (requests_in, requests_out), (replies_in, replies_out) = os.pipe(), os.pipe()
        # Numbers above 4, so that none is overwritten before it has been copied.
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 5) for end in (requests_in, replies_out)]
        quiet = [(os.POSIX_SPAWN_OPEN, file, os.devnull, os.O_WRONLY, 0) for file in (1, 2)]
        ends = [(os.POSIX_SPAWN_DUP2, end, file) for end, file in zip(ours, (3, 4), strict=True)]
        command = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = os.posix_spawn(program, command, os.environ, file_actions=[*quiet, *ends])
        for end in (requests_in, replies_out, *ours):
            os.close(end)
        try:
            with os.fdopen(requests_out, "wb") as requests, os.fdopen(replies_in, "rb") as replies:
                yield Tab(requests, replies)
        finally:  # it ends when nobody speaks to it any more
            os.waitpid(process, 0)


class Tab:
    """One page. `complaints` are errors, warnings, and requests that left the machine, of all pages so far."""

    def __init__(self, requests: Any, replies: Any) -> None:
        self._requests, self._replies = requests, replies
        self._session, self._last = None, 0
        self.complaints: list[str] = []
        self._seen: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result.

        Raises:
            RuntimeError: the browser refused it, or has gone.
        """
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._requests.write(json.dumps(message).encode() + b"\0")
        self._requests.flush()
        while True:
            reply = self._receive()
            if reply.get("id") == self._last:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]

    def open(self, page: Path, width: int, height: int, scheme: str, scale: float = 1) -> None:
        """Shows a file on a screen of a size, in a colour scheme, and waits until it is loaded."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._seen.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._receive()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives on the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _receive(self) -> dict[str, Any]:
        letters = bytearray()
        while (letter := self._replies.read(1)) != b"\0":
            if not letter:
                raise RuntimeError("the browser has gone")
            letters += letter
        message = json.loads(letters)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        self._seen.append(method)
        if method in _COMPLAINTS:
            self.complaints.append(f"{method}: {json.dumps(params)[:500]}")
        url = params.get("request", {}).get("url", "") if method == "Network.requestWillBeSent" else ""
        if url and not url.startswith(_LOCAL):
            self.complaints.append(f"asks for {url[:200]}")
