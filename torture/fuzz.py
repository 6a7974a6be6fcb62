"""Feeds the server what nobody would send, over a million times: `make fuzz`.

    python -m torture.fuzz [--quick] [--json FILE]

First each target of `torture/targets.py` by itself: by atheris, which looks for inputs that reach new code (where it is
installed: `pip install atheris`), and by plain random changes of good inputs, during which memory is watched. Then a
running server gets changed requests of both protocols over the wire, with a well-behaved caller beside. Ends by itself.
"""

import argparse
import asyncio
import importlib.util
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from torture import frames
from torture.known import known_of_fake
from torture.load import load
from torture.report import Outcome, all_passed, outcome_of, print_outcomes, write_outcomes
from torture.servers import OPTIONS, ServerProcess, fake, server
from torture.targets import MAX_BYTES, TARGETS

INFER = "/inference.GRPCInferenceService/ModelInfer"
INPUTS_BAR = 1_000_000
REACHED_BAR = 100_000
GROWTH_MEGABYTES = 30.0
SERVER_GROWTH_MEGABYTES = 100.0
WIRE_CALLERS = 16
ENGINE_SECONDS = 600

# Inputs for each target: by atheris, by random changes; and calls over the wire.
FULL = ({"detect": 150_000, "infer": 150_000, "bytes": 200_000, "image": 60_000}, 150_000, 40_000)
QUICK = ({"infer": 3_000}, 3_000, 1_000)

# How often a place is changed, and what stands there then: what parsers like least.
_INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff\xff\xff\xff\x0f")


def main() -> int:
    """Runs all, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m torture.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; the bars on counts do not hold then")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    guided, changed, calls = QUICK if given.quick else FULL
    outcomes = []
    for name in TARGETS:
        if name in guided:
            outcomes.append(_guided(name, guided[name], given.seed))
        outcomes.append(_changed(name, changed // (5 if name == "image" else 1), given.seed))
    for name, method in (("detect", frames.DETECT), ("infer", INFER)):
        outcomes.append(_over_the_wire(name, method, calls, given.seed))
    outcomes.append(_together(outcomes, given.quick))
    print_outcomes("fuzzing", outcomes)
    if given.json:
        write_outcomes(given.json, outcomes)
    return 0 if all_passed(outcomes) else 1


def _guided(name: str, runs: int, seed: int) -> Outcome:
    """By atheris, in a process of its own, which a find ends."""
    with outcome_of(f"{name}, guided by coverage") as outcome, tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("atheris") is None:
            outcome.skipped = "no atheris here: pip install atheris"
            return outcome
        corpus, counts = Path(folder) / "corpus", Path(folder) / "counts.json"
        corpus.mkdir()
        for number, content in enumerate(TARGETS[name].seeds):
            (corpus / str(number)).write_bytes(content)
        command = [sys.executable, "-m", "torture.guided", name, str(counts), str(runs), str(corpus)]
        command += [f"-runs={runs}", f"-seed={seed + 1}", f"-max_len={MAX_BYTES}", "-timeout=20", "-rss_limit_mb=2048"]
        command += [f"-artifact_prefix={folder}/find-", f"-max_total_time={ENGINE_SECONDS}"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        seen = json.loads(counts.read_text()) if counts.exists() else {"inputs": 0, "reached": 0}
        outcome.figures |= seen
        outcome.expect(done.returncode == 0, f"ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        for find in Path(folder).glob("find-*"):
            outcome.problems.append(f"{find.name}: {find.read_bytes()[:200].hex()}")
    return outcome


def _changed(name: str, runs: int, seed: int) -> Outcome:
    """By random changes of good inputs, in this process, whose memory must not grow."""
    target = TARGETS[name]
    chance = random.Random(seed)
    with outcome_of(f"{name}, random changes") as outcome:
        reached, before, slowest = 0, 0.0, 0.0
        for number in range(runs):
            if number == runs // 4:
                before = _resident_megabytes()
            content = changed(target.seeds, chance)
            begun = time.perf_counter()
            try:
                reached += target.run(content)
            except Exception as error:
                outcome.problems.append(f"{type(error).__name__}: {error}; input {content[:200].hex()}")
                if len(outcome.problems) > 5:
                    break
            slowest = max(slowest, time.perf_counter() - begun)
        grown = _resident_megabytes() - before
        outcome.figures |= {"inputs": runs, "reached": reached, "memory grown, MB": grown, "slowest, ms": slowest * 1e3}
        outcome.expect(grown < GROWTH_MEGABYTES, f"memory grew by {grown:.0f} MB")
    return outcome


def _over_the_wire(name: str, method: str, calls: int, seed: int) -> Outcome:
    """To a server in a process of its own, with a caller beside whose answers have to be right and in time."""
    with outcome_of(f"{name}, over the wire") as outcome, server(fake(steady=True)) as one:
        before = 0.0
        with load(one.target, known_of_fake(), outcome):
            asyncio.run(_calls(one, method, TARGETS[name].seeds, calls // 4, seed, outcome))
            before = one.resident_megabytes()
            asyncio.run(_calls(one, method, TARGETS[name].seeds, calls - calls // 4, seed + 1, outcome))
        grown = one.resident_megabytes() - before
        outcome.figures |= {"inputs": calls, "memory grown, MB": grown}
        outcome.expect(grown < SERVER_GROWTH_MEGABYTES, f"the server's memory grew by {grown:.0f} MB")
        outcome.expect(one.metric("pathguard_queue_images") == 0, "images are still taken in and not answered")
        said = one.log.read_text(encoding="utf-8", errors="replace")
        internal = [text for text in said.splitlines() if text.startswith("internal error")]
        outcome.expect(not internal, f"the server met what it did not expect: {one.tail()}")
    return outcome


async def _calls(
    one: ServerProcess, method: str, seeds: Sequence[bytes], count: int, seed: int, outcome: Outcome
) -> None:
    codes: Counter[str] = Counter()
    left = iter(range(count))

    async def caller(chance: random.Random) -> None:
        async with grpc.aio.insecure_channel(one.target, options=OPTIONS) as channel:
            call: Any = channel.unary_unary(method)
            for _ in left:
                try:
                    await call(changed(seeds, chance), timeout=10)
                    codes["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    codes[error.code().name] += 1

    await asyncio.gather(*(caller(random.Random(seed * 1000 + number)) for number in range(WIRE_CALLERS)))
    for code, number in codes.items():
        outcome.figures[code] = int(outcome.figures.get(code, 0)) + number
    outcome.figures["reached"] = int(outcome.figures.get("OK", 0))
    allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    outcome.expect(set(codes) <= allowed, f"expected {sorted(allowed)}, got {dict(codes)}")


def _together(outcomes: Sequence[Outcome], quick: bool) -> Outcome:
    with outcome_of("all together") as outcome:
        inputs = sum(int(one.figures.get("inputs", 0)) for one in outcomes)
        reached = sum(int(one.figures.get("reached", 0)) for one in outcomes)
        outcome.figures |= {"inputs": inputs, "past parsing": reached}
        if not quick:
            outcome.expect(inputs >= INPUTS_BAR, f"expected at least {INPUTS_BAR} inputs, got {inputs}")
            outcome.expect(reached >= REACHED_BAR, f"expected at least {REACHED_BAR} past parsing, got {reached}")
    return outcome


def changed(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """One of `seeds` with a few random changes; sometimes none, or two of them put together."""
    content = bytearray(chance.choice(seeds))
    for change in _some(chance):
        place = chance.randrange(len(content) + 1)
        if change < 0.35 and place < len(content):
            content[place] ^= 1 << chance.randrange(8)
        elif change < 0.6:
            piece = chance.choice(_INTERESTING)
            content[place : place + len(piece)] = piece
        elif change < 0.75:
            del content[place : place + chance.randrange(1, 9)]
        elif change < 0.9:
            content[place:place] = chance.randbytes(chance.randrange(1, 9))
        else:
            other = chance.choice(seeds)
            content[place:] = other[chance.randrange(len(other)) :]
    return bytes(content[:MAX_BYTES])


def _some(chance: random.Random) -> Iterator[float]:
    return (chance.random() for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 8))))


def _resident_megabytes() -> float:
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * 4096 / 1e6


if __name__ == "__main__":
    sys.exit(main())
