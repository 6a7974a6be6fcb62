"""What an attack is given: a network that counts its work, images, and what counts as success."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from attacks.draws import Draws


class Watcher(Protocol):
    """A detector as an attacker sees it who knows it."""

    @property
    def threshold(self) -> float:
        """Images with scores above it are flagged."""

    def judge(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """What is served: labels `(batch,)` and the detector's real scores `(batch,)` of images in [0, 1]."""


class Victim:
    """The attacked network, and for each image of the batch how often it went through it.

    Attributes:
        network: images in [0, 1], `(batch, channels, height, width)` -> logits `(batch, classes)`.
        forwards: forward passes of each image, `int64`, `(images,)`.
        gradients: backward passes of each image, `int64`, `(images,)`.
    """

    def __init__(self, network: nn.Module, images: int) -> None:
        """A network that has seen none of `images` images yet."""
        self.network = network
        self.forwards: npt.NDArray[np.int64] = np.zeros(images, np.int64)
        self.gradients: npt.NDArray[np.int64] = np.zeros(images, np.int64)
        self._only: npt.NDArray[np.int64] | None = None

    def __call__(self, points: Tensor, rows: Tensor) -> Tensor:
        """Logits of `points`, of which the i-th is a version of the image at `rows[i]`; a row may occur repeatedly."""
        logits: Tensor = self.network(self.counted(points, rows))
        return logits

    def counted(self, points: Tensor, rows: Tensor) -> Tensor:
        """`points` unchanged, counted as one forward pass, and as a backward pass whenever a gradient comes back."""
        where = rows.cpu().numpy()
        np.add.at(self.forwards, where, 1)
        if not (points.requires_grad and torch.is_grad_enabled()):
            return points
        seen = points.view_as(points)
        seen.register_hook(lambda _: np.add.at(self.gradients, self._among_counted(where), 1))
        return seen

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """Within it, backward passes count for the images at `rows` alone: the others' part of the loss is left out.

        An image that has just been fooled would otherwise cost a pass more or less with its neighbours' fortune.
        """
        self._only = rows.cpu().numpy()
        try:
            yield
        finally:
            self._only = None

    def _among_counted(self, where: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return where if self._only is None else where[np.isin(where, self._only)]


@dataclass(frozen=True, slots=True)
class Problem:
    """Images to attack, and all that an attack may use.

    Attributes:
        network: the network that the attack works on (the decoupled one, or its backbone for transfer attacks).
        images: clean images in [0, 1], `(batch, channels, height, width)`.
        labels: right labels, `(batch,)`.
        targets: labels that the attack is to reach, `(batch,)`; None where any wrong label will do.
        draws: random numbers, image by image.
        ids: index of each image in its source, `int64`, `(batch,)`.
        watcher: the detector, for attacks that know it; None for all others.
        lengths: L2 length that each image's change is to have, `(batch,)`; None for all but matched noise.
    """

    network: Victim
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    draws: Draws
    ids: npt.NDArray[np.int64]
    watcher: Watcher | None = None
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def all_rows(self) -> Tensor:
        """Positions of all images, `(batch,)`."""
        return torch.arange(len(self.images), device=self.images.device)

    def margin(self, logits: Tensor, rows: Tensor) -> Tensor:
        """How far the network is from the attack's goal, `(rows,)`; below zero where the goal is reached.

        Without a target it is the lead of the right class; with one, how far the target is behind.
        """
        if self.targets is None:
            return margin_over_others(logits, self.labels[rows])
        return -margin_over_others(logits, self.targets[rows])

    def reached(self, points: Tensor, rows: Tensor) -> Tensor:
        """Whether `points`, rounded to 8 bits, reach the goal, `(rows,)`; with a watcher, also unflagged."""
        with torch.no_grad():
            return self.goal_of(rounded(points), rows)

    def goal_of(self, points: Tensor, rows: Tensor) -> Tensor:
        """Whether `points` as they are reach the goal, `(rows,)`."""
        if len(rows) == 0:  # a network that flattens by `view(len(images), -1)` takes no empty batch
            return torch.zeros_like(rows, dtype=torch.bool)
        if self.watcher is None:
            return self.is_goal(self.network(points, rows), rows)
        predicted, scores = self.watcher.judge(self.network.counted(points, rows))
        return self.is_wanted(predicted, rows) & (scores <= self.watcher.threshold)

    def is_goal(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Whether these logits give the label that the attack wants: any wrong one, or the target, `(rows,)`."""
        return self.is_wanted(logits.argmax(dim=1), rows)

    def is_wanted(self, predicted: Tensor, rows: Tensor) -> Tensor:
        """Whether the attack wants these labels, `(rows,)`."""
        return predicted != self.labels[rows] if self.targets is None else predicted == self.targets[rows]


def rounded(points: Tensor) -> Tensor:
    """Images in [0, 1] as they come back from 8 bits, of the same type."""
    return points.detach().mul(255).round_().clamp_(0, 255).div_(255)


def margin_over_others(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the class of `labels` leads, `(batch,)`; below zero where another is ahead."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(dim=1)
    return own - others
