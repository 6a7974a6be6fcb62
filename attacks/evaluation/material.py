"""Everything that detectors are judged by, seen once through the network: clean, attacked, noisy, foreign images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits

from attacks.corruptions import CORRUPTIONS
from attacks.draws import seed_of
from attacks.evaluation.paths import SEES
from attacks.evaluation.protocol import Protocol
from attacks.noise import noise_of, with_noise
from attacks.store import AttackStore
from detector.baselines.baseline import Baseline, Observed
from detector.batches import device_of, to_pixels, to_tensor
from detector.datasets import ImageSet, Splits
from detector.images import ImageSpec, Pixels
from detector.network.decouple import GatedNet

CLEAN = "clean"
FITTING, CALIBRATION, TEST = "fitting", "calibration", "test"
CHUNK = 250
DIGITS = "digits"


@dataclass(frozen=True, slots=True)
class SetKey:
    """Which images.

    Attributes:
        split: of their source images; `foreign` for those of another data set.
        name: `clean`, or what was made of them: the attack, `NAME failed`, `noise-NAME`, `CORRUPTION-SEVERITY`.
    """

    split: str
    name: str


@dataclass(frozen=True, slots=True)
class Material:
    """What was seen of all images.

    Attributes:
        seen: what a detector looks at -> images -> rows.
        right: images -> whether the network's label is that of the source image, `(images,)`.
        labels: images -> the network's label, `int64`, `(images,)`.
        attacks: the attacks with successes on the test split, in the store's order.
        norms: attack, of either split -> the norm that it keeps small.
        images: how many test images each attack was given.
        fooled: with how many of them it fooled the network; no more are looked at than the protocol allows.
        right_clean: share of clean test images that the network gets right.
    """

    seen: Mapping[str, Mapping[SetKey, Observed]]
    right: Mapping[SetKey, npt.NDArray[np.bool_]]
    labels: Mapping[SetKey, npt.NDArray[np.int64]]
    attacks: Sequence[str]
    norms: Mapping[str, str]
    images: Mapping[str, int]
    fooled: Mapping[str, int]
    right_clean: float

    def of(self, sees: str, key: SetKey) -> Observed | None:
        """What a detector that looks at `sees` saw of these images; None where there are none."""
        return self.seen[sees].get(key)


@dataclass(slots=True)
class _Pile:
    """Images of one set, on their way through the network."""

    key: SetKey
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    pixels: Pixels


@dataclass(slots=True)
class _Gathered:
    rows: list[npt.NDArray[np.float32]] = field(default_factory=list)
    ids: list[npt.NDArray[np.int64]] = field(default_factory=list)
    count: int = 0


def gather(
    network: GatedNet, splits: Splits, store: AttackStore, methods: Sequence[Baseline], protocol: Protocol, seed: int,
    foreign: ImageSet | None = None, calibrated: bool = False,
) -> Material:  # fmt: skip
    """Send every image of the protocol through the network once for each way of looking at it.

    Args:
        network: the bundle's, in evaluation mode.
        splits: the data.
        store: attacks on that network.
        methods: the detectors, ours among them; those that look at the same share it.
        protocol: how many images.
        seed: of noise and corruptions.
        foreign: images of another data set; None for scikit-learn's handwritten digits, or for none where these are the
            network's own.
        calibrated: whether other detectors than ours get a threshold, and look at calibration images.

    Raises:
        DataError: attacks are unfinished.
        ArtifactError: a shard is missing or altered.
    """
    observers = {method.sees: method for method in methods}
    limits = {sees: limit_of(method, protocol) for sees, method in observers.items()}
    gathered: dict[str, dict[SetKey, _Gathered]] = {sees: {} for sees in observers}
    right: dict[SetKey, list[npt.NDArray[np.bool_]]] = {}
    predicted: dict[SetKey, list[npt.NDArray[np.int64]]] = {}
    classes = len(splits.test.class_names)
    compared = {CLEAN, *store.attacks(FITTING), *store.attacks(TEST)}
    for pile in _piles(network, splits, store, protocol, seed, foreign):
        for start in range(0, len(pile.ids), CHUNK):
            part = slice(start, start + CHUNK)
            images = to_tensor(pile.pixels[part], device_of(network))
            for sees, method in observers.items():
                aside = pile.key.name not in compared or (pile.key.split == CALIBRATION and not calibrated)
                if sees != SEES and aside:
                    continue  # other detectors are compared by clean and attacked images
                into, limit = gathered[sees].setdefault(pile.key, _Gathered()), limits[sees]
                wanted = len(images) if limit is None else min(len(images), limit - into.count)
                if wanted <= 0:
                    continue
                rows = method.observe(images[:wanted])
                into.rows.append(rows)
                into.ids.append(pile.ids[part][:wanted])
                into.count += wanted
                if sees == SEES:
                    labels = rows[:, :classes].argmax(axis=1)
                    predicted.setdefault(pile.key, []).append(labels)
                    right.setdefault(pile.key, []).append(labels == pile.labels[part])
    seen = {
        sees: {key: Observed(np.concatenate(of.rows), np.concatenate(of.ids)) for key, of in sets.items() if of.rows}
        for sees, sets in gathered.items()
    }
    joined = {key: np.concatenate(parts) for key, parts in right.items()}
    succeeded = [name for name in store.attacks(TEST) if SetKey(TEST, name) in joined]
    parameters = {key.recipe: record.parameters for key, record in store.records().items()}
    norms = {name: str(parameters[name]["norm"]) for name in (*store.attacks(FITTING), *store.attacks(TEST))}
    given, fooled = store.counts(TEST)
    return Material(
        seen, joined, {key: np.concatenate(parts) for key, parts in predicted.items()}, succeeded, norms, given, fooled,
        float(joined[SetKey(TEST, CLEAN)].mean()),
    )  # fmt: skip


def limit_of(method: Baseline, protocol: Protocol) -> int | None:
    """How many images of a kind a detector looks at; None for all."""
    return None if method.images is None else min(method.images, protocol.costly_images)


def _piles(
    network: GatedNet, splits: Splits, store: AttackStore, protocol: Protocol, seed: int, foreign: ImageSet | None
) -> Iterator[_Pile]:
    for split, most in (
        (FITTING, protocol.fitting_images), (CALIBRATION, protocol.clean_images), (TEST, protocol.clean_images),
    ):  # fmt: skip
        images = splits.named(split).first(most)
        yield from _of_set(SetKey(split, CLEAN), images)
    for split, most in ((FITTING, protocol.fitting_images), (TEST, protocol.attacked_images)):
        store.check_finished(split)
        for name in store.attacks(split):
            yield from _of_attack(store, splits.named(split), split, name, most, network, seed)
    corrupted = splits.test.first(protocol.corrupted_images)
    pixels = corrupted.pixels(slice(None))
    seeds = [seed_of(seed, int(index)) for index in corrupted.ids]
    for name, corruption in CORRUPTIONS.items():
        for severity in protocol.severities:
            damaged = corruption(pixels, severity, seeds)
            yield _Pile(SetKey(TEST, f"{name}-{severity}"), corrupted.ids, corrupted.labels, damaged)
    if foreign is not None or splits.test.name != DIGITS:
        yield _foreign(foreign, splits.test.spec, protocol.foreign_images)


def _of_set(key: SetKey, images: ImageSet) -> Iterator[_Pile]:
    for start in range(0, len(images), CHUNK):
        part = images.subset(slice(start, start + CHUNK))
        yield _Pile(key, part.ids, part.labels, part.pixels(slice(None)))


def _of_attack(
    store: AttackStore, images: ImageSet, split: str, name: str, most: int, network: GatedNet, seed: int
) -> Iterator[_Pile]:
    """The attack's successes, and of test images its failures and noise as long as its successes' changes."""
    left = failed_left = most
    for shard in store.read(split, name):
        crafted = shard.crafted
        won, lost = np.flatnonzero(crafted.fooled)[:left], np.flatnonzero(~crafted.fooled)[:failed_left]
        left -= len(won)
        if len(won):
            yield _Pile(SetKey(split, name), shard.ids[won], shard.labels[won], crafted.pixels[won])
        if split != TEST:
            continue
        failed_left -= len(lost)
        if len(lost):
            yield _Pile(SetKey(split, f"{name} failed"), shard.ids[lost], shard.labels[lost], crafted.pixels[lost])
        if len(won):
            clean = to_tensor(images.read(shard.ids[won]), device_of(network))
            noise = noise_of(clean, [seed_of(seed, int(index)) for index in shard.ids[won]])
            noisy = with_noise(clean, noise, torch.from_numpy(crafted.l2[won]).to(clean))
            yield _Pile(SetKey(split, f"noise-{name}"), shard.ids[won], shard.labels[won], to_pixels(noisy))


def _foreign(foreign: ImageSet | None, spec: ImageSpec, count: int) -> _Pile:
    """Images that are of none of the network's classes, in the size and colours that it takes."""
    if foreign is None:
        pixels = np.round(load_digits().images[:count] * (255 / 16)).astype(np.uint8)[..., None]
    else:
        pixels = foreign.first(count).pixels(slice(None))
    fitted = np.stack([_as_spec(image, spec) for image in pixels])
    nowhere = np.full(len(fitted), -1, np.int64)
    return _Pile(SetKey("foreign", foreign.name if foreign is not None else DIGITS), nowhere, nowhere, fitted)


def _as_spec(image: Pixels, spec: ImageSpec) -> Pixels:
    opened = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    sized = opened.convert("L" if spec.channels == 1 else "RGB").resize(
        (spec.width, spec.height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(sized, np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
