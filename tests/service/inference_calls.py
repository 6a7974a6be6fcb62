"""Requests of the Open Inference Protocol, made by hand as its clients make them."""

import numpy as np

from protos.inference import grpc_service_pb2 as pb
from tests.service.fakes import image_of


def framed(*elements: bytes) -> bytes:
    """A BYTES tensor on the wire."""
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def pixels_request(*values: int, outputs=(), raw=True, **fields) -> pb.ModelInferRequest:
    """One image of raw pixels for each value, as bytes or as numbers."""
    pixels = np.stack([image_of(value) for value in values])
    request = pb.ModelInferRequest(
        inputs=[pb.ModelInferRequest.InferInputTensor(name="IMAGES", datatype="UINT8", shape=pixels.shape)],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        **fields,
    )
    if raw:
        request.raw_input_contents.append(pixels.tobytes())
    else:
        request.inputs[0].contents.uint_contents.extend(pixels.ravel().tolist())
    return request


def files_request(*files: bytes, shape=None, raw=True) -> pb.ModelInferRequest:
    """One image for each file."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="IMAGE_BYTES", datatype="BYTES", shape=shape or [len(files)])
    request = pb.ModelInferRequest(inputs=[tensor])
    if raw:
        request.raw_input_contents.append(framed(*files))
    else:
        request.inputs[0].contents.bytes_contents.extend(files)
    return request


def parameter(value) -> pb.InferParameter:
    """A parameter of the kind that Python's type says; `uint64` for a whole number as a tuple of one."""
    match value:
        case bool():
            return pb.InferParameter(bool_param=value)
        case int():
            return pb.InferParameter(int64_param=value)
        case float():
            return pb.InferParameter(double_param=value)
        case str():
            return pb.InferParameter(string_param=value)
        case (number,):
            return pb.InferParameter(uint64_param=number)
        case _:
            return pb.InferParameter()


def numbers(response: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    """The outputs of a raw answer that are numbers, by name."""
    types = {"INT64": "<i8", "FP32": "<f4", "FP64": "<f8", "UINT8": "u1"}
    return {
        output.name: np.frombuffer(content, types[output.datatype]).reshape(tuple(output.shape))
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }
