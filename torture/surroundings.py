"""What breaks around the server: the disk is full, the clock jumps, certificates end, bundles are damaged."""

import json
import os
import shutil
import ssl
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import trustme
from cryptography import x509

from torture.known import known_of, known_of_fake
from torture.load import load
from torture.report import Outcome, outcome_of
from torture.servers import HOST, ServerProcess, fake, server

CALLERS = 8
DISK_BYTES = 512 * 1024
CLOCK = Path(__file__).with_name("clock.c")
# Seconds from the right time.
JUMPS = (7_200, -86_400, 315_360_000, 0)
SHORT_SECONDS = 12.0
WAIT_SECONDS = 30.0


def full_disk_case(seconds: float) -> Outcome:
    """The disk of the audit log is full for a while: calls go on, and so do records once there is room again."""
    with outcome_of("full disk at the audit log") as outcome, _small_disk() as folder:
        if folder is None:
            outcome.skipped = "no right to mount a small disk"
            return outcome
        file = folder / "audit.jsonl"
        with server(fake(), {"PATHGUARD_AUDIT_FILE": str(file)}) as one:
            with load(one.target, known_of_fake(), outcome, callers=CALLERS) as seen:
                seen.wait_for(50)
                ballast = _filled(folder)
                time.sleep(seconds)
                outcome.expect(seen.wait_for(20), "calls are not answered while the disk is full")
                lost = one.metric("pathguard_audit_records_total", outcome="lost")
                before = one.metric("pathguard_audit_records_total", outcome="written")
                ballast.unlink()
                outcome.expect(seen.wait_for(50), "calls are not answered once there is room")
            written = one.metric("pathguard_audit_records_total", outcome="written")
            outcome.expect(one.end() == 0, f"the server ended badly: {one.tail()}")
        whole = [line for line in file.read_text(errors="replace").splitlines() if _is_json(line)]
        outcome.figures |= {"records written": int(written), "lost": int(lost), "whole lines": len(whole)}
        outcome.expect(lost > 0, "expected records to be lost, and counted")
        outcome.expect(written > before, "no record was written once there was room")
        outcome.expect(len(whole) >= written, f"{written:.0f} records count as written, {len(whole)} are there")
    return outcome


def clock_case(seconds: float) -> Outcome:
    """The clock on the wall jumps forth and back; deadlines and batches do not care."""
    with outcome_of("clock jumps by hours and days") as outcome, tempfile.TemporaryDirectory() as name:
        library, offset, audit = Path(name) / "clock.so", Path(name) / "offset", Path(name) / "audit.jsonl"
        compiler = shutil.which("cc")
        if compiler is None:
            outcome.skipped = "no C compiler here for a clock of the server's own"
            return outcome
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, CLOCK, "-ldl"], check=True)
        offset.write_bytes(bytes(8))
        environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(offset)}
        with server(fake(), {"PATHGUARD_AUDIT_FILE": str(audit)}, environment=environment) as one:
            with load(one.target, known_of_fake(), outcome, callers=CALLERS) as seen:
                for jump in JUMPS:
                    # In its place, so that the server sees it: it has the file in its memory.
                    with offset.open("r+b") as file:
                        file.write(struct.pack("q", jump))
                    time.sleep(seconds / len(JUMPS))
                    outcome.expect(seen.wait_for(20), f"calls are not answered after a jump to {jump} s")
            outcome.expect(one.end() == 0, f"the server ended badly: {one.tail()}")
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        hours = {str(line["time"])[:13] for line in lines}
        outcome.figures["different hours in the audit log"] = len(hours)
        outcome.expect(len(hours) >= len(JUMPS), f"expected the clock to jump, the log has only {sorted(hours)}")
    return outcome


def certificate_case() -> Outcome:
    """Certificates change under load, one ends, and bad ones are offered: calls go on with the last good one."""
    with outcome_of("certificates change, end, are damaged") as outcome, tempfile.TemporaryDirectory() as name:
        authority = trustme.CA()
        chain, key = Path(name) / "tls.crt", Path(name) / "tls.key"
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        settings = {"PATHGUARD_TLS_CERTIFICATE": str(chain), "PATHGUARD_TLS_KEY": str(key)}

        def offer(not_before: datetime | None = None, not_after: datetime | None = None) -> int:
            issued = authority.issue_cert(HOST, not_before=not_before, not_after=not_after)
            content = issued.cert_chain_pems[0].bytes()
            _replace(key, issued.private_key_pem.bytes())
            _replace(chain, content)
            return x509.load_pem_x509_certificate(content).serial_number

        now = datetime.now(UTC)
        first = offer()
        with server(fake(), settings, credentials=credentials) as one:
            shown = [first]
            with load(
                one.target, known_of_fake(), outcome, callers=4, calls_per_connection=5, credentials=credentials
            ) as seen:
                outcome.expect(_shows(one, first), "the first certificate is not shown")
                shown.append(offer())
                outcome.expect(_shows(one, shown[-1]), "a new certificate is not taken")
                ended = offer(not_before=now - timedelta(days=2), not_after=now - timedelta(days=1))
                time.sleep(3)
                outcome.expect(not _shows(one, ended, seconds=0), "an ended certificate was taken")
                _replace(chain, b"-----BEGIN CERTIFICATE-----\nno\n")
                time.sleep(3)
                outcome.expect(_shows(one, shown[-1], seconds=0), "the last good certificate is not shown any more")
                shown.append(offer())
                outcome.expect(_shows(one, shown[-1]), "a good certificate after bad ones is not taken")
                outcome.expect(seen.wait_for(20), "calls are not answered")
            ends = datetime.now(UTC) + timedelta(seconds=SHORT_SECONDS)
            short = offer(not_before=now - timedelta(days=1), not_after=ends)
            outcome.expect(_shows(one, short), "a short-lived certificate is not taken")
            with load(one.target, known_of_fake(), outcome, credentials=credentials) as seen:
                seen.wait_for(5)
                time.sleep(max(0.0, (ends - datetime.now(UTC)).total_seconds() + 1))
                outcome.expect(seen.wait_for(20), "open connections end with the certificate")
            shown.append(offer())
            outcome.expect(_shows(one, shown[-1]), "a certificate after an ended one is not taken")
            with load(one.target, known_of_fake(), outcome, credentials=credentials) as seen:
                outcome.expect(seen.wait_for(20), "calls are not answered after the renewal")
            refused = one.metric("pathguard_file_reloads_total", file="certificate", outcome="refused")
            outcome.figures |= {"certificates shown": len(shown) + 1, "refused": int(refused)}
    return outcome


def corrupt_bundle_case(bundle: Path) -> Outcome:
    """Bundles are damaged, cut short, removed and added while they serve: what serves goes on, bad ones are refused."""
    known = known_of(bundle, 64)
    with outcome_of("bundle damaged while it serves") as outcome, tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        shutil.copytree(bundle, model / "1")
        weights = max((model / "1").glob("*.safetensors"), key=lambda file: file.stat().st_size)
        command = [*fake()[:2], "pathguard", "serve", "--models", name]
        settings = {"PATHGUARD_MODELS_POLL_SECONDS": "0.3"}
        with server(command, settings) as one, load(one.target, known, outcome, callers=4) as seen:
            refusals = 0

            def refused(what: str) -> None:
                nonlocal refusals
                wanted = _until(lambda: one.metric("pathguard_model_loads_total", outcome="refused") > refusals)
                outcome.expect(wanted, f"{what} was not refused: {one.tail()}")
                refusals = int(one.metric("pathguard_model_loads_total", outcome="refused"))
                outcome.expect(seen.wait_for(20), f"calls are not answered after {what}")

            seen.wait_for(20)
            content = bytearray(weights.read_bytes())
            with weights.open("r+b") as file:
                file.seek(len(content) // 2)
                file.write(bytes(byte ^ 0xFF for byte in content[len(content) // 2 : len(content) // 2 + 64]))
            refused("a damaged file")
            os.truncate(weights, 1000)
            refused("a file cut short")
            shutil.copytree(bundle, model / "2.part")
            (model / "2.part" / weights.name).write_bytes(b"")
            (model / "2.part").rename(model / "2")
            refused("a new version that is damaged")
            shutil.copytree(bundle, model / ".3")
            (model / ".3").rename(model / "3")
            loads = _until(lambda: one.metric("pathguard_model_info", version="3") > 0)
            outcome.expect(loads, f"a good version was not taken: {one.tail()}")
            outcome.expect(seen.wait_for(20), "calls are not answered after a new version")
            shutil.rmtree(model / "1")
            outcome.expect(seen.wait_for(50), "calls are not answered after an old version was removed")
            outcome.figures["refused bundles"] = refusals
    return outcome


@contextmanager
def _small_disk() -> Iterator[Path | None]:
    """A disk of half a megabyte; None where nobody may mount one."""
    with tempfile.TemporaryDirectory(prefix="torture-disk-") as name:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "torture", name]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
            yield None
            return
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], capture_output=True)


def _filled(folder: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            return ballast


def _replace(file: Path, content: bytes) -> None:
    """As a careful operator does it: there is never half a file."""
    fresh = file.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(file)


def _shows(one: ServerProcess, serial: int, seconds: float = WAIT_SECONDS) -> bool:
    """Whether a new connection is shown the certificate with that number, in time."""

    def now() -> bool:
        pem = ssl.get_server_certificate((HOST, one.port), timeout=10)
        return x509.load_pem_x509_certificate(pem.encode()).serial_number == serial

    return _until(now, seconds)


def _until(holds: Callable[[], bool], seconds: float = WAIT_SECONDS) -> bool:
    ends = time.perf_counter() + seconds
    while not holds():
        if time.perf_counter() > ends:
            return False
        time.sleep(0.1)
    return True


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
