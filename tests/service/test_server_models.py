"""The whole server: bundles that change while calls are answered."""

import asyncio
import json
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest

from detector.bundle import Bundle, DetectorInfo, add_detector, recalibrate
from detector.errors import ArtifactError
from detector.paths.encoder import Evidence, encode_set
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.scoring.classifier import default_estimator
from detector.scoring.detections import Detections
from detector.scoring.detector import Detector
from detector.scoring.thresholds import Calibration
from protos.inference import grpc_service_pb2 as oip
from protos.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.config import ModelsConfig, ServiceConfig
from service.errors import ConfigError
from service.models.repository import BundleFolders
from service.server import ModelSource, Server
from tests.service.fakes import FakeDetector, image_of, request_for
from tests.service.waiting import until

QUICK = {"port": 0, "max_batch": 4, "notice_seconds": 0.0, "drain_seconds": 5.0}


class Numbered(FakeDetector):
    """Answers with a score of a thousand times its number more."""

    def __init__(self, name, number):
        super().__init__()
        self.name, self.model_version, self._number = name, f"digest-{number}", number

    def detect(self, pixels):
        said = super().detect(pixels)
        return Detections(said.labels, said.probabilities, said.scores + 1000 * self._number, said.p_values, said.paths)


def load(found, name):
    text = (found.folder / "manifest.json").read_text()
    if not text.isdecimal():
        raise ArtifactError(f"expected a number, got {text!r}")
    return Numbered(name, int(text))


def write(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json.partial").write_text(str(text))
    (folder / "manifest.json.partial").replace(folder / "manifest.json")


@asynccontextmanager
async def serving_folder(folder, load=load, **models):
    config = ServiceConfig(**QUICK, models=ModelsConfig(poll_seconds=0.01, **models))
    server = Server(ModelSource(BundleFolders(models=folder), load), config)
    try:
        port = await server.start()
        await server.warm_up()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield server, DetectionServiceStub(channel), channel
    finally:
        await server.stop()


def metric(server, name, **labels):
    return server._metrics.registry.get_sample_value(name, labels)


async def version_of(stub):
    return (await stub.GetModel(pb.GetModelRequest())).model.model_version


async def become(stub, version):
    async with asyncio.timeout(20):
        while await version_of(stub) != version:  # noqa: ASYNC110 - there is nothing to be told by
            await asyncio.sleep(0.005)


async def test_bundles_change_under_load_without_a_lost_or_mixed_answer(tmp_path):
    write(tmp_path / "shoes" / "0", 0)
    over, seen = asyncio.Event(), {}

    async def call_again_and_again(stub, value):
        while not over.is_set():
            response = await stub.Detect(request_for(value, value + 1), timeout=20)
            number = int(response.model_version.removeprefix("digest-"))
            assert [result.score for result in response.results] == [1000 * number + value, 1000 * number + value + 1]
            seen[number] = seen.get(number, 0) + 1

    async with serving_folder(tmp_path, keep_versions=1) as (_, stub, _), asyncio.TaskGroup() as load:
        for value in range(8):
            load.create_task(call_again_and_again(stub, value))
        for number in range(8):
            write(tmp_path / "shoes" / str(number), number)
            await until(lambda number=number: number in seen)
        over.set()
    assert sorted(seen) == list(range(8))


async def test_a_broken_bundle_under_load_is_refused_and_the_old_one_goes_on(tmp_path):
    write(tmp_path / "shoes", 1)
    async with serving_folder(tmp_path) as (server, stub, _):
        write(tmp_path / "shoes", "broken")
        await until(lambda: metric(server, "pathguard_model_refused", model="shoes"))
        assert (await stub.Detect(request_for(5))).results[0].score == 1005.0
        assert metric(server, "pathguard_model_loads_total", model="shoes", outcome="refused") == 1
        write(tmp_path / "shoes", 2)
        await become(stub, "digest-2")
        assert metric(server, "pathguard_model_refused", model="shoes") == 0


async def test_a_request_under_way_ends_with_the_model_it_began_with(tmp_path):
    loaded = []

    def remember(found, name):
        loaded.append(load(found, name))
        return loaded[-1]

    write(tmp_path / "shoes", 1)
    async with serving_folder(tmp_path, remember) as (_, stub, _):
        loaded[0].hold()
        begun = asyncio.ensure_future(stub.Detect(request_for(5)))
        await loaded[0].running()
        write(tmp_path / "shoes", 2)
        await become(stub, "digest-2")
        loaded[0].gate.set()
        assert ((await begun).model_version, (await begun).results[0].score) == ("digest-1", 1005.0)
        assert (await stub.Detect(request_for(5))).results[0].score == 2005.0


async def test_versions_are_asked_for_by_name_or_digest_in_both_protocols_and_pinned_by_a_file(tmp_path):
    for number in (1, 2):
        write(tmp_path / "shoes" / str(number), number)
    write(tmp_path / "bags", 7)
    async with serving_folder(tmp_path, default="shoes") as (_, stub, channel):
        listed = (await stub.ListModels(pb.ListModelsRequest())).models
        assert [(model.name, model.model_version) for model in listed] == [
            ("shoes", "digest-2"), ("shoes", "digest-1"), ("bags", "digest-7"),
        ]  # fmt: skip
        for version in ("1", "digest-1"):
            request = request_for(5)
            request.model_version = version
            assert (await stub.Detect(request)).results[0].score == 1005.0
            infer = oip.ModelInferRequest(
                model_name="shoes", model_version=version, raw_input_contents=[image_of(5).tobytes()]
            )
            infer.inputs.add(name="IMAGES", datatype="UINT8", shape=[1, 4, 4, 3])
            infer.outputs.add(name="ADV_SCORE")
            answer = await GRPCInferenceServiceStub(channel).ModelInfer(infer)
            assert np.frombuffer(answer.raw_output_contents[0]).tolist() == [1005.0]

        (tmp_path / "shoes" / "serving.json").write_text(json.dumps({"version": "1", "max_false_alarm_rate": 0.2}))
        await become(stub, "digest-1")
        assert (await stub.Detect(request_for(5))).max_false_alarm_rate == 0.2
        (tmp_path / "shoes" / "serving.json").unlink()
        await become(stub, "digest-2")
        assert (await stub.Detect(request_for(5))).max_false_alarm_rate == 0.05


async def test_a_model_whose_largest_request_would_never_fit_does_not_come_into_service(tmp_path):
    write(tmp_path / "shoes", 1)
    config = ServiceConfig(**QUICK, max_pending_bytes=100)
    server = Server(ModelSource(BundleFolders([tmp_path / "shoes"]), load), config)
    with pytest.raises(ConfigError, match="expected max_pending_bytes of at least 49152 for 1024 images of 4 x 4 RGB"):
        await server.start()
    await server.stop()


async def test_a_real_bundle_gets_another_calibration_and_is_damaged_while_it_is_served(decoupled_bundle, digits):
    network = decoupled_bundle.network()
    evidence = Evidence.stacked(encode_set(network, digits.fitting))
    rows = rows_of(evidence)
    columns = features_named("gates+margins", EvidenceShape.of(evidence)).fit_transform(rows)
    estimator = default_estimator().fit(columns, digits.fitting.labels > 4)
    info = DetectorInfo("gates+margins", 0.05, ("none",))
    whole = add_detector(decoupled_bundle, info, estimator, Calibration(np.linspace(-1, 1, 99)), {})
    pixels = digits.test.pixels(slice(0, 1))
    image = pb.Image(raw=pb.RawPixels(pixels=pixels.tobytes(), height=8, width=8, channels=1))

    def load(found, name):
        return Detector(Bundle(found.folder), name)

    async with serving_folder(whole.folder.parent, load) as (server, stub, _):
        before = await stub.Detect(pb.DetectRequest(images=[image]))
        recalibrate(whole, Calibration(np.linspace(-9, 9, 49)), 0.1, {})
        await until(lambda: server._registry.find().max_false_alarm_rate == 0.1)
        after = await stub.Detect(pb.DetectRequest(images=[image]))
        assert (after.model_version, after.results[0].score) == (before.model_version, before.results[0].score)
        assert after.threshold_version != before.threshold_version

        part = next(whole.folder.glob("network-*"))
        content = part.read_bytes()
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        await until(lambda: metric(server, "pathguard_model_refused", model="bundle"))
        assert (await stub.Detect(pb.DetectRequest(images=[image]))).results[0] == after.results[0]
