from __future__ import annotations

import pickle

import pytest

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.plan import Failure, Location, RouterReport, RoutersPlan, RuntimePlan, Snapshot
from moe_runtime.ray_backend.router_actor import RouterActor
from moe_runtime.service.routing_table import RoutingTable

LOCATION = Location("n1", "10.0.0.1", num_cores=1, pid=1)


class Process:
    """A router's process that answers its first start only, and keeps what it is told to serve by."""

    def __init__(self, public_key):
        self.public_key = public_key
        self.num_starts = 0
        self.versions = []
        self.setups = []
        self.gate_is_broken = False
        self.loads = {"l": {"a": 3}, "m": {"b": 4}}

    def asked(self, layers):
        return {name: counts for name, counts in self.loads.items() if name in layers}

    def start(self, address):
        if address == "taken":
            raise StartError("the address is taken")
        self.num_starts += 1
        return RouterReport(address, self.public_key)

    def set_table(self, table):
        self.versions.append(table.version)

    def replace_setup(self, setup, table):
        self.setups.append((setup, table.version))


class Factory:
    """Gives the process that the test holds; pickled, it is still the same."""

    processes: dict[str, Process] = {}  # noqa: RUF012 - found again by name on the other side of the pickle

    def __init__(self, name, setup):
        self.name = name
        self.setup = setup

    def __call__(self, location):
        assert location == LOCATION
        return self.processes[self.name]

    def prepare(self):
        if self.processes[self.name].gate_is_broken:
            raise StartError("the gate is broken")
        return self.setup


@pytest.fixture
def plan_of(request):
    """Makes the plan of a revision."""

    def make(revision=""):
        factory = pickle.dumps(Factory(request.node.name, f"setup {revision}"))
        return RoutersPlan(1, "127.0.0.1:1", factory, revision=revision)

    return make


@pytest.fixture
def make_actor(request):
    """Makes an actor and the process that it will run, whose key is the argument."""

    def make(public_key):
        process = Factory.processes[request.node.name] = Process(public_key)
        return RouterActor(locate=lambda: LOCATION, watch_node=lambda: None), process

    yield make
    del Factory.processes[request.node.name]


def snapshot(version, *keys, routers=None):
    plan = None if routers is None else RuntimePlan("test", (), routers)
    return Snapshot(RoutingTable(version, {}), public_keys=dict(enumerate(keys)), plan=plan)


async def test_a_router_that_serves_just_reports_again(make_actor, plan_of):
    actor, process = make_actor("mine")
    report = await actor.start("127.0.0.1:1", plan_of())
    assert report == RouterReport("127.0.0.1:1", "mine")
    assert await actor.start("127.0.0.1:2", plan_of()) == report
    assert process.num_starts == 1


async def test_a_start_that_failed_may_be_tried_again(make_actor, plan_of):
    actor, _ = make_actor(None)
    assert await actor.start("taken", plan_of()) == Failure("StartError", "the address is taken")
    assert await actor.start("127.0.0.1:1", plan_of()) == RouterReport("127.0.0.1:1")


async def test_a_table_made_for_a_predecessor_waits_for_one_that_knows_the_router(make_actor, plan_of):
    actor, process = make_actor("mine")
    await actor.keep(snapshot(1, "predecessor's", "neighbour's"))
    await actor.start("127.0.0.1:1", plan_of())
    await actor.keep(snapshot(2, "predecessor's", "neighbour's"))
    assert process.versions == []
    assert (await actor.kept()).table.version == 2
    await actor.keep(snapshot(3, "mine", "neighbour's"))
    assert process.versions == [3]


async def test_a_router_without_a_key_gets_every_table(make_actor, plan_of):
    actor, process = make_actor(None)
    await actor.keep(snapshot(1))
    await actor.start("127.0.0.1:1", plan_of())
    await actor.keep(snapshot(2))
    assert process.versions == [1, 2]


async def test_what_a_newer_plan_serves_comes_with_its_table_and_only_once(make_actor, plan_of):
    actor, process = make_actor(None)
    await actor.start("127.0.0.1:1", plan_of("old"))
    await actor.keep(snapshot(1, routers=plan_of("old")))
    assert await actor.prepare(plan_of("new")) is None
    await actor.keep(snapshot(2, routers=plan_of("old")))
    await actor.keep(snapshot(3, routers=plan_of("new")))
    await actor.keep(snapshot(4, routers=plan_of("new")))
    assert process.setups == [("setup new", 3)]
    assert process.versions == [1, 2, 4]


async def test_a_router_that_was_started_by_an_older_plan_follows_the_snapshot_that_it_was_given(make_actor, plan_of):
    actor, process = make_actor(None)
    await actor.keep(snapshot(7, routers=plan_of("new")))
    await actor.start("127.0.0.1:1", plan_of("old"))
    assert process.setups == [("setup new", 7)]
    assert process.versions == []


async def test_a_router_that_cannot_serve_a_newer_plan_says_so_and_serves_on_as_it_did(make_actor, plan_of):
    actor, process = make_actor(None)
    await actor.start("127.0.0.1:1", plan_of("old"))
    process.gate_is_broken = True
    assert await actor.prepare(plan_of("new")) == Failure("StartError", "the gate is broken")
    await actor.keep(snapshot(2, routers=plan_of("new")))
    assert process.setups == process.versions == []
    process.gate_is_broken = False
    await actor.keep(snapshot(2, routers=plan_of("new")))
    assert process.setups == [("setup new", 2)]


async def test_a_router_says_what_its_process_was_asked_for_and_which_process_that_is(make_actor, plan_of):
    actor, process = make_actor(None)
    assert await actor.asked({"l"}) is None
    await actor.start("127.0.0.1:1", plan_of())
    first = await actor.asked({"l"})
    assert first.asked == {"l": {"a": 3}}
    process.loads = {"l": {"a": 5}}
    second = await actor.asked({"l"})
    assert (second.incarnation, second.asked) == (first.incarnation, {"l": {"a": 5}})
    successor, _ = make_actor(None)
    await successor.start("127.0.0.1:1", plan_of())
    assert (await successor.asked({"l"})).incarnation != first.incarnation
