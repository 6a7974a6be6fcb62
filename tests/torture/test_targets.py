import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.inference import grpc_service_pb2 as inference
from protos.pathguard.v1 import detection_pb2 as pb
from torture.fuzz import changed
from torture.targets import TARGETS

NAMES = sorted(TARGETS)


@pytest.mark.parametrize("name", NAMES)
def test_good_inputs_come_past_parsing(name):
    target = TARGETS[name]
    assert sum(target.run(seed) for seed in target.seeds) >= len(target.seeds) - 1


@pytest.mark.parametrize("name", NAMES)
@given(content=st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_are_answered_and_break_nothing(name, content):
    TARGETS[name].run(content)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_changed_inputs_are_answered_and_break_nothing(name, seed):
    TARGETS[name].run(changed(TARGETS[name].seeds, random.Random(seed)))


numbers = st.integers(-(2**31), 2**31 - 1)
parameters = st.dictionaries(
    st.sampled_from(["timeout", "priority", "max_false_alarm_rate", "classification", "x"]),
    st.one_of(
        st.builds(inference.InferParameter, int64_param=numbers),
        st.builds(inference.InferParameter, bool_param=st.booleans()),
        st.builds(inference.InferParameter, double_param=st.floats()),
        st.builds(inference.InferParameter, string_param=st.text(max_size=5)),
    ),
    max_size=3,
)
tensors = st.builds(
    inference.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["IMAGES", "IMAGE_BYTES", "", "x"]),
    datatype=st.sampled_from(["UINT8", "BYTES", "FP32"]),
    shape=st.lists(st.one_of(st.integers(-1, 5), numbers), max_size=5),
    parameters=parameters,
)


@given(
    request=st.builds(
        inference.ModelInferRequest,
        inputs=st.lists(tensors, max_size=2),
        raw_input_contents=st.lists(st.binary(max_size=60), max_size=2),
        parameters=parameters,
    )
)
@settings(max_examples=300)
def test_any_tensors_are_answered_and_break_nothing(request):
    TARGETS["infer"].run(request.SerializeToString())


@given(
    request=st.builds(
        pb.DetectRequest,
        images=st.lists(
            st.builds(
                pb.Image,
                raw=st.builds(
                    pb.RawPixels,
                    pixels=st.binary(max_size=60),
                    height=st.integers(0, 2**32 - 1),
                    width=st.integers(0, 2**32 - 1),
                    channels=st.integers(0, 5),
                ),
            ),
            max_size=3,
        ),
        max_false_alarm_rate=st.floats(),
    )
)
@settings(max_examples=300)
def test_any_raw_pixels_are_answered_and_break_nothing(request):
    TARGETS["detect"].run(request.SerializeToString())


def test_changes_are_the_same_for_the_same_seed():
    seeds = TARGETS["detect"].seeds
    assert [changed(seeds, random.Random(7)) for _ in range(2)] == [changed(seeds, random.Random(7))] * 2
