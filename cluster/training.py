"""A backbone trained by all free processors of a Ray cluster: Ray Train, each worker a rank of DistributedDataParallel.

Every worker runs the loop of `detector.network.training` on its share of each batch; the first one writes the loop's
own checkpoint, which knows nothing of how many they were. So a run that lost a worker, or was stopped, goes on from its
last epoch with as many as there are then, or in one process without Ray.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster.connection import connected, same_place
from cluster.errors import ClusterError
from cluster.ray_workers import free_processors
from detector.datasets import Splits
from detector.errors import DataError, DetectorError, TrainingError
from detector.network.schedule import Schedule
from detector.network.training import Listener, Progress, Team, train_backbone

log = logging.getLogger(__name__)

# How often the team may lose a worker before the run is given up; what was finished stays.
_LOSSES = 3
_POLL_SECONDS = 0.5


@contextmanager
def ray_training(address: str, most: int | None = None) -> "Iterator[RayTraining]":
    """Training on all free processors of a cluster.

    Args:
        address: as `cluster.connection.connected` takes it.
        most: use no more processors than this; None for all.

    Raises:
        ClusterError: the cluster cannot be used, or has no free processor.
    """
    with connected(address):
        free = free_processors(address)
        yield RayTraining(free if most is None else min(free, most))


@dataclass(frozen=True, slots=True)
class _Work:
    """What every worker needs."""

    network: nn.Module
    splits: Splits
    schedule: Schedule
    folder: Path
    run: Mapping[str, object]
    mark: str


class _Board:
    """Where the first worker writes how far it is, and the command reads it."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def write(self, progress: Progress) -> None:
        self._progress = progress

    def read(self) -> Progress | None:
        return self._progress


@dataclass(frozen=True, slots=True)
class RayTraining:
    """A `detector.stages.BackboneTraining` on the cluster that this process is connected to.

    Attributes:
        workers: how many, of one processor each.
    """

    workers: int

    def __call__(
        self, network: nn.Module, splits: Splits, schedule: Schedule, folder: Path, run: Mapping[str, object],
        listen: Listener,
    ) -> None:  # fmt: skip
        """As `detector.network.training.train_backbone`; batches are shared among the workers.

        Raises:
            ClusterError: workers were lost again and again.
            DataError: a worker does not see `folder`.
            TrainingError: as `train_backbone`, or a worker would have no image of a batch.
        """
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        if schedule.batch < 2 * self.workers:
            raise TrainingError(
                f"expected batches of at least {2 * self.workers} images for {self.workers} workers, got "
                f"{schedule.batch}"
            )
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / f".seen-{token_hex(8)}"
        mark.touch()
        board = ray.remote(num_cpus=0)(_Board).remote()
        work = ray.put(_Work(network.cpu(), splits, schedule, folder, run, mark.name))
        trainer = TorchTrainer(
            _train,
            train_loop_config={"work": [work], "board": board, "place": str(Path.cwd())},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=self.workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="ray", storage_path=str(folder), failure_config=FailureConfig(max_failures=_LOSSES)
            ),
        )
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(board, listen, over), daemon=True)
        watching.start()
        try:
            trainer.fit()
        except Exception as error:
            raise _told(error) from None
        finally:
            over.set()
            watching.join()
            ray.kill(board)
            mark.unlink(missing_ok=True)
        # Every epoch is done: this takes the best one's weights from the checkpoint, and says so.
        train_backbone(network, splits, schedule, folder, run, listen)


def _train(config: dict[str, Any]) -> None:
    """In a worker's process."""
    import ray
    from ray.train import get_context

    same_place(config["place"])
    (held,) = config["work"]
    work: _Work = ray.get(held)
    if not (work.folder / work.mark).is_file():
        raise DataError(
            f"expected a folder that every worker can read and write, got {work.folder}, which one does not see; put "
            "it on storage that all nodes share"
        )
    context = get_context()
    team = Team(context.get_world_rank(), context.get_world_size(), DistributedDataParallel)
    board = config["board"]

    def listen(progress: Progress) -> None:
        if team.rank == 0:
            board.write.remote(progress)

    torch.set_num_threads(1)
    train_backbone(work.network, work.splits, work.schedule, work.folder, work.run, listen, team)


def _watch(board: Any, listen: Listener, over: threading.Event) -> None:
    import ray

    last: Progress | None = None
    while not over.wait(_POLL_SECONDS):
        with suppress(Exception):  # a board that is gone says nothing; the training says what is wrong
            progress = ray.get(board.read.remote())
            if progress is not None and progress != last:
                last = progress
                listen(progress)


def _told(error: BaseException) -> Exception:
    """What a worker raised: ours as it was; anything else in one line."""
    inner: list[BaseException] = [error]
    for found in inner:
        if isinstance(found, DetectorError):
            return found
        others = getattr(found, "worker_failures", None)
        inner += others.values() if isinstance(others, dict) else []
        named = (getattr(found, name, None) for name in ("cause", "controller_failure", "_base_exc", "__cause__"))
        inner += [other for other in named if isinstance(other, BaseException)]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ClusterError(
        f"expected the training to end, got {type(error).__name__}: {(lines or ['nothing'])[-1][:300]}; the last "
        "checkpoint is whole, and the same command goes on from there"
    )
