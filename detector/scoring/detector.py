"""Images in, verdicts out: all that serving sees of the detector."""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from detector.batches import best_device, to_tensor
from detector.bundle import Bundle
from detector.engines.choice import FASTEST, SCORE_TOLERANCE, Choice, choose_engine, score_error, smooth_images
from detector.engines.engine import Answers
from detector.engines.kernel_score import KernelScore
from detector.errors import ArtifactError, EngineError, ImageError
from detector.images import ImageSpec, Pixels
from detector.interpretation.correction import Corrector
from detector.interpretation.explanation import Explainer
from detector.network.folding import fold_normalisation
from detector.paths.encoder import Evidence, Floats
from detector.scoring.compiled_score import FoldedScore, compile_score, folded_score
from detector.scoring.detections import Detections
from detector.scoring.thresholds import Calibration, Scores

_log = logging.getLogger(__name__)

# Made-up images on which the compiled score is held against the classifier.
_HELD_AGAINST = 4


class Detector:
    """A bundle, loaded: labels, scores and paths of images in one forward pass."""

    def __init__(self, bundle: Bundle, name: str | None = None, engine: str = FASTEST) -> None:
        """Load a verified bundle.

        Args:
            bundle: with a decoupled network and a detector.
            name: what callers know it by; None for the name of its folder.
            engine: what runs it, of `detector.engines.choice.ENGINES`; the fastest is found by measuring.

        Raises:
            ArtifactError: the bundle lacks a stage, or a part cannot be used.
            RequestError: there is no such engine. One that is not installed, or cannot run this network, is replaced.
        """
        self._bundle = bundle
        self._explainer: Explainer | None = None
        self._explaining = threading.Lock()
        network, classifier = bundle.network(), bundle.classifier()
        self._score = compile_score(classifier)
        self._calibration = bundle.calibration()
        info = bundle.detector_info()
        self._features = bundle.features(network)
        self._device = best_device()
        self._corrector: Corrector | None = None
        if bundle.has_usual_paths:
            correcting = fold_normalisation(bundle.network()).to(self._device)
            self._corrector = Corrector(correcting, bundle.usual_paths())
        self.name = name or bundle.folder.resolve().name
        self.model_version = bundle.model_digest[:12]
        self.threshold_version = bundle.threshold_digest[:12]
        self.spec: ImageSpec = bundle.manifest.network.spec
        self.class_names = bundle.manifest.network.classes
        self.layers: Mapping[str, int] = network.layers
        self.max_false_alarm_rate = info.max_false_alarm_rate
        self.calibration_images = len(self._calibration)
        folded = folded_score(classifier, self._features)
        self.choice: Choice = choose_engine(network, self.spec, folded, best_device(), engine, bundle.never_open())
        self._kernel_score = None if folded is None else self._compiled(folded)

    @property
    def engine(self) -> str:
        """What runs it, by name."""
        return self.choice.name

    @property
    def brief(self) -> bool:
        """Whether one image takes compiled code of a fixed number of steps, and nothing else."""
        return self.choice.for_images(1).name == "kernel"

    @property
    def answered_in_full(self) -> int:
        """As `Choice.answered_in_full`."""
        return self.choice.answered_in_full

    @property
    def restores(self) -> bool:
        """Whether `restore` can be asked: the bundle holds statistics of paths."""
        return self._corrector is not None

    def restore(self, pixels: Pixels, probabilities: Floats, p_values: Scores) -> npt.NDArray[np.int64]:
        """The class that each image would have on a usual path (see `detector.interpretation.correction`), `(images,)`.

        Args:
            pixels: as for `detect`.
            probabilities: what `detect` said of these images, `(images, classes)`.
            p_values: likewise, `(images,)`.

        Raises:
            ArtifactError: the bundle holds no statistics of paths.
        """
        if self._corrector is None:
            raise ArtifactError(f"expected statistics of paths in the bundle of {self.name}, got none")
        return self._corrector.restored(to_tensor(pixels, self._device), probabilities, p_values)

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

        Up to rounding, the answer for an image does not depend on the other images of the batch.

        Raises:
            ImageError: the pixels are not of the shape that the network takes.
        """
        expected = (self.spec.height, self.spec.width, self.spec.channels)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            raise ImageError(f"expected uint8 pixels of shape (images, {expected}), got {pixels.dtype} {pixels.shape}")
        return detections_of(self.choice.answer(pixels), self._score_of, self._calibration)

    def _compiled(self, folded: FoldedScore) -> KernelScore | None:
        """The compiled score for engines that give none, where it is built and says what the classifier says."""
        with suppress(EngineError):  # NumPy does it too
            compiled = KernelScore(folded)
            evidence = self.choice.answer(smooth_images(self.spec, _HELD_AGAINST)).evidence
            self.choice.uncounted()
            error = score_error(compiled(evidence), self._score(self._features.of(evidence)))
            if error <= SCORE_TOLERANCE:
                return compiled
            _log.warning("expected the scores of the classifier from the compiled one, got others by %.2g", error)
        return None

    def _score_of(self, evidence: Evidence) -> Scores:
        if self._kernel_score is not None:
            return self._kernel_score(evidence)
        return self._score(self._features.of(evidence))


def detections_of(answers: Answers, score: Callable[[Evidence], Scores], calibration: Calibration) -> Detections:
    """What an engine's answers mean.

    Args:
        answers: of an engine.
        score: for an engine that gave no scores.
        calibration: scores of clean images.
    """
    evidence = answers.evidence
    scores = score(evidence) if answers.scores is None else answers.scores
    labels = evidence.class_logits.argmax(axis=1)
    shifted = np.exp(evidence.class_logits - evidence.class_logits.max(axis=1, keepdims=True))
    return Detections(
        labels=labels,
        probabilities=shifted / shifted.sum(axis=1, keepdims=True),
        scores=scores,
        p_values=calibration.p_values(scores, labels),
        paths=evidence.path,
    )
