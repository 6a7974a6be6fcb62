"""The picture of accuracy against work."""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.curve_points import OURS, PLAIN, STATIC, Curves

# Okabe and Ito's palette, as detector/pictures.py.
_STYLES = {PLAIN: ("#56697a", "s"), OURS: ("#0072b2", "o"), STATIC: ("#d55e00", "^")}
_NAMES = {PLAIN: "plain backbone", OURS: "decoupled, by image", STATIC: "pruned, the same for all images"}


def draw_curves(file: Path, curves: Curves, heading: str) -> None:
    """Draw accuracy against multiply-accumulates and against milliseconds; beside each point the share that is kept.

    Args:
        file: the PNG to write.
        curves: what was measured.
        heading: one line over the picture.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, constrained_layout=True)
    for axis, across, title in zip(
        axes, ("macs", "ms"), ("multiply-accumulates left, %", "one image, ms"), strict=True
    ):
        for kind, (colour, marker) in _STYLES.items():
            points = curves.of(kind)
            xs, ys = [getattr(point, across) for point in points], [point.accuracy for point in points]
            axis.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=1.2, label=_NAMES[kind])
            for x, y, point in zip(xs, ys, points, strict=True):
                if kind != PLAIN:
                    beside = (9, -10) if kind == OURS else (-9, 5)
                    axis.annotate(
                        f"{point.keep:g}", (x, y), xytext=beside, textcoords="offset points", ha="center", fontsize=8,
                        color=colour,
                    )  # fmt: skip
        axis.set_xlabel(title, fontsize=9)
        axis.margins(x=0.06, y=0.12)
        axis.set_xlim(left=0)
        axis.tick_params(labelsize=8)
        axis.grid(color="#e8e8e8", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("accuracy, %", fontsize=9)
    figure.suptitle(heading, fontsize=11)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
