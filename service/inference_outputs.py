"""The answer to a request of the Open Inference Protocol: replies as tensors, in bytes or in numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protos.inference import grpc_service_pb2 as pb
from service.model import Model
from service.pipeline import Reply

BYTES: Final = "BYTES"
LENGTH_BYTES: Final = 4

# Whoever looks at one number only shall not take an image without an answer for a clean one.
_NO_LABEL, _NO_SCORE, _NO_P_VALUE, _NO_VERDICT, _CLEAN, _ADVERSARIAL = -1, math.inf, 0.0, 0, 1, 2

Array = npt.NDArray[Any]
Replies = Sequence[Reply | BaseException]


@dataclass(frozen=True, slots=True)
class Output:
    """One output tensor.

    Attributes:
        datatype: its name in the protocol.
        data_type: its number in `ModelConfig`.
        part: what of the answer it tells, of `service.access.callers.SEES`.
        width: elements for each image; None where there is one, and no dimension for it.
        values: for each image its elements, `(images,)` or `(images, width)`; see `_values_of`.
    """

    datatype: str
    data_type: pb.DataType.ValueType
    part: str
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


def _verdict(reply: Reply, rate: float) -> int:
    return _ADVERSARIAL if reply.answer.p_value <= rate else _CLEAN


def _path_bytes(model: Model) -> int:
    return -(-sum(model.layers.values()) // 8)


OUTPUTS: Mapping[str, Output] = MappingProxyType(
    {
        "LABEL": Output(
            "INT64", pb.TYPE_INT64, "label", None, _values_of("<i8", lambda r, _: r.answer.label, _NO_LABEL)
        ),
        "PROBS": Output("FP32", pb.TYPE_FP32, "probabilities", lambda model: len(model.class_names), _probabilities),
        "ADV_SCORE": Output(
            "FP64", pb.TYPE_FP64, "score", None, _values_of("<f8", lambda r, _: r.answer.score, _NO_SCORE)
        ),
        "P_VALUE": Output(
            "FP64", pb.TYPE_FP64, "p_value", None, _values_of("<f8", lambda r, _: r.answer.p_value, _NO_P_VALUE)
        ),
        "ADV_VERDICT": Output("UINT8", pb.TYPE_UINT8, "verdict", None, _values_of("u1", _verdict, _NO_VERDICT)),
        "PATH_ENCODING": Output("UINT8", pb.TYPE_UINT8, "path", _path_bytes, _paths),
    }
)
# What a request that names no output gets: paths come only when they are asked for.
UNASKED = tuple(name for name in OUTPUTS if name != "PATH_ENCODING")

_CONTENTS = MappingProxyType(
    {
        "UINT8": "uint_contents",
        "INT64": "int64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
        BYTES: "bytes_contents",
    }
)


def add_output(
    response: pb.ModelInferResponse, name: str, classes: int, replies: Replies, model: Model, rate: float, raw: bool
) -> None:
    """Adds one output.

    Args:
        response: where to.
        name: of `OUTPUTS`.
        classes: for how many of the most probable classes to give texts; 0 for the numbers themselves.
        replies: for each image the reply, or why there is none.
        model: who answered.
        rate: the false-alarm rate to decide at.
        raw: whether elements go as bytes.
    """
    values = OUTPUTS[name].values(replies, model, rate)
    if classes:
        _add_bytes(response, name, _most_probable(values, classes, replies, model), raw)
    else:
        _add_numbers(response, name, OUTPUTS[name].datatype, values, raw)


def join_bytes(elements: Sequence[bytes]) -> bytes:
    """A BYTES tensor: each element its length in 4 bytes, little-endian, and then itself."""
    return b"".join(len(element).to_bytes(LENGTH_BYTES, "little") + element for element in elements)


def _most_probable(values: Array, classes: int, replies: Replies, model: Model) -> list[list[bytes]]:
    """For each image its most probable classes as `value:index:label`; empty elements where there is no answer."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :classes]
    return [
        [f"{row[k]:.6f}:{k}:{model.class_names[k]}".encode() if isinstance(reply, Reply) else b"" for k in places]
        for row, places, reply in zip(values.tolist(), order.tolist(), replies, strict=True)
    ]


def _add_bytes(response: pb.ModelInferResponse, name: str, rows: list[list[bytes]], raw: bool) -> None:
    elements = [element for row in rows for element in row]
    output = response.outputs.add(name=name, datatype=BYTES, shape=[len(rows), len(rows[0])])
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
