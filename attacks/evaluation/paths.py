"""Our own detector in the shape of the baselines, so that all are fitted and judged alike."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from detector.baselines.baseline import Observed, behind
from detector.network.decouple import GatedNet
from detector.paths.encoder import Floats, encode
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.compiled_score import Score, compile_score
from detector.scoring.fitting import fit_classifier
from detector.scoring.overshoot import overshot
from detector.scoring.sample import Sample

SEES = "path"


class PathDetector:
    """Features of the path and a classifier on them."""

    sees = SEES

    def __init__(
        self, network: GatedNet, features: str, classifier: str, classes: int, seed: int = 0, name: str = "paths",
        images: int | None = None, overshoot: bool = False,
        benign: Mapping[str, Sample] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """A detector to be fitted.

        Args:
            network: in evaluation mode.
            features: kinds of features joined by `+`, or `all`.
            classifier: name in `detector.scoring.classifiers.CLASSIFIERS`.
            classes: of the network.
            seed: of the classifier.
            name: what tables call it.
            images: it looks at no more than so many images of a kind; None for all.
            overshoot: whether it is fitted on attacks carried on as well.
            benign: kind -> images that it is to let pass as well.
        """
        self.name = name
        self.images = images
        self._network = network
        self._features = features
        self._classifier = classifier
        self._classes = classes
        self._seed = seed
        self._overshoot = overshoot
        self._benign = benign

    def observe(self, images: Tensor) -> Floats:
        """Class logits, gate logits and gate inputs."""
        return rows_of(encode(self._network, images))

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:
        """Learn what is usual, then fit the classifier."""
        shape = EvidenceShape(self._classes, self._network.layers, self._network.reads)
        features = features_named(self._features, shape).fit(clean.rows)

        def sample(seen: Observed) -> Sample:
            return Sample(shape.evidence(seen.rows), seen.ids)

        columns = {name: features.of_rows(part.rows) for name, part in attacked.items()}
        beyond: dict[str, Floats] = {}
        if self._overshoot:
            usual = sample(clean)
            beyond = {
                name: features.of(overshot(usual, sample(part), self._seed).evidence) for name, part in attacked.items()
            }
        passing = {name: features.of(kind.evidence) for name, kind in self._benign.items()}
        fitted = fit_classifier(self._classifier, features.of_rows(clean.rows), columns, self._seed, beyond, passing)
        return behind(features.of_rows, compile_score(FalseAlarmClassifier.around(fitted, 0.05)))
