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
    if len(columns) > max(WIDEST, 2 * len(rows)):
        named = columns[0] if len(rows) > 1 else ""  # of the only row, the name is one figure among others
        table.show_header = len(rows) > 1
        longest = max(len(column) for column in columns)
        table.add_column(named.replace("_", " "), overflow="fold", min_width=min(longest, 20))
        for row in rows:
            table.add_column(cell_text(row[columns[0]]), overflow="fold")
        for column in columns:
            if column != named:
                table.add_row(column.replace("_", " "), *(cell_text(row[column]) for row in rows))
        console.print(table)
        return
    for column in columns:
        numeric = all(isinstance(row[column], int | float | Figure) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell_text(row[column]) for column in columns))
    console.print(table)
