"""Who runs a function over many shards: this process, or the machines of a cluster behind the same three methods."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from detector.batches import best_device

Shard = TypeVar("Shard")
Result = TypeVar("Result")


class Workers(Protocol):
    """Runs shards: `InProcess`, or workers on other machines.

    What is given to `map` may be copied to other processes: it has to hold all it needs, and what `load` makes is
    changed by nobody else.
    """

    @property
    def device(self) -> torch.device:
        """Where a network that they are given has to lie."""

    def check_folder(self, folder: Path) -> None:
        """Make sure, before any work starts, that every worker can read and write `folder`.

        Raises:
            DataError: one cannot.
        """

    def map(self, load: Callable[[], Callable[[Shard], Result]], shards: Sequence[Shard]) -> Iterator[Result]:
        """The result of every shard, in the order of the shards, whichever is done first.

        What a shard gives must depend on the shard alone: one whose worker is lost is run again by another.

        Args:
            load: called once by each worker; loads what all shards need, and gives what runs one.
            shards: small; what is large is read by the worker.

        Raises:
            DetectorError: what `load` or a shard raised.
        """


class InProcess:
    """Runs one shard after the other, here."""

    @property
    def device(self) -> torch.device:
        """As `Workers.device`: the GPU where there is one."""
        return best_device()

    def check_folder(self, folder: Path) -> None:
        """As `Workers.check_folder`: whoever opened the folder has seen that it can be used."""

    def map(self, load: Callable[[], Callable[[Shard], Result]], shards: Sequence[Shard]) -> Iterator[Result]:
        """As `Workers.map`."""
        if shards:
            yield from map(load(), shards)


IN_PROCESS = InProcess()
