"""Notices one client that sends many near-identical images.

An attack that sees only answers has to ask again and again with small changes of one image; stateful detection (Chen,
Carlini and Wagner 2020, "Stateful Detection of Black-Box Adversarial Attacks") looks for that. There a trained encoder
measures likeness and the mean distance to the 50 nearest neighbours decides; here the likeness is that of 8 x 8 coarse
brightnesses, which needs no training and no second network, and the number of neighbours within a distance decides.

What it cannot see: one attacker behind many client names, changes larger than the distance (turned or shifted images),
and who spreads the queries over more images than are remembered. What it sees wrongly: frames of a still camera.
"""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from detector.images import Pixels

SIDE = 8
Fingerprint = npt.NDArray[np.int16]

# Sampled pixels that go into one coarse brightness, in each direction: enough to even out noise, and cheap.
_SAMPLES = 4


def fingerprint(pixels: Pixels) -> Fingerprint:
    """Coarse brightnesses of an image `(height, width, channels)`, row by row, `(64,)` in [0, 255]."""
    rows, columns = (_sampled(length) for length in pixels.shape[:2])
    sampled = pixels[rows][:, columns]
    blocks = sampled.reshape(SIDE, len(rows) // SIDE, SIDE, len(columns) // SIDE * pixels.shape[2])
    sums = blocks.sum(axis=(1, 3), dtype=np.uint32)
    return np.asarray(sums // (sampled.size // sums.size), dtype=np.int16).ravel()


def _sampled(length: int) -> npt.NDArray[np.int64]:
    """Positions along one side: a whole number for each block, evenly spread."""
    count = SIDE * max(1, min(_SAMPLES, length // SIDE))
    return ((np.arange(count) + 0.5) * length / count).astype(np.int64)


class QueryWatch:
    """Remembers coarse images of each client, 64 bytes each, for a bounded number of clients and images."""

    def __init__(self, memory_images: int, max_clients: int, distance: float, neighbours: int) -> None:
        """Starts without memory.

        Args:
            memory_images: recent images remembered of each client, at least 1.
            max_clients: clients remembered; the one unseen for longest is forgotten first.
            distance: mean grey levels by which near-identical images differ at most.
            neighbours: how many near-identical ones among those remembered raise the alarm, at least 1.
        """
        self._memory = memory_images
        self._max_clients = max_clients
        self._distance = distance
        self._neighbours = neighbours
        self._clients: OrderedDict[str, _Recent] = OrderedDict()

    def __len__(self) -> int:
        """Clients remembered now."""
        return len(self._clients)

    def sees(self, client: str, pixels: Pixels) -> bool:
        """Whether this image raises the alarm; the client's memory then starts anew, for one alarm per series."""
        recent = self._clients.get(client)
        if recent is None:
            recent = self._clients[client] = _Recent(self._memory)
            if len(self._clients) > self._max_clients:
                self._clients.popitem(last=False)
        self._clients.move_to_end(client)
        mark = fingerprint(pixels)
        if recent.near(mark, self._distance) >= self._neighbours:
            del self._clients[client]
            return True
        recent.add(mark)
        return False


class _Recent:
    """A ring of the last images of one client, which grows as it fills."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._marks = np.empty((min(size, 16), SIDE * SIDE), dtype=np.uint8)
        self._count = 0

    def near(self, mark: Fingerprint, distance: float) -> int:
        known = self._marks[: min(self._count, self._size)]
        differences = np.abs(known - mark).mean(axis=1, dtype=np.float32)
        return int(np.count_nonzero(differences <= distance))

    def add(self, mark: Fingerprint) -> None:
        place = self._count % self._size
        if place == len(self._marks):
            room = min(self._size, 2 * len(self._marks)) - len(self._marks)
            self._marks = np.concatenate([self._marks, np.empty((room, SIDE * SIDE), dtype=np.uint8)])
        self._marks[place] = mark
        self._count += 1
