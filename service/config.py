"""The server's settings: one small frozen value, from code or from the environment."""

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from service.errors import ConfigError

PREFIX: Final = "PATHGUARD_"

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """How the server listens, batches and protects itself.

    Each field is also a variable: `max_batch` is `PATHGUARD_MAX_BATCH`.

    Attributes:
        host: address to listen on.
        port: TCP port, 0 to 65535; 0 takes any free one.
        max_batch: most images in one forward pass, at least 1.
        max_wait_seconds: how long images with earlier deadlines may go before the oldest waiting one, at least 0.
        max_pending_images: most images taken in and not yet answered, at least `max_images_per_request`.
        max_pending_bytes: most bytes of pixels taken in and not yet answered, at least 1.
        max_images_per_request: most images in one call, at least 1.
        max_message_bytes: largest request or response message, 1 to 2,147,483,647.
        max_pixels: largest height times width of an encoded image, read from its header before decoding, at least 1.
        decode_threads: threads that decode image files, at least 1.
        notice_seconds: at a stop, how long new calls are still taken after health says NOT_SERVING, at least 0.
        drain_seconds: at a stop, how long calls that were taken may go on, at least 0.
        reflection: whether clients may ask the server for its contract.
        allow_insecure: whether to listen without encryption on an address that other machines can reach.

    Raises:
        ConfigError: a value is out of range, or `host` is open to other machines without `allow_insecure`.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    max_batch: int = 32
    max_wait_seconds: float = 0.1
    max_pending_images: int = 4096
    max_pending_bytes: int = 256 * 1024 * 1024
    max_images_per_request: int = 1024
    max_message_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 16_777_216
    decode_threads: int = 2
    notice_seconds: float = 0.5
    drain_seconds: float = 20.0
    reflection: bool = True
    allow_insecure: bool = False

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("expected host to be a name or an address, got nothing")
        self._check("port", 0, 65535)
        for name in ("max_batch", "max_pending_bytes", "max_images_per_request", "max_pixels", "decode_threads"):
            self._check(name, 1)
        self._check("max_pending_images", self.max_images_per_request)
        self._check("max_message_bytes", 1, 2**31 - 1)
        for name in ("max_wait_seconds", "notice_seconds", "drain_seconds"):
            self._check(name, 0)
        if not self.allow_insecure and not _is_loopback(self.host):
            raise ConfigError(
                f"expected a loopback host such as 127.0.0.1, got {self.host}: traffic is not encrypted, so set "
                f"allow_insecure ({PREFIX}ALLOW_INSECURE=1) if only trusted machines can reach it"
            )

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str], also_known: Collection[str] = (f"{PREFIX}BUNDLE", f"{PREFIX}THREADS")
    ) -> "ServiceConfig":
        """The settings that the `PATHGUARD_*` variables of `environ` ask for.

        Args:
            environ: `os.environ`, or what a test puts in its place; other variables are ignored.
            also_known: `PATHGUARD_*` variables that are read elsewhere.

        Raises:
            ConfigError: an unknown variable, or a value that is no number, no switch or out of range.
        """
        defaults = {PREFIX + field.name.upper(): (field.name, field.default) for field in fields(cls)}
        given = {name: text for name, text in environ.items() if name.startswith(PREFIX) and name not in also_known}
        if unknown := sorted(given.keys() - defaults.keys()):
            known = ", ".join(sorted([*defaults, *also_known]))
            raise ConfigError(f"expected only known {PREFIX}* variables, got {', '.join(unknown)}; known are {known}")
        values: dict[str, Any] = {
            defaults[name][0]: _parsed(name, text, type(defaults[name][1])) for name, text in given.items()
        }
        return cls(**values)

    def _check(self, name: str, low: float, high: float = float("inf")) -> None:
        value = getattr(self, name)
        # Written so that NaN, for which every comparison is false, is refused too.
        if not low <= value <= high or value == float("inf"):
            wanted = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise ConfigError(f"expected {name} of {wanted}, got {value}")


def _parsed(name: str, text: str, kind: type) -> Any:
    try:
        return _SWITCH[text.strip().lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "1 or 0", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"expected {name} to be {wanted}, got {text!r}") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
