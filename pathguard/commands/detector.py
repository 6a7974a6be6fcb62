"""`pathguard fit` and `pathguard evaluate`: a detector on paths, and its figures."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pathguard.commands.options import AttackDir, BundleDir, DataDir, ImageSize, Json, Rate, Seed, Trust, splits_of
from pathguard.tables import show

if TYPE_CHECKING:
    from attacks.stages import FeatureFigures


def fit(
    bundle: BundleDir,
    attacks: AttackDir,
    features: Annotated[
        str, typer.Option(help="What the classifier reads: bits, gates, ... joined by +, or all.")
    ] = "all",
    max_false_alarm_rate: Rate = 0.05,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Fit and calibrate the detector on clean and attacked paths: the third stage."""
    from attacks.stages import make_detector
    from attacks.store import AttackStore
    from detector.bundle import Bundle

    opened = Bundle(bundle, trust)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)
    grown = make_detector(opened, splits, AttackStore(attacks), features, max_false_alarm_rate, seed)
    made = grown.manifest.training["detector"]
    show(f"detector in {bundle}", [{key: str(value) for key, value in made.items()}], json_)


def evaluate(
    bundle: BundleDir,
    attacks: AttackDir,
    max_false_alarm_rate: Rate = 0.05,
    each_feature: Annotated[bool, typer.Option(help="Also fit and judge each kind of features alone.")] = False,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Judge the detector on images that no step has seen."""
    from attacks.stages import judge_detector, judge_each_feature
    from attacks.store import AttackStore
    from detector.bundle import Bundle

    opened, store = Bundle(bundle, trust), AttackStore(attacks)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)
    judged = [judge_detector(opened, splits, store, max_false_alarm_rate, seed)]
    if each_feature:
        judged += judge_each_feature(opened, splits, store, store, max_false_alarm_rate, seed)
    if json_:
        show("", list(_detection_rows(judged)), as_json=True)
        return
    show(f"served detector ({judged[0].features}) first, successful attacks", list(_attack_rows(judged)))
    show(f"flagged clean images, {max_false_alarm_rate:.2%} allowed", list(_false_alarm_rows(judged)))


def _attack_rows(judged: "Iterable[FeatureFigures]") -> Iterable[dict[str, object]]:
    """For a person: how well each attack is told from clean images."""
    for figures in judged:
        for row in figures.detections:
            yield {
                "features": figures.features,
                "attack": row.attack,
                "images": row.attacked,
                "AUROC": row.auroc,
                "95 %": f"{row.auroc_low:.3f}-{row.auroc_high:.3f}",
                "detected": row.detected,
            }


def _false_alarm_rows(judged: "Iterable[FeatureFigures]") -> Iterable[dict[str, object]]:
    """For a person: how many clean images are flagged, and of those that the network gets wrong."""
    for figures in judged:
        alarms, wrong = figures.false_alarms, figures.false_alarms_when_wrong
        yield {
            "features": figures.features,
            "clean images": "all",
            "images": alarms.images,
            "flagged": alarms.realised,
            "expected": f"{alarms.low:.3f}-{alarms.high:.3f}",
            "as expected": alarms.as_expected,
        }
        if wrong is not None:  # no interval: images that the network gets wrong are not like those of the calibration
            yield {
                "features": figures.features,
                "clean images": "labelled wrongly",
                "images": wrong.images,
                "flagged": wrong.realised,
                "expected": None,
                "as expected": None,
            }


def _detection_rows(judged: "Iterable[FeatureFigures]") -> Iterable[dict[str, object]]:
    """For a program: one row per features and attack, with the false alarms on clean test images beside it."""
    for figures in judged:
        for row in figures.detections:
            yield {
                "features": figures.features,
                **asdict(row),
                "false_alarms": figures.false_alarms.realised,
                "expected_low": figures.false_alarms.low,
                "expected_high": figures.false_alarms.high,
                "alarms_when_wrong": figures.false_alarms_when_wrong and figures.false_alarms_when_wrong.realised,
                "wrong": figures.false_alarms_when_wrong.images if figures.false_alarms_when_wrong else 0,
            }
