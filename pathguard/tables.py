"""Rows for a person or, with `--json`, for a program."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from detector.cells import cell_text, finite

Rows = Sequence[Mapping[str, object]]
# Of more columns, a table that has twice as many columns as rows is printed on its side.
WIDEST = 8
# Room that its labels, and each of its rows, take on the terminal.
_LABEL, _VALUE = 24, 14


class Figure(str):
    """A number as a person reads it, such as 67.9 %; set to the right like any other."""

    __slots__ = ()


def row_of(value: Any) -> dict[str, object]:
    """The fields of a dataclass, as one flat row: a nested dataclass contributes its own fields."""
    row: dict[str, object] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            row.update(row_of(item))
        else:
            row[field.name] = item
    return row


def show(title: str, rows: Rows, as_json: bool = False) -> None:
    """Print `rows` on standard output: a JSON list of objects, or a table under `title`.

    Args:
        title: what the table shows.
        rows: column -> value; all rows with the columns of the first.
        as_json: whether a program reads it; values that are not finite become null.
    """
    if as_json:
        print(json.dumps([finite(row) for row in rows], indent=2))
        return
    console = Console()
    if title:  # not by the table, which would fold it to its own width
        console.print(title, style="italic", highlight=False, markup=False, soft_wrap=True)
    columns = list(rows[0]) if rows else []
    if len(columns) > max(WIDEST, 2 * len(rows)):
        fitting = max(1, (console.width - _LABEL) // _VALUE)
        for first in range(0, len(rows), fitting):
            console.print(_on_its_side(rows[first : first + fitting], columns, named=len(rows) > 1))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        numeric = all(isinstance(row[column], int | float | Figure) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell_text(row[column]) for column in columns))
    console.print(table)


def _on_its_side(rows: Rows, columns: Sequence[str], named: bool) -> Table:
    """A row for each column, headed by what stands in the first one where the rows are `named` by it."""
    table = Table(box=box.SIMPLE_HEAD, show_header=named)
    table.add_column(columns[0].replace("_", " "), overflow="fold")
    for row in rows:
        table.add_column(cell_text(row[columns[0]]), overflow="fold")
    for column in columns[1:] if named else columns:
        table.add_row(column.replace("_", " "), *(cell_text(row[column]) for row in rows))
    return table
