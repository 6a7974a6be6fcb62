import pytest
import torch
from torch import nn

from attacks.evaluation import costs
from attacks.evaluation.costs import cost_rows
from detector.network.folding import fold_normalisation


def test_the_ratio_compares_like_with_like_and_the_served_engine_stands_apart(fitted_bundle, digits, monkeypatch):
    seen = {}

    def noted(calls, _seconds):
        seen["engine"] = calls[0].func.__self__.engine
        return [3.0, 2.0, 1.0]

    monkeypatch.setattr(costs, "_interleaved", noted)

    rows = cost_rows(fitted_bundle, fitted_bundle.network(), digits, 0.01)

    assert seen["engine"] == "masked"
    for row in rows:
        assert (row["detector, ms"], row["backbone, ms"], row["served, ms"]) == (3000, 2000, 1000)
        assert row["ratio"] == 1.5
        assert row["served by"]


def test_the_backbone_is_folded_like_the_network_beside_it(fitted_bundle):
    backbone, images = fitted_bundle.backbone(), torch.rand(4, 1, 8, 8)

    folded = costs._folded(backbone)

    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fold_normalisation(fitted_bundle.network()).modules())
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), backbone(images), atol=1e-4, rtol=1e-4)


def test_the_first_calls_do_not_count(monkeypatch):
    slow, now = iter([100.0] * costs.WARMING), [0.0]

    def call():
        now[0] += next(slow, 1.0)

    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])

    assert costs._interleaved([call], 0.5) == [pytest.approx(1.0)]
