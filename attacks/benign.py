"""Images that nobody attacked, unlike clean ones all the same: noise and the fifteen common corruptions, to fit on.

A detector that was told of clean and of attacked images alone takes whatever is unlike both for the nearer of the two,
and noise is nearer to attacks. Each image of the fitting split is damaged once in each way; those that the network
still gets right are what a detector should let pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from attacks.corruptions import CORRUPTIONS
from attacks.draws import seed_of
from detector.datasets import ImageSet, Indices
from detector.images import Pixels
from detector.network.decouple import GatedNet
from detector.paths.encoder import Evidence, encode_set
from detector.scoring.sample import Sample
from detector.workers import IN_PROCESS, Workers

# Images of the fitting split; each of them once for each kind.
BENIGN_IMAGES = 1000
# Each image of a corruption gets one of these; beyond them a network gets few images right.
SEVERITIES = (1, 2, 3)
NOISE = "noise"
# Standard deviation of the noise, in levels of 255: between these two, evenly in logarithms. Attacks within 1 to 8
# levels are as long as such noise.
LEAST_LEVELS, MOST_LEVELS = 1.0, 16.0
KINDS = (NOISE, *CORRUPTIONS)


def benign_samples(
    network: GatedNet, images: ImageSet, seed: int = 0, workers: Workers = IN_PROCESS, at_most: int = BENIGN_IMAGES
) -> dict[str, Sample]:
    """Kind of damage -> the first `at_most` images damaged so, those whose label is still right.

    Args:
        network: in evaluation mode.
        images: clean ones, of the fitting split.
        seed: of damage and its strength.
        workers: who damages and encodes them.
        at_most: images of each kind.
    """
    first, found = images.first(at_most), {}
    for kind in KINDS:
        damaged = replace(first, read=_Damaged(first.read, kind, seed))
        evidence = Evidence.stacked(encode_set(network, damaged, workers=workers))
        if evidence is None:
            continue
        right = evidence.class_logits.argmax(axis=1) == first.labels
        if right.any():
            found[kind] = Sample(evidence, first.ids).at(right)
    return found


@dataclass(frozen=True, slots=True)
class _Damaged:
    """Ids -> damaged pixels; what becomes of an image depends on its pixels, its id, the kind and the seed alone."""

    read: Callable[[Indices], Pixels]
    kind: str
    seed: int

    def __call__(self, ids: Indices) -> Pixels:
        pixels = self.read(ids)
        seeds = [seed_of(self.seed, int(index)) for index in ids]
        if self.kind == NOISE:
            return np.stack([_noisy(image, seed) for image, seed in zip(pixels, seeds, strict=True)])
        damaged = np.empty_like(pixels)
        strength = np.array([SEVERITIES[seed % len(SEVERITIES)] for seed in seeds])
        for severity in SEVERITIES:
            chosen = np.flatnonzero(strength == severity)
            damaged[chosen] = CORRUPTIONS[self.kind](pixels[chosen], severity, [seeds[place] for place in chosen])
        return damaged


def _noisy(image: Pixels, seed: int) -> Pixels:
    chooser = np.random.default_rng(seed)
    levels = np.exp(chooser.uniform(np.log(LEAST_LEVELS), np.log(MOST_LEVELS)))
    noisy: Pixels = np.round(np.clip(image + levels * chooser.standard_normal(image.shape), 0, 255)).astype(np.uint8)
    return noisy
