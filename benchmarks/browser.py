"""A headless Chromium that opens a page, drops files on it, and is asked what it shows: over its debugging pipe.

The pipe carries JSON messages with a zero byte behind each, so that no library is needed.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """The program, or None where there is none."""
    return next((found for name in _PROGRAMS if (found := shutil.which(name))), None)


class Page:
    """One open page."""

    def __init__(self, to: BinaryIO, back: BinaryIO) -> None:
        """Opens an empty page.

        Args:
            to: what the browser reads.
            back: what it writes.
        """
        self._to, self._back, self._number, self._session = to, back, 0, ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def show(self, address: str, width: int = 1280, height: int = 900) -> None:
        """Opens an address in a window of that size."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("window.isLeft = true")  # the page before is complete too, until the new one takes its place
        self._call("Page.navigate", url=address)
        self.wait("!window.isLeft && document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it comes to.

        Raises:
            RuntimeError: it threw.
        """
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60.0) -> float:
        """Wait until an expression is true.

        Returns:
            Seconds waited.

        Raises:
            TimeoutError: it did not become true.
        """
        began = time.perf_counter()
        while not self.ask(expression):
            if time.perf_counter() - began > seconds:
                raise TimeoutError(f"expected {expression} within {seconds} s")
            time.sleep(0.01)
        return time.perf_counter() - began

    def drop(self, name: str, content: bytes) -> None:
        """Drops a file on the page."""
        text = base64.b64encode(content).decode()
        self.ask(
            f"""(() => {{
              const bytes = Uint8Array.from(atob({json.dumps(text)}), (one) => one.charCodeAt(0));
              const carried = new DataTransfer();
              carried.items.add(new File([bytes], {json.dumps(name)}));
              const how = {{ dataTransfer: carried, bubbles: true, cancelable: true }};
              document.dispatchEvent(new DragEvent("drop", how));
            }})()"""
        )

    def press(self, key: str) -> None:
        """Presses a key where the focus is, such as `Tab`, `Enter` or `ArrowRight`."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39, "ArrowDown": 40}
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            extra = text if kind == "keyDown" else {}
            self._call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **extra
            )

    def picture(self, file: Path) -> None:
        """A PNG of the whole page."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(taken["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                found: dict[str, Any] = answer["result"]
                return found

    def _read(self) -> dict[str, Any]:
        content = bytearray()
        while (one := self._back.read(1)) != b"\0":
            if not one:
                raise RuntimeError("expected an answer of the browser, got its end")
            content += one
        found: dict[str, Any] = json.loads(content)
        return found


@contextmanager
def browser(program: str, pages: int = 1) -> Iterator[list[Page]]:
    """Pages of a browser, each with a process and a profile of its own; closed at the end."""
    opened: list[tuple[subprocess.Popen[bytes], BinaryIO, BinaryIO]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for number in range(pages):
                (theirs, to), (back, theirs_too) = _high_pipe(), _high_pipe()
                command = [
                    program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
                    "--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={folder}/{number}",
                ]  # fmt: skip
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    close_fds=False, preexec_fn=partial(_as_three_and_four, theirs, theirs_too),
                )  # fmt: skip
                os.close(theirs)
                os.close(theirs_too)
                opened.append((process, os.fdopen(to, "wb"), os.fdopen(back, "rb")))
            yield [Page(to, back) for _, to, back in opened]
        finally:
            for process, pipe, answers in opened:
                pipe.close()  # the end of its pipe ends the browser
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                answers.close()


def _high_pipe() -> tuple[int, int]:
    """The two ends of a pipe, neither of them 3 or 4, and neither inherited."""
    read, write = os.pipe()
    ends = fcntl.fcntl(read, fcntl.F_DUPFD_CLOEXEC, 10), fcntl.fcntl(write, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(read)
    os.close(write)
    return ends


def _as_three_and_four(read: int, write: int) -> None:
    """In the browser's process: it reads from 3 and writes to 4."""
    os.dup2(read, 3)
    os.dup2(write, 4)
