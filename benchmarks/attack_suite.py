"""How long a whole suite of attacks takes, run as `pathguard attack` runs it: into a store, shard by shard.

The seconds of each shard are kept beside the store, so that an interrupted run goes on, like the attacks themselves.
Processor time stands beside the clock's: on a machine that other programs share, the clock says how long one waited,
and processor time what the suite would have taken alone on one core (of one thread; more threads share it).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from attacks.campaign import Campaign, run_attacks
from attacks.recipes import Recipe
from attacks.store import AttackStore, Origin
from benchmarks.report import Row
from detector.datasets import ImageSet
from detector.errors import DataError
from pathguard.tables import Figure, show

SHARD = 250
BAR_MINUTES = 60.0
SECONDS = "seconds.jsonl"


@dataclass(frozen=True, slots=True)
class Timed:
    """One shard of a suite.

    Attributes:
        recipe: which attack.
        images: in the shard.
        fooled: how many of them fooled the network.
        seconds: for attacking and storing them, by the clock.
        busy: the same in processor time, of all threads.
    """

    recipe: str
    images: int
    fooled: int
    seconds: float
    busy: float


def run_suite(
    name: str, network: nn.Module, backbone: nn.Module, digest: str, images: ImageSet, recipes: Sequence[Recipe],
    work: Path,
) -> list[Row]:  # fmt: skip
    """Attack `images` by every recipe, each on at most its own number of them, and say how long it took.

    Args:
        name: of the suite.
        network: the attacked one.
        backbone: for transfer attacks.
        digest: SHA-256 of the network's weights.
        images: which the network gets right.
        recipes: the members.
        work: folder of the store and of the seconds; what it holds is not done again.

    Raises:
        DataError: a shard is stored whose seconds are not known, because an earlier run was killed between the two.
    """
    timed = timed_shards(network, backbone, digest, images, recipes, work)
    lines = []
    for recipe in recipes:
        own = [shard for shard in timed if shard.recipe == recipe.name]
        count, seconds = sum(shard.images for shard in own), sum(shard.seconds for shard in own)
        busy = sum(shard.busy for shard in own)
        lines.append({
            "recipe": recipe.name, "images": count,
            "fooled": Figure(f"{sum(shard.fooled for shard in own) / count:.1%}"),
            "s an image": Figure(f"{seconds / count:.3f}"), "minutes": Figure(f"{seconds / 60:.2f}"),
            "processor minutes": Figure(f"{busy / 60:.2f}"),
        })  # fmt: skip
    show(f"the suite {name} on {len(images)} images, {torch.get_num_threads()} threads", lines)
    minutes, busy = sum(shard.seconds for shard in timed) / 60, sum(shard.busy for shard in timed) / 60
    what = f"suite {name} on {len(images)} images, run whole"
    return [
        Row(figure=f"{what}: minutes by the clock", value=minutes, bar=BAR_MINUTES),
        Row(figure=f"{what}: processor minutes of all threads", value=busy, bar=BAR_MINUTES),
    ]


def timed_shards(
    network: nn.Module, backbone: nn.Module, digest: str, images: ImageSet, recipes: Sequence[Recipe], work: Path
) -> list[Timed]:
    """The same without a table: the seconds of each shard, those of earlier runs included."""
    log = work / SECONDS
    began, busy = time.perf_counter(), time.process_time()

    def note(state: Campaign) -> None:
        nonlocal began, busy
        now, used = time.perf_counter(), time.process_time()
        if state.record is not None:
            key, record = state.record.key, state.record
            line = {
                "recipe": key.recipe,
                "index": key.index,
                "images": record.images,
                "fooled": record.fooled,
                "seconds": now - began,
                "busy": used - busy,
            }
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{state.done} of {state.total} shards: {key.recipe}, {line['seconds']:.1f} s", flush=True)
        began, busy = time.perf_counter(), time.process_time()

    fewer = [replace(recipe, images=min(recipe.images or len(images), len(images))) for recipe in recipes]
    with AttackStore.writing(work, Origin(digest, images.name, 0, SHARD)) as store:
        run_attacks(network, {"fitting": images}, fewer, store, note, backbone)
        stored = {(key.recipe, key.index): record.images for key, record in store.records().items()}
    found = {}
    for text in log.read_text().splitlines():
        line = json.loads(text)
        index = line.pop("index")
        found[line["recipe"], index] = Timed(**line)
    unknown = [key for key, count in stored.items() if key not in found or found[key].images != count]
    if unknown:
        raise DataError(f"expected the seconds of every shard in {log}, got none of {unknown[0]}; give another folder")
    wanted = {recipe.name for recipe in recipes}
    return [found[key] for key in stored if key[0] in wanted]
