"""What decoupling costs and gives, on CIFAR-10: the ablation of the objective, the bars, and the speed of the gates.

    python -m benchmarks.decoupling --data-dir DIR [--models DIR] [--work DIR] [--records DIR] [--published DIR]
                                    [--only ROW,ROW] [--quick] [--json FILE]

All rows of ResNet-20 start from the backbone of the bundle that ships. An ablation row is one seed and ten epochs; the
default is the networks that ship (`benchmarks.shipped`), trained with the full schedule: ResNet-20 with three seeds (of
gates, order of images, augmentation and noise), ResNet-56 with one. Networks are chosen on validation images; every
figure is of the test images. The published weights that ResNet-56 begins with have seen the validation images too, so
that its choice of an epoch rests on less.

Every measured row is a record: a JSON file that tells the figures, the machine, and what was trained. The committed
records are those that the README and docs/networks.md tell; a row that has one is read, not trained anew, and a record
of another objective, schedule or backbone is refused. `--records EMPTY --work EMPTY --models EMPTY` makes all anew, for
which an interrupted run goes on by the same command.
"""

import json as jsonlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save
from torch import nn
from torch.fx.experimental.optimization import fuse

from attacks.craft import craft
from attacks.recipes import RECIPES
from attacks.selection import rightly_classified
from benchmarks.masks import RandomMask, StaticMask, put_masks
from benchmarks.onnx_sessions import WithGateLogits, onnx_call
from benchmarks.records import check_identity, record, recorded
from benchmarks.report import Row, print_rows, write_rows
from benchmarks.shipped import SHIPPED, Folders, decoupled
from benchmarks.timing import interleaved
from detector.batches import best_device, device_of, to_pixels, to_tensor
from detector.bundle import Bundle
from detector.datasets import Splits, load_splits
from detector.files import write_whole
from detector.memory import keep_freed_memory
from detector.network.checkpoint import FILE as CHECKPOINT
from detector.network.decouple import GatedNet, decouple
from detector.network.folding import fold_normalisation
from detector.network.losses import OBJECTIVES, Objective
from detector.network.macs import cost_of
from detector.network.networks import build_network
from detector.network.schedule import Schedule
from detector.network.training import accuracy, train_decoupled
from detector.paths.encoder import encode, encode_set
from detector.paths.path_encoding import PathEncoding
from detector.paths.path_statistics import distinct_paths, flipped_bits, layer_figures
from detector.stages import probe_images
from pathguard.progress import training_bar
from pathguard.tables import show

DEFAULT = OBJECTIVES["pathguard"]
# Without a time to settle, which ten epochs have no room for.
ABLATION = Schedule(epochs=10, learning_rate=0.05)
BACKBONE = "cifar10-resnet20"
# The default's rows: bundles of `benchmarks.shipped`.
SEEDS = {f"seed{seed}": f"{BACKBONE}-seed{seed}" for seed in (0, 1, 2)}
NETWORKS = {**SEEDS, "resnet56": "cifar10-resnet56"}
FLIP_IMAGES = {"fgsm": 500, "cw": 200}

# Cross-entropy alone; each term beside it (with sparsity, or the share to keep would be left to chance); all together.
OBJECTIVES_OF_ROWS: Mapping[str, Objective] = {
    "none": Objective(),
    "sparsity": Objective(sparsity=DEFAULT.sparsity),
    "label": Objective(sparsity=DEFAULT.sparsity, label_information=0.01),
    "input": Objective(sparsity=DEFAULT.sparsity, input_information=DEFAULT.input_information),
    "redundancy": Objective(sparsity=DEFAULT.sparsity, redundancy=0.5),
    "alignment": Objective(sparsity=DEFAULT.sparsity, alignment=1.0),
    "distillation": Objective(sparsity=DEFAULT.sparsity, distillation=DEFAULT.distillation),
    "all": replace(DEFAULT, label_information=0.01, redundancy=0.5, alignment=1.0),
    "pathguard": DEFAULT,
    "li2020": OBJECTIVES["li2020"],
}
MASKS: Mapping[str, Callable[[GatedNet, nn.Module, float], list[nn.Module]]] = {
    "static": lambda network, _, keep: [StaticMask(scale, keep) for scale in _scales(network)],
    "random": lambda network, _, keep: [RandomMask(width, keep) for width in network.layers.values()],
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One decoupled network on all test images.

    Attributes:
        row: as `--only` names it.
        accuracy: share of right labels, in [0, 1].
        lost: the backbone's accuracy less that, in points of a hundred.
        keep: mean share of open filters.
        macs_left: mean multiply-accumulates of an image's path, gates included, as a share of the backbone's.
        input_dependent: share of filters open for 1 % to 99 % of the images.
        distinct: different paths among the test images.
        information: of each gated layer about the class, at least, in nats, in network order.
        flipped_fgsm: mean bits flipped by FGSM at 8/255 where it succeeds.
        fgsm_over_noise: that over bits flipped by noise of the same L2 norm; NaN where neither flips any.
        flipped_cw: the same by C&W.
        cw_over_noise: bits flipped by C&W over bits flipped by noise of the same L2 norm; NaN where neither flips any.
        minutes: of training; None where it was interrupted.
        peak_gb: memory of the process that trained, at the most; None where that is not known.
    """

    row: str
    accuracy: float
    lost: float
    keep: float
    macs_left: float
    input_dependent: float
    distinct: int
    information: tuple[float, ...]
    flipped_fgsm: float
    fgsm_over_noise: float
    flipped_cw: float
    cw_over_noise: float
    minutes: float | None
    peak_gb: float | None = None


def main(
    data_dir: Annotated[Path | None, typer.Option(help="Where CIFAR-10 lies; else cache or download.")] = None,
    models: Annotated[Path, typer.Option(help="Folder of the bundles that ship.")] = Path("models"),
    work: Annotated[Path, typer.Option(help="Folder of the ablation's networks.")] = Path("runs/decoupling"),
    records: Annotated[Path, typer.Option(help="Folder of the measured rows.")] = Path("benchmarks/records/decoupling"),
    published: Annotated[Path, typer.Option(help="Folder of resnet56-4bfd9763.th.")] = Path("runs/published"),
    only: Annotated[str, typer.Option(help="Rows by commas: ablation, seeds, resnet56, speed, or one name.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    quick: Annotated[bool, typer.Option(help="Under a minute: the speed of the gates, and nothing trained.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Train what is missing, measure and print."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    wanted = {name.strip() for name in only.split(",") if name.strip()}
    known = {"ablation", "seeds", "speed", *OBJECTIVES_OF_ROWS, *MASKS, *NETWORKS}
    if wanted - known:
        raise typer.BadParameter(
            f"expected rows of {', '.join(sorted(known))}; got {', '.join(sorted(wanted - known))}"
        )
    trials: list[Trial] = []
    folders = Folders(data_dir, models, work, published)
    if not quick:
        splits = load_splits("cifar10", data_dir)
        for name in NETWORKS:
            if not wanted or name in wanted or ("seeds" in wanted and name in SEEDS):
                trials.append(_default(name, splits, folders, records))
        for name in (*OBJECTIVES_OF_ROWS, *MASKS):
            if not wanted or wanted & {"ablation", name}:
                trials.append(_ablated(name, splits, folders, records))
    rows = [*_bars(trials), *(_speed(quick) if not wanted or "speed" in wanted else [])]
    if trials:
        show(f"CIFAR-10, 10,000 test images; machines in {records}", [_shown(trial) for trial in trials])
    print_rows("bars", rows)
    if json is not None:
        write_rows(json, rows)


def _ablated(name: str, splits: Splits, folders: Folders, records: Path, keep: float = 0.7) -> Trial:
    """One row of the ablation, trained unless it is there."""
    bundle = Bundle(folders.models / BACKBONE)
    backbone = bundle.backbone().to(best_device())
    folder = folders.work / name
    weights, facts = folder / "network.safetensors", folder / "facts.json"
    objective = OBJECTIVES_OF_ROWS.get(name, Objective(distillation=DEFAULT.distillation))
    identity = {
        "row": name, "backbone": bundle.backbone_digest, "keep": keep, "objective": asdict(objective),
        "schedule": asdict(ABLATION),
    }  # fmt: skip
    file = records / f"{name}.json"
    if (known := recorded(file, identity)) is not None:
        return _trial(known)
    torch.manual_seed(ABLATION.seed)
    network = decouple(backbone, keep, objective.normalised)
    if name in MASKS:
        put_masks(network, MASKS[name](network, backbone, keep))
    network.to(best_device())
    if facts.exists():
        made = jsonlib.loads(facts.read_text())
        check_identity(folder, made["identity"], identity)
        network.load_state_dict(load_file(weights))
    else:
        interrupted, began = (folder / CHECKPOINT).exists(), time.monotonic()
        with training_bar(f"{name}") as listen:
            train_decoupled(network, backbone, splits, objective, keep, ABLATION, folder, identity, listen)
        made = {"identity": identity, "minutes": None if interrupted else (time.monotonic() - began) / 60}
        write_whole(weights, save({key: value.contiguous() for key, value in network.state_dict().items()}))
        write_whole(facts, jsonlib.dumps(made).encode())
    trial = _measured(name, network.eval(), backbone, splits, made["minutes"], None)
    record(file, identity, asdict(trial))
    return trial


def _default(name: str, splits: Splits, folders: Folders, records: Path) -> Trial:
    """A network that ships, made unless it is there."""
    facts = folders.work / f"{NETWORKS[name]}.json"
    taken = decoupled(NETWORKS[name], folders)
    if taken is not None:
        write_whole(facts, jsonlib.dumps(asdict(taken)).encode())
    bundle = Bundle(folders.models / NETWORKS[name])
    recipe = SHIPPED[NETWORKS[name]]
    identity = {
        "row": name, "backbone": bundle.backbone_digest, "network": bundle.network_digest, "decouple": recipe.decouple,
        "seed": recipe.seed,
    }  # fmt: skip
    file = records / f"{name}.json"
    if (known := recorded(file, identity)) is not None:
        return _trial(known)
    made = jsonlib.loads(facts.read_text()) if facts.exists() else {"minutes": None, "peak_gb": None}
    device = best_device()
    network, backbone = bundle.network().to(device), bundle.backbone().to(device)
    trial = _measured(name, network, backbone, splits, made["minutes"], made["peak_gb"])
    record(file, identity, asdict(trial))
    return trial


def _shown(trial: Trial) -> Mapping[str, object]:
    """A row of the table: points lost, shares in %, of the layers the best one, flipped bits over noise's."""
    return {
        "row": trial.row, "lost": f"{trial.lost:.2f}",
        "open": f"{100 * trial.keep:.1f}", "MACs": f"{100 * trial.macs_left:.1f}",
        "dep.": f"{100 * trial.input_dependent:.1f}", "paths": trial.distinct,
        "nats": f"{max(trial.information):.2f}", "FGSM": f"{trial.fgsm_over_noise:.2f}",
        "C&W": f"{trial.cw_over_noise:.2f}",
    }  # fmt: skip


def _trial(figures: Mapping[str, Any]) -> Trial:
    """As it was recorded."""
    return Trial(**{**figures, "information": tuple(figures["information"])})


def _measured(
    row: str, network: GatedNet, backbone: nn.Module, splits: Splits, minutes: float | None, peak_gb: float | None
) -> Trial:
    """The trial's figures."""
    test, probed = splits.held_out, probe_images(splits.train)
    device = device_of(network)
    evidence = list(encode_set(network, test))
    path = PathEncoding.stacked([part.path for part in evidence])
    right = np.concatenate([part.class_logits.argmax(axis=1) for part in evidence]) == test.labels
    fitted = PathEncoding.stacked([part.path for part in encode_set(network, probed)])
    layers = layer_figures(fitted, probed.labels, path, test.labels)
    cost = cost_of(network, torch.zeros(1, 3, 32, 32, device=device))
    share = path.bits.mean(axis=0)
    fgsm, fgsm_noise = _flips(network, splits, "fgsm")
    cw, cw_noise = _flips(network, splits, "cw")
    return Trial(
        row=row,
        accuracy=float(right.mean()),
        lost=100 * (accuracy(backbone, test) - float(right.mean())),
        keep=float(path.bits.mean()),
        macs_left=float(cost.of(path).mean() / cost.dense),
        input_dependent=float(((share >= 0.01) & (share <= 0.99)).mean()),
        distinct=distinct_paths(path),
        information=tuple(layer.information for layer in layers),
        flipped_fgsm=fgsm,
        fgsm_over_noise=fgsm / fgsm_noise if fgsm_noise else float("nan"),
        flipped_cw=cw,
        cw_over_noise=cw / cw_noise if cw_noise else float("nan"),
        minutes=minutes,
        peak_gb=peak_gb,
    )


def _flips(network: GatedNet, splits: Splits, recipe: str) -> tuple[float, float]:
    """Mean bits flipped by a successful attack, and by Gaussian noise of the same L2 norm on the same images."""
    images = splits.held_out.subset(rightly_classified(network, splits.held_out)[: FLIP_IMAGES[recipe]])
    device = device_of(network)
    clean = to_tensor(images.pixels(slice(None)), device)
    crafted = craft(RECIPES[recipe], network, clean, torch.from_numpy(images.labels).to(device), seed=0)
    fooled = torch.from_numpy(crafted.fooled)
    if not fooled.any():
        return float("nan"), float("nan")
    clean, attacked = clean[fooled], to_tensor(crafted.pixels[crafted.fooled], device)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
    length = torch.from_numpy(crafted.l2[crafted.fooled]).to(device)[:, None, None, None]
    noise *= length / noise.flatten(1).norm(dim=1)[:, None, None, None]
    noisy = to_tensor(to_pixels((clean + noise).clamp(0, 1)), device)
    before, after, with_noise = (encode(network.eval(), pixels).path for pixels in (clean, attacked, noisy))
    return float(flipped_bits(before, after).mean()), float(flipped_bits(before, with_noise).mean())


def _bars(trials: Sequence[Trial]) -> list[Row]:
    seeds = [trial for trial in trials if trial.row in SEEDS]
    large = [trial for trial in trials if trial.row == "resnet56"]
    whole = seeds if len(seeds) == len(SEEDS) else []

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if len(values) else None

    return [
        Row(
            figure="ResNet-20 backbone, accuracy, %",
            value=mean([100 * t.accuracy + t.lost for t in whole]), bar=91.4, at_most=False,
        ),
        Row(figure="accuracy lost, ResNet-20, keep 0.7, points", value=mean([t.lost for t in whole]), bar=1.0),
        Row(figure="accuracy lost, ResNet-56, keep 0.6, points", value=mean([t.lost for t in large]), bar=0.7),
        Row(
            figure="share of open filters off 0.7, largest of the seeds",
            value=max(abs(t.keep - 0.7) for t in whole) if whole else None, bar=0.02,
        ),
        Row(
            figure="input-dependent gates, %", value=mean([100 * t.input_dependent for t in whole]), bar=90,
            at_most=False,
        ),
        Row(
            figure="distinct paths among 10,000 images", value=mean([t.distinct for t in whole]), bar=9900,
            at_most=False,
        ),
        Row(
            figure="information about the class, best layer, nats (at least)",
            value=mean([max(t.information) for t in whole]), bar=2.0, at_most=False,
        ),
        Row(
            figure="bits flipped by C&W / by noise of the same norm", value=mean([t.cw_over_noise for t in whole]),
            bar=3, at_most=False,
        ),
        Row(
            figure="MACs left of the trained networks at keep 0.7, share of the backbone's",
            value=mean([t.macs_left for t in whole]), bar=0.6,
        ),
        *(
            Row(figure=f"MACs left where each filter is open with probability {keep}", value=_macs_left(keep), bar=bar)
            for keep, bar in ((0.7, 0.6), (0.5, 0.38))
        ),
        Row(figure="decouple, ResNet-20, minutes", value=mean([t.minutes for t in whole if t.minutes]), bar=60),
        Row(
            figure="decouple, ResNet-20, peak memory of the process, GB",
            value=max((t.peak_gb for t in whole if t.peak_gb), default=None), bar=3,
        ),
    ]  # fmt: skip


def _macs_left(keep: float, paths: int = 1000) -> float:
    """Of ResNet-20 over paths whose filters are open at random, counted path by path, as a share of the backbone's."""
    network = decouple(build_network("resnet20", 3, 10))
    cost = cost_of(network, torch.zeros(1, 3, 32, 32))
    bits = np.random.default_rng(0).random((paths, sum(network.layers.values()))) < keep
    return float(cost.of(PathEncoding(bits, network.layers)).mean() / cost.dense)


def _speed(quick: bool) -> list[Row]:
    """Masked forward pass with its gates over the plain one, one thread, fresh weights; ours is folded, as served."""
    torch.manual_seed(0)
    plain = build_network("resnet20", 3, 10).eval()
    gated, folded = fold_normalisation(decouple(plain).eval()), fuse(plain)
    rows = []
    for batch, bar in ((1, 1.6), (32, 1.2)):
        images = torch.rand(batch, 3, 32, 32)
        repetitions = (200 if quick else 1000) // batch + 20
        ours, theirs, theirs_folded = interleaved(
            [_forward(network, images) for network in (gated, plain, folded)], repetitions
        )
        rows += [
            Row(figure=f"forward with gates / plain, batch {batch}, torch eager", value=ours / theirs, bar=bar),
            Row(figure=f"the same, plain folded too, batch {batch}", value=ours / theirs_folded),
        ]
    image = torch.rand(1, 3, 32, 32)
    calls = [call for network in (WithGateLogits(gated), plain) if (call := onnx_call(network, image)) is not None]
    ratio = None
    if len(calls) == 2:
        ours, theirs = interleaved(calls, 200 if quick else 1000)
        ratio = ours / theirs
    return [*rows, Row(figure="forward with gates / plain, batch 1, ONNX Runtime", value=ratio, bar=1.25)]


def _forward(network: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return network(images)

    return call


def _scales(network: GatedNet) -> list[torch.Tensor]:
    """The scale of the batch normalisation behind each gated convolution of our own ResNets."""
    modules = dict(network.graph.named_modules())
    return [modules[name.replace("conv", "bn")].weight.detach().clone() for name in network.layers]


if __name__ == "__main__":
    typer.run(main)
