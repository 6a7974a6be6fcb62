"""What runs on the cluster for a model that is served: a replica of Ray Serve, and beside it an actor with the model.

Serve begins replicas, watches over them, counts their calls and shares calls out; but its router and event loops would
add several milliseconds to each batch. So a replica lends its actor for a while, in a call that Serve counts for as
long as it lasts, and batches go straight to the actor.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connection import same_place
from cluster.packing import AnswerPacking, unpacked_pixels

if TYPE_CHECKING:  # a replica's own process does without torch
    import numpy as np
    import numpy.typing as npt

    from detector.images import ImageSpec, Pixels

# An actor that died fails at once; one that computes is not waited for.
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server asks of a model beside answers."""

    model_version: str
    threshold_version: str
    spec: "ImageSpec"
    class_names: tuple[str, ...]
    layers: Mapping[str, int]
    max_false_alarm_rate: float
    calibration_images: int
    restores: bool
    engine: str


class ModelHost:
    """The actor: a model in a process of its own, which does one call after the other."""

    def __init__(self, place: str, folder: str, name: str, trusted: str | None, engine: str) -> None:
        same_place(place)
        import torch

        from detector.bundle import Bundle
        from detector.engines.choice import FASTEST
        from detector.memory import keep_freed_memory
        from detector.scoring.detector import Detector

        keep_freed_memory()  # as the server does where the model runs in its own process
        torch.set_num_threads(1)
        self._detector = Detector(Bundle(Path(folder), trusted), name, engine or FASTEST)
        self._packing = AnswerPacking(len(self._detector.class_names), self._detector.layers)

    def facts(self) -> Facts:
        """What does not change."""
        made = self._detector
        return Facts(
            made.model_version, made.threshold_version, made.spec, tuple(made.class_names), dict(made.layers),
            made.max_false_alarm_rate, made.calibration_images, made.restores, made.engine,
        )  # fmt: skip

    def detect(self, packed: bytes) -> bytes:
        """As `Detector.detect`, of what `packed_pixels` gives; for `AnswerPacking.unpacked`."""
        before = self._detector.answered_in_full
        detections = self._detector.detect(unpacked_pixels(packed))
        return self._packing.packed(detections, self._detector.answered_in_full - before)

    def restore(
        self, pixels: "Pixels", probabilities: "npt.NDArray[np.float32]", p_values: "npt.NDArray[np.float64]"
    ) -> "npt.NDArray[np.int64]":
        """As `Detector.restore`."""
        return self._detector.restore(pixels, probabilities, p_values)

    def here(self) -> None:
        """Answers when nothing else is to be done."""


class Replica:
    """What Serve deploys: it has an actor of the model on the same node, and lives and dies with it."""

    def __init__(self, *of: str | None) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # The processor that the model keeps busy is this replica's own, which itself has next to nothing to do.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        host = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here, enable_task_events=False)(ModelHost)
        self._host = host.remote(*of)
        self._looked: Any = self._host.here.remote()
        ray.get(self._looked)  # says what is wrong with the bundle, here and so to whoever deploys

    async def lease(self, seconds: float) -> AsyncIterator[Any]:
        """The actor, lent for `seconds`."""
        yield self._host
        await asyncio.sleep(seconds)

    def check_health(self) -> None:
        """Asked by Serve, again and again; the end of this process is what it notices soonest."""
        import ray
        from ray.exceptions import RayActorError

        if ray.wait([self._looked], timeout=_LOOK_SECONDS)[0]:
            try:
                ray.get(self._looked)
            except RayActorError:
                os._exit(1)
            self._looked = self._host.here.remote()
