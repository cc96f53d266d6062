"""A Mixture-of-Experts runtime on Ray: experts as actors, a router service before them, and its clients.

Importing this package loads neither ray, torch nor zmq; a name below loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import (
    AlreadyRunningError,
    ConfigError,
    DeadlineExceededError,
    DTypeError,
    ExpertError,
    InternalError,
    InvalidRequestError,
    MoERuntimeError,
    NonFiniteError,
    OverloadedError,
    PermissionDeniedError,
    PlacementError,
    PlugInError,
    PoisonedRequestError,
    ProtocolError,
    ProtocolVersionError,
    RequestCancelledError,
    RequestTooLargeError,
    ShapeError,
    StartError,
    StreamRequiredError,
    TransportError,
    UnauthenticatedError,
    UnavailableError,
    UnknownLayerError,
    UnsupportedModelError,
    WeightsError,
)

if TYPE_CHECKING:
    from moe_runtime.launch.runtime import attach, restart, serve, upgrade
    from moe_runtime.launch.served import Runtime
    from moe_runtime.rpc.aio_client import AsyncMoEClient
    from moe_runtime.rpc.channels import ClientTLS
    from moe_runtime.rpc.client import MoEClient
    from moe_runtime.rpc.retries import RetryPolicy
    from moe_runtime.wire.messages import ForwardResult, Report, RequestOptions

__version__ = "0.1.0"

__all__ = [
    "AlreadyRunningError",
    "AsyncMoEClient",
    "ClientTLS",
    "ConfigError",
    "DTypeError",
    "DeadlineExceededError",
    "ExpertError",
    "ForwardResult",
    "InternalError",
    "InvalidRequestError",
    "MoEClient",
    "MoERuntimeError",
    "NonFiniteError",
    "OverloadedError",
    "PermissionDeniedError",
    "PlacementError",
    "PlugInError",
    "PoisonedRequestError",
    "ProtocolError",
    "ProtocolVersionError",
    "Report",
    "RequestCancelledError",
    "RequestOptions",
    "RequestTooLargeError",
    "RetryPolicy",
    "Runtime",
    "ShapeError",
    "StartError",
    "StreamRequiredError",
    "TransportError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownLayerError",
    "UnsupportedModelError",
    "WeightsError",
    "attach",
    "restart",
    "serve",
    "upgrade",
]

_MODULES = {
    "AsyncMoEClient": "moe_runtime.rpc.aio_client",
    "ClientTLS": "moe_runtime.rpc.channels",
    "ForwardResult": "moe_runtime.wire.messages",
    "MoEClient": "moe_runtime.rpc.client",
    "Report": "moe_runtime.wire.messages",
    "RequestOptions": "moe_runtime.wire.messages",
    "RetryPolicy": "moe_runtime.rpc.retries",
    "Runtime": "moe_runtime.launch.served",
    "attach": "moe_runtime.launch.runtime",
    "restart": "moe_runtime.launch.runtime",
    "serve": "moe_runtime.launch.runtime",
    "upgrade": "moe_runtime.launch.runtime",
}
#: What `pip install 'moe-runtime[runtime]'` adds, by the names that it is imported by.
_RUNTIME_EXTRA = frozenset({"fsspec", "grpc_health", "ray", "rich", "safetensors", "torch", "typer", "yaml", "zmq"})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing not in _RUNTIME_EXTRA:
            raise
        raise ImportError(
            f"moe_runtime.{name} needs the package {missing}, which the client alone does not: "
            "pip install 'moe-runtime[runtime]'",
            name=missing,
        ) from exc
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
