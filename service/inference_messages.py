"""The only place that knows both the messages of the Open Inference Protocol and what the server makes of them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from detector.images import ImageSpec
from protos.inference import grpc_service_pb2 as pb
from service.config import ServiceConfig
from service.errors import InvalidRequestError, status_of
from service.messages import PATH_SCHEMA_VERSION, problem_with_rate
from service.model import Model, smallest_false_alarm_rate
from service.pipeline import Reply
from service.sources import FileSource, RawSource, Source
from service.statistics import Count, ModelCounts

PLATFORM: Final = "pathguard"
EXTENSIONS: Final = ("classification", "model_configuration", "parameters", "schedule_policy", "statistics")

IMAGES: Final = "IMAGES"
IMAGE_BYTES: Final = "IMAGE_BYTES"
CLASSIFICATION: Final = "classification"

_LENGTH_BYTES = 4
_BYTES = "BYTES"
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

Array = npt.NDArray[Any]
Replies = Sequence[Reply | BaseException]


@dataclass(frozen=True, slots=True)
class _Output:
    """One output tensor.

    Attributes:
        datatype: its name in the protocol.
        data_type: its number in `ModelConfig`.
        width: elements for each image; None where there is one, and no dimension for it.
        values: for each image its elements, `(images,)` or `(images, width)`; see `_values_of`.
    """

    datatype: str
    data_type: pb.DataType.ValueType
    width: Callable[[Model], int] | None
    values: Callable[[Replies, Model, float], Array]


def _values_of(
    dtype: str, value: Callable[[Reply, float], object], missing: object
) -> Callable[[Replies, Model, float], Array]:
    """A column of values, little-endian, with `missing` for images that have no answer."""

    def values(replies: Replies, _model: Model, rate: float) -> Array:
        return np.array([value(r, rate) if isinstance(r, Reply) else missing for r in replies], dtype=dtype)

    return values


def _probabilities(replies: Replies, model: Model, _rate: float) -> Array:
    none = [0.0] * len(model.class_names)
    return np.array([r.answer.probabilities if isinstance(r, Reply) else none for r in replies], dtype="<f4")


def _paths(replies: Replies, model: Model, _rate: float) -> Array:
    none = bytes(_path_bytes(model))
    packed = b"".join(r.answer.path if isinstance(r, Reply) else none for r in replies)
    return np.frombuffer(packed, dtype=np.uint8).reshape(len(replies), _path_bytes(model))


def _path_bytes(model: Model) -> int:
    return -(-sum(model.layers.values()) // 8)


# Whoever looks at one number only shall not take an image without an answer for a clean one.
_NO_LABEL, _NO_SCORE, _NO_P_VALUE, _NO_VERDICT, _CLEAN, _ADVERSARIAL = -1, math.inf, 0.0, 0, 1, 2

OUTPUTS: Mapping[str, _Output] = MappingProxyType(
    {
        "LABEL": _Output("INT64", pb.TYPE_INT64, None, _values_of("<i8", lambda r, _: r.answer.label, _NO_LABEL)),
        "PROBS": _Output("FP32", pb.TYPE_FP32, lambda model: len(model.class_names), _probabilities),
        "ADV_SCORE": _Output("FP64", pb.TYPE_FP64, None, _values_of("<f8", lambda r, _: r.answer.score, _NO_SCORE)),
        "P_VALUE": _Output("FP64", pb.TYPE_FP64, None, _values_of("<f8", lambda r, _: r.answer.p_value, _NO_P_VALUE)),
        "ADV_VERDICT": _Output(
            "UINT8",
            pb.TYPE_UINT8,
            None,
            _values_of(
                "u1", lambda r, rate: _ADVERSARIAL if r.answer.p_value <= rate else _CLEAN, _NO_VERDICT
            ),
        ),
        "PATH_ENCODING": _Output("UINT8", pb.TYPE_UINT8, _path_bytes, _paths),
    }
)  # fmt: skip
# What a request that names no output gets: paths come only when they are asked for.
_UNASKED = tuple(name for name in OUTPUTS if name != "PATH_ENCODING")

_CONTENTS = MappingProxyType(
    {
        "UINT8": "uint_contents",
        "INT64": "int64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
        _BYTES: "bytes_contents",
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


def call_of(request: pb.ModelInferRequest, model: Model, max_images: int, max_pixels: int) -> InferCall:
    """What `request` asks `model` for.

    Args:
        request: as it came.
        model: who will answer.
        max_images: most images in a request.
        max_pixels: largest height times width of an image.

    Raises:
        InvalidRequestError: the request breaks the protocol, or asks for what this server does not do.
    """
    violations: dict[str, str] = {}
    images = _images_of(request, model.spec, max_images, max_pixels, violations)
    outputs = _outputs_of(request, violations)
    rate, timeout = model.max_false_alarm_rate, None
    for name, parameter in request.parameters.items():
        field = f"parameters[{name}]"
        if name == "timeout":
            microseconds = _whole(parameter, field, 0, violations)
            timeout = microseconds / 1e6 if microseconds else None
        elif name == "max_false_alarm_rate":
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
        InvalidRequestError: a length goes beyond the end, or something is left over; no copy is made before.
    """
    elements, at = [], 0
    for number in range(count):
        start = at + _LENGTH_BYTES
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


def join_bytes(elements: Sequence[bytes]) -> bytes:
    """What `split_bytes` takes apart."""
    return b"".join(len(element).to_bytes(_LENGTH_BYTES, "little") + element for element in elements)


def response_of(
    request: pb.ModelInferRequest, call: InferCall, replies: Replies, model: Model
) -> pb.ModelInferResponse:
    """The answer to a call.

    Args:
        request: as it came.
        call: what it asks for.
        replies: for each image the reply, or why there is none.
        model: who answered.
    """
    response = pb.ModelInferResponse(model_name=model.name, model_version=model.model_version, id=request.id)
    response.parameters["threshold_version"].string_param = model.threshold_version
    response.parameters["max_false_alarm_rate"].double_param = call.rate
    for position, reply in enumerate(replies):
        if isinstance(reply, BaseException):
            response.parameters[f"error[{position}]"].string_param = status_of(reply).message
    for name, classes in call.outputs.items():
        values = OUTPUTS[name].values(replies, model, call.rate)
        if classes:
            _add_bytes(response, name, _most_probable(values, classes, replies, model), call.raw)
        else:
            _add_numbers(response, name, OUTPUTS[name].datatype, values, call.raw)
    return response


def metadata_message(model: Model, versions: Sequence[str]) -> pb.ModelMetadataResponse:
    """Inputs and outputs of `model`, of which the server has `versions`."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=versions,
        platform=PLATFORM,
        inputs=[
            tensor(name=IMAGES, datatype="UINT8", shape=[-1, *_image_dims(model.spec)]),
            tensor(name=IMAGE_BYTES, datatype=_BYTES, shape=[-1]),
        ],
        outputs=[
            tensor(
                name=name, datatype=output.datatype, shape=[-1] if output.width is None else [-1, output.width(model)]
            )
            for name, output in OUTPUTS.items()
        ],
    )


def config_message(model: Model, config: ServiceConfig) -> pb.ModelConfig:
    """How `model` is served."""
    values = {
        "model_version": model.model_version,
        "threshold_version": model.threshold_version,
        "max_false_alarm_rate": repr(model.max_false_alarm_rate),
        "smallest_false_alarm_rate": repr(smallest_false_alarm_rate(model)),
        "class_names": json.dumps(model.class_names),
        "path_layout": json.dumps(dict(model.layers)),
        "path_schema_version": str(PATH_SCHEMA_VERSION),
    }
    return pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=config.max_images_per_request,
        input=[
            pb.ModelInput(
                name=IMAGES,
                data_type=pb.TYPE_UINT8,
                format=pb.ModelInput.FORMAT_NHWC,
                dims=_image_dims(model.spec),
            ),
            # Either input does. Load generators fill all that are not optional, so only one of them is not.
            pb.ModelInput(
                name=IMAGE_BYTES, data_type=pb.TYPE_STRING, dims=[1], reshape=pb.ModelTensorReshape(), optional=True
            ),
        ],
        output=[
            pb.ModelOutput(
                name=name,
                data_type=output.data_type,
                dims=[1] if output.width is None else [output.width(model)],
                reshape=pb.ModelTensorReshape() if output.width is None else None,
            )
            for name, output in OUTPUTS.items()
        ],
        dynamic_batching=pb.ModelDynamicBatching(
            preferred_batch_size=[config.max_batch],
            default_queue_policy=pb.ModelQueuePolicy(
                timeout_action=pb.ModelQueuePolicy.REJECT,
                allow_timeout_override=True,
                max_queue_size=config.max_pending_images,
            ),
        ),
        instance_group=[pb.ModelInstanceGroup(name=model.name, count=1, kind=pb.ModelInstanceGroup.KIND_MODEL)],
        parameters={name: pb.ModelParameter(string_value=value) for name, value in values.items()},
    )


def statistics_message(model: Model, counts: ModelCounts) -> pb.ModelStatistics:
    """What has been counted of `model`."""
    return pb.ModelStatistics(
        name=model.name,
        version=model.model_version,
        last_inference=int(counts.last * 1000),
        inference_count=counts.images,
        execution_count=sum(count.count for count in counts.batches.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(counts.answered),
            fail=_duration(counts.failed),
            queue=_duration(counts.queue),
            compute_input=_duration(counts.decode),
            compute_infer=_duration(counts.infer),
            compute_output=_duration(counts.encode),
            cache_hit=pb.StatisticDuration(),
            cache_miss=pb.StatisticDuration(),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=pb.StatisticDuration(count=count.count),
                compute_infer=_duration(count),
                compute_output=pb.StatisticDuration(count=count.count),
            )
            for size, count in sorted(counts.batches.items())
        ],
    )


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
    datatype = _BYTES if files else "UINT8"
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
    wanted = [-1, *_image_dims(spec)]
    fits = len(shape) == 4 and all(want in (-1, got) and got > 0 for want, got in zip(wanted, shape, strict=True))
    if not fits:
        return f"expected {wanted}, -1 for any number from 1, got {list(shape)}"
    if shape[1] * shape[2] > max_pixels:
        return f"expected at most {max_pixels} pixels in an image, got {shape[1]} x {shape[2]}"
    return None


def _image_dims(spec: ImageSpec) -> list[int]:
    return [-1, -1, spec.channels] if spec.resize else [spec.height, spec.width, spec.channels]


def _outputs_of(request: pb.ModelInferRequest, violations: dict[str, str]) -> Mapping[str, int]:
    """The outputs that are asked for, and how many classes to name."""
    if not request.outputs:
        return dict.fromkeys(_UNASKED, 0)
    outputs: dict[str, int] = {}
    for position, output in enumerate(request.outputs[: len(OUTPUTS) + 1]):
        field = f"outputs[{position}]"
        if output.name not in OUTPUTS or output.name in outputs:
            violations[f"{field}.name"] = f"expected each of {', '.join(OUTPUTS)} at most once, got {output.name!r}"
        outputs[output.name] = 0
        for name, parameter in output.parameters.items():
            place = f"{field}.parameters[{name}]"
            if name == CLASSIFICATION and output.name == "PROBS":
                outputs[output.name] = _whole(parameter, place, 1, violations)
            elif name not in _WITHOUT_EFFECT:
                known = (CLASSIFICATION,) if output.name == "PROBS" else ()
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


def _most_probable(values: Array, classes: int, replies: Replies, model: Model) -> list[list[bytes]]:
    """For each image its most probable classes as `value:index:label`; empty elements where there is no answer."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :classes]
    return [
        [f"{row[k]:.6f}:{k}:{model.class_names[k]}".encode() if isinstance(reply, Reply) else b"" for k in places]
        for row, places, reply in zip(values.tolist(), order.tolist(), replies, strict=True)
    ]


def _add_bytes(response: pb.ModelInferResponse, name: str, rows: list[list[bytes]], raw: bool) -> None:
    elements = [element for row in rows for element in row]
    output = response.outputs.add(name=name, datatype=_BYTES, shape=[len(rows), len(rows[0])])
    if raw:
        response.raw_output_contents.append(join_bytes(elements))
    else:
        output.contents.bytes_contents.extend(elements)


def _add_numbers(response: pb.ModelInferResponse, name: str, datatype: str, values: Array, raw: bool) -> None:
    output = response.outputs.add(name=name, datatype=datatype, shape=values.shape)
    if raw:
        response.raw_output_contents.append(values.tobytes())
    else:
        getattr(output.contents, _CONTENTS[datatype]).extend(values.ravel().tolist())


def _duration(count: Count) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count.count, ns=int(count.seconds * 1e9))
