"""Memory of attacking: does it grow with the number of attacked images?

    python -m benchmarks.memory [--quick] [--json FILE]

Crafts FGSM on random images with a fresh ResNet-8, reads their paths back and sums them up for a report, and compares
the resident memory after the first images with that after the last, in one process. Images come from a generator, so
that none of it is the data set's own. The peak is printed too: how the C library's allocator fragments in the first
passes differs from run to run by a factor of up to two, before the first image is attacked.
"""

import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from attacks.campaign import Campaign, run_attacks
from attacks.evidence import fooling_evidence
from attacks.recipes import RECIPES
from attacks.report import summarise
from attacks.store import AttackStore, Origin
from benchmarks.report import Row, print_rows, write_rows
from detector.batches import batches
from detector.datasets import ImageSet, Indices
from detector.images import ImageSpec, Pixels
from detector.network.decouple import decouple
from detector.network.networks import build_network

FEW, MANY, QUICK_MANY, SHARD = 1_000, 50_000, 10_000, 250


def main(
    quick: Annotated[bool, typer.Option(help="Under a minute: ten times as many images instead of fifty.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    many = QUICK_MANY if quick else MANY
    early, late = _resident_after(FEW, many)
    rows = [
        Row(figure=f"resident memory after {FEW} attacked images, MB", value=early),
        Row(figure=f"after {many} and the reading of their paths and their report, MB", value=late),
        Row(figure=f"after {many} / after {FEW}", value=late / early, bar=1.1),
        Row(figure="peak of the process, MB", value=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    ]
    print_rows(f"FGSM, fresh ResNet-8, 28 x 28 grey, shards of {SHARD}", rows)
    if json is not None:
        write_rows(json, rows)


def _resident_after(few: int, many: int) -> tuple[float, float]:
    """Megabytes after `few` attacked images and at the end."""
    network = decouple(build_network("resnet8", 1, 2)).eval()
    spec = ImageSpec(28, 28, 1)
    chosen = ImageSet("random", np.zeros(many, np.int64), np.arange(many), ("a", "b"), spec, "random", _noise)
    with torch.inference_mode():  # what a fresh network says is right: all images are then worth attacking
        said = [network(pixels).argmax(dim=1).numpy() for _, pixels in batches(chosen, SHARD, torch.device("cpu"))]
    chosen = replace(chosen, labels=np.concatenate(said))
    after: dict[int, float] = {}

    def note(state: Campaign) -> None:
        if state.done * SHARD == few:
            after[few] = _resident_megabytes()

    with tempfile.TemporaryDirectory() as folder:
        with AttackStore.writing(Path(folder), Origin("none", "random", 0, SHARD)) as store:
            run_attacks(network, {"test": chosen}, [RECIPES["fgsm"]], store, note)
        for evidence in fooling_evidence(network, AttackStore(Path(folder)), "test", "fgsm"):
            del evidence
        summarise(AttackStore(Path(folder)), "test")
    return after[few], _resident_megabytes()


def _noise(ids: Indices) -> Pixels:
    return np.stack([np.random.default_rng(i).integers(0, 256, (28, 28, 1), np.uint8) for i in ids])


def _resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    typer.run(main)
