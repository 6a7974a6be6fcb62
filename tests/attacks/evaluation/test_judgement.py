from dataclasses import replace

import numpy as np
import pytest

from attacks.evaluation.judgement import Judge, Served, _spread_over_families
from attacks.evaluation.material import CALIBRATION, CLEAN, FITTING, TEST, Material, SetKey
from attacks.evaluation.paths import SEES
from attacks.evaluation.protocol import PROTOCOLS
from detector.baselines.baseline import Observed, fitted_on
from detector.errors import DataError
from detector.scoring.thresholds import Calibration

PROTOCOL = replace(PROTOCOLS["quick"], bootstrap=20, matrix=3)


class FirstColumns:
    """Scores by a regression on all columns."""

    name, sees, images = "columns", SEES, None

    def observe(self, images):
        raise NotImplementedError

    def fit(self, clean, attacked):
        return fitted_on(lambda rows: rows, clean, attacked)


def observed(values, ids=None):
    rows = np.atleast_2d(np.asarray(values, np.float32))
    return Observed(rows, np.arange(len(rows)) if ids is None else np.asarray(ids))


def column(values, ids=None):
    return observed(np.asarray(values, np.float32)[:, None], ids)


def material_of(sets, norms, right=None, fooled=None, attacks=None):
    """Material of one column, that is the score itself; all labels 0 and right unless told; 10 images attacked."""
    keys = {SetKey(*key): part for key, part in sets.items()}
    right = {SetKey(*key): np.asarray(values) for key, values in (right or {}).items()}
    return Material(
        {SEES: keys},
        {key: right.get(key, np.ones(len(part), bool)) for key, part in keys.items()},
        {key: np.zeros(len(part), np.int64) for key, part in keys.items()},
        list(norms) if attacks is None else attacks, norms, dict.fromkeys(norms, 10), fooled or dict.fromkeys(norms, 4),
        1.0,
    )  # fmt: skip


def judge(sets, norms, recipes, **more):
    served = Served(lambda rows: rows[:, 0].astype(float), Calibration(np.arange(1000) / 1000), recipes, "test")
    return Judge(material_of(sets, norms, **more), PROTOCOL, served, 0)


CLEAN_SETS = {
    (FITTING, CLEAN): column(np.linspace(0, 1, 50)),
    (CALIBRATION, CLEAN): column(np.arange(1000) / 1000),
    (TEST, CLEAN): column([0.1, 0.2, 0.5, 0.97]),
}


def test_the_row_of_an_attack_computed_by_hand():
    sets = {**CLEAN_SETS, (FITTING, "pgd"): column([2.0]), (TEST, "pgd"): column([0.96, 0.3, 2.0, 0.9995]),
            (TEST, "noise-pgd"): column([0.3, 0.4])}  # fmt: skip

    sheet = judge(sets, {"pgd": "linf"}, ["pgd"]).attack_sheet()

    (row,) = sheet.rows
    # beside 0.1, 0.2, 0.5, 0.97: 0.96 beats 3, 0.3 beats 2, 2.0 and 0.9995 beat 4
    assert row["AUROC"] == pytest.approx((3 + 2 + 4 + 4) / 16)
    assert row["low"] <= row["AUROC"] <= row["high"]
    assert row["TPR at 5%"] == 0.75
    assert row["TPR at 1%"] == 0.5
    assert row["against noise"] == pytest.approx((2 + 0.5 + 2 + 2) / 8)
    assert (row["images"], row["given"], row["fooled"], row["fitted on"]) == (4, 10, 4, True)


def test_successes_and_failures_count_by_their_true_share_where_few_of_each_were_looked_at():
    sets = {**CLEAN_SETS, (FITTING, "pgd"): column([2.0]), (TEST, "pgd"): column([2.0, 2.0]),
            (TEST, "pgd failed"): column([0.3, 0.3])}  # fmt: skip

    (row,) = judge(sets, {"pgd": "linf"}, ["pgd"], fooled={"pgd": 9}).other_rows_sheet().rows

    assert (row["images"], row["given"], row["failed"]) == (2, 10, 1)
    assert row["AUROC of failed"] == 0.5
    assert row["AUROC of all"] == pytest.approx(0.9 * 1 + 0.1 * 0.5)


def test_an_image_counts_as_detected_only_where_all_attacks_on_it_are_flagged():
    sets = {
        **CLEAN_SETS, (FITTING, "pgd"): column([2.0]),
        (TEST, "pgd"): column([2.0, 2.0, 0.1], ids=[1, 2, 3]), (TEST, "cw"): column([2.0, 0.2], ids=[1, 2]),
    }  # fmt: skip

    at_five, _ = judge(sets, {"pgd": "linf", "cw": "l2"}, ["pgd"]).worst_case_sheet().rows

    assert (at_five["images"], at_five["all flagged"]) == (3, pytest.approx(1 / 3))


def test_false_alarms_stand_in_rows_of_their_own():
    sets = {**CLEAN_SETS, (FITTING, "pgd"): column([2.0]), (TEST, "pgd"): column([2.0, 2.0]),
            (TEST, "noise-pgd"): column([0.99, 0.1]), ("foreign", "digits"): column([2.0, 0.1, 0.1, 0.1]),
            (TEST, "fog-1"): column([0.96, 2.0, 0.1, 0.1]), (TEST, "fog-3"): column([2.0, 2.0, 0.1, 2.0])}  # fmt: skip
    right = {(TEST, CLEAN): [True, True, True, False], (TEST, "noise-pgd"): [True, False],
             (TEST, "fog-1"): [False, True, True, True]}  # fmt: skip
    found = judge(sets, {"pgd": "linf"}, ["pgd"], right=right)

    shares = {row["images"]: (row["number"], row["flagged at 5%"]) for row in found.false_alarm_sheet().rows}
    fog, mean = found.corruption_sheet().rows

    assert shares == {
        "clean": (4, 0.25), "clean, label right": (3, 0.0), "clean, label wrong": (1, 1.0),
        "noise as long as pgd, label right": (1, 1.0), "foreign: digits": (4, 0.25),
    }  # fmt: skip
    assert (fog["severity 1"], fog["severity 3"]) == (0.5, 0.75)
    assert fog["severity 1, label right"] == pytest.approx(1 / 3)
    assert mean["severity 3"] == 0.75


def clouds():
    """Three attacks: two of one family along the first column, one of another family and norm along the second."""
    chooser = np.random.default_rng(0)

    def cloud(first, second, count=300):
        return observed(np.add(chooser.normal(size=(count, 2)), [first, second]))

    sets = {(FITTING, CLEAN): cloud(0, 0), (CALIBRATION, CLEAN): cloud(0, 0), (TEST, CLEAN): cloud(0, 0)}
    for split in (FITTING, TEST):
        sets |= {(split, "pgd"): cloud(4, 0), (split, "pgd-2"): cloud(3, 0), (split, "cw"): cloud(0, 3)}
    return sets, {"pgd": "linf", "pgd-2": "linf", "cw": "l2"}


def test_a_family_and_a_norm_left_out_are_not_fitted_on():
    sets, norms = clouds()
    found = judge(sets, norms, ["pgd", "pgd-2", "cw"])

    unseen = found.unseen_sheet([FirstColumns()])
    known = found.method_sheet("known", "", [FirstColumns()]).rows[0]
    worst = {row["left out"]: row for row in found.worst_unseen(unseen, [FirstColumns()]).rows}

    of = {(row["left out"], row["attack"]): row["AUROC"] for row in unseen.rows}
    assert set(of) == {
        ("attack pgd", "pgd"), ("attack pgd", "pgd-2"), ("attack cw", "cw"),
        ("norm linf", "pgd"), ("norm linf", "pgd-2"), ("norm l2", "cw"),
    }  # fmt: skip
    assert all(0.3 < value < 0.8 for value in of.values())
    assert min(known["pgd"], known["pgd-2"], known["cw"]) > 0.85
    assert worst["attack"]["worst AUROC"] == min(value for (out, _), value in of.items() if out.startswith("attack"))


def test_a_norm_is_left_out_with_attacks_that_never_succeeded_on_the_test_split():
    sets, norms = clouds()
    sets[FITTING, "fgsm"] = sets[FITTING, "pgd"]  # would give PGD away

    unseen = judge(
        sets, {**norms, "fgsm": "linf"}, ["pgd", "pgd-2", "cw", "fgsm"], attacks=list(norms)
    ).unseen_sheet([FirstColumns()])  # fmt: skip

    of_norm = {row["attack"]: row["AUROC"] for row in unseen.rows if row["left out"] == "norm linf"}
    assert set(of_norm) == {"pgd", "pgd-2"}
    assert max(of_norm.values()) < 0.8


def test_variants_of_an_attack_are_left_out_with_it():
    sets, norms = clouds()
    for split in (FITTING, TEST):
        sets[split, "bim"] = sets[split, "pgd"]

    unseen = judge(sets, {**norms, "bim": "linf"}, ["pgd", "pgd-2", "cw", "bim"]).unseen_sheet([FirstColumns()])

    assert all(row["AUROC"] < 0.8 for row in unseen.rows if row["left out"] == "attack pgd")


class OnFew(FirstColumns):
    """The same, of 100 images of a kind."""

    name, images = "columns of few", 100


def test_a_table_of_detectors_says_how_many_images_each_row_rests_on():
    sets, norms = clouds()
    found = judge(sets, norms, ["pgd", "cw"])
    found._protocol = replace(PROTOCOL, costly_images=50)

    every, few = found.method_sheet("baselines", "", [FirstColumns(), OnFew()]).rows

    assert (every["images fitted on"], every["images judged by"]) == (900, 1200)
    assert (few["images fitted on"], few["images judged by"]) == (150, 200)


class Unfit(FirstColumns):
    """Wants attacked images of which there are none."""

    name = "unfit"

    def fit(self, clean, attacked):
        return fitted_on(lambda rows: rows, clean, {name: part.at(slice(0)) for name, part in attacked.items()})


def test_a_detector_that_too_few_attacks_succeeded_for_has_an_empty_row_and_stops_nothing(caplog):
    sets, norms = clouds()
    found = judge(sets, norms, ["pgd", "cw"])

    unfit, fit = found.method_sheet("baselines", "", [Unfit(), FirstColumns()]).rows

    assert unfit["pgd"] is unfit["mean"] is unfit["worst"] is None
    assert fit["worst"] > 0.5
    assert "unfit fitted on pgd, cw is left out: expected at least one attack" in caplog.text
    assert found.unseen_sheet([Unfit()]).rows == []
    assert np.isnan(found.matrix(Unfit()).auroc).all()


def test_few_shots_without_a_success_have_no_row():
    sets, norms = clouds()
    for name in norms:
        sets[FITTING, name] = Observed(sets[FITTING, name].rows, sets[FITTING, name].ids + 5)

    found = judge(sets, norms, ["pgd", "cw"]).shots_sheet(FirstColumns())

    assert [row["images of each class"] for row in found.rows] == ["10", "all"]


def test_the_interval_of_false_alarms_is_that_of_the_bundles_own_calibration():
    sets = {**CLEAN_SETS, (FITTING, "pgd"): column([2.0]), (TEST, "pgd"): column([2.0, 2.0])}
    found = judge(sets, {"pgd": "linf"}, ["pgd"])
    few = Calibration(np.arange(1000) / 1000, np.repeat([0, 1], [20, 980]))  # all test images are of class 0
    found._served = replace(found._served, calibration=few)

    row = found.false_alarm_sheet().rows[0]

    low, high = few.of_class(0).expected_range(0.05, 4)
    assert row["expected at 5%"] == f"{low:.4f}-{high:.4f}"
    assert row["expected at 1%"] is None  # 20 images of a class set no such threshold


def test_the_matrix_is_high_where_attacks_are_alike():
    sets, norms = clouds()

    matrix = judge(sets, norms, ["pgd", "pgd-2", "cw"]).matrix(FirstColumns())

    assert matrix.fitted_on == ["pgd", "pgd-2", "cw"]
    assert matrix.auroc[0, 1] > 0.9
    assert matrix.auroc[0, 2] < 0.7


def test_few_shots_are_few_clean_images_of_each_class_and_what_was_made_of_them():
    sets, norms = clouds()
    found = judge(sets, norms, ["pgd", "cw"])

    clean, attacked = found._few(sets[FITTING, CLEAN], {"pgd": sets[FITTING, "pgd"]}, 5)

    assert clean.ids.tolist() == attacked["pgd"].ids.tolist() == [0, 1, 2, 3, 4]
    assert [row["images of each class"] for row in found.shots_sheet(FirstColumns()).rows] == ["1", "10", "all"]


def test_fitting_sets_are_told_apart_by_what_they_leave_unseen():
    sets, norms = clouds()

    found = judge(sets, norms, ["pgd", "cw"])

    strong, every = found.fitting_set_sheet(FirstColumns(), {"strong": ["pgd"], "all": ["pgd", "cw"]}).rows

    assert strong["mean of other families"] < 0.7 < strong["mean of its attacks"]
    assert every["worst of other families"] is None
    assert every["worst of all"] > 0.85


def test_without_attacks_there_is_nothing_to_judge():
    with pytest.raises(DataError, match="expected at least one attack that fooled the network on the test split"):
        judge(CLEAN_SETS, {}, ["pgd"])
    with pytest.raises(DataError, match="expected stored attacks of cw to fit on, got none"):
        judge({**CLEAN_SETS, (TEST, "pgd"): column([2.0])}, {"pgd": "linf"}, ["cw"])


def test_a_matrix_takes_one_of_each_family_first():
    names = ["fgsm-1", "fgsm", "pgd-1", "pgd", "cw"]

    assert _spread_over_families(names, 3) == ["fgsm-1", "pgd-1", "cw"]
    assert _spread_over_families(names, 4) == ["fgsm-1", "fgsm", "pgd-1", "cw"]
