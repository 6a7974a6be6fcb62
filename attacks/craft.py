"""One recipe on one batch of images."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from attacks.draws import Draws, seed_of
from attacks.problem import Problem, Victim, Watcher, rounded
from attacks.recipes import Recipe, TargetRule
from detector.batches import to_pixels
from detector.errors import RequestError
from detector.images import Pixels
from detector.network.decouple import GatedNet

NO_TARGET = -1
BATCH = 500


class ProbabilitiesWarning(UserWarning):
    """The network gives probabilities, not logits: their gradients vanish where it is sure, and attacks look weak."""


@dataclass(frozen=True, slots=True)
class Crafted:
    """Attacked images, rounded to 8 bits, and what became of them.

    Attributes:
        pixels: `uint8`, `(images, height, width, channels)`.
        predicted: the network's label for them, `int64`, `(images,)`.
        fooled: whether that label is wrong, `(images,)`; measured after rounding.
        reached: whether the attack's own goal is reached, `(images,)`: the target where there is one, unseen by the
            detector where the attack knows it, else the same as `fooled`.
        flagged: whether the detector flags them, `(images,)`; False where the attack knows no detector.
        scores: the detector's, `float64`, `(images,)`; NaN where the attack knows no detector.
        targets: the label that the attack was to reach, -1 where any wrong one would do, `int64`, `(images,)`.
        linf: largest change of a pixel, in [0, 1], `float32`, `(images,)`.
        l2: Euclidean length of the change, pixels in [0, 1], `float32`, `(images,)`.
        l1: sum of the changes, pixels in [0, 1], `float32`, `(images,)`.
        l0: number of changed values, `float32`, `(images,)`.
        forwards: how often the attack sent the image through the network, `int64`, `(images,)`.
        gradients: how often it went back, `int64`, `(images,)`.
        seeds: of the image's random draws, `int64`, `(images,)`.
    """

    pixels: Pixels
    predicted: npt.NDArray[np.int64]
    fooled: npt.NDArray[np.bool_]
    reached: npt.NDArray[np.bool_]
    flagged: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    targets: npt.NDArray[np.int64]
    linf: npt.NDArray[np.float32]
    l2: npt.NDArray[np.float32]
    l1: npt.NDArray[np.float32]
    l0: npt.NDArray[np.float32]
    forwards: npt.NDArray[np.int64]
    gradients: npt.NDArray[np.int64]
    seeds: npt.NDArray[np.int64]


def craft(
    recipe: Recipe, network: nn.Module, images: Tensor, labels: Tensor, seed: int = 0,
    ids: npt.NDArray[np.int64] | None = None, targets: Tensor | None = None, backbone: nn.Module | None = None,
    watcher: Watcher | None = None, lengths: npt.NDArray[np.float32] | None = None,
) -> Crafted:  # fmt: skip
    """Attack `images`, which `network` gets right.

    What becomes of an image depends on the image, the seed and its id, never on the rest of the batch. Modes and the
    need for gradients of all weights are as before when this returns or raises.

    Args:
        recipe: the attack.
        network: images -> logits.
        images: in [0, 1], `(batch, channels, height, width)`.
        labels: the right labels, `(batch,)`.
        seed: with an image's id, the seed of its random draws.
        ids: index of each image in its source, `(batch,)`; 0, 1, ... where None.
        targets: labels to reach, `(batch,)`; None to choose them by the recipe's rule, if it has one.
        backbone: the plain network, for recipes that work on it.
        watcher: the detector, for attacks that know it.
        lengths: L2 lengths of the changes that noise is to match, pixels in [0, 1], `(batch,)`.

    Raises:
        RequestError: there is no image, one is not finite or leaves [0, 1], a label or target is none of the network's
            classes, a target is the right label, the budget is larger than any change, the backbone or detector that
            the recipe needs is missing, or what the attack made is not finite.
    """
    images, labels = images.detach().contiguous(), labels.detach()
    ids = np.arange(len(images)) if ids is None else ids
    _check_images(recipe, images)
    if recipe.source == "backbone" and backbone is None:
        raise RequestError(f"expected a plain backbone for {recipe.name} to work on, got none")
    if recipe.knows_detector and watcher is None:
        raise RequestError(f"expected a detector for {recipe.name} to evade, got none; run `pathguard fit`")
    known = watcher if recipe.knows_detector else None
    attacked = backbone if recipe.source == "backbone" and backbone is not None else network
    with _as_an_attacker_sees(network), _as_an_attacker_sees(attacked):
        logits = _in_parts(network, images)
        _check_labels("labels", labels, logits)
        _warn_of_probabilities(logits)
        if targets is None and recipe.target is not None:
            targets = _targets_by(recipe.target, logits, labels, seed, ids)
        if targets is not None:
            _check_labels("targets", targets, logits)
            if (targets == labels).any():
                same = labels[targets == labels][0]
                raise RequestError(f"expected a target that differs from the right label, got {same} for both")
        seeds = [seed_of(seed, int(index)) for index in ids]
        draws = Draws(seeds, images.device, images.dtype)
        victim = Victim(attacked, len(images))
        gated = attacked if isinstance(attacked, GatedNet) and recipe.gates == "frozen" else None
        with gated.frozen_gates() if gated else nullcontext():
            wanted = None if lengths is None else torch.from_numpy(lengths).to(images)
            points = recipe.attack()(Problem(victim, images, labels, targets, draws, ids, known, wanted))
        if not torch.isfinite(points).all():  # they would be judged as they are, and stored as something else
            raise RequestError(
                f"expected finite pixels of {recipe.name}, got some that are not: a gradient of the network is not "
                "finite, or a setting of the recipe is too large"
            )
        final = rounded(points)
        logits = _in_parts(network, final)
        predicted = logits.argmax(dim=1)
        judged = Problem(Victim(network, len(images)), images, labels, targets, draws, ids)
        reached = judged.is_wanted(predicted, judged.all_rows())
        flagged, scores = torch.zeros_like(reached), torch.full_like(logits[:, 0], float("nan"))
        if known is not None:
            scores = torch.cat([known.judge(part)[1] for part in final.split(BATCH)])
            flagged = scores > known.threshold
    change = (final - images).flatten(1)
    return Crafted(
        pixels=to_pixels(final),
        predicted=predicted.cpu().numpy(),
        fooled=(predicted != labels).cpu().numpy(),
        reached=(reached & ~flagged).cpu().numpy(),
        flagged=flagged.cpu().numpy(),
        scores=scores.double().cpu().numpy(),
        targets=np.full(len(images), NO_TARGET, np.int64) if targets is None else targets.cpu().numpy(),
        linf=change.abs().amax(dim=1).float().cpu().numpy(),
        l2=change.norm(dim=1).float().cpu().numpy(),
        l1=change.abs().sum(dim=1).float().cpu().numpy(),
        l0=(change.abs() > 0.5 / 255).sum(dim=1).float().cpu().numpy(),
        forwards=victim.forwards,
        gradients=victim.gradients,
        seeds=np.array(seeds, np.int64),
    )


def _in_parts(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of any number of images, `(images, classes)`."""
    with torch.no_grad():
        return torch.cat([network(part) for part in images.split(BATCH)])


def _check_images(recipe: Recipe, images: Tensor) -> None:
    if len(images) == 0:
        raise RequestError(f"expected images for {recipe.name} to attack, got none")
    if not torch.isfinite(images).all() or images.min() < 0 or images.max() > 1:
        raise RequestError(f"expected pixels in [0, 1], got {images.min().item():g} to {images.max().item():g}")
    values = images[0].numel()
    largest = {"linf": 1.0, "l2": values**0.5}.get(recipe.norm or "", float(values))
    if recipe.budget is not None and recipe.budget > largest:
        raise RequestError(
            f"expected a budget of at most {largest:g} for {recipe.name} ({recipe.norm}) on images of {values} values, "
            f"got {recipe.budget:g}"
        )


def _check_labels(what: str, labels: Tensor, logits: Tensor) -> None:
    classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise RequestError(f"expected {what} from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")


def _warn_of_probabilities(logits: Tensor) -> None:
    if (logits >= 0).all() and ((logits.sum(dim=1) - 1).abs() < 1e-4).all():
        warnings.warn(
            "expected logits, got probabilities (each row sums to 1): gradients vanish where the network is sure, and "
            "attacks look weaker than they are",
            ProbabilitiesWarning,
            stacklevel=3,
        )


def _targets_by(rule: TargetRule, logits: Tensor, labels: Tensor, seed: int, ids: npt.NDArray[np.int64]) -> Tensor:
    """A wrong label for each image; a random one depends on the seed and the image's id alone."""
    if rule == "random":
        others = logits.shape[1] - 1
        steps = [1 + seed_of(seed, -1 - int(index)) % others for index in ids]
        return (labels + torch.tensor(steps, device=labels.device)) % (others + 1)
    wrong = logits.scatter(1, labels[:, None], float("-inf" if rule == "runner-up" else "inf"))
    return wrong.argmax(dim=1) if rule == "runner-up" else wrong.argmin(dim=1)


@contextmanager
def _as_an_attacker_sees(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode with fixed weights; everything as before afterwards, also after an error."""
    modes = [(module, module.training) for module in network.modules()]
    wanting = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
