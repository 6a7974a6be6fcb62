import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks.recipes import RECIPES
from benchmarks import attacks_vs_peers
from benchmarks.attack_peers import ADV_LIB, FOOLBOX, Peer, peers_of
from benchmarks.attacks_vs_peers import (
    COMPARED,
    QUICK,
    Bench,
    Comparison,
    Judged,
    Outcome,
    as_markdown,
    best_rows,
    compared,
)
from detector.datasets import ImageSet
from detector.images import ImageSpec
from tests.oracles import MeanBoundary


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(attacks_vs_peers, "library_version", lambda library: "1")
    pixels = np.full((70, 6, 6, 1), 120, np.uint8)
    images = ImageSet(
        "grey", np.zeros(70, np.int64), np.arange(70), ("dark", "light"), ImageSpec(6, 6, 1), "grey",
        lambda ids: pixels[ids],
    )  # fmt: skip
    return Bench(MeanBoundary(0.5), images, tmp_path, "weights")


def moved_by(levels, calls=None):
    def attack(network, images, labels):
        if calls is not None:
            calls.append(len(images))
        return images + levels / 255

    return Peer(FOOLBOX, f"Moves({levels})", attack)


def test_every_compared_recipe_has_a_peer_at_its_own_budget_and_steps():
    for name in (*COMPARED, *QUICK):
        assert peers_of(RECIPES[name])
    (theirs,) = peers_of(RECIPES["bim-1"])
    steps, step = RECIPES["bim-1"].settings["steps"], float(RECIPES["bim-1"].settings["step"]) / 255
    assert theirs.name == f"LinfBasicIterativeAttack(steps {steps}, abs_stepsize {step:.4g}, random_start False)"
    assert {peer.library for peer in peers_of(RECIPES["cw"])} == {FOOLBOX, ADV_LIB}
    assert peers_of(replace(RECIPES["fgsm"], name="unheard-of")) == []


def test_both_sides_are_judged_before_and_after_rounding(bench):
    outcome = bench.outcome(RECIPES["fgsm"], moved_by(7.8))

    # 120 + 7.8 levels lie above the boundary of 127.5, and so do 128; 7.8 levels become 8.
    assert outcome.before.success == outcome.after.success == 100
    assert outcome.before.median * 255 == pytest.approx(7.8, rel=1e-4)
    assert outcome.after.median * 255 == pytest.approx(8, rel=1e-4)
    assert bench.outcome(RECIPES["fgsm"], moved_by(7.3)).after.success == 0


def test_smallest_changes_are_made_longer_until_they_survive_rounding(bench):
    outcome = bench.outcome(RECIPES["deepfool"], moved_by(7.4))

    assert (outcome.before.success, outcome.after.success, outcome.lengthened.success) == (0, 0, 100)
    assert outcome.lengthened.median * 255 == pytest.approx(8 * 6, rel=1e-4)  # L2 of 36 values
    assert outcome.barred(RECIPES["deepfool"]) is outcome.lengthened
    assert outcome.barred(RECIPES["fgsm"]) is outcome.after


def test_finished_batches_are_not_done_again_and_others_are(bench):
    calls = []
    first = bench.outcome(RECIPES["fgsm"], moved_by(8, calls))
    again = bench.outcome(RECIPES["fgsm"], moved_by(8, calls))
    assert calls == [50, 20]
    assert np.array_equal(first.after.distance, again.after.distance)

    sorted(bench.work.glob("*-0050-*"))[0].unlink()
    bench.outcome(RECIPES["fgsm"], moved_by(8, calls))
    assert calls == [50, 20, 20]

    bench.outcome(RECIPES["fgsm"], replace(moved_by(8, calls), name="Moves(8, otherwise)"))
    replace(bench, weights="others").outcome(RECIPES["fgsm"], moved_by(8, calls))
    assert calls == [50, 20, 20, 50, 20, 50, 20]


def test_what_is_finished_is_compared_on_the_images_that_both_sides_have_done(bench, monkeypatch):
    recipe, two = RECIPES["fgsm"], [moved_by(8), replace(moved_by(7), name="Moves(7)")]
    monkeypatch.setattr(attacks_vs_peers, "peers_of", lambda recipe: two)
    assert list(bench.compare(recipe, finished=True)) == []

    bench.outcome(recipe, None)
    replace(bench, images=bench.images.first(50)).outcome(recipe, two[0])
    (one,) = bench.compare(recipe, finished=True)

    assert one.peer is two[0]
    assert len(one.ours.after.fooled) == len(one.theirs.after.fooled) == 50


def test_ours_runs_as_its_recipe_says(bench):
    outcome = bench.outcome(RECIPES["fgsm"], None)

    assert outcome.after.success == 100
    assert outcome.after.median * 255 == pytest.approx(8, rel=1e-4)
    kept = json.loads(next(bench.work.glob("fgsm-pathguard-*.json")).read_text())
    assert kept["called"]["norm"] == "linf"


def comparison(recipe, ours, theirs):
    def outcome(success, distance):
        judged = Judged(np.arange(100) < success, np.full(100, distance))
        return Outcome(judged, judged, judged, 1.0)

    return Comparison(recipe, Peer(FOOLBOX, "Other(steps 3)", None), outcome(*ours), outcome(*theirs))


@pytest.mark.parametrize(
    ("ours", "theirs", "met"),
    [
        ((90, 1.0), (92, 1.0), [True, True]),
        ((90, 1.0), (93, 1.0), [False, True]),
        ((90, 1.06), (90, 1.0), [True, False]),
        ((100, 0.5), (50, 1.0), [True, True]),
        ((0, 1.0), (50, 1.0), [False, None]),
    ],
)
def test_the_bar_is_two_points_of_success_and_five_percent_of_distance(ours, theirs, met):
    assert [row.met for row in comparison(RECIPES["cw"], ours, theirs).rows()] == met


def test_the_best_of_ours_is_held_against_the_best_of_theirs():
    rows = best_rows([
        comparison(RECIPES["cw"], (90, 1.0), (80, 3.0)), comparison(RECIPES["ddn"], (90, 4.0), (70, 2.0)),
        comparison(RECIPES["ead"], (90, 0.3), (70, 0.1)), comparison(RECIPES["fmn-l1"], (90, 0.2), (70, 0.4)),
    ])  # fmt: skip

    assert [row.value for row in rows] == [0.5, 2.0]
    assert best_rows([comparison(RECIPES["pgd"], (90, 1.0), (80, 3.0))]) == []


def test_the_table_of_the_docs_has_a_line_for_each_attack():
    lines = as_markdown([
        comparison(RECIPES["pgd"], (90, 8 / 255), (80, 8 / 255)), comparison(RECIPES["pgd"], (90, 1.0), (70, 1.0)),
        comparison(RECIPES["cw"], (90, 0.1), (0, 0.1)),
    ]).splitlines()  # fmt: skip

    assert len(lines) == 2 + 3 + 2
    assert lines[2].startswith("| **ours** `pgd` | 10 | 100 | L-inf / 255 | 90.0 %, 8.000 |")
    assert lines[5].startswith("| **ours** `cw` | 60 x 2 | 100 |")
    assert lines[6].startswith("| foolbox `Other` | 3 | 100 | L2 | 0.0 %, - |")
    assert {line.count("|") for line in lines} == {9}


def test_an_attack_that_takes_hours_has_as_few_steps_on_both_sides():
    recipe = compared("hopskipjump")
    (theirs,) = peers_of(recipe)

    assert recipe.settings["steps"] == 3 < RECIPES["hopskipjump"].settings["steps"]
    assert theirs.name == "HopSkipJumpAttack(steps 3)"
    assert compared("fgsm") == RECIPES["fgsm"]


def test_a_black_image_where_foolbox_gave_up_counts_as_the_clean_one():
    pytest.importorskip("foolbox")
    images = torch.full((2, 1, 6, 6), 0.3)
    images[1] = 0.9
    network = MeanBoundary(0.5, sharpness=1e-3).eval()  # too flat for so few steps
    (theirs,) = (peer for peer in peers_of(replace(RECIPES["cw"], settings={"steps": 1, "searches": 1}))
                 if peer.library == FOOLBOX)  # fmt: skip

    made = theirs.attack(network, images, torch.tensor([0, 1]))

    assert torch.equal(made, images)
