"""Which change of a configuration makes another host, or another router, of one that runs."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.config.load import load_config
from moe_runtime.experts.weights import save_weights
from moe_runtime.launch.build import build_router
from moe_runtime.launch.plans import plan_runtime
from moe_runtime.launch.weights_recipe import WeightsRecipe
from moe_runtime.ray_backend.cluster import Cluster

HERE = Cluster("", node_id="n1", num_gpus=0.0, embedded=False, connected_here=False)


def expert(name, **changes):
    return {"name": name, "kind": "feed_forward", "options": {"hidden_features": 4}, **changes}


def plan_of(*experts, layer=None, router=None, listed=None, **changes):
    layers = {"l": {"item_shape": [4], "experts": experts or [expert("a"), expert("b")], **(layer or {})}}
    config = {"device": "cpu", "layers": layers, "router": {"address": "127.0.0.1:0", **(router or {})}, **changes}
    loaded = load_config(config)
    weights = WeightsRecipe("default", listed=listed or {})
    return plan_runtime(loaded.config, build_router(loaded), cluster=HERE, detach=True, weights=weights)


def revisions(plan):
    return {host.host_id: host.revision for host in plan.hosts}


def save(path, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"up.weight": (4, 4), "up.bias": (4,), "down.weight": (4, 4), "down.bias": (4,)}
    save_weights(path, {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()})
    return str(path)


BEFORE = plan_of()


def test_the_same_configuration_has_the_same_revisions():
    assert plan_of() == BEFORE
    assert len(set(revisions(BEFORE).values())) == 2


@pytest.mark.parametrize(
    "after",
    [
        plan_of(layer={"policy": {"kind": "switch"}}),
        plan_of(layer={"capacity": {"factor": 1.5}}),
        plan_of(layer={"residual": "none"}),
        plan_of(layer={"timeout_ms": 5}),
        plan_of(layer={"gate": {"kind": "mlp", "hidden_features": 8}}),
        plan_of(router={"max_batch_tokens": 7}),
    ],
)
def test_rules_of_a_layer_are_the_routers_alone(after):
    assert revisions(after) == revisions(BEFORE)
    assert after.routers.revision != BEFORE.routers.revision


@pytest.mark.parametrize(
    "changed",
    [
        expert("b", options={"hidden_features": 4, "activation": "gelu"}),
        expert("b", resources={"num_cpus": 0.2}),
        expert("b", view={"columns": [0, 4]}),
    ],
)
def test_an_expert_that_is_another_is_another_host_and_nothing_to_the_routers(changed):
    after = plan_of(expert("a"), changed)
    assert [old == new for old, new in zip(revisions(BEFORE).values(), revisions(after).values(), strict=True)] == [
        True,
        False,
    ]
    assert after.routers.revision == BEFORE.routers.revision


def test_more_experts_before_the_others_leave_their_hosts_alone():
    after = plan_of(expert("new"), expert("a"), expert("b"))
    assert revisions(after).items() >= revisions(BEFORE).items()
    assert [replica.expert_id for host in after.hosts for replica in host.replicas] == [0, 1, 2]
    assert after.routers.revision != BEFORE.routers.revision


def test_more_replicas_and_routers_change_nobody():
    after = plan_of(expert("a", replicas=2), expert("b"), layer={"strategy": "pack"}, router={"replicas": 3})
    assert revisions(after).items() >= revisions(BEFORE).items()
    assert after.routers.revision == BEFORE.routers.revision


@pytest.mark.parametrize("after", [plan_of(seed=1), plan_of(threads=2), plan_of(data_plane={"port_range": [7, 9]})])
def test_what_every_host_is_made_from_makes_them_all_others(after):
    assert not revisions(after).items() & revisions(BEFORE).items()


def of_weights(path, **changes):
    """The revision of a host whose expert has these weights."""
    other = expert("other")
    return revisions(plan_of(expert("a", weights=str(path)), other, **changes))["l/a/0"]


def test_weights_count_by_their_content_wherever_it_lies(tmp_path):
    first, elsewhere = save(tmp_path / "first", 1), save(tmp_path / "elsewhere", 1)
    before = of_weights(first)
    assert of_weights(elsewhere, seed=5) == before
    save(tmp_path / "first", 2)
    assert of_weights(first) != before


def test_a_hash_that_is_known_is_taken_as_it_is(tmp_path):
    paths = save(tmp_path / "first", 1), save(tmp_path / "second", 2)
    listed = dict.fromkeys(paths, "same")
    assert len({of_weights(path, listed=listed) for path in paths}) == 1
    assert len({of_weights(path) for path in paths}) == 2


def test_what_a_router_that_runs_cannot_change_is_listed_by_its_key():
    fixed = BEFORE.routers.fixed
    assert fixed["router.address"] == "127.0.0.1:0"
    assert fixed["data_plane.encryption"] == "curve"
    assert fixed["limits.max_request_tokens"] == "65536"
    slow = plan_of(layer={"timeout_ms": 7000}, limits={"max_timeout_s": 20.0})
    assert slow.routers.let_go_s == 27.0
