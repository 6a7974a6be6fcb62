"""Who is calling, and what their role lets them see and set.

A score is an oracle: who may ask for scores of many near-identical images can feel the way to one that passes. So what
leaves the server follows the caller's role.
"""

import ipaddress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

from service.errors import ForbiddenError

SEES: Final = frozenset({"label", "probabilities", "verdict", "score", "p_value", "path"})
SETS: Final = frozenset({"max_false_alarm_rate"})


@dataclass(frozen=True, slots=True)
class Role:
    """What a caller may see and set.

    Attributes:
        name: for the log.
        sees: parts of an answer, of `SEES`; the others are left out.
        sets: options of a call, of `SETS`; the others are refused.
    """

    name: str
    sees: frozenset[str]
    sets: frozenset[str]

    def check_sets(self, option: str) -> None:
        """Refuse an option that this role may not set.

        Raises:
            ForbiddenError: it may not.
        """
        if option not in self.sets:
            raise ForbiddenError(f"expected a call without {option}, which the role {self.name} may not set, got one")

    def check_sees(self, part: str) -> None:
        """Refuse a call that asks for a part of the answer that this role may not see.

        Raises:
            ForbiddenError: it may not.
        """
        if part not in self.sees:
            raise ForbiddenError(f"expected a call that asks for no {part}, which the role {self.name} may not see")


# The roles that need no definition.
FULL: Final = Role("full", SEES, SETS)
VERDICT: Final = Role("verdict", frozenset({"label", "verdict"}), frozenset())


@dataclass(frozen=True, slots=True)
class Caller:
    """One client.

    Attributes:
        name: `token:NAME`, `certificate:NAME` or `ip:ADDRESS`; an IPv6 address stands for its /64 network.
        role: what it may see and set.
    """

    name: str
    role: Role


_NOBODY: Final = Caller("ip:unknown", FULL)
_CALLER: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def caller() -> Caller:
    """The client of the call that is being answered here."""
    return _CALLER.get()


def set_caller(value: Caller) -> None:
    """Says who the client of the present call is; forgotten with the call's task."""
    _CALLER.set(value)


@lru_cache(maxsize=4096)
def address_name(peer: str) -> str:
    """`ip:ADDRESS` of a gRPC peer such as `ipv4:127.0.0.1:4711` or `ipv6:%5B::1%5D:4711`."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    if kind == "ipv6":
        try:
            address = ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            return f"ip:{host}"
        if address.ipv4_mapped is not None:
            return f"ip:{address.ipv4_mapped}"
        return f"ip:{address}" if address.is_loopback else f"ip:{ipaddress.ip_network((address, 64), strict=False)}"
    return f"ip:{host}" if kind == "ipv4" else f"ip:{kind or 'unknown'}"
