from __future__ import annotations

import pickle

import pytest

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.plan import Failure, Location, RouterReport, Snapshot
from moe_runtime.ray_backend.router_actor import RouterActor
from moe_runtime.service.routing_table import RoutingTable

LOCATION = Location("n1", "10.0.0.1", num_cores=1, pid=1)


class Process:
    """A router's process that answers its first start only, and keeps the versions of its tables."""

    def __init__(self, public_key):
        self.public_key = public_key
        self.num_starts = 0
        self.versions = []

    def start(self, address):
        if address == "taken":
            raise StartError("the address is taken")
        self.num_starts += 1
        return RouterReport(address, self.public_key)

    def set_table(self, table):
        self.versions.append(table.version)


class Factory:
    """Gives the process that the test holds; pickled, it is still the same."""

    processes: dict[str, Process] = {}  # noqa: RUF012 - found again by name on the other side of the pickle

    def __init__(self, name):
        self.name = name

    def __call__(self, location):
        assert location == LOCATION
        return self.processes[self.name]


@pytest.fixture
def make_actor(request):
    """Makes an actor and the process that it will run, whose key is the argument."""

    def make(public_key):
        process = Factory.processes[request.node.name] = Process(public_key)
        factory = pickle.dumps(Factory(request.node.name))
        return RouterActor(factory, locate=lambda: LOCATION, watch_node=lambda: None), process

    yield make
    del Factory.processes[request.node.name]


def snapshot(version, *keys):
    return Snapshot(RoutingTable(version, {}), public_keys=dict(enumerate(keys)))


async def test_a_router_that_serves_just_reports_again(make_actor):
    actor, process = make_actor("mine")
    report = await actor.start("127.0.0.1:1")
    assert report == RouterReport("127.0.0.1:1", "mine")
    assert await actor.start("127.0.0.1:2") == report
    assert process.num_starts == 1


async def test_a_start_that_failed_may_be_tried_again(make_actor):
    actor, _ = make_actor(None)
    assert await actor.start("taken") == Failure("StartError", "the address is taken")
    assert await actor.start("127.0.0.1:1") == RouterReport("127.0.0.1:1")


async def test_a_table_made_for_a_predecessor_waits_for_one_that_knows_the_router(make_actor):
    actor, process = make_actor("mine")
    await actor.keep(snapshot(1, "predecessor's", "neighbour's"))
    await actor.start("127.0.0.1:1")
    await actor.keep(snapshot(2, "predecessor's", "neighbour's"))
    assert process.versions == []
    assert (await actor.kept()).table.version == 2
    await actor.keep(snapshot(3, "mine", "neighbour's"))
    assert process.versions == [3]


async def test_a_router_without_a_key_gets_every_table(make_actor):
    actor, process = make_actor(None)
    await actor.keep(snapshot(1))
    await actor.start("127.0.0.1:1")
    await actor.keep(snapshot(2))
    assert process.versions == [1, 2]
