"""How values spread, kept in constant memory: what a report needs of norms of any number of images."""

import numpy as np
import numpy.typing as npt

# 1,024 bins for each doubling, from a fifth of a grey level to more than the pixels of any image: 0.07 % wide.
_PER_DOUBLING = 1024
_SMALLEST, _LARGEST = 2.0**-10, 2.0**24
_BINS = _PER_DOUBLING * 34 + 3  # and one each for zero, for what is smaller, and for what is larger

Values = npt.NDArray[np.float64]


class Spread:
    """Counts and sums of non-negative values in geometric bins.

    A quantile is the mean of the values in its bin: exact where they are alike, as L-inf norms after rounding to 8 bits
    are, and within 0.07 % of the exact one elsewhere.
    """

    def __init__(self) -> None:
        """A spread of no values yet."""
        self._counts: npt.NDArray[np.int64] = np.zeros(_BINS, np.int64)
        self._sums: Values = np.zeros(_BINS, np.float64)

    def add(self, values: npt.NDArray[np.floating]) -> None:
        """Count finite, non-negative `values`, `(values,)`."""
        exact = np.asarray(values, np.float64)
        bins = np.floor(np.log2(np.clip(exact, _SMALLEST / 2, _LARGEST * 2) / _SMALLEST) * _PER_DOUBLING)
        bins = np.where(exact == 0, 0, np.clip(bins, -1, _BINS - 3) + 2).astype(np.int64)
        self._counts += np.bincount(bins, minlength=_BINS)
        self._sums += np.bincount(bins, weights=exact, minlength=_BINS)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def quantile(self, share: float) -> float:
        """The value below which `share` of the values lie, as NumPy has it; NaN of no values."""
        count = len(self)
        if count == 0:
            return float("nan")
        place = share * (count - 1)
        below = int(place)
        low, high = self._value_at(below), self._value_at(min(below + 1, count - 1))
        return low + (place - below) * (high - low)

    def cumulative(self) -> tuple[Values, npt.NDArray[np.int64]]:
        """The distinct values in order, and how many values are not larger; both `(distinct,)`."""
        filled = np.flatnonzero(self._counts)
        return self._sums[filled] / self._counts[filled], np.cumsum(self._counts[filled])

    def _value_at(self, place: int) -> float:
        """The value at `place` in order."""
        found = int(np.searchsorted(np.cumsum(self._counts), place, side="right"))
        return float(self._sums[found] / self._counts[found])
