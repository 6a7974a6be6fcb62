"""`pathguard serve`, whose flags are the server's settings, and `pathguard upgrade`."""

import inspect
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathguard.commands.options import Json, Ray
from pathguard.tables import show
from service.config import PREFIX, ServiceConfig, Setting, settings

if TYPE_CHECKING:
    from service.model import Model
    from service.models.repository import FoundVersion

# The bundle that ships with the project lies beside the packages, in a clone; an installed wheel has none.
SHIPPED = Path(__file__).resolve().parents[2] / "models" / "cifar10-resnet20"

_log = logging.getLogger(__name__)

_PANELS = {
    "": "Server",
    "models": "Models",
    "tls": "Encryption",
    "access": "Callers",
    "metrics": "Metrics",
    "ui": "Page",
    "log": "Log",
    "audit": "Audit log",
    "drift": "Drift",
    "query_watch": "Query watch",
}

UI_PORT = 8080


def serve(
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            help=f"Folder of a bundle; may be given again ({PREFIX}BUNDLE, with {os.pathsep} in between). Without one "
            "and without --models, the CIFAR-10 bundle that ships with the project."
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(help=f"Folder of models: NAME, or NAME/VERSION, each a bundle ({PREFIX}MODELS)."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help=f"Threads of the model (default: all cores; {PREFIX}THREADS).", min=1),
    ] = None,
    trust: Annotated[
        str | None,
        typer.Option(help=f"package.module:function whose code may run to build a network ({PREFIX}TRUST)."),
    ] = None,
    ui: Annotated[
        bool, typer.Option("--ui", help=f"Also serve a page for people, on port {UI_PORT} unless --ui-port says else.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            help=f"What runs the networks: kernel, onnx, sliced, cuda or masked (default: the fastest, measured when a "
            f"bundle is loaded; {PREFIX}ENGINE)."
        ),
    ] = None,
    ray: Ray = None,
    replicas: Annotated[
        str | None,
        typer.Option(help="With --ray: replicas of each model, N or MIN:MAX by load, a processor each (default: 1)."),
    ] = None,
    **given: Any,
) -> None:
    """Serve bundles over gRPC until SIGTERM or Ctrl-C. Every setting is also a variable, told beside it.

    A changed or new bundle is verified, warmed and swapped in while the server runs. DIR/NAME/serving.json may pin a
    version and set the rate: {"version": "2", "max_false_alarm_rate": 0.01}.
    """
    # As a container's first process, SIGTERM would do nothing until the server's event loop listens for it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    environ = {**os.environ, **_variables_of(given)}
    if ui:
        environ.setdefault(f"{PREFIX}UI_PORT", str(UI_PORT))
    config = ServiceConfig.from_environ(environ)
    from service.errors import ConfigError
    from service.models.repository import BundleFolders
    from service.records.logs import set_up_logs

    folders = bundle or [Path(part) for part in os.environ.get(f"{PREFIX}BUNDLE", "").split(os.pathsep) if part]
    if models is None and (text := os.environ.get(f"{PREFIX}MODELS")):
        models = Path(text)
    if not folders and models is None:
        if not SHIPPED.is_dir():
            raise ConfigError(f"expected --bundle or --models ({PREFIX}BUNDLE or {PREFIX}MODELS), got neither")
        folders = [SHIPPED]
    repository = BundleFolders(folders, models)
    set_up_logs(config.log)
    _set_threads(threads)
    from service.server import ModelSource, run

    def ready(port: int) -> None:
        names = ", ".join(model.name for model in repository.scan())
        print(f"serving {names} on {config.host}:{port}", flush=True)

    trusted, wanted = trust or os.environ.get(f"{PREFIX}TRUST"), engine or os.environ.get(f"{PREFIX}ENGINE", "")
    if ray is None:
        if replicas is not None:
            raise typer.BadParameter("expected --ray beside --replicas, got none")
        run(ModelSource(repository, partial(_load, trusted, wanted)), config, on_ready=ready)
        return
    from cluster.replicas import Replicas, replicated

    with replicated(ray, Replicas.parsed(replicas or "1"), trusted, wanted) as source:
        run(ModelSource(repository, source.load, source.replicas.most), config, on_ready=ready)


def upgrade(
    bundles: Annotated[list[Path], typer.Argument(help="Folders of bundles.", metavar="BUNDLE...")],
    json_: Json = False,
) -> None:
    """Write bundles in the present schema; the manifest that was stays beside the new one."""
    from detector.bundle import upgrade_bundle

    rows = []
    for folder in bundles:
        before, after = upgrade_bundle(folder)
        rows.append({"bundle": str(folder), "schema before": before, "schema": after})
    show("bundles", rows, json_)


def _load(trusted: str | None, engine: str, found: "FoundVersion", name: str) -> "Model":
    from detector.bundle import Bundle
    from detector.engines.choice import FASTEST
    from detector.scoring.detector import Detector

    detector = Detector(Bundle(found.folder, trusted), name, engine or FASTEST)
    for line in detector.choice.report():
        _log.info("model %s: %s", name, line)
    return detector


def _set_threads(threads: int | None) -> None:
    """As the flag says, else as the variable says."""
    import torch

    from service.errors import ConfigError

    text = os.environ.get(f"{PREFIX}THREADS", "")
    if threads is None and text:
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"expected {PREFIX}THREADS to be a whole number of at least 1, got {text!r}")
        threads = int(text)
    if threads is not None:
        torch.set_num_threads(threads)


def _variables_of(given: dict[str, Any]) -> dict[str, str]:
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in given.items() if value is not None}


def _option_of(setting: Setting) -> inspect.Parameter:
    """The flag of one setting; None where it is not given, so that variables and defaults count."""
    name = setting.name.replace("_", "-")
    default = setting.default
    if default is None or setting.kind is bool:
        default = "on" if default else "off"
    text = f"{setting.help} ({f'default: {default}; ' if default != '' else ''}{setting.variable})"
    flag = f"--{name}/--no-{name}" if setting.kind is bool else f"--{name}"
    option = typer.Option(flag, help=text, rich_help_panel=_PANELS[setting.group], show_default=False)
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[setting.kind | None, option],
    )


def _with_settings() -> inspect.Signature:
    own = [
        parameter
        for parameter in inspect.signature(serve).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return inspect.Signature([*own, *map(_option_of, settings())])


serve.__signature__ = _with_settings()  # type: ignore[attr-defined]
