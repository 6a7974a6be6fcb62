"""Into a Ray cluster and out of it again, with what goes wrong told in one line.

Whoever reaches a Ray cluster runs any code on it, so its ports belong on loopback or a private network, and its token
authentication switched on; a cluster that is begun here has both.
"""

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc

from cluster.errors import ClusterError

LOCAL, AUTO = "local", "auto"
ANSWER_SECONDS = 10.0
# Of a cluster that is begun here: only descriptions of shards, their records and one copy of the network pass it.
OBJECT_STORE_BYTES = 200_000_000
NAMESPACE = "pathguard"
# Ray's own variable for the number of tries, a second each.
_SECONDS_TO_JOIN = "RAY_gcs_server_port_wait_time_s"


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within it this process is part of a Ray cluster; one that was begun here ends with it.

    Args:
        address: `local` for one on this machine alone, `auto` for the one that this machine is part of, or HOST:PORT.

    Raises:
        ClusterError: Ray is not installed, no cluster answers within `ANSWER_SECONDS`, it refuses the token, it runs
            another version of Ray or Python, or this process is part of one already.
    """
    if address == LOCAL:
        # Before Ray is imported, which reads them; what this process starts inherits them. The last one keeps a cluster
        # of one machine on loopback, for which Ray has no other switch.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"expected the package {error.name} for --ray, got none; pip install pathguard[ray]"
        ) from None
    if ray.is_initialized():
        raise ClusterError("expected a process without a connection to a Ray cluster, got one that has it already")
    settings: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        settings |= {
            "address": LOCAL, "num_cpus": _cores(), "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }  # fmt: skip
    else:
        if (asked := os.environ.get("RAY_ADDRESS", "") if address == AUTO else address) not in ("", AUTO):
            _check_answers(asked)
        settings["address"] = address
    try:
        with nullcontext() if address == LOCAL else _no_patience():
            ray.init(**settings)
    except Exception as error:  # Ray's own errors have no common base, and some are plain RuntimeErrors
        ray.shutdown()  # it may be half in
        raise ClusterError(_why(address, error)) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _no_patience() -> Iterator[None]:
    """Within it Ray tries twice to join a cluster, which has just answered; else a refusal would be told after 20 s."""
    if _SECONDS_TO_JOIN in os.environ:
        yield
        return
    os.environ[_SECONDS_TO_JOIN] = "2"
    try:
        yield
    finally:
        del os.environ[_SECONDS_TO_JOIN]


def _check_answers(address: str) -> None:
    """Ray itself would try for a minute, and then end the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ClusterError(f"expected --ray of {AUTO}, {LOCAL} or HOST:PORT, got {address!r}")
    try:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            with socket.create_connection((host, int(port)), ANSWER_SECONDS):
                return
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(ANSWER_SECONDS)
    except (OSError, OverflowError, grpc.FutureTimeoutError):
        raise ClusterError(f"expected a Ray cluster at {address}, got no answer within {ANSWER_SECONDS:g} s") from None


def _why(address: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return f"expected the Ray and Python of this process on the cluster {address}, got: {text[:300]}"
    if "Failed to connect" in text or "uthenticat" in text:  # it answers, as has been seen, but not to this process
        return f"expected a token that the cluster {address} takes (RAY_AUTH_TOKEN), got a refusal: {text[:200]}"
    return f"expected a Ray cluster at {address}, got: {text[:300] or type(error).__name__}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same_place(folder: str) -> None:
    """In a worker: go to the folder that the command was started in, so that relative paths mean the same."""
    if Path(folder).is_dir():
        os.chdir(folder)
