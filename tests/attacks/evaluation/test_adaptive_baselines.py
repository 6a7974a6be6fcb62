from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attacks.evaluation.adaptive_baselines import adaptive_baselines_sheet
from attacks.evaluation.protocol import Trial
from detector.baselines.torch_score import TorchScore, Trace
from detector.datasets import ImageSet
from detector.images import ImageSpec
from detector.network.gates import GateReading
from detector.scoring.thresholds import Calibration
from tests.oracles import MeanBoundary, halves_watched

SIZE, GREY, BUDGET = 8, 100, 32
RECIPES = {"adaptive-joint": {}, "adaptive-selective": {}, "adaptive-square": {"queries": 300}}


class Halves(nn.Module):
    """Class 1 where the mean pixel exceeds 110; the gates are the means of left and right half."""

    def __init__(self):
        super().__init__()
        self.layers = {"halves": 2}
        self.boundary = MeanBoundary(110 / 255, sharpness=100.0)

    def forward(self, images):
        return self.boundary(images)

    def trace(self, images):
        halves = torch.stack([part.mean(dim=(1, 2, 3)) for part in images.chunk(2, dim=3)], dim=1)
        return self(images), {"halves": GateReading(20 * halves, halves)}


class Watching:
    """Suspicious where the left half, or the whole image, is bright."""

    def __init__(self, network, name, differentiable, images=None):
        self.name, self.images, self.sees, self._network = name, images, name, network
        # Twice the same, in logs: a score whose gradient needs the score itself, as max-softmax's does.
        score = TorchScore(lambda rows: rows.double().repeat(1, 2).logsumexp(dim=1), self.trace)
        self.score = score if differentiable else lambda rows: score(rows)

    def trace(self, images):
        logits, readings = self._network.trace(images)
        gates = readings["halves"].logits
        rows = images[..., : SIZE // 2 if "left" in self.name else SIZE].mean(dim=(1, 2, 3))[:, None]
        return Trace(logits, gates, rows)

    def observe(self, images):
        with torch.no_grad():
            return self.trace(images).rows.numpy()

    def fit(self, clean, attacked):
        return self.score


def grey(count):
    """Images of nearly one grey, of class 0."""
    chooser = np.random.default_rng(0)
    pixels = chooser.integers(GREY - 3, GREY + 1, (count, 1, 1, 1)).repeat(SIZE, 1).repeat(SIZE, 2).astype(np.uint8)
    return ImageSet("grey", np.zeros(count, np.int64), np.arange(count), ("dark", "bright"), ImageSpec(SIZE, SIZE, 1),
                    "grey", lambda ids: pixels[ids])  # fmt: skip


@pytest.fixture
def sheet():
    network = Halves().eval()
    clean, validation = grey(40), grey(60)
    others = [
        Watching(network, "left half", True), Watching(network, "whole", True),
        Watching(network, "left half, imitated", False, 60), Watching(network, "whole, imitated", False, 60),
        Watching(network, "few calibrated", True, 5),
    ]  # fmt: skip

    def calibrated(method):
        rows = method.observe(torch.from_numpy(clean.pixels(slice(method.images))).permute(0, 3, 1, 2) / 255)
        return method.score, Calibration(method.score(rows))

    def attack(budget):
        trial = Trial(6, 30, 2, RECIPES, (budget,))
        protocol = SimpleNamespace(adaptive_baselines=trial, adaptive_costly=trial, costly_images=60)
        splits = SimpleNamespace(test=clean, validation=validation)
        guides = torch.full((4, 1, SIZE, SIZE), GREY / 255)
        ours = halves_watched(network, (GREY + 2) / 255, guides)
        judge = SimpleNamespace(calibrated=calibrated)
        found = adaptive_baselines_sheet(network, splits, ours, others, judge, protocol, 0.05, 0.8, 0)
        return list(found.rows), found

    return attack


def test_a_baseline_is_evaded_where_there_is_a_way_round_it_and_kept_where_there_is_none(sheet):
    rows, found = sheet(BUDGET)  # the right half alone moves the mean by 16 levels: over the boundary, left as it was

    robust = {row["detector"]: row["robust accuracy"] for row in rows}
    assert robust == pytest.approx(
        {"paths": 0, "left half": 0, "whole": 0.8, "left half, imitated": 0, "whole, imitated": 0.8}
    )
    assert {row["detector"]: row["own gradient"] for row in rows if row["detector"] != "paths"} == {
        "left half": True, "whole": True, "left half, imitated": False, "whole, imitated": False,
    }  # fmt: skip
    for row in rows:
        assert list(row) == [
            "detector", "images", "attackers", "budget / 255", "robust accuracy", "low", "high", "detector off",
            "points added", "own gradient",
        ]  # fmt: skip
        assert None not in row.values()
        assert (row["images"], row["detector off"]) == (6, 0)
        assert row["points added"] == pytest.approx(100 * row["robust accuracy"])
        assert "joint (steps 30, restarts 2, weights 5); selective" in row["attackers"]
        assert "square (queries 300)" in row["attackers"]
    assert [row["detector"] for row in rows].count("paths") == 2
    assert found.name == "adaptive_baselines"
    assert "5% of clean images" in found.title


def test_a_way_round_a_baseline_that_is_longer_than_the_budget_is_not_found(sheet):
    rows, _ = sheet(16)  # both halves together would do, the right one alone moves the mean by 8 levels of 10 to 13

    assert [row["robust accuracy"] for row in rows] == pytest.approx([0.8] * len(rows))
    assert {row["detector off"] for row in rows} == {0}


def test_a_baseline_without_a_threshold_for_the_rate_is_left_out_and_said_so(sheet, caplog):
    rows, _ = sheet(18)

    assert "few calibrated" not in {row["detector"] for row in rows}
    assert "few calibrated is not attacked: expected a false-alarm rate" in caplog.text
