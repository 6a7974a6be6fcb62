import logging
import sys
from dataclasses import replace
from importlib.abc import MetaPathFinder

import numpy as np
import pytest
import torch
from torch import nn

from detector.engines import choice, library
from detector.engines.choice import ENGINES, Choice, agreement_of, choose_engine, smooth_images
from detector.engines.engine import Answers
from detector.errors import EngineError, RequestError
from detector.images import ImageSpec
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.encoder import Evidence
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.paths.gate_inputs import GateInputs
from detector.paths.path_encoding import PathEncoding
from detector.scoring.classifier import default_estimator
from detector.scoring.compiled_score import folded_score
from tests.detector.engines.test_engines import needs_kernel

CPU = torch.device("cpu")
SPEC = ImageSpec(8, 8, 1)


@pytest.fixture
def network():
    return decouple(build_network("resnet8", 1, 4))


def evidence(gate_logits, class_logits=None):
    gate_logits = np.array(gate_logits, np.float32)
    classes = np.zeros((len(gate_logits), 2), np.float32) if class_logits is None else np.array(class_logits, "f4")
    path = PathEncoding(gate_logits > 0, {"a": gate_logits.shape[1]})
    return Evidence(classes, gate_logits, path, GateInputs(np.empty((len(path), 0), np.float32), {}))


class Marked:
    """An engine that says who it is."""

    def __init__(self, name):
        self.name = name

    def answer(self, pixels):
        return Answers(evidence(np.zeros((len(pixels), 1))))


def test_each_engine_can_be_asked_for(network):
    for name in ENGINES:
        chosen = choose_engine(network, SPEC, None, CPU, name)

        assert chosen.name == name or name in chosen.refused


def test_an_unknown_engine_lists_the_known_ones(network):
    with pytest.raises(RequestError, match="^expected an engine of fastest, kernel, .* got 'warp'"):
        choose_engine(network, SPEC, None, CPU, "warp")


def test_the_fastest_was_measured_with_all_that_are_there(network):
    chosen = choose_engine(network, SPEC, None, CPU)

    assert set(chosen.milliseconds) | set(chosen.refused) == set(ENGINES)
    one = {name: times[1] for name, times in chosen.milliseconds.items()}
    assert next(iter(chosen.engines.values())).name == min(one, key=one.__getitem__)


def chosen_by_a_clock(monkeypatch, milliseconds, hopeless):
    """What is chosen of engines that take so long for an image, and how often each was run."""
    now, runs = [0.0], dict.fromkeys(milliseconds, 0)

    class Slow(Marked):
        def answer(self, pixels):
            now[0] += milliseconds[self.name] * len(pixels) / 1000
            runs[self.name] += 1
            return super().answer(pixels)

    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
    engines = {name: Slow(name) for name in milliseconds}
    return choice._fastest(engines, smooth_images(SPEC, 32), {}, hopeless), runs


def test_an_engine_that_is_hopelessly_slow_for_one_image_is_not_waited_for(monkeypatch):
    chosen, runs = chosen_by_a_clock(monkeypatch, {"masked": 100.0, "kernel": 1.0, "onnx": 2.0}, hopeless=4.0)

    assert chosen.name == "kernel"
    assert runs["masked"] == 2
    assert set(chosen.milliseconds["masked"]) == {1}
    assert set(chosen.milliseconds["onnx"]) == {1, 8, 32}


def test_where_batches_may_turn_the_order_round_all_are_timed(monkeypatch):
    chosen, _ = chosen_by_a_clock(monkeypatch, {"masked": 10.0, "kernel": 1.0}, hopeless=np.inf)

    assert set(chosen.milliseconds["masked"]) == {1, 8, 32}


def test_without_the_library_another_engine_serves_and_the_log_says_how_to_get_it(network, monkeypatch, caplog):
    def missing(*_):
        raise EngineError("expected the compiled kernel, got none: `make kernel`")

    monkeypatch.setattr(choice, "KernelEngine", missing)

    with caplog.at_level(logging.WARNING):
        chosen = choose_engine(network, SPEC, None, CPU, "kernel")

    assert "kernel" not in chosen.name
    assert "make kernel" in caplog.text
    assert "make kernel" in chosen.refused["kernel"]


def test_a_library_that_was_not_built_is_named(monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", "detector.engines._not_there")
    library.library.cache_clear()
    try:
        with pytest.raises(EngineError, match="C compiler"):
            library.library()
    finally:
        monkeypatch.undo()
        library.library.cache_clear()


@needs_kernel
def test_a_library_from_other_sources_is_not_called_and_the_message_says_how_to_build_it(network, monkeypatch):
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    library.library.cache_clear()
    try:
        chosen = choose_engine(network, SPEC, None, CPU)
    finally:
        monkeypatch.undo()
        library.library.cache_clear()

    assert "kernel" not in chosen.name
    assert "make kernel" in chosen.refused["kernel"]


def test_without_onnx_runtime_the_message_names_the_extra(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    chosen = choose_engine(network, SPEC, None, CPU, "onnx")

    assert "pathguard[onnx]" in chosen.refused["onnx"]
    assert chosen.name != "onnx"


def test_a_broken_onnx_runtime_is_left_out(network, monkeypatch):
    class NotLoadable(MetaPathFinder):
        def find_spec(self, name, *_):
            if name in ("onnxruntime", "onnx"):
                raise ImportError(f"lib{name}.so: undefined symbol")

    for missing in ("onnxruntime", "onnx"):
        with monkeypatch.context() as patched:
            patched.delitem(sys.modules, missing, raising=False)
            patched.setattr(sys, "meta_path", [NotLoadable(), *sys.meta_path])
            chosen = choose_engine(network, SPEC, None, CPU)
        assert "onnx" not in chosen.name
        assert chosen.refused["onnx"] == f"expected a working ONNX Runtime, got: lib{missing}.so: undefined symbol"


@pytest.mark.parametrize("method", ["__init__", "run"])
def test_an_onnx_runtime_that_fails_on_a_network_is_left_out(network, monkeypatch, method):
    onnxruntime = pytest.importorskip("onnxruntime")

    def fails(*_, **__):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(onnxruntime.InferenceSession, method, fails)

    chosen = choose_engine(network, SPEC, None, CPU)

    assert chosen.refused["onnx"] == "expected a working ONNX Runtime, got: illegal instruction"


def test_a_network_with_an_unknown_layer_is_served_masked():
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip

    chosen = choose_engine(decouple(backbone), SPEC, None, CPU)

    assert chosen.name == "masked"
    assert "Hardswish" in chosen.refused["kernel"]


def replace_kernel(monkeypatch, engine):
    """`engine` in the place of the kernel; it has no steps to time."""
    monkeypatch.setattr(choice, "KernelEngine", engine)
    monkeypatch.setattr(choice, "choose_together", lambda *_: None)
    monkeypatch.setattr(choice, "report", lambda *_: "")


def test_an_engine_with_other_answers_is_left_out(network, monkeypatch):
    class Wrong(Marked):
        def __init__(self, *_):
            super().__init__("kernel")

        def answer(self, pixels):
            right = choice.MaskedEngine(network, CPU).answer(pixels).evidence
            return Answers(replace(right, class_logits=right.class_logits + 1e-2))

    replace_kernel(monkeypatch, Wrong)

    chosen = choose_engine(network, SPEC, None, CPU)

    assert "kernel" not in chosen.name
    assert "logit_error" in chosen.refused["kernel"]


@pytest.mark.parametrize("added", [1e-2, np.nan])
def test_an_engine_that_says_gates_read_something_else_is_left_out(network, monkeypatch, added):
    class Wrong(Marked):
        def __init__(self, *_):
            super().__init__("kernel")

        def answer(self, pixels):
            right = choice.MaskedEngine(network, CPU).answer(pixels).evidence
            return Answers(replace(right, inputs=GateInputs(right.inputs.means + added, right.inputs.reads)))

    replace_kernel(monkeypatch, Wrong)

    chosen = choose_engine(network, SPEC, None, CPU)

    assert "kernel" not in chosen.name
    assert "input_error" in chosen.refused["kernel"]


def test_an_engine_with_other_scores_is_left_out(network, monkeypatch):
    evidence = choice.MaskedEngine(network, CPU).answer(smooth_images(SPEC, 40)).evidence
    features = features_named("bits+margins", EvidenceShape.of(evidence)).fit(rows_of(evidence))
    score = folded_score(default_estimator().fit(features.of(evidence), np.arange(40) % 2), features)

    class Off(Marked):
        def __init__(self, *_):
            super().__init__("kernel")

        def answer(self, pixels):
            right = choice.MaskedEngine(network, CPU).answer(pixels).evidence
            return Answers(right, score.of(right) + 0.1)

    replace_kernel(monkeypatch, Off)

    chosen = choose_engine(network, SPEC, score, CPU)

    assert "kernel" not in chosen.name
    assert chosen.refused["kernel"] == "expected the scores of the classifier, got others by 0.1"
    assert "onnx" in chosen.milliseconds


def test_each_batch_goes_to_the_engine_for_so_many_images():
    chosen = Choice({1: Marked("a"), 8: Marked("a"), 32: Marked("b")})
    seen = []
    for engine in chosen.engines.values():
        engine.answer = lambda pixels, name=engine.name: seen.append((name, len(pixels)))

    for count in (0, 1, 31, 32, 40):
        chosen.answer(smooth_images(SPEC, count))

    assert seen == [("a", 0), ("a", 1), ("a", 31), ("b", 32), ("b", 40)]
    assert chosen.name == "a, from 32 images b"


def test_a_bit_that_differs_is_wrong_unless_its_logit_or_one_before_it_is_nearly_zero():
    expected = evidence([[1.0, 5e-5, 1.0], [1.0, 1.0, 5e-5], [1.0, 1.0, 1.0]])

    assert agreement_of(expected, expected).exact
    found = agreement_of(evidence([[1.0, -1e-5, -1.0], [1.0, 1.0, -1e-5], [1.0, 1.0, 1.0]]), expected)
    assert (found.unsure_bits, found.wrong_bits) == (3, 0)
    found = agreement_of(evidence([[-1.0, 5e-5, 1.0], [1.0, 1.0, -1e-5], [1.0, -1.0, 1.0]]), expected)
    assert (found.unsure_bits, found.wrong_bits) == (1, 2)


def test_class_logits_count_only_where_the_path_is_the_same():
    expected = evidence([[1.0], [5e-5]], [[0.5, 0.0], [0.5, 0.0]])

    found = agreement_of(evidence([[1.0], [-5e-5]], [[0.5, 2e-5], [0.0, 3.0]]), expected)

    assert found.logit_error == pytest.approx(2e-5)
    assert found.labels == 0.5
    assert not agreement_of(evidence([[1.0], [5e-5]], [[0.5, 2e-3], [0.5, 0.0]]), expected).exact
