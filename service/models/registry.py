"""The models in service, by name and version; what is asked for is found in one look, whatever is being swapped."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from detector.images import ImageSpec, Pixels
from detector.interpretation.explanation import Explainer
from detector.scoring.detections import Detections
from service.errors import UnavailableError, UnknownModelError
from service.model import Model


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One version of a model in service; itself a `service.model.Model`.

    Attributes:
        model: the detector.
        name: what callers ask for.
        version: its folder's name, or its digest where it has no folder of its own.
        max_false_alarm_rate: the operator's rate, or the detector's, in (0, 1).
    """

    model: Model
    name: str
    version: str
    max_false_alarm_rate: float

    @property
    def model_version(self) -> str:
        """Version of the network and classifier."""
        return self.model.model_version

    @property
    def threshold_version(self) -> str:
        """Version of the calibration."""
        return self.model.threshold_version

    @property
    def spec(self) -> ImageSpec:
        """What the network takes in."""
        return self.model.spec

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.model.class_names

    @property
    def layers(self) -> Mapping[str, int]:
        """Gate name -> its channels, in network order."""
        return self.model.layers

    @property
    def calibration_images(self) -> int:
        """Number of clean images that p-values are counted on."""
        return self.model.calibration_images

    @property
    def restores(self) -> bool:
        """Whether labels can be restored."""
        return self.model.restores

    @property
    def engine(self) -> str:
        """What runs the network, for a person."""
        return self.model.engine

    @property
    def brief(self) -> bool:
        """Whether one image surely ends soon."""
        return self.model.brief

    @property
    def answered_in_full(self) -> int:
        """Images so far that opened a filter which a compacted bundle is served without."""
        return self.model.answered_in_full

    def detect(self, pixels: Pixels) -> Detections:
        """As the detector."""
        return self.model.detect(pixels)

    def restore(
        self, pixels: Pixels, probabilities: npt.NDArray[np.float32], p_values: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        """As the detector."""
        return self.model.restore(pixels, probabilities, p_values)

    def explainer(self) -> Explainer:
        """As the detector."""
        return self.model.explainer()


@dataclass(frozen=True, slots=True)
class _Line:
    """All versions of one model in service, and the one for calls that name none."""

    versions: Mapping[str, ServedModel]
    current: str


class Registry:
    """Which models are in service. A look-up sees all of a change or nothing of it; changes are for one thread."""

    def __init__(self, default: str = "") -> None:
        """Starts empty.

        Args:
            default: name of the model for calls that name none; empty for the first that was put in.
        """
        self._default = default
        self._lines: Mapping[str, _Line] = {}

    def find(self, name: str = "", version: str = "") -> ServedModel:
        """The model of that name and version.

        Args:
            name: empty for the default.
            version: the folder's name or the digest of a version; empty for the current one.

        Raises:
            UnknownModelError: none of that name or version is in service.
            UnavailableError: none is in service at all.
        """
        lines = self._lines
        if not lines:
            raise UnavailableError("no model is in service yet, try again")
        wanted = name or self._first(lines)
        line = lines.get(wanted)
        if line is None:
            raise UnknownModelError(f"expected a model that this server has ({', '.join(lines)}), got {wanted!r}")
        if not version:
            return line.versions[line.current]
        if version in line.versions:
            return line.versions[version]
        for served in line.versions.values():
            if served.model_version == version:
                return served
        raise UnknownModelError(
            f"expected a version of {wanted} that this server has ({', '.join(line.versions)}), got {version!r}"
        )

    def all(self) -> Sequence[ServedModel]:
        """All versions of all models: the default model first, of each model the current version first."""
        lines = self._lines
        if not lines:
            return ()
        first = self._first(lines)
        names = [first, *(name for name in lines if name != first)] if first in lines else list(lines)
        listed: list[ServedModel] = []
        for name in names:
            line = lines[name]
            newest_first = sorted(line.versions.values(), key=lambda entry: age_of(entry.version), reverse=True)
            listed += sorted(newest_first, key=lambda entry: entry.version != line.current)
        return listed

    def versions(self, name: str) -> Mapping[str, ServedModel]:
        """The versions of a model that are in service."""
        return self._lines[name].versions if name in self._lines else {}

    def names(self) -> Sequence[str]:
        """The names of all models in service, in the order in which they came."""
        return list(self._lines)

    def put(self, name: str, versions: Mapping[str, ServedModel], current: str) -> None:
        """Makes these the versions of a model, all at once; no version takes it out of service."""
        lines = dict(self._lines)
        if versions:
            lines[name] = _Line(dict(versions), current)
        else:
            lines.pop(name, None)
        self._lines = lines

    def current(self, name: str) -> str:
        """The version of a model for calls that name none."""
        return self._lines[name].current

    def _first(self, lines: Mapping[str, _Line]) -> str:
        return self._default or next(iter(lines))


def served(model: Model, name: str | None = None, version: str | None = None) -> ServedModel:
    """A model as it is, under its own name and digest unless told otherwise."""
    return ServedModel(model, name or model.name, version or model.model_version, model.max_false_alarm_rate)


def at_rate(entry: ServedModel, rate: float | None) -> ServedModel:
    """The same model, flagging at `rate`; None for the detector's own."""
    return replace(entry, max_false_alarm_rate=entry.model.max_false_alarm_rate if rate is None else rate)


def age_of(version: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts versions from old to new; numbers in them count as numbers: `9` comes before `10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", version)
    return tuple((1, int(part), "") if part.isascii() and part.isdigit() else (0, 0, part) for part in parts)
