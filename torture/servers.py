"""Servers to maltreat: each a process of its own on 127.0.0.1, ended by its own id at the end of the block."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

HOST = "127.0.0.1"
READY_SECONDS = 90.0
# For torch as for the server: on a small machine the load needs the other core.
THREADS = "1"

# What any test of a server that may be gone sets: without it gRPC waits longer and longer before it connects again.
RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))
MESSAGE_BYTES = 64 * 1024 * 1024
OPTIONS: Sequence[tuple[str, Any]] = (
    *RECONNECT,
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # A connection of its own for each channel: a crowd shall not share one.
    ("grpc.use_local_subchannel_pool", 1),
)

_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"


@dataclass(slots=True)
class ServerProcess:
    """A server, and what is needed to start it again.

    Attributes:
        command: program and arguments.
        settings: variables `PATHGUARD_...` beside host, port and metrics.
        port: where it listens.
        metrics_port: where it tells its metrics.
        log: file of its standard output and error.
        environment: other variables.
        process: the process that runs now, or ran last.
    """

    command: Sequence[str]
    settings: Mapping[str, str]
    port: int
    metrics_port: int
    log: Path
    environment: Mapping[str, str]
    process: "subprocess.Popen[bytes]"

    @property
    def target(self) -> str:
        """`127.0.0.1:PORT`."""
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Of the process that runs now, or ran last."""
        return self.process.pid

    def start(self) -> None:
        """Starts the process, again if there was one; does not wait for it."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("PATHGUARD_")}
        own |= {"PATHGUARD_HOST": HOST, "PATHGUARD_PORT": str(self.port), "PATHGUARD_THREADS": THREADS}
        own |= {"PATHGUARD_METRICS_PORT": str(self.metrics_port), **self.settings, **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=own, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_ready(self, credentials: grpc.ChannelCredentials | None = None) -> float:
        """Seconds until health says SERVING.

        Raises:
            RuntimeError: the process ended, or was not ready in time; with the end of its log.
        """
        began = time.perf_counter()
        while not ready(self.target, credentials):
            waited = time.perf_counter() - began
            if self.process.poll() is not None or waited > READY_SECONDS:
                raise RuntimeError(f"expected a server that gets ready, got after {waited:.0f} s: {self.tail()}")
            time.sleep(0.1)
        return time.perf_counter() - began

    def tail(self) -> str:
        """The end of what it said."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-1500:]

    def kill(self) -> None:
        """As the kernel does when memory is short: SIGKILL."""
        self.process.kill()
        self.process.wait(timeout=30)

    def end(self, seconds: float = 60.0) -> int:
        """SIGTERM, and the exit code; negative if it had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def resident_megabytes(self) -> float:
        """Memory of the process, 10^6 bytes."""
        return _status_of(self.pid, "VmRSS") / 1e6

    def peak_megabytes(self) -> float:
        """The most memory that the process has had, 10^6 bytes."""
        return _status_of(self.pid, "VmHWM") / 1e6

    def descriptors(self) -> int:
        """Open files and connections of the process."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def metrics(self) -> dict[str, float]:
        """Name with labels, as Prometheus reads it -> value."""
        with urllib.request.urlopen(f"http://{HOST}:{self.metrics_port}/metrics", timeout=10) as page:
            text = page.read().decode()
        lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def metric(self, name: str, **labels: str) -> float:
        """Sum over all series of the metric with these labels; 0 where there is none."""
        total = 0.0
        for series, value in self.metrics().items():
            bare, _, rest = series.partition("{")
            if bare == name and all(f'{label}="{wanted}"' in rest for label, wanted in labels.items()):
                total += value
        return total


@contextmanager
def server(
    command: Sequence[str],
    settings: Mapping[str, str] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> Iterator[ServerProcess]:
    """A server that is ready; gone at the end of the block, whatever happened to it.

    Raises:
        RuntimeError: it did not get ready.
    """
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        one = ServerProcess(
            command,
            settings or {},
            free_port(),
            free_port(),
            Path(folder) / "log",
            environment or {},
            None,  # type: ignore[arg-type]  # there from `start` on
        )
        one.start()
        try:
            one.wait_until_ready(credentials)
            yield one
        finally:
            if one.alive():
                one.kill()


def of_bundle(bundle: Path) -> list[str]:
    """The command that serves `bundle`."""
    return [sys.executable, "-m", "pathguard", "serve", "--bundle", str(bundle.resolve())]


def fake(*, steady: bool = False) -> list[str]:
    """The command that serves the fake detector, which fails on command unless it is `steady`."""
    return [sys.executable, "-m", "torture.fake_server", *(["--steady"] if steady else [])]


def channel_to(target: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """A channel with a connection of its own."""
    if credentials is None:
        return grpc.insecure_channel(target, OPTIONS)
    return grpc.secure_channel(target, credentials, OPTIONS)


def ready(target: str, credentials: grpc.ChannelCredentials | None = None, seconds: float = 1.0) -> bool:
    """Whether health says SERVING."""
    channel = channel_to(target, credentials)
    with channel:
        check: Any = channel.unary_unary(_HEALTH)
        try:
            return bool(check(b"", timeout=seconds) == _SERVING)
        except grpc.RpcError:
            return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server((HOST, 0)) as taken:
        return int(taken.getsockname()[1])


def _status_of(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
