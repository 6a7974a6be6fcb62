"""Random numbers of an attack: each image has its own generator, so that its neighbours do not change what it gets."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(seed: int, image: int) -> int:
    """The seed of one image in a run with `seed`: 63 bits of a hash of both."""
    digest = hashlib.blake2b(f"{seed}/{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """One random generator for each image of a batch.

    Numbers are drawn on the CPU, whatever the device, so that a seed means the same on each machine.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        """Generators that begin with `seeds`; what they draw is of `dtype` and lies on `device`."""
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device
        self._dtype = dtype

    def of(self, row: int) -> torch.Generator:
        """The generator of one image, for what the methods here do not draw."""
        return self._generators[row]

    def uniform(self, rows: Tensor, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high) for the images at `rows`, `(rows, *shape)`."""
        drawn = [torch.rand(shape, generator=self._generators[row], dtype=self._dtype) for row in rows.tolist()]
        return self._together(drawn, shape).mul_(high - low).add_(low)

    def normal(self, rows: Tensor, *shape: int) -> Tensor:
        """Standard normal numbers for the images at `rows`, `(rows, *shape)`."""
        drawn = [torch.randn(shape, generator=self._generators[row], dtype=self._dtype) for row in rows.tolist()]
        return self._together(drawn, shape)

    def _together(self, drawn: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        together = torch.stack(drawn) if drawn else torch.empty(0, *shape, dtype=self._dtype)
        return together.to(self._device)
