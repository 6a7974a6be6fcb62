"""The table a benchmark ends with: figures, their bars, and the machine they were measured on."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure.

    Attributes:
        figure: what was measured, with its unit, as a person reads it.
        value: the measurement; None where this run could not measure it.
        bar: the limit that `value` is held against; None where there is none.
        at_most: whether `value` must not exceed `bar` (True) or must reach it (False).
    """

    figure: str
    value: float | None
    bar: float | None = None
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar or without a value."""
        if self.value is None or self.bar is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def machine() -> str:
    """Processor, cores this process may use, and the versions of Python and torch, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    return f"{_processor()}, {cores} cores, Python {platform.python_version()}, torch {torch}"


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Prints `rows` as a table on standard output, with the machine below it."""
    table = Table(title=title, caption=machine(), title_justify="left", caption_justify="left")
    table.add_column("figure")
    for heading in ("value", "bar", "met"):
        table.add_column(heading, justify="right")
    for row in rows:
        bar = "" if row.bar is None else f"{'at most' if row.at_most else 'at least'} {row.bar:g}"
        met = {True: "yes", False: "NO", None: ""}[row.met]
        table.add_row(row.figure, "not measured" if row.value is None else f"{row.value:.4g}", bar, met)
    Console().print(table)


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Writes `rows` to `file` as a JSON list of `{figure, value, bar, met}`."""
    content = [{"figure": row.figure, "value": row.value, "bar": row.bar, "met": row.met} for row in rows]
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
