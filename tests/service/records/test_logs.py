import json
import logging

import pytest

from service.access.callers import FULL, Caller, set_caller
from service.config import LogConfig
from service.records.logs import JsonFormatter, TextFormatter, begin_request, set_up_logs


def record_of(message="hello", *, error=None, fields=None):
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("service.x", logging.WARNING, __file__, 1, message, (), info)
    if fields:
        record.fields = fields
    return record


async def test_a_record_is_one_line_of_json_with_the_call_it_belongs_to():
    begin_request((("x-request-id", "order-17"),))
    set_caller(Caller("token:web", FULL))
    line = JsonFormatter().format(record_of("two\nlines", fields={"seconds": 0.5}))
    assert "\n" not in line
    told = json.loads(line)
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "warning",
        "service": "pathguard",
        "logger": "service.x",
        "message": "two\nlines",
        "request_id": "order-17",
        "caller": "token:web",
        "seconds": 0.5,
    }


async def test_an_exception_is_told_with_its_way_and_the_beginning_of_its_words():
    try:
        raise ValueError("a" * 1000)
    except ValueError as error:
        told = json.loads(JsonFormatter().format(record_of(error=error)))["exception"]
    assert "test_logs.py" in told
    assert "ValueError: aaa" in told
    assert told.endswith("a...")
    assert len(told) < 1000


async def test_text_for_people_has_the_same(capsys):
    begin_request((("x-request-id", "order-17"),))
    assert TextFormatter().format(record_of(fields={"a": 1})) == "hello a=1 request_id=order-17"


@pytest.mark.parametrize("kind", ["text", "json"])
def test_logs_go_to_standard_error_at_the_level_asked_for(kind, capsys):
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        set_up_logs(LogConfig(format=kind, level="warning"))
        logging.getLogger("service").info("quiet")
        logging.getLogger("service").warning("loud")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("loud" in captured.err, "quiet" in captured.err, captured.err.startswith("{")) == (
        True, False, kind == "json",
    )  # fmt: skip
