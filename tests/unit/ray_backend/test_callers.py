from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from fakes.actors import settle
from moe_runtime.errors import StartError, UnavailableError
from moe_runtime.ray_backend.caller_notes import CallerNote
from moe_runtime.ray_backend.plan import HostPlan, ReplicaPlan
from moe_runtime.ray_backend.roll import ChangedMeanwhileError

NOTE = CallerNote("me", "n1", 77, public_key="my-key")


@pytest.fixture
def start(make_controller):
    """Starts a controller of the hosts ``a`` and ``b`` without routers; arguments change its plan."""

    async def start(**changes):
        controller = make_controller(num_routers=0, **changes)
        await controller.start()
        return controller

    return start


def asking(controller, note=NOTE, timeout_s=2.0):
    return asyncio.ensure_future(controller.caller_news(note, timeout_s=timeout_s))


def upgraded(plan):
    """The same plan, in which host ``b`` is another one."""
    other = HostPlan("b", (ReplicaPlan("l", 1, "l/b/0"),), plan.hosts[1].demand, b"", revision="2")
    routers = replace(plan.routers, revision="r2", factory=b"second", let_go_s=30.0)
    return replace(plan, hosts=(plan.hosts[0], other), routers=routers, source=b"2")


async def test_a_caller_gets_the_table_once_every_host_admits_it(start, spawner, clock):
    controller = await start()
    spawner.last("b").answers_admissions = False
    first = asking(controller)
    await settle()
    assert spawner.last("a").admitted == {"my-key"}
    assert not first.done()
    spawner.last("b").answers_admissions = True
    # The one that did not admit it in time is suspect, not in its way.
    await clock.advance(5.0)
    news = await asking(controller)
    assert news.table.version == controller.table.version
    assert news.table.num_reachable("l") == 2


async def test_the_first_news_tell_what_routers_serve_and_later_ones_only_what_is_new(start, clock):
    controller = await start()
    first = await asking(controller)
    assert (first.factory, first.revision) == (b"", "")
    note = replace(NOTE, known=first.table.version, oldest_used=first.table.version, revision=first.revision)
    waiting = asking(controller, note)
    await clock.advance(1.9)
    assert not waiting.done()
    await clock.advance(0.2)
    assert await waiting is None
    waiting = asking(controller, note)
    rolling = asyncio.ensure_future(controller.upgrade(upgraded(controller.plan)))
    await settle()
    news = await waiting
    while news.revision != "r2":
        # Of the old plan, while the new host comes up.
        news = await asking(controller, replace(note, known=news.table.version))
    assert (news.factory, news.revision, news.table.version > note.known) == (b"second", "r2", True)
    rolling.cancel()


async def test_hosts_that_a_caller_still_uses_live_until_it_lets_go(start, spawner, clock):
    controller = await start()
    version = (await asking(controller)).table.version
    note = replace(NOTE, known=version, oldest_used=version)
    asking(controller, note)
    rolling = asyncio.ensure_future(controller.upgrade(upgraded(controller.plan)))
    await clock.advance(3.0)
    assert spawner.living() == {"a", "b", "b@2"}
    newest = controller.table.version
    asking(controller, replace(note, known=newest, oldest_used=newest))
    await clock.advance(1.0)
    assert rolling.done()
    assert (await rolling).replaced == ("b",)
    assert spawner.living() == {"a", "b@2"}


async def test_a_caller_that_never_lets_go_holds_hosts_for_a_bounded_time(start, spawner, clock):
    controller = await start()
    version = (await asking(controller)).table.version
    rolling = asyncio.ensure_future(controller.upgrade(upgraded(controller.plan)))
    for _ in range(40):
        asking(controller, replace(NOTE, known=version + 5, oldest_used=version))
        await clock.advance(9.0)
    assert (await rolling).replaced == ("b",)
    assert spawner.living() == {"a", "b@2"}


async def test_a_caller_that_is_gone_is_forgotten_and_no_longer_admitted(start, spawner, clock):
    controller = await start()
    version = (await asking(controller)).table.version
    asking(controller, replace(NOTE, known=version, oldest_used=version))
    assert (await controller.describe())["callers"] == [{"node": "n1", "pid": 77, "oldest_table_version": 0}]
    rolling = asyncio.ensure_future(controller.upgrade(upgraded(controller.plan)))
    await clock.advance(14.0)
    assert rolling.done()
    assert (await controller.describe())["callers"] == []
    assert spawner.last("a").admitted == frozenset()


async def test_a_caller_that_says_good_bye_is_forgotten_at_once(start, spawner):
    controller = await start()
    await asking(controller)
    controller.caller_left("me")
    await settle()
    assert (await controller.describe())["callers"] == []
    assert spawner.last("a").admitted == frozenset()


async def test_a_controller_that_comes_back_keeps_admitting_callers_until_they_ask(start, make_controller, spawner):
    version = (await asking(await start())).table.version
    back = make_controller(num_routers=0)
    await back.resume()
    assert spawner.last("a").admitted == {"my-key"}
    assert (await back.describe())["callers"] == []
    news = await asking(back, replace(NOTE, known=version, oldest_used=version))
    assert news.table.version > version
    assert [each["pid"] for each in (await back.describe())["callers"]] == [77]


async def test_a_controller_that_knows_nothing_goes_on_from_the_versions_of_callers(start):
    controller = await start()
    news = await asking(controller, replace(NOTE, known=500, oldest_used=500))
    assert news.table.version == 501


async def test_a_caller_is_told_that_the_runtime_was_closed(start):
    controller = await start()
    version = (await asking(controller)).table.version
    waiting = asking(controller, replace(NOTE, known=version), timeout_s=60.0)
    await settle()
    await controller.close(drain_timeout_s=0)
    with pytest.raises(UnavailableError, match="runtime test: it was closed"):
        await waiting
    with pytest.raises(UnavailableError, match="runtime test: it was closed"):
        await asking(controller)


async def test_a_plan_takes_the_place_of_the_one_that_it_was_made_from_only(start):
    controller = await start(source=b"1")
    asked = upgraded(controller.plan)
    await controller.upgrade(asked, instead_of=b"1")
    with pytest.raises(ChangedMeanwhileError, match="runtime test: it was changed meanwhile"):
        await controller.upgrade(replace(asked, source=b"3"), instead_of=b"1")
    assert controller.plan.source == b"2"
    assert issubclass(ChangedMeanwhileError, StartError)
