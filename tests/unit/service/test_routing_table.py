"""Which replicas rows may be sent to."""

from __future__ import annotations

from fakes.service import endpoint, replica
from moe_runtime.service.routing_table import ReplicaState, RoutingTable


def test_ready_and_suspect_replicas_are_usable_and_the_others_are_not() -> None:
    by_state = tuple(replica(0, host, state=state) for host, state in enumerate(ReplicaState))
    table = RoutingTable(1, {("layer", 0): by_state})
    assert [r.state for r in table.usable("layer", 0)] == [ReplicaState.READY, ReplicaState.SUSPECT]
    assert table.usable("layer", 1) == ()
    assert table.usable("other", 0) == ()


def test_a_host_is_out_when_none_of_its_replicas_is_usable() -> None:
    shared, lost = endpoint(1), endpoint(2)
    table = RoutingTable(
        1,
        {
            ("layer", 0): (replica(0, 1),),
            ("layer", 1): (replica(1, 1, state=ReplicaState.OUT),),
            ("layer", 2): (replica(2, 2, state=ReplicaState.OUT),),
        },
    )
    assert table.endpoints() == {shared}
    assert table.out_endpoints() == {lost}
