"""What a request of the Open Inference Protocol asks for, and what is wrong with it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from detector.images import ImageSpec
from protos.inference import grpc_service_pb2 as pb
from service.access.callers import Role
from service.errors import InvalidRequestError
from service.inference_outputs import BYTES, LENGTH_BYTES, OUTPUTS, UNASKED
from service.messages import problem_with_rate
from service.model import Model
from service.sources import FileSource, RawSource, Source

IMAGES: Final = "IMAGES"
IMAGE_BYTES: Final = "IMAGE_BYTES"

_CLASSIFICATION = "classification"
# Parameters that clients send unasked and that change nothing here: the model has no sequences, and this is not HTTP.
_WITHOUT_EFFECT = frozenset(
    {
        "binary_data",
        "binary_data_output",
        "binary_data_size",
        "content_type",
        "headers",
        "priority",
        "sequence_end",
        "sequence_id",
        "sequence_start",
        "triton_enable_empty_final_response",
    }
)


@dataclass(frozen=True, slots=True)
class InferCall:
    """What a `ModelInferRequest` asks for.

    Attributes:
        images: the images, at least one.
        raw: whether tensors come, and shall go, as bytes.
        outputs: names of the outputs -> for PROBS the number of classes to name; 0 for the numbers themselves.
        rate: the false-alarm rate to decide at, in (0, 1).
        timeout_seconds: how long the call may wait; None for as long as its deadline.
    """

    images: Sequence[Source]
    raw: bool
    outputs: Mapping[str, int]
    rate: float
    timeout_seconds: float | None


def call_of(request: pb.ModelInferRequest, model: Model, max_images: int, max_pixels: int, role: Role) -> InferCall:
    """What `request` asks `model` for.

    Args:
        request: as it came.
        model: who will answer.
        max_images: most images in a request.
        max_pixels: largest height times width of an image.
        role: what the caller may see and set.

    Raises:
        ForbiddenError: the role may not set the rate, or not see an output that is asked for.
        InvalidRequestError: the request breaks the protocol, or asks for what this server does not do.
    """
    violations: dict[str, str] = {}
    images = _images_of(request, model.spec, max_images, max_pixels, violations)
    outputs = _outputs_of(request, role, violations)
    rate, timeout = model.max_false_alarm_rate, None
    for name, parameter in request.parameters.items():
        field = f"parameters[{name}]"
        if name == "timeout":
            microseconds = _whole(parameter, field, 0, violations)
            timeout = microseconds / 1e6 if microseconds else None
        elif name == "max_false_alarm_rate":
            role.check_sets(name)
            rate = _number(parameter, field, violations)
            if field not in violations and (problem := problem_with_rate(rate, model)):
                violations[field] = problem
        elif name not in _WITHOUT_EFFECT:
            violations[field] = _unknown(name, ("timeout", "max_false_alarm_rate", "priority"))
    if violations:
        raise InvalidRequestError(violations)
    return InferCall(images, bool(request.raw_input_contents), outputs, rate, timeout)


def split_bytes(blob: bytes, count: int) -> list[bytes]:
    """The `count` elements of a BYTES tensor: each its length in 4 bytes, little-endian, and then itself.

    Raises:
        InvalidRequestError: a length goes beyond the end, or something is left over.
    """
    elements, at = [], 0
    for number in range(count):
        start = at + LENGTH_BYTES
        length = int.from_bytes(blob[at:start], "little")
        at = start + length
        if at > len(blob):
            raise InvalidRequestError(
                {"raw_input_contents[0]": f"expected {count} elements, each its length in 4 bytes and then itself, got "
                 f"{len(blob)} bytes, which end within element {number}"}
            )  # fmt: skip
        elements.append(blob[start:at])
    if at != len(blob):
        raise InvalidRequestError(
            {"raw_input_contents[0]": f"expected {at} bytes for {count} elements, got {len(blob)} bytes"}
        )
    return elements


def _images_of(
    request: pb.ModelInferRequest, spec: ImageSpec, max_images: int, max_pixels: int, violations: dict[str, str]
) -> Sequence[Source]:
    """The images of the request's one input; what is wrong goes into `violations`."""
    if len(request.inputs) != 1 or request.inputs[0].name not in (IMAGES, IMAGE_BYTES):
        got = ", ".join(tensor.name for tensor in request.inputs[:4]) or "none"
        violations["inputs"] = f"expected one input, {IMAGES} or {IMAGE_BYTES}, got {got}"
        return ()
    tensor = request.inputs[0]
    for name in tensor.parameters:
        if name not in _WITHOUT_EFFECT:
            violations[f"inputs[0].parameters[{name}]"] = _unknown(name, ())
    if request.raw_input_contents and (len(request.raw_input_contents) != 1 or tensor.HasField("contents")):
        violations["raw_input_contents"] = (
            f"expected one for each of 1 inputs and no contents beside it, got {len(request.raw_input_contents)}"
        )
    shape = tuple(tensor.shape)
    files = tensor.name == IMAGE_BYTES
    datatype = BYTES if files else "UINT8"
    if tensor.datatype != datatype:
        violations["inputs[0].datatype"] = f"expected {datatype} for {tensor.name}, got {tensor.datatype!r}"
    if problem := _file_shape_problem(shape) if files else _pixel_shape_problem(shape, spec, max_pixels):
        violations["inputs[0].shape"] = problem
    elif not 1 <= shape[0] <= max_images:
        violations["inputs[0].shape"] = f"expected 1 to {max_images} images, got {shape[0]}"
    if violations:
        return ()
    return _files_of(request, shape[0], violations) if files else _pixels_of(request, shape, violations)


def _files_of(request: pb.ModelInferRequest, count: int, violations: dict[str, str]) -> Sequence[Source]:
    if request.raw_input_contents:
        try:
            return [FileSource(content) for content in split_bytes(request.raw_input_contents[0], count)]
        except InvalidRequestError as error:
            violations.update(error.violations)
            return ()
    contents = request.inputs[0].contents.bytes_contents
    if len(contents) != count:
        violations["inputs[0].contents.bytes_contents"] = f"expected {count} elements, got {len(contents)}"
        return ()
    return [FileSource(content) for content in contents]


def _pixels_of(request: pb.ModelInferRequest, shape: Sequence[int], violations: dict[str, str]) -> Sequence[Source]:
    count, height, width, channels = shape
    expected = math.prod(shape)
    if request.raw_input_contents:
        field, pixels = "raw_input_contents[0]", request.raw_input_contents[0]
    else:
        field, values = "inputs[0].contents.uint_contents", request.inputs[0].contents.uint_contents
        if values and max(values) > 255:
            violations[field] = f"expected values of 0 to 255, got {max(values)}"
            return ()
        pixels = bytes(values)
    if len(pixels) != expected:
        violations[field] = f"expected {' x '.join(map(str, shape))} = {expected} elements, got {len(pixels)}"
        return ()
    size = height * width * channels
    return [RawSource(pixels[n * size : (n + 1) * size], height, width, channels) for n in range(count)]


def _file_shape_problem(shape: Sequence[int]) -> str | None:
    if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
        return None
    return f"expected [images] or [images, 1], got {list(shape)}"


def _pixel_shape_problem(shape: Sequence[int], spec: ImageSpec, max_pixels: int) -> str | None:
    wanted = [-1, *image_dims(spec)]
    fits = len(shape) == 4 and all(want in (-1, got) and got > 0 for want, got in zip(wanted, shape, strict=True))
    if not fits:
        return f"expected {wanted}, -1 for any number from 1, got {list(shape)}"
    if shape[1] * shape[2] > max_pixels:
        return f"expected at most {max_pixels} pixels in an image, got {shape[1]} x {shape[2]}"
    return None


def image_dims(spec: ImageSpec) -> list[int]:
    """Height, width and channels of the IMAGES tensor; -1 where any size is taken."""
    return [-1, -1, spec.channels] if spec.resize else [spec.height, spec.width, spec.channels]


def _outputs_of(request: pb.ModelInferRequest, role: Role, violations: dict[str, str]) -> Mapping[str, int]:
    """The outputs that are asked for, and how many classes to name."""
    if not request.outputs:
        return {name: 0 for name in UNASKED if OUTPUTS[name].part in role.sees}
    outputs: dict[str, int] = {}
    for position, output in enumerate(request.outputs[: len(OUTPUTS) + 1]):
        field = f"outputs[{position}]"
        if output.name not in OUTPUTS or output.name in outputs:
            violations[f"{field}.name"] = f"expected each of {', '.join(OUTPUTS)} at most once, got {output.name!r}"
        else:
            role.check_sees(OUTPUTS[output.name].part)
        outputs[output.name] = 0
        for name, parameter in output.parameters.items():
            place = f"{field}.parameters[{name}]"
            if name == _CLASSIFICATION and output.name == "PROBS":
                outputs[output.name] = _whole(parameter, place, 1, violations)
            elif name not in _WITHOUT_EFFECT:
                known = (_CLASSIFICATION,) if output.name == "PROBS" else ()
                violations[place] = _unknown(name, known)
    return outputs


def _whole(parameter: pb.InferParameter, field: str, low: int, violations: dict[str, str]) -> int:
    """The whole number in a parameter, of whatever kind it is."""
    number = _number(parameter, field, violations)
    if field not in violations and not (number >= low and number == math.floor(number)):
        violations[field] = f"expected a whole number of at least {low}, got {number:g}"
    return 0 if field in violations else int(number)


def _number(parameter: pb.InferParameter, field: str, violations: dict[str, str]) -> float:
    """The number in a parameter, of whatever kind it is; a text may hold one, a switch is none."""
    kind = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, kind) if kind else "nothing"
    try:
        number = math.nan if kind == "bool_param" else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        violations[field] = f"expected a number, got {str(value)[:40]!r}"
    return number


def _unknown(name: str, known: Sequence[str]) -> str:
    wanted = f"expected one of {', '.join(known)}" if known else "expected no such parameter"
    return f"{wanted}, got {name[:40]!r}"
