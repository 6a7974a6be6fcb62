"""Our detector and every other under attackers who know it: robust accuracy, all else being equal."""

import logging
from collections.abc import Mapping, Sequence

from attacks.adaptive.defence import Defence, defence_of_baseline
from attacks.evaluation.adaptive import withstand
from attacks.evaluation.former import Former, others_rows
from attacks.evaluation.judgement import Judge, Sheet
from attacks.evaluation.material import limit_of
from attacks.evaluation.protocol import Protocol, Trial
from detector.baselines.baseline import Baseline
from detector.datasets import Splits
from detector.errors import DataError, RequestError
from detector.network.decouple import GatedNet
from detector.workers import IN_PROCESS, Workers

log = logging.getLogger(__name__)

SHEET = "adaptive_baselines"


def adaptive_baselines_sheet(
    network: GatedNet, splits: Splits, ours: Defence, others: Sequence[Baseline], judge: Judge, protocol: Protocol,
    rate: float, accuracy: float, seed: int, workers: Workers = IN_PROCESS, former: Former | None = None,
) -> Sheet:  # fmt: skip
    """Attack each detector by the same attacks, on the same images, at the headline's budget.

    Ours has a row before the baselines, and another before those that take long for each image, which are attacked on
    fewer images for fewer steps.

    Args:
        network: the bundle's, in evaluation mode.
        splits: the data; guides and imitations come from the validation images.
        ours: the bundle's detector.
        others: the baselines.
        judge: fits them and sets their thresholds.
        protocol: how long attackers search.
        rate: share of clean images that each detector may flag.
        accuracy: share of clean test images that the network gets right.
        seed: of the attacks.
        workers: who attacks.
        former: as in `evaluate_bundle`.
    """
    rows: list[Mapping[str, object]] = []
    known_rows = {} if former is None else {row["detector"]: row for row in others_rows(former, SHEET)}

    def attack(name: str, defence: Defence, trial: Trial) -> None:
        log.info("attackers who know %s", name)
        *each, together = withstand(network, splits.test, defence, trial, accuracy, seed, workers)
        said = (f"{row.attack.removeprefix('adaptive-')} ({row.settings})" for row in each)
        rows.append({
            "detector": name, "images": together.images, "attackers": "; ".join(said),
            "budget / 255": together.budget, "robust accuracy": together.robust, "low": together.low,
            "high": together.high, "detector off": together.without_detector, "points added": together.added,
            "own gradient": together.exact,
        })  # fmt: skip

    for trial, costly in ((protocol.adaptive_baselines, False), (protocol.adaptive_costly, True)):
        methods = [method for method in others if (method.images is not None) == costly]
        if methods:
            attack("paths", ours, trial)
        for method in methods:
            if former is not None:
                rows += [known_rows[method.name]] if method.name in known_rows else []
                continue
            clean = splits.validation.first(limit_of(method, protocol))
            try:
                score, usual = judge.calibrated(method)
                known = defence_of_baseline(network, method, score, usual, clean, rate, seed)
            except (DataError, RequestError) as error:
                log.warning("%s is not attacked: %s", method.name, error)
                continue
            attack(method.name, known, trial)
    title = f"each detector under attackers who know it, where {rate:.0%} of clean images may be flagged"
    return Sheet(SHEET, title, rows)
