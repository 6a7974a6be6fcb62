"""What a former evaluation said of other detectors, which fitting ours anew does not change."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from attacks.evaluation.judgement import Sheet

Former = Mapping[str, Sequence[Mapping[str, Any]]]
OURS = "paths"  # what the names of our detector's rows begin with


def others_rows(former: Former, table: str) -> list[Mapping[str, Any]]:
    """The rows of a table that are of other detectors."""
    return [row for row in former[table] if not str(row["detector"]).startswith(OURS)]


def with_others(sheet: Sheet, former: Former, order: Sequence[str]) -> Sheet:
    """The sheet, and the former's rows of other detectors, by the order of the detectors' names."""
    rows = [*sheet.rows, *others_rows(former, sheet.name)]
    return replace(sheet, rows=sorted(rows, key=lambda row: order.index(str(row["detector"]))))
