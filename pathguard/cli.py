"""The command `pathguard`: one verb for each step from images to verdicts, each in `pathguard.commands`."""

import logging
import sys
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from pathguard import __version__
from pathguard.client import ClientError
from pathguard.commands import (
    attacks,
    compaction,
    detector,
    encodings,
    hardening,
    interpretation,
    network,
    server,
    serving,
)

app = typer.Typer(
    name="pathguard",
    help="Serve a CNN that answers with a label and the evidence against it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Run the command; what goes wrong is told in one line, exit code 1 (2: wrong arguments, 130: Ctrl-C)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        # Not standalone: a mistake in the arguments then comes here too, for one line instead of a box.
        code = app(standalone_mode=False, prog_name="pathguard")
    except TyperException as error:
        if not error.format_message():  # no arguments at all: the help has been printed
            sys.exit(2)
        _fail(f"{error.format_message()} (see pathguard --help)", code=2)
    except ModuleNotFoundError as error:
        if error.name in {"service", "detector", "pathguard"}:
            raise
        _fail(
            f"expected the package {error.name}, got none; install Pathguard with the extra serve or, to train, train"
        )
    except Exception as error:
        if not _is_meant_for_people(error):
            raise
        _fail(str(error))
    if code == INTERRUPTED:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _is_meant_for_people(error: Exception) -> bool:
    """Whether this is one of our own errors, looked up only in what is imported already."""
    known: list[type[Exception]] = [ClientError]
    for module, name in (("detector.errors", "DetectorError"), ("service.errors", "ServiceError")):
        if module in sys.modules:
            known.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(known))


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for verb in (
    network.train,
    network.decouple,
    hardening.harden,
    attacks.attack,
    attacks.report,
    encodings.encode,
    detector.fit,
    detector.calibrate,
    detector.evaluate,
    interpretation.interpret,
    interpretation.explain,
    compaction.compact,
    server.serve,
    server.upgrade,
    serving.detect,
    serving.bench,
    serving.health,
):
    app.command()(verb)
