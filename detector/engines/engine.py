"""What an engine is: something that runs a decoupled network, and perhaps the score behind it."""

from dataclasses import dataclass
from typing import Protocol

from detector.images import Pixels
from detector.paths.encoder import Evidence
from detector.scoring.thresholds import Scores


@dataclass(frozen=True, slots=True)
class Answers:
    """What an engine says about a batch.

    Attributes:
        evidence: class logits, gate logits, paths, and what the gates read.
        scores: adversarial scores, `(images,)`; None from an engine that was made without a score or has no place
            for it.
    """

    evidence: Evidence
    scores: Scores | None = None


class Engine(Protocol):
    """Runs one decoupled network exactly: labels, paths and scores are those of the masked network."""

    @property
    def name(self) -> str:
        """As users choose it."""

    def answer(self, pixels: Pixels) -> Answers:
        """`uint8` `(images, height, width, channels)` of the network's own size -> what it says; no images are fine."""
