"""How soon a router knows that an expert host was killed, or frozen: real processes, really stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.bare.victims import expert_victims
from moe_runtime.bench.deployment import layer_config
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.hosts import hosts_of
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Sample
from moe_runtime.service.ports import HostLost, HostReply, HostRequest, Segment
from moe_runtime.transport.zmq_router import ZmqTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moe_runtime.bench.bare.victims import Victim
    from moe_runtime.bench.suite import BenchSettings

_RAY, _HEARTBEATS = "ray, ActorDiedError on a pending call", "tcp, curve: missed heartbeats"
_NUM_KILLED, _QUICK_NUM_KILLED = 15, 4
_NUM_FROZEN, _QUICK_NUM_FROZEN = 5, 2
_NOTICE_WITHIN_S = 30.0


def measure_faults(settings: BenchSettings) -> Iterator[Row]:
    """Rows for killed and for frozen hosts, each of them an actor on the connected cluster."""
    num_killed, num_frozen = (_QUICK_NUM_KILLED, _QUICK_NUM_FROZEN) if settings.quick else (_NUM_KILLED, _NUM_FROZEN)
    settings.begin(f"Starting {num_killed + num_frozen} expert actors to lose")
    with expert_victims(hosts_of(layer_config(num_experts=num_killed + num_frozen))) as victims:
        stage = settings.begin("Killing and freezing them, one after the other")
        times: dict[str, list[Sequence[float]]] = {"killed": [], "frozen": []}
        for num_done, victim in enumerate(victims, start=1):
            if num_done <= num_killed:
                times["killed"].append(_kill(victim))
            else:
                times["frozen"].append(_freeze(victim))
            stage.update(num_done, len(victims))
    ipc, tcp, ray = zip(*times["killed"], strict=True)
    yield _row({"fault": "killed"}, ipc, peer=_RAY, theirs=ray)
    yield _row({"fault": "killed", "encryption": "curve"}, tcp, peer=_RAY, theirs=ray)
    ipc, tcp = zip(*times["frozen"], strict=True)
    yield _row({"fault": "frozen"}, ipc, peer=_HEARTBEATS, theirs=tcp)


def _row(case: dict[str, str], ours: Sequence[float], *, peer: str, theirs: Sequence[float]) -> Row:
    figures = {"worst_ms": 1e3 * max(ours), "peer_worst_ms": 1e3 * max(theirs), "hosts_lost": float(len(ours))}
    return Row("wire", case, peer, Sample.of(ours), Sample.of(theirs), figures)


def _kill(victim: Victim) -> list[float]:
    """Seconds until the routers on ipc and on tcp know, and until Ray says so."""
    with _Watch(victim, node=victim.endpoint.node) as ipc, _Watch(victim, node="elsewhere") as tcp:
        return _time_notices(victim.pid, signal.SIGKILL, [ipc.wait_for_loss, tcp.wait_for_loss, victim.wait_for_death])


def _freeze(victim: Victim) -> list[float]:
    """Seconds until the routers on ipc and on tcp know; Ray does not ask a process whether it still runs.

    Raises:
        BenchError: If Ray noticed.
    """
    with _Watch(victim, node=victim.endpoint.node) as ipc, _Watch(victim, node="elsewhere") as tcp:
        times = _time_notices(victim.pid, signal.SIGSTOP, [ipc.wait_for_loss, tcp.wait_for_loss])
    if victim.is_known_to_be_dead():
        raise BenchError("expected Ray to take a frozen actor for a living one, found that it noticed: a peer to time")
    return times


def _time_notices(pid: int, number: signal.Signals, notices: Sequence[Callable[[], None]]) -> list[float]:
    """Seconds from a signal until each of some calls, which wait in threads of their own, has returned."""
    with ThreadPoolExecutor(len(notices)) as pool:
        noticed = [pool.submit(_moment_after, notice) for notice in notices]
        sent_at = time.perf_counter()
        os.kill(pid, number)
        return [moment.result() - sent_at for moment in noticed]


def _moment_after(notice: Callable[[], None]) -> float:
    notice()
    return time.perf_counter()


class _Watch(contextlib.AbstractContextManager["_Watch"]):
    """A router of its own that has exchanged rows with a host, and waits to lose it."""

    def __init__(self, victim: Victim, *, node: str) -> None:
        self._endpoint = victim.endpoint
        self._transport = ZmqTransport(node=node)
        if victim.endpoint.node != node:
            victim.admit(self._transport.public_key)
        (hosted,) = victim.host.experts
        rows = torch.zeros(1, *hosted.spec.item_shape)
        request = HostRequest(1, (Segment(hosted.replica_id, 1),), rows, _NOTICE_WITHIN_S)
        self._transport.send(victim.endpoint, request)
        self._wait_for(HostReply)

    def wait_for_loss(self) -> None:
        """Return once the transport says that the host is lost."""
        self._wait_for(HostLost)

    def __exit__(self, *_: object) -> None:
        self._transport.close()

    def _wait_for(self, expected: type[HostReply | HostLost]) -> None:
        give_up_at = time.monotonic() + _NOTICE_WITHIN_S
        while time.monotonic() < give_up_at:
            for event in self._transport.poll(give_up_at - time.monotonic()):
                if isinstance(event, expected):
                    return
                raise BenchError(f"expert host {self._endpoint.incarnation:016x}: expected {expected.__name__}, "
                                 f"found {type(event).__name__}")  # fmt: skip
        raise BenchError(f"expected {expected.__name__} from the transport within {_NOTICE_WITHIN_S:g} s, found none")
