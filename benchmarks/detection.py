"""How well attacks are detected, on CIFAR-10: tables and every bar, for several seeds and two networks.

    python -m benchmarks.detection [BUNDLE...] --data-dir DIR [--models DIR] [--work DIR] [--published DIR]
                                   [--records DIR] [--others DIR] [--protocol full] [--quick] [--json FILE]

Judged are bundles that ship: ResNet-20 of three seeds, ResNet-56, and two hardened networks. What is missing of them is
made by `benchmarks.shipped`; an interrupted run goes on by the same command. `full` is the protocol of that name for
ResNet-20; ResNet-56, which takes three times as long for an image, is judged by `larger`, the hardened networks by
`hardened`, without other detectors. An evaluation is a record: the committed ones are those that the README and
docs/detection.md tell, and are read, not made anew; one of another detector or another protocol is refused. Where ours
is fitted anew, `--others` names a folder of its former records, from which the rows of other detectors are taken over:
network, attacked images and fitting set are the same.

`--quick` trains, decouples, attacks, fits and evaluates scikit-learn's digits in a minute: it shows that the steps
work, and its figures are held against no bar.

A value is the mean over the seeds of one network, and of the two networks the worse; its interval reaches from the
smallest lower to the largest upper end of the seeds' 95 % bootstrap intervals.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import numpy as np
import typer
from sklearn.datasets import load_digits

from attacks.evaluation.evaluate import PATHLESS, evaluate_bundle
from attacks.evaluation.protocol import FULL, HARDENED, LARGER, QUICK, Protocol, Trial, protocol_named
from attacks.evaluation.report import content_of, write_evaluation
from attacks.stages import make_attacks, make_detector
from attacks.store import AttackStore
from attacks.suites import recipes_named
from benchmarks.records import record, recorded
from benchmarks.report import Row, print_rows, write_rows
from benchmarks.shipped import SHIPPED, Folders, attacked, detected
from detector.bundle import Bundle
from detector.datasets import ImageSet, Splits, cut, load_splits
from detector.errors import ArtifactError
from detector.images import ImageSpec, Pixels
from detector.network.schedule import Schedule
from detector.paths.features import ALL
from detector.stages import make_backbone, make_decoupled
from pathguard.progress import attack_bar, training_bar
from pathguard.tables import show

RATE = 0.05
AHEAD = 0.1  # points: a tie is no lead
# What stands for `full` of each bundle.
JUDGED: Mapping[str, Protocol] = {
    **{f"cifar10-resnet20-seed{seed}": FULL for seed in (0, 1, 2)},
    "cifar10-resnet56": LARGER,
    "cifar10-resnet20-hardened": HARDENED,
    "cifar10-resnet20-hardened-gates": HARDENED,
}
Tables = Mapping[str, Sequence[Mapping[str, Any]]]


FEW = Trial(8, 10, 1, {"adaptive-orthogonal": {}, "adaptive-joint": {}}, (8,))
OF_DIGITS = replace(QUICK, corrupted_images=20, adaptive=FEW, adaptive_baselines=FEW)


@dataclass(frozen=True, slots=True)
class Judged:
    """One evaluated detector.

    Attributes:
        bundle: its name.
        network: name of the backbone.
        seed: of network, attacks and detector.
        facts: what was judged, by what.
        tables: all tables of the evaluation.
    """

    bundle: str
    network: str
    seed: int
    facts: Mapping[str, str]
    tables: Tables


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Bundles to judge; all where none is named.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where CIFAR-10 lies; else cache or download.")] = None,
    models: Annotated[Path, typer.Option(help="Folder of the bundles that ship.")] = Path("models"),
    work: Annotated[Path, typer.Option(help="Folder of the attacked images.")] = Path("runs/shipped"),
    published: Annotated[Path, typer.Option(help="Folder of published weights.")] = Path("runs/published"),
    records: Annotated[Path, typer.Option(help="Folder of the evaluations.")] = Path("benchmarks/records/detection"),
    others: Annotated[Path | None, typer.Option(help="Folder of records to take other detectors' rows from.")] = None,
    protocol: Annotated[str, typer.Option(help="How much is looked at: quick, or full as above.")] = "full",
    quick: Annotated[bool, typer.Option(help="A minute: all steps on scikit-learn's digits.")] = False,
    to: Annotated[Path | None, typer.Option("--json", help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Make what is missing, and print."""
    asked = protocol_named(protocol)
    shown: list[Judged] = []
    harder: list[Judged] = []
    if quick:
        with TemporaryDirectory() as folder:
            _print_tables("resnet8, digits", [judged_digits(Path(folder))])
    else:
        for name in names or JUDGED:
            if name not in JUDGED:
                raise typer.BadParameter(f"expected bundles of {', '.join(JUDGED)}; got {name}")
        splits, folders = load_splits("cifar10", data_dir), Folders(data_dir, models, work, published)
        for name in names or JUDGED:
            looked_at = JUDGED[name] if asked is FULL else asked
            judged = _judged(name, looked_at, splits, folders, records, others)
            (harder if SHIPPED[name].hardened else shown).append(judged)
    for network in dict.fromkeys(judged.network for judged in shown):
        _print_tables(network, [judged for judged in shown if judged.network == network])
    for one in harder:
        _print_tables(one.bundle, [one])
    print_rows("bars", rows := bars(shown, harder))
    if to is not None:
        write_rows(to, rows)


def _judged(
    name: str, protocol: Protocol, splits: Splits, folders: Folders, records: Path, others: Path | None
) -> Judged:
    """The evaluation of a bundle that ships, made unless it is there."""
    bundle, recipe = detected(name, folders), SHIPPED[name]
    identity = {
        "bundle": bundle.model_digest, "threshold": bundle.threshold_digest, "attacks": recipe.attacks,
        "limit": recipe.limit, "seed": recipe.seed, "protocol": asdict(protocol),
    }  # fmt: skip
    file = records / f"{name}-{protocol.name}.json"
    known = recorded(file, identity)
    if known is None:
        images = attacked(name, folders)
        store = AttackStore(images)
        former = None if others is None else _former(others / file.name, identity, bundle, store)
        evaluation = evaluate_bundle(bundle, splits, store, protocol, recipe.seed, former=former)
        write_evaluation(evaluation, images.with_name(f"{name}-judged-{protocol.name}"))
        known = content_of(evaluation)
        record(file, identity, known)
    return Judged(name, bundle.manifest.network.name, recipe.seed, known["facts"], known["tables"])


def _former(file: Path, identity: Mapping[str, object], bundle: Bundle, store: AttackStore) -> Tables:
    """The tables of another detector's record: of the same network, attacked images, fitting set, rate and protocol.

    Raises:
        ArtifactError: there is none, or the record is of something else.
    """
    info, own = bundle.detector_info(), {"bundle", "threshold"}
    if not file.exists():
        raise ArtifactError(f"expected a record of the former detector to take other detectors' rows from, no {file}")
    content = json.loads(file.read_text())
    facts, tables = content["figures"]["facts"], content["figures"]["tables"]
    found = {key: value for key, value in content["identity"].items() if key not in own} | {
        "network": facts["network"], "fitted on": sorted(facts["fitted on"].split(", ")),
        "given and fooled": {row["attack"]: [row["given"], row["fooled"]] for row in tables["attacks"]},
    }  # fmt: skip
    given, fooled = store.counts("test")
    expected = {key: value for key, value in identity.items() if key not in own} | {
        "network": f"{bundle.manifest.network.name}, {bundle.network_digest[:12]}", "fitted on": sorted(info.recipes),
        "given and fooled": {name: [given[name], fooled[name]] for name in store.attacks("test") if fooled[name]},
    }  # fmt: skip
    expected = json.loads(json.dumps(expected))
    if differing := [key for key, value in expected.items() if found.get(key) != value]:
        said = {key: found.get(key) for key in differing}
        raise ArtifactError(f"expected {file} to be of { {key: expected[key] for key in differing} }, got {said}")
    return cast(Tables, tables)


def judged_digits(folder: Path) -> Judged:
    """All steps, from images to tables, on handwritten digits."""
    splits, bundle_dir, attacks = digits(), folder / "bundle", folder / "attacks"
    schedule = Schedule(epochs=12, learning_rate=0.1, batch=64, flip=False)
    with training_bar("train") as listen:
        bundle, _ = make_backbone("resnet8", splits, schedule, bundle_dir, listen)
    with training_bar("decouple") as listen:
        shorter = replace(schedule, epochs=8, learning_rate=0.05)
        bundle, _ = make_decoupled(bundle, splits, 0.7, "pathguard", shorter, bundle_dir, listen)
    with attack_bar("attack") as listen_to:
        make_attacks(bundle, splits, recipes_named("fgsm,pgd,cw"), attacks, 80, 0, 250, listen_to)
    store = AttackStore(attacks)
    bundle = make_detector(bundle, splits, store, ALL, RATE, 0, "logistic-0.01", overshoot=False, benign=True)
    read = content_of(evaluate_bundle(bundle, splits, store, OF_DIGITS))
    return Judged("digits", "resnet8", 0, read["facts"], read["tables"])


def bars(judged: Sequence[Judged], harder: Sequence[Judged]) -> list[Row]:
    """Every bar of the design, null where nothing was measured.

    Args:
        judged: detectors of networks as they were decoupled.
        harder: those of hardened ones.
    """
    gates_alone = [one for one in harder if "gates" in SHIPPED[one.bundle].harden]
    hardened = [one for one in harder if one not in gates_alone]

    def worst(
        figure: Callable[[Tables], float | None], pick: Callable[[list[float]], float], of: Sequence[Judged] = judged
    ) -> float | None:
        """The mean over the seeds, of the network that does worst."""
        means = []
        for network in dict.fromkeys(one.network for one in of):
            values = [value for one in of if one.network == network and (value := figure(one.tables)) is not None]
            if values:
                means.append(float(np.mean(values)))
        return pick(means) if means else None

    def low(figure: Callable[[Tables], float | None]) -> float | None:
        return worst(figure, min)

    rows = [
        Row(figure=f"AUROC, {attack}, %", value=low(_attack(attack, "AUROC", 100)), bar=bar, at_most=False)
        for attack, bar in (
            ("fgsm", 99.9), ("bim-end", 99.9), ("pgd-end", 99.9), ("pgd-end-2", 97), ("pgd-l2-end", 99.5),
            ("deepfool", 97.5), ("cw", 98.5), ("autoattack", 99), ("square", 99.5), ("jsma", 95),
        )
    ]  # fmt: skip
    # The bars are of attacks that run all their steps; those that stop once they succeed stay nearer to clean images.
    rows += [
        Row(figure=f"AUROC, {attack}, stopped at the first success, %", value=low(_attack(attack, "AUROC", 100)))
        for attack in ("bim", "pgd", "pgd-2", "pgd-l2")
    ]
    rows += [
        Row(
            figure="TPR at 1 % false alarms, mean over attacks, %", value=low(_mean_of("attacks", "TPR at 1%", 100)),
            bar=90, at_most=False,
        ),
        Row(figure="unseen attack, worst cell, AUROC, %", value=low(_worst_unseen("paths")), bar=90, at_most=False),
        Row(
            figure="adaptive robust accuracy at 5 %, 8/255, without hardening, %",
            value=low(_adaptive("robust accuracy", 100)), bar=14, at_most=False,
        ),
        Row(
            figure="of which the detector adds, points", value=low(_adaptive("points added", 1)), bar=5, at_most=False
        ),
        *(
            Row(figure=f"{figure}, hardened {part}, {unit}", value=worst(_adaptive(column, times), min, of), bar=bar,
                at_most=False)
            for part, of in (("network", hardened), ("gates alone", gates_alone))
            for figure, unit, column, times, bar in (
                ("adaptive robust accuracy", "%", "robust accuracy", 100, 40),
                ("of which the detector adds", "points", "points added", 1, 5),
            )
        ),
        Row(
            figure="what the path adds on C&W: all that is read / margins alone, points of AUROC",
            value=low(_path_adds("cw", "margins")), bar=3, at_most=False,
        ),
        Row(
            figure="the same / all that the class logits say (margins and doubts)",
            value=low(_path_adds("cw", PATHLESS)),
        ),
    ]  # fmt: skip
    for rate in ("5%", "1%"):
        inside = [_inside(one.tables, rate) for one in judged]
        known = [value for value in inside if value is not None]
        rows.append(
            Row(
                figure=f"seeds whose realised false alarms at {rate} lie in their interval, share",
                value=float(np.mean(known)) if known else None,
                bar=1,
                at_most=False,
            )
        )
    for severity, bar in ((1, 10), (3, 30)):
        rows.append(
            Row(
                figure=f"false alarms on corruptions of severity {severity}, %",
                value=worst(_corrupted(severity), max),
                bar=bar,
            )
        )
    rows += [
        Row(
            figure="columns in which a baseline is ahead beyond the interval", value=worst(_columns_behind, max), bar=0
        ),
        Row(
            figure="worst unseen cell, ahead of the best baseline, points", value=low(_unseen_lead), bar=AHEAD,
            at_most=False,
        ),
        Row(
            figure="adaptive, ahead of the best baseline, points", value=low(_adaptive_lead), bar=AHEAD, at_most=False,
        ),
    ]  # fmt: skip
    return rows


def _attack(name: str, column: str, times: float) -> Callable[[Tables], float | None]:
    return lambda tables: next((times * row[column] for row in tables["attacks"] if row["attack"] == name), None)


def _mean_of(table: str, column: str, times: float) -> Callable[[Tables], float | None]:
    return lambda tables: times * float(np.mean([row[column] for row in tables[table]])) if tables[table] else None


def _worst_unseen(detector: str) -> Callable[[Tables], float | None]:
    def found(tables: Tables) -> float | None:
        cells = [100 * row["worst AUROC"] for row in tables["worst_unseen"] if row["detector"] == detector]
        return min(cells, default=None)

    return found


def _unseen_lead(tables: Tables) -> float | None:
    """Our worst cell less the worst cell of each baseline, fitted on and judged by as many images; the smallest."""
    leads = []
    for name in {str(row["detector"]) for row in tables["worst_unseen"]}:
        other, own = _worst_unseen(name)(tables), _worst_unseen(_own_beside(tables["worst_unseen"], name))(tables)
        if not name.startswith("paths") and other is not None and own is not None:
            leads.append(own - other)
    return min(leads, default=None)


def _own_beside(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """The row of our detector that saw as many images as the detector `name`."""
    counts = next(_counts(row) for row in rows if row["detector"] == name)
    return next(
        str(row["detector"]) for row in rows if str(row["detector"]).startswith("paths") and _counts(row) == counts
    )


def _counts(row: Mapping[str, Any]) -> tuple[object, object]:
    return row["images fitted on"], row["images judged by"]


def _adaptive(column: str, times: float) -> Callable[[Tables], float | None]:
    def found(tables: Tables) -> float | None:
        rows = [
            row for row in tables.get("adaptive", ()) if row["attack"] == "any of them" and row["budget / 255"] == 8
        ]
        return times * float(rows[0][column]) if rows else None

    return found


def _adaptive_lead(tables: Tables) -> float | None:
    """Our robust accuracy less each baseline's, under the same attackers on as many images; the smallest."""
    rows = tables.get("adaptive_baselines", ())

    def under(row: Mapping[str, Any]) -> tuple[object, ...]:
        return row["images"], row["attackers"], row["budget / 255"]

    own = {under(row): row["robust accuracy"] for row in rows if row["detector"] == "paths"}
    leads = [100 * (own[under(row)] - row["robust accuracy"]) for row in rows if row["detector"] != "paths"]
    return min(leads, default=None)


def _path_adds(attack: str, without_path: str) -> Callable[[Tables], float | None]:
    """All that the detector reads against `without_path`, which reads the class logits alone."""

    def found(tables: Tables) -> float | None:
        of = {row["detector"]: row.get(attack) for row in (*tables["features"], *tables["baselines"])}
        everything, without = of.get("paths"), of.get(without_path)
        return None if everything is None or without is None else 100 * (float(everything) - float(without))

    return found


def _inside(tables: Tables, rate: str) -> float | None:
    row = next(row for row in tables["false_alarms"] if row["images"] == "clean")
    if row[f"expected at {rate}"] is None:
        return None
    low, high = (float(end) for end in row[f"expected at {rate}"].split("-"))
    return float(low - 5e-5 <= row[f"flagged at {rate}"] <= high + 5e-5)  # the ends are printed to four digits


def _corrupted(severity: int) -> Callable[[Tables], float | None]:
    def found(tables: Tables) -> float | None:
        mean = next((row for row in tables["corruptions"] if row["corruption"] == "mean"), None)
        return None if mean is None else 100 * float(mean[f"severity {severity}"])

    return found


def _columns_behind(tables: Tables) -> float | None:
    """Attacks on which the best baseline lies above the upper end of our interval.

    A baseline is held against our detector fitted on and judged by the same images; its interval is taken to be as wide
    as that of the served one, which rests on at least as many images.
    """
    margins = {row["attack"]: row["high"] - row["AUROC"] for row in tables["attacks"]}
    rows = tables["baselines"]
    named = {row["detector"]: row for row in rows}
    others = [row for row in rows if not row["detector"].startswith("paths")]
    if not others:
        return None

    def ahead(row: Mapping[str, Any], attack: str) -> bool:
        own = named[_own_beside(rows, row["detector"])][attack]
        return row[attack] is not None and own is not None and row[attack] > own + margins[attack]

    return float(sum(any(ahead(row, attack) for row in others) for attack in margins))


def _print_tables(network: str, seeds: Sequence[Judged]) -> None:
    numbers = ", ".join(str(one.seed) for one in seeds)
    title = f"{network}, seeds {numbers}, {seeds[0].facts['data']}"
    rows = []
    for attack, same in _rows_by(seeds, "attacks", "attack").items():
        rows.append({
            "attack": attack[0], "images": sum(row["images"] for row in same),
            "AUROC": float(np.mean([row["AUROC"] for row in same])),
            "95 %": f"{min(row['low'] for row in same):.4f}-{max(row['high'] for row in same):.4f}",
            "TPR at 5 %": float(np.mean([row["TPR at 5%"] for row in same])),
            "TPR at 1 %": float(np.mean([row["TPR at 1%"] for row in same])),
        })  # fmt: skip
    show(title, rows)
    for table in ("features", "baselines"):
        show(f"{network}: {table}, AUROC", averaged(seeds, table, "detector"))
    show(f"{network}: worst unseen", averaged(seeds, "worst_unseen", "detector", "left out"))


def _rows_by(seeds: Sequence[Judged], table: str, *keys: str) -> dict[tuple[object, ...], list[Mapping[str, Any]]]:
    """The rows of all seeds, by what stands in the columns `keys`."""
    found: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for row in (row for one in seeds for row in one.tables[table]):
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def averaged(seeds: Sequence[Judged], table: str, *keys: str) -> list[dict[str, object]]:
    """One row for each of `keys` in any seed: the mean of numbers, and all words that stood there."""
    columns = dict.fromkeys(column for one in seeds for row in one.tables[table] for column in row)
    rows = []
    for same in _rows_by(seeds, table, *keys).values():
        mean: dict[str, object] = {}
        for column in columns:
            values = [row[column] for row in same if row.get(column) is not None]
            words = [value for value in values if isinstance(value, str)]
            if words:
                mean[column] = ", ".join(dict.fromkeys(words))
            elif values and all(isinstance(value, int) for value in values):
                mean[column] = round(np.mean(values))
            else:
                mean[column] = float(np.mean(values)) if values else None
        rows.append(mean)
    return rows


def digits() -> Splits:
    """1,797 photos of handwritten digits, 8 x 8 grey, cut like every other set."""
    source = load_digits()
    pixels: Pixels = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = source.target.astype(np.int64)

    def part(positions: slice) -> ImageSet:
        own = pixels[positions]
        return ImageSet(
            "digits", labels[positions], np.arange(len(own)), tuple(str(digit) for digit in range(10)),
            ImageSpec(8, 8, 1), "digits", lambda ids: own[ids],
        )  # fmt: skip

    return cut(part(slice(0, 900)), part(slice(900, None)))


if __name__ == "__main__":
    typer.run(main)
