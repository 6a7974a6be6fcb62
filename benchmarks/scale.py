"""Past one machine: what Ray adds and costs, on small clusters that are started here.

    python -m benchmarks.scale [--quick] [--only PART ...] [--json FILE]

`pip install pathguard[ray]` first. Attacks and encodings run on random images by a fresh ResNet-20, so that no data set
is needed; serving asks the classifier that ships with the project. A "node" is a Ray node of one processor, all of them
on this machine: what a network between machines costs is not in these figures. Throughput is that of workers which have
each done a first shard; how long that takes, imports and all, is a figure of its own. One and two work in turns, of
which the median counts.

Parts: attack, encode (two nodes against one, same files), ceiling (the same work by two plain processes against one:
what this machine gives for a second one, without Ray), local (`--ray local` against this process), lost (a node is
killed in the middle of an attack run), memory (of this process, 1,000 and 100,000 images), serving (added latency),
outage (a node is killed under 50 requests a second).
"""

import multiprocessing
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from attacks.campaign import Campaign, run_attacks
from attacks.recipes import RECIPES
from attacks.selection import rightly_classified
from attacks.store import AttackStore, Origin
from benchmarks.report import Row, print_rows, write_rows
from cluster.ray_workers import RayWorkers, ray_workers
from cluster.replicas import Replicas, replicated
from detector.bundle import Bundle
from detector.datasets import ImageSet, Indices
from detector.images import ImageSpec, Pixels
from detector.memory import keep_freed_memory
from detector.network.decouple import GatedNet, decouple
from detector.network.networks import build_network
from detector.paths.encoder import encode_set
from detector.paths.encodings import make_encodings
from detector.scoring.detector import Detector
from detector.workers import IN_PROCESS, Workers
from pathguard import Client
from pathguard.commands.server import SHIPPED
from service.config import ServiceConfig
from service.models.repository import BundleFolders
from service.server import ModelSource, running_server

PARTS = ("attack", "encode", "ceiling", "local", "lost", "memory", "serving", "outage")
OBJECT_STORE_BYTES = 200_000_000
ENCODED_AT_ONCE = 250
RATE, OUTAGE_SECONDS = 50, 20.0


@dataclass(frozen=True, slots=True)
class Work:
    """What is attacked, and how.

    Attributes:
        recipe: of the attack.
        shard: images in a shard.
        pixels: height and width of an image.
    """

    recipe: str
    shard: int
    pixels: int


HEAVY, MANY = Work("pgd", 20, 32), Work("fgsm", 250, 8)


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    attacked: int
    encoded: int
    local: int
    memory: int
    calls: int
    turns: int
    work: Work = HEAVY


WHOLE, QUICK = Size(320, 10_000, 2000, 100_000, 400, 3), Size(100, 2000, 200, 5000, 100, 1)


class Found(dict[str, float]):
    """What was measured, by name; told at once, so that an interruption does not take it along."""

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        print(f"{name}: {value:.4g}", file=sys.stderr, flush=True)


def main(
    quick: Annotated[bool, typer.Option(help="A quarter of everything, 5,000 images for the memory.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; may be given again.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Measure and print."""
    if unknown := set(only or ()) - set(PARTS):
        raise typer.BadParameter(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    chosen, size = set(only or PARTS), QUICK if quick else WHOLE
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the commands do, and the workers
    found = Found()
    _measure(chosen, size, found)
    rows = _rows(found, size)
    print_rows(f"Ray on this machine, {size.attacked} images attacked, {size.encoded} encoded", rows)
    if json is not None:
        write_rows(json, rows)


def _measure(chosen: set[str], size: Size, found: Found) -> None:
    if "ceiling" in chosen:
        for part, count in (("attack", size.attacked // 2), ("encode", size.encoded // 2)):
            one, two = _side_by_side(part, count, size)
            found[f"{part} ceiling"] = two / one
    if chosen & {"attack", "encode", "lost", "memory", "outage"}:
        with _cluster() as cluster:
            _on_two_nodes(cluster, chosen, size, found)
    if chosen & {"local", "serving"}:
        _on_this_machine(chosen, size, found)


def _rows(found: Mapping[str, float], size: Size) -> list[Row]:
    def row(figure: str, name: str, bar: float | None = None, at_most: bool = True) -> Row:
        return Row(figure=figure, value=found.get(name), bar=bar, at_most=at_most)

    return [
        row("attack, images/s, one node", "attack 1"),
        row("attack throughput, two nodes / one", "attack ratio", 1.8, at_most=False),
        row("attack throughput, two plain processes / one: what this machine gives", "attack ceiling"),
        row("encode, images/s, one node", "encode 1"),
        row("encode throughput, two nodes / one", "encode ratio", 1.8, at_most=False),
        row("encode throughput, two plain processes / one: what this machine gives", "encode ceiling"),
        row("cost of one shard that does nothing, ms", "shard ms"),
        row("attack, two nodes: predicted by docs/scaling.md / measured", "predicted"),
        row("start of two workers, until each has done a first shard, s", "start"),
        row(f"--ray local, {size.local} images attacked: time beyond in-process after start-up, %", "local", 15),
        row("files that differ between no, one and two nodes", "differing", 0),
        row("serving: added p50 of the Ray path, ms", "added p50", 2),
        row("serving: p50 embedded, ms", "p50"),
        row("node killed during an attack: images lost or there twice", "lost", 0),
        row(f"node killed at {RATE} requests/s: accepted requests unanswered", "unanswered", 0),
        row("memory of the driver after 1,000 images, MB", "early MB"),
        row(f"memory of the driver, after {size.memory} images / after 1,000", "memory", 1.1),
    ]


def _on_two_nodes(cluster: Any, chosen: set[str], size: Size, found: Found) -> None:
    network = _network()
    if chosen & {"attack", "encode", "lost", "memory"}:
        with ray_workers(cluster.address) as two:
            found["start"] = _timed(lambda: _warm(two, "attack", size.work))
            one = RayWorkers(1)
            one._workers = two._workers[:1]  # one of the two: a new one would need a processor, and to begin
            if "attack" in chosen:
                _attack_part(network, one, two, size, found)
            if "encode" in chosen:
                _warm(two, "encode", size.work)
                alone, together = _in_turns([partial(_encode, size.encoded, team) for team in (one, two)], size.turns)
                found["encode 1"], found["encode ratio"] = size.encoded / alone, alone / together
            if "memory" in chosen:
                _memory_part(two, size, found)
            if "lost" in chosen:  # last: afterwards there is one node
                _lost_part(network, cluster, two, size, found)
    if "outage" in chosen:
        if "lost" in chosen:
            cluster.add_node(**_node())
        found["unanswered"] = _outage(cluster)


def _attack_part(network: GatedNet, one: RayWorkers, two: RayWorkers, size: Size, found: Found) -> None:
    shards = -(-size.attacked // size.work.shard)
    found["shard ms"] = 1000 * _timed(lambda: list(one.map(_nothing, range(200)))) / 200
    with tempfile.TemporaryDirectory() as scratch:
        teams: dict[str, Workers] = {"none": IN_PROCESS, "one": one, "two": two}

        def attack(name: str) -> float:
            folder = Path(scratch) / name
            shutil.rmtree(folder, ignore_errors=True)
            return _attack(network, folder, size.attacked, teams[name], size.work)

        here, alone, together = _in_turns([partial(attack, name) for name in teams], size.turns)
        found["attack 1"], found["attack ratio"] = size.attacked / alone, alone / together
        found["predicted"] = -(-shards // 2) * (here / shards + found["shard ms"] / 1000) / together
        none, *others = (_files(Path(scratch) / name) for name in teams)
        found["differing"] = float(
            sum(none.get(name) != files.get(name) for files in others for name in none.keys() | files.keys())
        )


def _in_turns(calls: Sequence[Callable[[], float]], turns: int) -> list[float]:
    """The median of what each call gives, so that what slows the machine down for a while slows all of them."""
    return [statistics.median(given) for given in zip(*([call() for call in calls] for _ in range(turns)), strict=True)]


def _memory_part(workers: Workers, size: Size, found: Found) -> None:
    """Of many small images: the driver hears of each shard, however long it takes."""
    tiny = decouple(build_network("resnet8", 3, 2)).eval()
    early = late = 0.0

    def note(state: Campaign) -> None:
        nonlocal early, late
        if state.done == 1000 // MANY.shard:
            early = _resident()
        late = _resident()

    with tempfile.TemporaryDirectory() as folder:
        _attack(tiny, Path(folder), size.memory, workers, MANY, note)
    found["early MB"], found["memory"] = early, late / early


def _lost_part(network: GatedNet, cluster: Any, two: Workers, size: Size, found: Found) -> None:
    shards = size.attacked // size.work.shard

    def lose(state: Campaign) -> None:
        if state.done == shards // 3:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    with tempfile.TemporaryDirectory() as folder:
        _attack(network, Path(folder), size.attacked, two, size.work, lose)
        lines = (Path(folder) / "shards.jsonl").read_text().splitlines()
        ids = [int(i) for shard in AttackStore(Path(folder)).read("test", size.work.recipe) for i in shard.ids]
    images = _labelled(network, size.attacked, size.work.pixels)
    wanted = set(images.ids[rightly_classified(network, images)].tolist())
    twice = len(ids) - len(set(ids)) + len(lines) - -(-len(wanted) // size.work.shard)
    found["lost"] = float(len(wanted ^ set(ids)) + twice)


def _on_this_machine(chosen: set[str], size: Size, found: Found) -> None:
    if "local" in chosen:
        network = _network()
        with tempfile.TemporaryDirectory() as scratch:
            _first("attack", size.work)(0)
            with ray_workers("local") as workers:
                _warm(workers, "attack", size.work)
                remote = _attack(network, Path(scratch) / "there", size.local, workers, size.work)
                cores = workers.count
            torch.set_num_threads(cores)
            here = _attack(network, Path(scratch) / "here", size.local, IN_PROCESS, size.work)
            torch.set_num_threads(1)
        found["local"] = 100 * (remote / here - 1)
    if "serving" in chosen:
        pixels = _random(1).pixels(slice(0, 1))
        detector = Detector(Bundle(SHIPPED), engine="masked")
        with running_server(detector, ServiceConfig(port=0)) as target:
            embedded = _p50(target, pixels, size.calls)
        with replicated("local", Replicas(1, 1), engine="masked") as source:
            models = ModelSource(BundleFolders([SHIPPED]), source.load, 1)
            with running_server(models, ServiceConfig(port=0)) as target:
                found["p50"], found["added p50"] = embedded, _p50(target, pixels, size.calls) - embedded


def _outage(cluster: Any) -> float:
    """Accepted requests without an answer, while a node is killed."""
    pixels = _random(1).pixels(slice(0, 1))
    answers: list[Future[object]] = []
    with replicated(cluster.address, Replicas(2, 2), engine="masked") as source:
        models = ModelSource(BundleFolders([SHIPPED]), source.load, 2)
        server = running_server(models, ServiceConfig(port=0))
        with server as target, Client(target) as client, ThreadPoolExecutor(64) as callers:
            begin = time.monotonic()
            for place in range(int(RATE * OUTAGE_SECONDS)):
                time.sleep(max(0.0, begin + place / RATE - time.monotonic()))
                answers.append(callers.submit(client.detect, [pixels[0]], timeout_seconds=30))
                if place == RATE * 5:
                    lost = next(iter(cluster.worker_nodes))
                    threading.Thread(target=cluster.remove_node, args=(lost, False)).start()
    errors = Counter(repr(error)[:200] for answer in answers if (error := answer.exception()) is not None)
    for text, count in errors.items():
        print(f"{count} times {text}", file=sys.stderr)
    return float(errors.total())


def _attack(
    network: GatedNet, folder: Path, count: int, workers: Workers, work: Work,
    listen: Callable[[Campaign], None] | None = None,
) -> float:  # fmt: skip
    """Seconds from the first shard's begin to the last one's end."""
    began = 0.0

    def note(state: Campaign) -> None:
        nonlocal began
        if state.record is None:
            began = time.monotonic()
        if listen is not None:
            listen(state)

    with AttackStore.writing(folder, Origin("a" * 64, "random", 0, work.shard)) as store:
        images = _labelled(network, count, work.pixels)
        run_attacks(network, {"test": images}, [RECIPES[work.recipe]], store, note, workers=workers)
    return time.monotonic() - began


def _encode(count: int, workers: Workers) -> float:
    """Seconds from the first shard's begin to the last one's end, with the bundle that ships."""
    bundle, began, ended = Bundle(SHIPPED), 0.0, 0.0
    images = replace(_random(count), class_names=bundle.manifest.network.classes)

    def note(*_: int) -> None:
        nonlocal began, ended
        began, ended = began or time.monotonic(), time.monotonic()

    with tempfile.TemporaryDirectory() as folder:
        make_encodings(bundle, images, "test", Path(folder), ENCODED_AT_ONCE, note, workers)
    return ended - began


def _warm(workers: RayWorkers, part: str, work: Work) -> None:
    """Returns when each of them has done a first shard of the part."""
    begun: set[int] = set()
    while len(begun) < workers.count:
        begun.update(workers.map(partial(_first, part, work), range(2 * workers.count)))


def _first(part: str, work: Work) -> Callable[[int], int]:
    """What does a shard of the part and gives the process that did it."""

    def shard(_: int) -> int:
        _run(part, ENCODED_AT_ONCE if part == "encode" else work.shard, work)
        return os.getpid()

    return shard


def _run(part: str, count: int, work: Work) -> float:
    """Seconds that the part takes in this process."""
    if part == "encode":
        return _encode(count, IN_PROCESS)
    with tempfile.TemporaryDirectory() as folder:
        return _attack(_network(), Path(folder), count, IN_PROCESS, work)


def _nothing() -> Callable[[int], int]:
    return lambda shard: shard


def _network() -> GatedNet:
    return decouple(build_network("resnet20", 3, 2)).eval()


def _side_by_side(part: str, count: int, size: Size) -> tuple[float, float]:
    """Images a second of one process and of two together, `count` images each."""
    context = multiprocessing.get_context("spawn")
    gate, rates = context.Barrier(2), context.Queue()
    started = [context.Process(target=_plain, args=(part, count, size, first, gate, rates)) for first in (True, False)]
    for process in started:
        process.start()
    told = [rates.get() for _ in range(3 * size.turns)]
    for process in started:
        process.join()
    alone = [rate for together, _, rate in told if not together]
    both = [sum(rate for together, of, rate in told if together and of == turn) for turn in range(size.turns)]
    return statistics.median(alone), statistics.median(both)


def _plain(part: str, count: int, size: Size, first: bool, gate: Any, rates: Any) -> None:
    """In a process of its own: the part's work, without Ray; in turns the first process alone and both."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    _first(part, size.work)(0)
    for turn in range(size.turns):
        for together in (False, True):
            gate.wait()
            if first or together:
                rates.put((together, turn, count / _run(part, count, size.work)))


def _random(count: int, pixels: int = 32) -> ImageSet:
    """Noise, made when it is read, each image from its id."""
    labels, ids, spec = np.zeros(count, np.int64), np.arange(count), ImageSpec(pixels, pixels, 3)
    return ImageSet("random", labels, ids, ("a", "b"), spec, "random", partial(_noise, pixels))


def _labelled(network: GatedNet, count: int, pixels: int) -> ImageSet:
    """The same, of the class that an untrained network sees in nearly all noise, so that nearly all is attacked."""
    images = _random(count, pixels)
    (evidence,) = encode_set(network, images.first(64), 64)
    label = int(np.bincount(evidence.class_logits.argmax(axis=1), minlength=2).argmax())
    return replace(images, labels=np.full(count, label, np.int64))


def _noise(pixels: int, ids: Indices) -> Pixels:
    shape = (pixels, pixels, 3)
    return np.stack([np.random.default_rng(int(i)).integers(0, 256, shape, dtype=np.uint8) for i in ids])


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _p50(target: str, pixels: Pixels, calls: int) -> float:
    """Milliseconds."""
    with Client(target) as client:
        times = [_timed(lambda: client.detect([pixels[0]])) for _ in range(calls + 20)]
    return 1000 * statistics.median(times[20:])


def _timed(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def _resident() -> float:
    """Megabytes of this process, without the shared memory of the object store."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024


def _node() -> dict[str, object]:
    return {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}


@contextmanager
def _cluster() -> Iterator[Any]:
    """Two nodes of one processor each, closed by a token."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=_node())
    try:
        cluster.add_node(**_node())
        yield cluster
    finally:
        with suppress(Exception):
            cluster.shutdown()


if __name__ == "__main__":
    typer.run(main)
