"""Our attacks beside those of foolbox and adv-lib: same network, same images, same budget and settings.

    python -m benchmarks.attacks_vs_peers --weights FILE --data-dir DIR [--work DIR] [--quick] [--json FILE]

The network is a published CIFAR-10 backbone (`benchmarks/published.py`), the images are the first of the fitting split
that it gets right. Both sides' images are judged by one function here, three times: as they come (floating point),
after rounding to 8 bits, and, for attacks that seek the smallest change, rounded after both were made longer by the
same rule until they survive the rounding (`attacks.minimum_norm.overshoot`).

**Which the bar uses.** Success counts after rounding, because an image is stored and sent in 8 bits: for attacks with
a budget the bar is on rounded images as they come. An attack that seeks the smallest change stops on the boundary, and
rounding undoes that by chance; held against it as it comes, ours, which looks for what survives, would win without
being better, and medians would be over other images. So there the bar is on both after the same lengthening.

Each batch of each attack is kept in the work folder, and the same command goes on from there: theirs are redone where
the library, its settings, the images or the weights change, ours also where the code in `attacks/` does. `--finished`
starts nothing and compares what is there, each attack on those images that both sides are done with. HopSkipJump has
fewer steps here than in its recipe, on both sides.

A second table sets AutoAttack beside a PGD of 100 steps and 10 restarts on a small network that is made robust here,
by adversarial training of about a minute.
"""

import hashlib
import json as json_format
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from torch import Tensor, nn

from attacks.draws import Draws, seed_of
from attacks.methods.minimum_norm import overshoot
from attacks.problem import Problem, Victim, rounded
from attacks.recipes import RECIPES, Recipe
from attacks.report_pictures import NORM_NAMES
from benchmarks.attack_peers import Peer, library_version, peers_of
from benchmarks.published import load_published, right_images
from benchmarks.report import Row, print_rows, write_rows
from benchmarks.robust import robust_rows
from detector.batches import to_tensor
from detector.datasets import ImageSet
from detector.errors import DataError
from detector.files import sha256_of, write_whole
from pathguard.tables import show

COMPARED = (
    "fgsm", "fgsm-1", "bim-1", "mi-fgsm-1", "pgd", "pgd-1", "pgd-l2", "apgd-ce-1", "apgd-dlr-1", "apgd-l2", "deepfool",
    "ddn", "cw", "ead", "fmn-l1", "hopskipjump",
)  # fmt: skip
# An attack that sees labels alone takes 6,000 passes of each image at its recipe's 20 steps: fewer, on both sides.
FEWER_STEPS: Mapping[str, int] = {"hopskipjump": 3}
QUICK = ("fgsm-1", "pgd-1", "deepfool")
OURS = "pathguard"
BATCH = 50
ORDERS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0, "l0": 0.0}

Flags = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judged:
    """One kind of images of one attack.

    Attributes:
        fooled: whether the network is wrong, `(images,)`.
        distance: in the attack's norm, `(images,)`.
    """

    fooled: Flags
    distance: Values

    @property
    def success(self) -> float:
        """Share of images that fooled the network, in percent."""
        return 100 * float(self.fooled.mean())

    @property
    def median(self) -> float:
        """Median distance of those that did; NaN where none did."""
        return float(np.median(self.distance[self.fooled])) if self.fooled.any() else float("nan")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attack of one library.

    Attributes:
        before: its images as they come.
        after: rounded to 8 bits.
        lengthened: rounded after being made longer until they survive that; the same as `after` with a budget.
        seconds: for all images.
    """

    before: Judged
    after: Judged
    lengthened: Judged
    seconds: float

    def barred(self, recipe: Recipe) -> Judged:
        """The images that the bar is about."""
        return self.after if recipe.budget is not None else self.lengthened


@dataclass(frozen=True, slots=True)
class Comparison:
    """One of our recipes beside one attack of another library.

    Attributes:
        recipe: ours.
        peer: theirs.
        ours: what became of ours.
        theirs: what became of theirs, on the same images.
    """

    recipe: Recipe
    peer: Peer
    ours: Outcome
    theirs: Outcome

    def rows(self) -> list[Row]:
        """Success and distance, each with its bar."""
        ours, theirs = self.ours.barred(self.recipe), self.theirs.barred(self.recipe)
        what = f"{self.recipe.name} against {self.peer.library} {self.peer.name.partition('(')[0]}"
        norm = NORM_NAMES[self.recipe.norm]
        return [
            Row(figure=f"{what}: success below theirs, points", value=theirs.success - ours.success, bar=2.0),
            Row(figure=f"{what}: median {norm} / theirs", value=_ratio(ours.median, theirs.median), bar=1.05),
        ]


def main(
    weights: Annotated[Path, typer.Option(help="Published weights, such as resnet20-12fca82f.th.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where CIFAR-10 lies; else cache or download.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of finished batches.")] = Path("out/peers"),
    images: Annotated[int, typer.Option(help="Images to attack.", min=1)] = 500,
    only: Annotated[str, typer.Option(help="Our recipes to compare, by commas.")] = ",".join(COMPARED),
    theirs_first: Annotated[bool, typer.Option(help="Run all other libraries before ours.")] = False,
    finished: Annotated[bool, typer.Option(help="Compare what the work folder holds; attack nothing.")] = False,
    robust: Annotated[bool, typer.Option(help="Train and attack the small robust network too.")] = True,
    quick: Annotated[bool, typer.Option(help="Under a minute: few attacks and images.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="File for the table as it stands in the docs.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Compare and print."""
    names = QUICK if quick else [name.strip() for name in only.split(",")]
    bench = Bench.on(weights, data_dir, 10 if quick else images, work)
    wanted = [compared(name) for name in names]
    for recipe in wanted if theirs_first and not finished else ():
        for peer in peers_of(recipe):
            bench.outcome(recipe, peer)
    found = [comparison for recipe in wanted for comparison in bench.compare(recipe, finished)]
    if not found:
        raise DataError(f"expected finished batches of {', '.join(names)} in {work}, got none")
    title = f"{weights.name}, {max(len(one.ours.after.fooled) for one in found)} images"
    lines = [
        {name: text.replace("*", "").replace("`", "") for name, text in line.items()} for line in columns_of(found)
    ]
    show(f"{title}: share fooled, median distance of those", lines)
    rows = [row for comparison in found for row in comparison.rows()]
    rows += best_rows(found)
    if robust:
        rows += robust_rows(data_dir, quick)
    print_rows(f"{title}; a success 2 points lower or a median 5 % larger than theirs is a miss", rows)
    if markdown is not None:
        markdown.write_text(as_markdown(found), encoding="utf-8")
    if json is not None:
        write_rows(json, rows)


def compared(name: str) -> Recipe:
    """Our recipe of that name, with fewer steps where it would take hours."""
    recipe = RECIPES[name]
    steps = FEWER_STEPS.get(name, recipe.settings.get("steps"))
    return recipe if steps is None else replace(recipe, settings={**recipe.settings, "steps": steps})


@dataclass(frozen=True, slots=True)
class Bench:
    """What all attacks of a comparison have in common.

    Attributes:
        network: in evaluation mode, weights fixed.
        images: to attack; the network is right on all of them.
        work: folder of finished batches.
        weights: SHA-256 of the network's file.
    """

    network: nn.Module
    images: ImageSet
    work: Path
    weights: str

    @classmethod
    def on(cls, weights: Path, data_dir: Path | None, count: int, work: Path) -> "Bench":
        """A published network, and the first images that it gets right."""
        network = load_published(weights).requires_grad_(False)
        images = right_images(network, data_dir, count)
        return cls(network, images, work, sha256_of(weights))

    def compare(self, recipe: Recipe, finished: bool = False) -> Iterator[Comparison]:
        """One comparison for each attack that another library has of this kind.

        Args:
            recipe: ours.
            finished: compare on those first images that the work folder holds of both sides, and attack nothing; where
                there are none, there is no comparison.
        """
        sides = [None, *peers_of(recipe)]
        if finished:
            ready = {side: self._batches_of(recipe, side) for side in sides}
            sides = [side for side in sides if side is None or ready[side]]
            bench = replace(self, images=self.images.first(BATCH * min(ready[side] for side in sides)))
        else:
            bench = self
        if len(sides) < 2 or len(bench.images) == 0:
            return
        ours = bench.outcome(recipe, None)
        for peer in sides[1:]:
            assert peer is not None
            yield Comparison(recipe, peer, ours, bench.outcome(recipe, peer))

    def outcome(self, recipe: Recipe, peer: Peer | None) -> Outcome:
        """Attack all images by `peer`, or by ours where it is None; what the work folder holds is not done again."""
        parts = []
        about = _about(recipe, peer, self.weights)
        for start in range(0, len(self.images), BATCH):
            batch = self.images.subset(slice(start, start + BATCH))
            file = self._file(recipe, about, start)
            if not file.exists():
                part = self._attack(recipe, batch, peer)
                write_whole(file, json_format.dumps({**about, **part}).encode())
                done = f"{start + len(batch)} of {len(self.images)} images"
                print(f"{recipe.name} by {about['library']}: {done}", flush=True)
            parts.append(json_format.loads(file.read_bytes()))
        return _joined(parts)

    def _batches_of(self, recipe: Recipe, peer: Peer | None) -> int:
        """How many of the first batches the work folder holds."""
        about = _about(recipe, peer, self.weights)
        starts = range(0, len(self.images), BATCH)
        return next((place for place, start in enumerate(starts) if not self._file(recipe, about, start).exists()),
                    len(starts))  # fmt: skip

    def _file(self, recipe: Recipe, about: Mapping[str, object], start: int) -> Path:
        """Where what became of the batch that begins at `start` is kept."""
        ids = self.images.ids[start : start + BATCH].tolist()
        digest = hashlib.sha256(json_format.dumps({**about, "ids": ids}, sort_keys=True).encode()).hexdigest()[:16]
        return self.work / f"{recipe.name}-{about['library']}-{start:04d}-{digest}.json"

    def _attack(self, recipe: Recipe, batch: ImageSet, peer: Peer | None) -> dict[str, object]:
        """Attack one batch: success and distance of each image and kind, and the seconds that it took."""
        images = to_tensor(batch.pixels(slice(None)), torch.device("cpu"))
        labels = torch.from_numpy(batch.labels)
        problem = _problem(self.network, batch, images, labels)
        torch.manual_seed(int(batch.ids[0]))  # theirs draw from the global generator
        began = time.perf_counter()
        made = recipe.attack()(problem) if peer is None else peer.attack(self.network, images, labels)
        seconds = time.perf_counter() - began
        made = made.detach().clamp(0, 1)
        kinds = {"before": made, "after": rounded(made)}
        if recipe.budget is None:
            kinds["lengthened"] = rounded(overshoot(_problem(self.network, batch, images, labels), made))
        order = ORDERS[recipe.norm or "l2"]
        judged: dict[str, object] = {"seconds": seconds}
        with torch.no_grad():
            for kind, points in kinds.items():
                change = (points - images).flatten(1)
                judged[kind] = {
                    "fooled": (self.network(points).argmax(dim=1) != labels).tolist(),
                    "distance": torch.linalg.vector_norm(change, order, dim=1).tolist(),
                }
        return judged


def _about(recipe: Recipe, peer: Peer | None, weights: str) -> dict[str, object]:
    """What a batch of an attack is redone for when it changes, beside the images."""
    library = OURS if peer is None else peer.library
    return {
        "weights": weights,
        "library": library,
        "version": _code_digest(recipe) if peer is None else library_version(library),
        "called": recipe.parameters if peer is None else peer.name,
    }


def best_rows(comparisons: Sequence[Comparison]) -> list[Row]:
    """The nearest of ours that seeks the smallest L2 or L1 change, beside the nearest of theirs, by median."""
    rows = []
    for norm in ("l2", "l1"):
        nearest = [one for one in comparisons if one.recipe.norm == norm and one.recipe.budget is None]
        if nearest:
            ours, theirs = (
                min(getattr(one, side).barred(one.recipe).median for one in nearest) for side in ("ours", "theirs")
            )
            figure = f"smallest median {NORM_NAMES[norm]} of any of ours / of any of theirs"
            rows.append(Row(figure=figure, value=_ratio(ours, theirs), bar=1.05))
    return rows


def _problem(network: nn.Module, batch: ImageSet, images: Tensor, labels: Tensor) -> Problem:
    """The images as our attacks take them, with fresh random numbers."""
    draws = Draws([seed_of(0, int(index)) for index in batch.ids], images.device, images.dtype)
    return Problem(Victim(network, len(images)), images, labels, None, draws, batch.ids)


def _code_digest(recipe: Recipe) -> str:
    """Of the source of a recipe's attack and of what every attack goes through."""
    module = sys.modules[type(recipe.attack()).__module__]
    shared = ("attacks.craft", "attacks.draws", "attacks.problem")
    names = {module.__name__, *shared, *(getattr(value, "__module__", None) or "" for value in vars(module).values())}
    files = [Path(str(sys.modules[name].__file__)) for name in sorted(names) if name.startswith("attacks.")]
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()[:16]


def _joined(parts: Sequence[Mapping[str, Any]]) -> Outcome:
    def of(kind: str) -> Judged:
        return Judged(
            np.concatenate([np.array(part[kind]["fooled"], bool) for part in parts]),
            np.concatenate([np.array(part[kind]["distance"], float) for part in parts]),
        )

    before, after = of("before"), of("after")
    lengthened = of("lengthened") if "lengthened" in parts[0] else after
    return Outcome(before, after, lengthened, sum(part["seconds"] for part in parts))


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if math.isfinite(ours) and math.isfinite(theirs) and theirs > 0 else None


def columns_of(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """What is printed and documented: a line for each library's attack, ours above those it is compared with."""
    lines: list[dict[str, str]] = []
    for place, comparison in enumerate(comparisons):
        if place == 0 or comparisons[place - 1].recipe.name != comparison.recipe.name:
            ours = ", ".join(f"{name} {value}" for name, value in comparison.recipe.settings.items())
            lines.append(_line(comparison.recipe, f"**ours** `{comparison.recipe.name}`", ours, comparison.ours))
        name, _, settings = comparison.peer.name.rstrip(")").partition("(")
        lines.append(_line(comparison.recipe, f"{comparison.peer.library} `{name}`", settings, comparison.theirs))
    return lines


def _line(recipe: Recipe, attack: str, settings: str, outcome: Outcome) -> dict[str, str]:
    scale, unit = (255.0, " / 255") if recipe.norm == "linf" else (1.0, "")

    def said(judged: Judged) -> str:
        median = f"{scale * judged.median:.3f}" if math.isfinite(judged.median) else "-"
        return f"{judged.success:.1f} %, {median}"

    return {
        "attack": attack,
        "steps": " x ".join(re.findall(r"(?:steps|searches|iter|iterations) (\d+)(?![.\d])", settings)),
        "images": str(len(outcome.after.fooled)),
        "norm": f"{NORM_NAMES[recipe.norm]}{unit}",
        "before rounding": said(outcome.before),
        "after": said(outcome.after),
        "made to survive it": said(outcome.lengthened) if recipe.budget is None else "",
        "ms an image": f"{1000 * outcome.seconds / len(outcome.after.fooled):.0f}",
    }


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """The table of the docs: success and median distance of those that fooled, three times."""
    lines = columns_of(comparisons)
    heads = list(lines[0])
    rows = ["| " + " | ".join(line[head] for head in heads) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |", *rows]) + "\n"


if __name__ == "__main__":
    typer.run(main)
