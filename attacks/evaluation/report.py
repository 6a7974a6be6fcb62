"""An evaluation written down: one HTML page, pictures, and every table as JSON and CSV."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from attacks.evaluation.adaptive import Withstood
from attacks.evaluation.judgement import Curve, Matrix, Sheet
from attacks.evaluation.pictures import draw_curves, draw_matrix, draw_withstood
from detector.cells import cell_text, finite
from detector.errors import DataError
from detector.files import write_whole
from detector.page import data_uri, fact_list, write_page


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was found.

    Attributes:
        facts: what was judged, by what, for a person.
        notes: what a reader is to know first.
        sheets: the tables.
        curves: a ROC curve for each attack.
        norms: attack -> its norm.
        matrix: fitted on one attack, judged by each.
        withstood: adaptive attacks; empty where none were run.
    """

    facts: Mapping[str, str]
    notes: Sequence[str]
    sheets: Sequence[Sheet]
    curves: Sequence[Curve]
    norms: Mapping[str, str]
    matrix: Matrix
    withstood: Sequence[Withstood]

    def sheet(self, name: str) -> Sheet:
        """The table of that name."""
        return next(sheet for sheet in self.sheets if sheet.name == name)


def write_evaluation(found: Evaluation, folder: Path) -> list[Path]:
    """Write `evaluation.json`, a CSV for each table, the pictures and `index.html`.

    Returns:
        The files, the page first.

    Raises:
        DataError: the folder cannot be written.
    """
    subject = found.facts["bundle"]
    pictures = {"roc": folder / "roc.png"}
    files = [folder / "index.html", folder / "evaluation.json", *(folder / f"{s.name}.csv" for s in found.sheets)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draw_curves(pictures["roc"], f"{subject}: ROC curves", found.curves, found.norms)
        if (found.matrix.auroc == found.matrix.auroc).any():
            pictures["matrix"] = folder / "matrix.png"
            draw_matrix(pictures["matrix"], f"{subject}: fitted on one attack, judged by another", found.matrix)
        if found.withstood:
            pictures["adaptive"] = folder / "adaptive.png"
            draw_withstood(pictures["adaptive"], f"{subject}: attackers who know the detector", found.withstood)
        write_whole(folder / "evaluation.json", (json.dumps(content_of(found), indent=1) + "\n").encode())
        for sheet in found.sheets:
            write_whole(folder / f"{sheet.name}.csv", _csv(sheet).encode())
        write_page(folder / "index.html", f"Detector {subject}", _body(found, pictures))
    except OSError as error:
        raise DataError(f"expected a folder that can be written, got {folder} ({error.strerror})") from None
    return [*files, *pictures.values()]


def content_of(found: Evaluation) -> dict[str, Any]:
    """Facts, notes and tables, JSON values."""
    return {
        "facts": dict(found.facts),
        "notes": list(found.notes),
        "tables": {sheet.name: [finite(row) for row in sheet.rows] for sheet in found.sheets},
    }


def _body(found: Evaluation, pictures: Mapping[str, Path]) -> Iterator[str]:
    yield f"<h1>Detector {escape(found.facts['bundle'])}</h1>"
    yield fact_list(found.facts)
    yield (
        "<p>An attack counts where the network was right about the clean image and is wrong about the attacked one "
        "after its pixels were rounded to 8 bits. All images here are of the test split, which nothing was fitted, "
        "chosen or calibrated on.</p>"
    )
    yield from (f'<p class="note">{escape(note)}</p>' for note in found.notes)
    links = " · ".join(f'<a href="#{escape(sheet.name)}">{escape(sheet.title)}</a>' for sheet in found.sheets)
    yield f"<nav aria-label='tables'>{links}</nav>"
    beside = {"attacks": "roc", "matrix": "matrix", "adaptive": "adaptive"}
    said = {
        "roc": "ROC curve of each attack: " + ", ".join(f"{c.attack} {c.auroc:.3f}" for c in found.curves),
        "matrix": "AUROC of each pair of attacks; the numbers stand in the table",
        "adaptive": "robust accuracy against the budget; the numbers stand in the table",
    }
    for sheet in found.sheets:
        name = escape(sheet.name)
        yield f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(sheet.title)}</h2>'
        picture = beside.get(sheet.name, "")
        if picture in pictures:
            uri = data_uri(pictures[picture].read_bytes())
            image = f'<img alt="{escape(said[picture])}" src="{uri}">'
            yield f"<figure class='wide' style='max-width:none'>{image}</figure>"
        yield _html_table(sheet)
        yield "</section>"


def _html_table(sheet: Sheet) -> str:
    if not sheet.rows:
        return "<p>nothing to show</p>"
    columns = list(sheet.rows[0])
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(cell_text(row.get(column)))}</th>' if place == 0
            else f"<td>{escape(cell_text(row.get(column)))}</td>"
            for place, column in enumerate(columns)
        )
        + "</tr>"
        for row in sheet.rows
    )  # fmt: skip
    return (
        f'<div class="scroll" role="region" aria-label="{escape(sheet.title)}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _csv(sheet: Sheet) -> str:
    written = io.StringIO()
    columns = list(sheet.rows[0]) if sheet.rows else []
    writer = csv.DictWriter(written, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(finite(row) for row in sheet.rows)
    return written.getvalue()
