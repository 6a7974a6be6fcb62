"""Fitted scikit-learn estimators as bytes and back, by skops: nothing is unpickled, and no code of ours is named.

skops loads the types of scikit-learn and NumPy that it knows to be harmless. Three more are trusted here, because
forests, and networks that scikit-learn itself fitted, need them:

* `Tree` and `TreePredictor`, in which a tree's nodes lie as flat arrays that compiled code follows without looking at
  bounds. So every tree is looked through after loading: a node's children come after it and exist, and it reads a
  column that exists. No walk then leaves the arrays or runs in a circle.
* `AdamOptimizer`, a plain object with numbers and lists, which scoring never touches.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import skops.io
from sklearn.base import BaseEstimator
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
from sklearn.tree._tree import Tree

from detector.errors import ArtifactError

TRUSTED_TYPES = (
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.tree._tree.Tree",
)


def save_estimator(estimator: BaseEstimator) -> bytes:
    """A fitted estimator as bytes.

    Raises:
        ArtifactError: it holds types that could not be loaded again.
    """
    content: bytes = skops.io.dumps(estimator)
    unknown = _untrusted(content)
    if unknown:
        raise ArtifactError(f"expected a classifier of trusted scikit-learn types, got {', '.join(unknown)}")
    return content


def load_estimator(content: bytes) -> BaseEstimator:
    """The estimator that `save_estimator` saved.

    Raises:
        ArtifactError: it holds types that are not trusted, or a tree whose nodes lead nowhere.
    """
    unknown = _untrusted(content)
    if unknown:
        raise ArtifactError(f"expected trusted scikit-learn types in the classifier, got {', '.join(unknown)}")
    estimator: BaseEstimator = skops.io.loads(content, trusted=list(TRUSTED_TYPES))
    for tree, columns in _trees(estimator, 0):
        _check_tree(tree, columns)
    return estimator


def _untrusted(content: bytes) -> list[str]:
    return sorted(set(skops.io.get_untrusted_types(data=content)) - set(TRUSTED_TYPES))


def _trees(value: Any, columns: int) -> Iterator[tuple[Any, int]]:
    """All trees inside an estimator, and how many columns the estimator around each of them reads."""
    match value:
        case Tree() | TreePredictor():
            yield value, columns
        case BaseEstimator():
            for part in vars(value).values():
                yield from _trees(part, getattr(value, "n_features_in_", columns))
        case dict():
            for part in value.values():
                yield from _trees(part, columns)
        case list() | tuple():
            for part in value:
                yield from _trees(part, columns)
        case np.ndarray() if value.dtype == object:
            for part in value.flat:
                yield from _trees(part, columns)


def _check_tree(tree: Any, columns: int) -> None:
    if isinstance(tree, TreePredictor):
        nodes = tree.nodes
        inner = nodes["is_leaf"] == 0
        left, right, read = nodes["left"].astype(np.int64), nodes["right"].astype(np.int64), nodes["feature_idx"]
        sound = not nodes["is_categorical"].any()  # those look up bit sets; no column here is categorical
    else:
        left, right, read = tree.children_left, tree.children_right, tree.feature
        inner = left != -1  # at leaves compiled code looks at the left child alone
        sound = tree.n_features == columns
    own, count = np.arange(len(left))[inner], len(left)
    for children in (left[inner], right[inner]):
        sound = sound and bool(((children > own) & (children < count)).all())
    sound = sound and count > 0 and bool(((read[inner] >= 0) & (read[inner] < columns)).all())
    if not sound:
        raise ArtifactError(
            f"expected trees of {columns} columns whose nodes lead on to later nodes, got a damaged classifier"
        )
