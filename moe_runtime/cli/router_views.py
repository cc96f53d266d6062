"""What routers say of themselves: a view of each that answers, and of each that does not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moe_runtime.cli.connections import Connection
from moe_runtime.errors import MoERuntimeError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class RouterView:
    """What one router says.

    Attributes:
        address: Where it was asked.
        description: Layers, experts and replicas, as ``MoEClient.describe`` has them.
        load: Counters and queues, as ``MoEClient.status`` has them.
    """

    address: str
    description: Mapping[str, Any]
    load: Mapping[str, Any]


@dataclass(frozen=True)
class Silence:
    """A router that gives no view of itself, and why."""

    address: str
    reason: str


_PLAIN = Connection()


def ask_routers(
    addresses: tuple[str, ...], *, timeout_s: float, connection: Connection = _PLAIN
) -> tuple[RouterView, ...]:
    """What the routers at these addresses say.

    Raises:
        UnavailableError: If one of them does not answer.
        MoERuntimeError: If one answers with an error.
    """
    return tuple(_ask(address, timeout_s=timeout_s, connection=connection) for address in addresses)


def ask_each(
    addresses: tuple[str, ...], *, timeout_s: float, connection: Connection = _PLAIN
) -> tuple[RouterView | Silence, ...]:
    """What the routers at these addresses say, all asked at once; those that do not answer are silent."""
    with ThreadPoolExecutor(len(addresses)) as pool:
        return tuple(pool.map(partial(_ask_or_silence, timeout_s=timeout_s, connection=connection), addresses))


def _ask_or_silence(address: str, *, timeout_s: float, connection: Connection) -> RouterView | Silence:
    try:
        return _ask(address, timeout_s=timeout_s, connection=connection)
    except UnavailableError:
        return Silence(address, "no answer")
    except MoERuntimeError as exc:
        return Silence(address, f"{type(exc).__name__}: {exc}")


def _ask(address: str, *, timeout_s: float, connection: Connection) -> RouterView:
    with connection.client(address) as client:
        try:
            return RouterView(
                address, description=client.describe(timeout_s=timeout_s), load=client.status(timeout_s=timeout_s)
            )
        except UnavailableError as exc:
            if "refused" not in str(exc):
                raise UnavailableError(
                    f"{address}: expected a router, found none that can be talked to in this way; "
                    f"if it speaks TLS, give --tls or --ca: {exc}"
                ) from exc
            raise UnavailableError(
                f"nothing serves at {address}: start it with `moe-runtime serve CONFIG --address {address}`, "
                "or name another with --address"
            ) from exc
        except MoERuntimeError as exc:
            raise type(exc)(f"{address}: {exc}") from exc
