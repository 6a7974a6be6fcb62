"""`detector.workers.Workers` on a Ray cluster: a pool of actors, each holding what its shards need.

Actors of Ray's core and not Ray Data's: a task of Ray Data waits for the very actor that it was given to, so that the
shard of a lost machine would wait until that machine comes back, and its order of blocks would have to be put right
again. Here a lost shard goes to whoever is free; no actor is given more than it can begin soon, and what is done ahead
of its turn is bounded, so that neither the object store nor this process grows with the number of shards.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

from cluster.connection import connected, same_place
from cluster.errors import ClusterError
from detector.errors import DataError, DetectorError
from detector.memory import keep_freed_memory
from detector.workers import Result, Shard

log = logging.getLogger(__name__)

# Given to a worker at a time: one that runs, and one that it goes on with while this process hears of the first.
_GIVEN = 2
# Results kept back for each worker until those before them are there.
_AHEAD = 4
# A shard whose worker was lost so often is taken to be what kills it.
_LOSSES = 3
# Waiting for a worker to begin, while there is none.
_BEGIN_SECONDS = 300.0
# How long Ray may take to tell that a processor was given back.
_FREED_SECONDS = 5.0


@contextmanager
def ray_workers(address: str) -> Iterator["RayWorkers"]:
    """Workers on all free processors of a cluster, each with one of them; they end with it.

    Args:
        address: as `cluster.connection.connected` takes it.

    Raises:
        ClusterError: the cluster cannot be used, or has no free processor.
    """
    with connected(address):
        workers = RayWorkers(free_processors(address))
        try:
            yield workers
        finally:
            workers.close()


def free_processors(address: str, wanted: int = 1) -> int:
    """How many processors nobody holds, of the cluster that this process is connected to.

    Args:
        address: of the cluster, for the message.
        wanted: how many there have to be.

    Raises:
        ClusterError: there are fewer.
    """
    import ray

    patience = time.monotonic() + _FREED_SECONDS
    while True:
        free, there = (int(of().get("CPU", 0)) for of in (ray.available_resources, ray.cluster_resources))
        if free >= wanted or time.monotonic() > patience:
            break
        time.sleep(0.2)
    if free < wanted:
        what = "a free processor" if wanted == 1 else f"{wanted} free processors"
        raise ClusterError(f"expected {what} on the cluster {address}, got {free} of {there}")
    return free


class _Host:
    """What runs in a worker's process."""

    def __init__(self, folder: str, ours: str) -> None:
        same_place(folder)
        if (here := _version()) != ours:
            raise ClusterError(f"expected Pathguard {ours} on every node, got {here}")
        keep_freed_memory()  # as the commands do
        self._run: Callable[[Any], Any] | None = None

    def look(self, folder: str, mark: str) -> str | None:
        """The folder's problem, if it has one here."""
        file = Path(folder) / mark
        if not file.is_file():
            return "does not see"
        return None if os.access(folder, os.W_OK) else "cannot write"

    def hold(self, load: Callable[[], Callable[[Any], Any]]) -> None:
        self._run = load()

    def run(self, shard: Any) -> Any:
        assert self._run is not None
        return self._run(shard)


@dataclass(slots=True, eq=False)
class _Worker:
    """One actor, and which shards it was given."""

    actor: Any
    ready: bool = False
    given: int = 0


@dataclass(slots=True)
class _Todo:
    """A shard that waits, by its place, and how often its worker was lost."""

    place: int
    losses: int = 0


@dataclass(slots=True)
class _Round:
    """One call of `map` under way."""

    held: Any
    waiting: deque[_Todo]
    beginning: dict[Any, _Worker] = field(default_factory=dict)
    running: dict[Any, tuple[_Worker, _Todo]] = field(default_factory=dict)
    done: dict[int, Any] = field(default_factory=dict)
    next: int = 0
    lost_at_begin: int = 0


class RayWorkers:
    """`Workers` on the cluster that this process is connected to."""

    def __init__(self, count: int) -> None:
        """Starts no worker yet.

        Args:
            count: how many workers, of one processor each.
        """
        self.count = count
        self._workers: list[_Worker] = []

    @property
    def device(self) -> torch.device:
        """As `Workers.device`: workers compute on processors."""
        return torch.device("cpu")

    def check_folder(self, folder: Path) -> None:
        """As `Workers.check_folder`."""
        mark = folder / f".seen-{token_hex(8)}"
        try:
            mark.touch()
        except OSError as error:
            raise DataError(f"expected a folder that can be written, got {folder} ({error.strerror})") from None
        try:
            import ray

            self._fill()
            looks = [worker.actor.look.remote(str(folder.resolve()), mark.name) for worker in self._workers]
            for look in looks:
                try:
                    problem = ray.get(look, timeout=_BEGIN_SECONDS)
                except ray.exceptions.GetTimeoutError:
                    raise ClusterError(f"expected workers that begin within {_BEGIN_SECONDS:g} s, got none") from None
                except Exception as error:
                    told = _told(error)
                    if told is error and isinstance(error, ray.exceptions.RayActorError):
                        told = ClusterError(f"expected workers that begin, got one lost: {_in_a_line(error)}")
                    raise told from None
                if problem is not None:
                    raise DataError(
                        f"expected a folder that every worker can read and write, got {folder}, which one of "
                        f"{self.count} workers {problem}; put it on storage that all nodes share"
                    )
        finally:
            mark.unlink(missing_ok=True)

    def map(self, load: Callable[[], Callable[[Shard], Result]], shards: Sequence[Shard]) -> Iterator[Result]:
        """As `Workers.map`.

        Raises:
            ClusterError: no worker could be had, or a shard's worker was lost again and again.
        """
        if not shards:
            return
        import ray

        now = _Round(ray.put(load), deque(_Todo(place) for place in range(len(shards))))
        whole = False
        try:
            self._fill()
            for worker in self._workers:
                self._begin(now, worker)
            while now.next < len(shards):
                self._give(now, shards)
                self._take(now)
                while now.next in now.done:
                    result = now.done.pop(now.next)
                    now.next += 1
                    yield result
            whole = True
        finally:
            if not whole:  # whatever is still under way is of no use to anybody
                self.close()

    def close(self) -> None:
        """Ends all workers, and what they are doing."""
        for worker in self._workers:
            _end(worker)
        self._workers = []

    def _fill(self) -> None:
        import ray

        host = ray.remote(num_cpus=1, max_restarts=0)(_Host)
        while len(self._workers) < self.count:
            self._workers.append(_Worker(host.remote(str(Path.cwd()), _version())))

    def _begin(self, now: _Round, worker: _Worker) -> None:
        worker.ready, worker.given = False, 0
        now.beginning[worker.actor.hold.remote(now.held)] = worker

    def _give(self, now: _Round, shards: Sequence[Any]) -> None:
        """Hand out what waits, the emptiest worker first, no further ahead than may be kept back."""
        left = len(now.waiting) + len(now.running)
        most = _GIVEN if left > _GIVEN * len(self._workers) else 1
        while now.waiting and now.waiting[0].place < now.next + _AHEAD * self.count:
            free = [worker for worker in self._workers if worker.ready and worker.given < most]
            if not free:
                return
            worker = min(free, key=lambda one: one.given)
            todo = now.waiting.popleft()
            worker.given += 1
            now.running[worker.actor.run.remote(shards[todo.place])] = worker, todo

    def _take(self, now: _Round) -> None:
        """Wait until something is done or lost."""
        import ray

        timeout = None if now.running else _BEGIN_SECONDS
        found, _ = ray.wait([*now.running, *now.beginning], num_returns=1, timeout=timeout)
        if not found:
            raise ClusterError(f"expected a worker on the cluster within {_BEGIN_SECONDS:g} s, got none")
        (ref,) = found
        worker, todo = now.running.pop(ref) if ref in now.running else (now.beginning.pop(ref), None)
        try:
            result = ray.get(ref)
        except Exception as error:
            if isinstance(error, ray.exceptions.RayTaskError) or _never_began(error):
                raise _told(error) from None
            self._lost(now, worker, todo, error)
            return
        if todo is None:
            worker.ready = True
        else:
            worker.given -= 1
            now.done[todo.place] = result

    def _lost(self, now: _Round, worker: _Worker, todo: _Todo | None, error: Exception) -> None:
        """Take a lost worker's shards back, and begin another worker in its place."""
        if todo is None:
            now.lost_at_begin += 1
            if now.lost_at_begin >= _LOSSES * self.count:
                raise ClusterError(
                    f"expected workers that begin, got {now.lost_at_begin} lost before their first shard: "
                    f"{_in_a_line(error)}"
                )
        again = [] if todo is None else [todo]
        for ref, (of, other) in list(now.running.items()):
            if of is worker:
                del now.running[ref]
                again.append(other)
        for todo in again:
            todo.losses += 1
            if todo.losses >= _LOSSES:
                raise ClusterError(
                    f"expected shard {todo.place} to be run, got {todo.losses} workers lost while it was: "
                    f"{_in_a_line(error)}"
                )
        now.waiting.extendleft(sorted(again, key=lambda one: one.place, reverse=True))
        if worker in self._workers:
            log.warning("a worker was lost; %d of its shards will be run again", len(again))
            self._workers.remove(worker)
            _end(worker)  # it may only be out of reach, and would keep its processor
            now.beginning = {ref: of for ref, of in now.beginning.items() if of is not worker}
            self._fill()
            self._begin(now, self._workers[-1])


def _end(worker: _Worker) -> None:
    import ray

    with suppress(Exception):
        ray.kill(worker.actor)


def _never_began(error: Exception) -> bool:
    """Whether an actor could not even be made, by an error of its own, which the next one would meet too."""
    return bool(getattr(error, "actor_init_failed", False))


def _told(error: Exception) -> Exception:
    """What a worker raised: ours as it was, anything else with what Ray says of it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DetectorError):
        return cause
    if _never_began(error):
        last = [line.strip() for line in str(error).splitlines() if line.strip()]
        named = [line for line in last if "Error: " in line]
        return ClusterError(f"expected workers that can run Pathguard, got: {(named or last)[-1][:300]}")
    return error


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _version() -> str:
    try:
        return version("pathguard")
    except PackageNotFoundError:
        return "unknown"
