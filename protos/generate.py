"""Writes the Python code of the contracts, or checks that the code kept beside them is up to date.

Run from the root of the repository, so that the modules are `protos.pathguard.v1.detection_pb2` and do not collide
with the package `pathguard`.
"""

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = ("protos/pathguard/v1/detection.proto",)
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(folder: Path) -> None:
    """Writes the code of all contracts below `folder`.

    Raises:
        SystemExit: protoc refused a contract; its own message stands on standard error.
    """
    scripts = Path(sys.executable).parent
    status = protoc.main(  # type: ignore[no-untyped-call]
        [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--proto_path={_google_apis()}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            f"--mypy_out=quiet:{folder}",
            f"--mypy_grpc_out=quiet:{folder}",
            *CONTRACTS,
        ]
    )
    if status:
        raise SystemExit(status)


def drifted() -> list[str]:
    """The generated files that differ from what the contracts give now, or are missing."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        names = [contract.removesuffix(".proto") + suffix for contract in CONTRACTS for suffix in SUFFIXES]
        return [name for name in names if _text(ROOT / name) != _text(Path(folder) / name)]


def main() -> None:
    """Generates, or with `--check` only compares and fails with one line."""
    parser = argparse.ArgumentParser(prog="python -m protos.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the code has drifted")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    if names := drifted():
        raise SystemExit(f"expected code as the contracts give it, got others in {', '.join(names)}: run make protos")


def _google_apis() -> Path:
    """The folder that holds `google/rpc/status.proto`."""
    return Path(status_pb2.__file__).parents[2]


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None


if __name__ == "__main__":
    main()
