"""Pictures of an evaluation: ROC curves, the train x test heat map, what adaptive attacks leave."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from attacks.evaluation.adaptive import ANY, Withstood
from attacks.evaluation.judgement import Curve, Matrix
from attacks.report_pictures import INK, NORM_COLOURS, PALE, save_figure, tidy

# Of the axis of false alarms, which is drawn by its logarithm: what happens at 1 % is what counts.
_SMALLEST = 1e-3


def draw_curves(file: Path, title: str, curves: Sequence[Curve], norms: Mapping[str, str]) -> None:
    """Draw a small ROC curve for each attack, the others behind it in grey.

    Args:
        file: the PNG to write.
        title: one line over the picture.
        curves: one for each attack.
        norms: attack -> its norm, which gives the colour.
    """
    columns = min(5, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(2.3 * columns + 0.4, 2.15 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, axis in enumerate(axes.flat):
        if place >= len(curves):
            axis.set_visible(False)
            continue
        curve = curves[place]
        for other in curves:
            axis.plot(np.maximum(other.false_alarms, _SMALLEST), other.detected, color=PALE, linewidth=0.6)
        axis.plot(
            np.maximum(curve.false_alarms, _SMALLEST), curve.detected, color=NORM_COLOURS[norms[curve.attack]],
            linewidth=2,
        )  # fmt: skip
        for rate in (0.01, 0.05):
            axis.axvline(rate, color=INK, linewidth=0.6, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlim(_SMALLEST, 1)
        axis.set_ylim(0, 1.02)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axis.set_title(f"{curve.attack}  {100 * curve.auroc:.1f}", fontsize=9, loc="left")
        axis.tick_params(labelsize=7, labelbottom=place + columns >= len(curves))  # the lowest of its column
        tidy(axis)
    figure.supxlabel("clean images flagged (dotted: 1 % and 5 %)", fontsize=9)
    figure.supylabel("attacked images flagged", fontsize=9)
    figure.suptitle(f"{title}; behind each name: AUROC in %", fontsize=11, x=0.01, ha="left")
    save_figure(figure, file)


def draw_matrix(file: Path, title: str, matrix: Matrix) -> None:
    """Draw the AUROC of every pair of attacks: fitted on the row, judged by the column.

    Args:
        file: the PNG to write.
        title: one line over the picture.
        matrix: what to draw.
    """
    rows, columns = matrix.auroc.shape
    figure = Figure(figsize=(2.2 + 0.62 * columns, 1.9 + 0.42 * rows), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(100 * matrix.auroc, cmap="cividis", vmin=50, vmax=100, aspect="auto")
    worst = np.nanargmin(matrix.auroc)
    for row in range(rows):
        for column in range(columns):
            value = 100 * matrix.auroc[row, column]
            axis.text(
                column, row, f"{value:.1f}" if value < 99.95 else "100", ha="center", va="center", fontsize=8,
                color="white" if value < 80 else "black",
                fontweight="bold" if row * columns + column == worst else "normal",
            )  # fmt: skip
    axis.set_xticks(range(columns), matrix.judged_by, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(rows), matrix.fitted_on, fontsize=8)
    axis.set_xlabel("judged by", fontsize=9)
    axis.set_ylabel("fitted on", fontsize=9)
    axis.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axis, label="AUROC in %", shrink=0.8)
    figure.suptitle(f"{title} (bold: the worst cell)", fontsize=11, x=0.01, ha="left")
    save_figure(figure, file)


def draw_withstood(file: Path, title: str, found: Sequence[Withstood]) -> None:
    """Draw robust accuracy against the budget: each adaptive attack, all of them, and the network alone.

    Args:
        file: the PNG to write.
        title: one line over the picture.
        found: every attack at every budget.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    # There are more attacks than colours: a marker tells those of one colour apart.
    colours, markers = cycle(NORM_COLOURS.values()), cycle(".v^DPX")
    for name in dict.fromkeys(row.attack for row in found):
        rows = [row for row in found if row.attack == name]
        budgets = [row.budget for row in rows]
        if name == ANY:
            axis.fill_between(
                budgets, [r.low for r in rows], [r.high for r in rows], color=PALE, alpha=0.6, linewidth=0
            )
            axis.plot(budgets, [row.robust for row in rows], color=INK, linewidth=2.5, marker="o", label=name)
            axis.plot(
                budgets, [row.without_detector for row in rows if row.without_detector is not None], color=INK,
                linewidth=1.5, linestyle=":", marker="s", label="the network alone, detector off",
            )  # fmt: skip
        else:
            label = name.removeprefix("adaptive-")
            axis.plot(
                budgets,
                [row.robust for row in rows],
                color=next(colours),
                marker=next(markers),
                markersize=5,
                label=label,
            )
    axis.set_ylim(0, 1)
    axis.set_xlim(left=0)
    axis.set_xticks(sorted({row.budget for row in found}))
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axis.set_xlabel("largest change of a pixel, in grey levels of 255", fontsize=9.5)
    axis.set_ylabel("robust accuracy", fontsize=9.5)
    axis.legend(fontsize=8, frameon=False)
    tidy(axis)
    figure.suptitle(f"{title} (band: 95 % interval)", fontsize=11, x=0.01, ha="left")
    save_figure(figure, file)
