"""The atlas as one HTML page."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from detector.errors import DataError
from detector.interpretation.atlas import CLOSED_FOR, Atlas, Concept
from detector.interpretation.atlas_pictures import (
    draw_agreement,
    draw_census,
    draw_cofiring,
    draw_concept,
    draw_embedding,
    draw_firing_rates,
    draw_information,
)
from detector.interpretation.concepts import Purity
from detector.page import data_uri, fact_list, write_page

_STYLE = """
figure img { width: 100%; height: auto; } figure { margin: 1rem 0; } .concept img { max-width: 44rem; }
article { margin: 1rem 0; }
"""


def write_atlas(file: Path, atlas: Atlas) -> None:
    """Write the page, its pictures inside.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        write_page(file, f"Paths of a network for {atlas.data}", _body(atlas), _STYLE)
    except OSError as error:
        raise DataError(f"expected to write {file}, got: {error.strerror}") from None


def _body(atlas: Atlas) -> Iterator[str]:
    yield f"<h1>Paths of a network for {escape(atlas.data)}</h1>"
    yield fact_list(
        {
            "network (SHA-256 of its weights)": atlas.network,
            "probes and combinations found on": f"{atlas.fitted_images:,} training images",
            "all figures of": f"{atlas.judged_images:,} other images (split fitting)",
            "accuracy on these": f"{atlas.accuracy:.1%}",
            "different paths among these": f"{atlas.distinct_paths:,}",
        }
    )
    yield from _section("layers", "Layers", _layers(atlas))
    yield from _section("classes", "Classes", _classes(atlas))
    yield from _section("plane", "Paths in the plane", _plane(atlas))
    yield from _section("concepts", "Combinations of filters", _concepts(atlas))


def _section(anchor: str, heading: str, parts: Iterator[str]) -> Iterator[str]:
    yield f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{heading}</h2>'
    yield from parts
    yield "</section>"


def _figure(png: bytes, words: str, caption: str) -> str:
    return f'<figure><img alt="{escape(words)}" src="{data_uri(png)}"><figcaption>{caption}</figcaption></figure>'


def _layers(atlas: Atlas) -> Iterator[str]:
    live = np.mean([layer.input_dependent for layer in atlas.layers])
    yield _figure(
        draw_census(atlas),
        f"Filters of each layer: on average {live:.0%} depend on the image",
        "In brackets: filters of the layer. A filter depends on the image where it is open for 1 % to 99 % of them.",
    )
    yield _figure(
        draw_information(atlas),
        "Information of each layer's path about the class, in the table below",
        "Bars: a lower bound of I(path of the layer; class): H(class) less the cross-entropy of a logistic probe on "
        "images that it never saw (Barber and Agakov, 2003). Diamonds: plug-in estimate for one filter alone, less its "
        "first-order bias (Panzeri and Treves, 1996).",
    )
    census = atlas.census
    information, bias = (census.by_layer(values) for values in (census.information(), census.bias()))
    entropy, conditional = (census.by_layer(values) for values in (census.entropy(), census.conditional_entropy()))
    rows = [
        (
            layer.layer,
            f"{layer.filters}",
            f"{layer.keep_ratio:.1%}",
            f"{layer.information:.3f}",
            f"{information[layer.layer].max():.3f} (filter {information[layer.layer].argmax()})",
            f"{bias[layer.layer].max():.4f}",
            f"{entropy[layer.layer].mean():.3f}",
            f"{conditional[layer.layer].mean():.3f}",
        )
        for layer in atlas.layers
    ]
    headings = (
        "layer", "filters", "open", "I(path; class) at least, nats", "best filter, plug-in, nats", "its bias, at most",
        "mean H(z)", "mean H(z | class)",
    )  # fmt: skip
    yield _table("Each gated layer", headings, rows)
    yield _figure(
        draw_cofiring(atlas),
        "Correlation of every pair of filters",
        "Orange: two filters that open together; blue: one opens where the other closes.",
    )


def _classes(atlas: Atlas) -> Iterator[str]:
    yield _figure(
        draw_firing_rates(atlas),
        "Share of each class's images for which each filter is open",
        "A column of one colour is a filter that does not care about the class.",
    )
    yield _figure(
        draw_agreement(atlas),
        "How alike the paths of each two classes are, for each layer",
        "Share of a layer's filters that an image of one class and an image of another have in the same state, both "
        "drawn at random; on the diagonal, two images of one class.",
    )


def _plane(atlas: Atlas) -> Iterator[str]:
    recipes = sorted({point.recipe for point in atlas.points if point.recipe is not None})
    attacked = f"; on top, images attacked by {', '.join(recipes)}, coloured by their right class" if recipes else ""
    yield _figure(
        draw_embedding(atlas),
        "Paths of images in the plane, coloured by class",
        f"{sum(point.recipe is None for point in atlas.points):,} clean images{escape(attacked)}. t-SNE of the paths' "
        "first 50 principal components: near points are alike, far distances mean little.",
    )


def _concepts(atlas: Atlas) -> Iterator[str]:
    yield (
        "<p>A combination is a group of filters that are open together for many images of a class, seldom for others "
        "(non-negative matrix factorisation of the class's paths). Purity: of the images that have all of them open, "
        "how many are of the class. Boxes: where the gradient of the joint peak of the filters lies.</p>"
    )
    yield _table(
        "All combinations, on images that they were not found on",
        ("class", "filters", "share of class", "purity", "best filter alone", "random of the same size"),
        [_purity_row(atlas, purity) for purity in atlas.purities],
    )
    for concept in atlas.concepts:
        yield from _concept(atlas, concept)


def _purity_row(atlas: Atlas, purity: Purity) -> tuple[str, ...]:
    return (
        atlas.class_names[purity.combination.label],
        str(len(purity.combination.filters)),
        f"{purity.share:.1%}",
        *(_share(value) for value in (purity.purity, purity.single, purity.random)),
    )


def _concept(atlas: Atlas, concept: Concept) -> Iterator[str]:
    purity, closing = concept.purity, concept.closing
    name = atlas.class_names[purity.combination.label]
    yield f'<article class="concept"><h3>{escape(name)}</h3>'
    yield fact_list(
        {
            "filters": ", ".join(_named_filters(atlas, purity.combination.filters)),
            "shared by": f"{purity.images:,} images, {_share(purity.purity)} of them of this class",
            "best filter alone": _share(purity.single),
            "random combinations of as many": _share(purity.random),
            f"closed for {min(CLOSED_FOR, atlas.judged_images):,} images": f"accuracy of {name} falls by "
            f"{_points(closing.own)}, that of the others by {_points(closing.others)} on average",
        }
    )
    if len(concept.regions):
        yield _figure(
            draw_concept(concept),
            f"Images that share the combination for {name}, with the region of each that excites it",
            "The images of other classes among them are shown too.",
        )
    yield "</article>"


def _named_filters(atlas: Atlas, filters: Sequence[int]) -> Iterator[str]:
    start = 0
    for layer, width in atlas.census.layers.items():
        inside = [str(place - start) for place in filters if start <= place < start + width]
        if inside:
            yield f"{layer} {' '.join(inside)}"
        start += width


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} points"


def _table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
