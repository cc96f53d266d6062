"""What the controller makes of hosts that are slow, sick, too big or still, and of routers that stand still."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_runtime.ray_backend.controller import Controller
from moe_runtime.ray_backend.plan import Demand, HostHealth, HostPlan, ReplicaPlan, RoutersPlan, RuntimePlan

LIMIT = 100 << 20
GROWN = HostHealth(rss_bytes=200 << 20, num_waiting=2)


def plan_of(*hosts, num_routers=1):
    """Hosts by name, ``a`` or ``a/1``; what is before the slash is the expert."""
    experts = list(dict.fromkeys(name.partition("/")[0] for name in hosts))
    host_plans = tuple(
        HostPlan(
            name,
            (ReplicaPlan("l", experts.index(name.partition("/")[0]), f"l/{name}"),),
            Demand(max_rss_bytes=LIMIT),
            b"",
            twins=name.partition("/")[0],
            max_forward_s=2.0,
        )
        for name in hosts
    )
    return RuntimePlan("test", host_plans, RoutersPlan(num_routers, "127.0.0.1:0", b"", let_go_s=30.0), lease_s=None)


@pytest.fixture
async def start(spawner, clock):
    """Starts a controller of hosts with these names."""
    made = []

    async def start(*hosts, **options):
        made.append(Controller(plan_of(*hosts, **options), spawner=spawner, clock=clock))
        await made[-1].start()
        return made[-1]

    yield start
    for controller in made:
        await controller.close(drain_timeout_s=0)


def replicas(spawner, router="router-0"):
    """State and reason of each replica in the newest table."""
    table = spawner.last(router).snapshots[-1].table
    return {each.replica_id: (str(each.state), each.reason) for found in table.replicas.values() for each in found}


async def host_of(controller, index=0):
    return (await controller.describe())["hosts"][index]


async def test_a_slow_forward_makes_its_host_suspect_with_its_reason_until_it_is_over(start, spawner, clock):
    controller = await start("a", "b")
    spawner.last("a").health = HostHealth(busy_s=2.5)
    await clock.advance(1.1)
    reason = "a forward has run for 2.5 s, 2 s are due"
    assert replicas(spawner) == {"l/a": ("suspect", reason), "l/b": ("ready", None)}
    assert (await host_of(controller))["reason"] == reason
    spawner.last("a").health = HostHealth()
    await clock.advance(1.0)
    assert replicas(spawner)["l/a"] == ("ready", None)
    assert len(spawner.spawned["a"]) == 1


async def test_a_host_whose_forward_hangs_is_killed_and_replaced(start, spawner, clock):
    controller = await start("a")
    spawner.last("a").health = HostHealth(busy_s=6.5)
    await clock.advance(1.1)
    assert replicas(spawner) == {"l/a": ("out", "its forward hangs: it has run for 6.5 s, 2 s are due")}
    assert spawner.spawned["a"][0].death.done()
    await clock.advance(0.3)
    assert replicas(spawner) == {"l/a": ("ready", None)}
    assert (await host_of(controller))["num_failures"] == 1


async def test_a_host_that_is_unfit_again_and_again_comes_back_ever_later(start, spawner, clock):
    controller = await start("a")
    for delay_s in (0.2, 0.4, 0.8):
        spawner.last("a").health = HostHealth(unfit="the probe failed")
        num_spawned = len(spawner.spawned["a"])
        await clock.advance(1.01)
        host = await host_of(controller)
        assert (host["state"], host["reason"]) == ("out", "it is unfit: the probe failed")
        await clock.advance(delay_s - 0.15)
        assert len(spawner.spawned["a"]) == num_spawned
        await clock.advance(0.15)
        assert len(spawner.spawned["a"]) == num_spawned + 1
    assert (await host_of(controller))["num_failures"] == 3


async def test_why_a_host_was_out_is_told_while_it_starts_again(start, spawner, clock, behave):
    controller = await start("a")
    spawner.behaviours["a"].append(behave(is_placed=False))
    spawner.last("a").die("SIGKILL")
    await clock.advance(0.3)
    host = await host_of(controller)
    assert (host["state"], host["reason"]) == ("starting", "SIGKILL")


async def test_a_host_that_gives_wrong_outputs_is_suspect_and_cleared_after_three_clean_pings(start, spawner, clock):
    await start("a")
    spawner.last("a").health = HostHealth()
    await clock.advance(1.1)
    spawner.last("a").health = HostHealth(num_faults={"l/a": 2})
    await clock.advance(1.0)
    assert replicas(spawner) == {"l/a": ("suspect", "outputs of the wrong kind: 2 of l/a")}
    await clock.advance(2.0)
    assert replicas(spawner)["l/a"][0] == "suspect"
    await clock.advance(1.0)
    assert replicas(spawner)["l/a"] == ("ready", None)


async def test_a_host_that_gives_nothing_but_wrong_outputs_is_replaced(start, spawner, clock):
    await start("a")
    first = spawner.last("a")
    for number in range(7):
        first.health = HostHealth(num_faults={"l/a": number})
        await clock.advance(1.01)
    assert first.death.done()
    assert replicas(spawner) == {"l/a": ("ready", None)}


async def test_a_frozen_host_is_replaced_within_eight_seconds(start, spawner, clock):
    await start("a")
    first = spawner.last("a")
    first.answers_pings = False
    await clock.advance(3.1)
    assert replicas(spawner) == {"l/a": ("suspect", "no answer within 2 s")}
    await clock.advance(4.9)
    assert first.death.done()
    assert replicas(spawner) == {"l/a": ("ready", None)}


async def test_a_host_that_outgrows_its_memory_serves_until_its_successor_does(start, spawner, clock, behave):
    controller = await start("a", "b")
    first = spawner.last("a")
    spawner.behaviours["a@+1"].append(behave(is_slow=True))
    first.health = GROWN
    await clock.advance(1.1)
    reason = "its process holds 200 MiB, more than max_rss_bytes: 100 MiB"
    assert replicas(spawner)["l/a"] == ("suspect", reason)
    assert spawner.living() == {"a", "a@+1", "b", "router-0"}
    spawner.last("a@+1").finish_start()
    await clock.advance(1.0)
    assert replicas(spawner)["l/a"] == ("ready", None)
    assert spawner.living() == {"a@+1", "b", "router-0"}
    assert [host.generation for host in controller.plan.hosts] == [1, 0]
    assert spawner.log == ["stop a", "kill a"]


async def test_a_host_with_a_twin_leaves_the_table_and_finishes_what_it_has_before_it_starts_again(
    start, spawner, clock
):
    controller = await start("a/0", "a/1")
    first = spawner.last("a/0")
    first.health = GROWN
    await clock.advance(1.1)
    # Not out: routers would give up what is in flight.
    assert replicas(spawner) == {"l/a/1": ("ready", None)}
    host = await host_of(controller)
    assert host["state"] == "suspect"
    assert host["reason"] == "it drains: its process holds 200 MiB, more than max_rss_bytes: 100 MiB"
    await clock.advance(5.0)
    assert spawner.log == []
    first.health = HostHealth(rss_bytes=200 << 20)
    await clock.advance(2.0)
    assert spawner.log == ["stop a/0", "kill a/0"]
    await clock.advance(0.3)
    assert replicas(spawner) == {"l/a/0": ("ready", None), "l/a/1": ("ready", None)}
    assert len(spawner.spawned["a/0"]) == 2


async def test_a_drain_does_not_wait_for_ever(start, spawner, clock):
    await start("a/0", "a/1")
    spawner.last("a/0").health = GROWN
    await clock.advance(33.0)
    assert len(spawner.spawned["a/0"]) == 2


async def test_where_no_successor_fits_the_host_drains_and_starts_again(start, spawner, clock, behave):
    await start("a")
    first = spawner.last("a")
    first.health = GROWN
    spawner.behaviours["a@+1"].append(behave(error="no memory"))
    await clock.advance(1.1)
    assert "a@+1" not in spawner.living()
    assert replicas(spawner) == {}
    first.health = HostHealth(rss_bytes=200 << 20)
    await clock.advance(3.0)
    assert replicas(spawner) == {"l/a": ("ready", None)}
    assert len(spawner.spawned["a"]) == 2


async def test_a_host_that_hangs_while_it_starts_is_given_up_and_tried_again(start, spawner, clock, behave):
    controller = await start("a")
    spawner.behaviours["a"].append(behave(is_slow=True))
    spawner.last("a").die()
    await clock.advance(60.3)
    host = await host_of(controller)
    assert host["reason"] == "on node n1: not ready 60 s after its placement"
    await clock.advance(1.0)
    assert replicas(spawner) == {"l/a": ("ready", None)}


async def test_a_frozen_router_is_killed_and_comes_back_at_its_address(start, spawner, clock):
    controller = await start("a")
    first = spawner.last("router-0")
    first.answers_pings = False
    await clock.advance(3.1)
    router = (await controller.describe())["routers"][0]
    assert (router["state"], router["reason"]) == ("suspect", "no answer within 2 s")
    await clock.advance(4.9)
    assert spawner.log == ["restart router-0"]
    assert spawner.last("router-0") is not first
    assert spawner.last("router-0").starts == ["127.0.0.1:7777"]
    assert (await controller.describe())["routers"][0]["state"] == "ready"


async def test_a_router_of_which_a_thread_stands_still_is_killed_unless_it_goes_on(start, spawner, clock):
    await start("a")
    first = spawner.last("router-0")
    first.standstill = "its engine has not turned within 0.6 s"
    await clock.advance(2.5)
    first.standstill = None
    await clock.advance(5.0)
    assert not first.death.done()
    first.standstill = "its engine has not turned within 0.6 s"
    await clock.advance(6.0)
    assert first.death.done()
    assert spawner.living() == {"a", "router-0"}


async def test_a_router_whose_old_process_lives_on_is_not_taken_for_the_new_one(start, spawner, clock):
    controller = await start("a")
    first = spawner.last("router-0")
    first.answers_pings = False
    first.outlives_restart = True
    await clock.advance(8.0)
    first.answers_pings = True
    router = (await controller.describe())["routers"][0]
    assert (router["state"], router["num_restarts"]) == ("starting", 0)
    first.die()
    await clock.advance(1.0)
    router = (await controller.describe())["routers"][0]
    assert (router["state"], router["num_restarts"], router["num_failures"]) == ("ready", 1, 1)


async def test_a_lease_is_not_over_because_the_controller_was_frozen_itself(spawner, clock):
    plan = replace(plan_of("a"), lease_s=10.0)
    controller = Controller(plan, spawner=spawner, clock=clock)
    await controller.start()
    await clock.advance(5.0)
    await clock.freeze(60.0)
    await clock.advance(9.0)
    assert spawner.living() == {"a", "router-0"}
    await clock.advance(3.0)
    assert spawner.living() == set()


async def test_a_table_reaches_the_others_while_one_router_is_frozen(start, spawner, clock):
    await start("a", num_routers=2)
    spawner.last("router-1").answers_snapshots = False
    spawner.last("a").die()
    await clock.advance(0.1)
    assert replicas(spawner) == {"l/a": ("out", "killed")}
    await clock.advance(1.5)
    assert replicas(spawner) == {"l/a": ("ready", None)}
