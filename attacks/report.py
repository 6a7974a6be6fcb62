"""How often each attack fooled the network, by how much it changed the images, and what it cost.

A store is read shard by shard, and of what was read only counts and a few images to show are kept: memory does not grow
with the number of images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attacks.clean import CleanTwins, read_clean
from attacks.spread import Spread
from attacks.store import AttackStore, Shard
from detector.images import Pixels

NORMS = ("linf", "l2", "l1", "l0")
SHOWN = 4
CURVE_POINTS = 400


@dataclass(frozen=True, slots=True)
class AttackFigures:
    """One recipe on one split.

    Norms are medians over the images that fooled the network, NaN where none did; those of noise and corruptions, which
    aim at nothing, are over all images.

    Attributes:
        recipe: name of the attack.
        images: attacked images (the network was right on all of them).
        fooled: share of them that fooled the network after rounding to 8 bits, in [0, 1].
        reached: share that reached the attack's own goal, such as its target or an unsuspecting detector, in [0, 1].
        linf: largest change of a pixel, in [0, 1].
        l2: Euclidean length of the change, pixels in [0, 1].
        l1: sum of the changes, pixels in [0, 1].
        l0: number of changed values.
        forwards: mean forward passes of an image.
        gradients: mean backward passes of an image.
    """

    recipe: str
    images: int
    fooled: float
    reached: float
    linf: float
    l2: float
    l1: float
    l0: float
    forwards: float
    gradients: float


@dataclass(frozen=True, slots=True)
class SuccessCurve:
    """Share of all attacked images that were fooled by no more than a distance.

    Attributes:
        norm: in which the distance is measured.
        distances: rising, `(points,)`.
        shares: in [0, 1], `(points,)`; the last is the success rate.
    """

    norm: str
    distances: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Example:
    """One attacked image beside its clean twin.

    Attributes:
        image: its index in its source.
        clean: `uint8`, `(height, width, channels)`.
        attacked: of the same shape.
        label: the right class, by name.
        predicted: what the network says of the attacked image, by name.
        fooled: whether that differs.
    """

    image: int
    clean: Pixels
    attacked: Pixels
    label: str
    predicted: str
    fooled: bool


@dataclass(frozen=True, slots=True)
class AttackSummary:
    """All that a report shows of one recipe on one split.

    Attributes:
        figures: success, distances and cost.
        parameters: of the recipe, as stored.
        curve: success against distance, in the recipe's own norm (L2 where it has none).
        examples: a few images, those that fooled the network first; empty where no clean twin was kept.
    """

    figures: AttackFigures
    parameters: Mapping[str, object]
    curve: SuccessCurve
    examples: Sequence[Example]

    @property
    def is_attack(self) -> bool:
        """Whether the recipe aims at fooling; noise and corruptions do not."""
        return self.parameters.get("norm") is not None

    @property
    def budget(self) -> float | None:
        """The largest change that the recipe allows itself in its norm; None where it has none."""
        budget = self.parameters.get("budget")
        return float(budget) if isinstance(budget, int | float) else None


def attack_figures(store: AttackStore, split: str) -> list[AttackFigures]:
    """One row per recipe that has finished shards on `split`."""
    return [summary.figures for summary in summarise(store, split)]


def summarise(store: AttackStore, split: str) -> list[AttackSummary]:
    """What is to be shown of each recipe that has finished shards on `split`, in the order in which they were begun.

    Raises:
        ArtifactError: a shard is missing or altered.
    """
    parameters = {key.recipe: record.parameters for key, record in store.records().items() if key.split == split}
    twins = read_clean(store.folder, split)
    return [_summary(store, split, recipe, parameters[recipe], twins) for recipe in store.recipes(split)]


def _summary(
    store: AttackStore, split: str, recipe: str, parameters: Mapping[str, object], twins: CleanTwins | None
) -> AttackSummary:
    norm = parameters.get("norm")
    images = fooled = reached = forwards = gradients = 0
    spreads = {name: Spread() for name in NORMS}
    fooling = Spread()  # distances of those that fooled, in the recipe's own norm
    own = str(norm) if norm in NORMS else "l2"
    examples: list[Example] = []
    for shard in store.read(split, recipe):
        crafted = shard.crafted
        images += len(shard.ids)
        fooled += int(crafted.fooled.sum())
        reached += int(crafted.reached.sum())
        forwards += int(crafted.forwards.sum())
        gradients += int(crafted.gradients.sum())
        counted = crafted.fooled if norm is not None else np.ones_like(crafted.fooled)
        for name, spread in spreads.items():
            spread.add(getattr(crafted, name)[counted])
        fooling.add(getattr(crafted, own)[crafted.fooled])
        if twins is not None:
            examples += _examples(shard, twins)
    examples.sort(key=lambda example: not example.fooled)  # stable: else in the order of the store
    figures = AttackFigures(
        recipe,
        images,
        fooled / images,
        reached / images,
        **{name: spread.quantile(0.5) for name, spread in spreads.items()},
        forwards=forwards / images,
        gradients=gradients / images,
    )
    return AttackSummary(figures, parameters, _curve(own, fooling, images), examples[:SHOWN])


def _curve(norm: str, fooling: Spread, images: int) -> SuccessCurve:
    distances, counts = fooling.cumulative()
    if len(distances) > CURVE_POINTS:
        places = np.unique(np.linspace(0, len(distances) - 1, CURVE_POINTS).round().astype(int))
        distances, counts = distances[places], counts[places]
    return SuccessCurve(norm, distances, counts / images)


def _examples(shard: Shard, twins: CleanTwins) -> list[Example]:
    """The images of a shard whose clean twins were kept."""
    _, places, of_twins = np.intersect1d(shard.ids, twins.ids, return_indices=True)
    names = twins.class_names
    return [
        Example(
            int(shard.ids[place]), twins.pixels[twin], shard.crafted.pixels[place].copy(),
            names[shard.labels[place]], names[shard.crafted.predicted[place]], bool(shard.crafted.fooled[place]),
        )
        for place, twin in sorted(zip(places, of_twins, strict=True))
    ]  # fmt: skip
