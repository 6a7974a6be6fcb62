import asyncio

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from detector.images import ImageSpec, encode_png
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service import pipeline
from service.config import ServiceConfig
from service.server import Server, serving
from service.sources import FileSource
from tests.service.fakes import POISON, SPEC, FakeDetector, bits_of, image_of, message_of, request_for


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details = dict(caught.value.trailing_metadata()).get("grpc-status-details-bin", b"")
    return caught.value.code(), caught.value.details(), Status.FromString(details)


def violations(status):
    details = BadRequest()
    assert status.details[0].Unpack(details)
    return {violation.field: violation.description for violation in details.field_violations}


async def test_an_image_gets_label_score_p_value_and_verdict(served):
    response = await served.stub.Detect(request_for(7, 3))

    assert (response.model, response.model_version, response.threshold_version) == ("fake", "model-1", "threshold-1")
    assert response.max_false_alarm_rate == 0.05
    assert [(r.label, r.label_name, r.score, r.p_value, r.verdict) for r in response.results] == [
        (1, "shoe", 7.0, 0.08, pb.VERDICT_CLEAN),
        (0, "shirt", 3.0, 0.04, pb.VERDICT_ADVERSARIAL),
    ]
    assert list(response.results[0].probabilities) == [0.25, 0.5, 0.25]


async def test_files_and_raw_pixels_get_the_same_answer(served):
    request = pb.DetectRequest(images=[pb.Image(encoded=encode_png(image_of(7))), message_of(7)])
    first, second = (await served.stub.Detect(request)).results
    assert first == second


async def test_a_caller_sets_its_own_rate(served):
    request = request_for(7)
    request.max_false_alarm_rate = 0.08
    response = await served.stub.Detect(request)
    assert response.max_false_alarm_rate == 0.08
    assert response.results[0].verdict == pb.VERDICT_ADVERSARIAL


async def test_paths_come_only_when_asked_for(served):
    request = request_for(7)
    assert not (await served.stub.Detect(request)).results[0].path
    request.include_path = True
    response = await served.stub.Detect(request)
    assert response.results[0].path == np.packbits(bits_of(np.array([7]))).tobytes()
    assert [(layer.name, layer.channels) for layer in response.path_layout.layers] == [("stage1", 6), ("stage2", 5)]


async def test_labels_of_adversarial_images_are_restored_when_asked_for(served):
    request = request_for(7, 3)
    plain = (await served.stub.Detect(request)).results
    assert not any(result.HasField("restored_label") or result.restored_label_name for result in plain)
    request.correct = True
    clean, adversarial = (await served.stub.Detect(request)).results
    assert not clean.HasField("restored_label")
    assert (adversarial.label, adversarial.verdict) == (0, pb.VERDICT_ADVERSARIAL)
    assert (adversarial.restored_label, adversarial.restored_label_name) == (1, "shoe")


async def test_labels_are_restored_at_the_rate_of_the_call(served):
    request = request_for(7)
    request.correct, request.max_false_alarm_rate = True, 0.08
    (result,) = (await served.stub.Detect(request)).results
    assert (result.label, result.restored_label) == (1, 2)


async def test_a_model_without_statistics_restores_nothing(served):
    served.detector.restores = False
    request = request_for(3)
    request.correct = True
    code, _, status = await refusal(served.stub.Detect(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(status) == {"correct": "expected a model with statistics of paths, got fake without"}


async def test_many_images_are_answered_in_order_in_batches_within_the_limit(served):
    values = [value % 200 for value in range(500)]
    response = await served.stub.Detect(request_for(*values))
    assert [result.score for result in response.results] == values
    assert max(served.detector.batches) == 4


async def test_many_files_are_answered_in_order(served):
    values = list(range(3 * pipeline.DECODE_TOGETHER + 1))
    request = pb.DetectRequest(images=[pb.Image(encoded=encode_png(image_of(value))) for value in values])
    assert [result.score for result in (await served.stub.Detect(request)).results] == values


async def test_concurrent_callers_each_get_their_own_answers(served):
    responses = await asyncio.gather(*(served.stub.Detect(request_for(n, n + 1)) for n in range(60)))
    assert [[r.score for r in response.results] for response in responses] == [[n, n + 1] for n in range(60)]


async def test_a_bad_image_among_good_ones_carries_its_own_status(served):
    request = pb.DetectRequest(images=[message_of(1), pb.Image(encoded=b"text"), pb.Image(), message_of(2)])
    good, text, empty, other = (await served.stub.Detect(request)).results

    assert (good.score, good.status.code, other.score, other.status.code) == (1.0, 0, 2.0, 0)
    assert text.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert text.status.message.startswith("expected a JPEG, PNG or WebP file, got 4 bytes")
    assert violations(text.status) == {"images[1].encoded": text.status.message}
    assert list(violations(empty.status)) == ["images[2]"]
    assert text.verdict == pb.VERDICT_UNSPECIFIED


async def test_a_call_with_only_bad_images_is_ok_and_asks_no_model(served):
    before = list(served.detector.batches)
    response = await served.stub.Detect(pb.DetectRequest(images=[pb.Image(encoded=b"x")]))
    assert response.results[0].status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert served.detector.batches == before


async def test_an_image_that_the_model_chokes_on_leaves_its_neighbours_their_answers(served, caplog):
    bad, good = (await served.stub.Detect(request_for(POISON, 2))).results
    assert good.score == 2.0
    assert bad.status.code == grpc.StatusCode.INTERNAL.value[0]
    assert bad.status.message.startswith("internal error, id ")
    assert "secret text of the model" in caplog.text


async def test_a_model_that_fails_for_all_images_fails_the_call_and_its_text_stays_here(served):
    code, text, status = await refusal(served.stub.Detect(request_for(POISON)))
    assert code is grpc.StatusCode.INTERNAL
    assert text.startswith("internal error, id ")
    assert "secret" not in str(status)


async def test_a_decoder_that_fails_unexpectedly_fails_only_its_image(served, monkeypatch):
    def fragile(source, spec, max_pixels):
        raise KeyError("secret of the decoder")

    monkeypatch.setattr(FileSource, "decode", fragile)
    bad, good = (await served.stub.Detect(pb.DetectRequest(images=[pb.Image(encoded=b"x"), message_of(3)]))).results
    assert good.score == 3.0
    assert bad.status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in bad.status.message


@pytest.mark.parametrize("count", [0, 1025])
async def test_no_image_or_more_than_1024_refuse_the_whole_request(served, count):
    code, _, status = await refusal(served.stub.Detect(pb.DetectRequest(images=[pb.Image()] * count)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(status) == {"images": f"expected 1 to 1024 images, got {count}"}


async def test_a_rate_below_the_smallest_names_the_smallest(served):
    request = request_for(1)
    request.max_false_alarm_rate = 0.001
    code, _, status = await refusal(served.stub.Detect(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "at least 0.01 " in violations(status)["max_false_alarm_rate"]


async def test_an_unknown_model_is_not_found(served):
    request = request_for(1)
    request.model = "other"
    for call in (served.stub.Detect(request), served.stub.GetModel(pb.GetModelRequest(name="other"))):
        code, text, _ = await refusal(call)
        assert code is grpc.StatusCode.NOT_FOUND
        assert text == "expected a model that this server has (fake), got 'other'"


@pytest.mark.parametrize("name", ["", "fake"])
async def test_the_model_is_known_by_its_name_and_as_the_default(served, name):
    model = (await served.stub.GetModel(pb.GetModelRequest(name=name))).model
    assert model == (await served.stub.ListModels(pb.ListModelsRequest())).models[0]
    assert model.name == "fake"


async def test_a_message_over_the_limit_is_refused_and_the_next_one_is_answered(served):
    code, _, _ = await refusal(served.stub.Detect(pb.DetectRequest(images=[pb.Image(encoded=bytes(1_100_000))])))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await served.stub.Detect(request_for(1))).results[0].score == 1.0


async def test_a_full_queue_refuses_at_once_and_says_when_to_try_again():
    detector = FakeDetector()
    config = ServiceConfig(port=0, max_images_per_request=2, max_pending_images=2, notice_seconds=0.0)
    async with serving(detector, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = DetectionServiceStub(channel)
        detector.hold()
        accepted = stub.Detect(request_for(1, 2))
        running = asyncio.ensure_future(accepted)
        await detector.running()

        code, text, status = await refusal(stub.Detect(request_for(3)))
        detector.gate.set()

        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text == "expected room for 1 more images, got 2 of at most 2 waiting"
        assert status.details[0].Is(RetryInfo.DESCRIPTOR)
        assert [result.score for result in (await running).results] == [1.0, 2.0]


async def test_a_deadline_that_passes_in_the_queue_is_exceeded_and_the_image_is_never_run(served):
    served.detector.hold()
    first = asyncio.ensure_future(served.stub.Detect(request_for(1)))
    await served.detector.running()
    before = len(served.detector.batches)

    code, _, _ = await refusal(served.stub.Detect(request_for(2), timeout=0.2))
    served.detector.gate.set()

    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await first).results[0].score == 1.0
    assert (await served.stub.Detect(request_for(3))).results[0].score == 3.0
    assert served.detector.batches[before:] == [1]


async def test_a_caller_who_leaves_while_its_image_is_run_leaves_others_their_answers(served):
    served.detector.hold()
    leaving = served.stub.Detect(request_for(1))
    await served.detector.running()
    staying = asyncio.ensure_future(served.stub.Detect(request_for(2)))
    leaving.cancel()
    served.detector.gate.set()
    assert (await staying).results[0].score == 2.0


async def test_images_of_another_size_are_resized_only_if_the_model_says_so_and_the_answer_tells():
    detector = FakeDetector(ImageSpec(SPEC.height, SPEC.width, SPEC.channels, resize=True))
    large = pb.Image(raw=pb.RawPixels(pixels=bytes(8 * 8 * 3), height=8, width=8, channels=3))
    config = ServiceConfig(port=0, notice_seconds=0.0)
    async with serving(detector, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = DetectionServiceStub(channel)
        response = await stub.Detect(pb.DetectRequest(images=[large, message_of(1)]))
    assert [result.resized for result in response.results] == [True, False]


def feed_of(*requests):
    async def messages():
        for request in requests:
            yield pb.DetectStreamRequest(request=request)

    return messages()


async def all_scores(call):
    return [[result.score for result in response.response.results] async for response in call]


async def test_ids_come_back_with_their_images(served):
    request = request_for(1, 2)
    request.images[0].id, request.images[1].id = "first", "second"
    request.images.append(pb.Image(id="bad"))
    assert [result.id for result in (await served.stub.Detect(request)).results] == ["first", "second", "bad"]


async def test_a_model_is_found_by_its_version_too(served):
    request = request_for(1)
    request.model_version = "model-1"
    assert (await served.stub.Detect(request)).model_version == "model-1"
    request.model_version = "model-2"
    assert (await refusal(served.stub.Detect(request)))[0] is grpc.StatusCode.NOT_FOUND


async def test_a_feed_gets_an_answer_for_every_message(served):
    responses = await all_scores(served.stub.DetectStream(feed_of(*(request_for(n, n + 1) for n in range(100)))))
    assert sorted(responses) == [[n, n + 1] for n in range(100)]


async def test_bad_images_and_those_that_the_model_fails_on_never_end_a_feed(served):
    bad = pb.DetectRequest(images=[pb.Image(id="text", encoded=b"text")])
    call = served.stub.DetectStream(
        feed_of(bad, request_for(POISON), pb.DetectRequest(images=[pb.Image()]), request_for(3))
    )
    codes = sorted([response.response.results[0].status.code async for response in call])
    assert codes == [0, 3, 3, 13]


async def test_a_message_that_breaks_the_contract_ends_a_feed_after_the_others_are_answered(served):
    served.detector.hold()
    call = served.stub.DetectStream(feed_of(request_for(1), pb.DetectRequest(), request_for(2)))
    first = asyncio.ensure_future(anext(aiter(call)))
    await served.detector.running()
    served.detector.gate.set()
    assert (await first).response.results[0].score == 1.0
    code, text, _ = await refusal(all_scores(call))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text == "images: expected 1 to 1024 images, got 0"


async def test_a_feed_is_read_only_as_far_as_its_limit():
    detector, config = FakeDetector(), ServiceConfig(port=0, stream_in_flight=4, max_batch=2, notice_seconds=0.0)
    sent = []

    async def messages():
        for n in range(40):
            sent.append(n)
            yield pb.DetectStreamRequest(request=request_for(n, n))

    async with serving(detector, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        detector.hold()
        scores = asyncio.ensure_future(all_scores(DetectionServiceStub(channel).DetectStream(messages())))
        await detector.running()
        await asyncio.sleep(0.2)
        # Two messages are under way, one is in the server's hand, and some are on the wire.
        assert detector.batches[2:] == [2]
        detector.gate.set()
        assert sorted(await scores) == [[n, n] for n in range(40)]
    assert max(detector.batches) == 2


async def test_a_feed_waits_for_room_where_a_call_is_refused():
    detector = FakeDetector()
    config = ServiceConfig(port=0, max_images_per_request=2, max_pending_images=2, notice_seconds=0.0)
    async with serving(detector, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = DetectionServiceStub(channel)
        detector.hold()
        first = asyncio.ensure_future(stub.Detect(request_for(1, 2)))
        await detector.running()
        waiting = asyncio.ensure_future(all_scores(stub.DetectStream(feed_of(request_for(3)))))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        detector.gate.set()
        assert await waiting == [[3.0]]
        await first


async def test_a_stopping_server_answers_what_a_feed_has_sent_and_says_that_it_stops():
    detector = FakeDetector()
    server = Server(detector, ServiceConfig(port=0, notice_seconds=0.0))
    port = await server.start()
    await server.warm_up()

    async def endless():
        yield pb.DetectStreamRequest(request=request_for(1))
        await asyncio.Event().wait()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        detector.hold()
        call = DetectionServiceStub(channel).DetectStream(endless())
        first = asyncio.ensure_future(anext(aiter(call)))
        await detector.running()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.05)
        detector.gate.set()
        assert (await first).response.results[0].score == 1.0
        code, text, _ = await refusal(all_scores(call))
        await stopping
    assert (code, text) == (grpc.StatusCode.UNAVAILABLE, "the server is stopping, try again")


async def test_a_caller_who_leaves_a_feed_takes_nobody_with_it(served):
    served.detector.hold()
    leaving = served.stub.DetectStream(feed_of(*(request_for(n) for n in range(20))))
    reading = asyncio.ensure_future(all_scores(leaving))
    await served.detector.running()
    staying = asyncio.ensure_future(served.stub.Detect(request_for(7)))
    await asyncio.sleep(0.05)
    leaving.cancel()
    served.detector.gate.set()
    assert (await staying).results[0].score == 7.0
    with pytest.raises(asyncio.CancelledError):
        await reading


@pytest.mark.parametrize("size", [(4, 4), (200, 200)])
async def test_small_files_and_large_ones_are_decoded_alike(size):
    detector, height, width = FakeDetector(ImageSpec(*size, 3)), *size
    pixels = np.full((height, width, 3), 9, np.uint8)
    config = ServiceConfig(port=0, max_images_per_request=2, notice_seconds=0.0)
    async with serving(detector, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        response = await DetectionServiceStub(channel).Detect(
            pb.DetectRequest(images=[pb.Image(encoded=encode_png(pixels)), pb.Image(encoded=encode_png(pixels[:2]))])
        )
    good, bad = response.results
    assert good.score == 9.0
    assert bad.status.message == f"expected {height} x {width} pixels, got 2 x {width}"
