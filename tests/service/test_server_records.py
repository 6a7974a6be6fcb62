"""The whole server: what it tells and keeps of its work."""

import asyncio
import json
import resource
import signal
import sys
import urllib.request
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.config import AuditConfig, DriftConfig, MetricsConfig, QueryWatchConfig, ServiceConfig
from service.records.logs import JsonFormatter, TextFormatter
from service.server import Server
from tests.service.fakes import POISON, FakeDetector, message_of, request_for
from tests.service.waiting import until

QUICK = {"port": 0, "max_batch": 4, "notice_seconds": 0.0, "drain_seconds": 5.0}


@asynccontextmanager
async def answering(detector=None, **config):
    """A server and a channel to it."""
    server = Server(detector or FakeDetector(), ServiceConfig(**QUICK, **config))
    try:
        port = await server.start()
        await server.warm_up()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield server, channel
    finally:
        await server.stop()


def metric(server, name, **labels):
    return server._metrics.registry.get_sample_value(name, labels)


async def test_metrics_tell_calls_verdicts_batches_refusals_and_the_model_on_a_port_of_their_own():
    async with answering(metrics=MetricsConfig(port=0), max_images_per_request=3) as (server, channel):
        stub = DetectionServiceStub(channel)
        await stub.Detect(request_for(3, 7, POISON))
        await stub.Detect(pb.DetectRequest(images=[pb.Image(encoded=b"x"), message_of(7)]))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Detect(request_for(1, 2, 3, 4))

        def read():
            with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as response:
                return response.read().decode()

        text = await asyncio.to_thread(read)
    for line in (
        'grpc_server_handled_total{grpc_code="OK",grpc_method="Detect",grpc_service="pathguard.v1.DetectionService",'
        'grpc_type="unary"} 2.0',
        'grpc_code="InvalidArgument",grpc_method="Detect"',
        'pathguard_verdicts_total{model="fake",model_version="model-1",verdict="adversarial"} 1.0',
        'pathguard_verdicts_total{model="fake",model_version="model-1",verdict="clean"} 2.0',
        'pathguard_verdicts_total{model="fake",model_version="model-1",verdict="none"} 2.0',
        'pathguard_score_bucket{le="5.0",model="fake"} 1.0',
        'pathguard_p_value_bucket{le="0.05",model="fake"} 1.0',
        "pathguard_batch_images_bucket{le=",
        "pathguard_queue_wait_seconds_count",
        "pathguard_queue_images 0.0",
        "pathguard_serving 1.0",
        'pathguard_model_info{model="fake",model_version="model-1",threshold_version="threshold-1",version="model-1"}',
    ):
        assert line in text


async def test_what_is_refused_for_load_is_counted_by_reason():
    detector = FakeDetector()
    async with answering(detector, max_images_per_request=2, max_pending_images=2) as (server, channel):
        stub = DetectionServiceStub(channel)
        detector.hold()
        taken = asyncio.ensure_future(stub.Detect(request_for(1, 2)))
        await detector.running()
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Detect(request_for(3))
        assert metric(server, "pathguard_queue_images") == 2
        detector.gate.set()
        await taken
        assert metric(server, "pathguard_shed_total", reason="images") == 1


async def test_a_model_that_hangs_is_told_by_health_and_so_is_its_recovery():
    detector = FakeDetector()
    async with answering(detector, stall_seconds=0.05) as (server, channel):
        detector.hold()
        hanging = asyncio.ensure_future(DetectionServiceStub(channel).Detect(request_for(1)))
        watch = HealthStub(channel).Watch(HealthCheckRequest())
        states = [(await watch.read()).status, (await watch.read()).status]
        detector.gate.set()
        states.append((await watch.read()).status)
        assert (await hanging).results[0].score == 1.0
        assert metric(server, "pathguard_serving") == 1
        watch.cancel()
    serving, not_serving = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
    assert states == [serving, not_serving, serving]


async def test_the_audit_log_says_who_was_told_what_and_holds_no_pixel(tmp_path):
    path = tmp_path / "audit.jsonl"
    async with answering(audit=AuditConfig(file=str(path))) as (_, channel):
        stub = DetectionServiceStub(channel)
        request = request_for(3, POISON)
        request.images.append(pb.Image(encoded=b"x"))
        await stub.Detect(request, metadata=(("x-request-id", "order-17"),))
        (line,) = path.read_text().splitlines()
    record = json.loads(line)
    said, failed = record.pop("images")
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "request_id": "order-17",
        "caller": "ip:127.0.0.1",
        "role": "full",
        "model": "fake",
        "model_version": "model-1",
        "threshold_version": "threshold-1",
        "max_false_alarm_rate": 0.05,
        "undecoded": 1,
    }
    assert len(said.pop("sha256")) == 64
    assert said == {"label": 0, "score": 3.0, "p_value": 0.04, "verdict": "adversarial"}
    assert failed["error"] == "RuntimeError"


@asynccontextmanager
async def process(*settings, limit_bytes=None):
    """A server in a process of its own whose files may have `limit_bytes`, and a stub."""

    def limit():
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.service.serve_fake", *settings, "PATHGUARD_MAX_BATCH=32",
        stdout=asyncio.subprocess.PIPE, preexec_fn=limit,
    )  # fmt: skip
    try:
        target = (await started.stdout.readline()).decode().rpartition(" ")[2].strip()
        async with grpc.aio.insecure_channel(target) as channel:
            yield started, DetectionServiceStub(channel)
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def test_a_killed_server_has_no_answer_out_that_its_audit_log_does_not_know(tmp_path):
    path = tmp_path / "audit.jsonl"
    answered = []

    async def call_again_and_again(stub, caller):
        for turn in range(10_000):
            number = f"{caller}-{turn}"
            try:
                await stub.Detect(request_for(1), metadata=(("x-request-id", number),))
            except grpc.aio.AioRpcError:
                return
            answered.append(number)

    async with process(f"PATHGUARD_AUDIT_FILE={path}") as (server, stub):
        callers = [asyncio.create_task(call_again_and_again(stub, caller)) for caller in range(16)]
        await until(lambda: len(answered) > 20)
        server.send_signal(signal.SIGKILL)
        await asyncio.gather(*callers)
    *lines, rest = path.read_text().split("\n")
    known = {json.loads(line)["request_id"] for line in lines}
    assert known >= set(answered)
    assert rest == "" or not rest.endswith("}")

    # The next server goes on with the same file.
    async with answering(audit=AuditConfig(file=str(path))) as (_, channel):
        await DetectionServiceStub(channel).Detect(request_for(1), metadata=(("x-request-id", "after"),))
    assert json.loads(path.read_text().splitlines()[-1])["request_id"] == "after"


async def test_a_full_disk_at_the_audit_log_fails_no_call(tmp_path):
    path = tmp_path / "audit.jsonl"
    async with process(f"PATHGUARD_AUDIT_FILE={path}", limit_bytes=2000) as (_, stub):
        responses = await asyncio.gather(*(stub.Detect(request_for(value)) for value in range(8)))
        assert [response.results[0].score for response in responses] == list(range(8))
    assert 1000 < path.stat().st_size <= 2000


async def test_drift_and_suspicious_queries_are_counted_where_they_are_watched_for():
    drift, watch = DriftConfig(window_images=100, level=0.001), QueryWatchConfig(memory_images=100, neighbours=20)
    async with answering(drift=drift, query_watch=watch) as (server, channel):
        stub = DetectionServiceStub(channel)
        # Even p-values: values 0 to 99 give each of 0.01 to 1 once; the images differ in one pixel of 16 only.
        await stub.Detect(request_for(*range(100)))
        await until(lambda: metric(server, "pathguard_flagged_share", model="fake") is not None)
        assert metric(server, "pathguard_flagged_share", model="fake") == 0.05
        assert metric(server, "pathguard_drift_p_value", model="fake", test="share") > 0.1
        await stub.Detect(request_for(*[2] * 100))
        await until(lambda: metric(server, "pathguard_drift_alarms_total", model="fake", test="share"))
        assert metric(server, "pathguard_drift_alarms_total", model="fake", test="p_values") == 1
        await until(lambda: metric(server, "pathguard_query_watch_alarms_total") >= 4)
        assert metric(server, "pathguard_query_watch_clients") == 1


async def test_nothing_is_watched_unless_it_is_asked_for():
    async with answering() as (server, channel):
        await DetectionServiceStub(channel).Detect(request_for(*[2] * 100))
        assert metric(server, "pathguard_query_watch_alarms_total") == 0
        assert server._books._watcher is None
        assert server._books._audit is None


async def test_setting_the_date_disturbs_no_call(monkeypatch):
    async with answering() as (_, channel):
        for date in (0.0, 4e9):
            monkeypatch.setattr("time.time", lambda date=date: date)
            response = await DetectionServiceStub(channel).Detect(request_for(3))
            assert response.results[0].score == 3.0


async def test_no_pixel_is_logged_even_if_the_model_fails_with_one_in_its_words(caplog):
    class Talkative(FakeDetector):
        def detect(self, pixels):
            if pixels.any():
                raise RuntimeError(f"cannot take {np.full((64, 64), 201).tolist()}")
            return super().detect(pixels)

    with caplog.at_level("DEBUG"):
        async with answering(Talkative()) as (_, channel):
            with pytest.raises(grpc.aio.AioRpcError):
                await DetectionServiceStub(channel).Detect(request_for(201))
    for formatter in (JsonFormatter(), TextFormatter()):
        text = "\n".join(formatter.format(record) for record in caplog.records)
        assert "cannot take" in text
        assert text.count("201") < 100
