"""Server processes for a benchmark, each on a free port of this machine, ended at the end of its block."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_START_SECONDS = 180.0


@contextmanager
def server_process(
    bundle: Path, threads: int | None = None, settings: Mapping[str, str] | None = None
) -> "Iterator[tuple[subprocess.Popen[str], str]]":
    """`pathguard serve`: the process and its target, such as `127.0.0.1:50051`.

    Args:
        bundle: what it serves.
        threads: of torch; None for its default.
        settings: variables `PATHGUARD_...`.

    Raises:
        RuntimeError: the server ended before it was ready; what it said stands on standard error.
    """
    command = [sys.executable, "-m", "pathguard", "serve", "--bundle", str(bundle), "--port", "0"]
    if threads is not None:
        command += ["--threads", str(threads)]
    environment = {**os.environ, **(settings or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r" on (\S+:\d+)$", line.strip())
            if found is None:
                raise RuntimeError(f"expected a server that says where it is, got {line!r}")
            yield process, found[1]
        finally:
            process.terminate()
            process.wait(timeout=60)


@contextmanager
def foreign_server(command: Sequence[str | Path], log: Path, answers: Callable[[], object]) -> "Iterator[None]":
    """A server of others, with all the processes that it starts.

    Args:
        command: program and arguments.
        log: file for what it says.
        answers: asks it something; an exception means that it is not ready yet.

    Raises:
        RuntimeError: it ended, or did not get ready in time; with the end of what it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
    try:
        ends = time.monotonic() + _START_SECONDS
        while True:
            try:
                answers()
                break
            except Exception as error:
                if process.poll() is not None or time.monotonic() > ends:
                    said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise RuntimeError(f"expected {command[0]} to get ready, got {error}; it said: {said}") from None
                time.sleep(0.5)
        yield
    finally:
        # Its own session: the group is its processes and nobody else's.
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            if number is signal.SIGTERM:
                time.sleep(2)
        process.wait(timeout=30)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def resident_megabytes(pid: int) -> float | None:
    """Resident memory of a process in 10^6 bytes; None where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 / 1e6 if match else None
