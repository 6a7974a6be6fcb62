"""One target under atheris, for `torture.fuzz`: `python -m torture.guided TARGET COUNTS RUNS CORPUS [-runs=N ...]`."""

import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service", "detector", "PIL"]):
    from torture.targets import TARGETS

# libFuzzer ends the process without a word to Python: the counts are written on the way.
_WRITE_EVERY = 500


def main() -> None:
    """Runs until the runs are over, or something is found."""
    name, counts, runs, *rest = sys.argv[1:]
    run = TARGETS[name].run
    inputs = reached = 0

    def one(content: bytes) -> None:
        nonlocal inputs, reached
        inputs += 1
        reached += run(content)
        if inputs % _WRITE_EVERY == 0 or inputs == int(runs):
            Path(counts).write_text(json.dumps({"inputs": inputs, "reached": reached}), encoding="utf-8")

    atheris.Setup([sys.argv[0], *rest], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
