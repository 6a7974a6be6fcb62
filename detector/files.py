"""Files that are whole or absent: written beside their place, flushed, then moved into it."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: bytes) -> str:
    """Write `content` to `path` at once or not at all.

    Returns:
        The SHA-256 of the content, in hexadecimal.

    Raises:
        OSError: the disk is full or the folder cannot be written; what stood at `path` is untouched, as after Ctrl-C.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # The move too outlives a power cut, where the file system can say so.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
