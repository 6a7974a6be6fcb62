"""Which bundles lie on disk: single folders, and a folder of models.

    DIR/NAME/manifest.json            a model with one version
    DIR/NAME/VERSION/manifest.json    a model with several; the newest is current, `10` is newer than `9`
    DIR/NAME/serving.json             the operator's word on it, may be left out:
                                      {"version": "2", "max_false_alarm_rate": 0.01}

A single bundle's folder is a `DIR/NAME` of its own. What begins with a dot is left alone. `serving.json` may name the
version for calls that name none (a rollback is one line) and the rate at which the model flags unless asked otherwise.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from service.errors import ConfigError, SettingsFileError

MANIFEST: Final = "manifest.json"
SETTINGS: Final = "serving.json"

# What tells a changed folder from an unchanged one: name, modification time, size and inode of each file.
Mark = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The operator's word on a model.

    Attributes:
        version: the current one; None for the newest.
        max_false_alarm_rate: the rate it flags at, in (0, 1); None for the detector's own.
    """

    version: str | None = None
    max_false_alarm_rate: float | None = None


@dataclass(frozen=True, slots=True)
class FoundVersion:
    """One bundle on disk.

    Attributes:
        version: its folder's name; empty where the model's folder is the bundle.
        folder: the bundle.
        mark: changes when the folder's content does.
    """

    version: str
    folder: Path
    mark: Mark


@dataclass(frozen=True, slots=True)
class FoundModel:
    """One model on disk.

    Attributes:
        name: what callers ask for.
        folder: where it lies.
        versions: its bundles, in no order; none where the folder is empty or away; None where that cannot be known now.
        settings: the operator's word, or why it cannot be understood.
        required: whether the server must not start without it.
    """

    name: str
    folder: Path
    versions: Sequence[FoundVersion] | None
    settings: ModelSettings | SettingsFileError
    required: bool


class Repository(Protocol):
    """Where models come from: `BundleFolders`, or what a test puts in its place."""

    def scan(self) -> Sequence[FoundModel]:
        """What is there now; called in a thread of its own.

        Raises:
            OSError: it cannot be looked at, so that nothing is known.
        """


class BundleFolders:
    """Bundles in folders."""

    def __init__(self, bundles: Sequence[Path] = (), models: Path | None = None) -> None:
        """Looks at nothing yet.

        Args:
            bundles: folders of single models.
            models: a folder of such folders; None for none.

        Raises:
            ConfigError: nothing is given, or two bundles have the same name.
        """
        if not bundles and models is None:
            raise ConfigError("expected a bundle or a folder of models, got neither")
        self._bundles = {name_of(folder): folder for folder in bundles}
        if len(self._bundles) < len(bundles):
            raise ConfigError(
                f"expected bundles whose folders have different names, got {', '.join(map(str, bundles))}: a folder's "
                "name is the model's"
            )
        self._models = models

    def scan(self) -> Sequence[FoundModel]:
        """What is there now, the single bundles first.

        Raises:
            OSError: the folder of models cannot be read, so that nothing is known of it.
        """
        found = [_found(name, folder, required=True) for name, folder in self._bundles.items()]
        if self._models is not None:
            for folder in sorted(self._models.iterdir()):
                if _is_of_interest(folder) and folder.name not in self._bundles:
                    found.append(_found(folder.name, folder, required=False))
        return found


def name_of(folder: Path) -> str:
    """The name of the model in `folder`: the folder's own, also where it is a link."""
    return Path(os.path.abspath(folder)).name  # noqa: PTH100 - a link is not to be followed


def parse_settings(content: bytes, path: Path) -> ModelSettings:
    """What a `serving.json` says.

    Raises:
        SettingsFileError: not JSON, or something unknown in it.
    """
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise SettingsFileError(f"expected JSON in {path}, got something else ({error})") from None
    if not isinstance(raw, dict) or not set(raw) <= {"version", "max_false_alarm_rate"}:
        raise SettingsFileError(f"expected version and max_false_alarm_rate in {path}, got {raw}")
    version, rate = raw.get("version"), raw.get("max_false_alarm_rate")
    if version is not None and not isinstance(version, str):
        raise SettingsFileError(f"expected the version as text in {path}, got {version!r}")
    if rate is not None and not (isinstance(rate, float) and 0 < rate < 1):
        raise SettingsFileError(f"expected a max_false_alarm_rate between 0 and 1 in {path}, got {rate!r}")
    return ModelSettings(version, rate)


def _found(name: str, folder: Path, *, required: bool) -> FoundModel:
    settings: ModelSettings | SettingsFileError
    try:
        settings = _settings_of(folder)
    except SettingsFileError as error:
        settings = error
    return FoundModel(name, folder, _versions_in(folder), settings, required)


def _settings_of(folder: Path) -> ModelSettings:
    path = folder / SETTINGS
    try:
        return parse_settings(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return ModelSettings()
    except OSError as error:
        raise SettingsFileError(f"expected {path} to be readable, got: {error.strerror}") from None


def _versions_in(folder: Path) -> Sequence[FoundVersion] | None:
    try:
        if (folder / MANIFEST).is_file():
            return [FoundVersion("", folder, _mark_of(folder))]
        inner = [child for child in folder.iterdir() if _is_of_interest(child) and (child / MANIFEST).is_file()]
        return [FoundVersion(child.name, child, _mark_of(child)) for child in inner]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        return None


def _mark_of(folder: Path) -> Mark:
    marks = []
    with os.scandir(folder) as entries:
        for entry in entries:
            # What is put there under another name first may be gone again.
            with suppress(FileNotFoundError):
                if entry.name != SETTINGS and entry.is_file():
                    seen = entry.stat()
                    marks.append((entry.name, seen.st_mtime_ns, seen.st_size, seen.st_ino))
    return tuple(sorted(marks))


def _is_of_interest(folder: Path) -> bool:
    return not folder.name.startswith(".") and folder.is_dir()
