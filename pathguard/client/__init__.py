"""Clients of a running server, sync and async: images in, labels and verdicts out. Needs no torch."""

from pathguard.client.aio import AsyncClient
from pathguard.client.connection import Access
from pathguard.client.errors import (
    ClientError,
    InputError,
    OverloadedError,
    RefusedError,
    ServerError,
    TimedOutError,
    UnreachableError,
)
from pathguard.client.requests import ImageInput
from pathguard.client.results import ImageResult, ModelInfo, Verdict
from pathguard.client.sync import Client, check_health

__all__ = [
    "Access",
    "AsyncClient",
    "Client",
    "ClientError",
    "ImageInput",
    "ImageResult",
    "InputError",
    "ModelInfo",
    "OverloadedError",
    "RefusedError",
    "ServerError",
    "TimedOutError",
    "UnreachableError",
    "Verdict",
    "check_health",
]
