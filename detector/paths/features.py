"""Evidence -> columns for a classifier: a scikit-learn transformer whose columns have names.

Its rows are class logits, gate logits and gate inputs of all layers side by side (`rows_of`), so that it can stand at
the head of any scikit-learn pipeline. What a column stands for is a value (`PathFeatures.columns`) and a name that can
be read back (`Column.of_name`): that is what a verdict is explained with.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from detector.errors import ArtifactError, RequestError
from detector.paths.columns import Column
from detector.paths.encoder import Evidence, Floats
from detector.paths.evidence_shape import EvidenceShape
from detector.paths.likelihoods import (
    Arrays,
    gate_likelihoods,
    learn_gate_gaussians,
    learn_open_shares,
    likelihood_columns,
    path_likelihoods,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of features.

    Attributes:
        columns_of: evidence, and what was learnt -> columns, `float32`, `(images, columns)`.
        columns: name of the kind, and the network's shape -> what each column stands for.
        learn: evidence of clean images -> arrays to keep; None where there is nothing to learn.
    """

    columns_of: Callable[[Evidence, Arrays], Floats]
    columns: Callable[[str, EvidenceShape], list[Column]]
    learn: Callable[[Evidence], Arrays] | None = None


def _of_filters(kind: str, shape: EvidenceShape) -> list[Column]:
    return [Column(kind, layer, place) for layer, width in shape.layers.items() for place in range(width)]


def _of_inputs(kind: str, shape: EvidenceShape) -> list[Column]:
    return [Column(kind, layer, place) for layer, width in shape.reads.items() for place in range(width)]


def _of_ranks(kind: str, shape: EvidenceShape) -> list[Column]:
    return [Column(kind, None, rank) for rank in range(1, shape.classes)]


def _of_layers(kind: str, shape: EvidenceShape) -> list[Column]:
    return likelihood_columns(kind, shape.layers)


def _bits(evidence: Evidence, _arrays: Arrays) -> Floats:
    return evidence.path.bits.astype(np.float32)


def _gates(evidence: Evidence, _arrays: Arrays) -> Floats:
    return evidence.gate_logits


def _inputs(evidence: Evidence, _arrays: Arrays) -> Floats:
    return evidence.inputs.means


def _margins(evidence: Evidence, _arrays: Arrays) -> Floats:
    ordered = np.sort(evidence.class_logits, axis=1)[:, ::-1]
    return np.ascontiguousarray(ordered[:, :1] - ordered[:, 1:])


def _of_doubts(kind: str, shape: EvidenceShape) -> list[Column]:
    return [*_of_ranks(kind, shape), Column(kind, None, None, "odds")]


def _doubts(evidence: Evidence, arrays: Arrays) -> Floats:
    behind = -_margins(evidence, arrays)
    # log((1 - p) / p) of the first class: exact also where its probability p rounds to 1
    odds = np.logaddexp.reduce(behind, axis=1, keepdims=True)
    return np.concatenate([np.exp(behind), odds], axis=1).astype(np.float32)


def _path_likelihoods(evidence: Evidence, arrays: Arrays) -> Floats:
    return path_likelihoods(evidence.class_logits, evidence.gate_logits, arrays, evidence.path.layers)


def _learn_open_shares(clean: Evidence) -> Arrays:
    return learn_open_shares(clean.class_logits, clean.gate_logits, clean.path.layers)


def _gate_likelihoods(evidence: Evidence, arrays: Arrays) -> Floats:
    return gate_likelihoods(evidence.class_logits, evidence.gate_logits, arrays, evidence.path.layers)


def _learn_gate_gaussians(clean: Evidence) -> Arrays:
    return learn_gate_gaussians(clean.class_logits, clean.gate_logits, clean.path.layers)


FEATURES: Mapping[str, Kind] = {
    # 1 for an open and 0 for a closed filter
    "bits": Kind(_bits, _of_filters),
    # how surely each filter is open (above zero) or closed
    "gates": Kind(_gates, _of_filters),
    # the mean of each channel that a gate reads
    "inputs": Kind(_inputs, _of_inputs),
    # by how much the first class leads the second, third, ... in logits
    "margins": Kind(_margins, _of_ranks),
    # how near each other class is to the first, in [0, 1], and the log-odds against the first: attacks that stop at the
    # boundary are near 1, others go past it, so that a linear classifier needs both these and the margins
    "doubts": Kind(_doubts, _of_doubts),
    # how usual the path bits, and the gate logits, are for the predicted class
    "path-likelihoods": Kind(_path_likelihoods, _of_layers, _learn_open_shares),
    "gate-likelihoods": Kind(_gate_likelihoods, _of_layers, _learn_gate_gaussians),
}
ALL = "all"


def kinds_named(text: str) -> tuple[str, ...]:
    """The kinds of features that `text` names: some of `FEATURES` joined by `+`, or `all`; in the table's order.

    Raises:
        RequestError: a name is unknown, or stands there twice.
    """
    if text == ALL:
        return tuple(FEATURES)
    names = text.split("+")
    for name in names:
        if name not in FEATURES or names.count(name) > 1:
            raise RequestError(f"expected features of {', '.join(FEATURES)}, joined by +, or {ALL}; got {text!r}")
    return tuple(name for name in FEATURES if name in names)


def name_of(kinds: Sequence[str]) -> str:
    """The shortest text that `kinds_named` reads as these kinds."""
    return ALL if set(kinds) == set(FEATURES) else "+".join(kinds)


def features_named(text: str, shape: EvidenceShape) -> "PathFeatures":
    """The features of that name, to be fitted.

    Args:
        text: kinds joined by `+`, or `all`.
        shape: of the network's evidence.

    Raises:
        RequestError: a name is unknown.
    """
    return PathFeatures(kinds_named(text), shape)


class PathFeatures(TransformerMixin, BaseEstimator):
    """Rows of `rows_of` -> columns of the chosen kinds, side by side."""

    def __init__(self, kinds: Sequence[str], shape: EvidenceShape) -> None:
        """A transformer for one network.

        Args:
            kinds: names in `FEATURES`.
            shape: of the network's evidence.
        """
        self.kinds = kinds
        self.shape = shape

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike | None = None) -> Self:
        """Learn what is usual from the clean images.

        Args:
            X: rows of `rows_of`.
            y: True for attacked images, which nothing is learnt from; None where all are clean, `(images,)`.

        Raises:
            ValueError: the rows are not as wide as the network's, or not finite.
        """
        rows = self._checked(X)
        clean = self.shape.evidence(rows if y is None else rows[~np.asarray(y, bool)])
        learnt: dict[str, Arrays] = {}
        for name in self.kinds:
            learn = FEATURES[name].learn
            if learn is not None:
                learnt[name] = learn(clean)
        self.learnt_ = learnt
        self.n_features_in_ = rows.shape[1]
        return self

    def transform(self, X: npt.ArrayLike) -> Floats:
        """The columns, `float32`, `(images, columns)`.

        Raises:
            ValueError: the rows are not as wide as the network's, or not finite.
        """
        return self.of_rows(self._checked(X))

    def of_rows(self, rows: Floats) -> Floats:
        """The columns of rows of `rows_of`: what `transform` gives, without its checks."""
        return self.of(self.shape.evidence(rows))

    def of(self, evidence: Evidence) -> Floats:
        """The columns of `evidence`, `float32`, `(images, columns)`."""
        check_is_fitted(self, "learnt_")
        parts = [FEATURES[name].columns_of(evidence, self.learnt_.get(name, {})) for name in self.kinds]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def columns(self) -> list[Column]:
        """What each column stands for."""
        return [column for name in self.kinds for column in FEATURES[name].columns(name, self.shape)]

    def get_feature_names_out(self, input_features: object = None) -> npt.NDArray[np.object_]:  # noqa: ARG002
        """The columns' names, `(columns,)`; `Column.of_name` reads one back."""
        return np.array([str(column) for column in self.columns()], dtype=object)

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """All that was learnt, as `KIND/NAME`; empty where the kinds learn nothing."""
        return {f"{kind}/{name}": values for kind, arrays in self.learnt_.items() for name, values in arrays.items()}

    def with_arrays(self, arrays: Mapping[str, npt.NDArray[np.float32]]) -> Self:
        """Take over what another one learnt: the inverse of `arrays`.

        Raises:
            ArtifactError: something is missing, or of another network.
        """
        self.learnt_ = {
            kind: {name.partition("/")[2]: values for name, values in arrays.items() if name.startswith(f"{kind}/")}
            for kind in self.kinds
            if FEATURES[kind].learn is not None
        }
        self.n_features_in_ = self.shape.columns
        try:
            self.of_rows(np.zeros((1, self.n_features_in_), np.float32))
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"expected what {' and '.join(self.learnt_)} learnt of a network with {self.shape.classes} "
                f"classes and {sum(self.shape.layers.values())} gates, got other arrays ({error})"
            ) from None
        return self

    def _checked(self, X: npt.ArrayLike) -> Floats:
        rows: Floats = check_array(X, dtype=np.float32)
        if rows.shape[1] != self.shape.columns:
            widths = (self.shape.classes, sum(self.shape.layers.values()), sum(self.shape.reads.values()))
            raise ValueError(
                f"expected rows of {widths[0]} class logits, {widths[1]} gate logits and {widths[2]} gate inputs, got "
                f"{rows.shape[1]} columns"
            )
        return rows


def learns(kinds: Iterable[str]) -> bool:
    """Whether any of the kinds has something to learn and to keep."""
    return any(FEATURES[kind].learn is not None for kind in kinds)
