import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchattacks

from attacks.recipes import RECIPES
from attacks.suites import recipe_named
from benchmarks import attack_throughput
from benchmarks.attack_throughput import (
    SUITE_IMAGES,
    Contest,
    Side,
    contests,
    measure_member,
    memory_rows,
    race,
    suite_rows,
)
from detector.datasets import ImageSet
from detector.images import ImageSpec
from tests.oracles import MeanBoundary


@pytest.fixture
def images():
    pixels = np.full((600, 6, 6, 1), 122, np.uint8)
    return ImageSet(
        "grey", np.zeros(600, np.int64), np.arange(600), ("dark", "light"), ImageSpec(6, 6, 1), "grey",
        lambda ids: pixels[ids],
    )  # fmt: skip


def test_both_sides_attack_the_same_images_and_are_judged_alike(images):
    contest = Contest("FGSM", RECIPES["fgsm"], lambda network: torchattacks.FGSM(network, eps=8 / 255), 50, None)

    ours, theirs = race(contest, MeanBoundary(0.5), images, 20)

    assert ours.images == theirs.images == 50
    assert ours.fooled == theirs.fooled == ours.survived == theirs.survived == 50
    assert ours.distances == pytest.approx(theirs.distances)
    assert ours.line("ours")["after it"] == "100.0%"
    assert ours.rate > 0


def test_the_bars_are_those_of_the_issue_and_the_steps_are_the_same_on_both_sides():
    bars = {contest.name.split(",")[0]: contest.bar for contest in contests(quick=False) if contest.bar is not None}

    assert bars == {"PGD": 1.5, "C&W": 1.5, "DeepFool": 5.0}
    loop = contests(quick=False)[-1].loop(MeanBoundary().eval())
    assert loop.steps == RECIPES["deepfool"].settings["steps"]


def test_cw_keeps_the_nearest_that_fools_of_all_constants(images):
    contest = contests(quick=True)[2]

    _, theirs = race(replace(contest, images=4), MeanBoundary(0.48), images, 4)

    assert theirs.fooled == 4


def test_a_race_counts_only_where_ours_fools_as_many_as_near():
    ours, theirs = (Side(seconds=1.0, images=4, survived=3, distances=[0.1, 0.2, 0.3]) for _ in range(2))
    nearest, bounded = RECIPES["cw"], RECIPES["pgd"]
    farther = replace(ours, distances=[0.1, 0.21, 0.3])

    assert ours.is_as_good_as(theirs, nearest)
    assert not replace(ours, survived=2).is_as_good_as(theirs, bounded)
    assert not farther.is_as_good_as(theirs, nearest)
    assert farther.is_as_good_as(theirs, bounded)


def test_a_member_is_measured_on_as_many_images_as_take_some_seconds(images, monkeypatch):
    seen = []
    monkeypatch.setattr(attack_throughput, "craft", lambda recipe, network, clean, *rest, **_: seen.append(len(clean)))

    count, _, _ = measure_member(RECIPES["fgsm"], None, None, images)
    assert (count, seen) == (250, [2, 10, 50, 250])

    seen.clear()
    monkeypatch.setattr(attack_throughput, "SECONDS_A_MEMBER", 0.0)
    assert measure_member(RECIPES["fgsm"], None, None, images)[0] == 2


def test_a_suite_is_scaled_to_its_own_number_of_images(images, monkeypatch, capsys):
    monkeypatch.setattr(attack_throughput, "measure_member", lambda *given: (10, 6.0, 3.0))
    members = [replace(RECIPES["pgd"], images=SUITE_IMAGES), replace(RECIPES["cw"], images=500)]

    row, cpu = suite_rows(None, None, images, members)

    assert row.value == pytest.approx(0.6 * (SUITE_IMAGES + 500) / 60)
    assert row.bar == 60
    assert cpu.value < row.value
    assert "0.600" in capsys.readouterr().out


def test_figures_of_memory_come_from_their_own_benchmark(monkeypatch):
    def run(command, **_):
        rows = [{"figure": "after 50000 / after 1000", "value": 1.01, "bar": 1.1, "met": True}]
        Path(command[-1]).write_text(json.dumps(rows))

    monkeypatch.setattr(subprocess, "run", run)

    assert [(row.figure, row.met) for row in memory_rows()] == [("memory: after 50000 / after 1000", True)]


def test_noise_is_measured_like_an_attack(images):
    count, seconds, _ = measure_member(recipe_named("noise-pgd"), MeanBoundary(0.5), MeanBoundary(0.5), images)

    assert count == 250
    assert seconds > 0
