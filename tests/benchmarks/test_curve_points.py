from dataclasses import replace

import pytest

from benchmarks import curve_points
from benchmarks.curve_picture import draw_curves
from benchmarks.curve_points import OURS, PLAIN, STATIC, Curves, Point, measure, table_of
from benchmarks.curves import make
from detector.network.schedule import Schedule
from detector.network.training import accuracy, measure_gates

POINTS = (
    Point(PLAIN, 1.0, 91.0, 100.0, 1.2),
    Point(OURS, 0.7, 89.0, 68.0, 0.9, equal=0.5),
    Point(OURS, 0.5, 80.0, 40.0, 0.6),
    Point(STATIC, 0.5, 89.5, 51.0, 0.75),
)


def test_every_network_becomes_a_point_beside_the_plain_one(decoupled_bundle, digits, tmp_path, monkeypatch):
    small = replace(digits, held_out=digits.held_out.subset(slice(0, 60)))
    monkeypatch.setattr(curve_points, "load_splits", lambda *_: small)
    for name in ("keep0.5", "pruned0.5"):
        make(name, decoupled_bundle, digits, tmp_path, Schedule(epochs=1, batch=200, learning_rate=0.01))

    found = measure(decoupled_bundle, tmp_path, None, repetitions=2)

    assert [(point.kind, point.keep) for point in found.points] == [(PLAIN, 1), (OURS, 0.7), (OURS, 0.5), (STATIC, 0.5)]
    plain, ours, _, static = found.points
    assert plain.accuracy == 100 * accuracy(decoupled_bundle.backbone(), small.held_out)
    assert ours.accuracy == pytest.approx(100 * measure_gates(decoupled_bundle.network(), small.held_out).accuracy)
    assert 45 < static.macs < 60
    assert found.labels == 100
    assert found.wrong_bits == 0


def test_a_decoupled_network_is_held_against_the_pruned_one_that_is_as_accurate():
    curves = Curves(POINTS, 100.0, 0, 0)

    assert curves.ours_over_static(0.7) == pytest.approx(0.9 / 0.75)
    assert curves.ours_over_static(0.5) is None


def test_the_table_names_every_point():
    assert [row["as accurate when pruned to"] for row in table_of(Curves(POINTS, 100.0, 0, 0))] == [
        None,
        0.5,
        None,
        None,
    ]


def test_the_picture_is_drawn(tmp_path):
    draw_curves(tmp_path / "new" / "curves.png", Curves(POINTS, 100.0, 0, 0), "a bundle")

    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
