"""Every engine says what the masked network says."""

from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from detector.batches import to_tensor
from detector.engines import program
from detector.engines.choice import agreement_of, smooth_images
from detector.engines.kernel import KernelEngine
from detector.engines.kernel_score import KernelScore
from detector.engines.library import library
from detector.engines.masked import MaskedEngine
from detector.engines.onnx import OnnxEngine
from detector.engines.program import program_of
from detector.engines.sliced import SlicedEngine
from detector.errors import EngineError, ImageError
from detector.images import ImageSpec
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.scoring.classifier import FalseAlarmClassifier, default_estimator, log_odds
from detector.scoring.compiled_score import folded_score
from detector.scoring.dropout_network import DropoutNetwork
from tests.detector.engines.networks import backbones, convolution, settled

CPU = torch.device("cpu")


@contextmanager
def narrowed_to(instructions):
    """Within it, the kernel uses these instructions."""
    if library().pathguard_use(instructions) is None:
        pytest.skip(f"this processor has no {instructions.decode()}")
    try:
        yield
    finally:
        library().pathguard_use(None)


def has_kernel():
    try:
        library()
    except EngineError:
        return False
    return True


needs_kernel = pytest.mark.skipif(not has_kernel(), reason="the compiled kernel was not built")
every_engine = pytest.mark.parametrize(
    "engine",
    [
        pytest.param(KernelEngine, marks=needs_kernel),
        OnnxEngine,
        SlicedEngine,
        pytest.param(partial(SlicedEngine, compiled=False), id="SlicedEngine-in-NumPy"),
    ],
)


def tensor(spec, count=12, seed=3):
    return to_tensor(smooth_images(spec, count, seed), CPU)


def agreement(engine, network, spec, images):
    return agreement_of(
        engine(program_of(network, spec)).answer(images).evidence, MaskedEngine(network, CPU).answer(images).evidence
    )


@every_engine
@settings(max_examples=40)
@given(data=st.data(), height=st.integers(9, 21), width=st.integers(9, 35), channels=st.sampled_from((1, 3)))
def test_says_what_the_masked_network_says_on_any_small_network(engine, data, height, width, channels):
    spec = ImageSpec(height, width, channels)
    network = settled(data.draw(backbones(channels)), tensor(spec))

    found = agreement(engine, network, spec, smooth_images(spec, 5, seed=1))

    assert found.exact, found
    assert found.labels == 1


@every_engine
@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("vggnet", 17), ("googlenet", 16), ("resnet18", 45)])
def test_says_what_the_masked_network_says_on_the_published_networks(engine, name, size):
    spec = ImageSpec(size, size, 3)
    network = settled(build_network(name, 3, 10).eval(), tensor(spec, 6), keep=0.6)
    images = smooth_images(spec, 3, seed=1)

    found = agreement(engine, network, spec, images)

    assert found.exact, found
    assert 0.3 < engine(program_of(network, spec)).answer(images).evidence.path.bits.mean() < 0.9


@needs_kernel
@pytest.mark.parametrize("instructions", [b"avx2", b"any"])
def test_the_kernel_says_the_same_with_narrower_vectors(instructions):
    spec = ImageSpec(13, 19, 3)
    network = settled(build_network("resnet8", 3, 10), tensor(spec))
    with narrowed_to(instructions):
        found = agreement(KernelEngine, network, spec, smooth_images(spec, 3, seed=1))

    assert found.exact, found


@needs_kernel
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_kernel_says_the_same_with_more_threads(count):
    spec = ImageSpec(9, 11, 1)
    program = program_of(settled(build_network("resnet8", 1, 4), tensor(spec)), spec)
    images = smooth_images(spec, count, seed=1)

    one, three = (KernelEngine(program, threads=threads).answer(images).evidence for threads in (1, 3))

    np.testing.assert_array_equal(one.class_logits, three.class_logits)
    np.testing.assert_array_equal(one.gate_logits, three.gate_logits)
    np.testing.assert_array_equal(one.inputs.means, three.inputs.means)
    np.testing.assert_array_equal(one.path.bits, three.path.bits)


@needs_kernel
@settings(max_examples=40)
@given(data=st.data(), threads=st.sampled_from((1, 2)), count=st.integers(2, 11))
def test_the_kernel_says_the_same_whatever_its_images_take_together(data, threads, count):
    spec = ImageSpec(11, 17, 1)
    program = program_of(settled(data.draw(backbones(1)), tensor(spec)), spec)
    images, engine = smooth_images(spec, count, seed=1), KernelEngine(program, threads=threads)
    expected = engine.answer(images).evidence

    engine.take_together(data.draw(st.sets(st.integers(0, len(program.steps) - 1))))
    found = engine.answer(images).evidence

    np.testing.assert_array_equal(found.class_logits, expected.class_logits)
    np.testing.assert_array_equal(found.gate_logits, expected.gate_logits)
    np.testing.assert_array_equal(found.inputs.means, expected.inputs.means)
    np.testing.assert_array_equal(found.path.bits, expected.path.bits)


@needs_kernel
def test_each_step_of_the_kernel_is_timed():
    spec = ImageSpec(9, 11, 1)
    engine = KernelEngine(program_of(settled(build_network("resnet8", 1, 4), tensor(spec)), spec))

    found = engine.step_milliseconds(smooth_images(spec, 3), [(), [2, 5]])

    assert found.shape == (2, len(engine.program.steps))
    assert (found > 0).all()
    assert engine.together == ()


@needs_kernel
@pytest.mark.parametrize("instructions", [None, b"avx2", b"any"])
@pytest.mark.parametrize(
    "pooling",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2),
        nn.MaxPool2d(5, 3, 2),
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(4, 3, 2, count_include_pad=False),
    ],
    ids=str,
)
def test_the_kernel_pools_as_torch_does(pooling, instructions):
    spec = ImageSpec(19, 38, 3)
    parts = convolution(3, 7), pooling, convolution(7, 9, relu=False), pooling, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = settled(nn.Sequential(*parts, nn.Linear(9, 6)), tensor(spec))
    with narrowed_to(instructions):
        found = agreement(KernelEngine, network, spec, smooth_images(spec, 3, seed=1))

    assert found.exact, found


@needs_kernel
@pytest.mark.parametrize("wrong", [np.zeros((1, 8, 9, 1), np.uint8), np.zeros((1, 8, 8, 1), np.float32)])
def test_the_kernel_reads_no_pixels_of_another_size(wrong):
    engine = KernelEngine(program_of(decouple(build_network("resnet8", 1, 4)), ImageSpec(8, 8, 1)))

    with pytest.raises(ImageError, match="^expected uint8 pixels of 8 x 8 x 1, got"):
        engine.answer(wrong)


@every_engine
@pytest.mark.parametrize("bias", [-5.0, 5.0])
def test_paths_that_are_all_closed_or_all_open_are_answered_like_others(engine, bias):
    spec = ImageSpec(10, 10, 1)
    network = settled(build_network("resnet8", 1, 4), tensor(spec))
    for gate in network.gates():
        nn.init.constant_(gate.normalise.bias, bias)
    images = smooth_images(spec, 3)

    found = agreement(engine, network, spec, images)

    assert found.exact, found
    assert engine(program_of(network, spec)).answer(images).evidence.path.bits.mean() == (bias > 0)


@every_engine
def test_no_images_are_answered_with_nothing(engine):
    spec = ImageSpec(8, 8, 1)
    network = decouple(build_network("resnet8", 1, 4))

    evidence = engine(program_of(network, spec)).answer(np.zeros((0, 8, 8, 1), np.uint8)).evidence

    assert evidence.class_logits.shape == (0, 4)
    assert evidence.path.bits.shape == (0, sum(network.layers.values()))


@every_engine
def test_the_answer_about_an_image_does_not_depend_on_the_batch(engine):
    spec = ImageSpec(12, 12, 1)
    network = settled(build_network("resnet8", 1, 4), tensor(spec))
    images, made = smooth_images(spec, 6, seed=1), engine(program_of(network, spec))

    together = made.answer(images).evidence
    alone = [made.answer(images[i : i + 1]).evidence for i in range(6)]

    np.testing.assert_allclose(together.class_logits, np.concatenate([e.class_logits for e in alone]), atol=1e-5)
    np.testing.assert_array_equal(together.path.bits, np.concatenate([e.path.bits for e in alone]))
    means = np.concatenate([e.inputs.means for e in alone])
    np.testing.assert_allclose(together.inputs.means, means, atol=1e-5)


@pytest.mark.parametrize(
    ("engine", "kinds"),
    [
        *((engine, kinds) for engine in (KernelEngine, OnnxEngine) for kinds in ("bits", "gates+margins", "margins")),
        *((engine, "inputs") for engine in (KernelEngine, OnnxEngine)),
        (KernelEngine, "doubts"),
        (KernelEngine, "path-likelihoods"),
        (KernelEngine, "gate-likelihoods"),
        (KernelEngine, "all"),
    ],
)
@pytest.mark.parametrize(("attacks", "benign"), [(1, 0), (3, 0), (3, 2), (18, 15)])
def test_the_score_of_the_same_call_is_scikit_learns_own(engine, kinds, attacks, benign):
    scores_like_scikit_learn(engine, kinds, attacks, benign)


@needs_kernel
@pytest.mark.parametrize("instructions", [b"avx2", b"any"])
@pytest.mark.parametrize(("attacks", "benign"), [(1, 0), (17, 16)])
@pytest.mark.parametrize("units", [0, 5, 128])
def test_the_score_is_the_same_with_narrower_vectors(instructions, attacks, benign, units):
    with narrowed_to(instructions):
        scores_like_scikit_learn(KernelEngine, "all", attacks, benign, network_of(units) if units else None)


@pytest.mark.parametrize(
    ("engine", "kinds"),
    [(KernelEngine, "all"), (KernelEngine, "bits+margins"), (OnnxEngine, "bits+gates+inputs+margins")],
)
@pytest.mark.parametrize(("attacks", "benign", "units"), [(1, 0, 5), (3, 2, 37), (18, 15, 128)])
def test_the_score_of_a_hidden_layer_is_scikit_learns_own(engine, kinds, attacks, benign, units):
    scores_like_scikit_learn(engine, kinds, attacks, benign, network_of(units))


def network_of(units):
    return make_pipeline(StandardScaler(), DropoutNetwork(units, random_state=0))


def scores_like_scikit_learn(engine, kinds, attacks, benign, estimator=None):
    if engine is KernelEngine and not has_kernel():
        pytest.skip("the compiled kernel was not built")
    spec = ImageSpec(8, 8, 1)
    network = settled(build_network("resnet8", 1, 5), tensor(spec))
    evidence = MaskedEngine(network, CPU).answer(smooth_images(spec, 80, seed=2)).evidence
    features = features_named(kinds, EvidenceShape.of(evidence)).fit(rows_of(evidence))
    kind = np.arange(80) % (1 + attacks + benign) - benign
    classifier = (estimator or default_estimator()).fit(features.of(evidence), kind)

    answers = engine(program_of(network, spec), folded_score(classifier, features)).answer(smooth_images(spec, 6, 1))

    # Of likelihoods the columns themselves are float32, and no rounding is like another.
    expected = FalseAlarmClassifier.around(classifier, 0.05).score_samples(features.of(answers.evidence))
    end = np.inf if estimator is None else log_odds(1.0)  # of what scikit-learn gives as shares
    np.testing.assert_allclose(
        np.clip(answers.scores, -end, end), expected, atol=1e-6 if "likelihoods" not in features.kinds[-1] else 1e-4
    )


@needs_kernel
@pytest.mark.parametrize("kinds", ["inputs", "bits+gates+margins", "all"])
@pytest.mark.parametrize("units", [0, 5])
def test_the_compiled_score_of_another_engines_evidence_is_scikit_learns_own(kinds, units):
    spec, few = ImageSpec(9, 9, 1), convolution(60, 2)  # one gate reads far more channels than there are filters
    backbone = nn.Sequential(convolution(1, 60), few, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
    network = settled(backbone, tensor(spec))
    evidence = MaskedEngine(network, CPU).answer(smooth_images(spec, 80, seed=2)).evidence
    features = features_named(kinds, EvidenceShape.of(evidence)).fit(rows_of(evidence))
    classifier = (network_of(units) if units else default_estimator()).fit(features.of(evidence), np.arange(80) % 3)
    score = folded_score(classifier, features)
    others = MaskedEngine(network, CPU).answer(smooth_images(spec, 7, seed=1)).evidence

    found = KernelScore(score)(others)

    np.testing.assert_allclose(found, score.of(others), atol=1e-6 if kinds != "all" else 1e-4)


@needs_kernel
def test_the_kernel_takes_no_score_of_another_network():
    spec = ImageSpec(9, 9, 1)
    programs, scores = [], []
    for name in ("resnet8", "resnet20"):
        network = settled(build_network(name, 1, 5), tensor(spec))
        evidence = MaskedEngine(network, CPU).answer(smooth_images(spec, 20)).evidence
        features = features_named("inputs", EvidenceShape.of(evidence)).fit(rows_of(evidence))
        programs.append(program_of(network, spec))
        scores.append(folded_score(default_estimator().fit(features.of(evidence), np.arange(20) % 2), features))

    with pytest.raises(EngineError, match="expected a score of a network with EvidenceShape"):
        KernelEngine(programs[0], scores[1])


class Ordinary(nn.Module):
    """Two convolutions, then `end`: features `(images, 6, 9, 9)` -> logits, given a linear map for 6 and for 486."""

    def __init__(self, end):
        super().__init__()
        self.features = nn.Sequential(convolution(1, 6), convolution(6, 6))
        self.few, self.many, self.more = nn.Linear(6, 3), nn.Linear(486, 3), nn.Linear(12, 3)
        self.register_buffer("scale", torch.tensor(0.5))
        self.end = end

    def forward(self, images):
        return self.end(self, self.features(images))


@every_engine
@pytest.mark.parametrize(
    "end",
    [
        lambda net, x: net.more(torch.cat(tensors=[x, x], dim=1).mean((2, 3))),
        lambda net, x: net.few(torch.mean(input=x, dim=(2, 3))),
        lambda net, x: net.few(torch.mul(x, other=2.0).mean(dim=[2, 3])),
        lambda net, x: net.many(x.view(x.size(0), -1)),
        lambda net, x: net.many(torch.relu(x.reshape(x.shape[0], -1) - 1) * 2),
        lambda net, x: net.few(torch.relu(input=2 * (1 + x - 1).div(2)).mean((2, 3))),
        lambda net, x: net.few((net.scale * x + net.scale).mean((2, 3))),
        lambda net, x: net.few(F.relu(input=torch.add(input=x, other=x)).mean((2, 3))),
    ],
    ids=["cat", "mean", "mul", "view", "after-flattening", "numbers", "buffers", "add"],
)
def test_ordinary_ways_of_writing_a_network_are_understood(engine, end):
    spec = ImageSpec(9, 9, 1)
    network = settled(Ordinary(end), tensor(spec))

    found = agreement(engine, network, spec, smooth_images(spec, 6, seed=1))

    assert found.exact, found


def test_taking_the_mean_off_and_dividing_is_one_step():
    spec = ImageSpec(9, 9, 3)
    backbone = build_network("resnet8", 3, 4)
    backbone.normalise.set_statistics(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6]))

    steps = program_of(settled(backbone, tensor(spec)), spec).steps

    [both] = [step for step in steps if step.kind == program.AFFINE]
    image = np.array([0.5, 0.5, 0.5], np.float32)
    np.testing.assert_allclose(image * both.arrays["weights"] + both.arrays["biases"], [1, 0.6, 1 / 3], rtol=1e-5)


def test_a_shortcut_that_is_cut_and_padded_is_added_by_the_convolution_before_the_sum():
    spec = ImageSpec(8, 8, 1)

    found = [step.kind for step in program_of(decouple(build_network("resnet8", 1, 4)), spec).steps]

    assert found.count(program.PAD_CHANNELS) == 2
    assert program.ADD not in found


@pytest.mark.parametrize(
    "end",
    [
        lambda net, x: net.few(torch.add(x, x, alpha=3).mean((2, 3))),
        lambda net, x: net.few(torch.sub(x, 1, alpha=3).mean((2, 3))),
        lambda net, x: net.more(F.pad(x, (0, 0, 0, 0, 3, 3), "constant", 1.0).mean((2, 3))),
        lambda net, x: net.few((x * x.size(1)).mean((2, 3))),
        lambda net, x: net.few(torch.einsum("nchw->nc", x)),
    ],
    ids=["alpha", "alpha-of-a-number", "padding", "size", "einsum"],
)
def test_what_is_not_understood_is_left_to_the_masked_network(end):
    network = settled(Ordinary(end), tensor(ImageSpec(9, 9, 1)))

    with pytest.raises(EngineError, match="^expected .*, got"):
        program_of(network, ImageSpec(9, 9, 1))


def test_a_bug_in_lowering_is_no_reason_not_to_load(monkeypatch):
    def broken(*_):
        raise IndexError("tuple index out of range")

    monkeypatch.setitem(program._MODULES, nn.Linear, broken)

    with pytest.raises(EngineError, match="got one on which it fails: tuple index out of range"):
        program_of(decouple(build_network("resnet8", 1, 3)), ImageSpec(8, 8, 1))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.ReLU()),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"),
        nn.Hardswish(),
        nn.MaxPool2d(2, ceil_mode=True),
    ],
    ids=["grouped", "dilated", "circular", "hardswish", "ceil_mode"],
)
def test_a_layer_that_is_not_known_is_refused_by_name(layer):
    backbone = nn.Sequential(
        convolution(1, 6), convolution(6, 6), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )

    with pytest.raises(EngineError, match="^expected .*, got"):
        program_of(decouple(backbone), ImageSpec(9, 9, 1))
