from __future__ import annotations

import asyncio

import pytest

from moe_runtime.errors import PlacementError, StartError
from moe_runtime.ray_backend.node_choice import NodeChooser
from moe_runtime.ray_backend.placer import ActorDemand, NodeShape
from moe_runtime.ray_backend.plan import Demand


def node(name, *, gpus=1.0):
    # The fakes give an actor's node by its id.
    return NodeShape(name, node_id=name, total={"CPU": 1.0, "GPU": gpus})


def nodes_of(description):
    return {each.get("host_id", "router"): each["node"] for each in (*description["hosts"], *description["routers"])}


async def placed(controller):
    return nodes_of(await controller.describe())


async def test_actors_start_on_the_nodes_that_the_placer_chooses(make_controller, spawner):
    spawner.cluster = [node("n1"), node("n2")]
    controller = make_controller()
    await controller.start()
    assert await placed(controller) == {"a": "n1", "b": "n2", "router": "n1"}
    await controller.close(drain_timeout_s=0)


async def test_a_host_whose_node_is_gone_comes_back_on_one_that_has_room(make_controller, spawner, clock):
    spawner.cluster = [node("n1"), node("n2"), node("n3")]
    controller = make_controller()
    await controller.start()
    spawner.cluster = spawner.cluster[1:]
    spawner.last("a").die("the node died")
    await clock.advance(0.5)
    assert (await placed(controller))["a"] == "n3"
    await controller.close(drain_timeout_s=0)


async def test_a_node_that_refuses_a_host_twice_leads_to_another_choice(make_controller, spawner, behave, clock):
    spawner.cluster = [node("n1"), node("n2"), node("n3")]
    spawner.behaviours["a"] += [behave(is_refused=True), behave(is_refused=True)]
    controller = make_controller()
    starting = asyncio.ensure_future(controller.start())
    await clock.advance(2.0)
    await starting
    assert [actor.behaviour.node for actor in spawner.spawned["a"]] == ["n1", "n1", "n3"]
    await controller.close(drain_timeout_s=0)


async def test_a_host_that_no_node_has_room_for_is_left_to_the_cluster_for_a_while(
    make_controller, spawner, behave, clock
):
    spawner.cluster = [node("n1")]
    spawner.behaviours["b"].append(behave(node="wherever", is_placed=False))
    controller = make_controller(start_timeout_s=5.0)
    starting = asyncio.ensure_future(controller.start())
    await clock.advance(5.1)
    with pytest.raises(PlacementError, match="host b: found no place within 5 s: it asks for"):
        await starting
    assert spawner.last("b").behaviour.node == "wherever"


async def test_a_host_that_dies_on_a_living_node_before_it_is_placed_is_an_error_not_a_search(
    make_controller, spawner, behave, clock
):
    spawner.cluster = [node("n1"), node("n2")]
    controller = make_controller()
    spawner.behaviours["a"].append(behave(is_placed=False))
    starting = asyncio.ensure_future(controller.start())
    await clock.advance(0.1)
    spawner.last("a").die("SIGKILL")
    with pytest.raises(StartError, match="host a: the actor died: SIGKILL"):
        await starting


async def test_each_router_binds_the_address_of_its_own_node_and_a_free_port_where_it_moves_to(
    make_controller, spawner, clock
):
    spawner.cluster = [node("n1", gpus=2.0), node("n2", gpus=2.0)]
    controller = make_controller(num_routers=2, address="node:50051")
    await controller.start()
    assert controller.addresses() == ["10.0.0.1:50051", "10.0.0.1:50051"]
    assert [spawner.last(f"router-{i}").behaviour.node for i in (0, 1)] == ["n1", "n2"]
    spawner.cluster = spawner.cluster[1:]
    spawner.last("router-0").die("the node died")
    await clock.advance(0.5)
    assert spawner.last("router-0").behaviour.node == "n2"
    assert controller.addresses() == ["10.0.0.1:50052", "10.0.0.1:50051"]
    await controller.close(drain_timeout_s=0)


def test_a_host_that_died_may_have_its_room_again_although_the_node_does_not_report_it_yet(clock):
    nodes = [node("n1")]
    chooser = NodeChooser(lambda: nodes, clock=clock)
    host = ActorDemand("a", Demand(num_cpus=0, num_gpus=1), "l", "a")
    chooser.settle(host, "n1")
    nodes[0] = NodeShape("n1", node_id="n1", total={"CPU": 1.0, "GPU": 1.0}, free={"CPU": 1.0})
    chooser.leave(host)
    choice = chooser.choose(host)
    assert choice is not None
    assert choice.name == "n1"


async def test_room_that_is_not_reported_for_long_belongs_to_somebody_else(clock):
    shape = NodeShape("n1", node_id="n1", total={"CPU": 1.0, "GPU": 1.0}, free={"CPU": 1.0})
    chooser = NodeChooser(lambda: [shape], clock=clock)
    host = ActorDemand("a", Demand(num_cpus=0, num_gpus=1), "l", "a")
    chooser.settle(host, "n1")
    chooser.leave(host)
    await clock.advance(6.0)
    assert chooser.choose(host) is None


def test_a_choice_that_is_not_yet_reported_is_remembered(clock):
    chooser = NodeChooser(lambda: [node("n1"), node("n2")], clock=clock)
    actors = [ActorDemand(name, Demand(num_cpus=0, num_gpus=1), "l", name, "pack") for name in "abc"]
    assert [choice and choice.name for choice in map(chooser.choose, actors)] == ["n1", "n2", None]
    chooser.leave(actors[0])
    choice = chooser.choose(actors[2])
    assert choice is not None
    assert choice.name == "n1"
