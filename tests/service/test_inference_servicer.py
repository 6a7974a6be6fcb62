import asyncio
import json

import grpc
import numpy as np
import pytest

from detector.images import encode_png
from protos.inference import grpc_service_pb2 as pb
from protos.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.config import ServiceConfig
from service.server import Server
from tests.service.fakes import CLASSES, LAYERS, POISON, FakeDetector, bits_of, image_of, request_for
from tests.service.inference_calls import files_request, framed, numbers, parameter, pixels_request
from tests.service.test_servicer import refusal


@pytest.fixture
def stub(served):
    return GRPCInferenceServiceStub(served.channel)


async def test_the_server_and_its_models_are_alive_and_ready(stub):
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert (await stub.ModelReady(pb.ModelReadyRequest(name="fake"))).ready
    assert (await stub.ModelReady(pb.ModelReadyRequest(name="fake", version="model-1"))).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready


async def test_a_server_that_is_not_warm_is_alive_and_not_ready():
    server = Server(FakeDetector(), ServiceConfig(port=0, notice_seconds=0.0))
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="fake"))).ready
        assert (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models[0].state == "UNAVAILABLE"
        assert not (await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
        assert (await refusal(stub.ModelInfer(pixels_request(1))))[0] is grpc.StatusCode.UNAVAILABLE
    await server.stop()


async def test_the_server_tells_what_it_is(stub):
    metadata = await stub.ServerMetadata(pb.ServerMetadataRequest())
    assert metadata.name == "pathguard"
    assert metadata.version
    assert "classification" in metadata.extensions


async def test_a_model_tells_its_tensors(stub):
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="fake"))
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("fake", ["model-1"], "pathguard")
    assert {t.name: (t.datatype, list(t.shape)) for t in metadata.inputs} == {
        "IMAGES": ("UINT8", [-1, 4, 4, 3]),
        "IMAGE_BYTES": ("BYTES", [-1]),
    }
    assert {t.name: (t.datatype, list(t.shape)) for t in metadata.outputs} == {
        "LABEL": ("INT64", [-1]),
        "PROBS": ("FP32", [-1, 3]),
        "ADV_SCORE": ("FP64", [-1]),
        "P_VALUE": ("FP64", [-1]),
        "ADV_VERDICT": ("UINT8", [-1]),
        "PATH_ENCODING": ("UINT8", [-1, 2]),
    }


async def test_a_model_tells_how_it_is_served(stub):
    config = (await stub.ModelConfig(pb.ModelConfigRequest(name="fake"))).config
    assert (config.name, config.max_batch_size, config.WhichOneof("scheduling_choice")) == (
        "fake",
        1024,
        "dynamic_batching",
    )
    assert [(tensor.name, list(tensor.dims), tensor.optional) for tensor in config.input] == [
        ("IMAGES", [4, 4, 3], False),
        ("IMAGE_BYTES", [1], True),
    ]
    assert json.loads(config.parameters["class_names"].string_value) == list(CLASSES)
    assert json.loads(config.parameters["path_layout"].string_value) == LAYERS


async def test_all_models_are_listed(stub):
    models = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert [(model.name, model.version, model.state) for model in models] == [("fake", "model-1", "READY")]


async def test_an_unknown_model_is_not_found(stub):
    for call in (
        stub.ModelMetadata(pb.ModelMetadataRequest(name="other")),
        stub.ModelConfig(pb.ModelConfigRequest(name="fake", version="9")),
        stub.ModelStatistics(pb.ModelStatisticsRequest(name="other")),
        stub.ModelInfer(pixels_request(1, model_name="other")),
    ):
        assert (await refusal(call))[0] is grpc.StatusCode.NOT_FOUND


async def test_who_asks_in_bytes_is_answered_in_bytes(stub):
    response = await stub.ModelInfer(pixels_request(7, 3, id="call 5", model_name="fake"))
    assert (response.id, response.model_name, response.model_version) == ("call 5", "fake", "model-1")
    assert not any(output.HasField("contents") for output in response.outputs)
    values = numbers(response)
    assert values["LABEL"].tolist() == [1, 0]
    np.testing.assert_array_equal(values["PROBS"], np.float32([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]))
    assert values["ADV_SCORE"].tolist() == [7.0, 3.0]
    assert values["P_VALUE"].tolist() == [0.08, 0.04]
    assert values["ADV_VERDICT"].tolist() == [1, 2]
    assert response.parameters["threshold_version"].string_param == "threshold-1"
    assert response.parameters["max_false_alarm_rate"].double_param == 0.05


async def test_who_asks_in_numbers_is_answered_in_numbers(stub):
    response = await stub.ModelInfer(pixels_request(7, 3, raw=False))
    assert not response.raw_output_contents
    contents = {output.name: output.contents for output in response.outputs}
    assert list(contents["LABEL"].int64_contents) == [1, 0]
    assert list(contents["PROBS"].fp32_contents) == [0.25, 0.5, 0.25, 0.5, 0.25, 0.25]
    assert list(contents["ADV_SCORE"].fp64_contents) == [7.0, 3.0]
    assert list(contents["ADV_VERDICT"].uint_contents) == [1, 2]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("shape", [[2], [2, 1]])
async def test_files_get_the_answers_of_their_pixels(stub, raw, shape):
    files = [encode_png(image_of(value)) for value in (7, 3)]
    response = await stub.ModelInfer(files_request(*files, raw=raw, shape=shape))
    of_pixels = await stub.ModelInfer(pixels_request(7, 3, raw=raw))
    assert response == of_pixels


async def test_paths_come_when_asked_for(stub):
    response = await stub.ModelInfer(pixels_request(37, 5, outputs=("PATH_ENCODING",)))
    np.testing.assert_array_equal(numbers(response)["PATH_ENCODING"], np.packbits(bits_of(np.array([37, 5])), axis=1))


@pytest.mark.parametrize(("classes", "named"), [(1, 1), (2, 2), (99, 3)])
async def test_the_most_probable_classes_are_named(stub, classes, named):
    request = pixels_request(7, outputs=("PROBS",))
    request.outputs[0].parameters["classification"].CopyFrom(parameter(classes))
    expected = [b"0.500000:1:shoe", b"0.250000:0:shirt", b"0.250000:2:bag"][:named]

    response = await stub.ModelInfer(request)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [1, named])
    assert response.raw_output_contents[0] == framed(*expected)

    request.inputs[0].contents.uint_contents.extend(request.raw_input_contents.pop())
    response = await stub.ModelInfer(request)
    assert list(response.outputs[0].contents.bytes_contents) == expected


async def test_a_caller_sets_its_own_rate(stub):
    request = pixels_request(7, outputs=("ADV_VERDICT",), parameters={"max_false_alarm_rate": parameter(0.08)})
    assert numbers(await stub.ModelInfer(request))["ADV_VERDICT"].tolist() == [2]


async def test_a_bad_image_among_good_ones_never_looks_clean_and_says_why(stub):
    request = files_request(encode_png(image_of(7)), b"text")
    response = await stub.ModelInfer(request)
    values = numbers(response)
    assert values["LABEL"].tolist() == [1, -1]
    assert values["P_VALUE"].tolist() == [0.08, 0.0]
    assert values["ADV_SCORE"].tolist() == [7.0, np.inf]
    assert values["ADV_VERDICT"].tolist() == [1, 0]
    assert response.parameters["error[1]"].string_param.startswith("expected a JPEG, PNG or WebP file")

    request.outputs.add(name="PROBS").parameters["classification"].int64_param = 1
    request.outputs.add(name="PATH_ENCODING")
    response = await stub.ModelInfer(request)
    assert response.raw_output_contents[0] == framed(b"0.500000:1:shoe", b"")
    assert response.raw_output_contents[1][2:] == b"\0\0"


async def test_a_call_without_one_good_image_fails(stub):
    code, text, _ = await refusal(stub.ModelInfer(files_request(b"text")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith("expected a JPEG, PNG or WebP file")
    code, text, _ = await refusal(stub.ModelInfer(pixels_request(POISON)))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in text


async def test_a_timeout_ends_a_call_that_waits(served, stub):
    served.detector.hold()
    running = asyncio.ensure_future(stub.ModelInfer(pixels_request(1)))
    await served.detector.running()
    batches = list(served.detector.batches)
    waiting = asyncio.ensure_future(stub.ModelInfer(pixels_request(2, parameters={"timeout": parameter(50_000)})))
    await asyncio.sleep(0.2)
    served.detector.gate.set()
    assert (await refusal(waiting))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert numbers(await running)["LABEL"].tolist() == [1]
    assert served.detector.batches == batches


async def test_counts_and_times_of_both_protocols_are_told(served, stub):
    await stub.ModelInfer(pixels_request(1, 2))
    await DetectionServiceStub(served.channel).Detect(request_for(3))
    await refusal(stub.ModelInfer(pixels_request(POISON)))
    (told,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
    stats = told.inference_stats
    assert (told.name, told.version, told.inference_count) == ("fake", "model-1", 3)
    assert told.last_inference > 1_500_000_000_000
    assert (stats.success.count, stats.fail.count, stats.compute_infer.count) == (2, 1, 2)
    parts = stats.queue.ns + stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
    assert 0 < parts <= stats.success.ns
    # The two batches of the warm-up count too: 1 image and as many as a batch may have.
    assert {b.batch_size: b.compute_infer.count for b in told.batch_stats} == {1: 3, 2: 1, 4: 1}
    assert told.execution_count == 5


async def test_a_repository_by_name_is_unknown(stub):
    code, _, _ = await refusal(stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="other")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_this_server_does_not_do_is_unimplemented(served):
    load = served.channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
    assert (await refusal(load(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED
