"""A value of a table, as a person reads it and as JSON can hold it."""

import math
from collections.abc import Mapping


def cell_text(value: object) -> str:
    """As a person reads it: four digits behind the point, nothing for None, a dash for NaN and infinity."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4f}" if math.isfinite(value) else "-"
        case Mapping():
            return ", ".join(f"{key} {cell_text(part)}" for key, part in value.items()) or "none"
        case _:
            return str(value)


def finite(row: Mapping[str, object]) -> dict[str, object]:
    """The row with None for numbers that are not finite, which JSON does not have."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
