import pytest

from benchmarks.gpu import FUSED, MASKED, SERVED, rows
from benchmarks.plain import COMPILED, EAGER


def test_without_a_gpu_every_row_is_there_and_has_no_value():
    found = list(rows("resnet20", None, (1, 32)))

    assert len(found) == 14
    assert all(row.value is None for row in found)


def test_ours_is_held_against_the_faster_of_the_plain_ones():
    times = {SERVED: 0.003, FUSED: 0.004, MASKED: 0.012, EAGER: 0.008, COMPILED: 0.006}

    found = {row.figure: row.value for row in rows("resnet20", {"1": times}, (1,))}

    assert found["resnet20, GPU, batch 1: label + verdict / plain, best engine of each"] == pytest.approx(0.5)
    assert found["resnet20, GPU, batch 1: the same, both in torch eager"] == pytest.approx(1.5)
    assert found["resnet20, GPU, batch 1: torch eager, ms"] == pytest.approx(8)


def test_an_engine_that_is_not_there_has_no_time():
    times = {SERVED: 0.003, MASKED: 0.012, EAGER: 0.008, COMPILED: 0.006}

    found = {row.figure: row.value for row in rows("resnet20", {"1": times}, (1,))}

    assert found[f"resnet20, GPU, batch 1: {FUSED}, ms"] is None
