"""Pictures of paths."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from detector.images import Pixels
from detector.paths.path_encoding import PathEncoding

# Okabe and Ito's palette, told apart by the colour-blind too.
CLOSED, OPEN, OPENED, SHUT = "#e8e8e8", "#56697a", "#d55e00", "#0072b2"
_CELLS_PER_ROW = 32


def draw_path_pair(
    file: Path, clean: Pixels, attacked: Pixels, paths: PathEncoding, titles: tuple[str, str], heading: str
) -> None:
    """Draw an image beside its attacked twin, each above its path; filters that changed are coloured.

    Args:
        file: the PNG to write.
        clean: `uint8`, `(height, width, channels)`.
        attacked: the same image after the attack.
        paths: two rows: the path of the clean image, then that of the attacked one.
        titles: a few words over each image.
        heading: one line over the picture.
    """
    layers = paths.by_layer()
    rows = {name: rows_of(bits.shape[1]) for name, bits in layers.items()}
    figure, axes = plt.subplots(
        1 + len(layers), 2, figsize=(11, 3.4 + 0.24 * sum(rows.values()) + 0.2 * len(layers)),
        height_ratios=[9, *(rows[name] + 0.6 for name in layers)], constrained_layout=True, squeeze=False,
    )  # fmt: skip
    for axis, pixels, title in zip(axes[0], (clean, attacked), titles, strict=True):
        axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    for row, (name, bits) in enumerate(layers.items(), start=1):
        before, after = bits
        draw_layer(axes[row][0], before.astype(int))
        changed = np.where(after & ~before, 2, np.where(before & ~after, 3, after.astype(int)))
        draw_layer(axes[row][1], changed)
        axes[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    flipped = int((paths.bits[0] != paths.bits[1]).sum())
    legend = ((OPEN, "open"), (CLOSED, "closed"), (OPENED, "opened by the attack"), (SHUT, "closed by the attack"))
    figure.suptitle(f"{heading}: {flipped} of {paths.bits.shape[1]} filters changed", fontsize=11)
    figure.legend(
        handles=[Patch(color=colour, label=text) for colour, text in legend],
        loc="outside lower center", ncols=4, fontsize=9, frameon=False, title="each cell is one filter",
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def rows_of(filters: int) -> int:
    """Rows of cells that a layer takes."""
    return -(-filters // _CELLS_PER_ROW)


def draw_layer(axis: Axes, states: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
    """One cell per filter: 0 closed, 1 open, 2 opened, 3 shut."""
    rows = rows_of(len(states))
    cells = np.full(rows * _CELLS_PER_ROW, np.nan)
    cells[: len(states)] = states
    axis.pcolormesh(
        cells.reshape(rows, _CELLS_PER_ROW), cmap=ListedColormap([CLOSED, OPEN, OPENED, SHUT]), vmin=0, vmax=3,
        edgecolors="white", linewidth=1,
    )  # fmt: skip
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
