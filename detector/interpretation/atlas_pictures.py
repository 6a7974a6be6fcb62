"""Pictures of the atlas, each as a PNG file's bytes: one restrained style, told apart by the colour-blind too."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detector.images import Pixels
from detector.interpretation.atlas import Atlas, Concept
from detector.pictures import OPEN, OPENED, SHUT

_INK = "#1f2328"
_DPI = 110
# Okabe and Ito's palette without its yellow, too pale on white; classes beyond it take another marker.
_COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#a8457f", "#56b4e9", "#e69f00", "#56697a")
_MARKERS = ("o", "^", "s", "D", "v", "P")
_CORRELATION = LinearSegmentedColormap.from_list("correlation", [SHUT, "#ffffff", OPENED])


def draw_census(atlas: Atlas) -> bytes:
    """How many filters of each layer are always open, depend on the image, or are always closed."""
    figure, axis = _wide(1.3 + 0.27 * len(atlas.layers))
    places, left = range(len(atlas.layers)), np.zeros(len(atlas.layers))
    kinds = (
        ("always open (over 99 % of images)", "always_open", OPEN),
        ("depend on the image", "input_dependent", "#e69f00"),
        ("always closed (under 1 %)", "always_closed", "#c9ced6"),
    )
    for words, name, colour in kinds:
        shares = np.array([getattr(layer, name) for layer in atlas.layers])
        axis.barh(places, shares, left=left, color=colour, label=words, height=0.75)
        left = left + shares
    _layer_axis(axis, atlas)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the layer's filters", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _png(figure)


def draw_information(atlas: Atlas) -> bytes:
    """What each layer's path, and its most telling filter alone, say of the class, in nats."""
    figure, axis = _wide(1.3 + 0.27 * len(atlas.layers))
    places = range(len(atlas.layers))
    axis.barh(places, [layer.information for layer in atlas.layers], color=OPEN, height=0.6, label="layer, lower bound")
    census = atlas.census
    best = [values.max() for values in census.by_layer(np.maximum(census.information() - census.bias(), 0)).values()]
    axis.plot(best, places, "D", color=OPENED, markersize=5, label="its most telling filter, plug-in less bias")
    shares = census.images[census.images > 0] / len(census)
    most = float(-(shares * np.log(shares)).sum())
    axis.axvline(most, color=_INK, linewidth=0.8, linestyle=":", label=f"H(class) = {most:.2f} nats")
    _layer_axis(axis, atlas)
    axis.set_xlabel("information about the class, nats", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _png(figure)


def draw_firing_rates(atlas: Atlas) -> bytes:
    """How often each filter is open for each class."""
    figure, axis = _wide(1.4 + 0.22 * len(atlas.class_names))
    # Blank where there were no images.
    rates = np.where(atlas.census.images[:, None] > 0, atlas.census.class_rates(), np.nan)
    image = axis.imshow(rates, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="none")
    axis.set_yticks(range(len(atlas.class_names)), atlas.class_names, fontsize=8)
    _layer_ticks(axis, atlas)
    figure.colorbar(image, ax=axis, label="share of images with the filter open", pad=0.01)
    return _png(figure)


def draw_cofiring(atlas: Atlas) -> bytes:
    """Which filters open and close together."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(
        atlas.census.firing_correlation(), cmap=_CORRELATION, vmin=-1, vmax=1, interpolation="antialiased"
    )
    _layer_ticks(axis, atlas)
    starts = np.cumsum([0, *atlas.census.layers.values()])[:-1]
    axis.set_yticks(starts, list(atlas.census.layers), fontsize=6)
    figure.colorbar(image, ax=axis, label="correlation of two filters (phi)", pad=0.01, shrink=0.8)
    return _png(figure)


def draw_agreement(atlas: Atlas) -> bytes:
    """How alike the paths of two classes are, layer by layer."""
    columns = min(6, len(atlas.agreement))
    rows = -(-len(atlas.agreement) // columns)
    figure = Figure(figsize=(1.9 * columns + 1.2, 2.05 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    lowest = min(float(np.nanmin(values)) for values in atlas.agreement.values())
    image = None
    for axis, (layer, values) in zip(axes.flat, atlas.agreement.items(), strict=False):
        image = axis.imshow(values, cmap="cividis", vmin=lowest, vmax=1, interpolation="none")
        axis.set_title(layer, fontsize=7.5)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes.flat[len(atlas.agreement) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(atlas.class_names)), [name[:10] for name in atlas.class_names], fontsize=6)
    assert image is not None
    figure.colorbar(image, ax=axes, label="share of filters in the same state", shrink=0.7, pad=0.01)
    return _png(figure)


def draw_embedding(atlas: Atlas) -> bytes:
    """Paths in the plane: near ones are alike; attacked images on top."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axis = figure.add_subplot()
    handles: list[Line2D] = []
    for label, name in enumerate(atlas.class_names):
        colour, marker = _look(label)
        points = [point for point in atlas.points if point.recipe is None and point.label == label]
        axis.plot([p.x for p in points], [p.y for p in points], marker, color=colour, markersize=4, alpha=0.55, mew=0)
        handles.append(Line2D([], [], marker=marker, color=colour, linestyle="", label=name))
    recipes = sorted({point.recipe for point in atlas.points if point.recipe is not None})
    for recipe, marker in zip(recipes, ("x", "+", "1", "2", "3", "4", "|", "_") * 4, strict=False):
        points = [point for point in atlas.points if point.recipe == recipe]
        for point in points:
            axis.plot([point.x], [point.y], marker, color=_look(point.label)[0], markersize=7, mew=1.6)
        handles.append(Line2D([], [], marker=marker, color=_INK, linestyle="", label=f"attacked: {recipe}"))
    axis.set_xlabel("t-SNE, first coordinate (no unit)", fontsize=9)
    axis.set_ylabel("t-SNE, second coordinate (no unit)", fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def draw_concept(concept: Concept) -> bytes:
    """Images that share a combination, with the region of each that excites it."""
    shown = max(1, len(concept.regions))
    figure = Figure(figsize=(1.5 * shown, 1.5), layout="constrained")
    axes = figure.subplots(1, shown, squeeze=False)
    for axis, pixels, region in zip(axes.flat, concept.pixels, concept.regions, strict=True):
        _draw_region(axis, pixels, region.left, region.top, region.width, region.height)
    return _png(figure)


def _draw_region(axis: Axes, pixels: Pixels, left: int, top: int, width: int, height: int) -> None:
    axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
    for colour, thickness in (("white", 3.5), (OPENED, 1.8)):
        x, y = left - 0.5, top - 0.5
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        axis.plot(*zip(*corners, strict=True), color=colour, linewidth=thickness, clip_on=False)
    axis.set_xlim(-0.5, pixels.shape[1] - 0.5)
    axis.set_ylim(pixels.shape[0] - 0.5, -0.5)
    axis.axis("off")


def _look(label: int) -> tuple[str, str]:
    return _COLOURS[label % len(_COLOURS)], _MARKERS[label // len(_COLOURS) % len(_MARKERS)]


def _wide(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, figure.add_subplot()


def _layer_axis(axis: Axes, atlas: Atlas) -> None:
    names = [f"{layer.layer}  ({layer.filters})" for layer in atlas.layers]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _layer_ticks(axis: Axes, atlas: Atlas) -> None:
    starts = np.cumsum([0, *atlas.census.layers.values()])[:-1]
    axis.set_xticks(starts, list(atlas.census.layers), rotation=70, ha="right", fontsize=7, rotation_mode="anchor")
    axis.set_xlabel("filters of all gated layers, in network order", fontsize=9)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
