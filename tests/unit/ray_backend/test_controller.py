from __future__ import annotations

import asyncio

import pytest

from moe_runtime.errors import PlacementError, StartError


def states(snapshot):
    return {r.replica_id: str(r.state) for replicas in snapshot.table.replicas.values() for r in replicas}


def newest(spawner):
    return spawner.last("router-0").snapshots[-1]


async def test_start_brings_up_every_actor_and_hands_the_router_the_table(make_controller, spawner):
    controller = make_controller()
    await controller.start()
    assert controller.progress() == (3, 3)
    assert controller.addresses() == ["127.0.0.1:7777"]
    assert newest(spawner).table.version == 1
    assert states(newest(spawner)) == {"l/a/0": "ready", "l/b/0": "ready"}
    await controller.close(drain_timeout_s=0)


async def test_a_killed_host_comes_back_under_a_new_incarnation_and_a_higher_version(make_controller, spawner, clock):
    controller = make_controller()
    await controller.start()
    old = spawner.last("a")
    old.die("SIGKILL")
    await clock.advance(0.1)
    assert states(newest(spawner)) == {"l/a/0": "out", "l/b/0": "ready"}
    version_without = newest(spawner).table.version
    assert version_without > 1
    await clock.advance(0.2)
    assert states(newest(spawner)) == {"l/a/0": "ready", "l/b/0": "ready"}
    assert newest(spawner).table.version > version_without
    (replica,) = newest(spawner).table.replicas["l", 0]
    assert replica.endpoint.incarnation == spawner.last("a").pid != old.pid
    assert (await controller.describe())["hosts"][0]["num_restarts"] == 1
    assert len(spawner.spawned["b"]) == 1
    await controller.close(drain_timeout_s=0)


async def test_an_expert_that_raises_at_first_start_fails_it_with_its_text_and_leaves_nothing(
    make_controller, spawner, behave
):
    spawner.behaviours["b"].append(behave(error="WeightsError: b.safetensors is corrupt"))
    controller = make_controller()
    with pytest.raises(StartError, match=r"expert host b on node n1: WeightsError: b\.safetensors is corrupt"):
        await controller.start()
    assert all(actor.death.done() for actors in spawner.spawned.values() for actor in actors)
    assert len(spawner.spawned["b"]) == 1


async def test_an_expert_that_raises_later_goes_out_for_ever_longer_times(make_controller, spawner, behave, clock):
    controller = make_controller()
    await controller.start()
    spawner.behaviours["a"].extend(behave(error="boom") for _ in range(3))
    spawner.last("a").die()
    await clock.advance(0.2)
    assert len(spawner.spawned["a"]) == 2
    host = (await controller.describe())["hosts"][0]
    assert (host["state"], host["reason"]) == ("out", "on node n1: boom")
    await clock.advance(0.39)
    assert len(spawner.spawned["a"]) == 2
    await clock.advance(0.02)
    assert len(spawner.spawned["a"]) == 3
    await clock.advance(0.85)
    assert len(spawner.spawned["a"]) == 4
    await clock.advance(1.5)
    assert len(spawner.spawned["a"]) == 4
    await clock.advance(0.1)
    assert len(spawner.spawned["a"]) == 5
    assert states(newest(spawner))["l/a/0"] == "ready"
    await controller.close(drain_timeout_s=0)


async def test_a_host_without_a_place_is_a_placement_error_that_says_what_is_missing(
    make_controller, spawner, behave, clock
):
    spawner.behaviours["a"].append(behave(is_placed=False))
    controller = make_controller(start_timeout_s=5.0)
    starting = asyncio.ensure_future(controller.start())
    await clock.advance(4.9)
    assert not starting.done()
    await clock.advance(0.2)
    with pytest.raises(PlacementError, match=r"host a: found no place within 5 s: it asks for GPU 1; the cluster has"):
        await starting
    assert spawner.last("b").death.done()


async def test_a_host_that_does_not_answer_is_suspect_and_ready_again_when_it_does(make_controller, spawner, clock):
    controller = make_controller()
    await controller.start()
    spawner.last("a").answers_pings = False
    await clock.advance(3.1)
    assert states(newest(spawner))["l/a/0"] == "suspect"
    spawner.last("a").answers_pings = True
    await clock.advance(3.1)
    assert states(newest(spawner))["l/a/0"] == "ready"
    assert len(spawner.spawned["a"]) == 1
    await controller.close(drain_timeout_s=0)


async def test_a_host_that_never_answers_again_is_killed_and_replaced(make_controller, spawner, clock):
    controller = make_controller()
    await controller.start()
    hung = spawner.last("a")
    hung.answers_pings = False
    await clock.advance(25.0)
    assert hung.death.done()
    assert states(newest(spawner))["l/a/0"] == "ready"
    assert spawner.num_sweeps > 0
    await controller.close(drain_timeout_s=0)


async def test_what_a_dead_host_left_behind_is_removed_at_once_and_the_rest_at_close(make_controller, spawner, clock):
    controller = make_controller()
    await controller.start()
    first, other = spawner.last("a"), spawner.last("b")
    first.die("SIGKILL")
    await clock.advance(0.1)
    assert [endpoint.incarnation for endpoint in spawner.cleaned_up] == [first.pid]
    await clock.advance(0.2)
    second = spawner.last("a")
    await controller.close(drain_timeout_s=0)
    assert [endpoint.incarnation for endpoint in spawner.cleaned_up] == [first.pid, second.pid, other.pid]


async def test_a_restarted_controller_adopts_what_lives_and_the_highest_version(make_controller, spawner, clock):
    first = make_controller()
    await first.start()
    spawner.last("b").die()
    await clock.advance(1.0)
    version = newest(spawner).table.version
    # Its process is gone: nothing was closed, and its tasks no longer run.
    for task in first._tasks:
        task.cancel()
    second = make_controller()
    await second.resume()
    assert {name: len(actors) for name, actors in spawner.spawned.items()} == {"a": 1, "b": 2, "router-0": 1}
    assert newest(spawner).table.version > version
    assert states(newest(spawner)) == {"l/a/0": "ready", "l/b/0": "ready"}
    assert second.addresses() == ["127.0.0.1:7777"]
    spawner.last("a").die()
    await clock.advance(1.0)
    assert len(spawner.spawned["a"]) == 2
    assert states(newest(spawner))["l/a/0"] == "ready"
    await second.close(drain_timeout_s=0)


async def test_a_restarted_controller_brings_back_what_died_meanwhile(make_controller, spawner, clock):
    first = make_controller()
    await first.start()
    for task in first._tasks:
        task.cancel()
    spawner.last("a").die()
    second = make_controller()
    await second.resume()
    await clock.advance(1.0)
    assert len(spawner.spawned["a"]) == 2
    assert states(newest(spawner)) == {"l/a/0": "ready", "l/b/0": "ready"}
    await second.close(drain_timeout_s=0)


async def test_a_restarted_router_binds_its_old_address_and_gets_the_table_again(make_controller, spawner, clock):
    controller = make_controller()
    await controller.start()
    version = newest(spawner).table.version
    spawner.last("router-0").die()
    await clock.advance(1.0)
    assert len(spawner.spawned["router-0"]) == 2
    assert spawner.last("router-0").starts == ["127.0.0.1:7777"]
    assert newest(spawner).table.version > version
    await controller.close(drain_timeout_s=0)


async def test_without_renewal_the_lease_runs_out_and_everything_is_torn_down(make_controller, spawner, clock):
    controller = make_controller(lease_s=10.0)
    await controller.start()
    await clock.advance(9.0)
    controller.renew()
    await clock.advance(9.5)
    assert not spawner.last("a").death.done()
    await clock.advance(1.0)
    await controller.wait_ended()
    assert all(actor.death.done() for actors in spawner.spawned.values() for actor in actors)
    await clock.advance(60.0)
    assert len(spawner.spawned["a"]) == 1


async def test_a_start_that_takes_longer_than_the_lease_does_not_use_it_up(make_controller, spawner, clock):
    controller = make_controller(lease_s=10.0)
    await clock.advance(30.0)
    await controller.start()
    await clock.advance(9.0)
    assert not spawner.last("a").death.done()
    await controller.close(drain_timeout_s=0)


async def test_close_drains_the_routers_before_it_ends_anything(make_controller, spawner):
    controller = make_controller()
    await controller.start()
    assert await controller.close(drain_timeout_s=5.0)
    assert spawner.log[:2] == ["drain router-0", "stop router-0"]
    assert set(spawner.log) >= {"stop a", "stop b", "kill a", "kill b", "kill router-0"}


async def test_threads_auto_shares_the_cores_of_a_node_among_its_experts(make_controller, spawner, behave):
    spawner.behaviours["b"].append(behave(node="n2"))
    apart = make_controller()
    await apart.start()
    assert (spawner.last("a").starts, spawner.last("b").starts) == ([8], [8])
    await apart.close(drain_timeout_s=0)
    together = make_controller()
    await together.start()
    assert (spawner.last("a").starts, spawner.last("b").starts) == ([4], [4])
    await together.close(drain_timeout_s=0)


async def test_a_given_number_of_threads_is_used_as_it_is(make_controller, spawner):
    controller = make_controller(num_threads=3)
    await controller.start()
    assert spawner.last("a").starts == [3]
    await controller.close(drain_timeout_s=0)


async def test_routers_on_two_nodes_refuse_a_loopback_address(make_controller, spawner, behave):
    spawner.behaviours["router-1"].append(behave(node="n2"))
    controller = make_controller(num_routers=2)
    with pytest.raises(StartError, match="loopback"):
        await controller.start()
    assert spawner.last("a").death.done()
