"""All that is shown of a network's paths, gathered in one go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from detector.batches import best_device, to_tensor
from detector.bundle import Bundle
from detector.datasets import ImageSet, Splits
from detector.images import Pixels
from detector.interpretation.census import Census, Doubles
from detector.interpretation.closing import Closing, close_combinations
from detector.interpretation.concepts import Combination, Purity, find_combinations, judge_combinations
from detector.interpretation.regions import Region, find_regions
from detector.network.decouple import GatedNet
from detector.network.folding import fold_normalisation
from detector.paths.encoder import Evidence, encode, encode_set
from detector.paths.path_encoding import Bits, PathEncoding
from detector.paths.path_statistics import LayerFigures, distinct_paths, layer_figures
from detector.stages import check_fits, probe_images

# Paths in the embedding, whose cost grows faster than their number.
EMBEDDED_CLEAN, EMBEDDED_ATTACKED = 1500, 150
# Images that each combination is closed for, and images shown beside it.
CLOSED_FOR, SHOWN = 1000, 6
_PCA_DIMENSIONS = 50


@dataclass(frozen=True, slots=True)
class Point:
    """One path in the plane.

    Attributes:
        x: place, without unit.
        y: likewise.
        label: the image's class.
        recipe: the attack on it; None for a clean image.
    """

    x: float
    y: float
    label: int
    recipe: str | None


@dataclass(frozen=True, slots=True)
class Concept:
    """A combination with what was checked of it and where it looks.

    Attributes:
        purity: on images that it was not found on.
        closing: what closing it costs.
        pixels: images that share it, `(images, height, width, channels)`.
        regions: the part of each that excites it.
    """

    purity: Purity
    closing: Closing
    pixels: Pixels
    regions: Sequence[Region]


@dataclass(frozen=True, slots=True)
class Atlas:
    """A network's paths.

    Attributes:
        data: name of the data set.
        network: SHA-256 of the network's weights.
        class_names: names of the classes, by label.
        fitted_images: training images that probes and combinations were found on.
        judged_images: other images, which all figures are of.
        accuracy: on those, in [0, 1].
        distinct_paths: how many different paths those images took.
        census: of those images.
        layers: a row for each gated convolution, in network order.
        agreement: layer -> share of its filters that an image of one class and one of another have in the same state,
            `(classes, classes)`.
        points: clean and attacked images in the plane.
        purities: all combinations.
        concepts: of each class the combination that was purest where it was found.
    """

    data: str
    network: str
    class_names: tuple[str, ...]
    fitted_images: int
    judged_images: int
    accuracy: float
    distinct_paths: int
    census: Census
    layers: Sequence[LayerFigures]
    agreement: Mapping[str, Doubles]
    points: Sequence[Point]
    purities: Sequence[Purity]
    concepts: Sequence[Concept]


def make_atlas(bundle: Bundle, splits: Splits, attacked: Mapping[str, tuple[Pixels, npt.NDArray[np.int64]]],
               seed: int = 0) -> Atlas:  # fmt: skip
    """Look at the paths of about 10,000 training images and of the images of the fitting split.

    Args:
        bundle: with a decoupled network.
        splits: the data that it was trained on.
        attacked: recipe -> attacked pixels and the right labels.
        seed: of everything that is random.

    Raises:
        ArtifactError: the bundle has no decoupled network.
        DataError: the data is not what the network was trained on.
    """
    check_fits(bundle, splits.train)
    network = fold_normalisation(bundle.network()).to(best_device())
    fitted, judged = probe_images(splits.train), splits.fitting
    found = PathEncoding.stacked([part.path for part in encode_set(network, fitted)])
    evidence = Evidence.stacked(encode_set(network, judged))
    assert evidence is not None
    classes = len(judged.class_names)
    census = Census(network.layers, classes, together=True)
    census.add(evidence.path, judged.labels)
    combinations = find_combinations(found, fitted.labels, classes, seed=seed)
    purities = list(judge_combinations(combinations, evidence.path, judged.labels, seed))
    # Which are shown is chosen where they were found, so that their purity elsewhere is no lucky one.
    chosen = {one.combination for one in purest_of_each_class(judge_combinations(combinations, found, fitted.labels))}
    shown = [one for one in purities if one.combination in chosen and one.images]
    return Atlas(
        data=judged.name,
        network=bundle.network_digest,
        class_names=judged.class_names,
        fitted_images=len(fitted),
        judged_images=len(judged),
        accuracy=float((evidence.class_logits.argmax(axis=1) == judged.labels).mean()),
        distinct_paths=distinct_paths(evidence.path),
        census=census,
        layers=layer_figures(found, fitted.labels, evidence.path, judged.labels),
        agreement=class_agreement(census),
        points=_embedded(network, evidence.path.bits, judged.labels, attacked, seed),
        purities=purities,
        concepts=_concepts(network, judged, evidence.path.bits, shown),
    )


def class_agreement(census: Census) -> dict[str, Doubles]:
    """Layer -> expected share of its filters in the same state for images of two classes, `(classes, classes)`.

    NaN for a class of no images.
    """
    present = census.images > 0
    seen = np.outer(present, present)
    return {
        layer: np.where(seen, (rates @ rates.T + (1 - rates) @ (1 - rates).T) / rates.shape[1], np.nan)
        for layer, rates in census.by_layer(census.class_rates()).items()
    }


def purest_of_each_class(purities: Iterable[Purity]) -> list[Purity]:
    """The purest combination of each class, in the order of the classes; classes without one are left out."""
    best: dict[int, Purity] = {}
    for purity in purities:
        label = purity.combination.label
        if purity.images and (label not in best or purity.purity > best[label].purity):
            best[label] = purity
    return [best[label] for label in sorted(best)]


def _concepts(network: GatedNet, images: ImageSet, bits: Bits, purities: Sequence[Purity]) -> list[Concept]:
    combinations = [purity.combination for purity in purities]
    closings = close_combinations(network, images.first(CLOSED_FOR), combinations)
    concepts = []
    for purity, closing in zip(purities, closings, strict=True):
        pixels, regions = _examples(network, images, bits, purity.combination)
        concepts.append(Concept(purity, closing, pixels, regions))
    return concepts


def _examples(network: GatedNet, images: ImageSet, bits: Bits, combination: Combination) -> tuple[Pixels, list[Region]]:
    """The most excited of the first images that share a combination, whatever their class."""
    shared = np.flatnonzero(combination.shared_by(bits))[: 4 * SHOWN]
    pixels = images.pixels(shared)
    regions = find_regions(network, to_tensor(pixels, best_device()), combination)
    order = sorted(range(len(regions)), key=lambda place: -regions[place].excitement)[:SHOWN]
    return pixels[order], [regions[place] for place in order]


def _embedded(
    network: GatedNet, bits: Bits, labels: npt.NDArray[np.int64],
    attacked: Mapping[str, tuple[Pixels, npt.NDArray[np.int64]]], seed: int,
) -> list[Point]:  # fmt: skip
    """Paths in the plane by t-SNE of their principal components (van der Maaten and Hinton 2008), attacked ones too."""
    rows, kinds = [bits[:EMBEDDED_CLEAN]], [(int(label), None) for label in labels[:EMBEDDED_CLEAN]]
    of_points: list[tuple[int, str | None]] = list(kinds)
    for recipe, (pixels, right) in attacked.items():
        pixels, right = pixels[:EMBEDDED_ATTACKED], right[:EMBEDDED_ATTACKED]
        if len(pixels):
            rows.append(encode(network, to_tensor(pixels, best_device())).path.bits)
            of_points += [(int(label), recipe) for label in right]
    paths = np.concatenate(rows).astype(np.float32)
    dimensions = min(_PCA_DIMENSIONS, *paths.shape)
    reduced = PCA(dimensions, random_state=seed, svd_solver="randomized").fit_transform(paths)
    plane = TSNE(perplexity=min(30.0, (len(paths) - 1) / 3), random_state=seed, init="pca").fit_transform(reduced)
    return [
        Point(float(x), float(y), label, recipe)
        for (x, y), (label, recipe) in zip(plane.tolist(), of_points, strict=True)
    ]
