"""What other authors' detectors have in common: they look at images through the network, fit, and score.

Each is our own writing from its paper, on the decoupled network that the paths are read from, so that a table compares
detectors and not networks. What is seen of an image never depends on its batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from detector.paths.encoder import Floats
from detector.scoring.compiled_score import Score, compile_score

Ids = npt.NDArray[np.int64]


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


def together(attacked: Mapping[str, Observed]) -> Observed:
    """The images of all attacks, one below the other."""
    return Observed(
        np.concatenate([part.rows for part in attacked.values()]),
        np.concatenate([part.ids for part in attacked.values()]),
    )


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
        """


def regression(clean: Floats, attacked: Floats) -> Score:
    """A logistic regression on standardised columns: what LID and Mahalanobis weigh their layers with.

    Args:
        clean: columns of clean images, `(images, columns)`.
        attacked: columns of attacked images.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced"))
    rows = np.concatenate([clean, attacked])
    return compile_score(model.fit(rows, np.arange(len(rows)) >= len(clean)))


def behind(columns: Callable[[Floats], Floats], score: Score) -> Score:
    """The score of the columns that are made of rows."""
    return lambda rows: score(columns(rows))
