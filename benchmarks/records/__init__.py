"""Measured figures that are kept: JSON files, committed where the README tells them.

What takes hours is measured once, on the machine that the record names, and told by every later run of the benchmark;
a record is of exactly what its identity says, and of nothing else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from detector.errors import ArtifactError
from detector.files import write_whole


def recorded(file: Path, identity: Mapping[str, object]) -> Mapping[str, Any] | None:
    """The figures of a record; None where there is none.

    Args:
        file: the record.
        identity: what was measured, JSON values.

    Raises:
        ArtifactError: the record is of something else.
    """
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    check_identity(file, content["identity"], identity)
    figures: Mapping[str, Any] = content["figures"]
    return figures


def record(file: Path, identity: Mapping[str, object], figures: Mapping[str, object]) -> None:
    """Keep `figures`, with the machine that measured them, for `recorded`."""
    content = {"machine": machine(), "identity": identity, "figures": figures}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())


def check_identity(place: Path, found: object, expected: Mapping[str, object]) -> None:
    """Refuse what is not of `expected`.

    Raises:
        ArtifactError: `found`, which lies in `place`, is something else.
    """
    if found != json.loads(json.dumps(expected)):
        raise ArtifactError(f"expected {place} to be of {expected}, got {found}; remove it to make it anew")
