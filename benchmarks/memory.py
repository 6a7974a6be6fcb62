"""Memory of attacking: does it grow with the number of attacked images?

    python -m benchmarks.memory [--quick] [--json FILE]

Crafts FGSM on random images with a fresh ResNet-8, once for few and once for many, each in a process of its own, and
compares their peak resident memory. Images come from a generator, so that none of it is the data set's own.
"""

import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.report import Row, print_rows, write_rows

FEW, MANY, QUICK_MANY = 1_000, 50_000, 10_000


def main(
    quick: Annotated[bool, typer.Option(help="Under a minute: ten times as many images instead of fifty.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
    images: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure and print; with `--images`, be one of the two processes."""
    if images is not None:
        print(_peak_megabytes(images))
        return
    many = QUICK_MANY if quick else MANY
    peaks = {count: _in_own_process(count) for count in (FEW, many)}
    rows = [Row(figure=f"peak memory, {count} attacked images, MB", value=peak) for count, peak in peaks.items()]
    rows.append(Row(figure=f"peak memory, {many} / {FEW} images", value=peaks[many] / peaks[FEW], bar=1.1))
    print_rows("FGSM, fresh ResNet-8, 28 x 28 grey, shards of 250", rows)
    if json is not None:
        write_rows(json, rows)


def _in_own_process(images: int) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", "--images", str(images)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_megabytes(images: int) -> float:
    from attacks.campaign import run_attacks
    from attacks.evidence import fooling_evidence
    from attacks.recipes import RECIPES
    from attacks.store import AttackStore, Origin
    from detector.batches import batches
    from detector.datasets import ImageSet, Indices
    from detector.decouple import decouple
    from detector.images import ImageSpec, Pixels
    from detector.networks import build_network

    def read(ids: Indices) -> Pixels:
        return np.stack([np.random.default_rng(i).integers(0, 256, (28, 28, 1), np.uint8) for i in ids])

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = decouple(build_network("resnet8", 1, 2)).eval()
    spec = ImageSpec(28, 28, 1)
    chosen = ImageSet("random", np.zeros(images, np.int64), np.arange(images), ("a", "b"), spec, "random", read)
    with torch.inference_mode():  # what a fresh network says is right: all images are then worth attacking
        said = [network(pixels).argmax(dim=1).numpy() for _, pixels in batches(chosen, 250, torch.device("cpu"))]
    chosen = replace(chosen, labels=np.concatenate(said))
    with tempfile.TemporaryDirectory() as folder:
        with AttackStore.writing(Path(folder), Origin("none", "random", 0, 250)) as store:
            run_attacks(network, {"test": chosen}, [RECIPES["fgsm"]], store, lambda _: None)
        for evidence in fooling_evidence(network, AttackStore(Path(folder)), "test", "fgsm"):
            del evidence
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    typer.run(main)
