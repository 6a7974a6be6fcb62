"""Cut filters change nothing while they stay closed, and nothing when one opens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from detector.batches import to_tensor
from detector.engines.choice import agreement_of, smooth_images
from detector.engines.compaction import CheckedEngine, compacted, floats_of
from detector.engines.masked import MaskedEngine
from detector.engines.program import CONVOLVE, program_of
from detector.engines.sliced import SlicedEngine
from detector.images import ImageSpec
from detector.network.networks import build_network
from tests.detector.engines.networks import backbones, convolution, settled
from tests.detector.engines.test_engines import every_engine

CPU = torch.device("cpu")


def partly_closed(backbone, spec, share=0.4):
    """A settled network some of whose filters never open, and which they are."""
    network = settled(backbone, to_tensor(smooth_images(spec, 12, seed=3), CPU))
    closed = []
    for gate in network.gates():
        never = torch.rand(gate.normalise.num_features) < share
        gate.normalise.weight.data[never] = 0.0
        gate.normalise.bias.data[never] = -1.0
        closed.append(never.numpy())
    return network, np.concatenate(closed)


@every_engine
@settings(max_examples=25)
@given(data=st.data(), side=st.integers(9, 17))
def test_a_compacted_network_says_what_the_whole_one_says(engine, data, side):
    spec = ImageSpec(side, side, 1)
    network, closed = partly_closed(data.draw(backbones(1)), spec)
    images = smooth_images(spec, 5, seed=1)
    program = program_of(network, spec)

    smaller = compacted(program, closed)

    found = agreement_of(engine(smaller).answer(images).evidence, MaskedEngine(network, CPU).answer(images).evidence)
    assert found.exact, found
    assert floats_of(smaller) <= floats_of(program)


def test_weights_shrink_on_both_sides_of_a_cut_filter():
    spec = ImageSpec(9, 9, 1)
    backbone = nn.Sequential(
        convolution(1, 4), convolution(4, 10), nn.MaxPool2d(2), convolution(10, 6), nn.Flatten(), nn.Linear(96, 2)
    )
    network, _ = partly_closed(backbone, spec, share=0)
    closed = np.array([True] * 3 + [False] * 7 + [True, False] * 3)

    steps = compacted(program_of(network, spec), closed).steps

    shapes = [step.arrays["weights"].shape for step in steps if step.kind == CONVOLVE]
    assert shapes == [(4, 1, 3, 3), (7, 4, 3, 3), (3, 7, 3, 3)]
    assert steps[-1].arrays["weights"].shape == (2, 48)
    assert [step.arrays["squeeze"].shape[0] for step in steps if "squeeze" in step.arrays] == [4, 7]


def test_filters_behind_a_shortcut_stay():
    spec = ImageSpec(9, 9, 1)
    network, _ = partly_closed(build_network("resnet8", 1, 3), spec, share=0)
    program = program_of(network, spec)

    smaller = compacted(program, np.ones(program.filters, np.bool_))

    widths = [smaller.maps[step.out].channels for step in smaller.steps if step.kind == CONVOLVE]
    assert widths == [16, 1, 16, 1, 32, 1, 64]


@every_engine
def test_an_image_that_opens_a_cut_filter_is_answered_by_the_full_network(engine):
    spec = ImageSpec(12, 12, 1)
    network = settled(build_network("resnet8", 1, 3), to_tensor(smooth_images(spec, 12, seed=3), CPU))
    program, images = program_of(network, spec), smooth_images(spec, 30, seed=1)
    expected = MaskedEngine(network, CPU).answer(images).evidence
    closed = ~MaskedEngine(network, CPU).answer(images[:4]).evidence.path.bits.any(axis=0)
    breaks = (expected.path.bits & closed).any(axis=1)
    assert 0 < breaks.sum() < len(images)

    checked = CheckedEngine(engine(compacted(program, closed)), closed, engine(program))
    found = agreement_of(checked.answer(images).evidence, expected)

    assert found.exact, found
    assert found.unsure_bits == 0
    assert checked.broken == breaks.sum()


def test_the_full_network_is_asked_only_when_an_image_needs_it():
    spec = ImageSpec(8, 8, 1)
    network, closed = partly_closed(build_network("resnet8", 1, 3), spec)
    program = program_of(network, spec)

    class Full:
        def answer(self, pixels):
            raise AssertionError(f"{len(pixels)} images came")

    checked = CheckedEngine(SlicedEngine(compacted(program, closed)), closed, Full())
    checked.answer(smooth_images(spec, 3, seed=1))

    assert checked.broken == 0
