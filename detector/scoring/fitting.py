"""Evidence of clean and of attacked images -> a fitted and calibrated detector."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from sklearn.pipeline import Pipeline

from detector.errors import DataError
from detector.paths.encoder import Evidence, Floats
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import PathFeatures, features_named
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.classifiers import STEP, TOLD_EACH_ATTACK, classifier_named
from detector.scoring.compiled_score import Score, compile_score
from detector.scoring.dropout_network import DropoutNetwork
from detector.scoring.thresholds import Calibration, Scores

# Attacked images of all attacks together, and as many carried on: beyond that a fit takes longer and gets no better.
POSITIVES = 16_000
CLASSIFIER = "logistic-0.01"
# Of the weight of each attack, what goes to its images carried on (`detector.scoring.overshoot`) where there are any.
OVERSHOT_SHARE = 0.2
# Of the weight of the clean images, what goes to other benign ones where there are any.
BENIGN_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class FittedDetector:
    """A classifier and the scores of clean images that it has not seen.

    Attributes:
        features: what it reads, fitted.
        classifier: the scikit-learn classifier, calibrated.
        score: the same, compiled.
        calibration: scores of the calibration images.
    """

    features: PathFeatures
    classifier: FalseAlarmClassifier
    score: Score
    calibration: Calibration

    def scores(self, parts: Iterable[Evidence]) -> Scores:
        """How suspicious each image of `parts` is, `(images,)`; parts are read one by one."""
        return np.concatenate([np.empty(0), *(self.score(self.features.of(part)) for part in parts)])


def fit_detector(
    features: str,
    clean: Evidence,
    attacked: Mapping[str, Evidence],
    calibration: Iterable[Evidence],
    rate: float = 0.05,
    seed: int = 0,
    classifier: str = CLASSIFIER,
    per_class: bool = False,
    overshot: Mapping[str, Evidence] = MappingProxyType({}),
    benign: Mapping[str, Evidence] = MappingProxyType({}),
) -> FittedDetector:
    """Fit on clean images against successful attacks, calibrate on clean images of other sources.

    Args:
        features: kinds of features, of `detector.paths.features.FEATURES`, joined by `+`, or `all`.
        clean: evidence of the clean images of the fitting split.
        attacked: recipe -> evidence of its successful attacks on the fitting split.
        calibration: evidence of the clean images of the calibration split, in parts.
        rate: share of false alarms allowed, in (0, 1).
        seed: of the classifier, and of which attacked images are left out where there are very many.
        classifier: its name, in `detector.scoring.classifiers.CLASSIFIERS`.
        per_class: whether the rate is to hold for each predicted class by itself.
        overshot: recipe -> its images carried on (`detector.scoring.overshoot`), to be fitted on too.
        benign: kind -> images of the fitting split that are neither attacked nor clean, to be let pass too.

    Raises:
        DataError: no attack succeeded.
        RequestError: features or classifier are unknown, or there are too few calibration images for the rate.
    """
    fitted = features_named(features, EvidenceShape.of(clean)).fit(rows_of(clean))
    pipeline = fit_classifier(
        classifier,
        fitted.of(clean),
        {name: fitted.of(part) for name, part in attacked.items()},
        seed,
        {name: fitted.of(part) for name, part in overshot.items()},
        {name: fitted.of(part) for name, part in benign.items()},
    )
    score = compile_score(FalseAlarmClassifier.around(pipeline, rate))
    scores, labels = [], []
    for part in calibration:
        scores.append(score(fitted.of(part)))
        labels.append(part.class_logits.argmax(axis=1))
    calibrated_on = Calibration(np.concatenate(scores), np.concatenate(labels) if per_class else None)
    return FittedDetector(fitted, FalseAlarmClassifier.of_fitted(pipeline, calibrated_on, rate), score, calibrated_on)


def fit_classifier(
    name: str,
    clean: Floats,
    attacked: Mapping[str, Floats],
    seed: int = 0,
    overshot: Mapping[str, Floats] = MappingProxyType({}),
    benign: Mapping[str, Floats] = MappingProxyType({}),
) -> Pipeline:
    """The classifier of that name, fitted; benign and attacked images weigh alike, and so does each attack.

    Its classes are False and True, or, where it is told each attack, 0 for clean images, positive numbers for attacks
    and negative ones for other benign kinds.

    Args:
        name: in `detector.scoring.classifiers.CLASSIFIERS`.
        clean: columns of clean images, `(images, columns)`.
        attacked: attack -> columns of its images; of very many attacked images, a random choice is used.
        seed: of the classifier and of that choice.
        overshot: attack of `attacked` -> columns of its images carried on, which take `OVERSHOT_SHARE` of its weight.
        benign: kind -> columns of images that are neither attacked nor clean, which take `BENIGN_SHARE` of the weight
            of the clean ones.

    Raises:
        DataError: there are no attacked images.
        RequestError: the classifier is unknown.
    """
    attacks = [attack for attack, part in attacked.items() if len(part)]
    if not attacks:
        raise DataError("expected at least one attack that fooled the network, got none to fit on")
    parts, shares, kinds = [], [], []
    for kind, attack in enumerate(attacks, start=1):
        parts.append(attacked[attack])
        shares.append(1.0)
        kinds.append(kind)
        if len(beyond := overshot.get(attack, attacked[attack][:0])):
            parts.append(beyond)
            shares[-1:] = [1 - OVERSHOT_SHARE, OVERSHOT_SHARE]
            kinds.append(len(attacks) + 1)  # all that is carried on is one kind
    chooser, most = np.random.default_rng(seed), POSITIVES // len(attacks)
    parts = [part if len(part) <= most else part[np.sort(chooser.permutation(len(part))[:most])] for part in parts]
    passing = [clean, *(part for part in benign.values() if len(part))]
    rows = np.concatenate([*passing, *parts])
    labels = np.repeat([*range(0, -len(passing), -1), *kinds], [len(part) for part in (*passing, *parts)])
    if name not in TOLD_EACH_ATTACK:
        labels = labels > 0
    made = classifier_named(name, seed)
    others = len(passing) - 1
    of_passing = [1 - BENIGN_SHARE, *[BENIGN_SHARE / others] * others] if others else [1.0]
    weights = np.concatenate([_weights(passing, of_passing), _weights(parts, shares)])
    weights /= weights.mean()
    made.fit(rows, labels, **{f"{STEP}__sample_weight": weights})
    if isinstance(made[STEP], DropoutNetwork):  # what is saved is scikit-learn's own
        made.steps[-1] = (STEP, made[STEP].network_)
    return made


def _weights(parts: Sequence[Floats], shares: Sequence[float]) -> npt.NDArray[np.float64]:
    """A weight for each row of `parts`, which have `shares` of the sum of 1, whatever the sum of `shares`."""
    return np.concatenate([
        np.full(len(part), share / (sum(shares) * len(part))) for part, share in zip(parts, shares, strict=True)
    ])  # fmt: skip
