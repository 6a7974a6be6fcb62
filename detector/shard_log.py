"""A folder of shards: one process at a time adds to it, and a log alone says which shards are done."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detector.errors import ArtifactError, DataError
from detector.files import write_whole


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Within it no other process adds to `folder`, also none of another machine that shares it by NFS.

    Raises:
        DataError: another process does, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise DataError(f"expected a folder that can be written, got {folder} ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"expected to be the only writer of {folder}, got another process at work there") from None
        yield


class ShardLog:
    """One line of JSON for each finished shard, appended after the shard itself is safe on disk."""

    def __init__(self, path: Path) -> None:
        """Reads nothing yet.

        Args:
            path: of the log; need not exist.
        """
        self.path = path

    def entries(self) -> Iterator[dict[str, Any]]:
        """The whole lines, the oldest first; one torn by an interruption does not count.

        Raises:
            ArtifactError: a line is no JSON object.
        """
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                return
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise self.damaged(error) from None
            if not isinstance(entry, dict):
                raise self.damaged(entry)
            yield entry

    def append(self, entry: Mapping[str, object]) -> None:
        """Add one line, and see it safe on disk.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        with self.path.open("a") as log:
            log.write(json.dumps(entry) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def drop_torn_line(self) -> None:
        """Take away what an interruption left at the end, before anything is appended behind it."""
        if self.path.exists() and not (content := self.path.read_bytes()).endswith(b"\n"):
            write_whole(self.path, content[: content.rfind(b"\n") + 1])

    def damaged(self, why: object) -> ArtifactError:
        """What to raise where a line cannot be understood."""
        return ArtifactError(f"expected a line for each finished shard in {self.path}, got {why!r}")
