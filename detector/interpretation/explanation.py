"""Why an image got its label and its verdict: the parts of its score, and where its path is unusual."""

import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from detector.batches import best_device, to_tensor
from detector.bundle import Bundle
from detector.errors import ImageError
from detector.images import Pixels
from detector.interpretation.contributions import contributions_of
from detector.interpretation.correction import Corrector
from detector.interpretation.forced_path import forced_path
from detector.interpretation.usual_paths import NearPath
from detector.network.decouple import GatedNet
from detector.network.folding import fold_normalisation
from detector.paths.encoder import encode
from detector.paths.path_encoding import Bits, PathEncoding
from detector.scoring.compiled_score import compile_score

# A filter's state is unusual for a class where fewer of its images have it.
UNUSUAL_SHARE = 0.05
# Filters that are named and set right: the least usual of those in a state that fewer than half of the class have.
NAMED_FILTERS = 10
_HALF = math.log(2)
# Kinds of features that have a column for each filter.
_OF_FILTERS = ("bits", "gates")


@dataclass(frozen=True, slots=True)
class FilterState:
    """One filter that is not as for most images of the predicted class.

    Attributes:
        layer: name of its convolution.
        filter: its place there, from 0.
        open: its state.
        usually_open: share of the class's images for which it is open, in (0, 1).
        surprise: -log of the share of the class's images with this state, in nats.
        part: what this filter's own columns add to the score; 0 where the classifier reads none.
    """

    layer: str
    filter: int
    open: bool
    usually_open: float
    surprise: float
    part: float


@dataclass(frozen=True, slots=True)
class LayerState:
    """One gated convolution.

    Attributes:
        layer: its name.
        filters: how many it has.
        open: how many of them are open.
        unusual: how many are in a state that fewer than `UNUSUAL_SHARE` of the predicted class's images have.
        surprise: of all its filters together, in nats.
        usual_surprise: the mean of that over images of the class, in nats.
        part: what its columns add to the score: of its filters, of the channels that its gate reads, of its path.
    """

    layer: str
    filters: int
    open: int
    unusual: int
    surprise: float
    usual_surprise: float
    part: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was said about one image, and why.

    Attributes:
        label: predicted class, from 0.
        class_names: names of the classes, by label.
        probabilities: softmax over the classes.
        score: adversarial score; `base` and `parts` sum to it.
        p_value: share of clean calibration images at least as suspicious, in (0, 1].
        max_false_alarm_rate: the rate that the verdict was given at.
        base: the score of an average image; the score itself where it is no sum.
        parts: what each layer, and each kind of columns that belong to no layer, adds to the score.
        method: how the parts were found.
        layers: all gated convolutions, in network order.
        least_usual: filters in states that fewer than half of the predicted class have, the least usual first.
        resembles: class whose paths the image's is most like.
        resembles_by: log-odds of that class over the predicted one, of independent filters, in nats; 0 if it is that.
        nearest: the path of the sample that differs in the fewest filters.
        nearest_of_label: likewise among those of the predicted class; None if there are none.
        label_set_right: label with these filters set to their usual states for the predicted class.
        restored: label that the image would have on a usual path (see `detector.interpretation.correction`).
        path: the image's path, one row.
        usual: the state that each filter has for most images of the predicted class, `(filters,)`.
        usual_of_restored: likewise of the restored class.
    """

    label: int
    class_names: tuple[str, ...]
    probabilities: tuple[float, ...]
    score: float
    p_value: float
    max_false_alarm_rate: float
    base: float
    parts: Mapping[str, float]
    method: str
    layers: tuple[LayerState, ...]
    least_usual: tuple[FilterState, ...]
    resembles: int
    resembles_by: float
    nearest: NearPath | None
    nearest_of_label: NearPath | None
    label_set_right: int
    restored: int
    path: PathEncoding
    usual: Bits
    usual_of_restored: Bits

    @property
    def flagged(self) -> bool:
        """Whether the image is called adversarial."""
        return self.p_value <= self.max_false_alarm_rate

    def named(self, label: int) -> str:
        """Name of a class."""
        return self.class_names[label]

    def to_json(self) -> dict[str, object]:
        """All of it but the paths, as JSON values, classes by name."""

        def near(path: NearPath | None) -> dict[str, object] | None:
            return None if path is None else {**asdict(path), "label": self.named(path.label)}

        return {
            "label": self.named(self.label),
            "verdict": "ADVERSARIAL" if self.flagged else "CLEAN",
            "probability": self.probabilities[self.label],
            "score": self.score,
            "p_value": self.p_value,
            "max_false_alarm_rate": self.max_false_alarm_rate,
            "base": self.base,
            "parts": dict(self.parts),
            "method": self.method,
            "layers": [asdict(layer) for layer in self.layers],
            "least_usual_filters": [asdict(state) for state in self.least_usual],
            "resembles": self.named(self.resembles),
            "resembles_by_nats": self.resembles_by,
            "nearest_usual_path": near(self.nearest),
            "nearest_usual_path_of_label": near(self.nearest_of_label),
            "label_with_these_set_right": self.named(self.label_set_right),
            "restored_label": self.named(self.restored),
        }


class Explainer:
    """A bundle, loaded to explain one image at a time; threads take turns."""

    def __init__(self, bundle: Bundle) -> None:
        """Load a verified bundle.

        Args:
            bundle: with a decoupled network, a detector and statistics of paths.

        Raises:
            ArtifactError: the bundle lacks one of them, or a part cannot be used.
        """
        self.usual = bundle.usual_paths()
        self.network = fold_normalisation(bundle.network()).to(best_device())
        self._classifier = bundle.classifier()
        self._contributions = contributions_of(self._classifier)
        self._score = compile_score(self._classifier)
        self._calibration = bundle.calibration()
        self._features = bundle.features(self.network)
        self._columns = self._features.columns()
        self._corrector = Corrector(self.network, self.usual)
        self.max_false_alarm_rate = bundle.detector_info().max_false_alarm_rate
        self.spec = bundle.manifest.network.spec
        self.class_names = bundle.manifest.network.classes
        self._lock = threading.Lock()
        self._rates = self.usual.rates
        self._usual_surprise = -(
            self._rates * np.log(self._rates) + (1 - self._rates) * np.log1p(-self._rates)
        )  # the entropy: the mean surprise of images of the class itself
        starts = np.cumsum([0, *self.network.layers.values()]).tolist()
        self._places = {
            layer: slice(start, end)
            for layer, start, end in zip(self.network.layers, starts[:-1], starts[1:], strict=True)
        }

    def explain(self, pixels: Pixels, max_false_alarm_rate: float | None = None) -> Explanation:
        """Explain one image.

        Args:
            pixels: `uint8`, `(height, width, channels)`, as the network takes them.
            max_false_alarm_rate: rate that the verdict is given at; None for the bundle's.

        Raises:
            ImageError: the pixels are not of the shape that the network takes.
            RequestError: the calibration has no threshold for the rate.
        """
        rate = self.max_false_alarm_rate if max_false_alarm_rate is None else max_false_alarm_rate
        self._calibration.check_rate(rate)
        expected = (self.spec.height, self.spec.width, self.spec.channels)
        if pixels.shape != expected or pixels.dtype != np.uint8:
            raise ImageError(f"expected uint8 pixels of shape {expected}, got {pixels.dtype} {pixels.shape}")
        with self._lock:
            return self._explained(pixels, rate)

    @contextmanager
    def alone(self) -> Iterator[GatedNet]:
        """The network, for one thread alone."""
        with self._lock:
            yield self.network

    def _explained(self, pixels: Pixels, rate: float) -> Explanation:
        images = to_tensor(pixels[None], best_device())
        evidence = encode(self.network, images)
        logits = evidence.class_logits[0].astype(np.float64)
        label, bits = int(logits.argmax()), evidence.path.bits[0]
        rows = self._features.of(evidence)
        scores = self._score(rows)
        score, found = float(scores[0]), self._contributions(rows, scores)
        of_filters, of_layers, parts = self._gathered(found.parts[0])
        surprise = self.usual.surprise(evidence.path.bits, np.array([label]))[0]
        likelihoods = self.usual.likelihoods(evidence.path.bits)[0]
        unusual = surprise > -np.log(UNUSUAL_SHARE)
        named = [
            int(place) for place in np.argsort(-surprise, kind="stable")[:NAMED_FILTERS] if surprise[place] > _HALF
        ]
        usual, resembles = self._rates > 0.5, int(likelihoods.argmax())
        p_values = self._calibration.p_values(scores, np.array([label]))
        restored = int(self._corrector.restored(images, evidence.class_logits, p_values)[0])
        shifted = np.exp(logits - logits.max())
        return Explanation(
            label=label,
            class_names=self.class_names,
            probabilities=tuple((shifted / shifted.sum()).tolist()),
            score=score,
            p_value=float(p_values[0]),
            max_false_alarm_rate=rate,
            base=float(found.base[0]),
            parts=parts,
            method=found.method,
            layers=tuple(
                LayerState(
                    layer,
                    int(bits[place].size),
                    int(bits[place].sum()),
                    int(unusual[place].sum()),
                    float(surprise[place].sum()),
                    float(self._usual_surprise[label, place].sum()),
                    of_layers[layer],
                )
                for layer, place in self._places.items()
            ),
            least_usual=tuple(
                self._state(place, label, bits, float(surprise[place]), float(of_filters[place])) for place in named
            ),
            resembles=resembles,
            resembles_by=float(likelihoods[resembles] - likelihoods[label]),
            nearest=self.usual.nearest(bits),
            nearest_of_label=self.usual.nearest(bits, label),
            label_set_right=self._label_with(images, named, usual[label]),
            restored=restored,
            path=evidence.path,
            usual=usual[label],
            usual_of_restored=usual[restored],
        )

    def _gathered(self, parts: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> tuple[
        "np.ndarray[tuple[int], np.dtype[np.float64]]", dict[str, float], dict[str, float]
    ]:  # fmt: skip
        """What each filter's, each layer's, and each other kind's columns add."""
        of_filters = np.zeros(sum(self.network.layers.values()))
        of_layers: defaultdict[str, float] = defaultdict(float)
        others: defaultdict[str, float] = defaultdict(float)
        for column, part in zip(self._columns, parts.tolist(), strict=True):
            if column.layer is None:
                others[column.kind] += part
                continue
            of_layers[column.layer] += part
            if column.kind in _OF_FILTERS and column.place is not None:
                of_filters[self._places[column.layer].start + column.place] += part
        return of_filters, of_layers, {**of_layers, **others}

    def _state(self, index: int, label: int, bits: Bits, surprise: float, part: float) -> FilterState:
        layer, place = next((name, place) for name, place in self._places.items() if place.start <= index < place.stop)
        return FilterState(
            layer, index - place.start, bool(bits[index]), float(self._rates[label, index]), surprise, part
        )

    def _label_with(self, images: torch.Tensor, filters: Sequence[int], states: Bits) -> int:
        """The label with some filters forced into their states of `states`, `(filters of all gates,)`."""
        forced = torch.full((1, len(states)), torch.nan)
        forced[0, list(filters)] = torch.from_numpy(states[list(filters)].astype(np.float32))
        forced = forced.to(best_device())
        with torch.inference_mode(), forced_path(self.network, forced):
            return int(self.network(images).argmax(dim=1)[0])
