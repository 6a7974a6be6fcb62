"""What other authors' detectors have in common: they look at images through the network, fit, and score.

Each is our own writing from its paper, on the decoupled network that the paths are read from, so that a table compares
detectors and not networks. What is seen of an image never depends on its batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from torch import Tensor

from detector.paths.encoder import Floats
from detector.scoring.compiled_score import Score, compile_score
from detector.scoring.fitting import fit_classifier

Ids = npt.NDArray[np.int64]
REGRESSION = "logistic-0.01"


@dataclass(frozen=True, slots=True)
class Observed:
    """What a baseline saw of some images.

    Attributes:
        rows: `float32`, `(images, columns)`.
        ids: index of each image in its source, `int64`, `(images,)`.
    """

    rows: Floats
    ids: Ids

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, chosen: npt.NDArray[np.bool_] | slice) -> "Observed":
        """The images at these places."""
        return Observed(self.rows[chosen], self.ids[chosen])


class Baseline(Protocol):
    """One detector of the field."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def images(self) -> int | None:
        """It looks at no more than so many images of a kind, because each takes long; None for all."""

    def observe(self, images: Tensor) -> Floats:
        """Images in [0, 1], `(batch, channels, height, width)` -> rows, `(batch, columns)`."""

    @property
    def sees(self) -> str:
        """What `observe` looks at; baselines that see the same share the rows."""

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:
        """Fit on clean images and on those of each attack, all of the fitting split.

        Returns:
            Rows -> how suspicious each image is, `(images,)`; larger is more so.

        Raises:
            DataError: it is fitted on attacked images, and there are none.
        """


def fitted_on(
    columns: Callable[[Floats], Floats], clean: Observed, attacked: Mapping[str, Observed],
    classifier: str = REGRESSION, seed: int = 0,
) -> Score:  # fmt: skip
    """The score of a classifier on the columns that are made of rows, in which each attack weighs alike, as in ours.

    Args:
        columns: rows -> `(images, columns)`.
        clean: clean images.
        attacked: attack -> its images.
        classifier: name in `detector.scoring.classifiers.CLASSIFIERS`; what LID and Mahalanobis weigh their layers with
            is a logistic regression.
        seed: of the classifier.

    Raises:
        DataError: there are no attacked images.
    """
    return behind(columns, compile_score(classifier_on(columns, clean, attacked, classifier, seed)))


def classifier_on(
    columns: Callable[[Floats], Floats], clean: Observed, attacked: Mapping[str, Observed],
    classifier: str = REGRESSION, seed: int = 0,
) -> BaseEstimator:  # fmt: skip
    """The fitted classifier of `fitted_on`."""
    parts = {name: columns(part.rows) for name, part in attacked.items() if len(part)}
    return fit_classifier(classifier, columns(clean.rows), parts, seed)


def behind(columns: Callable[[Floats], Floats], score: Score) -> Score:
    """The score of the columns that are made of rows."""
    return lambda rows: score(columns(rows))
