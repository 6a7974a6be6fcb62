"""Images in, verdicts out: all that serving sees of the detector."""

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from detector.batches import best_device, to_tensor
from detector.bundle import Bundle
from detector.errors import ArtifactError, ImageError
from detector.images import ImageSpec, Pixels
from detector.interpretation.correction import Corrector
from detector.interpretation.explanation import Explainer
from detector.network.folding import fold_normalisation
from detector.paths.encoder import Floats, encode
from detector.scoring.compiled_score import compile_score
from detector.scoring.detections import Detections


class Detector:
    """A bundle, loaded: labels, scores and paths of images in one forward pass."""

    def __init__(self, bundle: Bundle, name: str | None = None) -> None:
        """Load a verified bundle.

        Args:
            bundle: with a decoupled network and a detector.
            name: what callers know it by; None for the name of its folder.

        Raises:
            ArtifactError: the bundle lacks a stage, or a part cannot be used.
        """
        self._bundle = bundle
        self._explainer: Explainer | None = None
        self._explaining = threading.Lock()
        self._network = fold_normalisation(bundle.network())
        self._score = compile_score(bundle.classifier())
        self._calibration = bundle.calibration()
        info = bundle.detector_info()
        self._features = bundle.features(self._network.layers)
        self._device = best_device()
        self._network.to(self._device)
        self._corrector = Corrector(self._network, bundle.usual_paths()) if bundle.has_usual_paths else None
        self.name = name or bundle.folder.resolve().name
        self.model_version = bundle.model_digest[:12]
        self.threshold_version = bundle.threshold_digest[:12]
        self.spec: ImageSpec = bundle.manifest.network.spec
        self.class_names = bundle.manifest.network.classes
        self.layers: Mapping[str, int] = self._network.layers
        self.max_false_alarm_rate = info.max_false_alarm_rate
        self.calibration_images = len(self._calibration)

    @property
    def restores(self) -> bool:
        """Whether `restore` can be asked: the bundle holds statistics of paths."""
        return self._corrector is not None

    def restore(self, pixels: Pixels, probabilities: Floats) -> npt.NDArray[np.int64]:
        """The class that each image would have on a usual path (see `detector.interpretation.correction`), `(images,)`.

        Args:
            pixels: as for `detect`.
            probabilities: what `detect` said of these images, `(images, classes)`.

        Raises:
            ArtifactError: the bundle holds no statistics of paths.
        """
        if self._corrector is None:
            raise ArtifactError(f"expected statistics of paths in the bundle of {self.name}, got none")
        return self._corrector.restored(to_tensor(pixels, self._device), probabilities)

    def explainer(self) -> Explainer:
        """What explains single images, on a network of its own; made when it is asked for first.

        Raises:
            ArtifactError: the bundle holds no statistics of paths.
        """
        with self._explaining:
            if self._explainer is None:
                self._explainer = Explainer(self._bundle)
            return self._explainer

    def detect(self, pixels: Pixels) -> Detections:
        """Labels, scores and paths of `uint8` pixels `(images, height, width, channels)`.

        The answer for an image does not depend on the other images of the batch.

        Raises:
            ImageError: the pixels are not of the shape that the network takes.
        """
        expected = (self.spec.height, self.spec.width, self.spec.channels)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            raise ImageError(f"expected uint8 pixels of shape (images, {expected}), got {pixels.dtype} {pixels.shape}")
        evidence = encode(self._network, to_tensor(pixels, self._device))
        scores = self._score(self._features.of(evidence))
        labels = evidence.class_logits.argmax(axis=1)
        shifted = np.exp(evidence.class_logits - evidence.class_logits.max(axis=1, keepdims=True))
        return Detections(
            labels=labels,
            probabilities=shifted / shifted.sum(axis=1, keepdims=True),
            scores=scores,
            p_values=self._calibration.p_values(scores, labels),
            paths=evidence.path,
        )
