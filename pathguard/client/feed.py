"""What a stream of images has sent and is still owed: the part of it that is the same for threads and for asyncio."""

import collections
import itertools
from collections.abc import Iterator

from pathguard.client.errors import ServerError
from pathguard.client.requests import Options, Part
from pathguard.client.results import ImageResult
from protos.pathguard.v1 import detection_pb2 as pb

# Images in a message: what the server runs together. Messages under way: enough that the next ones are decoded
# while the model runs.
IMAGES_PER_MESSAGE = 32
MESSAGES_UNDER_WAY = 8

# How often a feed is begun again without one answer in between, and the seconds before the first time.
_MOST_TRIES = 5
_FIRST_PAUSE_SECONDS = 0.1


class Feed:
    """The parts of a feed: still to be sent, waiting for their answers, answered. Not for several threads at once."""

    def __init__(self, parts: Iterator[Part], options: Options) -> None:
        """Takes the first part when it is asked for."""
        self._parts = parts
        self._options = options
        self._positions = itertools.count()
        self._again: collections.deque[tuple[int, Part]] = collections.deque()
        self._waiting: dict[int, Part] = {}
        self._unsent: list[tuple[int, ImageResult]] = []
        self._tries = 0
        self._last = False

    @property
    def waiting(self) -> int:
        """Messages that have no answer yet."""
        return len(self._waiting)

    @property
    def done(self) -> bool:
        """Whether everything has been sent and answered."""
        return self._last and not self._waiting and not self._again and not self._unsent

    def take(self) -> pb.DetectStreamRequest | None:
        """The next message to send; None if there is none left.

        Raises:
            InputError: as `requests.split`.
        """
        while True:
            if self._again:
                first, part = self._again.popleft()
            else:
                new = next(self._parts, None)
                if new is None:
                    self._last = True
                    return None
                part = new
                first = next(self._positions)
                for _ in part.problems[1:]:
                    next(self._positions)
            if part.messages:
                break
            # Not one image of it can be sent: it is answered here.
            self._unsent += enumerate(part.results(None), start=first)
        self._waiting[first] = part
        # The number of the first image tells which message an answer is for.
        part.messages[0].id = str(first)
        return pb.DetectStreamRequest(request=self._options.request(part.messages))

    def answered(self, message: pb.DetectStreamResponse) -> list[tuple[int, ImageResult]]:
        """The position of each image that is answered now, and its result."""
        self._tries = 0
        first = int(message.response.results[0].id)
        part = self._waiting.pop(first)
        return [*self.unsent(), *enumerate(part.results(message.response), start=first)]

    def ended(self) -> list[tuple[int, ImageResult]]:
        """As `unsent`, when the server has ended the stream of its own will.

        Raises:
            ServerError: it has not answered everything.
        """
        if self._waiting:
            raise ServerError(f"expected an answer to every message, got none to {len(self._waiting)} of them")
        return self.unsent()

    def unsent(self) -> list[tuple[int, ImageResult]]:
        """Likewise for images that were not sent because they cannot be read."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def again(self) -> float | None:
        """After a lost connection: what waits will be sent again; seconds to wait before, or None to give up."""
        self._tries += 1
        if self._tries >= _MOST_TRIES:
            return None
        self._again.extendleft(reversed(self._waiting.items()))
        self._waiting = {}
        return float(_FIRST_PAUSE_SECONDS * 2**self._tries)
