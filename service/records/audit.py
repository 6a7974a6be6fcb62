"""The log of verdicts: what was answered, to whom, by which model, at which rate; one line of JSON for each call.

A line is handed to the operating system before the answer leaves, so that a killed process has no answer out that its
log does not know. Lines are only ever appended; a full file is put aside under a number, `audit.jsonl.000001`, and
never touched again but to be removed when there are too many. A disk that is full, or slow, never fails a call: the
answer leaves, and metric and log say that its record was lost.
"""

import asyncio
import glob
import itertools
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from service.config import AuditConfig
from service.errors import ConfigError
from service.processors import anywhere

_log = logging.getLogger(__name__)

# While the disk is full, the server's own log says so this often.
_TELL_EVERY_SECONDS: Final = 60.0
_CLOSE_SECONDS: Final = 5.0
_MOST_WAITING: Final = 10_000
_MOST_HELD: Final = 64 * 1024 * 1024
_MOST_TOGETHER: Final = 256
_NEWLINE: Final = ord("\n")

Record = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A record on its way: what makes it, the bytes that it holds until then, and who waits for it."""

    record: Record
    held: int
    done: "asyncio.Future[None]"


class AuditLog:
    """Appends records in a thread of its own; `write` and `close` are for the event loop's thread."""

    def __init__(
        self,
        config: AuditConfig,
        on_record: Callable[[str], None] = lambda _outcome: None,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        """Opens the file, which may have lines already; needs a running event loop.

        Args:
            config: where, and how large files grow.
            on_record: told `written`, `lost` or `late` (a wait was given up) for each record, from either thread.
            write: `os.write`, or what a test puts in its place.

        Raises:
            ConfigError: the file cannot be written.
        """
        self._config = config
        self._path = Path(config.file)
        self._on_record = on_record
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._held = 0
        self._waiting = 0
        self._told_at = -math.inf
        self._descriptor = -1
        self._size = 0
        self._torn = False
        try:
            self._open()
        except OSError as error:
            raise ConfigError(
                f"expected an audit_file that can be written, got {self._path}: {error.strerror}"
            ) from None
        self._thread = threading.Thread(target=anywhere(self._work), name="audit", daemon=True)
        self._thread.start()

    async def write(self, record: Record, held: int = 0) -> None:
        """Returns when the record is in the file or lost, or when `wait_seconds` are over. Never fails.

        Args:
            record: makes the record; called in the log's own thread, so that digests cost the callers nothing.
            held: bytes that `record` keeps in memory until then.
        """
        with self._lock:
            full = self._waiting >= _MOST_WAITING or (self._held > 0 and self._held + held > _MOST_HELD)
            if not full:
                self._waiting += 1
                self._held += held
        if full:
            self._lose(1, "too many records are waiting for the disk")
            return
        entry = _Entry(record, held, self._loop.create_future())
        self._entries.put(entry)
        try:
            async with asyncio.timeout(self._config.wait_seconds):
                await entry.done
        except TimeoutError:
            self._on_record("late")

    def close(self) -> None:
        """Writes what waits, for some seconds, and closes the file."""
        self._entries.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        over = False
        while not over:
            entries = [self._entries.get()]
            while entries[-1] is not None and len(entries) < _MOST_TOGETHER and not self._entries.empty():
                entries.append(self._entries.get())
            over = entries[-1] is None
            taken = [entry for entry in entries if entry is not None]
            try:
                self._append([entry.record for entry in taken])
            except Exception:
                # Whatever it is, the thread goes on: calls wait for it.
                self._lose(len(taken), "unexpected")
                _log.exception("the audit log failed")
            with self._lock:
                self._waiting -= len(taken)
                self._held -= sum(entry.held for entry in taken)
            with suppress(RuntimeError):  # the loop has been closed: nobody waits
                self._loop.call_soon_threadsafe(_end, [entry.done for entry in taken])
        os.close(self._descriptor)

    def _append(self, records: Sequence[Record]) -> None:
        lines = [json.dumps(record(), separators=(",", ":")).encode() + b"\n" for record in records]
        begin = 0
        while begin < len(lines):
            end, size = begin + 1, self._size + len(lines[begin])
            while end < len(lines) and size + len(lines[end]) <= self._config.max_bytes:
                size += len(lines[end])
                end += 1
            if self._size and size > self._config.max_bytes and self._put_aside():
                continue
            self._put(lines[begin:end])
            begin = end

    def _put(self, lines: Sequence[bytes]) -> None:
        """Appends lines; where only some of them fit, those count as written and the rest as lost."""
        content = b"".join([b"\n" if self._torn else b"", *lines])
        ends = list(itertools.accumulate((len(line) for line in lines), initial=int(self._torn)))[1:]
        done = 0
        try:
            while done < len(content):
                done += self._write(self._descriptor, content[done:])
            if self._config.fsync:
                os.fsync(self._descriptor)
        except OSError as error:
            whole = sum(end <= done for end in ends)
            self._lose(len(lines) - whole, str(error.strerror))
        else:
            whole = len(lines)
        for _ in range(whole):
            self._on_record("written")
        if done:
            self._torn = content[done - 1] != _NEWLINE
        self._size += done

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._descriptor).st_size
        self._torn = self._size > 0 and os.pread(self._descriptor, 1, self._size - 1) != b"\n"

    def _put_aside(self) -> bool:
        """Begins a new file; where that cannot be, the old one grows on."""
        try:
            aside = self._put_aside_before()
            number = aside[-1][0] + 1 if aside else 1
            old, path = self._descriptor, self._path.with_name(f"{self._path.name}.{number:06d}")
            self._path.rename(path)
            self._open()
            os.close(old)
            for _, oldest in [*aside, (number, path)][: -self._config.keep_files]:
                oldest.unlink(missing_ok=True)
        except OSError as error:
            self._tell(f"no new file can be begun: {error.strerror}")
            return False
        return True

    def _put_aside_before(self) -> list[tuple[int, Path]]:
        found = [(path.suffix[1:], path) for path in self._path.parent.glob(f"{glob.escape(self._path.name)}.*")]
        return sorted((int(suffix), path) for suffix, path in found if suffix.isascii() and suffix.isdigit())

    def _lose(self, records: int, why: str) -> None:
        for _ in range(records):
            self._on_record("lost")
        if records:
            self._tell(f"records are lost: {why}")

    def _tell(self, what: str) -> None:
        now = time.monotonic()
        if now - self._told_at >= _TELL_EVERY_SECONDS:
            self._told_at = now
            _log.error("audit log %s: %s", self._path, what)


def _end(waiting: "Sequence[asyncio.Future[None]]") -> None:
    for done in waiting:
        if not done.done():
            done.set_result(None)
