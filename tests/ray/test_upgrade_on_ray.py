"""A runtime rolls to another configuration under load: no request fails, and no answer is of two minds."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fakes.callers import TOKENS, calling
from moe_runtime.cli.deploying import Asked
from moe_runtime.cli.upgrading import upgrade_and_report
from moe_runtime.errors import ConfigError, PlacementError, StartError, WeightsError
from moe_runtime.experts.weights import save_weights
from moe_runtime.launch.runtime import serve, upgrade
from moe_runtime.rpc.client import MoEClient

pytestmark = pytest.mark.timeout(240)


def answer_of(address, tokens=TOKENS):
    with MoEClient(address) as client:
        return client.forward(tokens, layer="l", timeout_s=60.0).outputs


def pids(runtime):
    return {host["host_id"]: host["pid"] for host in runtime.describe()["hosts"]}


def keys(runtime):
    return {f"{host['key']}" for host in runtime.describe()["hosts"]}


@pytest.fixture
def save_expert(tmp_path):
    """Writes the weights of a feed-forward expert, drawn by a number, and gives the file's path."""

    def save(name, seed):
        draw = torch.Generator().manual_seed(seed)
        shapes = {"up.weight": (16, 8), "up.bias": (16,), "down.weight": (4, 16), "down.bias": (4,)}
        path = tmp_path / f"{name}.safetensors"
        save_weights(path, {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()})
        return str(path)

    return save


def expert(name, **changes):
    return {"name": name, "kind": "feed_forward", "options": {"hidden_features": 16, "out_features": 4}, **changes}


def test_no_request_fails_while_everything_that_may_change_does(make_config, save_expert, actor_names):
    def config(*, router=None, **layer):
        return make_config("rolling", router=router, **layer)

    first, second, third = save_expert("first", 1), save_expert("second", 2), save_expert("third", 3)
    experts = [expert("a", weights=first), expert("b", weights=second)]
    with serve(config(experts=experts)) as runtime, calling(runtime.addresses) as clients:
        answers = [answer_of(runtime.address)]
        before = pids(runtime)

        def roll(**changes):
            outcome = upgrade(config(**changes))
            answers.append(answer_of(runtime.address))
            return outcome

        # Other weights in the place of one expert's: its file keeps its name.
        save_expert("second", 20)
        outcome = roll(experts=experts)
        assert (outcome.kept, outcome.replaced) == (("l/a/0",), ("l/b/0",))
        assert not torch.allclose(answers[0], answers[1], atol=1e-3)

        # One more expert before the others: they keep their actors, and get other rows of another gate.
        experts = [expert("new", weights=third), *experts]
        outcome = roll(experts=experts)
        assert (set(outcome.kept), outcome.added) == ({"l/a/0", "l/b/0"}, ("l/new/0",))

        experts[1] = expert("a", weights=first, replicas=2)
        outcome = roll(experts=experts)
        assert (outcome.added, outcome.replaced, outcome.removed) == (("l/a/1",), (), ())
        assert torch.allclose(answers[-1], answers[-2], atol=1e-5)
        assert pids(runtime)["l/a/0"] == before["l/a/0"]

        # No capacity that fills: what it drops would depend on who shares a batch.
        policy = {"policy": {"kind": "switch"}, "capacity": {"factor": 100.0}}
        outcome = roll(experts=experts, router={"max_batch_tokens": 64}, **policy)
        assert len(outcome.kept) == 4
        assert (outcome.added, outcome.replaced, outcome.removed) == ((), (), ())

        again = upgrade(config(experts=experts, router={"max_batch_tokens": 64}, **policy))
        assert again.is_nothing
        num_answers = clients.num_answers
    assert clients.errors == []
    assert num_answers > 20
    # Each answer is exactly that of one configuration.
    for found in clients.answers:
        assert any(torch.allclose(found, known, atol=1e-4) for known in answers), found
    assert actor_names("rolling") == []


def test_routers_come_and_go_without_a_failed_request(make_config, actor_names, tmp_path, capsys):
    identity = {"experts": [{"kind": "identity"}], "policy": {"kind": "switch"}}
    with serve(make_config("routers", **identity)) as runtime, calling(runtime.addresses) as alone:
        assert upgrade(make_config("routers", router={"replicas": 2}, **identity)).num_routers == 2
        addresses = runtime.describe()["addresses"]
        assert addresses[0] == runtime.address
        assert len(addresses) == 2
        assert torch.equal(answer_of(addresses[1]), answer_of(addresses[0]))
        with calling(addresses) as both:
            path = tmp_path / "config.yaml"
            path.write_text(json.dumps(make_config("routers", **identity)))
            upgrade_and_report(Asked(path), as_json=False)
            # Ray may say something, too.
            assert "upgraded: 1 expert host kept, 1 router" in capsys.readouterr().out.splitlines()
            # Controller, expert host, router, and the depot of what the command has bundled.
            assert len(actor_names("routers")) == 4
    assert alone.errors == []
    assert both.errors == []


def test_a_configuration_that_cannot_start_leaves_the_one_that_serves(make_config, actor_names, tmp_path):
    identity = {"name": "same", "kind": "identity"}

    def config(*experts, **changes):
        return {**make_config("kept", experts=[identity, *experts], policy={"kind": "switch"}), **changes}

    with serve(config()) as runtime, calling(runtime.addresses) as clients:
        before, actors = pids(runtime), actor_names("kept")
        gone = expert("gone", options={"hidden_features": 16}, weights=str(tmp_path / "gone.safetensors"))
        with pytest.raises(WeightsError, match="found none"):
            upgrade(config(gone))
        with pytest.raises(StartError, match=r"l/picky-0/0 on node .*: the licence server is gone"):
            upgrade(config({"kind": "picky", "options": {"allowed_pid": os.getpid()}}))
        greedy = {"name": "greedy", "kind": "identity", "resources": {"custom": {"fast": 9}}}
        with pytest.raises(PlacementError, match=r"expert host l/greedy/0: found no place .*fast"):
            upgrade(config(greedy, start_timeout_s=3.0))
        with pytest.raises(ConfigError, match=r"router.address: expected 127.0.0.1:0 as it runs.*\n.*teardown kept"):
            upgrade(config(router={"address": "127.0.0.1:1"}))
        assert (pids(runtime), actor_names("kept")) == (before, actors)
        assert torch.equal(answer_of(runtime.address), TOKENS)
    assert clients.errors == []


def test_a_controller_that_is_killed_before_the_change_leaves_nothing_behind(
    make_config, actor_names, eventually, tmp_path
):
    def config(**options):
        patient = {"name": "p", "kind": "patient", "options": {"quick_pid": os.getpid(), **options}}
        return make_config("early", experts=[patient], policy={"kind": "switch"})

    is_ready = tmp_path / "is-ready"
    with serve(config()) as runtime, calling(runtime.addresses) as clients, ThreadPoolExecutor(1) as pool:
        before = keys(runtime)
        rolling = pool.submit(upgrade, config(built_when=str(is_ready)))

        def new_host():
            upgrading = runtime.describe()["upgrade"]
            return upgrading is not None and next((h["pid"] for h in upgrading["new"] if h["pid"]), None)

        first = eventually(new_host)
        os.kill(runtime.describe()["controller_pid"], signal.SIGKILL)
        # Who asked for the upgrade asks the restarted one again.
        eventually(lambda: new_host() not in (None, False, first))
        assert keys(runtime) == before
        is_ready.touch()
        assert rolling.result(120.0).replaced == ("l/p/0",)
        assert upgrade(config(built_when=str(is_ready))).is_nothing
        assert keys(runtime) != before
        assert len(actor_names("early")) == 3
        assert torch.equal(answer_of(runtime.address), TOKENS)
    assert clients.errors == []
    assert actor_names("early") == []


def test_a_controller_that_is_killed_after_the_change_ends_what_is_old_when_it_is_back(
    make_config, actor_names, eventually, tmp_path
):
    is_busy = tmp_path / "is-busy"

    def config(**options):
        patient = {"name": "p", "kind": "patient", "options": {"quick_pid": os.getpid(), **options}}
        return make_config("late", experts=[patient], policy={"kind": "switch"}, timeout_ms=100000)

    with serve(config(busy_while=str(is_busy))) as runtime, ThreadPoolExecutor(2) as pool:
        before = pids(runtime)
        is_busy.touch()
        held = pool.submit(answer_of, runtime.address)
        with MoEClient(runtime.address) as client:
            eventually(lambda: client.status()["layers"]["l"]["batches_in_flight"] == 1)
        rolling = pool.submit(upgrade, config())
        eventually(lambda: "last request" in (runtime.describe()["upgrade"] or {}).get("step", ""))
        # New requests are served by the new expert already.
        assert torch.equal(answer_of(runtime.address, TOKENS[:2]), TOKENS[:2])
        os.kill(runtime.describe()["controller_pid"], signal.SIGKILL)
        eventually(lambda: pids(runtime) != before)
        assert len(actor_names("late")) == 4
        assert not held.done()
        is_busy.unlink()
        assert torch.equal(held.result(60.0), TOKENS)
        rolling.result(120.0)
        eventually(lambda: len(actor_names("late")) == 3)
    assert actor_names("late") == []
