import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from detector.images import encode_png
from pathguard.client import (
    Access,
    Client,
    ImageResult,
    InputError,
    OverloadedError,
    RefusedError,
    ServerError,
    TimedOutError,
    UnreachableError,
    Verdict,
    check_health,
)
from pathguard.client.feed import IMAGES_PER_MESSAGE, MESSAGES_UNDER_WAY
from protos.pathguard.v1 import detection_pb2 as pb
from service.config import ServiceConfig
from service.server import running_server
from tests.service.conftest import QUICK
from tests.service.fakes import LAYERS, POISON, FakeDetector, bits_of, image_of


@pytest.fixture
def client(target):
    with Client(target) as client:
        yield client


def test_bytes_paths_and_pixels_get_the_same_answer(client, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(encode_png(image_of(7)))
    first, second, third = client.detect([file, file.read_bytes(), image_of(7)])
    assert first == second == third
    assert first == ImageResult(
        label=1,
        name="shoe",
        probabilities=(0.25, 0.5, 0.25),
        score=7.0,
        p_value=0.08,
        verdict=Verdict.CLEAN,
        model_version="model-1",
        threshold_version="threshold-1",
        max_false_alarm_rate=0.05,
    )


def test_the_rate_of_a_call_decides_its_verdicts(client):
    (result,) = client.detect([image_of(7)], max_false_alarm_rate=0.08)
    assert (result.verdict, result.max_false_alarm_rate) == (Verdict.ADVERSARIAL, 0.08)


def test_paths_come_by_layer_when_asked_for(client):
    (result,) = client.detect([image_of(37)], include_path=True)
    assert {name: len(bits) for name, bits in result.path.items()} == LAYERS
    np.testing.assert_array_equal(np.concatenate(list(result.path.values())), bits_of(np.array([37]))[0])


def test_a_restored_label_comes_beside_the_label_of_an_adversarial_image(client):
    clean, adversarial = client.detect([image_of(7), image_of(3)], correct=True)
    assert (clean.restored_label, clean.restored_name) == (None, None)
    assert (adversarial.label, adversarial.restored_label, adversarial.restored_name) == (0, 1, "shoe")
    ((_, streamed),) = client.detect_stream([image_of(3)], correct=True)
    assert streamed == adversarial


def test_more_images_than_a_call_may_have_are_split_and_come_back_in_order(client):
    values = [value % 200 for value in range(2500)]
    assert [result.score for result in client.detect(image_of(value) for value in values)] == values


def test_more_bytes_than_a_message_may_have_are_split_and_come_back_in_order(target):
    with Client(target, max_message_bytes=5000) as client:
        assert [result.score for result in client.detect([image_of(value) for value in range(100)])] == list(range(100))


def test_no_image_gives_no_result(client):
    assert client.detect([]) == []


def test_a_bad_image_carries_its_own_error_wherever_it_was_found(client, tmp_path):
    missing, text, good = client.detect([tmp_path / "missing.png", b"text", image_of(2)])
    assert missing.error == f"expected a file that can be read, got {tmp_path}/missing.png: No such file or directory"
    assert text.error.startswith("expected a JPEG, PNG or WebP file")
    assert (text.verdict, text.label, text.score) == (Verdict.UNSPECIFIED, None, None)
    assert (good.error, good.score) == (None, 2.0)


def test_an_image_over_the_message_limit_carries_its_own_error(target):
    with Client(target, max_message_bytes=5000) as client:
        large, good = client.detect([bytes(6000), image_of(2)])
    assert large.error.startswith("expected an image of less than 904 bytes")
    assert good.score == 2.0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (b"one file", "expected several images, such as a list, got one bytes"),
        (["photo.png"], "expected an image as bytes, a pathlib.Path or a uint8 array, got str"),
        ([np.zeros((4, 4, 3))], r"expected uint8 pixels \(height, width, channels\), got float64"),
        ([np.zeros((4, 4), np.uint8)], r"got uint8 \(4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_sent(client, images, message):
    with pytest.raises(InputError, match=message):
        client.detect(images)


def test_a_refusal_tells_the_servers_reason(client):
    with pytest.raises(RefusedError, match="max_false_alarm_rate: expected a rate of at least 0.01"):
        client.detect([image_of(1)], max_false_alarm_rate=0.001)
    with pytest.raises(RefusedError, match="got 'other'"):
        client.detect([image_of(1)], model="other")


def test_a_failing_model_gives_a_server_error_with_an_id(client):
    with pytest.raises(ServerError, match="internal error, id "):
        client.detect([image_of(POISON)])


def test_a_timeout_is_said_with_its_seconds(client, detector):
    detector.hold()
    try:
        with pytest.raises(TimedOutError, match=r"no answer from .* within 0\.05 s"):
            client.detect([image_of(1)], timeout_seconds=0.05)
    finally:
        detector.gate.set()
    with pytest.raises(InputError, match="expected a timeout above 0 s, got 0"):
        client.detect([image_of(1)], timeout_seconds=0)


def test_an_overloaded_server_says_when_to_try_again():
    config = ServiceConfig(port=0, max_images_per_request=2, max_pending_images=2, notice_seconds=0.0)
    detector = FakeDetector()
    with running_server(detector, config) as target, Client(target) as first, Client(target) as second:
        detector.hold()
        with ThreadPoolExecutor() as pool:
            accepted = pool.submit(first.detect, [image_of(1), image_of(2)])
            assert detector.entered.wait(20)
            with pytest.raises(OverloadedError) as caught:
                second.detect([image_of(3)])
            detector.gate.set()
            assert [result.score for result in accepted.result()] == [1.0, 2.0]
    assert caught.value.retry_after_seconds > 0


def test_nobody_there_gives_one_line_and_no_trace_of_grpc(nobody):
    with Client(nobody) as client, pytest.raises(UnreachableError) as caught:
        client.detect([image_of(1)])
    assert str(caught.value).startswith(f"no server answers at {nobody}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_large_call_is_tried_again_while_the_server_is_unavailable():
    seen = []

    def unavailable_at_first(request, context):
        seen.append(len(request.images[0].encoded))
        if len(seen) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        return pb.DetectResponse(results=[pb.ImageResult(score=5.0)])

    handler = grpc.unary_unary_rpc_method_handler(
        unavailable_at_first, pb.DetectRequest.FromString, pb.DetectResponse.SerializeToString
    )
    with ThreadPoolExecutor() as pool:
        server = grpc.server(pool)
        server.add_registered_method_handlers("pathguard.v1.DetectionService", {"Detect": handler})
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with Client(f"127.0.0.1:{port}") as client:
            (result,) = client.detect([bytes(2_000_000)])
        server.stop(None).wait()
    assert (result.score, seen) == (5.0, [2_000_000] * 3)


def test_a_client_that_waits_gives_up_at_its_timeout(nobody):
    with Client(nobody, wait_for_ready=True) as client, pytest.raises(TimedOutError):
        client.models(timeout_seconds=0.1)


def test_the_models_of_a_server_are_listed(client):
    (model,) = client.models()
    assert (model.name, model.height, model.channels, model.smallest_false_alarm_rate) == ("fake", 4, 3, 0.01)
    assert model.layers == LAYERS


def test_a_ready_server_is_known_from_one_that_is_not_there(client, target, nobody):
    assert client.ready()
    assert check_health(target)
    assert not check_health(nobody, timeout_seconds=1.0)


def test_the_client_needs_neither_torch_nor_the_detector():
    code = "import sys, pathguard.client, pathguard.load; print({'torch', 'detector', 'sklearn'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def values_of(count):
    return [value % 200 for value in range(count)]


def test_a_stream_answers_every_image_once(client):
    values = values_of(700)
    answers = dict(client.detect_stream(image_of(value) for value in values))
    assert [answers[position].score for position in range(700)] == values


def test_a_stream_of_nothing_ends_at_once(client):
    assert list(client.detect_stream([])) == []


def test_bad_images_of_a_stream_carry_their_own_errors(client, tmp_path):
    images = [tmp_path / "missing.png", b"text", image_of(2), *[tmp_path / "missing.png"] * 70, image_of(3)]
    answers = dict(client.detect_stream(images))
    assert len(answers) == 74
    assert answers[0].error.startswith("expected a file that can be read")
    assert answers[1].error.startswith("expected a JPEG, PNG or WebP file")
    assert (answers[2].score, answers[73].score) == (2.0, 3.0)


def test_a_stream_reads_only_a_bounded_number_ahead(client, detector):
    read = []

    def images():
        for value in values_of(2000):
            read.append(value)
            yield image_of(value)

    answers = client.detect_stream(images())
    detector.hold()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(next, answers)
        assert detector.entered.wait(20)
        time.sleep(0.3)
        assert len(read) <= IMAGES_PER_MESSAGE * (MESSAGES_UNDER_WAY + 1)
        detector.gate.set()
        first.result()
    assert sum(1 for _ in answers) == 1999


def test_what_is_no_image_ends_a_stream(client):
    with pytest.raises(InputError, match="expected an image as bytes"):
        list(client.detect_stream([image_of(1), "photo.png"]))


def test_a_stream_that_is_refused_says_why(client):
    with pytest.raises(RefusedError, match="got 'other'"):
        list(client.detect_stream([image_of(1)], model="other"))


def test_a_stream_without_any_answer_ends_at_its_timeout(client, detector):
    detector.hold()
    try:
        with pytest.raises(TimedOutError, match=r"no answer from .* within 0\.1 s"):
            list(client.detect_stream([image_of(1)], timeout_seconds=0.1))
    finally:
        detector.gate.set()


def test_a_stream_to_nobody_gives_up(nobody):
    with Client(nobody) as client, pytest.raises(UnreachableError):
        list(client.detect_stream([image_of(1)]))


def test_a_stream_goes_on_where_it_was_when_its_server_is_restarted():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    config = replace(QUICK, port=port)
    values = values_of(3000)
    with ExitStack() as first, ExitStack() as second:
        target = first.enter_context(running_server(FakeDetector(), config))
        with Client(target, wait_for_ready=True) as client:
            answers = {}
            for position, result in client.detect_stream(image_of(value) for value in values):
                assert position not in answers
                answers[position] = result.score
                if len(answers) == 500:
                    first.close()
                    second.enter_context(running_server(FakeDetector(), config))
    assert [answers[position] for position in range(3000)] == values


def test_a_lost_call_that_still_asks_for_messages_gets_none(monkeypatch):
    class Lost(grpc.RpcError):
        pass

    class LostCall:
        def __next__(self):
            raise Lost

        def code(self):
            return grpc.StatusCode.UNAVAILABLE

        def cancel(self):
            pass

    class AnsweringCall:
        def __init__(self, sender):
            self.sender = sender

        def __next__(self):
            results = [pb.ImageResult(id=image.id, score=1.0) for image in next(self.sender).request.images]
            return pb.DetectStreamResponse(response=pb.DetectResponse(results=results))

        def cancel(self):
            pass

    senders, late = [], []

    def stream(sender, **_):
        senders.append(sender)
        if len(senders) > 1:
            return AnsweringCall(sender)
        next(sender)
        return LostCall()

    monkeypatch.setattr("pathguard.client.sync.time.sleep", lambda _: late.append(next(senders[0], None)))
    with Client("127.0.0.1:1") as client:
        monkeypatch.setattr(client._stub, "DetectStream", stream)
        answers = list(client.detect_stream(image_of(value) for value in values_of(100)))
    assert late == [None]
    assert [position for position, _ in answers] == list(range(100))


def test_a_token_goes_with_every_call_and_not_to_other_machines_in_the_clear():
    seen = []

    def see(request, context):
        seen.append(dict(context.invocation_metadata())["authorization"])
        return pb.ListModelsResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        see, pb.ListModelsRequest.FromString, pb.ListModelsResponse.SerializeToString
    )
    with ThreadPoolExecutor() as pool:
        server = grpc.server(pool)
        server.add_registered_method_handlers("pathguard.v1.DetectionService", {"ListModels": handler})
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with Client(f"127.0.0.1:{port}", access=Access(token="secret")) as client:
            client.models()
        server.stop(None).wait()
    assert seen == ["Bearer secret"]
    with pytest.raises(InputError, match=r"expected TLS for a token .* got none for example\.org:443"):
        Client("example.org:443", access=Access(token="secret"))
    with pytest.raises(InputError, match="expected both a certificate and its key"):
        Client("127.0.0.1:1", access=Access(certificate=Path("x.pem")))
    with pytest.raises(InputError, match=r"expected a PEM file that can be read, got missing\.pem"):
        Client("127.0.0.1:1", access=Access(ca=Path("missing.pem")))
