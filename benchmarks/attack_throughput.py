"""How fast attacks are made: beside a plain loop over torchattacks, in memory, and a whole suite of them.

    python -m benchmarks.attack_throughput --weights FILE --data-dir DIR [--only NAMES] [--quick] [--json FILE]
    python -m benchmarks.attack_throughput --weights FILE --data-dir DIR --suite standard --images 2000 [--bundle DIR]

**Speed.** Same process, same published network, same images, same batches; ours and theirs take turns on each batch.
The plain loop is what a user of torchattacks writes: make the attack once, call it on each batch, keep what it gives.
torchattacks' C&W has no search for its constant; of those tried, 1 does best, and it leaves off after about ten of its
steps, as soon as the *sum* of its batch's losses grows, twice as far from the image as need be. The bar on C&W is
against that one, by a C&W of ours that is as short: four of Adam's steps, seven times as long as the recipe's. A race
has a figure only where our success and distance are no worse than theirs. The recipe as a user gets it stands beside
it, which comes much nearer and takes longer, against a loop over five constants and against the one. What fooled, and
how far it is, is counted by one function for both, before and after rounding to 8 bits, and so are forward passes.

**Memory** is `benchmarks.memory`, in a process of its own.

**The suite `standard`** on 2,000 images: each member runs on as many images as take some seconds, at most a shard, and
its time is scaled to its number of images. `--suite` runs a suite whole instead and nothing else, as `pathguard attack`
does (`benchmarks/attack_suite.py`); interrupted, it goes on where it stopped. `--bundle` takes a decoupled network,
which is what that command attacks, instead of the published one.
"""

import json as json_format
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from attacks.recipes import RECIPES, Recipe, Setting
from attacks.suites import SUITES, recipes_named
from benchmarks.attack_suite import BAR_MINUTES, SHARD, run_suite
from benchmarks.published import load_published, right_images
from benchmarks.report import Row, print_rows, write_rows
from detector.batches import to_tensor
from detector.bundle import Bundle
from detector.datasets import ImageSet
from detector.errors import RequestError
from detector.files import sha256_of
from detector.memory import keep_freed_memory
from detector.network.folding import fold_normalisation
from pathguard.tables import Figure, show

Attack = Callable[[Tensor, Tensor], Tensor]
CONSTANTS = (0.1, 0.5, 1.0, 5.0, 10.0)
# Of our C&W where it is to be as quick as torchattacks': the first 100 images chose among a dozen such settings.
BRIEF: Mapping[str, Setting] = {"steps": 4, "searches": 1, "tries": 1, "start": 10.0, "rate": 1.5}
SUITE_IMAGES = 2000
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
        passes: forward passes of all images.
    """

    seconds: float = 0.0
    images: int = 0
    fooled: int = 0
    survived: int = 0
    distances: list[float] | None = None
    passes: int = 0

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

    @property
    def median(self) -> float:
        """Median L2 of the rounded images that fool; NaN where none does."""
        return float(np.median(self.distances)) if self.distances else math.nan

    def is_as_good_as(self, other: "Side", recipe: Recipe) -> bool:
        """Whether as many images fool after rounding, and, where the smallest change is sought, as near."""
        return self.survived >= other.survived and (recipe.budget is not None or not self.median > other.median)

    def line(self, name: str) -> dict[str, object]:
        """For the table."""
        return {
            "": name,
            "images/s": Figure(f"{self.rate:.2f}"),
            "fooled, before rounding": Figure(f"{self.fooled / self.images:.1%}"),
            "after it": Figure(f"{self.survived / self.images:.1%}"),
            "median L2 of those": Figure(f"{self.median:.3f}"),
            "passes an image": Figure(f"{self.passes / self.images:.0f}"),
        }


def contests(quick: bool) -> list[Contest]:
    """What is raced: PGD, C&W as short as theirs and as its recipe has it, and DeepFool."""
    pgd, cw, deepfool = RECIPES["pgd"], RECIPES["cw"], RECIPES["deepfool"]
    brief = replace(cw, settings={**cw.settings, **BRIEF})
    if quick:
        cw = replace(cw, settings={**cw.settings, "steps": 10})
    steps, searches = cw.settings["steps"], cw.settings["searches"]
    some, few, constants = (20, 10, CONSTANTS[:2]) if quick else (400, 100, CONSTANTS)
    return [
        Contest("PGD, 10 steps, 8/255", pgd, _pgd_loop(pgd), some, 1.5),
        Contest(f"C&W, {BRIEF['steps']} long steps, theirs 1 constant of 50", brief, _cw_loop((1.0,), 50), some, 1.5),
        Contest(f"C&W, the recipe: {searches} of {steps}, theirs 5 of 50", cw, _cw_loop(constants, 50), few, None),
        Contest(f"C&W, the recipe: {searches} of {steps}, theirs 1 of 50", cw, _cw_loop((1.0,), 50), few, None),
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
        members: list[Attack] = [torchattacks.CW(network, c=c, steps=steps, lr=0.01) for c in constants]
        if len(members) == 1:
            return members[0]

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
    only: Annotated[str | None, typer.Option(help="Race only what begins with these names, by semicolons.")] = None,
    suite: Annotated[str | None, typer.Option(help="Run this suite or these recipes whole, and nothing else.")] = None,
    images: Annotated[int, typer.Option(help="Images of the suite that is run whole.", min=1)] = SUITE_IMAGES,
    work: Annotated[Path, typer.Option(help="Folder of the suite's store and seconds.")] = Path("out/suite"),
    quick: Annotated[bool, typer.Option(help="Under a minute: few images and steps; no suite and no memory.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Measure and print."""
    if suite is not None:
        keep_freed_memory()  # as the command does
        attacked, backbone, digest = _attacked(weights, bundle)
        found = right_images(attacked, data_dir, images)
        rows = run_suite(suite, attacked, backbone, digest, found, recipes_named(suite), work)
    else:
        rows, lines = races(load_published(weights).requires_grad_(False), data_dir, batch, quick, only)
        if not quick and only is None:
            rows += memory_rows()
            attacked, backbone, _ = _attacked(weights, bundle)
            members = [
                replace(recipe, images=min(recipe.images or SUITE_IMAGES, SUITE_IMAGES))
                for recipe in SUITES["standard"].recipes()
            ]
            rows += suite_rows(attacked, backbone, right_images(attacked, data_dir, SHARD), members)
        show(f"{weights.name}, batches of {batch}", lines)
    print_rows("attacks: speed, memory, and a whole suite", rows)
    if json is not None:
        write_rows(json, rows)


def _attacked(weights: Path, bundle: Path | None) -> tuple[nn.Module, nn.Module, str]:
    """The attacked network, folded as the command does it, the backbone of transfer attacks, and a digest of both."""
    if bundle is None:
        network = load_published(weights)
        return network, network, sha256_of(weights)
    opened = Bundle(bundle)
    return fold_normalisation(opened.network()), opened.backbone(), opened.network_digest


def races(
    network: nn.Module, data_dir: Path | None, batch: int, quick: bool, only: str | None
) -> tuple[list[Row], list[dict[str, object]]]:
    """All races, or those that begin with a name of `only`: a row and two lines of the table each."""
    names = tuple(name.strip() for name in only.split(";")) if only else ("",)
    raced = [contest for contest in contests(quick) if contest.name.startswith(names)]
    if not raced:
        known = "; ".join(contest.name for contest in contests(quick))
        raise RequestError(f"expected names that begin one of: {known}; got {only}")
    images = right_images(network, data_dir, max(contest.images for contest in raced))
    rows: list[Row] = []
    lines: list[dict[str, object]] = []
    for contest in raced:
        ours, theirs = race(contest, network, images, batch)
        lines += [ours.line(f"{contest.name}: ours"), theirs.line(f"{contest.name}: torchattacks")]
        ratio = ours.rate / theirs.rate if ours.is_as_good_as(theirs, contest.recipe) else None
        rows.append(
            Row(figure=f"{contest.name}: images/s, ours / plain loop", value=ratio, bar=contest.bar, at_most=False)
        )
    return rows, lines


def race(contest: Contest, network: nn.Module, images: ImageSet, batch: int) -> tuple[Side, Side]:
    """Attack the same batches in turns."""
    attack = contest.loop(network)
    ours, theirs = Side(), Side()
    for place, start in enumerate(range(0, contest.images, batch)):
        part = images.subset(slice(start, min(start + batch, contest.images)))
        clean, labels = to_tensor(part.pixels(slice(None)), torch.device("cpu")), torch.from_numpy(part.labels)

        def run_ours(part: ImageSet = part, clean: Tensor = clean, labels: Tensor = labels) -> Tensor:
            crafted = craft(contest.recipe, network, clean, labels, ids=part.ids)
            return to_tensor(crafted.pixels, clean.device)

        def run_theirs(clean: Tensor = clean, labels: Tensor = labels) -> Tensor:
            torch.manual_seed(0)
            return attack(clean, labels).detach()

        turns: list[tuple[Side, Callable[[], Tensor]]] = [(ours, run_ours), (theirs, run_theirs)]
        for side, run in turns if place % 2 == 0 else reversed(turns):
            with counted(network, side):
                began = time.perf_counter()
                made = run()
                seconds = time.perf_counter() - began
            side.judge(network, clean, labels, made, seconds)
    return ours, theirs


@contextmanager
def counted(network: nn.Module, side: Side) -> Iterator[None]:
    """Within it, the forward passes of `network` are this side's; both sides pay for the counting alike."""

    def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        side.passes += len(given[0])

    hook = network.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


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


def suite_rows(network: nn.Module, backbone: nn.Module, images: ImageSet, members: Sequence[Recipe]) -> list[Row]:
    """Minutes that the members take, each on its own number of images."""
    lines: list[dict[str, object]] = []
    total = cpu = 0.0
    for recipe in members:
        wanted = recipe.images or len(images)
        measured, seconds, busy = measure_member(recipe, network, backbone, images)
        total += seconds / measured * wanted
        cpu += busy / measured * wanted
        lines.append({
            "recipe": recipe.name, "images": wanted, "measured on": measured,
            "s an image": Figure(f"{seconds / measured:.3f}"),
            "minutes": Figure(f"{seconds / measured * wanted / 60:.2f}"),
        })  # fmt: skip
        print(f"{recipe.name}: {seconds / measured:.3f} s an image", flush=True)
    show(f"the suite standard on {SUITE_IMAGES} images", lines)
    cores = torch.get_num_threads()
    return [
        Row(
            figure=f"suite standard on {SUITE_IMAGES} images, from measured shares: minutes",
            value=total / 60,
            bar=BAR_MINUTES,
        ),
        Row(figure=f"the same, processor minutes / {cores} threads", value=cpu / 60 / cores),
    ]


def measure_member(
    recipe: Recipe, network: nn.Module, backbone: nn.Module, images: ImageSet
) -> tuple[int, float, float]:
    """Images attacked, seconds, and seconds of processor time, of one member.

    Args:
        recipe: the member.
        network: the attacked one.
        backbone: for transfer attacks.
        images: to take from: as many as take some seconds.
    """

    def attack(part: ImageSet) -> tuple[float, float]:
        clean, labels = to_tensor(part.pixels(slice(None)), torch.device("cpu")), torch.from_numpy(part.labels)
        began, busy = time.perf_counter(), time.process_time()
        # Noise takes its lengths from what an attack stored; how long they are does not change what it costs.
        lengths = np.ones(len(clean), np.float32) if recipe.matches else None
        craft(recipe, network, clean, labels, ids=part.ids, backbone=backbone, lengths=lengths)
        return time.perf_counter() - began, time.process_time() - busy

    count = 2
    while True:
        seconds, busy = attack(images.first(count))
        if count == SHARD or seconds * 5 > SECONDS_A_MEMBER:
            return count, seconds, busy
        count = min(5 * count, SHARD)


if __name__ == "__main__":
    typer.run(main)
