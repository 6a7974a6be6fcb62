"""How much one client may ask: a bucket for its calls and one for its images, each filled at a steady rate.

The clock is the monotonic one, so that a machine whose date is set neither opens nor closes anybody's bucket.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from service.errors import OverloadedError


class Quotas:
    """One bucket per client, for a bounded number of clients; for the event loop's thread only."""

    def __init__(
        self,
        what: str,
        per_second: float,
        burst_seconds: float,
        max_clients: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with full buckets.

        Args:
            what: what is counted, such as `images`.
            per_second: how fast a bucket fills; 0 for no limit.
            burst_seconds: a full bucket holds this many seconds' worth, and at least one.
            max_clients: clients remembered; the one unseen for longest is forgotten first.
            clock: seconds that only grow.
        """
        self._what = what
        self._rate = per_second
        self._size = max(1.0, per_second * burst_seconds)
        self._max_clients = max_clients
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Clients remembered now."""
        return len(self._buckets)

    def take(self, client: str, amount: int) -> None:
        """Takes `amount` out of the client's bucket.

        A call for more than a full bucket is let in when the bucket is full, and leaves it below empty.

        Raises:
            OverloadedError: there is not enough in it; says when there will be.
        """
        if not self._rate:
            return
        now = self._clock()
        level, seen = self._buckets.get(client, (self._size, now))
        level = min(self._size, level + (now - seen) * self._rate)
        needed = min(float(amount), self._size)
        allowed = level >= needed - 1e-6  # whoever comes when told to is not refused for a rounding error
        self._buckets[client] = (level - amount if allowed else level, now)
        self._buckets.move_to_end(client)
        if len(self._buckets) > self._max_clients:
            self._buckets.popitem(last=False)
        if not allowed:
            raise OverloadedError(
                f"expected at most {self._rate:g} {self._what} a second from one client, got more",
                max(0.001, (needed - level) / self._rate),
                "rate",
            )
