"""Trees of scikit-learn's ensembles as flat arrays that all images walk at once.

A forest of 200 trees asked for one image spends its time on 200 calls, not on their comparisons. Here one step of all
walks, of every image in every tree, is one comparison of two arrays, and there are as many steps as the deepest tree
has levels. The comparisons are the ones that scikit-learn makes, number for number, so that each walk ends in the same
leaf. It needs no converter to another format and no further runtime.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.ensemble import (
    AdaBoostClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)

Numbers = npt.NDArray[Any]


class CompiledTrees:
    """Trees side by side; a leaf leads to itself, so that every walk may be as long as the longest."""

    def __init__(self, trees: Sequence[tuple[Numbers, Numbers, Numbers, Numbers, Numbers]]) -> None:
        """Lay trees side by side.

        Args:
            trees: of each its left and right children (own place at a leaf), columns, thresholds and values, each
                `(nodes,)`.
        """
        starts = np.cumsum([0, *(len(tree[0]) for tree in trees)])
        self._roots = starts[:-1]
        pairs = [
            np.stack([left + start, right + start], axis=1)
            for (left, right, *_), start in zip(trees, starts, strict=False)
        ]
        self._children = np.concatenate(pairs).astype(np.intp).ravel()  # left, right, left, right, ...
        self._columns = np.concatenate([tree[2] for tree in trees]).astype(np.intp)
        self._thresholds = np.concatenate([tree[3] for tree in trees]).astype(np.float64)
        self._values = np.concatenate([tree[4] for tree in trees]).astype(np.float64)
        self._depth = max(_depth(tree[0], tree[1]) for tree in trees)

    def sums(self, rows: Numbers) -> npt.NDArray[np.float64]:
        """Rows `(images, columns)` -> the sum of the values of the leaves that each one reaches, `(images,)`."""
        found = np.empty(len(rows))
        for start in range(0, len(rows), 256):
            found[start : start + 256] = self._walk(rows[start : start + 256])
        return found

    def _walk(self, rows: Numbers) -> Numbers:
        flat = np.ascontiguousarray(rows).ravel()
        offsets = (np.arange(len(rows)) * rows.shape[1])[:, None]
        nodes = np.broadcast_to(self._roots, (len(rows), len(self._roots)))
        for _ in range(self._depth):
            right = flat[self._columns[nodes] + offsets] > self._thresholds[nodes]
            nodes = self._children[2 * nodes + right]
        return np.asarray(self._values[nodes].sum(axis=1))


def compile_trees(model: BaseEstimator) -> Callable[[Numbers], npt.NDArray[np.float64]] | None:
    """A fitted binary ensemble of trees -> rows `(images, columns)` -> its `decision_function`, `(images,)`.

    Of a random forest, which has none, the share of its trees' votes for the second class. None for any other model.
    """
    match model:
        case RandomForestClassifier():
            trees = CompiledTrees([_of_tree(tree.tree_, _shares(tree.tree_)) for tree in model.estimators_])
            count = len(model.estimators_)
            return lambda rows: trees.sums(rows.astype(np.float32, copy=False)) / count
        case AdaBoostClassifier():
            weights = np.asarray(model.estimator_weights_[: len(model.estimators_)], np.float64)
            weights = 2 * weights / weights.sum()
            voting = CompiledTrees([
                _of_tree(tree.tree_, np.where(_shares(tree.tree_) > 0.5, weight, -weight))
                for tree, weight in zip(model.estimators_, weights, strict=True)
            ])  # fmt: skip
            return lambda rows: voting.sums(rows.astype(np.float32, copy=False))
        case GradientBoostingClassifier() if model.init is None:
            share = float(model.init_.class_prior_[1])
            start, rate = np.log(share) - np.log1p(-share), model.learning_rate
            grown = CompiledTrees([
                _of_tree(tree.tree_, rate * tree.tree_.value[:, 0, 0]) for tree in model.estimators_[:, 0]
            ])  # fmt: skip
            return lambda rows: grown.sums(rows.astype(np.float32, copy=False)) + start
        case HistGradientBoostingClassifier():
            offset = float(np.ravel(model._baseline_prediction)[0])
            grown = CompiledTrees([_of_nodes(stage[0].nodes) for stage in model._predictors])
            return lambda rows: grown.sums(rows) + offset
        case _:
            return None


def _of_tree(tree: Any, values: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers, Numbers]:
    return _walkable(tree.children_left == -1, tree.children_left, tree.children_right, tree.feature, tree.threshold,
                     values)  # fmt: skip


def _of_nodes(nodes: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers, Numbers]:
    return _walkable(
        nodes["is_leaf"] == 1, nodes["left"], nodes["right"], nodes["feature_idx"], nodes["num_threshold"],
        nodes["value"],
    )  # fmt: skip


def _walkable(
    leaf: Numbers, left: Numbers, right: Numbers, columns: Numbers, thresholds: Numbers, values: Numbers
) -> tuple[Numbers, Numbers, Numbers, Numbers, Numbers]:
    own = np.arange(len(leaf))
    return (
        np.where(leaf, own, left.astype(np.int64)),
        np.where(leaf, own, right.astype(np.int64)),
        np.where(leaf, 0, columns.astype(np.int64)),
        thresholds,
        values,
    )


def _shares(tree: Any) -> Numbers:
    """Of each node, the share of the second class."""
    of_class = tree.value[:, 0, :]
    return np.asarray(of_class[:, 1] / of_class.sum(axis=1))


def _depth(left: Numbers, right: Numbers) -> int:
    """Steps from the root to the farthest leaf; children stand behind their parent."""
    own = np.arange(len(left))
    levels = np.zeros(len(left), int)
    for place in own[left != own]:
        levels[left[place]] = levels[right[place]] = levels[place] + 1
    return int(levels.max())
