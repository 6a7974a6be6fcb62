"""A bundle for serving alone: without its backbone, and run without the filters that no image opened."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attacks.evidence import fooling_evidence
from attacks.store import AttackStore
from detector.batches import best_device
from detector.bundle import Bundle, add_compaction, check_compacts_into
from detector.datasets import Splits
from detector.engines.compaction import compacted, floats_of
from detector.engines.program import program_of
from detector.errors import ArtifactError
from detector.model_card import write_card
from detector.paths.encoder import encode_set
from detector.stages import check_fits


@dataclass(frozen=True, slots=True)
class CompactionFigures:
    """What compaction found and left.

    Attributes:
        images: clean images of the training and fitting splits that were looked at.
        attacked_images: images of stored attacks that were.
        filters: gated filters.
        never_open: of them, closed on all of these images.
        never_closed: of them, open on all.
        weights: numbers in the folded network.
        weights_left: those that serving computes with.
        megabytes: of the bundle's parts.
        megabytes_left: the same after.
    """

    images: int
    attacked_images: int
    filters: int
    never_open: int
    never_closed: int
    weights: int
    weights_left: int
    megabytes: float
    megabytes_left: float


def make_compact(
    bundle: Bundle, splits: Splits, store: AttackStore | None, folder: Path, limit: int | None = None
) -> tuple[Bundle, CompactionFigures]:
    """Write a compacted copy of `bundle` to `folder`.

    Args:
        bundle: with a detector.
        splits: its data; the training and the fitting split are looked at.
        store: attacks on its network, of the fitting split; None for clean images alone.
        folder: where; a new one, or one with an earlier compaction of the same network.
        limit: at most this many images of each split; None for all.

    Raises:
        ArtifactError: the bundle has no detector yet, the folder holds another bundle, or the attacks are on another
            network.
        DataError: the data does not fit.
        EngineError: the network has a part that only the masked engine knows.
        RequestError: the folder is the bundle's own.
    """
    check_compacts_into(bundle, folder)
    check_fits(bundle, splits.train)
    network = bundle.network().to(best_device())
    filters = sum(network.layers.values())
    opened, closed = np.zeros(filters, np.bool_), np.zeros(filters, np.bool_)
    images, attacked = 0, 0
    for split in (splits.train, splits.fitting):
        for evidence in encode_set(network, split.first(limit)):
            opened |= evidence.path.bits.any(axis=0)
            closed |= ~evidence.path.bits.all(axis=0)
            images += len(evidence)
    if store is not None:
        if store.origin.network != bundle.network_digest:
            raise ArtifactError(f"expected attacks on the network of {bundle.folder}, got others")
        for recipe in store.attacks("fitting"):
            for evidence in fooling_evidence(network, store, "fitting", recipe):
                opened |= evidence.path.bits.any(axis=0)
                closed |= ~evidence.path.bits.all(axis=0)
                attacked += len(evidence)
    program = program_of(network, bundle.manifest.network.spec)
    training = {"images": images, "attacked_images": attacked, "never_open": int((~opened).sum())}
    grown = add_compaction(bundle, folder, ~opened, training)
    write_card(grown)
    return grown, CompactionFigures(
        images=images,
        attacked_images=attacked,
        filters=filters,
        never_open=int((~opened).sum()),
        never_closed=int((~closed).sum()),
        weights=floats_of(program),
        weights_left=floats_of(compacted(program, ~opened)),
        megabytes=sum(bundle.manifest.sizes.values()) / 1e6,
        megabytes_left=sum(grown.manifest.sizes.values()) / 1e6,
    )
