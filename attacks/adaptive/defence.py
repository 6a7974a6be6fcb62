"""What an attacker knows who knows everything: network, gates, detector, threshold, and clean images."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.draws import Draws
from attacks.methods.gradient import Ascent
from attacks.problem import Problem, Victim
from attacks.surrogate import EPOCHS, WIDTH, Surrogate, Versions, imitate, surrogate_of, torch_features
from detector.baselines.baseline import Baseline
from detector.baselines.torch_score import TorchScore, Trace
from detector.batches import batches, device_of, to_pixels, to_tensor
from detector.bundle import Bundle
from detector.datasets import ImageSet
from detector.errors import DataError
from detector.network.decouple import GatedNet
from detector.network.gates import inputs_of, logits_of
from detector.paths.encoder import encode
from detector.scoring.compiled_score import Score, compile_score
from detector.scoring.thresholds import Calibration

log = logging.getLogger(__name__)

GUIDES = 500
# What an imitation of a scorer learns beside clean images: noise of these deviations, plain attacks of these budgets.
NOISES = (2 / 255, 8 / 255)
ATTACKS = (2 / 255, 8 / 255, 16 / 255)
IMITATION: Mapping[str, object] = {
    "epochs": EPOCHS, "width": WIDTH, "images": 2 * GUIDES, "noises": list(NOISES), "attacks": list(ATTACKS),
    "held_out": "by image",
}  # fmt: skip


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
        known: what tells this defence, and what the attacker makes of it, from others, JSON values: the detector's
            digest, its rate of false alarms, and how its imitation was made; stored with the images.
    """

    see: Callable[[Tensor], Seen]
    judge: Callable[[Tensor], tuple[Tensor, Tensor]]
    threshold: float
    spread: float
    exact: bool
    spearman: float
    guides: Guides
    known: Mapping[str, object] = field(default_factory=dict)


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
    features = bundle.features(network)
    columns, columns_in_torch = features.of, torch_features(features)
    score = compile_score(classifier)

    def see_with(surrogate: Surrogate) -> Callable[[Tensor], Seen]:
        def see(images: Tensor) -> Seen:
            logits, readings = network.trace(images)
            gates = logits_of(readings)
            scores = surrogate.score(columns_in_torch(logits, gates, inputs_of(readings)))
            return Seen(logits, scores + moved_in_torch.to(scores)[logits.argmax(dim=1)], gates)

        return see

    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        evidence = encode(network, images)
        labels = evidence.class_logits.argmax(axis=1)
        scores = score(columns(evidence)) + moved[labels]
        return torch.from_numpy(labels).to(images.device), torch.from_numpy(scores).to(images.device)

    def versions() -> Iterator[Versions]:
        for images, ids in _versions(network, clean, seed):
            yield Versions(columns(encode(network, images)), ids)

    surrogate = surrogate_of(classifier, lambda: Versions.joined(versions()), seed)
    if not surrogate.exact:
        _say_how_well("the detector's classifier", surrogate)
    guides = _guides(network, judge, threshold, clean)
    known: dict[str, object] = {"detector": bundle.threshold_digest, "false_alarm_rate": rate}
    if not surrogate.exact:
        known["imitation"] = IMITATION
    return Defence(
        see_with(surrogate), judge, threshold, float(calibration.scores.std()), surrogate.exact, surrogate.spearman,
        guides, known,
    )  # fmt: skip


def defence_of_baseline(
    network: GatedNet, method: Baseline, score: Score, calibration: Calibration, clean: ImageSet, rate: float,
    seed: int = 0,
) -> Defence:  # fmt: skip
    """What is known of another detector on the same network.

    A score in torch is followed by its own gradient; any other by that of an imitation which reads class and gate
    logits, for what the detector looks at need not have a gradient either.

    Args:
        network: in evaluation mode, where the attack will run.
        method: the detector.
        score: what it was fitted to.
        calibration: its scores of clean images.
        clean: as in `defence_of`; for an imitation as well.
        rate: share of false alarms that sets the threshold.
        seed: of the imitation.

    Raises:
        DataError: no clean image is right and unflagged.
        RequestError: there is no threshold for the rate, or an imitation has too few images to be fitted on.
    """
    threshold = calibration.threshold(rate)

    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            labels = network(images).argmax(dim=1)
        return labels, torch.from_numpy(score(method.observe(images))).to(images.device)

    exact = isinstance(score, TorchScore)
    known, spearman = (score, 1.0) if isinstance(score, TorchScore) else _imitated(network, method, judge, clean, seed)

    def see(images: Tensor) -> Seen:
        trace = known.trace(images)
        return Seen(trace.logits, known.of(trace.rows), trace.gates)

    guides = _guides(network, judge, threshold, clean)
    return Defence(see, judge, threshold, float(calibration.scores.std()), exact, spearman, guides)


def _imitated(
    network: GatedNet, method: Baseline, judge: Callable[[Tensor], tuple[Tensor, Tensor]], clean: ImageSet, seed: int
) -> tuple[TorchScore, float]:
    """An imitation of what `judge` scores, and how well it ranks."""

    def trace(images: Tensor) -> Trace:
        logits, readings = network.trace(images)
        gates = logits_of(readings)
        return Trace(logits, gates, torch.cat([logits, gates], dim=1))

    rows, scores, sources = [], [], []
    for images, ids in _versions(network, clean, seed):
        with torch.no_grad():
            rows.append(trace(images).rows.cpu().numpy())
        scores.append(judge(images)[1].cpu().numpy())
        sources.append(ids)
    versions = Versions(np.concatenate(rows), np.concatenate(sources))
    surrogate = imitate(lambda _: np.concatenate(scores), versions, seed)
    _say_how_well(method.name, surrogate)
    return TorchScore(surrogate.score, trace), surrogate.spearman


def _versions(network: GatedNet, clean: ImageSet, seed: int) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
    """What an imitation of a scorer is fitted on: versions of clean images, in 8 bits, and their ids."""
    chooser = np.random.default_rng(seed)
    for positions, images in batches(clean.first(2 * GUIDES), 250, device_of(network)):
        ids, changed = clean.ids[positions], []
        for noise in (0.0, *NOISES):
            added = torch.from_numpy(chooser.normal(0, 1, images.shape)).to(images) * noise
            changed.append(images + added)
        with torch.no_grad():
            labels = network(images).argmax(dim=1)
        for budget in ATTACKS:
            draws = Draws(chooser.integers(2**31, size=len(images)).tolist(), images.device, images.dtype)
            problem = Problem(Victim(network, len(images)), images, labels, None, draws, ids)
            changed.append(Ascent("linf", budget, steps=10, start=True, stop=False)(problem))
        for points in changed:
            yield to_tensor(to_pixels(points), images.device), ids


def _say_how_well(what: str, surrogate: Surrogate) -> None:
    log.info(
        "%s has no gradient: attacks follow an imitation, whose scores of %d versions of images that it was not fitted "
        "on have a rank correlation of %.2f with the real ones",
        what,
        surrogate.held_out,
        surrogate.spearman,
    )


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
