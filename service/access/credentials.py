"""The file that says which tokens and client certificates have which role; JSON, without any secret in it:

    {
      "roles": {"shop": {"sees": ["label", "verdict"], "sets": []}},
      "tokens": [{"name": "web", "role": "shop", "sha256": "64 hexadecimal digits"}],
      "certificates": [{"name": "batch.example.org", "role": "full"}],
      "anonymous": "verdict"
    }

A token is sent as the metadata `authorization: Bearer TOKEN`; the file holds its SHA-256 only
(`printf %s TOKEN | sha256sum`). A token should be random (`openssl rand -hex 32`): what cannot be guessed needs no slow
hash. A certificate's name is one of its subject alternative names or its common name. `anonymous` is the role of
callers who show neither; without it they are refused. The roles `full` and `verdict` need no definition.
"""

import hashlib
import hmac
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.access.callers import FULL, SEES, SETS, VERDICT, Caller, Role
from service.errors import SettingsFileError


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who is known.

    Attributes:
        tokens: SHA-256 of each token, and whose it is.
        certificates: name in a client's certificate -> whose it is.
        anonymous: the role of callers without credential; None to refuse them.
    """

    tokens: Sequence[tuple[bytes, Caller]]
    certificates: Mapping[str, Caller]
    anonymous: Role | None

    def of_token(self, token: str) -> Caller | None:
        """Whose token this is; takes as long whether and wherever it is found."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        found = None
        for known, caller in self.tokens:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def of_certificate(self, names: Collection[str]) -> Caller | None:
        """Whose certificate has one of these names."""
        return next((self.certificates[name] for name in names if name in self.certificates), None)


def parse_credentials(contents: Sequence[bytes]) -> Credentials:
    """The credentials of one file's content.

    Raises:
        SettingsFileError: not JSON, or a part that is missing, unknown or not as the module says.
    """
    try:
        raw = json.loads(contents[0])
    except ValueError as error:
        raise SettingsFileError(f"expected credentials in JSON, got something else ({error})") from None
    top = _object(raw, "the file", optional={"roles", "tokens", "certificates", "anonymous"})
    roles = {role.name: role for role in (FULL, VERDICT)}
    for name, role in _object(top.get("roles", {}), "roles", any_key=True).items():
        part = _object(role, f"roles.{name}", required={"sees"}, optional={"sets"})
        roles[name] = Role(
            name,
            _names(part["sees"], SEES, f"roles.{name}.sees"),
            _names(part.get("sets", []), SETS, f"roles.{name}.sets"),
        )
    tokens: dict[bytes, Caller] = {}
    for place, entry in _entries(top, "tokens"):
        part = _object(entry, place, required={"name", "role", "sha256"})
        digest = _digest(part["sha256"], place)
        if digest in tokens:
            raise SettingsFileError(f"expected each token once, got that of {place} twice")
        tokens[digest] = Caller(f"token:{_text(part['name'], place)}", _role(part["role"], roles, place))
    certificates: dict[str, Caller] = {}
    for place, entry in _entries(top, "certificates"):
        part = _object(entry, place, required={"name", "role"})
        name = _text(part["name"], place)
        certificates[name] = Caller(f"certificate:{name}", _role(part["role"], roles, place))
    anonymous = _role(top["anonymous"], roles, "anonymous") if "anonymous" in top else None
    return Credentials(tuple(tokens.items()), certificates, anonymous)


def _entries(top: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    entries = top.get(name, [])
    if not isinstance(entries, list):
        raise SettingsFileError(f"expected {name} to be a list, got {type(entries).__name__}")
    return [(f"{name}[{position}]", entry) for position, entry in enumerate(entries)]


def _object(
    value: Any,
    place: str,
    required: Collection[str] = (),
    optional: Collection[str] = (),
    *,
    any_key: bool = False,
) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SettingsFileError(f"expected {place} to be an object, got {type(value).__name__}")
    missing = sorted(set(required) - set(value))
    unknown = [] if any_key else sorted(set(value) - set(required) - set(optional))
    if missing or unknown:
        wanted = ", ".join(sorted([*required, *optional]))
        raise SettingsFileError(f"expected {wanted} in {place}, got {', '.join(sorted(value)) or 'nothing'}")
    return value


def _names(value: Any, known: frozenset[str], place: str) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or not set(value) <= known:
        raise SettingsFileError(f"expected {place} to be a list of {', '.join(sorted(known))}, got {value}")
    return frozenset(value)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise SettingsFileError(f"expected a name in {place}, got {value!r}")
    return value


def _role(value: Any, roles: Mapping[str, Role], place: str) -> Role:
    if not isinstance(value, str) or value not in roles:
        raise SettingsFileError(f"expected a role of {', '.join(sorted(roles))} in {place}, got {value!r}")
    return roles[value]


def _digest(value: Any, place: str) -> bytes:
    try:
        digest = bytes.fromhex(value)
    except (TypeError, ValueError):
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        # What stands there may be the token itself, put in by mistake: it is not told.
        raise SettingsFileError(f"expected a token's SHA-256 in {place}, 64 hexadecimal digits, got something else")
    return digest
