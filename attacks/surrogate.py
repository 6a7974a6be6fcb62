"""A detector's score as torch sees it: features of the path and a scorer, both with a gradient.

The features are those of `detector.paths.features`, number for number; where a path bit jumps, its gradient is that of
a sigmoid (straight through), which never vanishes as the gate's own does. Logistic regressions and networks of one
hidden layer, behind standardisation, become the same arithmetic in torch. Any other scikit-learn classifier has no
gradient; it is imitated by a small network that was fitted on its scores, and how well the imitation ranks versions of
images that it was not fitted on is part of the result. Surrogates that are attacked in the place of what has no
gradient: Papernot et al., "Practical Black-Box Attacks against Machine Learning", 2017; against detectors: Carlini and
Wagner, "Adversarial Examples Are Not Easily Detected", 2017.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor, nn

from detector.errors import RequestError
from detector.network.gates import round_straight_through
from detector.paths.encoder import Floats
from detector.paths.features import PathFeatures
from detector.paths.likelihoods import Arrays
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.compiled_score import Score, compile_score
from detector.scoring.sums import TorchSums, weighted_sums

Features = Callable[[Tensor, Tensor, Tensor], Tensor]
EPOCHS, WIDTH = 60, 128  # of an imitation


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A scorer with a gradient.

    Attributes:
        score: rows `(images, features)` -> scores `(images,)`, larger is more suspicious.
        exact: whether these are the scorer's own scores, up to rounding; else an imitation.
        spearman: rank correlation with the scorer's own scores on `held_out` rows; 1 where it is exact.
        held_out: rows that the imitation was judged by, of images none of whose versions it was fitted on; 0 where it
            is exact.
    """

    score: Callable[[Tensor], Tensor]
    exact: bool
    spearman: float
    held_out: int


def path_bits(gate_logits: Tensor) -> Tensor:
    """1 for an open and 0 for a closed filter, `(images, total channels)`, with the gradient of a sigmoid."""
    return round_straight_through(gate_logits, torch.sigmoid(gate_logits))


def class_margins(class_logits: Tensor) -> Tensor:
    """By how much the first class leads the second, third, ... in logits, `(images, classes - 1)`."""
    ordered = class_logits.sort(dim=1, descending=True).values
    return ordered[:, :1] - ordered[:, 1:]


def doubts(class_logits: Tensor) -> Tensor:
    """How near each other class is to the first, and the log-odds against the first, `(images, classes)`."""
    behind = -class_margins(class_logits)
    return torch.cat([behind.exp(), behind.logsumexp(dim=1, keepdim=True)], dim=1)


def path_likelihoods(class_logits: Tensor, gate_logits: Tensor, arrays: Arrays, layers: Mapping[str, int]) -> Tensor:
    """How usual each layer's bits are for the predicted class, `(images, 2 (layers + 1))`."""
    bits = path_bits(gate_logits)
    odds, closed = (torch.from_numpy(arrays[name]).to(bits) for name in ("odds", "closed"))
    likely = [bits[:, part] @ odds[:, part].T + closed[:, part].sum(dim=1) for part in _parts(layers)]
    return _fit_and_lead(likely, class_logits, layers)


def gate_likelihoods(class_logits: Tensor, gate_logits: Tensor, arrays: Arrays, layers: Mapping[str, int]) -> Tensor:
    """How usual each layer's gate logits are for the predicted class, `(images, 2 (layers + 1))`."""
    likely = []
    for place, part in enumerate(_parts(layers)):
        whitening, means = (
            torch.from_numpy(arrays[f"{name}-{place}"]).to(gate_logits) for name in ("whitening", "means")
        )
        white = (gate_logits - torch.from_numpy(arrays["centre"]).to(gate_logits))[:, part] @ whitening
        squared = (white[:, None] - means).square().sum(dim=2)
        known = torch.from_numpy(arrays["known"]).to(squared) == 1
        likely.append(-0.5 * torch.where(known, squared, squared[:, known].amax(dim=1, keepdim=True)))
    return _fit_and_lead(likely, class_logits, layers)


def _parts(layers: Mapping[str, int]) -> list[slice]:
    ends = np.cumsum(list(layers.values())).tolist()
    return [slice(end - width, end) for end, width in zip(ends, layers.values(), strict=True)]


def _fit_and_lead(likely: Sequence[Tensor], class_logits: Tensor, layers: Mapping[str, int]) -> Tensor:
    widths = torch.tensor(list(layers.values())).to(class_logits)[:, None, None]
    stacked = torch.stack(list(likely))
    of_class = torch.cat([stacked / widths, stacked.sum(dim=0, keepdim=True) / widths.sum()])
    first = class_logits.argmax(dim=1)[None, :, None].expand(len(of_class), -1, 1)
    fit = of_class.gather(2, first).squeeze(2)
    lead = fit - of_class.scatter(2, first, -torch.inf).amax(dim=2)
    return torch.stack([fit, lead], dim=1).flatten(0, 1).T


# Class logits, gate logits and gate inputs of all gates side by side, what the features learnt, and the layers -> the
# columns of `detector.paths.features.FEATURES`.
TORCH_FEATURES: Mapping[str, Callable[[Tensor, Tensor, Tensor, Arrays, Mapping[str, int]], Tensor]] = {
    "bits": lambda _logits, gates, *_: path_bits(gates),
    "gates": lambda _logits, gates, *_: gates,
    "inputs": lambda _logits, _gates, inputs, *_: inputs,
    "margins": lambda logits, *_: class_margins(logits),
    "doubts": lambda logits, *_: doubts(logits),
    "path-likelihoods": lambda logits, gates, _, arrays, layers: path_likelihoods(logits, gates, arrays, layers),
    "gate-likelihoods": lambda logits, gates, _, arrays, layers: gate_likelihoods(logits, gates, arrays, layers),
}


def torch_features(features: PathFeatures) -> Features:
    """The differentiable twin of fitted features: class logits, gate logits and gate inputs -> columns.

    Raises:
        RequestError: one of their kinds has none.
    """
    for kind in features.kinds:
        if kind not in TORCH_FEATURES:
            raise RequestError(
                f"expected features of {', '.join(TORCH_FEATURES)} to follow the gradient of; got {kind!r}"
            )
    arrays, layers = features.learnt_, features.shape.layers

    def columns(class_logits: Tensor, gate_logits: Tensor, gate_inputs: Tensor) -> Tensor:
        parts = [
            TORCH_FEATURES[kind](class_logits, gate_logits, gate_inputs, arrays.get(kind, {}), layers)
            for kind in features.kinds
        ]
        return torch.cat(parts, dim=1)

    return columns


@dataclass(frozen=True, slots=True)
class Versions:
    """What a scorer is imitated on: features of clean images and of what noise and attacks make of them.

    Attributes:
        rows: `(versions, features)`.
        sources: index of the image that each is a version of, `int64`, `(versions,)`.
    """

    rows: Floats
    sources: npt.NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Iterable["Versions"]) -> "Versions":
        """All parts, one behind the other."""
        found = list(parts)
        return cls(np.concatenate([part.rows for part in found]), np.concatenate([part.sources for part in found]))


def surrogate_of(classifier: FalseAlarmClassifier, versions: Callable[[], Versions], seed: int = 0) -> Surrogate:
    """The classifier's score with a gradient.

    Args:
        classifier: fitted.
        versions: asked only where it cannot be translated, for what to imitate it on: clean images, and images as an
            attack meets them on its way.
        seed: of the imitation.
    """
    sums = weighted_sums(classifier.estimator_)
    if sums is None:
        return imitate(compile_score(classifier), versions(), seed)
    exact = TorchSums(sums)
    return Surrogate(lambda rows: exact.to(rows.device)(rows), True, 1.0, 0)


def imitate(
    score: Score, versions: Versions, seed: int = 0, epochs: int = EPOCHS, width: int = WIDTH
) -> Surrogate:  # fmt: skip
    """A network of two smooth hidden layers, fitted on versions of four fifths of the images, judged by the others'.

    Versions of one image score alike, so that one that was fitted on would vouch for its twins.

    Args:
        score: the scorer.
        versions: at least 50, of at least 5 images.
        seed: of weights, order and the choice of the images held out.
        epochs: passes over the rows.
        width: of the hidden layers.

    Raises:
        RequestError: there are fewer, or all have the same score.
    """
    rows, images = versions.rows, len(np.unique(versions.sources))
    if len(rows) < 50 or images < 5:
        raise RequestError(
            f"expected at least 50 rows of at least 5 images to imitate a scorer on, got {len(rows)} of {images}"
        )
    wanted = np.asarray(score(rows), np.float64)
    mean, spread = float(wanted.mean()), float(wanted.std())
    if spread == 0:
        raise RequestError("expected a scorer that tells rows apart, got the same score for all of them")
    halves = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
    fitted, held_out = next(halves.split(rows, groups=versions.sources))
    inputs = torch.from_numpy(np.asarray(rows, np.float32))
    centre, scale = inputs[fitted].mean(dim=0), inputs[fitted].std(dim=0).clamp_min(1e-6)
    targets = torch.from_numpy((wanted - mean) / spread).float()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of GPUs, which nobody draws from here
        network = nn.Sequential(
            nn.Linear(inputs.shape[1], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        with torch.enable_grad():
            for _ in range(epochs):
                for part in torch.from_numpy(fitted)[torch.randperm(len(fitted))].split(128):
                    predicted = network((inputs[part] - centre) / scale).squeeze(1)
                    optimizer.zero_grad(set_to_none=True)
                    (predicted - targets[part]).square().mean().backward()
                    optimizer.step()
                schedule.step()
    network.requires_grad_(False)

    def imitation(rows: Tensor) -> Tensor:
        network.to(rows.device)
        standardised = (rows.float() - centre.to(rows.device)) / scale.to(rows.device)
        scores: Tensor = network(standardised).squeeze(1).double() * spread + mean
        return scores

    ranks = spearmanr(imitation(inputs[held_out]).numpy(), wanted[held_out]).statistic
    return Surrogate(imitation, False, float(ranks), len(held_out))
