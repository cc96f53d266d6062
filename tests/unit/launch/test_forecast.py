from __future__ import annotations

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.launch.forecast import ClusterView, LinkForecast, LoadForecast, PlannedNode, forecast
from moe_runtime.ray_backend.placer import NodeShape

GIB = 1 << 30
#: Weights and biases of 4 -> 8 -> 2, in float32.
FEED_FORWARD = {"kind": "feed_forward", "options": {"hidden_features": 8, "out_features": 2}}
FEED_FORWARD_BYTES = 4 * ((4 * 8 + 8) + (8 * 2 + 2))


def view(*nodes):
    return ClusterView(nodes, home_id=nodes[0].shape.node_id)


def node(name, *, gpu_memory=None, **total):
    labels = {"ray.io/node-id": name}
    shape = NodeShape(name, node_id=name, labels=labels, total={"CPU": 1.0, "memory": 4.0 * GIB, **total})
    return PlannedNode(shape, gpu_memory)


def plan(cluster, experts, *, router=None, device="cpu", **layer):
    data = {
        "device": device,
        "layers": {"l": {"item_shape": [4], "policy": {"kind": "top_k", "k": 1}, "experts": experts, **layer}},
        "router": {"address": "node:50051", **(router or {})},
        "security": {"insecure": True},
    }
    return forecast(load_config(data), cluster)


def nodes_of(result):
    return {actor.actor_id: actor.node for actor in result.actors}


def test_load_and_traffic_are_those_of_a_gate_that_prefers_nobody():
    # Two experts on two nodes, one router: half of the rows leave its node, 16 bytes there and 8 back.
    result = plan(view(node("n1"), node("n2")), [{**FEED_FORWARD, "count": 2, "resources": {"num_cpus": 1}}])
    assert nodes_of(result) == {"router 0": "n1", "l/feed_forward-0/0": "n1", "l/feed_forward-1/0": "n2"}
    assert result.loads == (LoadForecast("l", "n1", 0.5), LoadForecast("l", "n2", 0.5))
    assert result.links == (LinkForecast("l", "n1", "n2", bytes_there=8.0, bytes_back=4.0),)
    assert (result.mistakes, result.warnings) == ((), ())


def test_replicas_share_their_experts_tokens_and_routers_share_all():
    result = plan(
        view(node("n1"), node("n2")),
        [{**FEED_FORWARD, "replicas": 2, "resources": {"num_cpus": 1}}],
        router={"replicas": 2},
        wire_dtype="bfloat16",
    )
    assert [actor.tokens for actor in result.actors] == [0.5] * 4
    # Each router has half of the tokens, and sends half of those to the other node: 8 bytes a row.
    assert {(link.router_node, link.expert_node, link.bytes_there) for link in result.links} == {
        ("n1", "n2", 2.0),
        ("n2", "n1", 2.0),
    }


def test_a_dense_layer_sends_each_token_to_every_expert():
    result = plan(view(node("n1")), [{**FEED_FORWARD, "count": 3}], policy={"kind": "dense"})
    assert result.loads == (LoadForecast("l", "n1", pytest.approx(3.0)),)


def test_a_shared_expert_gets_every_token_and_the_others_part_of_the_choices():
    layer = {"policy": {"kind": "top_k", "k": 2}, "shared_experts": [{**FEED_FORWARD, "name": "all", "replicas": 2}]}
    result = plan(view(node("n1")), [{**FEED_FORWARD, "count": 4}], **layer)
    assert {actor.actor_id: actor.tokens for actor in result.actors[1:]} == {
        **{f"l/feed_forward-{n}/0": 0.5 for n in range(4)},
        "l/all/0": 0.5,
        "l/all/1": 0.5,
    }


def test_an_expert_that_chooses_its_tokens_gets_its_capacity_of_them():
    policy = {"kind": "expert_choice", "capacity_factor": 2.0}
    result = plan(view(node("n1")), [{**FEED_FORWARD, "count": 8}], policy=policy)
    assert [actor.tokens for actor in result.actors[1:]] == [0.25] * 8


def test_weights_are_counted_per_device():
    shared = {**FEED_FORWARD, "count": 3, "resources": {"num_gpus": 0.5}}
    result = plan(view(node("n1", gpu_memory=GIB, GPU=2.0)), [shared], device="auto")
    assert [(each.device, each.weights_bytes, each.total_bytes) for each in result.devices] == [
        ("GPU 0", 2 * FEED_FORWARD_BYTES, GIB),
        ("GPU 1", FEED_FORWARD_BYTES, GIB),
    ]


def test_weights_in_half_precision_take_half():
    result = plan(view(node("n1")), [FEED_FORWARD], dtype="bfloat16")
    assert [each.weights_bytes for each in result.devices] == [FEED_FORWARD_BYTES // 2]


def test_what_does_not_fit_is_named_with_what_is_missing():
    small = node("n1", memory=300.0)
    result = plan(view(small), [{**FEED_FORWARD, "count": 3, "resources": {"num_cpus": 0.4}}])
    assert result.mistakes == (
        "l/feed_forward-2/0: asks for CPU 0.4; n1: CPU 0.4 (0.2 free of 1)",
        "n1, memory: expected room for weights of 0.00 GiB, found 0.00 GiB",
    )
    assert nodes_of(result)["l/feed_forward-2/0"] is None


def test_routers_at_a_loopback_address_stay_where_the_runtime_is_started_from():
    cluster = ClusterView((node("n1"), node("n2")), home_id="n2")
    result = plan(cluster, [FEED_FORWARD], router={"address": "127.0.0.1:50051", "replicas": 2})
    assert [actor.node for actor in result.actors[:2]] == ["n2", "n2"]
    assert result.warnings == (
        "router.address: 127.0.0.1:50051 is a loopback address: only clients on n2 reach the routers",
    )


def test_routers_of_several_nodes_cannot_share_a_loopback_address():
    labelled = [
        PlannedNode(NodeShape(name, node_id=name, labels={"role": "front"}, total={"CPU": 1.0})) for name in ("a", "b")
    ]
    router = {"address": "127.0.0.1:50051", "replicas": 2, "node_labels": {"role": "front"}}
    (mistake,) = plan(view(*labelled), [FEED_FORWARD], router=router).mistakes
    assert "expected one that other nodes reach, since the routers are on 2 nodes" in mistake
