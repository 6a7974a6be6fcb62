"""What is fuzzed: each target takes bytes as they come from the wire and goes the way that the server goes with them.

A target tells how far the bytes came. Errors that are answers to a caller are expected; any other exception is a find.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image

from detector.errors import DetectorError
from detector.images import ImageSpec, decode, encode_png
from protos.inference import grpc_service_pb2 as inference
from protos.pathguard.v1 import detection_pb2 as pb
from service.access.callers import FULL
from service.errors import STATUS, UnknownModelError
from service.inference_requests import call_of, split_bytes
from service.messages import check_request, source_of
from tests.service.fakes import SPEC, FakeDetector, image_of

MAX_IMAGES = 64
# Small enough that a fuzzer does not spend its time on large images.
MAX_PIXELS = 1 << 16
MAX_BYTES = 4096

_MODEL = FakeDetector()
_RESIZED = ImageSpec(SPEC.height, SPEC.width, SPEC.channels, resize=True)


@dataclass(frozen=True, slots=True)
class Target:
    """One way in.

    Attributes:
        run: takes an input; True if it came past parsing, into the decoding of an image.
        seeds: inputs to begin with, most of them good.
    """

    run: Callable[[bytes], bool]
    seeds: Sequence[bytes]


def detect_request(content: bytes) -> bool:
    """A call of `pathguard.v1`."""
    try:
        request = pb.DetectRequest.FromString(content)
        if request.model not in ("", _MODEL.name):
            raise UnknownModelError("expected another model")
        check_request(request, _MODEL, MAX_IMAGES, FULL)
    except DecodeError:
        return False
    except DetectorError as error:
        return _expected(error, reached=False)
    return _decoded([source_of(image) for image in request.images])


def infer_request(content: bytes) -> bool:
    """A call of the Open Inference Protocol."""
    try:
        request = inference.ModelInferRequest.FromString(content)
        call = call_of(request, _MODEL, MAX_IMAGES, MAX_PIXELS, FULL)
    except DecodeError:
        return False
    except DetectorError as error:
        return _expected(error, reached=False)
    return _decoded(call.images)


def bytes_tensor(content: bytes) -> bool:
    """The elements of a BYTES tensor: the first byte says how many to expect."""
    count, blob = content[0] if content else 0, content[1:]
    try:
        elements = split_bytes(blob, count)
    except DetectorError as error:
        return _expected(error, reached=False)
    assert len(elements) == count
    assert sum(map(len, elements)) + 4 * count == len(blob)
    return count > 0


def image_file(content: bytes) -> bool:
    """A file, as it stands in either protocol."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")):
            reached = True
    except Exception:
        reached = False
    for spec in (SPEC, _RESIZED):
        try:
            pixels = decode(content, spec, MAX_PIXELS).pixels
            assert pixels.shape == (SPEC.height, SPEC.width, SPEC.channels)
            assert pixels.dtype == np.uint8
        except DetectorError as error:
            _expected(error, reached=reached)
    return reached


def _decoded(sources: Sequence[object]) -> bool:
    for source in sources[:MAX_IMAGES]:
        try:
            source.decode(SPEC, MAX_PIXELS)  # type: ignore[attr-defined]
        except DetectorError as error:
            _expected(error, reached=True)
    return bool(sources)


def _expected(error: DetectorError, *, reached: bool) -> bool:
    """Only what a caller is told about in plain words may come from a caller's bytes."""
    if type(error) not in STATUS or STATUS[type(error)].name == "INTERNAL":
        raise AssertionError(f"expected an error about the request, got {type(error).__name__}") from error
    return reached


def _files() -> list[bytes]:
    """Good files of all three formats and of several kinds."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (SPEC.height, SPEC.width, 3), dtype=np.uint8)
    files = [encode_png(pixels)]
    for mode, form, options in (
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
        ("RGB", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("P", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
    ):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, form, **options)
        files.append(file.getvalue())
    return files


def _detect_seeds() -> list[bytes]:
    raw = pb.Image(raw=pb.RawPixels(pixels=image_of(3).tobytes(), height=4, width=4, channels=3))
    requests = [
        pb.DetectRequest(images=[raw]),
        pb.DetectRequest(images=[raw, pb.Image(), raw], include_path=True, max_false_alarm_rate=0.1),
        *(pb.DetectRequest(images=[pb.Image(encoded=file)], model="fake") for file in _files()),
    ]
    return [request.SerializeToString() for request in requests]


def _infer_seeds() -> list[bytes]:
    tensor = inference.ModelInferRequest.InferInputTensor
    output = inference.ModelInferRequest.InferRequestedOutputTensor
    three = inference.InferParameter(int64_param=3)
    files = _files()
    requests = [
        inference.ModelInferRequest(
            model_name="fake",
            id="1",
            inputs=[tensor(name="IMAGES", datatype="UINT8", shape=[1, 4, 4, 3])],
            raw_input_contents=[image_of(3).tobytes()],
            outputs=[output(name="PROBS", parameters={"classification": three}), output(name="ADV_VERDICT")],
            parameters={"timeout": inference.InferParameter(int64_param=1000)},
        ),
        inference.ModelInferRequest(
            inputs=[
                tensor(
                    name="IMAGES",
                    datatype="UINT8",
                    shape=[1, 4, 4, 3],
                    contents=inference.InferTensorContents(uint_contents=list(image_of(3).tobytes())),
                )
            ],
            parameters={"max_false_alarm_rate": inference.InferParameter(string_param="0.1")},
        ),
        inference.ModelInferRequest(
            inputs=[tensor(name="IMAGE_BYTES", datatype="BYTES", shape=[3, 1])],
            raw_input_contents=[_tensor_of(files[:3])],
        ),
        inference.ModelInferRequest(
            inputs=[
                tensor(
                    name="IMAGE_BYTES",
                    datatype="BYTES",
                    shape=[1],
                    contents=inference.InferTensorContents(bytes_contents=files[1:2]),
                )
            ]
        ),
    ]
    return [request.SerializeToString() for request in requests]


def _tensor_of(elements: Sequence[bytes]) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "detect": Target(detect_request, _detect_seeds()),
        "infer": Target(infer_request, _infer_seeds()),
        "bytes": Target(bytes_tensor, [bytes([n]) + _tensor_of([b"x" * n] * n) for n in (1, 2, 5, 200)]),
        "image": Target(image_file, _files()),
    }
)
