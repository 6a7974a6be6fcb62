"""How fast attacks are made: beside a plain loop over torchattacks, in memory, and a whole suite of them.

    python -m benchmarks.attack_throughput --weights FILE --data-dir DIR [--bundle DIR] [--full] [--quick] [--json FILE]

**Speed.** Same process, same published network, same images, same batches; ours and theirs take turns on each batch.
The plain loop is what a user of torchattacks writes: make the attack once, call it on each batch, keep what it gives.
torchattacks' C&W has no search for its constant, so the loop runs it for five constants with as many steps as ours
takes for each of its five, and keeps for each image the nearest that fools; C&W with one constant on both sides stands
beside it. Step for step ours is slower, because it looks at every image by itself and only counts what survives
rounding, and it comes much nearer; the bar on C&W therefore stands on one search of ours against their whole loop,
which it counts for only as long as the table shows success and distance no worse than theirs. What fooled, and how far
it is, is counted by one function for both, before and after rounding to 8 bits: times are only worth comparing beside
it.

**Memory** is `benchmarks.memory`, in a process of its own.

**The suite `standard`** on 2,000 images: each member runs on as many images as take some seconds, at most a shard, and
its time is scaled to its number of images; `--full` runs all of it instead. `--bundle` takes a decoupled network, which
is what the command `pathguard attack` attacks, instead of the published one.
"""

import json as json_format
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torchattacks
import typer
from torch import Tensor, nn

from attacks.craft import craft
from attacks.problem import rounded
from attacks.recipes import RECIPES, Recipe
from attacks.suites import SUITES
from benchmarks.published import load_published, right_images
from benchmarks.report import Row, print_rows, write_rows
from detector.batches import to_tensor
from detector.bundle import Bundle
from detector.datasets import ImageSet
from pathguard.tables import Figure, show

Attack = Callable[[Tensor, Tensor], Tensor]
CONSTANTS = (0.1, 0.5, 1.0, 5.0, 10.0, 50.0)
SUITE_IMAGES, SHARD = 2000, 250
SECONDS_A_MEMBER = 20.0


@dataclass(frozen=True, slots=True)
class Contest:
    """One of our recipes and the loop over torchattacks that does the same.

    Attributes:
        name: for the table.
        recipe: ours.
        loop: network -> what their loop does with one batch.
        images: how many images both attack.
        bar: how many times as many images a second ours is to make; None where it stands for comparison.
    """

    name: str
    recipe: Recipe
    loop: Callable[[nn.Module], Attack]
    images: int
    bar: float | None


@dataclass(slots=True)
class Side:
    """What one side of a contest has made so far.

    Attributes:
        seconds: for all images.
        images: how many.
        fooled: how many of them fool the network as they come, in floating point.
        survived: how many do after rounding to 8 bits.
        distances: L2 lengths of the rounded ones that do.
    """

    seconds: float = 0.0
    images: int = 0
    fooled: int = 0
    survived: int = 0
    distances: list[float] | None = None

    def judge(self, network: nn.Module, clean: Tensor, labels: Tensor, made: Tensor, seconds: float) -> None:
        """Count one batch."""
        stored = rounded(made)
        with torch.no_grad():
            self.fooled += int((network(made).argmax(dim=1) != labels).sum())
            survived = network(stored).argmax(dim=1) != labels
        self.survived += int(survived.sum())
        lengths = (stored - clean).flatten(1).norm(dim=1)[survived].tolist()
        self.distances = (self.distances or []) + lengths
        self.images += len(clean)
        self.seconds += seconds

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds

    def line(self, name: str) -> dict[str, object]:
        """For the table."""
        median = float(np.median(self.distances)) if self.distances else math.nan
        return {
            "": name,
            "images/s": Figure(f"{self.rate:.2f}"),
            "fooled, before rounding": Figure(f"{self.fooled / self.images:.1%}"),
            "after it": Figure(f"{self.survived / self.images:.1%}"),
            "median L2 of those": Figure(f"{median:.3f}"),
        }


def contests(quick: bool) -> list[Contest]:
    """What is raced: PGD, C&W with and without a search for its constant, and DeepFool."""
    pgd, cw, deepfool = RECIPES["pgd"], RECIPES["cw"], RECIPES["deepfool"]
    steps, searches = int(cw.settings["steps"]), int(cw.settings["searches"])
    if quick:
        steps, searches = 10, 2
    cw = replace(cw, settings={**cw.settings, "steps": steps, "searches": searches})
    one = replace(cw, settings={**cw.settings, "searches": 1})
    brief = replace(cw, settings={**cw.settings, "steps": 40, "searches": 1})
    few = 10 if quick else 100
    return [
        Contest("PGD, 10 steps, 8/255", pgd, _pgd_loop(pgd), 20 if quick else 400, 1.5),
        Contest("C&W, one search of 40 steps, theirs 5 constants of 50", brief, _cw_loop(CONSTANTS[:5], 50), few, 1.5),
        Contest(f"C&W, {searches} constants of {steps} steps", cw, _cw_loop(CONSTANTS[:searches], steps), few, None),
        Contest(f"C&W, one constant of {steps} steps", one, _cw_loop((1.0,), steps), few, None),
        Contest("DeepFool, up to 50 steps", deepfool, _deepfool_loop(int(deepfool.settings["steps"])), few, 5.0),
    ]


def _pgd_loop(recipe: Recipe) -> Callable[[nn.Module], Attack]:
    def loop(network: nn.Module) -> Attack:
        attack: Attack = torchattacks.PGD(network, eps=recipe.budget, alpha=(recipe.budget or 0) / 4, steps=10)
        return attack

    return loop


def _deepfool_loop(steps: int) -> Callable[[nn.Module], Attack]:
    def loop(network: nn.Module) -> Attack:
        attack: Attack = torchattacks.DeepFool(network, steps=steps, overshoot=0.02)
        return attack

    return loop


def _cw_loop(constants: Sequence[float], steps: int) -> Callable[[nn.Module], Attack]:
    def loop(network: nn.Module) -> Attack:
        members = [torchattacks.CW(network, c=constant, steps=steps, lr=0.01) for constant in constants]

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            best, nearest = images.clone(), torch.full((len(images),), math.inf)
            for member in members:
                made = member(images, labels)
                with torch.no_grad():
                    distance = (made - images).flatten(1).norm(dim=1)
                    better = (network(made).argmax(dim=1) != labels) & (distance < nearest)
                best[better], nearest[better] = made[better], distance[better]
            return best

        return attack

    return loop


def main(
    weights: Annotated[Path, typer.Option(help="Published weights, such as resnet20-12fca82f.th.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where CIFAR-10 lies; else cache or download.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="A decoupled network for the suite.")] = None,
    batch: Annotated[int, typer.Option(help="Images in a batch, on both sides.", min=1)] = 100,
    full: Annotated[bool, typer.Option(help="Run the suite whole instead of a share of it.")] = False,
    quick: Annotated[bool, typer.Option(help="Under a minute: few images and steps; no suite and no memory.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Measure and print."""
    network = load_published(weights)
    raced = contests(quick)
    images = right_images(network, data_dir, max(contest.images for contest in raced))
    rows: list[Row] = []
    lines: list[dict[str, object]] = []
    for contest in raced:
        ours, theirs = race(contest, network, images, batch)
        lines += [ours.line(f"{contest.name}: ours"), theirs.line(f"{contest.name}: torchattacks")]
        ratio = ours.rate / theirs.rate
        rows.append(
            Row(figure=f"{contest.name}: images/s, ours / plain loop", value=ratio, bar=contest.bar, at_most=False)
        )
    if not quick:
        rows += memory_rows()
        attacked = network if bundle is None else Bundle(bundle).network()
        backbone = network if bundle is None else Bundle(bundle).backbone()
        members = [
            replace(recipe, images=min(recipe.images or SUITE_IMAGES, SUITE_IMAGES))
            for recipe in SUITES["standard"].recipes()
        ]
        found = right_images(attacked, data_dir, SUITE_IMAGES if full else SHARD)
        rows += suite_rows(attacked, backbone, found, members, full)
    show(f"{weights.name}, batches of {batch}", lines)
    print_rows("attacks: speed, memory, and a whole suite", rows)
    if json is not None:
        write_rows(json, rows)


def race(contest: Contest, network: nn.Module, images: ImageSet, batch: int) -> tuple[Side, Side]:
    """Attack the same batches in turns."""
    attack = contest.loop(network)
    ours, theirs = Side(), Side()
    for place, start in enumerate(range(0, contest.images, batch)):
        part = images.subset(slice(start, min(start + batch, contest.images)))
        clean, labels = to_tensor(part.pixels(slice(None)), torch.device("cpu")), torch.from_numpy(part.labels)

        def run_ours(part: ImageSet = part, clean: Tensor = clean, labels: Tensor = labels) -> None:
            began = time.perf_counter()
            crafted = craft(contest.recipe, network, clean, labels, ids=part.ids)
            seconds = time.perf_counter() - began
            ours.judge(network, clean, labels, to_tensor(crafted.pixels, clean.device), seconds)

        def run_theirs(clean: Tensor = clean, labels: Tensor = labels) -> None:
            torch.manual_seed(0)
            began = time.perf_counter()
            made = attack(clean, labels)
            theirs.judge(network, clean, labels, made.detach(), time.perf_counter() - began)

        for run in (run_ours, run_theirs) if place % 2 == 0 else (run_theirs, run_ours):
            run()
    return ours, theirs


def memory_rows() -> list[Row]:
    """The figures of `benchmarks.memory`, measured in a process that has attacked nothing before."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.json"
        command = [sys.executable, "-m", "benchmarks.memory", "--json", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [
            Row(figure=f"memory: {row['figure']}", value=row["value"], bar=row["bar"])
            for row in json_format.loads(file.read_bytes())
        ]


def suite_rows(
    network: nn.Module, backbone: nn.Module, images: ImageSet, members: Sequence[Recipe], full: bool
) -> list[Row]:
    """Minutes that the members take, each on its own number of images."""
    lines: list[dict[str, object]] = []
    total = cpu = 0.0
    for recipe in members:
        wanted = recipe.images or len(images)
        measured, seconds, busy = measure_member(recipe, network, backbone, images, wanted if full else None)
        total += seconds / measured * wanted
        cpu += busy / measured * wanted
        lines.append({
            "recipe": recipe.name, "images": wanted, "measured on": measured,
            "s an image": Figure(f"{seconds / measured:.3f}"),
            "minutes": Figure(f"{seconds / measured * wanted / 60:.2f}"),
        })  # fmt: skip
        print(f"{recipe.name}: {seconds / measured:.3f} s an image", flush=True)
    show(f"the suite standard on {SUITE_IMAGES} images", lines)
    how = "run whole" if full else "from measured shares"
    cores = torch.get_num_threads()
    return [
        Row(figure=f"suite standard on {SUITE_IMAGES} images, {how}: minutes", value=total / 60, bar=60.0),
        Row(figure=f"the same, processor minutes / {cores} threads", value=cpu / 60 / cores),
    ]


def measure_member(
    recipe: Recipe, network: nn.Module, backbone: nn.Module, images: ImageSet, whole: int | None
) -> tuple[int, float, float]:
    """Images attacked, seconds, and seconds of processor time, of one member.

    Args:
        recipe: the member.
        network: the attacked one.
        backbone: for transfer attacks.
        images: to take from.
        whole: attack so many, shard by shard; None for as many as take some seconds.
    """

    def attack(part: ImageSet) -> tuple[float, float]:
        clean, labels = to_tensor(part.pixels(slice(None)), torch.device("cpu")), torch.from_numpy(part.labels)
        began, busy = time.perf_counter(), time.process_time()
        # Noise takes its lengths from what an attack stored; how long they are does not change what it costs.
        lengths = np.ones(len(clean), np.float32) if recipe.matches else None
        craft(recipe, network, clean, labels, ids=part.ids, backbone=backbone, lengths=lengths)
        return time.perf_counter() - began, time.process_time() - busy

    if whole is not None:
        shards = [images.subset(slice(start, min(start + SHARD, whole))) for start in range(0, whole, SHARD)]
        times = [attack(shard) for shard in shards]
        return whole, sum(seconds for seconds, _ in times), sum(busy for _, busy in times)
    count = 2
    while True:
        seconds, busy = attack(images.first(count))
        if count == SHARD or seconds * 5 > SECONDS_A_MEMBER:
            return count, seconds, busy
        count = min(5 * count, SHARD)


if __name__ == "__main__":
    typer.run(main)
