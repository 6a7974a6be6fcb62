"""The last verdicts, and how many there were of each kind: for people who watch."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RecentVerdict:
    """One image that was answered.

    Attributes:
        when: seconds from 1970.
        source: where it came from: `call` or `page`.
        label: name of the predicted class.
        p_value: share of clean calibration images at least as suspicious, in (0, 1].
        adversarial: whether it was flagged.
    """

    when: float
    source: str
    label: str
    p_value: float
    adversarial: bool


class RecentVerdicts:
    """The newest verdicts. For any thread."""

    def __init__(self, kept: int = 50, window_seconds: float = 60.0, clock: Callable[[], float] = time.time) -> None:
        """None yet.

        Args:
            kept: how many are told one by one.
            window_seconds: time over which rates are told.
            clock: seconds from 1970.
        """
        self._lock = threading.Lock()
        self._clock = clock
        self._window = window_seconds
        self._verdicts: deque[RecentVerdict] = deque(maxlen=kept)
        # A second of the clock -> images and flagged ones in it, for as long as the window reaches.
        self._seconds: deque[tuple[int, int, int]] = deque()
        self._images = self._flagged = 0

    def add(self, source: str, label: str, p_value: float, adversarial: bool) -> None:
        """One more image was answered."""
        now = self._clock()
        with self._lock:
            self._verdicts.appendleft(RecentVerdict(now, source, label, p_value, adversarial))
            self._images += 1
            self._flagged += adversarial
            second, images, flagged = self._seconds.pop() if self._seconds else (int(now), 0, 0)
            if second != int(now):
                self._seconds.append((second, images, flagged))
                second, images, flagged = int(now), 0, 0
            self._seconds.append((second, images + 1, flagged + adversarial))
            self._forget(now)

    def summary(self) -> dict[str, object]:
        """The verdicts, newest first, and rates, as JSON values."""
        with self._lock:
            now = self._clock()
            self._forget(now)
            images = sum(images for _, images, _ in self._seconds)
            flagged = sum(flagged for _, _, flagged in self._seconds)
            return {
                "images": self._images,
                "flagged": self._flagged,
                "window_seconds": self._window,
                "images_in_window": images,
                "flagged_in_window": flagged,
                "images_per_second": images / self._window,
                "verdicts": [
                    {
                        "seconds_ago": max(0.0, now - verdict.when),
                        "source": verdict.source,
                        "label": verdict.label,
                        "p_value": verdict.p_value,
                        "adversarial": verdict.adversarial,
                    }
                    for verdict in self._verdicts
                ],
            }

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] < now - self._window:
            self._seconds.popleft()
