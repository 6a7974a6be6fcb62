import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from detector.errors import ImageError
from detector.images import ImageSpec, encode_png
from detector.paths.path_encoding import PathEncoding
from protos.pathguard.v1 import detection_pb2 as pb
from service.access.callers import FULL, VERDICT
from service.errors import ForbiddenError, InvalidRequestError
from service.messages import check_request, field_of, model_message, response_of, source_of
from service.model import Answer
from service.pipeline import Reply
from tests.service.fakes import LAYERS, SPEC, FakeDetector, image_of

MODEL = FakeDetector()


def raw(pixels):
    height, width, channels = pixels.shape
    return pb.Image(raw=pb.RawPixels(pixels=pixels.tobytes(), height=height, width=width, channels=channels))


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3]))))
def test_raw_pixels_and_png_files_give_back_the_pixels(pixels):
    spec = ImageSpec(*pixels.shape)
    for image in (raw(pixels), pb.Image(encoded=encode_png(pixels))):
        decoded = source_of(image).decode(spec, max_pixels=100)
        np.testing.assert_array_equal(decoded.pixels, pixels)
        assert not decoded.resized


@pytest.mark.parametrize(
    ("image", "field", "message"),
    [
        (pb.Image(), "images[2]", "expected encoded or raw content, got an image with neither"),
        (pb.Image(encoded=b""), "images[2].encoded", "expected an image file, got 0 bytes"),
        (pb.Image(raw=pb.RawPixels(height=4, width=4, channels=3)), "images[2].raw", "48 bytes of pixels, got 0"),
        (raw(np.zeros((4, 4, 1), np.uint8)), "images[2].raw", "expected 3 channels"),
        (raw(np.zeros((5, 4, 3), np.uint8)), "images[2].raw", "expected 4 x 4 pixels, got 5 x 4"),
        (pb.Image(encoded=encode_png(np.zeros((9, 9, 3), np.uint8))), "images[2].encoded", "expected at most 50 pix"),
    ],
)
def test_a_bad_image_says_what_was_expected_and_where(image, field, message):
    with pytest.raises(ImageError) as caught:
        source_of(image).decode(SPEC, max_pixels=50)
    assert message in str(caught.value)
    assert field_of(image, 2) == field


def test_the_rate_is_the_requests_or_the_models():
    one = [pb.Image()]
    assert check_request(pb.DetectRequest(images=one), MODEL, 3, FULL) == MODEL.max_false_alarm_rate
    assert check_request(pb.DetectRequest(images=one, max_false_alarm_rate=0.01), MODEL, 3, FULL) == 0.01


@pytest.mark.parametrize("rate", [0.0, 0.00999, 1.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_the_calibration_cannot_give_is_refused(rate):
    with pytest.raises(InvalidRequestError, match="max_false_alarm_rate: expected a rate of at least 0.01"):
        check_request(pb.DetectRequest(images=[pb.Image()], max_false_alarm_rate=rate), MODEL, 3, FULL)


@pytest.mark.parametrize("count", [0, 4])
def test_no_image_and_too_many_are_refused(count):
    with pytest.raises(InvalidRequestError) as caught:
        check_request(pb.DetectRequest(images=[pb.Image()] * count), MODEL, 3, FULL)
    assert caught.value.violations == {"images": f"expected 1 to 3 images, got {count}"}


@pytest.mark.parametrize(
    ("p_value", "verdict"),
    [(0.0499, pb.VERDICT_ADVERSARIAL), (0.05, pb.VERDICT_ADVERSARIAL), (0.0501, pb.VERDICT_CLEAN)],
)
def test_an_image_is_flagged_up_to_and_at_the_rate(p_value, verdict):
    answer = Answer(1, [0.0, 1.0, 0.0], 2.0, p_value, b"")
    request = pb.DetectRequest(images=[pb.Image(id="mine")])
    response = response_of(request, [Reply(answer, resized=True)], MODEL, 0.05, FULL)

    assert response.results[0].verdict == verdict
    assert (response.results[0].label_name, response.results[0].resized) == ("shoe", True)
    assert response.results[0].id == "mine"
    assert (response.model_version, response.threshold_version) == ("model-1", "threshold-1")
    assert not response.HasField("path_layout")


@pytest.mark.parametrize(
    ("p_value", "verdict"),
    [(0.05, pb.VERDICT_ADVERSARIAL), (0.0501, pb.VERDICT_UNCERTAIN), (0.2, pb.VERDICT_UNCERTAIN),
     (0.2001, pb.VERDICT_CLEAN)],
)  # fmt: skip
def test_between_two_rates_an_image_is_uncertain_if_the_caller_wants_so(p_value, verdict):
    replies = [Reply(Answer(1, [0.0, 1.0, 0.0], 2.0, p_value, b""), resized=False)]
    request = pb.DetectRequest(images=[pb.Image()], uncertain_rate=0.2)

    assert response_of(request, replies, MODEL, 0.05, FULL).results[0].verdict == verdict
    request.ClearField("uncertain_rate")
    assert response_of(request, replies, MODEL, 0.05, FULL).results[0].verdict != pb.VERDICT_UNCERTAIN


@pytest.mark.parametrize("rate", [0.0499, 1.0, -1.0, float("nan")])
def test_an_uncertain_rate_below_the_rate_itself_is_refused(rate):
    request = pb.DetectRequest(images=[pb.Image()], max_false_alarm_rate=0.05, uncertain_rate=rate)

    with pytest.raises(InvalidRequestError, match="uncertain_rate: expected a rate from max_false_alarm_rate, 0.05"):
        check_request(request, MODEL, 3, FULL)


def test_a_role_that_may_not_set_the_rate_may_not_ask_for_uncertain_verdicts_either():
    request = pb.DetectRequest(images=[pb.Image()], uncertain_rate=0.2)

    with pytest.raises(ForbiddenError):
        check_request(request, MODEL, 3, VERDICT)


def test_a_status_stands_in_its_images_place():
    answer = Answer(0, [1.0], 2.0, 0.5, b"")
    request = pb.DetectRequest(images=[pb.Image(id="a"), pb.Image(id="b")])
    response = response_of(request, [ImageError("bad"), Reply(answer, resized=False)], MODEL, 0.05, FULL)
    assert [(result.id, result.status.code) for result in response.results] == [("a", 3), ("b", 0)]
    assert not response.results[0].HasField("score")
    assert response.results[0].verdict == pb.VERDICT_UNSPECIFIED


@given(arrays.arrays(np.bool_, (1, sum(LAYERS.values()))))
def test_a_path_comes_back_bit_by_bit(bits):
    packed = PathEncoding(bits, LAYERS).packed()
    request = pb.DetectRequest(images=[pb.Image()], include_path=True)
    reply = Reply(Answer(0, [], 0.0, 0.5, packed.tobytes()), resized=False)
    response = response_of(request, [reply], MODEL, 0.05, FULL)

    layers = {layer.name: layer.channels for layer in response.path_layout.layers}
    returned = np.frombuffer(response.results[0].path, np.uint8)[None]
    assert (response.path_layout.schema_version, layers) == (1, LAYERS)
    np.testing.assert_array_equal(PathEncoding.unpacked(returned, layers).bits, bits)


def test_a_model_tells_what_callers_need():
    message = model_message(MODEL)
    assert (message.name, message.calibration_images, message.smallest_false_alarm_rate) == ("fake", 99, 0.01)
    assert message.engine == "fake"
    assert (message.input.height, message.input.channels, message.input.resize) == (4, 3, False)
    assert list(message.class_names) == ["shirt", "shoe", "bag"]
    assert image_of(1).shape == (message.input.height, message.input.width, message.input.channels)
