"""What paths say: how many there are, how much each gate depends on its image, what a layer tells of the class."""

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from detector.paths.path_encoding import PathEncoding

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """One gated convolution over a set of images.

    Attributes:
        layer: its name.
        filters: how many it has.
        keep_ratio: mean share of open filters, in [0, 1].
        input_dependent: share of filters open for 1 % to 99 % of the images, in [0, 1].
        always_open: share of filters open for more than 99 %.
        always_closed: share of filters open for less than 1 %.
        information: lower bound of the information between the layer's mask and the class, in nats.
    """

    layer: str
    filters: int
    keep_ratio: float
    input_dependent: float
    always_open: float
    always_closed: float
    information: float


def distinct_paths(path: PathEncoding) -> int:
    """How many different paths the images took."""
    return len(np.unique(np.packbits(path.bits, axis=1), axis=0))


def layer_figures(
    fitted: PathEncoding, fitted_labels: Labels, judged: PathEncoding, labels: Labels
) -> list[LayerFigures]:
    """A row for each gated layer, in network order.

    Args:
        fitted: paths that the layers' probes are fitted on.
        fitted_labels: classes of those images, `int64`, `(images,)`.
        judged: paths of other images; all figures are of these.
        labels: their classes, `int64`, `(images,)`.
    """
    fitted_layers, rows = fitted.by_layer(), []
    for name, bits in judged.by_layer().items():
        share = bits.mean(axis=0)
        rows.append(
            LayerFigures(
                layer=name,
                filters=bits.shape[1],
                keep_ratio=float(share.mean()),
                input_dependent=float(((share >= 0.01) & (share <= 0.99)).mean()),
                always_open=float((share > 0.99).mean()),
                always_closed=float((share < 0.01).mean()),
                information=class_information(fitted_layers[name], fitted_labels, bits, labels),
            )
        )
    return rows


def class_information(
    fitted: npt.NDArray[np.bool_], fitted_labels: Labels, judged: npt.NDArray[np.bool_], labels: Labels
) -> float:
    """Lower bound of I(mask; class) in nats: H(class) less the cross-entropy of a probe on images it never saw.

    The probe is a logistic regression on the bits; a better one could only raise the bound (Barber and Agakov, "The
    IM algorithm", 2003). Below zero for a probe that is worse than none.

    Args:
        fitted: masks that the probe is fitted on, `(images, filters)`.
        fitted_labels: their classes, `int64`, `(images,)`; every class must occur.
        judged: masks that it is judged on, `(other images, filters)`.
        labels: their classes, all among those of `fitted_labels`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the bound holds for any probe, a finished one or not
        probe = LogisticRegression(max_iter=500).fit(fitted, fitted_labels)
    cross_entropy = log_loss(labels, probe.predict_proba(judged), labels=probe.classes_)
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum() - cross_entropy)


def flipped_bits(before: PathEncoding, after: PathEncoding) -> npt.NDArray[np.int64]:
    """How many bits of each image's path differ between two versions of it, `(images,)`."""
    flipped: npt.NDArray[np.int64] = np.count_nonzero(before.bits != after.bits, axis=1)
    return flipped
