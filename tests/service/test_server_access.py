"""The whole server: encryption, credentials, roles and quotas, seen from outside."""

import asyncio
import contextlib
import hashlib
import json
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
import trustme
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from protos.inference import grpc_service_pb2 as oip
from protos.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.config import AccessConfig, ServiceConfig, TlsConfig
from service.errors import SettingsFileError
from service.server import Server, serving
from tests.service.fakes import FakeDetector, image_of, request_for
from tests.service.waiting import until

AUTHORITY = trustme.CA()
OTHER_AUTHORITY = trustme.CA()
# What has to be different in each test but is not what the test is about.
QUICK = {"port": 0, "max_batch": 4, "notice_seconds": 0.0, "drain_seconds": 5.0, "reload_seconds": 0.02}


def write(path, content):
    """As tools do that renew certificates: the file is there whole, or as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def put_certificate(folder, certificate):
    write(folder / "key.pem", certificate.private_key_pem.bytes())
    write(folder / "chain.pem", b"".join(blob.bytes() for blob in certificate.cert_chain_pems))


@pytest.fixture
def tls(tmp_path):
    put_certificate(tmp_path, AUTHORITY.issue_cert("localhost"))
    return TlsConfig(certificate=str(tmp_path / "chain.pem"), key=str(tmp_path / "key.pem"))


@pytest.fixture
def mtls(tls, tmp_path):
    write(tmp_path / "clients.pem", AUTHORITY.cert_pem.bytes())
    return TlsConfig(certificate=tls.certificate, key=tls.key, client_ca=str(tmp_path / "clients.pem"))


def channel_to(port, authority=AUTHORITY, client=None):
    key = client.private_key_pem.bytes() if client else None
    chain = b"".join(blob.bytes() for blob in client.cert_chain_pems) if client else None
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, chain)
    # One connection for each channel, so that each makes a handshake of its own.
    return grpc.aio.secure_channel(f"localhost:{port}", credentials, [("grpc.use_local_subchannel_pool", 1)])


@asynccontextmanager
async def answering(detector=None, **config):
    """A server without encryption, and a channel to it."""
    async with (
        serving(detector or FakeDetector(), ServiceConfig(**QUICK, **config)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


async def detect(channel, value=1, *, metadata=None, seconds=10.0, **options):
    request = request_for(value)
    for name, option in options.items():
        setattr(request, name, option)
    return (await DetectionServiceStub(channel).Detect(request, metadata=metadata, timeout=seconds)).results[0]


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details = dict(caught.value.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    return caught.value.code(), caught.value.details(), Status.FromString(details)


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


def credentials_file(path, **content):
    tokens = content.pop("tokens", {})
    entries = [
        {"name": name, "role": role, "sha256": hashlib.sha256(name.encode()).hexdigest()}
        for name, role in tokens.items()
    ]
    write(path, json.dumps({"tokens": entries, **content}).encode())
    return AccessConfig(file=str(path))


async def test_calls_are_encrypted_and_who_does_not_trust_the_authority_is_not_answered(tls):
    async with serving(FakeDetector(), ServiceConfig(**QUICK, tls=tls)) as port:
        async with channel_to(port) as channel:
            assert (await detect(channel)).score == 1.0
        async with channel_to(port, OTHER_AUTHORITY) as channel:
            assert (await refusal(detect(channel, seconds=2)))[0] is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
            assert (await refusal(detect(channel, seconds=2)))[0] is grpc.StatusCode.UNAVAILABLE


def test_with_encryption_other_machines_may_be_let_in(tls):
    assert ServiceConfig(host="0.0.0.0", tls=tls).host == "0.0.0.0"


async def test_only_clients_with_a_certificate_of_the_authority_are_answered(mtls):
    async with serving(FakeDetector(), ServiceConfig(**QUICK, tls=mtls)) as port:
        async with channel_to(port, client=AUTHORITY.issue_cert("client")) as channel:
            assert (await detect(channel)).score == 1.0
        expired = AUTHORITY.issue_cert("client", not_after=datetime.now(UTC) - timedelta(minutes=1))
        for client in (None, OTHER_AUTHORITY.issue_cert("client"), expired):
            async with channel_to(port, client=client) as channel:
                assert (await refusal(detect(channel, seconds=2)))[0] is grpc.StatusCode.UNAVAILABLE


async def test_certificates_change_under_load_without_a_lost_call(tls, tmp_path):
    server = Server(FakeDetector(), ServiceConfig(**QUICK, tls=tls))
    port = await server.start()
    await server.warm_up()
    over, answered = asyncio.Event(), [0, 0]

    async def call_again_and_again(channel, place):
        while not over.is_set():
            assert (await detect(channel, 7)).score == 7.0
            answered[place] += 1

    async def call_from_new_connections():
        while not over.is_set():
            async with channel_to(port) as channel:
                assert (await detect(channel, 7)).score == 7.0
            answered[1] += 1

    async with channel_to(port) as lasting, asyncio.TaskGroup() as load:
        load.create_task(call_again_and_again(lasting, 0))
        load.create_task(call_from_new_connections())
        for _ in range(5):
            before = server._certificate.value
            put_certificate(tmp_path, AUTHORITY.issue_cert("localhost"))
            await until(lambda before=before: server._certificate.value is not before)
            seen = answered[1]
            await until(lambda seen=seen: answered[1] > seen + 1)
        over.set()
    assert answered[0] > 5
    # What a new connection sees now is the last one.
    put_certificate(tmp_path, OTHER_AUTHORITY.issue_cert("localhost"))
    await until(lambda: server._metrics.registry.get_sample_value(
        "pathguard_file_reloads_total", {"file": "certificate", "outcome": "taken"}) >= 6)  # fmt: skip
    async with channel_to(port, OTHER_AUTHORITY) as channel:
        assert (await detect(channel)).score == 1.0
    await server.stop()


async def test_an_expired_or_foreign_certificate_is_not_taken_and_the_last_good_one_goes_on(tls, tmp_path):
    server = Server(FakeDetector(), ServiceConfig(**QUICK, tls=tls))
    port = await server.start()
    await server.warm_up()

    def refused():
        return server._metrics.registry.get_sample_value(
            "pathguard_file_reloads_total", {"file": "certificate", "outcome": "refused"}
        )

    put_certificate(tmp_path, AUTHORITY.issue_cert("localhost", not_after=datetime.now(UTC) - timedelta(days=1)))
    await until(refused)
    async with channel_to(port) as channel:
        assert (await detect(channel)).score == 1.0
    before = refused()
    write(tmp_path / "chain.pem", b"rubbish")
    await until(lambda: refused() > before)
    async with channel_to(port) as channel:
        assert (await detect(channel)).score == 1.0
    await server.stop()


async def test_an_expired_certificate_stops_the_start(tls, tmp_path):
    put_certificate(tmp_path, AUTHORITY.issue_cert("localhost", not_after=datetime.now(UTC) - timedelta(days=1)))
    with pytest.raises(SettingsFileError, match="expected a certificate that is valid now"):
        Server(FakeDetector(), ServiceConfig(**QUICK, tls=tls))


async def test_a_token_is_needed_and_told_what_was_wrong_but_probes_need_none(tmp_path):
    access = credentials_file(tmp_path / "access.json", tokens={"good": "full"})
    async with answering(access=access) as channel:
        assert (await detect(channel, metadata=bearer("good"))).score == 1.0
        for metadata, text in (
            (None, "expected a token in the metadata authorization: Bearer TOKEN, got none"),
            (bearer("bad"), "expected a token that this server knows, got another one"),
            ((("authorization", "Basic Z29vZA=="),), "expected authorization: Bearer TOKEN, got another kind of"),
        ):
            code, details, _ = await refusal(detect(channel, metadata=metadata))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert details.startswith(text)
        assert (await HealthStub(channel).Check(HealthCheckRequest())).status == HealthCheckResponse.SERVING
        assert (await GRPCInferenceServiceStub(channel).ServerReady(oip.ServerReadyRequest())).ready
        for call in (
            DetectionServiceStub(channel).ListModels(pb.ListModelsRequest()),
            GRPCInferenceServiceStub(channel).ServerMetadata(oip.ServerMetadataRequest()),
            DetectionServiceStub(channel).DetectStream(iter([pb.DetectStreamRequest()])).read(),
        ):
            assert (await refusal(call))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_a_role_sees_its_part_of_an_answer_and_sets_nothing_it_may_not(tmp_path):
    access = credentials_file(
        tmp_path / "access.json",
        tokens={"all": "full", "some": "verdict", "score": "scorer"},
        roles={"scorer": {"sees": ["score", "p_value"], "sets": ["max_false_alarm_rate"]}},
    )
    async with answering(access=access) as channel:
        every = await detect(channel, 7, metadata=bearer("all"), include_path=True, max_false_alarm_rate=0.5)
        assert (every.score, every.verdict, bool(every.path)) == (7.0, pb.VERDICT_ADVERSARIAL, True)

        some = await detect(channel, 7, metadata=bearer("some"))
        assert (some.label, some.label_name, some.verdict) == (1, "shoe", pb.VERDICT_CLEAN)
        assert (some.HasField("score"), some.p_value, len(some.probabilities), some.path) == (False, 0.0, 0, b"")

        score = await detect(channel, 7, metadata=bearer("score"), max_false_alarm_rate=0.5)
        assert (score.score, score.p_value, score.label_name, score.verdict) == (7.0, 0.08, "", 0)

        for options in ({"include_path": True}, {"max_false_alarm_rate": 0.5}):
            code, details, _ = await refusal(detect(channel, 7, metadata=bearer("some"), **options))
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert "which the role verdict may not" in details


def infer_request(*outputs, **parameters):
    request = oip.ModelInferRequest(model_name="fake", raw_input_contents=[image_of(7).tobytes()])
    request.inputs.add(name="IMAGES", datatype="UINT8", shape=[1, 4, 4, 3])
    for output in outputs:
        request.outputs.add(name=output)
    for name, value in parameters.items():
        request.parameters[name].double_param = value
    return request


async def test_a_role_counts_in_the_open_inference_protocol_too(tmp_path):
    access = credentials_file(tmp_path / "access.json", tokens={"all": "full", "some": "verdict"})
    async with answering(access=access) as channel:
        stub = GRPCInferenceServiceStub(channel)
        every = await stub.ModelInfer(infer_request(max_false_alarm_rate=0.5), metadata=bearer("all"))
        some = await stub.ModelInfer(infer_request(), metadata=bearer("some"))
        assert "ADV_SCORE" in {output.name for output in every.outputs}
        assert [output.name for output in some.outputs] == ["LABEL", "ADV_VERDICT"]
        for request in (infer_request("ADV_SCORE"), infer_request(max_false_alarm_rate=0.5)):
            code, _, _ = await refusal(stub.ModelInfer(request, metadata=bearer("some")))
            assert code is grpc.StatusCode.PERMISSION_DENIED


async def test_who_shows_nothing_has_the_anonymous_role_if_there_is_one(tmp_path):
    access = credentials_file(tmp_path / "access.json", anonymous="verdict")
    async with answering(access=access) as channel:
        assert not (await detect(channel)).HasField("score")


async def test_a_certificate_has_the_role_of_its_name_and_an_unknown_one_none(mtls, tmp_path):
    access = credentials_file(tmp_path / "access.json", certificates=[{"name": "batch.example.org", "role": "verdict"}])
    async with serving(FakeDetector(), ServiceConfig(**QUICK, tls=mtls, access=access)) as port:
        async with channel_to(port, client=AUTHORITY.issue_cert("batch.example.org")) as channel:
            assert not (await detect(channel)).HasField("score")
        async with channel_to(port, client=AUTHORITY.issue_cert("other.example.org")) as channel:
            code, details, _ = await refusal(detect(channel))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert details.endswith("got a certificate that this server does not know")


async def test_a_token_is_given_and_taken_away_without_a_restart(tmp_path):
    access = credentials_file(tmp_path / "access.json", tokens={"old": "full"})
    async with answering(access=access) as channel:

        async def known(token):
            with contextlib.suppress(grpc.aio.AioRpcError):
                return (await detect(channel, metadata=bearer(token))).score == 1.0
            return False

        assert (await known("old"), await known("new")) == (True, False)
        credentials_file(tmp_path / "access.json", tokens={"new": "full"})
        while not await known("new"):  # noqa: ASYNC110 - there is nothing to be told by
            await asyncio.sleep(0.01)
        assert not await known("old")
        write(tmp_path / "access.json", b"{")
        await asyncio.sleep(0.1)
        assert await known("new")


async def test_one_client_that_calls_too_often_is_told_when_to_try_again_and_others_are_not_disturbed(tmp_path):
    path = tmp_path / "access.json"
    credentials_file(path, tokens={"eager": "full", "calm": "full"})
    access = AccessConfig(file=str(path), calls_per_second=1.0, burst_seconds=3.0)
    async with answering(access=access) as channel:
        for _ in range(3):
            await detect(channel, metadata=bearer("eager"))
        code, details, status = await refusal(detect(channel, metadata=bearer("eager")))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details == "expected at most 1 calls a second from one client, got more"
        info = RetryInfo()
        assert status.details[0].Unpack(info)
        assert 0 < info.retry_delay.ToMilliseconds() <= 1000
        assert (await detect(channel, metadata=bearer("calm"))).score == 1.0


async def test_images_are_limited_too_in_both_protocols(tmp_path):
    access = AccessConfig(images_per_second=0.001, burst_seconds=3000.0)
    async with answering(access=access) as channel:
        stub = DetectionServiceStub(channel)
        await stub.Detect(request_for(1, 2))
        await GRPCInferenceServiceStub(channel).ModelInfer(infer_request())
        code, details, _ = await refusal(stub.Detect(request_for(1)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "images a second from one client" in details


async def test_a_call_that_takes_too_long_is_ended_though_its_client_would_wait():
    detector = FakeDetector()
    async with answering(detector, max_call_seconds=0.1) as channel:
        detector.hold()
        began = time.monotonic()
        code, details, _ = await refusal(DetectionServiceStub(channel).Detect(request_for(1)))
        detector.gate.set()
        assert (code, details) == (
            grpc.StatusCode.DEADLINE_EXCEEDED, "expected a call of at most 0.1 s, got one longer",
        )  # fmt: skip
        assert time.monotonic() - began < 5
        assert (await detect(channel)).score == 1.0


async def test_nothing_of_a_token_is_logged(tmp_path, caplog):
    access = credentials_file(tmp_path / "access.json", tokens={"s3cret": "full"})
    with caplog.at_level("DEBUG"):
        async with answering(access=access) as channel:
            await detect(channel, metadata=bearer("s3cret"))
            with contextlib.suppress(grpc.aio.AioRpcError):
                await detect(channel, metadata=bearer("s3cret2"))
    assert "s3cret" not in caplog.text
