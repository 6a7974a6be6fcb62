import inspect
import logging

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo

import detector.errors
import service.errors
from detector.errors import ArtifactError, DetectorError, ImageError
from service.errors import STATUS, InvalidRequestError, OverloadedError, ServiceError, UnknownModelError, status_of


def public_errors():
    for module in (detector.errors, service.errors):
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, DetectorError) and value not in (DetectorError, ServiceError):
                yield value


@pytest.mark.parametrize("error", sorted(set(public_errors()), key=lambda error: error.__name__))
def test_every_public_error_has_a_decision(error):
    assert error in STATUS


def test_a_callers_error_is_told_with_its_text_and_field():
    status = status_of(ImageError("expected a file"), "images[3].encoded")
    details = BadRequest()
    status.details[0].Unpack(details)

    assert (status.code, status.message) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "expected a file")
    assert [(v.field, v.description) for v in details.field_violations] == [("images[3].encoded", "expected a file")]


def test_all_violations_of_a_request_are_named():
    status = status_of(InvalidRequestError({"images": "got none", "max_false_alarm_rate": "got 2"}))
    details = BadRequest()
    status.details[0].Unpack(details)
    assert [v.field for v in details.field_violations] == ["images", "max_false_alarm_rate"]


def test_overload_says_when_to_try_again():
    status = status_of(OverloadedError("full", 1.5))
    details = RetryInfo()
    status.details[0].Unpack(details)
    assert (details.retry_delay.seconds, details.retry_delay.nanos) == (1, 500_000_000)


@pytest.mark.parametrize("error", [RuntimeError("secret"), ArtifactError("secret"), MemoryError("secret")])
def test_an_internal_error_tells_only_an_id_that_the_log_explains(error, caplog):
    with caplog.at_level(logging.ERROR):
        status = status_of(error)

    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert status.message.startswith("internal error, id ")
    assert "secret" not in status.message
    assert status.message.removeprefix("internal error, id ") in caplog.text
    assert "secret" in caplog.text


def test_a_long_name_or_many_faults_of_a_caller_still_fit_into_the_trailers():
    many = InvalidRequestError({f"parameters[{'x' * 500}{n}]": "é" * 10_000 for n in range(1000)})
    for error in (many, UnknownModelError("y" * 1_000_000)):
        assert status_of(error).ByteSize() < 4000
        assert len(status_of(error).message) == 400
