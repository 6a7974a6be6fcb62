"""What a server says about images and models, as values without protobuf."""

import enum
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protos.pathguard.v1 import detection_pb2 as pb


class Verdict(enum.Enum):
    """Whether an image was altered to mislead the network."""

    UNSPECIFIED = 0
    CLEAN = 1
    ADVERSARIAL = 2
    UNCERTAIN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """What the server says about one image.

    Attributes:
        label: predicted class, from 0; None with an error, or where the caller's role may not see it (likewise below).
        name: name of the predicted class; None with an error.
        probabilities: softmax over the classes, each in [0, 1]; empty with an error.
        score: adversarial score, unbounded, larger is more suspicious; None with an error.
        p_value: share of clean calibration images at least as suspicious, in (0, 1]; None with an error.
        verdict: the decision at `max_false_alarm_rate`; UNSPECIFIED with an error.
        path: layer -> its open channels, `(channels,)`; None unless asked for.
        restored_label: class that an adversarial image most likely shows, a guess; None unless asked for.
        restored_name: name of that class; None likewise.
        explanation: why, as JSON values under the names of `pathguard explain --json`; None unless asked for.
        resized: whether the server resized the image to the network's size.
        error: why there is no answer for this image, in one line; None if there is one.
        model_version: version of the network and classifier that answered; empty if the server never saw the image.
        threshold_version: version of the calibration; empty likewise.
        max_false_alarm_rate: rate that the verdict was given at, in (0, 1); None if the server never saw the image.
    """

    label: int | None = None
    name: str | None = None
    probabilities: tuple[float, ...] = ()
    score: float | None = None
    p_value: float | None = None
    verdict: Verdict = Verdict.UNSPECIFIED
    path: Mapping[str, npt.NDArray[np.bool_]] | None = None
    restored_label: int | None = None
    restored_name: str | None = None
    explanation: Mapping[str, Any] | None = None
    resized: bool = False
    error: str | None = None
    model_version: str = ""
    threshold_version: str = ""
    max_false_alarm_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that the server answers for.

    Attributes:
        name: what to ask for it by.
        model_version: version of the network and classifier.
        threshold_version: version of the calibration.
        height: rows of pixels that it takes.
        width: columns of pixels that it takes.
        channels: 1 (grey) or 3 (RGB).
        resize: whether images of another size are resized rather than refused.
        class_names: names of the classes, by label.
        layers: gated layer -> its channels, in the order of the path.
        max_false_alarm_rate: default rate, in (0, 1).
        smallest_false_alarm_rate: smallest rate that can be asked for.
        calibration_images: number of clean images that p-values are counted on.
        restores: whether the labels of adversarial images can be restored.
        engine: what runs the network; empty from a server that does not tell.
    """

    name: str
    model_version: str
    threshold_version: str
    height: int
    width: int
    channels: int
    resize: bool
    class_names: tuple[str, ...]
    layers: Mapping[str, int]
    max_false_alarm_rate: float
    smallest_false_alarm_rate: float
    calibration_images: int
    engine: str
    restores: bool = False


def results_of(response: pb.DetectResponse) -> Iterator[ImageResult]:
    """The results of a response, in the order of its images."""
    layers = {layer.name: layer.channels for layer in response.path_layout.layers}
    for result in response.results:
        # An image is told as failed, or with a label; a role that sees no label gets neither number nor name.
        failed = result.status.code != 0
        yield ImageResult(
            label=result.label if result.label_name else None,
            name=result.label_name or None,
            probabilities=tuple(result.probabilities),
            score=result.score if result.HasField("score") else None,
            p_value=result.p_value or None,
            verdict=Verdict(result.verdict),
            path=_path_of(result.path, layers) if layers and not failed else None,
            restored_label=result.restored_label if result.HasField("restored_label") else None,
            restored_name=result.restored_label_name or None,
            explanation=_explanation_of(result.explanation) if result.HasField("explanation") else None,
            resized=result.resized,
            error=result.status.message if failed else None,
            model_version=response.model_version,
            threshold_version=response.threshold_version,
            max_false_alarm_rate=response.max_false_alarm_rate,
        )


def _explanation_of(why: pb.Explanation) -> dict[str, Any]:
    def fields(message: pb.FilterState | pb.LayerState | pb.NearPath) -> dict[str, Any]:
        return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}

    return {
        "base": why.base,
        "parts": {part.name: part.value for part in why.parts},
        "method": why.method,
        "layers": [fields(layer) for layer in why.layers],
        "least_usual_filters": [fields(state) for state in why.least_usual_filters],
        "resembles": why.resembles,
        "resembles_by_nats": why.resembles_by_nats,
        "nearest_usual_path": fields(why.nearest) if why.HasField("nearest") else None,
        "nearest_usual_path_of_label": fields(why.nearest_of_label) if why.HasField("nearest_of_label") else None,
        "label_with_these_set_right": why.label_set_right,
        "restored_label": why.restored,
    }


def _path_of(packed: bytes, layers: Mapping[str, int]) -> dict[str, npt.NDArray[np.bool_]]:
    ends = list(itertools.accumulate(layers.values()))
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=ends[-1]).astype(np.bool_)
    return dict(zip(layers, np.split(bits, ends[:-1]), strict=True))


def model_info(model: pb.Model) -> ModelInfo:
    """What a server says about a model."""
    return ModelInfo(
        name=model.name,
        model_version=model.model_version,
        threshold_version=model.threshold_version,
        height=model.input.height,
        width=model.input.width,
        channels=model.input.channels,
        resize=model.input.resize,
        class_names=tuple(model.class_names),
        layers={layer.name: layer.channels for layer in model.path_layout.layers},
        max_false_alarm_rate=model.max_false_alarm_rate,
        smallest_false_alarm_rate=model.smallest_false_alarm_rate,
        calibration_images=model.calibration_images,
        restores=model.restores,
        engine=model.engine,
    )
