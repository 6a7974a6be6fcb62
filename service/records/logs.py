"""Log records as text for people or as one line of JSON for programs, each with the id of the call it belongs to.

No record holds a pixel: nothing here logs requests or arrays, and the text of an exception, where a library could have
put values of a tensor, is cut short.
"""

import json
import logging
import random
import re
import sys
import traceback
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final

from service.access.callers import caller
from service.config import LogConfig

REQUEST_ID_KEY: Final = "x-request-id"
SERVICE: Final = "pathguard"
_LONGEST_TEXT = 300
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,64}")

_REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


def request_id() -> str:
    """The id of the call that is being answered here; empty outside calls."""
    return _REQUEST_ID.get()


def begin_request(metadata: "Iterable[tuple[str, str | bytes]]") -> str:
    """Takes the caller's `x-request-id`, where it sent a sane one, or makes one up; forgotten with the call's task."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SANE_ID.fullmatch(value):
            break
    else:
        value = f"{random.getrandbits(64):016x}"
    _REQUEST_ID.set(value)
    return value


class JsonFormatter(logging.Formatter):
    """One line of JSON: time, level, message, and what stands in `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": SERVICE,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if number := request_id():
            line |= {"request_id": number, "caller": caller().name}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = short_trace(record.exc_info[1])
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The message, the id of its call, and where there is an exception, where it was raised."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the lines of the exception's way."""
        fields = getattr(record, "fields", {})
        parts = [record.getMessage(), *(f"{name}={value}" for name, value in fields.items())]
        if number := request_id():
            parts.append(f"request_id={number}")
        text = " ".join(parts)
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + short_trace(record.exc_info[1])
        return text


def short_trace(error: BaseException) -> str:
    """Where an exception was raised, and the beginning of what it and its causes say."""
    lines = traceback.TracebackException.from_exception(error, capture_locals=False).format()
    return "".join(line if line.startswith("  File") else _cut(line) for line in lines).rstrip()


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST_TEXT else f"{line[:_LONGEST_TEXT]}...\n"


def set_up_logs(config: LogConfig) -> None:
    """Makes the process's root logger write to standard error as `config` says, and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if config.format == "json" else TextFormatter())
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
