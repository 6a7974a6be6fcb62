"""What can go wrong between a caller and a server, in one line for a person.

ClientError
├── InputError          what was given is not an image, or a setting is out of range
├── UnreachableError    no server answers, or it is warming up or stopping
├── RefusedError        the server does not take the request, or does not know the model
├── OverloadedError     the server has too much work; says when to try again
├── TimedOutError       no answer in time
└── ServerError         the server failed
"""

from typing import Any

import grpc
import grpc.aio
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

DETAILS_KEY = "grpc-status-details-bin"


class ClientError(Exception):
    """Base of every error that the client raises on purpose; its text is one line for a person."""


class InputError(ClientError):
    """What was given is not an image, or a setting is out of range."""


class UnreachableError(ClientError):
    """No server answers, or it is warming up or stopping; tried several times."""


class RefusedError(ClientError):
    """The server does not take the request, or does not know the model."""


class OverloadedError(ClientError):
    """The server has too much work.

    Attributes:
        retry_after_seconds: when there is likely to be room; None if the server did not say.
    """

    def __init__(self, message: str, retry_after_seconds: float | None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TimedOutError(ClientError):
    """No answer in time."""


class ServerError(ClientError):
    """The server failed; its log says more under the id in the message."""


def error_of(error: grpc.RpcError, target: str, timeout_seconds: float) -> ClientError:
    """What a failed call means, in one line."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code, text = error.code(), " ".join((error.details() or "").split())
    status = _status_in(error)
    if code is grpc.StatusCode.UNAVAILABLE and status is None:
        # gRPC's own words: "failed to connect to all addresses; last error: ...: Connection refused (111)"
        return UnreachableError(f"no server answers at {target}: {text.rpartition(': ')[2] or 'connection lost'}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnreachableError(f"the server at {target} is not ready: {text}")
    if code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    ):
        return RefusedError(f"the server at {target} refused the call: {text}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return OverloadedError(f"the server at {target} takes no more: {text}", _retry_after(status))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOutError(f"no answer from {target} within {timeout_seconds:g} s")
    return ServerError(f"the server at {target} failed: {text or code.name}")


def _status_in(error: Any) -> Status | None:
    """The `google.rpc.Status` that our server sends with every error; None if gRPC itself made the error."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            return Status.FromString(value)
    return None


def _retry_after(status: Status | None) -> float | None:
    for detail in () if status is None else status.details:
        info = RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None
