"""What a node that is cut off or loses its power costs the clients of a runtime, and how everything comes back."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cluster.host import Host
from cluster.served import DATA_PORTS, LAYER, ROUTER_PORT, Ledger, Line, Served, actors, eventually

DEADLINE_S = 5.0
#: What an answer may be late: the client's own way back from its deadline.
SPARE_S = 0.1
WARM_REQUESTS = 200
SETTLED_REQUESTS = 50
#: Ray declares the node dead within 8 s; a process that loads torch on a busy machine takes its time.
BACK_WITHIN_S = 120.0
STALE_END_WITHIN_S = 60.0
REJOIN_WITHIN_S = 120.0
#: Clients that still reach it are to be served by those who know the present table.
STALE_ROUTER_ENDS_WITHIN_S = 10.0
#: What experts say on connections that were open when the host was cut off, before they are told that these are gone.
FAREWELL_BYTES = 20_000


@pytest.fixture(autouse=True)
def what_runs_now(served: Served) -> None:
    """A test that fails leaves the description of what ran before it."""
    served.look()


@pytest.fixture
def spread_anew(served: Served) -> None:
    """What was lost came back where there was room: which node has what is anybody's guess after a loss."""
    served.stop()
    served.start()


def test_the_controller_is_on_the_head(served: Served) -> None:
    nodes = (served.cluster.head, *served.cluster.workers)
    controllers = [node.name for node in nodes for title in actors(node).values() if "Controller" in title]
    assert controllers == [served.cluster.head.name]


def test_a_worker_that_is_cut_off_costs_its_assignments_and_no_request(served: Served) -> None:
    victim = next(host for host in served.cluster.workers if served.has_router(host))
    lost, stale = served.experts_on(victim), actors(victim)
    assert len(stale) == 2
    figures = served.figures["cut off"] = {}
    before = incarnations(served)
    with served.load("cut", deadline_s=DEADLINE_S) as ledger:
        warm_up(ledger)
        cut_at = time.monotonic()
        victim.cut()
        try:
            figures |= costs(wait_until_back(ledger, lost, since=cut_at), cut_at)
            served.await_routers_off(victim, within_s=BACK_WITHIN_S)
            figures["router_back_by_s"] = time.monotonic() - cut_at
            # Nobody tells it: it goes on, and would answer whoever reached it.
            assert actors(victim).keys() == stale.keys()
            assert is_listening(victim, ROUTER_PORT)
            to_stale_experts = victim.link_bytes(ports=DATA_PORTS, is_own=True)
        finally:
            victim.heal()
        healed_at = time.monotonic()
        eventually(lambda: not is_listening(victim, ROUTER_PORT), within_s=STALE_ROUTER_ENDS_WITHIN_S)
        figures["stale_router_gone_s"] = time.monotonic() - healed_at
        eventually(lambda: not actors(victim).keys() & stale.keys(), within_s=STALE_END_WITHIN_S)
        figures["stale_processes_gone_s"] = time.monotonic() - healed_at
        spoken = victim.link_bytes(ports=DATA_PORTS, is_own=True)
    served.cluster.nodes(within_s=REJOIN_WITHIN_S)
    figures["node_back_s"] = time.monotonic() - healed_at
    check(ledger.lines(), since=cut_at)
    late = [line.ended - healed_at for line in ledger.lines() if line.ended > healed_at and line.is_affected]
    figures["requests_affected_by_stale_router"] = len(late)
    assert max(late, default=0.0) <= figures["stale_router_gone_s"] + SPARE_S
    assert spoken.sent_bytes - to_stale_experts.sent_bytes < FAREWELL_BYTES
    served.look()
    assert served.experts_on(victim) == []
    assert {expert for expert, incarnation in incarnations(served).items() if incarnation != before[expert]} == set(
        lost
    )


@pytest.mark.usefixtures("spread_anew")
def test_a_worker_that_loses_its_power_costs_its_assignments_and_no_request(served: Served) -> None:
    victim = next(host for host in served.cluster.workers if served.has_router(host))
    lost, old_addresses = served.experts_on(victim), served.addresses
    figures = served.figures["powered off"] = {}
    with served.load("power", deadline_s=DEADLINE_S) as ledger:
        warm_up(ledger)
        off_at = time.monotonic()
        victim.power_off()
        try:
            figures |= costs(wait_until_back(ledger, lost, since=off_at), off_at)
            served.await_routers_off(victim, within_s=BACK_WITHIN_S)
            figures["router_back_by_s"] = time.monotonic() - off_at
        finally:
            victim.boot()
        booted_at = time.monotonic()
    served.cluster.nodes(within_s=REJOIN_WITHIN_S)
    figures["node_back_s"] = time.monotonic() - booted_at
    check(ledger.lines(), since=off_at)
    served.look()
    assert served.experts_on(victim) == []
    assert len(set(served.addresses) - set(old_addresses)) == 1


def test_afterwards_every_router_gets_everything_from_everybody(served: Served) -> None:
    for number, address in enumerate(served.addresses):
        with served.load(f"after-{number}", addresses=[address], max_requests=10) as ledger:
            lines = ledger.finish()
        assert len(lines) == 40
        check(lines, since=time.monotonic())


def warm_up(ledger: Ledger) -> None:
    lines = ledger.wait_for(lambda lines: len(lines) >= WARM_REQUESTS, within_s=60.0)
    assert not [line for line in lines if line.is_affected]


def wait_until_back(ledger: Ledger, experts: list[int], *, since: float) -> list[Line]:
    """The lines when some requests in a row have got everything from everybody, after one that did not."""
    assert experts

    def is_back(lines: list[Line]) -> bool:
        tail = lines[-SETTLED_REQUESTS:]
        was_lost = any(line.is_affected and line.began > since for line in lines)
        return was_lost and all(line.began > since and not line.is_affected for line in tail)

    return ledger.wait_for(is_back, within_s=BACK_WITHIN_S)


def check(lines: list[Line], *, since: float) -> None:
    """Every request has one answer in time, every assignment is accounted for, and every row is right."""
    assert [line for line in lines if line.error] == []
    assert max(line.latency_s for line in lines) <= DEADLINE_S + SPARE_S
    ids = [line.report["request_id"] for line in lines]
    assert len(set(ids)) == len(ids)
    for line in lines:
        report = line.report
        outcomes = ("served", "dropped_capacity", "dropped_failure")
        assert report["assignments"] == sum(report[outcome] for outcome in outcomes) == 2 * 16
        assert report["is_right"]
        assert report["is_untouched"]
        assert report["dropped_failure"] == 0 or line.ended > since


def costs(lines: list[Line], lost_at: float) -> dict[str, float]:
    """What the loss of a node cost; times in seconds from the loss on."""
    later = [line for line in lines if line.ended > lost_at]
    affected = [line for line in later if line.is_affected]
    usual_s = float(np.median([line.latency_s for line in lines if line.ended <= lost_at]))
    slow = [line for line in later if line.latency_s > max(0.5, 5 * usual_s)]
    return {
        "noticed_s": min(line.ended for line in affected) - lost_at,
        "experts_back_s": max(line.ended for line in affected) - lost_at,
        "slow_until_s": max((line.ended - lost_at for line in slow), default=0.0),
        "requests_slow": len(slow),
        "requests_affected": len(affected),
        "requests_failed": len([line for line in later if line.error]),
        "requests": len(later),
        "longest_s": max(line.latency_s for line in later),
        "usual_ms": usual_s * 1000,
    }


def incarnations(served: Served) -> dict[int, str]:
    """The incarnation of the process that serves each expert."""
    experts = served.description["layers"][LAYER]["experts"]
    return {expert["expert_id"]: expert["replicas"][0]["incarnation"] for expert in experts}


def is_listening(host: Host, port: int) -> bool:
    """Whether a process of a host takes connections at a port."""
    listening = host.in_network(["ss", "--listening", "--tcp", "--numeric", "--no-header"])
    return any(line.split()[3].endswith(f":{port}") for line in listening.splitlines())
