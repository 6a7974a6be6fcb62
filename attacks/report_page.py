"""One HTML page of what attacks did: nothing is fetched, every picture is inside, a phone shows it as well."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from attacks.report import AttackSummary, Example, summarise
from attacks.report_pictures import (
    DISTANCE_NAMES,
    NORM_COLOURS,
    NORM_NAMES,
    axis_end,
    draw_contact_sheet,
    draw_distances,
    draw_success,
    family_points,
    magnified_change,
    shown_distance,
    stairs,
    tile,
)
from attacks.store import AttackStore
from detector.errors import DataError
from detector.images import Pixels
from detector.page import data_uri, fact_list
from detector.page import write_page as write_html

_TILE = 96
_STYLE = """
.bar { display: block; height: .35rem; background: #e4e7eb; } .bar > span { display: block; height: 100%; }
.recipes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.examples { display: flex; flex-wrap: wrap; gap: .6rem; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px; }
.triple img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
figure { width: 100%; max-width: 24rem; }
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a store's attacks, and the files that show it.

    Attributes:
        summaries: split -> one summary per recipe.
        notes: what a reader is to know first, such as that a run is unfinished.
        page: the HTML page.
        pictures: the PNG files.
    """

    summaries: Mapping[str, Sequence[AttackSummary]]
    notes: Sequence[str]
    page: Path
    pictures: Sequence[Path]


def make_report(store: AttackStore, out: Path) -> Report:
    """Summarise every split of `store`, and draw three pictures of each and one page of all into the folder `out`.

    Raises:
        DataError: the store holds no finished shard, or `out` cannot be written.
        ArtifactError: a shard is missing or altered.
    """
    splits = list(dict.fromkeys(key.split for key in store.records()))
    if not splits:
        raise DataError(f"expected finished attacks in {store.folder}, got none yet; run `pathguard attack` to go on")
    summaries = {split: summarise(store, split) for split in splits}
    notes = list(_unfinished(store, splits))
    pictures: list[Path] = []
    try:
        for split, of_split in summaries.items():
            success, distance, contact = (out / f"{kind}-{split}.png" for kind in ("success", "distance", "contact"))
            title = f"{store.origin.data}, split {split}"
            draw_success(success, f"{title}: success of each recipe", of_split)
            pictures.append(success)
            if any(summary.is_attack for summary in of_split):
                draw_distances(distance, f"{title}: images fooled by no more than a distance", of_split)
                pictures.append(distance)
            if any(summary.examples for summary in of_split):
                draw_contact_sheet(contact, f"{title}: images", of_split)
                pictures.append(contact)
        write_page(out / "index.html", store, summaries, {s: out / f"success-{s}.png" for s in splits}, notes)
    except OSError as error:
        raise DataError(f"expected a folder that can be written, got {out} ({error.strerror})") from None
    return Report(summaries, notes, out / "index.html", pictures)


def _unfinished(store: AttackStore, splits: Sequence[str]) -> Iterator[str]:
    for split in splits:
        try:
            store.check_finished(split)
        except DataError as error:
            yield str(error)


def write_page(
    file: Path,
    store: AttackStore,
    summaries: Mapping[str, Sequence[AttackSummary]],
    pictures: Mapping[str, Path],
    notes: Sequence[str],
) -> None:
    """Write the page.

    Args:
        file: the HTML file to write.
        store: whose attacks these are.
        summaries: split -> what became of each recipe on it.
        pictures: split -> the picture of its success rates.
        notes: what a reader is to know first, such as that a run is unfinished.
    """
    origin = store.origin
    facts = {
        "data": origin.data,
        "network (SHA-256 of its weights)": origin.network,
        "seed": str(origin.seed),
        "folder": str(store.folder),
    }
    body = [
        f"<h1>Attacks on {escape(origin.data)}</h1>",
        fact_list(facts),
        "<p>Only images that the network gets right were attacked. An image counts as fooled where the network is "
        "wrong about it <em>after</em> its pixels were rounded to 8 bits. Distances are medians over the fooled "
        "images; those of noise and corruptions are over all images.</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
    ]
    if len(summaries) > 1:
        links = " · ".join(f'<a href="#{escape(split)}">{escape(split)}</a>' for split in summaries)
        body.append(f"<nav aria-label='splits'>Splits: {links}</nav>")
    for split, of_split in summaries.items():
        body += _section(split, of_split, pictures[split])
    write_html(file, f"Attacks on {origin.data}", body, _STYLE)


def _section(split: str, summaries: Sequence[AttackSummary], picture: Path) -> Iterable[str]:
    yield f'<section aria-labelledby="{escape(split)}">'
    yield f'<h2 id="{escape(split)}">Split {escape(split)}</h2>'
    yield _table(split, summaries)
    said = "; ".join(f"{s.figures.recipe} {s.figures.fooled:.1%}" for s in summaries)
    yield (
        "<details><summary>As a picture</summary><figure class='wide' style='max-width:none'>"
        f'<img alt="Share of images that fooled the network: {escape(said)}" src="{data_uri(picture.read_bytes())}">'
        "</figure></details>"
    )
    charted = [summary for summary in summaries if summary.is_attack]
    for norm in dict.fromkeys(summary.curve.norm for summary in charted):
        yield _backdrop(split, [summary for summary in charted if summary.curve.norm == norm])
    yield "<p>Each chart: how many of the images were fooled by a change of at most that size, in the recipe's norm. "
    yield "Dotted: the budget. Dots: the same attack at each of its budgets. Grey: the other recipes of that norm.</p>"
    yield '<div class="recipes">'
    for summary in summaries:
        yield from _article(split, summary, [other for other in charted if other.curve.norm == summary.curve.norm])
    yield "</div></section>"


def _table(split: str, summaries: Sequence[AttackSummary]) -> str:
    headings = (
        "recipe", "images", "fooled", "goal reached", "budget", "L-inf, levels of 255", "L2", "L1", "L0",
        "forward passes", "gradients",
    )  # fmt: skip
    rows = []
    for summary in summaries:
        figures = summary.figures
        colour = NORM_COLOURS[summary.curve.norm if summary.is_attack else None]
        bar = f'<span class="bar"><span style="width:{figures.fooled:.1%};background:{colour}"></span></span>'
        cells = (
            str(figures.images), f"{figures.fooled:.1%}{bar}", f"{figures.reached:.1%}", _budget(summary),
            _number(255 * figures.linf, 1), _number(figures.l2, 3), _number(figures.l1, 2), _number(figures.l0, 0),
            _number(figures.forwards, 1), _number(figures.gradients, 1),
        )  # fmt: skip
        name = f'<a href="#{_anchor(split, figures.recipe)}">{escape(figures.recipe)}</a>'
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    caption = f"Success, median distances and mean cost per image on the split {split}"
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _article(split: str, summary: AttackSummary, alike: Sequence[AttackSummary]) -> Iterable[str]:
    figures = summary.figures
    anchor = _anchor(split, figures.recipe)
    yield f'<article aria-labelledby="{anchor}"><h3 id="{anchor}">{escape(figures.recipe)}</h3>'
    yield f"<p>{figures.fooled:.1%} of {figures.images} images fooled.</p>"
    if summary.is_attack:
        yield _chart(split, summary, alike)
    if summary.examples:
        yield '<div class="examples">'
        yield from (_example(figures.recipe, example) for example in summary.examples)
        yield "</div>"
    settings = {name: json.dumps(value) for name, value in summary.parameters.items()}
    yield f"<details><summary>Parameters</summary>{fact_list(settings)}</details></article>"


def _example(recipe: str, example: Example) -> str:
    change, times = magnified_change(example)
    verdict = f"taken for {example.predicted}" if example.fooled else f"still {example.predicted}"
    tiles = (
        (f"clean {example.label}, image {example.image}", example.clean),
        (f"the same image attacked by {recipe}, {verdict}", example.attacked),
        (f"what {recipe} changed in it, magnified {times} times on grey", change),
    )
    images = "".join(f'<img alt="{escape(alt)}" src="{_tile_uri(pixels)}">' for alt, pixels in tiles)
    caption = f"{example.label} ({example.image}), {verdict}; change x {times}"
    return f'<figure><div class="triple">{images}</div><figcaption>{escape(caption)}</figcaption></figure>'


_LEFT, _TOP, _WIDTH, _HEIGHT = 38, 8, 270, 120


def _line(summary: AttackSummary, right: float, colour: str, thickness: float) -> str:
    points = zip(*stairs(summary, right), strict=True)
    places = " ".join(f"{_LEFT + _WIDTH * x / right:.1f},{_TOP + _HEIGHT * (1 - y):.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{thickness}"/>'


def _backdrop(split: str, summaries: Sequence[AttackSummary]) -> str:
    """The curves of all recipes of one norm in grey, once for all charts that stand before them."""
    right = axis_end(summaries)
    lines = "".join(_line(summary, right, "#c9ced6", 1) for summary in summaries)
    name = _anchor(split, f"all-{summaries[0].curve.norm}")
    return f'<svg width="0" height="0" aria-hidden="true" style="position:absolute"><g id="{name}">{lines}</g></svg>'


def _chart(split: str, summary: AttackSummary, alike: Sequence[AttackSummary]) -> str:
    """Success against distance, drawn in the page itself so that its words stay sharp and small."""
    left, top, width, height = _LEFT, _TOP, _WIDTH, _HEIGHT
    norm, right = summary.curve.norm, axis_end(alike)
    marks = []
    for share in (0, 0.5, 1):
        y = top + height * (1 - share)
        marks.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#e4e7eb"/>')
        marks.append(f'<text x="{left - 4}" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
    for part in (0, 0.5, 1):
        x = left + width * part
        anchor = "end" if part == 1 else "middle"
        marks.append(f'<text x="{x}" y="{top + height + 14}" text-anchor="{anchor}">{right * part:.3g}</text>')
    name = f"{NORM_NAMES[norm]}: {DISTANCE_NAMES[norm]}"
    marks.append(f'<text x="{left + width / 2}" y="{top + height + 29}" text-anchor="middle">{escape(name)}</text>')
    marks.append(f'<use href="#{_anchor(split, f"all-{norm}")}"/>')
    marks.append(_line(summary, right, NORM_COLOURS[norm], 2.5))
    if summary.budget is not None:
        x = left + width * min(1.0, shown_distance(norm, summary.budget) / right)
        marks.append(
            f'<line x1="{x}" x2="{x}" y1="{top}" y2="{top + height}" stroke="#1f2328" stroke-dasharray="2 3"/>'
        )
        marks += [
            f'<circle cx="{left + width * x / right:.1f}" cy="{top + height * (1 - y):.1f}" r="3" fill="#1f2328"/>'
            for x, y in zip(*family_points(summary, alike), strict=True)
        ]
    median = shown_distance(norm, getattr(summary.figures, norm))
    said = (
        f"{summary.figures.recipe}: {summary.figures.fooled:.1%} fooled, median {NORM_NAMES[norm]} {_number(median, 3)}"
    )
    size = f"0 0 {left + width + 6} {top + height + 36}"
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(said)}">{"".join(marks)}</svg>'


def _budget(summary: AttackSummary) -> str:
    if summary.budget is None:
        return "smallest change" if summary.is_attack else "none"
    norm = summary.curve.norm
    return f"{NORM_NAMES[norm]} {shown_distance(norm, summary.budget):.3g}{' / 255' if norm == 'linf' else ''}"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if value == value else "-"


def _anchor(split: str, recipe: str) -> str:
    return escape(f"{split}-{recipe}")


def _tile_uri(pixels: Pixels) -> str:
    """A PNG as small as the image is, at most a tile: the page scales it up without blurring."""
    buffer = io.BytesIO()
    tile(pixels, min(_TILE, max(pixels.shape[:2]))).save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue())
