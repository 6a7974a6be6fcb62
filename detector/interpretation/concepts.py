"""Combinations of filters that stand for something: which open together, and what the images share that have them so.

Non-negative matrix factorisation (scikit-learn; Lee and Seung, "Learning the parts of objects by non-negative matrix
factorization", 1999) cuts the paths of one class's images into parts: groups of filters that open together. Each open
bit is weighted by how much oftener its filter is open for the class than for any other, so that filters that are open
for everything form no part. The heaviest filters of a part, as many as enough images of the class have open together,
are a combination. What it is worth is judged on other images.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning

from detector.interpretation.census import Census, Doubles
from detector.paths.path_encoding import Bits, PathEncoding

Labels = npt.NDArray[np.int64]
# Weighted open bits of one class's images `(images, filters)`, how many parts, and a seed -> how much each filter
# belongs to each part, `(parts, filters)`, 0 where it does not.
Cut = Callable[[Doubles, int, int], Doubles]

# Of a class's images, at least this share must have a combination open for it to count.
LEAST_SHARE = 0.2
FEWEST, MOST = 3, 24
PARTS_OF_EACH_CLASS = 3
RANDOM_COMBINATIONS = 200


@dataclass(frozen=True, slots=True)
class Combination:
    """Filters that are open together.

    Attributes:
        filters: their places in the path, ascending.
        label: the class that it was found for.
    """

    filters: tuple[int, ...]
    label: int

    def shared_by(self, bits: Bits) -> npt.NDArray[np.bool_]:
        """Which images have all of them open, `(images,)`."""
        return np.asarray(bits[:, list(self.filters)].all(axis=1))


@dataclass(frozen=True, slots=True)
class Purity:
    """How much a combination says of its class, on images that it was not found on.

    Attributes:
        combination: which.
        images: how many images share it.
        share: of the images of its class, how many share it, in [0, 1].
        purity: of the images that share it, how many are of its class, in [0, 1]; NaN where none share it.
        single: the same of the best of its filters alone.
        random: the same of random combinations of as many filters that vary with the image, their mean.
    """

    combination: Combination
    images: int
    share: float
    purity: float
    single: float
    random: float


def nmf_parts(weighted: Doubles, parts: int, seed: int) -> Doubles:
    """Parts by non-negative matrix factorisation: a `Cut`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is found is judged on other images anyway
        model = NMF(parts, init="nndsvda", random_state=seed, max_iter=100).fit(weighted)
    return np.asarray(model.components_)


def find_combinations(
    path: PathEncoding,
    labels: Labels,
    classes: int,
    parts: int = PARTS_OF_EACH_CLASS,
    seed: int = 0,
    cut: Cut = nmf_parts,
) -> list[Combination]:
    """Combinations of each class, on images that are not used to judge them.

    Args:
        path: paths of the images.
        labels: their classes, `int64`, `(images,)`.
        classes: how many there are.
        parts: groups of filters looked for in each class.
        seed: of the cut's first guess.
        cut: what groups the filters of a class; `benchmarks/concepts.py` compares others.
    """
    census = Census(path.layers, classes)
    census.add(path, labels)
    weights = class_weights(census)
    found: list[Combination] = []
    for label in range(classes):
        bits = path.bits[labels == label]
        if len(bits) <= parts:
            continue
        for loadings in cut(bits * weights[label], parts, seed):
            filters = _longest(bits, np.argsort(-loadings * weights[label], kind="stable"), loadings > 0)
            if filters and all(filters != other.filters for other in found):
                found.append(Combination(filters, label))
    return found


def class_weights(census: Census) -> Doubles:
    """How much oftener each filter is open for a class than for any other; 0 where it is not.

    In [0, 1], `(classes, filters)`. Against the mean of the others instead, combinations are purer, but hold filters
    that kindred classes need too: closing them then costs those as well.
    """
    rates = census.class_rates()
    ordered = np.sort(rates, axis=0)
    highest_other = np.where(rates == ordered[-1], ordered[-2], ordered[-1])
    return np.asarray(np.maximum(rates - highest_other, 0.0))


def _longest(bits: Bits, order: npt.NDArray[np.intp], allowed: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """The first filters of `order` that enough images have open together; a filter that leaves too few is passed by."""
    shared, chosen = np.ones(len(bits), np.bool_), list[int]()
    for place in order:
        if not allowed[place] or len(chosen) == MOST:
            break
        both = shared & bits[:, place]
        if both.mean() >= LEAST_SHARE:
            shared = both
            chosen.append(int(place))
    return tuple(sorted(chosen)) if len(chosen) >= FEWEST else ()


def judge_combinations(
    combinations: Sequence[Combination], path: PathEncoding, labels: Labels, seed: int = 0
) -> Iterator[Purity]:
    """Each combination beside its own filters and beside random ones, on images that it was not found on.

    Args:
        combinations: what to judge.
        path: paths of the images.
        labels: their classes, `int64`, `(images,)`.
        seed: of the random combinations.
    """
    draws = np.random.default_rng(seed)
    rates = path.bits.mean(axis=0)
    varying = np.flatnonzero((rates > 0.01) & (rates < 0.99))
    for combination in combinations:
        of_class = labels == combination.label
        shared = combination.shared_by(path.bits)
        random: list[float] = []
        for _ in range(RANDOM_COMBINATIONS):
            size = min(len(combination.filters), len(varying))
            filters = draws.choice(varying, size, replace=False)
            random.append(_purity(np.asarray(path.bits[:, filters].all(axis=1)), of_class))
        kept = [purity for purity in random if purity == purity]
        yield Purity(
            combination,
            int(shared.sum()),
            float(shared[of_class].mean()) if of_class.any() else 0.0,
            _purity(shared, of_class),
            max(_purity(path.bits[:, place], of_class) for place in combination.filters),
            float(np.mean(kept)) if kept else float("nan"),
        )


def _purity(shared: npt.NDArray[np.bool_], of_class: npt.NDArray[np.bool_]) -> float:
    return float(of_class[shared].mean()) if shared.any() else float("nan")
