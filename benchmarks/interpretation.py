"""What is said of paths, held against the bars: combinations, causes, correction, and how long a person waits.

    python -m benchmarks.interpretation [--bundle DIR ...] [--attacks DIR] [--data-dir DIR] [--quick] [--times]
                                        [--json FILE]

Without a bundle (and with --quick) only times are measured, on fresh weights: they do not depend on them; with --times
only they too, of the first bundle. Bundles are networks of CIFAR-10, one for each seed; combinations are found on
training images and judged on the split fitting.
Attacks are what `pathguard attack --recipes cw,deepfool` wrote for the first bundle; correction is judged on its split
test, detected images alone, and on all clean images of that split. The share of detected images whose second likeliest
class is the right one stands beside it: minimal attacks leave much of that.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer

from attacks.store import AttackStore
from benchmarks.browser import browser, find_chromium
from benchmarks.overhead import fresh_bundle
from benchmarks.report import Row, print_rows, write_rows
from benchmarks.timing import interleaved
from detector.batches import to_tensor
from detector.bundle import Bundle
from detector.datasets import ImageSet, Splits, load_splits
from detector.errors import ArtifactError
from detector.images import Pixels, encode_png
from detector.interpretation.atlas import make_atlas, purest_of_each_class
from detector.interpretation.atlas_page import write_atlas
from detector.interpretation.closing import close_combinations
from detector.interpretation.concepts import Cut, find_combinations, judge_combinations, nmf_parts
from detector.interpretation.explanation import Explainer
from detector.network.decouple import GatedNet
from detector.paths.encoder import encode, encode_set
from detector.paths.path_encoding import PathEncoding
from detector.scoring.detector import Detector
from detector.stages import probe_images
from service.config import UiConfig
from service.ui.page_server import PageServer
from service.ui.recent import RecentVerdicts

PURER_THAN_SINGLE, PURER_THAN_RANDOM = 10.0, 25.0
CLOSING_RATIO = 5.0
RESTORED, CHANGED = 50.0, 1.0
EXPLAIN_MS, ATLAS_SECONDS, PAGE_SECONDS = 50.0, 300.0, 1.0
MINIMAL = ("cw", "deepfool")
_BATCH = 100


def main(
    bundle: Annotated[list[Path] | None, typer.Option(help="Bundles of CIFAR-10, one a seed.")] = None,
    attacks: Annotated[Path | None, typer.Option(help="Attacks by cw and deepfool on the first bundle.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where CIFAR-10 lies.")] = None,
    quick: Annotated[bool, typer.Option(help="Times alone, on fresh weights; under a minute.")] = False,
    times: Annotated[bool, typer.Option("--times", help="Times alone, of the first bundle.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    bundles = [] if quick else [Bundle(folder) for folder in bundle or []]
    rows: list[Row] = []
    splits = None
    if bundles:
        splits = load_splits(bundles[0].manifest.network.data, data_dir)
    if splits is not None and not times:
        for seed, opened in enumerate(bundles):
            rows += list(_combination_rows(combination_figures(seen_paths(opened, splits), seed), seed))
        rows += list(_correction_rows(bundles[0], splits, attacks))
    else:
        rows += _unmeasured()
    rows += list(_waiting_rows(bundles[0] if bundles else None, splits, quick))
    print_rows("interpretation, one thread of torch", rows)
    if json is not None:
        write_rows(json, rows)


@dataclass(frozen=True, slots=True)
class CombinationFigures:
    """What the purest combination of each class is worth, means over the classes, in points of a hundred.

    Attributes:
        combinations: how many are shared by an image that they were not found on.
        over_single: purity less that of their best filter alone.
        over_random: purity less that of random ones of their size.
        own: fall of the accuracy of their class when they are closed.
        others: the mean fall of the other classes.
    """

    combinations: int
    over_single: float
    over_random: float
    own: float
    others: float


@dataclass(frozen=True, slots=True)
class SeenPaths:
    """A network and its paths: of the images that combinations are found on, and of those they are judged on."""

    network: GatedNet
    found: PathEncoding
    found_labels: npt.NDArray[np.int64]
    path: PathEncoding
    judged: ImageSet


def seen_paths(bundle: Bundle, splits: Splits) -> SeenPaths:
    """Training images that a probe is fitted on, and the split fitting."""
    network, fitted, judged = bundle.network(), probe_images(splits.train), splits.fitting
    found, path = (
        PathEncoding.stacked([part.path for part in encode_set(network, images)]) for images in (fitted, judged)
    )
    return SeenPaths(network, found, fitted.labels, path, judged)


def combination_figures(seen: SeenPaths, seed: int, cut: Cut = nmf_parts) -> CombinationFigures:
    """Combinations are found and chosen on some images, and judged on others.

    Args:
        seen: a network and its paths.
        seed: of the cut and of the random combinations.
        cut: what groups the filters of a class.

    Raises:
        ArtifactError: no combination is shared by an image that is judged.
    """
    found, path, judged = seen.found, seen.path, seen.judged
    combinations = find_combinations(found, seen.found_labels, len(judged.class_names), seed=seed, cut=cut)
    chosen = [
        one.combination
        for one in purest_of_each_class(judge_combinations(combinations, found, seen.found_labels, seed))
    ]
    purities = [one for one in judge_combinations(chosen, path, judged.labels, seed) if not math.isnan(one.purity)]
    if not purities:
        raise ArtifactError("expected combinations that images of the split fitting share, got none")
    closings = close_combinations(seen.network, judged, [one.combination for one in purities])
    return CombinationFigures(
        combinations=len(purities),
        over_single=100 * float(np.mean([one.purity - one.single for one in purities])),
        over_random=100 * float(np.mean([one.purity - one.random for one in purities])),
        own=100 * float(np.nanmean([one.own for one in closings])),
        others=100 * float(np.nanmean([one.others for one in closings])),
    )


def _combination_rows(found: CombinationFigures, seed: int) -> Iterator[Row]:
    what = f"seed {seed}, {found.combinations} combinations"
    yield Row(
        figure=f"{what}: purer than their best filter alone, points", value=found.over_single, bar=PURER_THAN_SINGLE,
        at_most=False,
    )  # fmt: skip
    yield Row(
        figure=f"{what}: purer than random ones of their size, points", value=found.over_random,
        bar=PURER_THAN_RANDOM, at_most=False,
    )  # fmt: skip
    yield Row(figure=f"{what}: closed, accuracy of the class falls by, points", value=found.own)
    yield Row(figure=f"{what}: closed, accuracy of the others falls by, points", value=found.others)
    yield Row(
        figure=f"{what}: closed, the class loses times as much",
        value=found.own / found.others if found.others > 0 else None,
        bar=CLOSING_RATIO,
        at_most=False,
    )


def _correction_rows(bundle: Bundle, splits: Splits, folder: Path | None) -> Iterator[Row]:
    """What becomes of detected images, and of clean ones, of the split test."""
    if not bundle.has_usual_paths or bundle.manifest.detector is None:
        yield from _unmeasured_correction()
        return
    detector = Detector(bundle)
    rate = detector.max_false_alarm_rate
    if folder is None:
        yield from _unmeasured_correction()[:-1]
    else:
        store = AttackStore(folder)
        for recipe in MINIMAL:
            parts = [
                (shard.crafted.pixels[shard.crafted.fooled], shard.labels[shard.crafted.fooled])
                for shard in store.read("test", recipe)
            ]
            pixels, labels = (np.concatenate(group) for group in zip(*parts, strict=True))
            restored, second = _restored(detector, pixels, labels, rate)
            yield Row(
                figure=f"right label restored, % of detected {recipe} images ({len(restored)} of {len(labels)})",
                value=100 * float(restored.mean()) if len(restored) else None,
                bar=RESTORED,
                at_most=False,
            )
            yield Row(
                figure=f"their second likeliest class is right, % ({recipe})",
                value=100 * float(second.mean()) if len(second) else None,
            )
    yield Row(
        figure=f"labels changed, % of clean images ({len(splits.test)}, rate {rate:g})",
        value=100 * _changed(detector, splits.test, rate),
        bar=CHANGED,
    )


def _restored(
    detector: Detector, pixels: Pixels, labels: npt.NDArray[np.int64], rate: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Of each detected image: whether its right label is restored, and whether its second likeliest class is right."""
    right, second = [np.empty(0, np.bool_)], [np.empty(0, np.bool_)]
    for start in range(0, len(pixels), _BATCH):
        batch, wanted = pixels[start : start + _BATCH], labels[start : start + _BATCH]
        said = detector.detect(batch)
        flagged = said.p_values <= rate
        if flagged.any():
            restored = detector.restore(batch[flagged], said.probabilities[flagged], said.p_values[flagged])
            right.append(restored == wanted[flagged])
            second.append(np.argsort(-said.probabilities[flagged], axis=1)[:, 1] == wanted[flagged])
    return np.concatenate(right), np.concatenate(second)


def _changed(detector: Detector, images: ImageSet, rate: float) -> float:
    """Share of clean images that are flagged and given another label, in [0, 1]."""
    changed = 0
    for start in range(0, len(images), _BATCH):
        batch = images.pixels(slice(start, start + _BATCH))
        said = detector.detect(batch)
        flagged = said.p_values <= rate
        if flagged.any():
            restored = detector.restore(batch[flagged], said.probabilities[flagged], said.p_values[flagged])
            changed += int((restored != said.labels[flagged]).sum())
    return changed / len(images)


def _waiting_rows(bundle: Bundle | None, splits: Splits | None, quick: bool) -> Iterator[Row]:
    """How long an explanation, the atlas and the page take."""
    with tempfile.TemporaryDirectory() as folder:
        ready = bundle is not None and bundle.has_usual_paths and bundle.manifest.detector is not None
        opened = bundle if ready else fresh_bundle("resnet20", Path(folder), with_statistics=True)
        assert opened is not None
        spec = opened.manifest.network.spec
        shape = (spec.height, spec.width, spec.channels)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        yield _explain_row(Explainer(opened), pixels, 20 if quick else 200)
        yield _page_row(opened, pixels)
    name = "the atlas of 10,000 images, s"
    if bundle is None or splits is None:
        yield Row(figure=name, value=None, bar=ATLAS_SECONDS)
        return
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_atlas(Path(folder) / "index.html", make_atlas(bundle, splits, {}))
        yield Row(figure=name, value=time.perf_counter() - began, bar=ATLAS_SECONDS)


def _explain_row(explainer: Explainer, pixels: Pixels, repetitions: int) -> Row:
    image = to_tensor(pixels[None], torch.device("cpu"))
    calls: list[Callable[[], object]] = [
        lambda: explainer.explain(pixels),
        lambda: encode(explainer.network, image),
    ]
    explained, forward = interleaved(calls, repetitions)
    return Row(figure="resnet20: explanation beyond the forward pass, ms", value=1000 * (explained - forward),
               bar=EXPLAIN_MS)  # fmt: skip


def _page_row(bundle: Bundle, pixels: Pixels) -> Row:
    """From dropping an image to its verdict on the page, the slowest of some; the first drop loads the model."""
    program = find_chromium()
    name = "the page: from dropping an image to its verdict, s"
    if program is None:
        return Row(figure=name, value=None, bar=PAGE_SECONDS)
    detector = Detector(bundle)
    server = PageServer(UiConfig(port=0), 10**6, lambda: detector, RecentVerdicts())
    waited = []
    try:
        with browser(program) as (page,):
            page.show(f"http://127.0.0.1:{server.port}/")
            page.wait("document.getElementById('model').textContent.includes('classes')")
            for turn in range(5):
                page.drop(f"{turn}.png", encode_png(pixels))
                waited.append(page.wait(f"document.querySelector('.result h2')?.textContent.startsWith('{turn}.png')"))
    finally:
        server.close()
    return Row(figure=name, value=max(waited), bar=PAGE_SECONDS)


def _unmeasured() -> list[Row]:
    return [
        Row(figure="combinations purer than their best filter alone, points", value=None, bar=PURER_THAN_SINGLE,
            at_most=False),
        Row(figure="combinations purer than random ones of their size, points", value=None, bar=PURER_THAN_RANDOM,
            at_most=False),
        Row(figure="closed, the class loses times as much", value=None, bar=CLOSING_RATIO, at_most=False),
        *_unmeasured_correction(),
    ]  # fmt: skip


def _unmeasured_correction() -> list[Row]:
    return [
        *(
            Row(figure=f"right label restored, % of detected {recipe} images", value=None, bar=RESTORED, at_most=False)
            for recipe in MINIMAL
        ),
        Row(figure="labels changed, % of clean images", value=None, bar=CHANGED),
    ]


if __name__ == "__main__":
    typer.run(main)
