"""A folder of shards: one origin for all, one process at a time adds to it, and a log alone says which are done."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from detector.errors import ArtifactError, DataError
from detector.files import write_whole

MANIFEST = "manifest.json"


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


Origin = TypeVar("Origin")


def read_origin(folder: Path, kind: Callable[..., Origin], schema: int, what: str, command: str) -> Origin:
    """What the manifest of `folder` says that its shards have in common.

    Args:
        folder: of the shards.
        kind: makes of its values what is wanted.
        schema: the version that can be read.
        what: the shards are, for messages.
        command: which makes them, for messages.

    Raises:
        DataError: there is no manifest.
        ArtifactError: it is damaged or of another schema.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise DataError(f"expected {what} in {folder}, got no {MANIFEST}; `{command}` makes them")
    try:
        content = json.loads(manifest.read_text())
        origin = kind(**content)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"expected a manifest of {what} in {manifest}, got {error}") from None
    if content.get("schema") != schema:
        raise ArtifactError(f"expected {what} of schema {schema}, got schema {content.get('schema')}")
    return origin


def write_origin(folder: Path, origin: Mapping[str, object]) -> None:
    """The manifest of a new folder, with `schema` among its values; an old one's stays.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    if (folder / MANIFEST).exists():
        return
    try:
        write_whole(folder / MANIFEST, json.dumps(origin, indent=2).encode())
    except OSError as error:
        raise DataError(f"expected to write {folder / MANIFEST}, got: {error.strerror}") from None


def check_origin(folder: Path, found: Mapping[str, object], wanted: Mapping[str, object], what: str) -> None:
    """Refuse to mix shards of two origins.

    Raises:
        ArtifactError: the folder is of another origin, told by the first thing that differs.
    """
    for name, value in wanted.items():
        if found[name] != value:
            raise ArtifactError(f"expected {what} of {name} {value}, got {folder} with {name} {found[name]}")


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
