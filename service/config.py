"""The server's settings: one frozen value, in groups, from code, from flags or from the environment.

Each setting stands here once, with its default, its range and one line of help; the flags of `pathguard serve` and the
variables `PATHGUARD_...` follow from it. A setting of a group has the group before its name: `tls.key` is `--tls-key`
and `PATHGUARD_TLS_KEY`.
"""

import ipaddress
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Final

from service.errors import ConfigError

PREFIX: Final = "PATHGUARD_"
# Variables that are no settings of the server but may stand beside them: sources of models, what runs them.
ELSEWHERE: Final = tuple(
    f"{PREFIX}{name}"
    for name in ("BUNDLE", "MODELS", "THREADS", "TRUST", "ENGINE", "TOKEN", "TARGET", "DATA_DIR", "RAY")
)

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_WANTED = {bool: "1 or 0", int: "a whole number", float: "a number", str: "text"}


def _setting(
    default: Any,
    text: str,
    low: float | None = None,
    high: float = math.inf,
    *,
    choices: Collection[str] = (),
    kind: type | None = None,
) -> Any:
    """A field with its one line of help and its range; `kind` where the default is None."""
    metadata = {"help": text, "low": low, "high": high, "choices": choices, "kind": kind or type(default)}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsConfig:
    """Which bundles are in service, and how changed ones are taken in."""

    default: str = _setting("", "Model for calls that name none; empty for the first.")
    keep_versions: int = _setting(2, "Newest versions of a model in service at once, besides a pinned one.", 1)
    poll_seconds: float = _setting(2.0, "How often the folders are looked at; 0 for never again.", 0)
    load_seconds: float = _setting(300.0, "How long a changed bundle may take to load and warm up.", 0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Encryption; the files are read again when they change."""

    certificate: str = _setting("", "PEM file with the server's certificate chain; turns TLS on.")
    key: str = _setting("", "PEM file with the private key of the certificate.")
    client_ca: str = _setting("", "PEM file of authorities; clients must then show a certificate of theirs (mTLS).")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """Who may call, what they may see and set, and how much they may ask."""

    file: str = _setting("", "JSON file with roles, tokens' SHA-256 and certificates' names; read again when changed.")
    calls_per_second: float = _setting(0.0, "Calls that one client may make a second; 0 for no limit.", 0)
    images_per_second: float = _setting(0.0, "Images that one client may send a second; 0 for no limit.", 0)
    burst_seconds: float = _setting(2.0, "Seconds' worth of these rates that may come at once.", 0.001)
    max_clients: int = _setting(10_000, "Clients remembered at once; the one unseen for longest is forgotten.", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Prometheus metrics, on a port of their own."""

    port: int | None = _setting(None, "Port of /metrics; 0 takes any free one; unset for none.", 0, 65535, kind=int)
    host: str = _setting("127.0.0.1", "Address of /metrics.")


@dataclass(frozen=True, slots=True, kw_only=True)
class UiConfig:
    """The page for people, on a port of its own; who reaches it sees all that it shows, without a token."""

    port: int | None = _setting(None, "Port of the page; 0 takes any free one; unset for none.", 0, 65535, kind=int)
    host: str = _setting("127.0.0.1", "Address of the page.")
    max_upload_bytes: int = _setting(8 * 1024 * 1024, "Largest image file that the page takes.", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What the server says on standard error."""

    format: str = _setting("text", "text for people, json for programs.", choices=("text", "json"))
    level: str = _setting(
        "info", "Least severe records that are written.", choices=("debug", "info", "warning", "error")
    )
    calls: bool = _setting(False, "Also one record for each call.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """The log of verdicts: one line of JSON for each call, written before the answer leaves."""

    file: str = _setting("", "File of the log of verdicts; turns it on.")
    max_bytes: int = _setting(64 * 1024 * 1024, "Size at which the file is put aside and a new one begun.", 4096)
    keep_files: int = _setting(10, "Files put aside that are kept.", 1)
    fsync: bool = _setting(False, "Also survive a power cut: wait for the disk before each answer.")
    wait_seconds: float = _setting(1.0, "How long an answer waits for a slow disk before it leaves unrecorded.", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """Whether the share of flagged images is still what the calibration allows."""

    window_images: int = _setting(0, "Images of a model that are judged together; 0 turns the check off.", 0)
    level: float = _setting(0.001, "How improbable a window must be to raise the alarm.", 1e-12, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryWatchConfig:
    """Whether one client sends many near-identical images, as attacks do that know only the answers."""

    memory_images: int = _setting(0, "Recent images remembered of each client; 0 turns the watch off.", 0)
    max_clients: int = _setting(1000, "Clients remembered at once.", 1)
    distance: float = _setting(3.0, "Mean grey levels of 255 by which near-identical images differ at most.", 0, 255)
    neighbours: int = _setting(50, "Near-identical images among those remembered that raise the alarm.", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """How the server listens, batches, protects itself and tells what it does.

    Each field is also a variable: `max_batch` is `PATHGUARD_MAX_BATCH`.

    Raises:
        ConfigError: a value is out of range, settings contradict each other, or `host` is open to other machines
            without TLS and without `allow_insecure`.
    """

    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(50051, "TCP port; 0 takes any free one.", 0, 65535)
    max_batch: int = _setting(32, "Most images in one forward pass.", 1)
    max_wait_seconds: float = _setting(0.1, "How long earlier deadlines may go before the oldest waiting image.", 0)
    max_pending_images: int = _setting(4096, "Most images taken in and not yet answered.", 1)
    max_pending_bytes: int = _setting(256 * 1024 * 1024, "Most bytes of pixels taken in and not yet answered.", 1)
    max_images_per_request: int = _setting(1024, "Most images in one call.", 1)
    stream_in_flight: int = _setting(256, "Images of one DetectStream that are under way at once.", 1)
    max_message_bytes: int = _setting(64 * 1024 * 1024, "Largest request or response message.", 1, 2**31 - 1)
    max_pixels: int = _setting(16_777_216, "Largest height times width of an encoded image, read from its header.", 1)
    max_calls_per_connection: int = _setting(256, "Calls of one connection at once; more wait at the client.", 1)
    max_call_seconds: float = _setting(60.0, "Longest that a call may take, whatever its deadline.", 0.001)
    loop_cpu: int | None = _setting(
        None, "Processor that the event loop and gRPC keep to: small calls are answered sooner.", 0, kind=int
    )
    decode_threads: int = _setting(2, "Threads that decode image files.", 1)
    stall_seconds: float = _setting(30.0, "How long one batch may take before health says NOT_SERVING.", 0.001)
    notice_seconds: float = _setting(0.5, "At a stop: how long calls are still taken after NOT_SERVING is told.", 0)
    drain_seconds: float = _setting(20.0, "At a stop: how long calls that were taken may go on.", 0)
    reload_seconds: float = _setting(1.0, "How often files of certificates and credentials are looked at.", 0.001)
    reflection: bool = _setting(True, "Whether clients may ask the server for its contract.")
    traces: bool = _setting(False, "Send OpenTelemetry traces; OTEL_... variables say where (extra `otel`).")
    allow_insecure: bool = _setting(False, "Listen without TLS on an address that other machines can reach.")
    models: ModelsConfig = ModelsConfig()
    tls: TlsConfig = TlsConfig()
    access: AccessConfig = AccessConfig()
    metrics: MetricsConfig = MetricsConfig()
    ui: UiConfig = UiConfig()
    log: LogConfig = LogConfig()
    audit: AuditConfig = AuditConfig()
    drift: DriftConfig = DriftConfig()
    query_watch: QueryWatchConfig = QueryWatchConfig()

    def __post_init__(self) -> None:
        for setting in settings():
            _check(setting, self)
        if self.max_pending_images < self.max_images_per_request:
            raise ConfigError(
                f"expected max_pending_images of at least {self.max_images_per_request}, got {self.max_pending_images}"
            )
        if bool(self.tls.certificate) != bool(self.tls.key):
            raise ConfigError("expected tls_certificate and tls_key together, got one of them")
        if self.tls.client_ca and not self.tls.certificate:
            raise ConfigError("expected tls_certificate and tls_key beside tls_client_ca, got none")
        if not self.tls.certificate:
            self._check_reach("host", self.host, "traffic is not encrypted")
        if self.metrics.port is not None:
            self._check_reach("metrics_host", self.metrics.host, "metrics are not encrypted")
        if self.ui.port is not None:
            self._check_reach("ui_host", self.ui.host, "the page is not encrypted")

    def _check_reach(self, name: str, host: str, why: str) -> None:
        if not host:
            raise ConfigError(f"expected {name} to be a name or an address, got nothing")
        if not self.allow_insecure and not is_loopback(host):
            raise ConfigError(
                f"expected a loopback {name} such as 127.0.0.1, got {host}: {why}, so set "
                f"allow_insecure ({PREFIX}ALLOW_INSECURE=1) if only trusted machines can reach it"
            )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], also_known: Collection[str] = ELSEWHERE) -> "ServiceConfig":
        """The settings that the `PATHGUARD_*` variables of `environ` ask for.

        Args:
            environ: `os.environ`, or what a test puts in its place; other variables are ignored.
            also_known: `PATHGUARD_*` variables that are read elsewhere.

        Raises:
            ConfigError: an unknown variable, or a value that is no number, no switch or out of range.
        """
        known = {setting.variable: setting for setting in settings()}
        given = {name: text for name, text in environ.items() if name.startswith(PREFIX) and name not in also_known}
        if unknown := sorted(given.keys() - known.keys()):
            names = ", ".join(sorted([*known, *also_known]))
            raise ConfigError(f"expected only known {PREFIX}* variables, got {', '.join(unknown)}; known are {names}")
        values: dict[str, Any] = {}
        groups: dict[str, dict[str, Any]] = {}
        for name, text in given.items():
            setting = known[name]
            target = groups.setdefault(setting.group, {}) if setting.group else values
            target[setting.field] = _parsed(name, text, setting.kind)
        made = {name: type(getattr(_DEFAULTS, name))(**own) for name, own in groups.items()}
        return cls(**values, **made)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: where it stands and what it takes.

    Attributes:
        group: the group's field in `ServiceConfig`; empty for a setting of its own.
        field: its field there.
        kind: `bool`, `int`, `float` or `str`.
        default: the default; None for "off".
        help: one line for a person.
        low: smallest value; None where it has no order.
        high: largest value.
        choices: the only values; empty for any.
    """

    group: str
    field: str
    kind: type
    default: Any
    help: str
    low: float | None
    high: float
    choices: Collection[str]

    @property
    def name(self) -> str:
        """Group and field, such as `tls_key`."""
        return f"{self.group}_{self.field}" if self.group else self.field

    @property
    def variable(self) -> str:
        """Its variable, such as `PATHGUARD_TLS_KEY`."""
        return PREFIX + self.name.upper()

    def value(self, config: ServiceConfig) -> Any:
        """What it is in `config`."""
        return getattr(getattr(config, self.group) if self.group else config, self.field)


def settings() -> Iterator[Setting]:
    """Every setting, in the order of the help."""
    for entry in fields(ServiceConfig):
        if is_dataclass(entry.default):
            yield from (_setting_of(entry.name, inner) for inner in fields(entry.default))
        else:
            yield _setting_of("", entry)


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _setting_of(group: str, entry: "Field[Any]") -> Setting:
    known = entry.metadata
    return Setting(
        group,
        entry.name,
        known["kind"],
        entry.default,
        known["help"],
        known["low"],
        known["high"],
        known["choices"],
    )


def _check(setting: Setting, config: ServiceConfig) -> None:
    value = setting.value(config)
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"expected {setting.name} of {', '.join(setting.choices)}, got {value!r}")
    if setting.low is None or value is None:
        return
    # Written so that NaN, for which every comparison is false, is refused too.
    if not setting.low <= value <= setting.high or value == math.inf:
        wanted = f"at least {setting.low}" if setting.high == math.inf else f"{setting.low} to {setting.high}"
        raise ConfigError(f"expected {setting.name} of {wanted}, got {value}")


def _parsed(name: str, text: str, kind: type) -> Any:
    try:
        return _SWITCH[text.strip().lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"expected {name} to be {_WANTED[kind]}, got {text!r}") from None


_DEFAULTS: Final = ServiceConfig()
