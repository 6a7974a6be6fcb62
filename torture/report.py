"""What a case found: passed or not, why not, and its figures; as a table for a person and as JSON for a program."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import machine

Figure = float | int | str


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One case.

    Attributes:
        case: what was done to the server, as a person reads it.
        figures: name -> what was counted or measured.
        problems: one line for each thing that was not as it has to be; none means passed.
        skipped: why the case did not run; None if it did.
        seconds: how long it took.
    """

    case: str
    figures: dict[str, Figure] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool | None:
        """Whether everything was as it has to be; None if the case did not run."""
        return None if self.skipped else not self.problems

    def expect(self, holds: bool, otherwise: str) -> None:
        """Notes the problem `otherwise` unless `holds`."""
        if not holds:
            self.problems.append(otherwise)


@contextmanager
def outcome_of(case: str) -> Iterator[Outcome]:
    """An outcome to fill in; an exception in the block becomes its problem, and the next case can run."""
    outcome = Outcome(case=case)
    began = time.perf_counter()
    try:
        yield outcome
    except Exception as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")
    finally:
        outcome.seconds = time.perf_counter() - began


def print_outcomes(title: str, outcomes: Sequence[Outcome]) -> None:
    """Prints a table on standard output, with the machine below it, and what was wrong below that."""
    table = Table(title=title, caption=machine(), title_justify="left", caption_justify="left")
    for heading in ("case", "figures"):
        table.add_column(heading, overflow="fold")
    table.add_column("s", justify="right")
    table.add_column("passed", justify="right")
    for outcome in outcomes:
        figures = ", ".join(f"{name} {_text(value)}" for name, value in outcome.figures.items())
        passed = {True: "yes", False: "NO", None: "not run"}[outcome.passed]
        table.add_row(outcome.case, outcome.skipped or figures, f"{outcome.seconds:.1f}", passed, end_section=True)
    console = Console()
    console.print(table)
    for outcome in outcomes:
        for problem in outcome.problems:
            console.print(f"{outcome.case}: {problem}", style="red", markup=False, highlight=False)


def write_outcomes(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes a JSON list of `{case, passed, seconds, figures, problems, skipped}`."""
    content = [
        {
            "case": outcome.case,
            "passed": outcome.passed,
            "seconds": round(outcome.seconds, 3),
            "figures": outcome.figures,
            "problems": outcome.problems,
            "skipped": outcome.skipped,
        }
        for outcome in outcomes
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def all_passed(outcomes: Sequence[Outcome]) -> bool:
    """Whether no case failed; one that did not run has not failed."""
    return all(outcome.passed is not False for outcome in outcomes)


def _text(value: Figure) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
