"""How long and how fast to train."""

import math
from dataclasses import dataclass

from detector.errors import RequestError


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the training images.
        batch: images per step.
        learning_rate: its peak.
        momentum: of SGD with Nesterov's look-ahead.
        weight_decay: on all weights.
        flip: whether images are mirrored at random.
        shift: largest random shift up, down and sideways, as a share of the height.
        seed: of weights, order of images, augmentation and noise.
        cycles: how often the learning rate warms up and falls to nothing again (Loshchilov and Hutter 2017, "SGDR");
            the epochs are divided evenly among them.
        settling: of a decoupling, the share at its end, in [0, 1), in which the gates' own weights are held and the
            rest of the network settles on them. What is said of a decoupling's course (noise, target share) is of the
            part before.
    """

    epochs: int
    batch: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    flip: bool = True
    shift: float = 0.125
    seed: int = 0
    cycles: int = 1
    settling: float = 0.0

    def check(self) -> None:
        """Refuse what cannot train.

        Raises:
            RequestError: no epoch, a batch below 2, a learning rate that is not above 0, cycles that do not divide the
                epochs, or a settling outside [0, 1).
        """
        if self.epochs < 1 or self.batch < 2 or not self.learning_rate > 0:
            raise RequestError(
                f"expected at least 1 epoch, batches of at least 2 and a learning rate above 0, got {self.epochs}, "
                f"{self.batch} and {self.learning_rate}"
            )
        if self.cycles < 1 or self.epochs % self.cycles:
            raise RequestError(f"expected cycles that divide {self.epochs} epochs, got {self.cycles}")
        if not 0 <= self.settling < 1:
            raise RequestError(f"expected a share of the training to settle in [0, 1), got {self.settling}")

    def rate_at(self, progress: float, warm_up: float = 0.1) -> float:
        """The learning rate at `progress` in [0, 1): in each cycle a linear warm-up, then a cosine down to nothing."""
        within = (progress * self.cycles) % 1.0
        if within < warm_up:
            return self.learning_rate * (within + 0.01) / (warm_up + 0.01)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (within - warm_up) / (1 - warm_up)))


# How `pathguard decouple` trains where nothing else is said.
DECOUPLING = Schedule(epochs=24, learning_rate=0.05, settling=0.4)
