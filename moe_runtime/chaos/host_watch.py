"""A router's end of the data plane that waits for one expert host to be lost, as every router does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

import torch

from moe_runtime.chaos.errors import ChaosError
from moe_runtime.chaos.layer import NUM_FEATURES
from moe_runtime.service.ports import Endpoint, HostLost, HostReply, HostRequest, Segment
from moe_runtime.transport.ipc_folder import default_ipc_folder, ipc_address
from moe_runtime.transport.zmq_router import ZmqTransport

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_WITHIN_S = 30.0


def is_listening(replica: Mapping[str, Any]) -> bool:
    """Whether the host of a replica, as a router describes it, has its socket on this machine."""
    return _socket_of(replica) is not None


class HostWatch:
    """Has exchanged rows with a host and waits to lose it; used by one thread at a time.

    Args:
        replica: Of an expert that the host serves, as a router describes it.

    Raises:
        ChaosError: If the host does not listen on this machine, or does not answer.
    """

    def __init__(self, replica: Mapping[str, Any]) -> None:
        incarnation, node = str(replica["incarnation"]), str(replica["node"])
        path = _socket_of(replica)
        if path is None:
            raise ChaosError(f"expert host {incarnation}: expected its socket on this machine, found none")
        self._transport = ZmqTransport(node=node, encryption="none")
        rows = torch.zeros(1, NUM_FEATURES)
        request = HostRequest(1, (Segment(replica["replica_id"], 1),), rows, _WITHIN_S)
        self._transport.send(Endpoint(int(incarnation, 16), node, local=ipc_address(path)), request)
        self._wait_for(HostReply)

    def wait_for_loss(self) -> float:
        """When it was known that the host is lost, by ``time.monotonic``.

        Raises:
            ChaosError: If that does not come.
        """
        self._wait_for(HostLost)
        return time.monotonic()

    def close(self) -> None:
        """Disconnect."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for(self, expected: type[HostReply | HostLost]) -> None:
        give_up_at = time.monotonic() + _WITHIN_S
        while (left_s := give_up_at - time.monotonic()) > 0:
            if any(isinstance(event, expected) for event in self._transport.poll(left_s)):
                return
        raise ChaosError(f"expected {expected.__name__} from the data plane within {_WITHIN_S:g} s, found none")


def _socket_of(replica: Mapping[str, Any]) -> Path | None:
    return next(default_ipc_folder().glob(f"*-{replica['incarnation']}.ipc"), None)
