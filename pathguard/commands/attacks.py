"""`pathguard attack` and `pathguard report`: attacked images on disk, and what became of them."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from pathguard.commands.options import BundleDir, DataDir, ImageSize, Json, Ray, Seed, Trust, splits_of, workers_of
from pathguard.progress import attack_bar
from pathguard.tables import Figure, show

if TYPE_CHECKING:
    from attacks.report import AttackFigures


def attack(
    bundle: BundleDir,
    out: Annotated[Path, typer.Option(help="Folder for the attacked images; an unfinished one is finished.")],
    recipes: Annotated[
        str,
        typer.Option(help="A suite (quick, standard, full, adaptive, ...), recipes by commas, or a TOML file of them."),
    ] = "quick",
    limit: Annotated[int | None, typer.Option(help="Attack at most N images of each split.", min=1)] = None,
    shard_images: Annotated[int, typer.Option(help="Images in memory at a time.", min=1)] = 250,
    seed: Seed = 0,
    ray: Ray = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Attack the decoupled network on the fitting and test splits. Run again to go on after an interruption."""
    from attacks.stages import make_attacks
    from attacks.suites import recipes_named
    from detector.bundle import Bundle
    from detector.memory import keep_freed_memory

    keep_freed_memory()
    chosen = recipes_named(recipes)
    opened = Bundle(bundle, trust)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)
    with workers_of(ray) as workers, attack_bar("attack") as listen, _warned_in_one_line():
        rows = make_attacks(opened, splits, chosen, out, limit, seed, shard_images, listen, workers=workers)
    if json_:
        show("", [asdict(row) for row in rows], as_json=True)
        return
    _print_split("test", rows)
    print(f"`pathguard report {out}` draws them")


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `pathguard attack` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the page and pictures; else DIR/report.")] = None,
    json_: Json = False,
) -> None:
    """Print and draw how often each attack succeeded and at which distance: tables, PNG files and one HTML page."""
    from attacks.report_page import make_report
    from attacks.store import AttackStore

    made = make_report(AttackStore(folder), out or folder / "report")
    for note in made.notes:
        print(f"unfinished: {note}", file=sys.stderr)
    if json_:
        rows = [
            {"split": split, **asdict(one.figures), "parameters": one.parameters}
            for split, summaries in made.summaries.items()
            for one in summaries
        ]
        show("", rows, as_json=True)
        return
    for split, summaries in made.summaries.items():
        _print_split(split, [one.figures for one in summaries])
    print(f"page: {made.page}")
    print(f"and {len(made.pictures)} pictures beside it: {', '.join(picture.name for picture in made.pictures)}")


@contextmanager
def _warned_in_one_line() -> Iterator[None]:
    """Within it, what attacks warn of is a line for a person; other warnings still say where they come from."""
    from attacks.craft import ProbabilitiesWarning

    with warnings.catch_warnings():
        usual = warnings.showwarning

        def showwarning(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
            line: str | None = None,
        ) -> None:  # fmt: skip
            if issubclass(category, ProbabilitiesWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = showwarning
        warnings.simplefilter("default", ProbabilitiesWarning)
        yield


def _print_split(split: str, figures: "Sequence[AttackFigures]") -> None:
    goals_differ = any(one.reached != one.fooled for one in figures)
    rows = [_row_for_a_person(one, goals_differ) for one in figures]
    show(f"split {split}: medians over what fooled (L-inf in levels of 255), passes per image", rows)


def _row_for_a_person(figures: "AttackFigures", goals_differ: bool) -> dict[str, object]:
    def number(value: float, digits: int) -> Figure:
        return Figure(f"{value:.{digits}f}" if isfinite(value) else "-")

    return {
        "recipe": figures.recipe,
        "images": figures.images,
        "fooled": Figure(f"{figures.fooled:.1%}"),
        **({"goal": Figure(f"{figures.reached:.1%}")} if goals_differ else {}),
        "L-inf": number(255 * figures.linf, 1),
        "L2": number(figures.l2, 3),
        "L1": number(figures.l1, 2),
        "L0": number(figures.l0, 0),
        "fwd": number(figures.forwards, 1 if figures.forwards < 1000 else 0),
        "back": number(figures.gradients, 1 if figures.gradients < 1000 else 0),
    }
