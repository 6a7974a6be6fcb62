"""Writes the Python code of the contracts, or checks the contracts and that the code kept beside them is up to date.

Run from the root of the repository, so that the modules are `protos.pathguard.v1.detection_pb2` and do not collide
with the package `pathguard`. The check also runs `buf` by the rules of `buf.yaml`: its linter, and its comparison with
`released.binpb`, the contracts as of the last release, which callers rely on. `--release` writes that file anew.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = ("protos/inference/grpc_service.proto", "protos/pathguard/v1/detection.proto")
OWN_FOLDERS = ("inference", "pathguard")
RELEASED = ROOT / "protos" / "released.binpb"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(folder: Path) -> None:
    """Writes the code of all contracts below `folder`.

    Raises:
        SystemExit: protoc refused a contract; its own message stands on standard error.
    """
    _protoc(
        ROOT,
        f"--plugin=protoc-gen-mypy={_program('protoc-gen-mypy')}",
        f"--plugin=protoc-gen-mypy_grpc={_program('protoc-gen-mypy_grpc')}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
        f"--mypy_out=quiet:{folder}",
        f"--mypy_grpc_out=quiet:{folder}",
        *CONTRACTS,
    )


def drifted() -> list[str]:
    """The generated files that differ from what the contracts give now, or are missing."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        names = [contract.removesuffix(".proto") + suffix for contract in CONTRACTS for suffix in SUFFIXES]
        return [name for name in names if _text(ROOT / name) != _text(Path(folder) / name)]


def describe(image: Path, *, with_comments: bool) -> None:
    """Writes the descriptors of all contracts, and of what they import, to `image`: what `buf` reads.

    Args:
        image: file to write.
        with_comments: whether comments and positions come along, which the linter wants.

    Raises:
        SystemExit: protoc refused a contract; its own message stands on standard error.
    """
    comments = ["--include_source_info"] if with_comments else []
    names = (name.removeprefix("protos/") for name in CONTRACTS)
    _protoc(ROOT / "protos", "--include_imports", *comments, f"--descriptor_set_out={image}", *names)


def complaints(released: Path = RELEASED) -> str:
    """What `buf` has against the contracts: lint, and what would break a client of `released`; empty if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "now.binpb"
        describe(image, with_comments=True)
        return _buf("lint", image) + _buf("breaking", image, "--against", str(released))


def main() -> None:
    """Generates, or with `--check` only looks and fails with one line for each fault."""
    parser = argparse.ArgumentParser(prog="python -m protos.generate", description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="write nothing; fail if code has drifted or buf complains")
    choice.add_argument("--release", action="store_true", help="keep the contracts as what a release promises")
    given = parser.parse_args()
    if given.release:
        describe(RELEASED, with_comments=False)
    elif not given.check:
        generate(ROOT)
    elif names := drifted():
        raise SystemExit(f"expected code as the contracts give it, got others in {', '.join(names)}: run make protos")
    elif text := complaints():
        raise SystemExit(f"expected contracts that buf accepts and that break no client of the release, got\n{text}")


def _protoc(root: Path, *arguments: str) -> None:
    paths = (root, files("grpc_tools") / "_proto", _google_apis())
    status = protoc.main(["protoc", *(f"--proto_path={path}" for path in paths), *arguments])  # type: ignore[no-untyped-call]
    if status:
        raise SystemExit(status)


def _buf(verb: str, image: Path, *arguments: str) -> str:
    """What `buf` prints about our own files in `image`."""
    paths = [word for folder in OWN_FOLDERS for word in ("--path", folder)]
    command = [_program("buf"), verb, image, "--config", ROOT / "protos" / "buf.yaml", *paths, *arguments]
    # A cache folder of its own: buf wants one although nothing is fetched, and a home may be read-only.
    environment = {**os.environ, "BUF_CACHE_DIR": str(image.parent)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    said = finished.stdout + finished.stderr
    return said or (f"buf {verb} ended with {finished.returncode}\n" if finished.returncode else "")


def _program(name: str) -> Path:
    """A program that was installed beside this Python."""
    return Path(sys.executable).parent / name


def _google_apis() -> Path:
    """The folder that holds `google/rpc/status.proto`."""
    return Path(status_pb2.__file__).parents[2]


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None


if __name__ == "__main__":
    main()
