"""A baseline's score in torch: the same arithmetic judges rows of NumPy, and has a gradient for who attacks it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detector.baselines.baseline import Observed, classifier_on
from detector.paths.encoder import Floats
from detector.scoring.sums import TorchSums, weighted_sums
from detector.scoring.thresholds import Scores


@dataclass(frozen=True, slots=True)
class Trace:
    """One look at some images, with a gradient where they want one.

    Attributes:
        logits: of the classes, `(images, classes)`.
        gates: gate logits of all gates side by side, `(images, total channels)`.
        rows: what the baseline's `observe` gives, `(images, columns)`.
    """

    logits: Tensor
    gates: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TorchScore:
    """A `Score` written in torch.

    Attributes:
        of: rows `(images, columns)` -> scores `(images,)`, `float64`.
        trace: images in [0, 1], `(batch, channels, height, width)` -> what is seen of them.
    """

    of: Callable[[Tensor], Tensor]
    trace: Callable[[Tensor], Trace]

    def __call__(self, rows: Floats) -> Scores:
        """Rows -> how suspicious each image is, `(images,)`."""
        with torch.no_grad():
            scores: Scores = self.of(torch.from_numpy(rows)).numpy()
        return scores


def regression_on(
    columns: Callable[[Tensor], Tensor], trace: Callable[[Tensor], Trace], clean: Observed,
    attacked: Mapping[str, Observed],
) -> TorchScore:  # fmt: skip
    """The score of a logistic regression on the columns that are made of rows, as `fitted_on`, in torch.

    Args:
        columns: rows -> `(images, columns)`.
        trace: images -> rows.
        clean: clean images.
        attacked: attack -> its images.

    Raises:
        DataError: there are no attacked images.
    """

    def for_fitting(rows: Floats) -> Floats:
        with torch.no_grad():
            made: Floats = columns(torch.from_numpy(rows)).float().numpy()
        return made

    found = weighted_sums(classifier_on(for_fitting, clean, attacked))
    assert found is not None
    sums = TorchSums(found)
    return TorchScore(lambda rows: sums.to(rows.device)(columns(rows)), trace)


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """Squared L2 distance of each of `points`, `(points, columns)`, to each of `others`: `(points, others)`."""
    return (points**2).sum(dim=1, keepdim=True) - 2 * points @ others.T + (others**2).sum(dim=1)
