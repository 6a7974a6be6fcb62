"""The engine for GPUs. Without one its calls are made on the processor, into memory that every call writes again."""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from detector.batches import best_device, to_tensor
from detector.engines import cuda
from detector.engines.choice import agreement_of, choose_engine, smooth_images
from detector.engines.cuda import CudaEngine, cuda_graph
from detector.engines.masked import MaskedEngine
from detector.errors import EngineError
from detector.images import ImageSpec
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.scoring.classifier import FalseAlarmClassifier, log_odds
from detector.scoring.classifiers import classifier_named
from detector.scoring.compiled_score import folded_score
from tests.detector.engines.networks import convolution, settled

CPU = torch.device("cpu")
SPEC = ImageSpec(8, 9, 3)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is here")


@pytest.fixture
def masked():
    network = settled(build_network("resnet8", 3, 5), to_tensor(smooth_images(SPEC, 12, seed=3), CPU))
    return MaskedEngine(network, CPU)


def as_it_is(module, _pixels):
    return module


def repeated(function, pixels):
    """As a recording does it: what it gives lies in the same memory each time."""
    made = function(pixels)

    def run():
        for old, new in zip(made, function(pixels), strict=True):
            old.copy_(new)
        return made

    return run


def on_the_processor(masked, score=None):
    return CudaEngine(masked.network, SPEC, score, as_it_is, repeated)


def score_of(masked, kinds, name="logistic-0.01"):
    evidence = masked.answer(smooth_images(SPEC, 80, seed=2)).evidence
    features = features_named(kinds, EvidenceShape.of(evidence)).fit(rows_of(evidence))
    classifier = FalseAlarmClassifier(classifier_named(name)).fit(features.of(evidence), np.arange(80) % 2)
    return classifier, features, folded_score(classifier, features)


@pytest.mark.parametrize("count", [0, 1, 5, 8, 33, 70])
def test_batches_of_any_size_are_filled_up_or_cut_to_those_that_were_recorded(masked, count):
    engine, images = on_the_processor(masked), smooth_images(SPEC, count, seed=1)
    engine.answer(smooth_images(SPEC, 32, seed=4))

    found = engine.answer(images).evidence

    assert found.class_logits.shape == (count, 5)
    assert agreement_of(found, masked.answer(images).evidence).exact


def test_an_answer_stays_when_the_next_one_is_asked_for(masked):
    engine, images = on_the_processor(masked), smooth_images(SPEC, 2, seed=1)
    first = engine.answer(images[:1]).evidence

    second = engine.answer(images[1:]).evidence

    assert not np.array_equal(first.class_logits, second.class_logits)
    np.testing.assert_array_equal(first.class_logits, engine.answer(images[:1]).evidence.class_logits)


def test_threads_that_ask_at_once_get_their_own_answers(masked):
    engine, images = on_the_processor(masked), smooth_images(SPEC, 40, seed=1)
    expected = masked.answer(images).evidence.class_logits

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: engine.answer(images[place : place + 1]).evidence, range(40)))

    np.testing.assert_allclose(np.concatenate([one.class_logits for one in found]), expected, atol=1e-5)


@pytest.mark.parametrize("kinds", ["bits", "gates+margins", "bits+gates+inputs+margins"])
@pytest.mark.parametrize("name", ["logistic-0.01", "mlp"])
def test_the_score_of_the_same_call_is_scikit_learns_own(masked, kinds, name):
    classifier, features, score = score_of(masked, kinds, name)

    answers = on_the_processor(masked, score).answer(smooth_images(SPEC, 6, seed=1))

    end = log_odds(1.0)  # of what scikit-learn gives as shares
    expected = classifier.score_samples(features.of(answers.evidence))
    np.testing.assert_allclose(np.clip(answers.scores, -end, end), np.clip(expected, -end, end), atol=1e-6)


def test_a_score_of_likelihoods_is_left_to_others(masked):
    *_, score = score_of(masked, "all")

    assert on_the_processor(masked, score).answer(smooth_images(SPEC, 2)).scores is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a processor")
@pytest.mark.filterwarnings("ignore")  # of torch about its own calls; as errors they would stop the compiler
def test_what_torch_compile_makes_of_a_network_says_the_same(monkeypatch, caplog):
    monkeypatch.setattr(cuda, "SIZES", (3,))
    backbone = nn.Sequential(
        convolution(3, 4), convolution(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )
    masked = MaskedEngine(settled(backbone, to_tensor(smooth_images(SPEC, 12, seed=3), CPU)), CPU)
    *_, score = score_of(masked, "bits+margins")
    images = smooth_images(SPEC, 2, seed=1)

    with caplog.at_level(logging.WARNING):
        answers = CudaEngine(masked.network, SPEC, score, record=repeated).answer(images)

    assert "recorded unfused" not in caplog.text  # or this would only be the network itself
    assert agreement_of(answers.evidence, masked.answer(images).evidence).exact
    np.testing.assert_allclose(answers.scores, score.of(answers.evidence), atol=1e-6)


def test_without_a_compiler_the_networks_own_calls_are_recorded_and_the_log_says_so(masked, caplog):
    def fails(*_):
        raise RuntimeError("Cannot find a working triton installation")

    images = smooth_images(SPEC, 3, seed=1)
    with caplog.at_level(logging.WARNING):
        engine = CudaEngine(masked.network, SPEC, None, fails, repeated)

    assert "recorded unfused" in caplog.text
    assert "triton" in caplog.text
    assert agreement_of(engine.answer(images).evidence, masked.answer(images).evidence).exact


def test_a_network_that_cannot_be_recorded_is_told_in_one_line(masked):
    def fails(*_):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    with pytest.raises(EngineError, match="^expected a network that can be recorded .* permitted when stream"):
        CudaEngine(masked.network, SPEC, None, as_it_is, fails)


def test_without_a_gpu_another_engine_serves_and_the_log_says_why(masked, caplog):
    with caplog.at_level(logging.WARNING):
        chosen = choose_engine(decouple(build_network("resnet8", 3, 5)), SPEC, None, CPU, "cuda")

    assert "cuda" not in chosen.name
    assert chosen.refused["cuda"] == "expected a network on an NVIDIA GPU, got one on cpu"
    assert chosen.refused["cuda"] in caplog.text


def test_on_a_gpu_convolutions_keep_all_bits_of_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert best_device() == torch.device("cuda")
    assert not torch.backends.cudnn.allow_tf32


@needs_gpu
@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("vggnet", 17), ("googlenet", 16), ("resnet18", 45)])
@pytest.mark.parametrize("fuse", [cuda.compiled, as_it_is], ids=["fused", "unfused"])
def test_a_gpu_says_what_the_masked_network_says_on_a_processor(name, size, fuse):
    spec = ImageSpec(size, size, 3)
    network = settled(build_network(name, 3, 10).eval(), to_tensor(smooth_images(spec, 6), CPU), keep=0.6)
    images = smooth_images(spec, 40, seed=1)
    on_gpu = MaskedEngine(network, best_device())

    engine = CudaEngine(on_gpu.network, spec, None, fuse, cuda_graph)

    expected = MaskedEngine(network, CPU).answer(images).evidence
    for count in (1, 8, 40):
        answers = engine.answer(images[:count]).evidence
        assert agreement_of(answers, expected.at(slice(count))).exact


@needs_gpu
def test_on_a_gpu_another_thread_than_the_one_that_loaded_it_may_ask(masked):
    network = MaskedEngine(masked.network, best_device()).network
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(CudaEngine, network, SPEC).result()
    images = smooth_images(SPEC, 3, seed=1)

    assert agreement_of(engine.answer(images).evidence, masked.answer(images).evidence).exact


@needs_gpu
def test_on_a_gpu_every_engine_agrees_with_the_masked_network(masked):
    *_, score = score_of(masked, "bits+gates+margins")

    chosen = choose_engine(masked.network, SPEC, score, best_device())

    assert "cuda" in chosen.milliseconds
    assert not any("expected the answers" in why for why in chosen.refused.values())
