"""Our server and its peers as a benchmark calls them: pixels in, labels out, over one connection that stays open."""

import base64
import http.client
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.server import foreign_server, free_port
from detector.images import Pixels
from protos.inference import grpc_service_pb2 as inference
from protos.pathguard.v1 import detection_pb2 as pb

_SECONDS = 60.0
Ask = Callable[[bytes], list[int]]


@dataclass(frozen=True, slots=True)
class Side:
    """One server.

    Attributes:
        name: for the table.
        request: the body of a call for pixels `(images, height, width, channels)`.
        caller: a connection: takes a body, gives the labels; a context manager, for one thread.
    """

    name: str
    request: Callable[[Pixels], bytes]
    caller: Callable[[], Any]


def ours(target: str) -> Side:
    """Our server by its own protocol."""

    def request(pixels: Pixels) -> bytes:
        _, height, width, channels = pixels.shape
        raw = [pb.RawPixels(pixels=one.tobytes(), height=height, width=width, channels=channels) for one in pixels]
        return pb.DetectRequest(images=[pb.Image(raw=one) for one in raw]).SerializeToString()

    @contextmanager
    def caller() -> Iterator[Ask]:
        with _channel(target) as channel:
            detect: Any = channel.unary_unary(
                "/pathguard.v1.DetectionService/Detect", response_deserializer=pb.DetectResponse.FromString
            )
            yield lambda body: [_label_of(result) for result in detect(body, timeout=_SECONDS).results]

    return Side("pathguard", request, caller)


def mlserver(target: str) -> Side:
    """MLServer, over gRPC."""

    def request(pixels: Pixels) -> bytes:
        tensor = inference.ModelInferRequest.InferInputTensor(name="IMAGES", datatype="UINT8", shape=list(pixels.shape))
        return inference.ModelInferRequest(
            model_name="peer", inputs=[tensor], raw_input_contents=[pixels.tobytes()]
        ).SerializeToString()

    @contextmanager
    def caller() -> Iterator[Ask]:
        with _channel(target) as channel:
            infer: Any = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                response_deserializer=inference.ModelInferResponse.FromString,
            )

            def ask(body: bytes) -> list[int]:
                response = infer(body, timeout=_SECONDS)
                labels: list[int] = np.frombuffer(response.raw_output_contents[0], dtype=np.int64).tolist()
                return labels

            yield ask

    return Side("MLServer", request, caller)


def litserve(port: int) -> Side:
    """LitServe, over HTTP with JSON."""

    def request(pixels: Pixels) -> bytes:
        return json.dumps({"shape": pixels.shape, "pixels": base64.b64encode(pixels.tobytes()).decode()}).encode()

    @contextmanager
    def caller() -> Iterator[Ask]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)

        def ask(body: bytes) -> list[int]:
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            if response.status != http.client.OK:
                raise RuntimeError(f"expected an answer, got {response.status}: {content[:200]!r}")
            labels: list[int] = json.loads(content)["labels"]
            return labels

        try:
            yield ask
        finally:
            connection.close()

    return Side("LitServe", request, caller)


@contextmanager
def peers(bundle: Path, mlserver_python: Path | None, litserve_python: Path | None) -> Iterator[list[Side]]:
    """Those peers whose Python is given, serving the detector of `bundle`.

    Raises:
        RuntimeError: one of them does not start.
    """
    sides = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        for name, python in (("mlserver_peer", mlserver_python), ("litserve_peer", litserve_python)):
            if python is None:
                continue
            port = free_port()
            side = litserve(port) if name == "litserve_peer" else mlserver(f"127.0.0.1:{port}")
            command = [str(python.absolute()), "-m", f"benchmarks.peers.{name}", str(bundle.resolve()), str(port)]
            stack.enter_context(foreign_server(command, folder / name, partial(_ask_once, side, bundle)))
            sides.append(side)
        yield sides


def _ask_once(side: Side, bundle: Path) -> None:
    from detector.bundle import Bundle

    spec = Bundle(bundle).manifest.network.spec
    with side.caller() as ask:
        labels = ask(side.request(np.zeros((1, spec.height, spec.width, spec.channels), dtype=np.uint8)))
    if len(labels) != 1:
        raise RuntimeError(f"expected one label, got {labels}")


def _label_of(result: pb.ImageResult) -> int:
    if result.status.code:
        raise RuntimeError(f"expected an answer, got {result.status.message}")
    return result.label


def _channel(target: str) -> grpc.Channel:
    size = 64 * 1024 * 1024
    return grpc.insecure_channel(
        target, [("grpc.max_send_message_length", size), ("grpc.max_receive_message_length", size)]
    )
