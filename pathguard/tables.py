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
# A row of more columns, if it is the only one, is printed as a column.
WIDEST = 8


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
    table = Table(box=box.SIMPLE_HEAD)
    columns = list(rows[0]) if rows else []
    if len(rows) == 1 and len(columns) > WIDEST:
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for column, value in rows[0].items():
            table.add_row(column.replace("_", " "), cell_text(value))
        table.show_header = False
        console.print(table)
        return
    for column in columns:
        numeric = all(isinstance(row[column], int | float | Figure) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell_text(row[column]) for column in columns))
    console.print(table)
