"""Progress of long steps on the terminal: how far, how fast, how long still."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from attacks.campaign import Campaign
    from detector.network.training import Progress as TrainingProgress


# Names of validation figures that would not fit on a line of 80 columns.
_SHORT = {"accuracy": "acc", "keep_ratio": "open", "input_dependent": "live"}


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left {task.fields[status]}"),
    )
    console = Console(stderr=True)  # on standard error, so that --json and tables can be piped
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None, status="")
        began, first, told = 0.0, -1, 0

        def update(done: int, total: int, status: str) -> None:
            nonlocal began, first, told
            progress.update(task, completed=done, total=total, status=status)
            if first < 0:
                began, first = time.monotonic(), done
            tenth = 10 * done // max(total, 1)
            if console.is_terminal or tenth <= told:
                return
            told = tenth  # a log has no bar that moves: a line for every tenth
            told_of = [f"{title} {done}/{total}", status]
            if done > first:  # a resumed run's first report is of work that took no time of this one
                told_of.insert(1, f"{(time.monotonic() - began) / (done - first) * (total - done):.0f} s left")
            print(", ".join(filter(None, told_of)), file=sys.stderr, flush=True)

        yield update


@contextmanager
def training_bar(title: str) -> Iterator[Callable[["TrainingProgress"], None]]:
    """A listener for training: steps, loss, and the figures of the last whole epoch."""
    with _bar(title) as update:

        def listen(state: "TrainingProgress") -> None:
            figures = [f"{_SHORT.get(name, name)} {value:.3f}" for name, value in state.figures.items()]
            loss = [] if math.isnan(state.loss) else [f"loss {state.loss:.2f}"]
            update(state.step, state.steps, " ".join((*loss, *figures)))

        yield listen


@contextmanager
def attack_bar(title: str) -> Iterator[Callable[["Campaign"], None]]:
    """A listener for attacks: shards, and how often the last one fooled the network."""
    with _bar(title) as update:

        def listen(state: "Campaign") -> None:
            record = state.record
            status = f"{record.key.recipe} fooled {record.fooled} of {record.images}" if record else ""
            update(state.done, state.total, status)

        yield listen


@contextmanager
def encode_bar() -> Iterator[Callable[[int, int], None]]:
    """A listener for encodings: shards done, and shards in all."""
    with _bar("encode") as update:
        yield lambda done, total: update(done, total, "")


@contextmanager
def detect_bar() -> Iterator[Callable[[int, int, int, int], None]]:
    """A listener for a stream of images: how many of how many, how many adversarial, how many bad."""
    with _bar("detect") as update:

        def listen(done: int, total: int, adversarial: int, bad: int) -> None:
            update(done, total, f"{adversarial} adversarial" + (f", {bad} bad" if bad else ""))

        yield listen
