"""Which actors the server may give batches to: lent by replicas for a second at a time, whichever Ray Serve chooses.

So Serve balances and counts without standing in the way of a batch: it takes the number of leases for the load. There
are as many as batches that ran at once in the second before, and always one, so that after a pause nobody waits for
Serve either.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from service.errors import ExpiredError, UnavailableError

log = logging.getLogger(__name__)

TERM_SECONDS = 1.0
# After a refusal, or an actor that is known to be lost, Serve is asked again after so long.
_AGAIN_SECONDS = 0.1
# How often somebody looks whether a batch is still wanted, while it waits.
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """An actor on loan.

    Attributes:
        actor: of a model.
        call: of the replica that lends it, which Ray would end if nobody held it.
    """

    actor: Any
    call: Any


class Leases:
    """Actors to give batches to, for many threads; a thread of its own asks for them."""

    def __init__(self, ask: Callable[[], Lease], term_seconds: float = TERM_SECONDS) -> None:
        """Asks for the first lease, without waiting for it.

        Args:
            ask: gives a lease of `term_seconds` from now; may wait, and may raise.
            term_seconds: how long a lease lasts.
        """
        self._ask, self._term_seconds = ask, term_seconds
        self._changed = threading.Condition()
        self._free: list[Lease] = []
        self._waiting = 0
        self._busy = 0
        self._most_busy = 0  # in this term
        self._term = 0
        self._dropped: set[Lease] = set()
        self._lost: set[Any] = set()
        self._closed = False
        self._tending = threading.Thread(target=self._tend, name="leases", daemon=True)
        self._tending.start()

    @contextmanager
    def one(self, wanted: Callable[[], float]) -> Iterator[Lease]:
        """A lease, for one batch.

        Args:
            wanted: for how many seconds yet somebody waits for the batch.

        Raises:
            ExpiredError: nobody does any more.
            UnavailableError: there are no more leases.
        """
        with self._changed:
            while not self._free:
                if self._closed:
                    raise UnavailableError("the model is being unloaded")
                if wanted() <= 0:
                    raise ExpiredError("nobody waits for the answer any more")
                self._waiting += 1
                self._changed.notify_all()
                self._changed.wait(_LOOK_SECONDS)
                self._waiting -= 1
            lease, term = self._free.pop(), self._term
            self._busy += 1
            self._most_busy = max(self._most_busy, self._busy)
        try:
            yield lease
        finally:
            with self._changed:
                self._busy -= 1
                if term == self._term and lease not in self._dropped and lease.actor not in self._lost:
                    self._free.append(lease)
                    if self._waiting:  # else the thread that asks would wake up behind each batch
                        self._changed.notify_all()
                self._dropped.discard(lease)

    def drop(self, lease: Lease, lost: bool = False) -> None:
        """The lease of the present batch is used no more.

        Args:
            lease: what `one` gave.
            lost: its actor has died, and is given to nobody any more, even if its replica still lends it.
        """
        with self._changed:
            self._dropped.add(lease)
            if lost:
                self._lost.add(lease.actor)
                self._free = [other for other in self._free if other.actor not in self._lost]

    def close(self) -> None:
        """Asks for no more leases; safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _tend(self) -> None:
        ends = 0.0  # of the present term
        while True:
            with self._changed:
                while not (self._closed or self._missing() or (now := time.monotonic()) >= ends):
                    self._changed.wait(ends - now)
                if self._closed:
                    return
                begun = time.monotonic()
                turn = begun >= ends
                count = max(1, self._most_busy) if turn else self._missing()
            leases = [lease for _ in range(count) if (lease := self._asked()) is not None]
            with self._changed:
                if turn and leases:
                    ends, self._most_busy = begun + self._term_seconds, self._busy
                    self._free = []
                    self._term += 1
                self._free += leases
                self._changed.notify_all()
            if len(leases) < count:
                time.sleep(_AGAIN_SECONDS)

    def _missing(self) -> int:
        return max(0, self._waiting - len(self._free))

    def _asked(self) -> Lease | None:
        """A lease, or None where there is none to be had for now."""
        if self._closed:
            return None
        try:
            lease = self._ask()
        except Exception as error:  # whatever Serve raises while replicas come and go
            log.debug("no lease of a replica: %s", error)
            return None
        return None if lease.actor in self._lost else lease
