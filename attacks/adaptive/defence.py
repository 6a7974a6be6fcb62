"""What an attacker knows who knows everything: network, gates, detector, threshold, and clean images."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attacks.draws import Draws
from attacks.methods.gradient import Ascent
from attacks.problem import Problem, Victim
from attacks.surrogate import Surrogate, surrogate_of, torch_features
from detector.batches import batches, device_of, to_pixels, to_tensor
from detector.bundle import Bundle
from detector.datasets import ImageSet
from detector.errors import DataError
from detector.network.decouple import GatedNet
from detector.paths.encoder import Floats, encode
from detector.scoring.compiled_score import compile_score

log = logging.getLogger(__name__)

GUIDES = 500
# What an imitation of a scorer learns beside clean images: noise of these deviations, plain attacks of these budgets.
NOISES = (2 / 255, 8 / 255)
ATTACKS = (2 / 255, 8 / 255, 16 / 255)


@dataclass(frozen=True, slots=True)
class Seen:
    """One forward pass, with a gradient where the images want one.

    Attributes:
        logits: of the classes, `(images, classes)`.
        scores: of the detector or its surrogate, larger is more suspicious, `(images,)`.
        gates: gate logits of all gates side by side, `(images, total channels)`.
    """

    logits: Tensor
    scores: Tensor
    gates: Tensor


@dataclass(frozen=True, slots=True)
class Guides:
    """Clean images that the network gets right and the detector lets pass: what an attacked image should look like.

    Attributes:
        images: in [0, 1], `(images, channels, height, width)`.
        labels: their labels, `(images,)`.
        gates: their gate logits, `(images, total channels)`.
    """

    images: Tensor
    labels: Tensor
    gates: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class Defence:
    """A network and its detector, to an attacker who knows both.

    Attributes:
        see: images in [0, 1], `(batch, channels, height, width)` -> what a gradient can be taken of.
        judge: images in [0, 1], rounded to 8 bits -> labels `(batch,)` and real scores `(batch,)`, as they are served.
        threshold: images whose real score lies above it are flagged.
        spread: standard deviation of the real scores of clean images: the unit of scores.
        exact: whether `see` gives the real scores, up to rounding; else those of an imitation.
        spearman: rank correlation of the imitation with the real scores; 1 where it is exact.
        guides: clean images, of other sources than those to be attacked.
    """

    see: Callable[[Tensor], Seen]
    judge: Callable[[Tensor], tuple[Tensor, Tensor]]
    threshold: float
    spread: float
    exact: bool
    spearman: float
    guides: Guides


def defence_of(bundle: Bundle, network: GatedNet, clean: ImageSet, rate: float | None = None, seed: int = 0) -> Defence:
    """What is known of a bundle with a detector.

    Args:
        bundle: with a detector.
        network: the bundle's network, in evaluation mode, where the attack will run.
        clean: images of a split that is not attacked; the first `GUIDES` of them that the network gets right and the
            detector lets pass are the guides.
        rate: share of false alarms that sets the threshold; None for the bundle's own.
        seed: of the imitation, where the scorer needs one.

    Raises:
        ArtifactError: the bundle has no detector.
        DataError: no clean image is right and unflagged.
        RequestError: there is no threshold for the rate, or the features have no gradient.
    """
    info, classifier, calibration = bundle.detector_info(), bundle.classifier(), bundle.calibration()
    rate = info.max_false_alarm_rate if rate is None else rate
    threshold = calibration.threshold(rate)
    # Where each class has its own threshold, scores are moved so that one threshold serves all.
    moved = threshold - calibration.thresholds(rate, len(bundle.manifest.network.classes))
    moved_in_torch = torch.from_numpy(moved)
    features = bundle.features(network.layers)
    columns, columns_in_torch = features.of, torch_features(features)
    score = compile_score(classifier)

    def see_with(surrogate: Surrogate) -> Callable[[Tensor], Seen]:
        def see(images: Tensor) -> Seen:
            logits, readings = network.trace(images)
            gates = torch.cat([reading.logits for reading in readings.values()], dim=1)
            scores = surrogate.score(columns_in_torch(logits, gates))
            return Seen(logits, scores + moved_in_torch.to(scores)[logits.argmax(dim=1)], gates)

        return see

    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        evidence = encode(network, images)
        labels = evidence.class_logits.argmax(axis=1)
        scores = score(columns(evidence)) + moved[labels]
        return torch.from_numpy(labels).to(images.device), torch.from_numpy(scores).to(images.device)

    def rows() -> Iterator[Floats]:
        chooser = np.random.default_rng(seed)
        for positions, images in batches(clean.first(2 * GUIDES), 250, device_of(network)):
            for noise in (0.0, *NOISES):
                added = torch.from_numpy(chooser.normal(0, 1, images.shape)).to(images) * noise
                yield columns(encode(network, to_tensor(to_pixels(images + added), images.device)))
            with torch.no_grad():
                labels = network(images).argmax(dim=1)
            for budget in ATTACKS:
                draws = Draws(chooser.integers(2**31, size=len(images)).tolist(), images.device, images.dtype)
                problem = Problem(Victim(network, len(images)), images, labels, None, draws, clean.ids[positions])
                points = Ascent("linf", budget, steps=10, start=True, stop=False)(problem)
                yield columns(encode(network, to_tensor(to_pixels(points), images.device)))

    surrogate = surrogate_of(classifier, lambda: np.concatenate(list(rows())), seed)
    if not surrogate.exact:
        log.info(
            "the detector's classifier has no gradient: attacks follow an imitation, whose scores of %d images that it "
            "was not fitted on have a rank correlation of %.2f with the real ones",
            surrogate.held_out,
            surrogate.spearman,
        )
    guides = _guides(network, judge, threshold, clean)
    return Defence(
        see_with(surrogate), judge, threshold, float(calibration.scores.std()), surrogate.exact, surrogate.spearman,
        guides,
    )  # fmt: skip


def _guides(
    network: GatedNet, judge: Callable[[Tensor], tuple[Tensor, Tensor]], threshold: float, clean: ImageSet
) -> Guides:
    kept: list[Guides] = []
    for positions, images in batches(clean, 250, device_of(network)):
        labels, scores = judge(images)
        usual = (labels == torch.from_numpy(clean.labels[positions]).to(labels)) & (scores <= threshold)
        gates = torch.from_numpy(encode(network, images[usual]).gate_logits).to(images.device)
        kept.append(Guides(images[usual], labels[usual], gates))
        if sum(map(len, kept)) >= GUIDES:
            break
    together = Guides(
        torch.cat([part.images for part in kept])[:GUIDES],
        torch.cat([part.labels for part in kept])[:GUIDES],
        torch.cat([part.gates for part in kept])[:GUIDES],
    )
    if len(together) == 0:
        raise DataError(f"expected clean images of {clean.name} that are right and unflagged as guides, got none")
    return together
