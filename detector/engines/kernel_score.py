"""Scores of weighted sums in the compiled library: of an image's path, at the cost of the arithmetic alone."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from detector.engines.library import ProgramLayout, ScoreLayout, library
from detector.errors import EngineError
from detector.paths.encoder import Evidence
from detector.scoring.compiled_score import FoldedScore
from detector.scoring.sums import Doubles
from detector.scoring.thresholds import Scores


class KernelScore:
    """Evidence -> scores, equal to scikit-learn's on the same columns up to rounding."""

    def __init__(self, score: FoldedScore) -> None:
        """Lay the weights of `score` out for the library.

        Raises:
            EngineError: the library was not built, or does not know a kind of features.
        """
        self._library = library()
        self._arrays = _score_arrays(score)  # kept: the library reads them where they lie
        pointers = {name: array.ctypes.data for name, array in self._arrays.items()}
        shape = score.features.shape
        filters, reads = sum(shape.layers.values()), sum(shape.reads.values())
        sums = score.sums
        self.layout = ScoreLayout(
            layers=len(shape.layers), sums=sums.count, benign=sums.benign,
            units=0 if sums.hidden is None else len(sums.offsets), **pointers,
        )  # fmt: skip
        self._program = ProgramLayout(
            classes=shape.classes, filters=filters, reads=reads, score=ctypes.addressof(self.layout)
        )
        # In double precision: of likelihoods, with one layer twice; of filters, with their numbers; of gate inputs.
        self.room = max(4 * shape.classes + 2 * max(shape.layers.values()), 3 * filters, 2 * reads)

    def __call__(self, evidence: Evidence) -> Scores:
        """The score of each image, `(images,)`."""
        scores = np.empty(len(evidence), np.float64)
        room = np.empty(self.room // 2 + 1, np.float64)
        arrays = (evidence.class_logits, evidence.gate_logits, evidence.inputs.means, evidence.path.bits)
        kept = [np.ascontiguousarray(array) for array in arrays]
        self._library.pathguard_score(
            ctypes.byref(self._program), len(evidence), *(array.ctypes.data for array in kept), room.ctypes.data,
            scores.ctypes.data,
        )  # fmt: skip
        return scores


def _score_arrays(score: FoldedScore) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `struct score`, by field."""
    names = {"bits": "bits", "gates": "logits", "inputs": "inputs", "margins": "margins", "doubts": "doubts"}
    names |= {"path-likelihoods": "path_fit", "gate-likelihoods": "gate_fit"}
    weights = score.weights
    if not names.keys() >= weights.keys():
        raise EngineError(f"expected features of {', '.join(names)}, got {', '.join(weights)}")
    arrays: dict[str, npt.NDArray[Any]] = {names[kind]: _overread(of) for kind, of in weights.items()}
    layers, learnt = score.features.shape.layers, score.features.learnt_
    arrays["offsets"] = np.ascontiguousarray(score.sums.offsets)
    if (hidden := score.sums.hidden) is not None:
        arrays |= {"hidden": _overread(hidden.weights), "hidden_offsets": np.ascontiguousarray(hidden.offsets)}
    arrays["widths"] = np.array(list(layers.values()), np.int32)
    if (path := learnt.get("path-likelihoods")) is not None:
        ends = np.cumsum(arrays["widths"])[:-1]
        arrays["odds"] = np.ascontiguousarray(path["odds"], np.float32)
        parts = np.split(np.asarray(path["closed"], np.float64), ends, axis=1)
        arrays["closed"] = np.stack([part.sum(axis=1) for part in parts])
    if (gates := learnt.get("gate-likelihoods")) is not None:
        arrays["known"] = np.asarray(gates["known"], np.uint8)
        arrays["centre"] = np.ascontiguousarray(gates["centre"], np.float32)
        for field, name in (("whitening", "whitening"), ("means", "means")):
            pieces = [np.asarray(gates[f"{name}-{place}"], np.float32).ravel() for place in range(len(layers))]
            arrays[field] = np.concatenate(pieces)
    return arrays


def _overread(weights: Doubles) -> Doubles:
    """The weights, one row behind the other, and what the library reads, and drops, behind the last."""
    return np.concatenate([weights.ravel(), np.zeros(7)])
