import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.images import ImageSpec
from protos.inference import grpc_service_pb2 as pb
from service.access.callers import FULL, VERDICT
from service.errors import ForbiddenError, InvalidRequestError
from service.inference_outputs import join_bytes
from service.inference_requests import call_of, split_bytes
from service.sources import FileSource, RawSource
from tests.service.fakes import SPEC, FakeDetector, image_of
from tests.service.inference_calls import files_request, framed, parameter, pixels_request

MODEL = FakeDetector()


def call(request, *, model=MODEL, max_images=8, max_pixels=10_000, role=FULL):
    return call_of(request, model, max_images, max_pixels, role)


def violations(request, **settings):
    with pytest.raises(InvalidRequestError) as caught:
        call(request, **settings)
    return dict(caught.value.violations)


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_bytes_are_taken_apart_as_they_were_put_together(elements):
    assert split_bytes(join_bytes(elements), len(elements)) == elements
    assert join_bytes(elements) == framed(*elements)


@given(st.binary(max_size=60), st.integers(0, 9))
def test_any_bytes_are_taken_apart_whole_or_refused(blob, count):
    try:
        elements = split_bytes(blob, count)
    except InvalidRequestError:
        return
    assert len(elements) == count
    assert join_bytes(elements) == blob


@pytest.mark.parametrize(
    ("blob", "count", "message"),
    [
        (b"", 1, "which end within element 0"),
        (b"\x01\x00\x00", 1, "which end within element 0"),
        (framed(b"ab")[:-1], 1, "got 5 bytes, which end within element 0"),
        (framed(b"ab") + b"\xff\xff\xff\xff", 2, "which end within element 1"),
        (framed(b"ab", b"c"), 1, "expected 6 bytes for 1 elements, got 11 bytes"),
    ],
)
def test_bytes_that_do_not_add_up_are_refused(blob, count, message):
    with pytest.raises(InvalidRequestError, match=message):
        split_bytes(blob, count)


@pytest.mark.parametrize("raw", [True, False])
def test_pixels_come_as_bytes_and_as_numbers(raw):
    asked = call(pixels_request(1, 2, raw=raw))
    assert asked.raw is raw
    assert asked.images == [RawSource(image_of(value).tobytes(), 4, 4, 3) for value in (1, 2)]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_files_come_in_either_shape(raw, shape):
    asked = call(files_request(b"one", b"", shape=shape, raw=raw))
    assert asked.images == [FileSource(b"one"), FileSource(b"")]


def test_all_outputs_but_the_path_come_unasked_and_asked_ones_in_their_order():
    assert list(call(pixels_request(1)).outputs) == ["LABEL", "PROBS", "ADV_SCORE", "P_VALUE", "ADV_VERDICT"]
    asked = call(pixels_request(1, outputs=("PATH_ENCODING", "LABEL")))
    assert asked.outputs == {"PATH_ENCODING": 0, "LABEL": 0}


def test_a_role_that_sees_less_gets_less_unasked_and_is_refused_what_it_asks_for():
    assert list(call(pixels_request(1), role=VERDICT).outputs) == ["LABEL", "ADV_VERDICT"]
    with pytest.raises(ForbiddenError):
        call(pixels_request(1, outputs=("ADV_SCORE",)), role=VERDICT)
    with pytest.raises(ForbiddenError):
        call(pixels_request(1, parameters={"max_false_alarm_rate": parameter(0.05)}), role=VERDICT)


@pytest.mark.parametrize("value", [250_000, (250_000,), 250_000.0, "250000"])
def test_a_timeout_is_in_microseconds_and_of_any_kind_that_holds_a_number(value):
    assert call(pixels_request(1, parameters={"timeout": parameter(value)})).timeout_seconds == 0.25


def test_no_timeout_and_one_of_0_are_the_same():
    assert call(pixels_request(1)).timeout_seconds is None
    assert call(pixels_request(1, parameters={"timeout": parameter(0)})).timeout_seconds is None


@pytest.mark.parametrize("value", [0.25, "0.25"])
def test_a_caller_sets_its_own_rate(value):
    assert call(pixels_request(1, parameters={"max_false_alarm_rate": parameter(value)})).rate == 0.25


def test_what_clients_send_unasked_is_taken_and_changes_nothing():
    unasked = {"priority": (2,), "sequence_id": 5, "sequence_start": True, "binary_data_output": True, "headers": "x"}
    request = pixels_request(1, parameters={name: parameter(value) for name, value in unasked.items()})
    request.inputs[0].parameters["content_type"].string_param = "image/png"
    assert call(request) == call(pixels_request(1))


def with_parameter(name, value):
    return pixels_request(1, parameters={name: parameter(value)})


def classified(name, value):
    request = pixels_request(1, outputs=(name,))
    request.outputs[0].parameters["classification"].CopyFrom(parameter(value))
    return request


@pytest.mark.parametrize("value", [2, (2,), "2", 2.0])
def test_classes_are_named_for_probabilities(value):
    assert call(classified("PROBS", value)).outputs == {"PROBS": 2}


def changed(request, change):
    change(request)
    return request


@pytest.mark.parametrize(
    ("request_", "field", "text"),
    [
        (pb.ModelInferRequest(), "inputs", "expected one input, IMAGES or IMAGE_BYTES, got none"),
        (changed(pixels_request(1), lambda r: r.inputs.add(name="IMAGE_BYTES")), "inputs", "got IMAGES, IMAGE_BYTES"),
        (changed(pixels_request(1), lambda r: r.inputs[0].ClearField("name")), "inputs", "expected one input"),
        (
            changed(pixels_request(1), lambda r: setattr(r.inputs[0], "datatype", "FP32")),
            "inputs[0].datatype",
            "expected UINT8 for IMAGES, got 'FP32'",
        ),
        (pixels_request(*range(9)), "inputs[0].shape", "expected 1 to 8 images, got 9"),
        (
            changed(pixels_request(1), lambda r: r.inputs[0].shape.__setitem__(1, 5)),
            "inputs[0].shape",
            "expected [-1, 4, 4, 3], -1 for any number from 1, got [1, 5, 4, 3]",
        ),
        (changed(pixels_request(1), lambda r: r.inputs[0].shape.pop()), "inputs[0].shape", "got [1, 4, 4]"),
        (
            changed(pixels_request(1), lambda r: r.inputs[0].shape.__setitem__(0, 2**62)),
            "inputs[0].shape",
            "expected 1 to 8 images",
        ),
        (
            changed(pixels_request(1), lambda r: r.inputs[0].shape.__setitem__(0, 2)),
            "raw_input_contents[0]",
            "expected 2 x 4 x 4 x 3 = 96 elements, got 48",
        ),
        (
            changed(pixels_request(1, raw=False), lambda r: r.inputs[0].contents.uint_contents.__setitem__(3, 256)),
            "inputs[0].contents.uint_contents",
            "expected values of 0 to 255, got 256",
        ),
        (pixels_request(1, raw=False, outputs=("SCORE",)), "outputs[0].name", "at most once, got 'SCORE'"),
        (pixels_request(1, outputs=("LABEL", "LABEL")), "outputs[1].name", "at most once, got 'LABEL'"),
        (files_request(b"x", shape=[1, 2]), "inputs[0].shape", "expected [images] or [images, 1], got [1, 2]"),
        (files_request(b"x", shape=[3], raw=False), "inputs[0].contents.bytes_contents", "expected 3 elements, got 1"),
        (files_request(b"x", shape=[2]), "raw_input_contents[0]", "which end within element 1"),
        (
            changed(files_request(b"x"), lambda r: r.raw_input_contents.append(b"")),
            "raw_input_contents",
            "expected one for each of 1 inputs and no contents beside it, got 2",
        ),
        (
            changed(files_request(b"x"), lambda r: r.inputs[0].contents.bytes_contents.append(b"")),
            "raw_input_contents",
            "no contents beside it",
        ),
        (
            changed(pixels_request(1), lambda r: r.inputs[0].parameters["shared_memory_region"].SetInParent()),
            "inputs[0].parameters[shared_memory_region]",
            "expected no such parameter",
        ),
        (with_parameter("timeout", -1), "parameters[timeout]", "expected a whole number of at least 0, got -1"),
        (with_parameter("timeout", 1.5), "parameters[timeout]", "expected a whole number of at least 0, got 1.5"),
        (with_parameter("timeout", True), "parameters[timeout]", "expected a number, got 'True'"),
        (with_parameter("timeout", "soon"), "parameters[timeout]", "expected a number, got 'soon'"),
        (with_parameter("timeout", None), "parameters[timeout]", "expected a number, got 'nothing'"),
        (with_parameter("timeout", "inf"), "parameters[timeout]", "expected a number, got 'inf'"),
        (with_parameter("max_false_alarm_rate", 2.0), "parameters[max_false_alarm_rate]", "at least 0.01 "),
        (with_parameter("speed", 1), "parameters[speed]", "expected one of timeout, max_false_alarm_rate, priority"),
        (classified("PROBS", 0), "outputs[0].parameters[classification]", "expected a whole number of at least 1"),
        (classified("LABEL", 1), "outputs[0].parameters[classification]", "expected no such parameter"),
    ],
)
def test_a_request_that_breaks_the_protocol_says_where(request_, field, text):
    found = violations(request_)
    assert list(found) == [field]
    assert text in found[field]


def test_where_the_model_resizes_any_size_is_taken_up_to_the_limit():
    model = FakeDetector(ImageSpec(SPEC.height, SPEC.width, SPEC.channels, resize=True))
    request = pixels_request(1)
    request.inputs[0].shape[1:3] = [2, 8]
    assert call(request, model=model).images[0].height == 2
    assert violations(request, model=model, max_pixels=15) == {
        "inputs[0].shape": "expected at most 15 pixels in an image, got 2 x 8"
    }


NAMES = ("IMAGES", "IMAGE_BYTES", "LABEL", "PROBS", "timeout", "classification", "priority", "other")
names = st.sampled_from(NAMES)
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=9)
kinds = st.dictionaries(names, values.map(parameter), max_size=2)
shapes = st.lists(st.sampled_from([-1, 0, 1, 2, 4, 2**62]), max_size=5)


@given(
    tensors=st.lists(st.tuples(names, st.sampled_from(["UINT8", "BYTES", ""]), shapes, kinds), max_size=2),
    outputs=st.lists(st.tuples(names, kinds), max_size=2),
    parameters=kinds,
    raw=st.lists(st.binary(max_size=60), max_size=2),
    elements=st.none() | st.lists(st.binary(max_size=5), max_size=3),
)
def test_a_request_is_understood_or_refused_and_nothing_else(tensors, outputs, parameters, raw, elements):
    request = pb.ModelInferRequest(parameters=parameters, raw_input_contents=raw)
    for name, datatype, shape, kind in tensors:
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape, parameters=kind)
        if elements is not None:
            tensor.contents.bytes_contents.extend(elements)
    for name, kind in outputs:
        request.outputs.add(name=name, parameters=kind)
    with contextlib.suppress(InvalidRequestError):
        assert 1 <= len(call(request).images) <= 8


def test_numbers_are_bytes_row_by_row():
    pixels = np.arange(48, dtype=np.uint8)
    request = pixels_request(0, raw=False)
    request.inputs[0].contents.uint_contents[:] = pixels.tolist()
    assert call(request).images[0].content == pixels.tobytes()
