from __future__ import annotations

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.packing import plan_hosts

OPTIONS = {"hidden_features": 8, "out_features": 4}


def hosts(experts, *, device="auto", gpus_available=False, **layer):
    data = {
        "device": device,
        "layers": {"l": {"item_shape": [6], "policy": {"kind": "switch"}, "experts": experts, **layer}},
    }
    loaded = load_config(data)
    return plan_hosts(loaded.config, build_layers(loaded), gpus_available=gpus_available)


def expert(count=1, replicas=1, **resources):
    return {
        "kind": "feed_forward", "count": count, "replicas": replicas, "options": OPTIONS, "resources": resources
    }  # fmt: skip


def replicas(specs):
    return [[hosted.replica_id for hosted in spec.experts] for spec in specs]


def test_by_default_every_expert_has_an_actor_of_its_own():
    specs = hosts([expert(2)])
    assert [spec.host_id for spec in specs] == ["l/feed_forward-0/0", "l/feed_forward-1/0"]
    assert replicas(specs) == [["l/feed_forward-0/0"], ["l/feed_forward-1/0"]]


def test_neighbours_share_an_actor_up_to_the_number_given():
    assert [len(group) for group in replicas(hosts([expert(5)], experts_per_actor=2))] == [2, 2, 1]


def test_experts_with_other_resources_never_share_an_actor():
    specs = hosts([expert(2), expert(2, num_cpus=1.0)], experts_per_actor=3)
    assert [len(group) for group in replicas(specs)] == [2, 2]
    assert [spec.resources.num_cpus for spec in specs] == [0.1, 1.0]


def test_every_replica_of_a_group_has_a_host_of_its_own_that_knows_its_twins():
    specs = hosts([expert(2, replicas=2)], experts_per_actor=2, strategy="pack")
    assert [(spec.host_id, spec.twins, spec.strategy) for spec in specs] == [
        ("l/feed_forward-0/0", "l/feed_forward-0", "pack"),
        ("l/feed_forward-0/1", "l/feed_forward-0", "pack"),
    ]
    assert replicas(specs) == [
        ["l/feed_forward-0/0", "l/feed_forward-1/0"],
        ["l/feed_forward-0/1", "l/feed_forward-1/1"],
    ]


def test_experts_with_other_numbers_of_replicas_never_share_an_actor():
    specs = hosts([expert(1, replicas=2), expert(1)], experts_per_actor=2)
    assert replicas(specs) == [["l/feed_forward-0/0"], ["l/feed_forward-0/1"], ["l/feed_forward-1/0"]]


@pytest.mark.parametrize(
    ("device", "gpus_available", "asked", "expected"),
    [
        ("auto", False, None, ("cpu", 0.0)),
        ("auto", True, None, ("cuda", 1.0)),
        ("auto", True, 0, ("cpu", 0.0)),
        ("auto", False, 0.5, ("cuda", 0.5)),
        ("cuda", False, None, ("cuda", 1.0)),
        ("cuda", True, 0.25, ("cuda", 0.25)),
        ("cuda", True, 0, ("cpu", 0.0)),
        ("cpu", True, None, ("cpu", 0.0)),
    ],
)
def test_an_expert_asks_for_a_gpu_where_its_device_is_one(device, gpus_available, asked, expected):
    resources = {} if asked is None else {"num_gpus": asked}
    (spec,) = hosts([expert(**resources)], device=device, gpus_available=gpus_available)
    assert (spec.device, spec.resources.num_gpus) == expected


def of_layers(**layers):
    data = {
        "layers": {name: {"item_shape": [6], "policy": {"kind": "switch"}, **layer} for name, layer in layers.items()}
    }
    loaded = load_config(data)
    return plan_hosts(loaded.config, build_layers(loaded), gpus_available=False)


def test_an_actor_of_a_group_has_the_experts_of_its_places_in_every_layer():
    one = {"actor_group": "g", "experts_per_actor": 2, "strategy": "pack"}
    specs = of_layers(
        a={"experts": [expert(3, replicas=2)], **one},
        apart={"experts": [expert(1)]},
        b={"experts": [{**expert(3, replicas=2), "kind": "identity", "options": {}}], **one},
    )
    assert [(spec.host_id, spec.twins, spec.strategy) for spec in specs] == [
        ("group:g/0/0", "group:g/0", "pack"),
        ("group:g/0/1", "group:g/0", "pack"),
        ("group:g/1/0", "group:g/1", "pack"),
        ("group:g/1/1", "group:g/1", "pack"),
        ("apart/feed_forward-0/0", "apart/feed_forward-0", "spread"),
    ]
    assert replicas(specs) == [
        ["a/feed_forward-0/0", "a/feed_forward-1/0", "b/identity-0/0", "b/identity-1/0"],
        ["a/feed_forward-0/1", "a/feed_forward-1/1", "b/identity-0/1", "b/identity-1/1"],
        ["a/feed_forward-2/0", "b/identity-2/0"],
        ["a/feed_forward-2/1", "b/identity-2/1"],
        ["apart/feed_forward-0/0"],
    ]


@pytest.mark.parametrize(
    ("layer", "mistake"),
    [
        ({"experts": [expert(3)]}, "layers.b.experts: expected 2 experts as in layer a, .* actor_group g, found 3"),
        ({"experts_per_actor": 2}, "layers.b.experts_per_actor: expected 1 as in layer a, .* found 2"),
        ({"strategy": "pack"}, "layers.b.strategy: expected spread as in layer a, .* found pack"),
        (
            {"experts": [expert(2, replicas=2)]},
            r"layers.b.experts\[feed_forward-0\].replicas: expected 1 as in layer a",
        ),
        (
            {"experts": [expert(1), expert(1, num_cpus=2.0)]},
            r"layers.b.experts\[feed_forward-1\].resources: expected the defaults as in .*, found {'num_cpus': 2.0}",
        ),
    ],
)
def test_a_layer_that_cannot_share_its_groups_actors_is_a_mistake(layer, mistake):
    group = {"experts": [expert(2)], "actor_group": "g"}
    with pytest.raises(ConfigError, match=mistake):
        of_layers(a=group, b={**group, **layer})
