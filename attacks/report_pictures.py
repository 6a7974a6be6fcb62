"""Pictures of what attacks did: success per recipe, success against distance, and images side by side."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw, ImageFont

from attacks.report import AttackSummary, Example
from detector.images import Pixels

# Okabe and Ito's palette, told apart by the colour-blind too; the yellow is left out, it is too pale on white.
NORM_COLOURS = {"linf": "#0072b2", "l2": "#d55e00", "l1": "#007a5a", "l0": "#a8457f", None: "#56697a"}
NORM_NAMES = {"linf": "L-inf", "l2": "L2", "l1": "L1", "l0": "L0", None: "none: noise, corruptions"}
DISTANCE_NAMES = {
    "linf": "largest change, in grey levels of 255",
    "l2": "Euclidean length, pixels in [0, 1]",
    "l1": "sum of changes, pixels in [0, 1]",
    "l0": "changed values",
}
INK, PALE = "#1f2328", "#c9ced6"
_DPI = 130
_TILE = 96
_MARGIN = 12


def shown_distance(norm: str, distance: float) -> float:
    """A distance in the unit in which people know it: L-inf in grey levels, the others as they are."""
    return distance * 255 if norm == "linf" else distance


def draw_success(file: Path, title: str, summaries: Sequence[AttackSummary]) -> None:
    """Draw a bar for each recipe: the share of attacked images that fooled the network.

    Args:
        file: the PNG to write.
        title: one line over the picture.
        summaries: of one split.
    """
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(summaries)), layout="constrained")
    axis = figure.add_subplot()
    places = range(len(summaries))
    shares = [summary.figures.fooled for summary in summaries]
    norms = [_norm_of(summary) for summary in summaries]
    axis.barh(places, shares, height=0.72, color=[NORM_COLOURS[norm] for norm in norms])
    for place, share in zip(places, shares, strict=True):
        axis.text(share + 0.01, place, f"{share:.1%}", va="center", fontsize=9, color=INK)
    axis.set_yticks(places, [f"{summary.figures.recipe}  ({summary.figures.images})" for summary in summaries])
    axis.set_ylim(len(summaries) - 0.4, -0.6)
    axis.set_xlim(0, 1.12)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axis.set_xlabel("share that fooled the network after rounding to 8 bits (in brackets: images)", fontsize=9.5)
    tidy(axis)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    shown = [norm for norm in NORM_COLOURS if norm in norms]
    figure.legend(
        handles=[Patch(color=NORM_COLOURS[norm], label=NORM_NAMES[norm]) for norm in shown], ncols=len(shown),
        title="norm that is kept small", loc="outside lower center", fontsize=8, title_fontsize=8, frameon=False,
    )  # fmt: skip
    save_figure(figure, file)


def draw_distances(file: Path, title: str, summaries: Sequence[AttackSummary]) -> None:
    """Draw a small chart for each recipe: the share of images fooled by no more than a distance in its own norm.

    Recipes of the same norm share their axis and stand behind each other in grey, so that they can be compared.

    Args:
        file: the PNG to write.
        title: one line over the picture.
        summaries: of one split, at least one of an attack; noise and corruptions get no chart.
    """
    summaries = [summary for summary in summaries if summary.is_attack]
    columns = min(4, len(summaries))
    rows = -(-len(summaries) // columns)
    figure = Figure(figsize=(1 + 2.9 * columns, 1 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, summary in zip(axes.flat, summaries, strict=False):
        norm = summary.curve.norm
        alike = [other for other in summaries if other.curve.norm == norm]
        right = axis_end(alike)
        for other in alike:
            axis.plot(*stairs(other, right), color=PALE, linewidth=1)
        axis.plot(*stairs(summary, right), color=NORM_COLOURS[_norm_of(summary)], linewidth=2)
        if summary.budget is not None:
            axis.axvline(shown_distance(norm, summary.budget), color=INK, linewidth=0.8, linestyle=":")
            axis.plot(*family_points(summary, summaries), "o", color=INK, markersize=3.5)
        axis.set_xlim(0, right)
        axis.set_ylim(0, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axis.set_title(f"{summary.figures.recipe}: {summary.figures.fooled:.1%}", fontsize=9.5, loc="left")
        axis.set_xlabel(f"{NORM_NAMES[norm]}: {DISTANCE_NAMES[norm]}", fontsize=7.5)
        axis.tick_params(labelsize=8)
        tidy(axis)
    for axis in axes.flat[len(summaries) :]:
        axis.axis("off")
    legend = "dotted: the budget; dots: the same attack at each of its budgets; grey: the other recipes of that norm"
    figure.suptitle(f"{title}\n{legend}", fontsize=10, x=0.01, ha="left")
    save_figure(figure, file)


def axis_end(summaries: Sequence[AttackSummary]) -> float:
    """Where the distance axis of these recipes, all of one norm, ends: beyond budgets and 99 % of what was fooled."""
    ends = [shown_distance(s.curve.norm, s.budget) for s in summaries if s.budget is not None]
    for summary in summaries:
        curve = summary.curve
        if len(curve.shares):
            place = int(np.searchsorted(curve.shares, 0.99 * curve.shares[-1]))
            ends.append(shown_distance(curve.norm, float(curve.distances[place])))
    return 1.1 * max(ends, default=1.0) or 1.0


def family_points(
    summary: AttackSummary, summaries: Sequence[AttackSummary]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Budgets and success of the recipes that differ from `summary` by their budget alone, itself included."""

    def kind(one: AttackSummary) -> tuple[str, dict[str, object]]:
        # `pgd-2` is `pgd` at another epsilon: the number is all that tells their names apart.
        return re.sub(r"-\d+$", "", one.figures.recipe), {**one.parameters, "budget": None}

    alike = [one for one in summaries if one.budget is not None and kind(one) == kind(summary)]
    points = sorted((shown_distance(one.curve.norm, one.budget or 0.0), one.figures.fooled) for one in alike)
    return tuple(budget for budget, _ in points), tuple(share for _, share in points)


def stairs(summary: AttackSummary, right: float) -> tuple[list[float], list[float]]:
    """The corners of a success curve from 0 to `right`, as horizontal and vertical places."""
    across, up = [0.0], [0.0]
    for distance, share in zip(summary.curve.distances, summary.curve.shares, strict=True):
        place = shown_distance(summary.curve.norm, float(distance))
        if place > right:
            break
        across += [place, place]
        up += [up[-1], float(share)]
    return [*across, right], [*up, up[-1]]


def magnified_change(example: Example) -> tuple[Pixels, int]:
    """What the attack changed, on mid-grey, and how many times it was magnified so that the largest change shows."""
    change = example.attacked.astype(np.int32) - example.clean.astype(np.int32)
    times = max(1, 127 // max(1, int(np.abs(change).max())))
    return np.clip(128 + times * change, 0, 255).astype(np.uint8), times


def draw_contact_sheet(file: Path, title: str, summaries: Sequence[AttackSummary]) -> None:
    """Draw a row for each recipe: for a few images the clean one, the attacked one, and the change magnified.

    Args:
        file: the PNG to write.
        title: one line over the picture.
        summaries: of one split; those without examples get no row.
    """
    rows = [summary for summary in summaries if summary.examples]
    most = max((len(summary.examples) for summary in rows), default=0)
    large, small = ImageFont.load_default(16), ImageFont.load_default(12)
    names = 150
    block, height = 3 * _TILE + _MARGIN + 12, _TILE + 40
    sheet = Image.new("RGB", (names + most * block + _MARGIN, 62 + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, INK, large)
    draw.text((_MARGIN, 36), "each: clean, attacked, change magnified on grey", INK, small)
    for row, summary in enumerate(rows):
        top = 62 + row * height
        for index, line in enumerate(wrapped(summary.figures.recipe, 18)):
            draw.text((_MARGIN, top + 4 + 17 * index), line, INK, large)
        draw.text((_MARGIN, top + _TILE - 14), f"{summary.figures.fooled:.1%} fooled", INK, small)
        for column, example in enumerate(summary.examples):
            left = names + column * block
            change, times = magnified_change(example)
            for place, pixels in enumerate((example.clean, example.attacked, change)):
                sheet.paste(tile(pixels, _TILE), (left + place * (_TILE + 4), top))
            draw.text((left, top + _TILE + 4), _cut(example.label, 15), INK, small)
            verdict = example.predicted if example.fooled else f"still {example.predicted}"
            draw.text((left + _TILE + 4, top + _TILE + 4), _cut(verdict, 15), INK, small)
            draw.text((left + 2 * (_TILE + 4), top + _TILE + 4), f"x {times}", INK, small)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def tile(pixels: Pixels, size: int) -> Image.Image:
    """An image scaled into a square of `size`: small ones with hard edges, so that each pixel shows."""
    image = Image.fromarray(pixels.squeeze(axis=2) if pixels.shape[2] == 1 else pixels).convert("RGB")
    scale = size / max(image.size)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image.resize((width, height), method), ((size - width) // 2, (size - height) // 2))
    return square


def wrapped(name: str, width: int) -> list[str]:
    """A recipe's name in lines of at most `width` characters, cut after hyphens where that helps."""
    lines = [""]
    for part in name.replace("-", "-\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return [line[place : place + width] for line in lines for place in range(0, max(1, len(line)), width)]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _norm_of(summary: AttackSummary) -> str | None:
    return summary.curve.norm if summary.is_attack else None


def tidy(axis: Axes) -> None:
    """Leave out what only frames: the upper and right edge."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="x", color="#e4e7eb", linewidth=0.6)
    axis.set_axisbelow(True)


def save_figure(figure: Figure, file: Path) -> None:
    """Write the PNG, its folder too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=_DPI)
