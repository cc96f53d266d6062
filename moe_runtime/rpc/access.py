"""The door of a router: who calls, and whether the caller may; before anything of a request's body is read."""

from __future__ import annotations

import contextvars
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc

from moe_runtime.errors import UnauthenticatedError
from moe_runtime.rpc.border import Border
from moe_runtime.rpc.methods import AUTHORIZATION_KEY, DESCRIBE, FORWARD, FORWARD_STREAM, STATUS, path
from moe_runtime.rpc.status import metadata_of, status_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable

    from moe_runtime.config.security import Scope
    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.rpc.tokens import TokenFile

logger = logging.getLogger(__name__)

_ANY: tuple[Scope, ...] = ("admin", "infer", "metrics")
#: What a token must be good for; a method that is not listed needs ``admin``.
_SCOPES: dict[str, tuple[Scope, ...]] = {
    path(FORWARD): ("infer",),
    path(FORWARD_STREAM): ("infer",),
    path(DESCRIBE): _ANY,
    path(STATUS): _ANY,
    # Streams that stay open take up places: not for everybody.
    "/grpc.health.v1.Health/Watch": _ANY,
}
#: Load balancers have no token.
_OPEN = "/grpc.health.v1.Health/Check"
_SCHEME = "bearer "

_token_name: contextvars.ContextVar[str] = contextvars.ContextVar("token_name", default="")


class Doorman(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no annotations
    """Lets in who shows a token that is good for the method.

    Args:
        tokens: The tokens.
        on_refused: Told of every refusal.
    """

    def __init__(self, tokens: TokenFile, *, on_refused: Callable[[MoERuntimeError], None]) -> None:
        self._tokens = tokens
        self._on_refused = on_refused
        self._border = Border()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The method's handler, or one that refuses the call."""
        method = handler_call_details.method
        if method == _OPEN:
            return await continuation(handler_call_details)
        try:
            shown = _bearer_token(handler_call_details.invocation_metadata)
            token = self._tokens.authorize(shown, any_of=_SCOPES.get(method, ("admin",)))
        except Exception as exc:  # the border: gRPC would send the text of whatever gets past here
            error = self._border.error(exc, method="authorization")
            self._on_refused(error)
            return _refusal(error)
        # Read in the call's handler, which runs in the same task.
        _token_name.set(token.name)
        return await continuation(handler_call_details)


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Who calls: the name of its token, else that of its certificate, else its address without the port."""
    name = _token_name.get()
    if name:
        return name
    common_names: Collection[bytes] = context.auth_context().get("x509_common_name", ())
    for common_name in common_names:
        return common_name.decode(errors="replace")
    return _host_of(context.peer())


def _host_of(peer: str) -> str:
    """``10.0.0.7`` of ``ipv4:10.0.0.7:51312``."""
    family, _, address = peer.partition(":")
    return unquote(address).rpartition(":")[0].strip("[]") if family in ("ipv4", "ipv6") else family


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """What a call shows as its token.

    Raises:
        UnauthenticatedError: If it shows several, or something else.
    """
    shown = [value for key, value in metadata or () if key == AUTHORIZATION_KEY]
    if not shown:
        return None
    value = shown[0].decode(errors="backslashreplace") if isinstance(shown[0], bytes) else shown[0]
    if len(shown) > 1 or not value.lower().startswith(_SCHEME):
        raise UnauthenticatedError("expected one `authorization: Bearer TOKEN` in the metadata, found something else")
    return value[len(_SCHEME) :].strip(" ")


def _refusal(error: MoERuntimeError) -> grpc.RpcMethodHandler:
    # As a stream of requests whatever the method is: nothing of them is read.
    async def refuse(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        logger.info("refused a call from %s: %s", _host_of(context.peer()), error)
        code, details = status_of(error)
        await context.abort(code, details, metadata_of(error))
        yield b""  # makes this a stream; abort has raised

    return grpc.stream_stream_rpc_method_handler(refuse)
