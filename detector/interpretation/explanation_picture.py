"""A picture of an explanation: the image, its path beside the usual one of its label, and the parts of its score."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from detector.errors import DataError
from detector.images import Pixels
from detector.interpretation.explanation import Explanation
from detector.pictures import CLOSED, OPEN, OPENED, SHUT, draw_layer, rows_of

_INK = "#1f2328"


def draw_explanation(file: Path, pixels: Pixels, why: Explanation, heading: str) -> None:
    """Draw one image's explanation.

    Args:
        file: the PNG to write.
        pixels: the image, `uint8`, `(height, width, channels)`.
        why: its explanation.
        heading: a few words over the picture, such as the file's name.

    Raises:
        DataError: the file cannot be written.
    """
    layers = why.path.by_layer()
    rows = [rows_of(bits.shape[1]) for bits in layers.values()]
    height = 3.6 + 0.2 * sum(rows) + 0.16 * len(rows)
    figure = Figure(figsize=(12, height), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[3.0, height - 3.0])
    above, below = halves
    shown, parts = above.subplots(1, 2, width_ratios=[1, 3.2])
    shown.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
    shown.set_title(_said(why), fontsize=9, loc="left", color=_INK)
    shown.axis("off")
    _draw_parts(parts, why)
    axes = below.subplots(len(layers), 2, squeeze=False, height_ratios=[count + 0.7 for count in rows])
    start = 0
    for (own, usual), (name, bits) in zip(axes, layers.items(), strict=True):
        place = slice(start, start + bits.shape[1])
        start = place.stop
        states, expected = bits[0], why.usual[place]
        draw_layer(own, np.where(states & ~expected, 2, np.where(expected & ~states, 3, states.astype(int))))
        draw_layer(usual, expected.astype(int))
        own.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axes[0][0].set_title("path of this image", fontsize=9)
    axes[0][1].set_title(f"usual path of {why.named(why.label)}", fontsize=9)
    legend = ((OPEN, "open"), (CLOSED, "closed"), (OPENED, "open, usually closed"), (SHUT, "closed, usually open"))
    figure.legend(
        handles=[Patch(color=colour, label=text) for colour, text in legend],
        loc="outside lower center", ncols=4, fontsize=9, frameon=False, title="each cell is one filter",
    )  # fmt: skip
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110)
    except OSError as error:
        raise DataError(f"expected to write {file}, got: {error.strerror}") from None


def _said(why: Explanation) -> str:
    verdict = "adversarial" if why.flagged else "clean"
    lines = [
        f"{why.named(why.label)} {why.probabilities[why.label]:.0%}, {verdict} (p = {why.p_value:.3g})",
        f"path most like {why.named(why.resembles)}",
        f"{'restored label' if why.flagged else 'on a usual path'}: {why.named(why.restored)}",
    ]
    return "\n".join(lines)


def _draw_parts(axis: Axes, why: Explanation) -> None:
    """What is added to the score of an average image, in order of the network."""
    names, values = list(why.parts), list(why.parts.values())
    places = range(len(names))
    axis.bar(places, values, color=[OPENED if value > 0 else SHUT for value in values])
    axis.axhline(0, color=_INK, linewidth=0.8)
    axis.set_xticks(places, names, rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("adds to score", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_title(
        f"score {why.score:.2f} = {why.base:.2f} (average image) + the bars ({why.method}); higher is more suspicious",
        fontsize=9, loc="left",
    )  # fmt: skip
