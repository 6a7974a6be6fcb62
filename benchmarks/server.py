"""A server process for a benchmark: `pathguard serve` on a free port of this machine."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def server_process(bundle: Path, threads: int | None = None) -> "Iterator[tuple[subprocess.Popen[str], str]]":
    """The process and its target, such as `127.0.0.1:50051`; it is stopped at the end of the block.

    Raises:
        RuntimeError: the server ended before it was ready; what it said stands on standard error.
    """
    command = [sys.executable, "-m", "pathguard", "serve", "--bundle", str(bundle), "--port", "0"]
    if threads is not None:
        command += ["--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r" on (\S+:\d+)$", line.strip())
        if found is None:
            process.terminate()
            raise RuntimeError(f"expected a server that says where it is, got {line!r}")
        try:
            yield process, found[1]
        finally:
            process.terminate()
            process.wait(timeout=60)
