"""What files say, read again when they change; the last good value is kept while they say something wrong."""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from service.errors import SettingsFileError

_log = logging.getLogger(__name__)

Value = TypeVar("Value")
# What tells a changed file from an unchanged one: modification time, size and inode.
_Mark = tuple[int, int, int]


class KeptFiles(Generic[Value]):
    """A value made from files. `value` is safe from any thread; `refresh` runs in one thread at a time."""

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        parse: Callable[[Sequence[bytes]], Value],
        on_refresh: Callable[[str, bool], None] = lambda _name, _taken: None,
    ) -> None:
        """Reads the files.

        Args:
            name: what they are, for the log, such as `certificate`.
            paths: the files, in the order that `parse` takes their contents.
            parse: the value of the contents; raises SettingsFileError.
            on_refresh: told `name` and whether changed files were taken.

        Raises:
            SettingsFileError: a file cannot be read, or `parse` refused it.
        """
        self._name = name
        self._paths = paths
        self._parse = parse
        self._on_refresh = on_refresh
        self._lock = threading.Lock()
        self._refused: tuple[list[_Mark | None], str] | None = None
        self._marks = self._look()
        self._contents = self._read()
        self.value = parse(self._contents)

    def refresh(self) -> bool:
        """Looks at the files; whether `value` is another one now. Wrong or half-written files leave it as it is."""
        with self._lock:
            marks = self._look()
            if marks == self._marks:
                return False
            try:
                contents = self._read()
                if self._look() != marks:  # still being written: next time
                    return False
                value = self.value if contents == self._contents else self._parse(contents)
            except SettingsFileError as error:
                # Looked at again the next time, for it may be the time that is wrong; told once.
                if self._refused != (refused := (marks, str(error))):
                    self._refused = refused
                    _log.warning("%s not taken, the last good one goes on: %s", self._name, error)
                    self._on_refresh(self._name, False)
                return False
            self._marks, self._refused = marks, None
            if contents == self._contents:
                return False
            self._contents, self.value = contents, value
        _log.info("%s read again", self._name)
        self._on_refresh(self._name, True)
        return True

    def _look(self) -> list[_Mark | None]:
        return [_mark_of(path) for path in self._paths]

    def _read(self) -> list[bytes]:
        try:
            return [path.read_bytes() for path in self._paths]
        except OSError as error:
            raise SettingsFileError(
                f"expected a file of {self._name} that can be read, got {error.filename}: {error.strerror}"
            ) from None


def _mark_of(path: Path) -> _Mark | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_size, seen.st_ino
