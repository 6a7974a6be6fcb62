"""What can go wrong in the server, and the status that a caller sees for each error: the one table.

DetectorError
└── ServiceError
    ├── InvalidRequestError   the request breaks the contract; names the fields      (caller)
    ├── UnknownModelError     this server has no model of that name                  (caller)
    ├── CredentialError       no credential, or one that this server does not know   (caller)
    ├── ForbiddenError        the caller's role may not see or set what it asks for  (caller)
    ├── ExpiredError          the deadline passed while the images were waiting      (caller)
    ├── OverloadedError       too much work is waiting; says when to try again       (load)
    ├── UnavailableError      the server is warming up or stopping                   (operator)
    ├── ConfigError           a setting is unknown or out of range                   (operator)
    ├── AddressError          the server cannot listen where it was told to          (operator)
    ├── SettingsFileError     a file of tokens, certificates or models' settings is not as expected (operator)
    └── AnswerError           the model's answers are not what was asked for         (us)
"""

import itertools
import logging
import secrets
from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from detector.errors import (
    ArtifactError,
    DataError,
    DetectorError,
    EngineError,
    ImageError,
    PathShapeError,
    RequestError,
    TrainingError,
)

_log = logging.getLogger(__name__)

# A status travels in trailers, of which gRPC takes 8 KiB; what a caller got wrong may be quoted in it, however long.
_MESSAGE_LENGTH = 400
_MOST_VIOLATIONS = 6
_FIELD_LENGTH = 100
_TEXT_LENGTH = 200


class ServiceError(DetectorError):
    """Base of every error that the server raises on purpose; its text is one line for a person."""


class InvalidRequestError(ServiceError):
    """The request breaks the contract.

    Attributes:
        violations: path of a field in the request, such as `images[3].encoded` -> what was expected and what came.
    """

    def __init__(self, violations: Mapping[str, str]) -> None:
        """Makes the text of all violations together."""
        super().__init__("; ".join(f"{field}: {text}" for field, text in violations.items()))
        self.violations = violations


class UnknownModelError(ServiceError):
    """This server has no model of that name."""


class CredentialError(ServiceError):
    """The caller shows no credential, or one that this server does not know."""


class ForbiddenError(ServiceError):
    """The caller's role may not see or set what the call asks for."""


class ExpiredError(ServiceError):
    """The caller's deadline passed while its images were waiting."""


class OverloadedError(ServiceError):
    """Too much work is waiting.

    Attributes:
        retry_after_seconds: when there is likely to be room, above 0.
        reason: what there is too much of: `images`, `bytes`, `deadline` (it would pass) or `rate` (of one client).
    """

    def __init__(self, message: str, retry_after_seconds: float, reason: str = "images") -> None:
        """Keeps all three."""
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.reason = reason


class UnavailableError(ServiceError):
    """The server is warming up or stopping."""


class ConfigError(ServiceError):
    """A setting is unknown, or its value is out of range."""


class AddressError(ServiceError):
    """The server cannot listen where it was told to: the port is in use, or the host is not of this machine."""


class SettingsFileError(ServiceError):
    """A file of tokens, certificates or models' settings is missing, damaged, or says something unknown."""


class AnswerError(ServiceError):
    """The model's answers are not what was asked for: too many, too few, or not numbers."""


STATUS: Mapping[type[DetectorError], grpc.StatusCode] = MappingProxyType(
    {
        ImageError: grpc.StatusCode.INVALID_ARGUMENT,
        RequestError: grpc.StatusCode.INVALID_ARGUMENT,
        InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
        UnknownModelError: grpc.StatusCode.NOT_FOUND,
        CredentialError: grpc.StatusCode.UNAUTHENTICATED,
        ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
        ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
        OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
        UnavailableError: grpc.StatusCode.UNAVAILABLE,
        # The next ones are about the server's own files, settings or code: their text stays in the log.
        DataError: grpc.StatusCode.INTERNAL,
        TrainingError: grpc.StatusCode.INTERNAL,
        ArtifactError: grpc.StatusCode.INTERNAL,
        EngineError: grpc.StatusCode.INTERNAL,
        PathShapeError: grpc.StatusCode.INTERNAL,
        ConfigError: grpc.StatusCode.INTERNAL,
        AddressError: grpc.StatusCode.INTERNAL,
        SettingsFileError: grpc.StatusCode.INTERNAL,
        AnswerError: grpc.StatusCode.INTERNAL,
    }
)


def status_of(error: BaseException, field: str | None = None) -> Status:
    """What a caller is told about `error`.

    An error without a row in `STATUS`, or with INTERNAL there, is logged in full under a fresh id, and the caller
    gets only that id.

    Args:
        error: what was raised.
        field: path of the field of the request that is to blame, where the error does not say it itself.
    """
    code = STATUS.get(type(error), grpc.StatusCode.INTERNAL) if isinstance(error, DetectorError) else None
    if code is None or code is grpc.StatusCode.INTERNAL:
        return _internal(error)
    status = Status(code=code.value[0], message=_short(str(error), _MESSAGE_LENGTH))
    violations = error.violations if isinstance(error, InvalidRequestError) else {field: str(error)} if field else {}
    if violations:
        fields = [
            BadRequest.FieldViolation(field=_short(name, _FIELD_LENGTH), description=_short(text, _TEXT_LENGTH))
            for name, text in itertools.islice(violations.items(), _MOST_VIOLATIONS)
        ]
        status.details.add().Pack(BadRequest(field_violations=fields))
    if isinstance(error, OverloadedError):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _internal(error: BaseException) -> Status:
    number = secrets.token_hex(8)
    _log.error("internal error, id %s", number, exc_info=error)
    return Status(code=grpc.StatusCode.INTERNAL.value[0], message=f"internal error, id {number}")
