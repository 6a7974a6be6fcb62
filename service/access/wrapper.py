"""At the door of every RPC: who calls, whether they may, whether they ask too often, and how long they may stay."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from service.access.callers import FULL, Caller, address_name, set_caller
from service.access.credentials import Credentials
from service.access.quotas import Quotas
from service.errors import CredentialError, ExpiredError
from service.interceptors import Context, Single, Stream

# What probes and load balancers ask, who have no credential: nothing but whether the server is there.
OPEN_METHODS: Final = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    }
)
_KEY: Final = "authorization"
_SCHEME: Final = "bearer "
_NAMES: Final = ("x509_subject_alternative_name", "x509_common_name")


class AccessWrapper:
    """Says who the caller is (`service.access.callers.caller`), and ends what it may not do. Goes inside errors."""

    def __init__(
        self,
        credentials: Callable[[], Credentials | None],
        calls: Quotas,
        max_call_seconds: float,
        *,
        by_certificate: bool,
    ) -> None:
        """Nothing is kept of a call.

        Args:
            credentials: who is known now; None where everybody may do everything.
            calls: how many calls one client may make.
            max_call_seconds: how long a call that is answered once may take, above 0.
            by_certificate: whether clients are asked for certificates.
        """
        self._credentials = credentials
        self._calls = calls
        self._max_seconds = max_call_seconds
        self._by_certificate = by_certificate

    def single(self, method: str, behaviour: Single) -> Single:
        """Goes around a handler that answers once."""
        if method in OPEN_METHODS:
            return behaviour

        async def admitted(request: Any, context: Context) -> Any:
            self._admit(context)
            try:
                async with asyncio.timeout(self._max_seconds) as limit:
                    return await behaviour(request, context)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise ExpiredError(f"expected a call of at most {self._max_seconds:g} s, got one longer") from None

        return admitted

    def stream(self, method: str, behaviour: Stream) -> Stream:
        """Goes around a handler that answers with a stream, which may take as long as its client likes."""
        if method in OPEN_METHODS:
            return behaviour

        async def admitted(request: Any, context: Context) -> AsyncIterator[Any]:
            self._admit(context)
            async for response in behaviour(request, context):
                yield response

        return admitted

    def _admit(self, context: Context) -> None:
        caller = identify(context, self._credentials(), by_certificate=self._by_certificate)
        set_caller(caller)
        self._calls.take(caller.name, 1)


def identify(context: Context, credentials: Credentials | None, *, by_certificate: bool) -> Caller:
    """Who calls: by token, else by certificate if clients are asked for one, else by address.

    Raises:
        CredentialError: no credential, or one that is not known.
    """
    if credentials is None:
        names = _certificate_names(context) if by_certificate else []
        return Caller(f"certificate:{names[0]}" if names else address_name(context.peer()), FULL)
    token = _token_of(context)
    if token is not None:
        caller = credentials.of_token(token)
        if caller is None:
            raise CredentialError("expected a token that this server knows, got another one")
        return caller
    names = _certificate_names(context) if by_certificate else []
    caller = credentials.of_certificate(names)
    if caller is not None:
        return caller
    if credentials.anonymous is None:
        what = "a certificate that this server does not know" if names else "none"
        raise CredentialError(f"expected a token in the metadata authorization: Bearer TOKEN, got {what}")
    return Caller(address_name(context.peer()), credentials.anonymous)


def _token_of(context: Context) -> str | None:
    """The bearer token that was sent; None where none was."""
    for key, value in context.invocation_metadata() or ():
        if key == _KEY:
            text = value if isinstance(value, str) else ""
            if text[: len(_SCHEME)].lower() != _SCHEME:
                raise CredentialError("expected authorization: Bearer TOKEN, got another kind of authorization")
            return text[len(_SCHEME) :].strip()
    return None


def _certificate_names(context: Context) -> list[str]:
    """The names in the certificate that the client showed in TLS, checked by gRPC; none without mTLS."""
    shown: Mapping[str, Any] = context.auth_context()
    return [name.decode("utf-8", "replace") for key in _NAMES for name in shown.get(key, ())]
