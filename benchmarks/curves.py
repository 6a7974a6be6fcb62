"""Networks for the curves of accuracy against work: one trained bundle, decoupled at other keep ratios, and pruned.

    python -m benchmarks.curves [--bundle DIR] [--work DIR] [--data-dir DIR] [--only NAME,NAME]

Each network is a short training from what the bundle holds, with its own objective's distillation and the same
schedule: `keep0.5` from the decoupled network, its gates' offsets first moved so that half of the filters open;
`pruned0.5` from the backbone, half of each block's first filters cut. What is finished in the work folder is left as it
is, and the same command goes on with what was interrupted, so that several may run side by side, each with its names.
`benchmarks.speed` measures them. Nothing here sees a test image.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save
from torch import Tensor, nn

from benchmarks.pruned import like, pruned
from detector.batches import best_device
from detector.bundle import MANIFEST, Bundle, add_network
from detector.datasets import ImageSet, Splits, load_splits
from detector.errors import ArtifactError
from detector.files import write_whole
from detector.memory import keep_freed_memory
from detector.network.checkpoint import FILE as CHECKPOINT
from detector.network.decouple import GatedNet
from detector.network.losses import distillation, objective_named
from detector.network.schedule import Schedule
from detector.network.training import accuracy, measure_gates, train_decoupled, train_epochs
from pathguard.commands.options import DataDir
from pathguard.progress import training_bar

KEEP = (0.9, 0.8, 0.6, 0.5, 0.4)
PRUNED = (0.7, 0.6, 0.5, 0.4, 0.3)
SCHEDULE = Schedule(epochs=2, learning_rate=0.03)
# Of a whole decoupling: its noise has fallen to a quarter there, and the share of open filters is reached.
BEHIND = 0.6
# Training images on which the offsets of the gates are moved.
TIGHTENED_ON = 500
BUNDLE, WORK = Path("models/cifar10-resnet20"), Path("runs/curves")
NAMES = (*(f"keep{keep:g}" for keep in KEEP), *(f"pruned{keep:g}" for keep in PRUNED))
_WEIGHTS, _FACTS = "pruned.safetensors", "facts.json"


@dataclass(frozen=True, slots=True)
class Pruned:
    """A statically pruned network.

    Attributes:
        keep: share of the first filters of each block that it kept.
        network: in evaluation mode.
        validated: its accuracy on the validation images, in [0, 1].
    """

    keep: float
    network: nn.Module
    validated: float


def main(
    bundle: Annotated[Path, typer.Option(help="Decoupled bundle to start from.")] = BUNDLE,
    work: Annotated[Path, typer.Option(help="Folder of the trained networks.")] = WORK,
    data_dir: DataDir = None,
    only: Annotated[str, typer.Option(help=f"Of {', '.join(NAMES)}, by commas.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
) -> None:
    """Train what is missing."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := set(wanted) - set(NAMES):
        raise typer.BadParameter(f"expected names of {', '.join(NAMES)}; got {', '.join(sorted(unknown))}")
    start = Bundle(bundle)
    splits = load_splits(start.manifest.network.data, data_dir)
    for name in wanted or NAMES:
        make(name, start, splits, work, SCHEDULE)


def make(name: str, start: Bundle, splits: Splits, work: Path, schedule: Schedule) -> None:
    """Train the network called `name` into a folder of that name in `work`, unless it is there."""
    if name.startswith("keep"):
        _decouple_further(float(name.removeprefix("keep")), start, splits, work / name, schedule)
    else:
        _prune(float(name.removeprefix("pruned")), start, splits, work / name, schedule)


def decoupled_bundles(start: Bundle, work: Path) -> list[Bundle]:
    """`start` and the bundles in `work` that were made of it, by falling share of open filters.

    Raises:
        ArtifactError: one of them was made of another bundle.
    """
    made = [Bundle(file.parent) for file in work.glob(f"keep*/{MANIFEST}")]
    for bundle in made:
        _check_start(bundle.manifest.training["network"]["start"], start.network_digest, bundle.folder)
    return sorted([start, *made], key=lambda bundle: bundle.manifest.gates.keep if bundle.manifest.gates else 1.0)[::-1]


def pruned_networks(start: Bundle, work: Path) -> list[Pruned]:
    """The pruned networks in `work`, by falling share of filters kept.

    Raises:
        ArtifactError: one of them was made of another backbone.
    """
    found = []
    for file in work.glob(f"pruned*/{_FACTS}"):
        facts = json.loads(file.read_text())
        _check_start(facts["run"]["start"], start.backbone_digest, file.parent)
        network = like(start.backbone(), load_file(file.with_name(_WEIGHTS))).eval()
        found.append(Pruned(facts["run"]["keep"], network, facts["validated"]))
    return sorted(found, key=lambda made: -made.keep)


def tighten(network: GatedNet, images: ImageSet, keep: float) -> float:
    """Move the offsets of all gates, so that a share `keep` of the filters opens on `images`.

    Each moves by the same number of standard deviations of its filter's logit, so that every gate goes on depending on
    the image. The gates have to be normalised ones.

    Returns:
        By how many.
    """
    gates = [gate.normalise for gate in network.gates() if isinstance(gate.normalise, nn.BatchNorm1d)]
    before = [gate.bias.detach().clone() for gate in gates]

    def move(deviations: float) -> float:
        with torch.no_grad():
            for gate, offset in zip(gates, before, strict=True):
                gate.bias.copy_(offset + deviations * gate.weight.abs())
        return measure_gates(network, images).keep_ratio

    low, high = -4.0, 4.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if move(middle) < keep else (low, middle)
    return middle


def _decouple_further(keep: float, start: Bundle, splits: Splits, folder: Path, schedule: Schedule) -> None:
    run = {"stage": "network", "start": start.network_digest, "keep": keep, "behind": BEHIND}
    gates = start.manifest.gates
    assert gates is not None  # `Bundle.network` has refused a plain one
    if (folder / MANIFEST).exists():
        _check_start(Bundle(folder).manifest.training["network"]["start"], start.network_digest, folder)
        return
    device = best_device()
    network, backbone = start.network().to(device), start.backbone().to(device)
    tighten(network, splits.train.subset(slice(0, TIGHTENED_ON)), keep)
    with training_bar(folder.name) as listen:
        train_decoupled(
            network, backbone, splits, objective_named(gates.objective), keep, schedule, folder, run, listen, BEHIND
        )
    figures = asdict(measure_gates(network, splits.validation))
    training = {**run, "schedule": asdict(schedule), "validation": figures}
    add_network(start, folder, replace(gates, keep=keep), network.cpu(), training)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _prune(keep: float, start: Bundle, splits: Splits, folder: Path, schedule: Schedule) -> None:
    run = {"stage": "pruned", "start": start.backbone_digest, "keep": keep, "schedule": asdict(schedule)}
    facts = folder / _FACTS
    if facts.exists():
        _check_start(json.loads(facts.read_text())["run"]["start"], start.backbone_digest, folder)
        return
    device = best_device()
    backbone = start.backbone().to(device).eval()
    network = pruned(backbone, keep)
    gates = start.manifest.gates
    assert gates is not None
    share = objective_named(gates.objective).distillation

    def loss(images: Tensor, labels: Tensor, _progress: float) -> Tensor:
        logits = network(images)
        with torch.no_grad():
            teacher_logits = backbone(images)
        return (1 - share) * F.cross_entropy(logits, labels) + share * distillation(logits, teacher_logits)

    with training_bar(folder.name) as listen:
        train_epochs(
            network, loss, splits, schedule, folder, run, listen,
            lambda: {"accuracy": accuracy(network, splits.validation)}, lambda _, figures: figures["accuracy"],
        )  # fmt: skip
    write_whole(
        folder / _WEIGHTS, save({name: value.contiguous() for name, value in network.cpu().state_dict().items()})
    )
    made = {"run": run, "validated": accuracy(network, splits.validation)}
    write_whole(facts, json.dumps(made, indent=2).encode())
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _check_start(found: object, wanted: str, folder: Path) -> None:
    if found != wanted:
        raise ArtifactError(
            f"expected a network made of {wanted[:8]}, got one of {str(found)[:8]} in {folder}; remove it"
        )


if __name__ == "__main__":
    typer.run(main)
