"""A bundle, its data and its attacks -> an evaluation."""

import logging
from collections.abc import Sequence

from attacks.adaptive.defence import defence_of
from attacks.benign import benign_samples
from attacks.evaluation.adaptive import Withstood, rows_of_withstood, withstand
from attacks.evaluation.adaptive_baselines import adaptive_baselines_sheet
from attacks.evaluation.costs import cost_rows
from attacks.evaluation.former import Former, with_others
from attacks.evaluation.judgement import Judge, Matrix, Served, Sheet
from attacks.evaluation.material import gather, limit_of
from attacks.evaluation.paths import PathDetector
from attacks.evaluation.protocol import QUICK, Protocol
from attacks.evaluation.report import Evaluation
from attacks.fitting_sets import named_sets
from attacks.store import AttackStore
from detector.baselines.all import all_baselines
from detector.baselines.baseline import Baseline, behind
from detector.batches import to_tensor
from detector.bundle import Bundle
from detector.datasets import ImageSet, Splits
from detector.errors import ArtifactError
from detector.network.decouple import GatedNet
from detector.paths.features import ALL, FEATURES, kinds_named, name_of
from detector.scoring.compiled_score import compile_score
from detector.scoring.fitting import CLASSIFIER
from detector.stages import check_fits
from detector.workers import IN_PROCESS, Workers

log = logging.getLogger(__name__)

# Features that read the class logits alone: what all that is read is better than these is what the path adds.
PATHLESS = "margins+doubts"


def evaluate_bundle(
    bundle: Bundle, splits: Splits, store: AttackStore, protocol: Protocol, seed: int = 0,
    foreign: ImageSet | None = None, adaptive: bool = True, workers: Workers = IN_PROCESS, former: Former | None = None,
) -> Evaluation:  # fmt: skip
    """Judge the bundle's detector; the same seed gives the same tables, but for measured times.

    Args:
        bundle: with a detector.
        splits: the data.
        store: attacks on the bundle's network.
        protocol: how much of everything.
        seed: of noise, corruptions, adaptive attacks, bootstrap and what is fitted anew.
        foreign: images of another data set; None for handwritten digits.
        adaptive: whether attackers who know the detector are let loose.
        workers: those attackers, which take most of the time.
        former: tables of an evaluation of another detector of the same network, by the same attacked images, protocol
            and seed: other detectors are not run again, their rows are taken over.

    Raises:
        ArtifactError: the bundle has no detector, or the attacks are on another network.
        DataError: the data does not fit, attacks are unfinished, or none succeeded.
    """
    check_fits(bundle, splits.test)
    if store.origin.network != bundle.network_digest:
        raise ArtifactError(
            f"expected attacks on the network {bundle.network_digest[:12]} of {bundle.folder}, got attacks on "
            f"{store.origin.network[:12]} in {store.folder}"
        )
    network, info = bundle.network().to(workers.device), bundle.detector_info()
    classes, classifier = len(bundle.manifest.network.classes), info.classifier or CLASSIFIER

    most = max(1, protocol.fitting_images // 4)  # of sixteen kinds
    benign = benign_samples(network, splits.fitting, seed, workers, most) if info.benign else {}

    def paths(features: str, name: str, images: int | None = None) -> PathDetector:
        return PathDetector(network, features, classifier, classes, seed, name, images, info.overshoot, benign)

    ours = paths(info.features, "paths")
    example = to_tensor(splits.test.pixels(slice(0, 1)), workers.device)
    others: list[Baseline] = []
    if protocol.baselines:
        every = all_baselines(network, example, seed)
        others = [method for method in every if method.images is None or protocol.costly_baselines]
    # Ours on the few images that a costly detector looks at, to stand beside it.
    limits = dict.fromkeys(limit for method in others if (limit := limit_of(method, protocol)) is not None)
    fewer: list[Baseline] = [paths(info.features, f"paths, {limit} images of a kind", limit) for limit in limits]
    order = [method.name for method in (ours, *others, *fewer)]
    run = others if former is None else []
    methods: list[Baseline] = [ours, *run, *fewer]
    log.info("images pass the network")
    material = gather(network, splits, store, [ours, *run], protocol, seed, foreign, adaptive)
    served = _served(bundle, network)
    judge = Judge(material, protocol, served, seed)
    log.info("tables: attacks left out")
    unseen = judge.unseen_sheet(methods)
    log.info("tables: features, baselines, fitting sets")
    matrix = judge.matrix(ours)
    read = name_of(kinds_named(info.features))
    alone: list[Baseline] = [paths(kind, kind) for kind in dict.fromkeys((*FEATURES, PATHLESS, read, ALL))]
    sheets = [
        judge.attack_sheet(),
        judge.worst_case_sheet(),
        judge.worst_unseen(unseen, methods),
        unseen,
        _sheet_of(matrix),
        judge.false_alarm_sheet(),
        judge.corruption_sheet(),
        judge.class_sheet(),
        judge.method_sheet("features", f"what the classifier ({classifier}) reads: AUROC", alone),
        judge.method_sheet("baselines", "other detectors on the same network: AUROC", methods),
        judge.fitting_set_sheet(ours, named_sets(store)),
        judge.shots_sheet(ours),
        judge.other_rows_sheet(),
    ]
    withstood: list[Withstood] = []
    if adaptive:
        log.info("attackers who know the detector")
        known = defence_of(bundle, network, splits.validation, seed=seed)
        rate, accuracy = info.max_false_alarm_rate, material.right_clean
        withstood = withstand(network, splits.test, known, protocol.adaptive, accuracy, seed, workers)
        title = f"robust accuracy where {rate:.0%} of clean images may be flagged"
        sheets.append(Sheet("adaptive", title, rows_of_withstood(withstood)))
        if others:
            beside = adaptive_baselines_sheet(
                network, splits, known, others, judge, protocol, rate, accuracy, seed, workers, former
            )
            sheets.append(beside)
    if former is not None and others:
        compared = ("worst_unseen", "unseen", "baselines")
        sheets = [with_others(sheet, former, order) if sheet.name in compared else sheet for sheet in sheets]
    sheets.append(
        Sheet("costs", "cost beside the plain backbone", cost_rows(bundle, network, splits, protocol.timed_seconds))
    )
    facts = {
        "bundle": bundle.folder.resolve().name,
        "network": f"{bundle.manifest.network.name}, {bundle.network_digest[:12]}",
        "data": bundle.manifest.network.data,
        "detector": served.name,
        "fitted on": ", ".join(info.recipes),
        "calibration images": str(len(served.calibration)),
        "protocol": protocol.name,
        "seeds": f"evaluation {seed}, attacks {store.origin.seed}",
        "accuracy on the clean test images": f"{material.right_clean:.4f}",
    }
    notes = _notes(protocol, withstood, former is not None)
    return Evaluation(facts, notes, sheets, judge.curves(), material.norms, matrix, withstood)


def _served(bundle: Bundle, network: GatedNet) -> Served:
    """The bundle's own classifier and calibration."""
    info, features = bundle.detector_info(), bundle.features(network)
    score = behind(features.of_rows, compile_score(bundle.classifier()))
    name = f"{info.classifier or CLASSIFIER} on {name_of(features.kinds)}"
    return Served(score, bundle.calibration(), info.recipes, name)


def _sheet_of(matrix: Matrix) -> Sheet:
    rows: list[dict[str, object]] = []
    for name, values in zip(matrix.fitted_on, matrix.auroc, strict=True):
        cells = dict(zip(matrix.judged_by, values.tolist(), strict=True))
        worst = min((value for value in values.tolist() if value == value), default=None)
        rows.append({"fitted on": name, **cells, "worst": worst})
    return Sheet("matrix", "fitted on one attack, judged by each: AUROC", rows)


def _notes(protocol: Protocol, withstood: Sequence[Withstood], taken_over: bool) -> list[str]:
    notes = []
    if protocol is QUICK:
        notes.append(f"The protocol `{protocol.name}` looks at few images: a first look, not figures to publish.")
    if taken_over:
        notes.append(
            "Rows of other detectors are those of an evaluation of a former detector of ours, on the same network and "
            "by the same attacked images."
        )
    if withstood and not withstood[0].exact:
        notes.append(
            "The classifier has no gradient: adaptive attacks follow an imitation of it, and one that is made better "
            "may do more harm."
        )
    return notes
