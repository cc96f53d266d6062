from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.ray_backend.placer import ActorDemand, NodeShape, Place, Standing, place_actors
from moe_runtime.ray_backend.plan import Demand

GIB = 1 << 30


def node(name, *, free=None, labels=None, **total):
    return NodeShape(name, labels=labels or {}, total={"CPU": 4.0, **total}, free=free)


def actor(actor_id, *, layer="l", twins=None, strategy="spread", **demand):
    return ActorDemand(actor_id, Demand(**{"num_cpus": 1.0, **demand}), layer, twins or actor_id, strategy)


def nodes_of(placement):
    return {actor_id: place.node for actor_id, place in placement.places.items()}


def test_spread_takes_the_node_with_the_fewest_actors_of_the_layer():
    placement = place_actors([node("n1"), node("n2"), node("n3")], [actor(i) for i in "abcd"])
    assert nodes_of(placement) == {"a": "n1", "b": "n2", "c": "n3", "d": "n1"}


def test_spread_takes_the_least_loaded_of_the_nodes_with_equally_many_actors_of_the_layer():
    busy = node("n1", free={"CPU": 1.0})
    assert nodes_of(place_actors([busy, node("n2")], [actor("a")])) == {"a": "n2"}


def test_pack_fills_a_node_before_it_takes_another():
    actors = [actor(i, strategy="pack") for i in "abcde"]
    assert list(nodes_of(place_actors([node("n1"), node("n2")], actors)).values()) == ["n1"] * 4 + ["n2"]


def test_pack_begins_with_the_fullest_node_that_has_room():
    nodes = [node("n1"), node("n2", free={"CPU": 1.0}), node("n3", free={"CPU": 0.5})]
    assert nodes_of(place_actors(nodes, [actor("a", strategy="pack")])) == {"a": "n2"}


@pytest.mark.parametrize("strategy", ["spread", "pack"])
def test_twins_go_to_nodes_of_their_own_where_others_have_room(strategy):
    twins = [actor(f"a/{n}", twins="a", strategy=strategy) for n in range(3)]
    assert nodes_of(place_actors([node("n1"), node("n2")], twins)) == {"a/0": "n1", "a/1": "n2", "a/2": "n1"}


def test_twins_share_a_node_where_no_other_has_room():
    twins = [actor(f"a/{n}", twins="a") for n in range(2)]
    assert nodes_of(place_actors([node("n1"), node("n2", free={"CPU": 0.5})], twins)) == {"a/0": "n1", "a/1": "n1"}


def test_a_replacement_keeps_away_from_its_twin_and_from_what_stands():
    nodes = [node("n1"), node("n2"), node("n3")]
    standing = [Standing(actor("a/0", twins="a"), "n1"), Standing(actor("b/0"), "n2")]
    assert nodes_of(place_actors(nodes, [actor("a/1", twins="a")], standing=standing)) == {"a/1": "n3"}


def test_labels_are_demanded_of_the_node():
    nodes = [node("n1", labels={"zone": "a"}), node("n2", labels={"zone": "b"})]
    placement = place_actors(nodes, [actor("a", node_labels={"zone": "b"}), actor("b", node_labels={"zone": "c"})])
    assert nodes_of(placement) == {"a": "n2"}
    assert [str(each) for each in placement.unplaceable] == [
        "b: asks for CPU 1, label zone=c; n1: label zone=c (has zone=a); n2: label zone=c (has zone=b)"
    ]


def test_shares_of_gpus_need_room_on_one_device():
    placement = place_actors([node("n1", GPU=2.0)], [actor(i, num_gpus=0.6) for i in "abc"])
    assert placement.places == {"a": Place("n1", (0,)), "b": Place("n1", (1,))}
    assert str(placement.unplaceable[0]) == (
        "c: asks for CPU 1, GPU 0.6; n1: GPU 0.6 on one device (0.8 free in all, at most 0.4 on one)"
    )


def test_shares_fill_one_device_before_the_next_and_leave_whole_ones_whole():
    actors = [actor("a", num_gpus=0.5), actor("b", num_gpus=0.5), actor("c", num_gpus=1)]
    assert place_actors([node("n1", GPU=2.0)], actors).places == {
        "c": Place("n1", (0,)),
        "a": Place("n1", (1,)),
        "b": Place("n1", (1,)),
    }


def test_what_others_hold_of_gpus_is_counted_on_as_few_devices_as_can_be():
    shared = node("n1", GPU=3.0, free={"CPU": 4.0, "GPU": 1.5})
    assert place_actors([shared], [actor("a", num_gpus=1), actor("b", num_gpus=0.5)]).places == {
        "a": Place("n1", (2,)),
        "b": Place("n1", (1,)),
    }


def test_memory_and_custom_resources_are_counted_and_named():
    shape = node("n1", memory=3.0 * GIB, fast=1.0)
    placement = place_actors(
        [shape], [actor("a", memory_bytes=2 * GIB), actor("b", memory_bytes=2 * GIB), actor("c", custom={"fast": 2})]
    )
    assert nodes_of(placement) == {"a": "n1"}
    assert [str(each) for each in placement.unplaceable] == [
        "c: asks for CPU 1, fast 2; n1: fast 2 (1 free of 1)",
        "b: asks for CPU 1, memory 2.00 GiB; n1: memory 2.00 GiB (1.00 GiB free of 3.00 GiB)",
    ]


def test_ten_tenths_of_a_cpu_fit_a_cpu():
    placement = place_actors([NodeShape("n1", total={"CPU": 1.0})], [actor(str(i), num_cpus=0.1) for i in range(11)])
    assert len(placement.places) == 10


def test_what_is_not_known_of_a_node_is_not_limited():
    assert nodes_of(place_actors([node("n1", memory=math.inf)], [actor("a", memory_bytes=GIB)])) == {"a": "n1"}


def test_an_actor_whose_take_is_not_yet_reported_is_not_overlooked():
    pending = Standing(actor("a", num_cpus=3), "n1", is_reported=False)
    assert place_actors([node("n1", free={"CPU": 4.0})], [actor("b", num_cpus=2)], standing=[pending]).places == {}


def test_an_actor_that_stands_is_counted_once_whether_the_report_lags_or_not():
    standing = [Standing(actor("a", num_cpus=3), "n1")]
    for reported in (4.0, 1.0):
        shape = node("n1", free={"CPU": reported})
        assert nodes_of(place_actors([shape], [actor("b")], standing=standing)) == {"b": "n1"}
        assert place_actors([shape], [actor("c", num_cpus=2)], standing=standing).places == {}


def test_what_an_actor_that_is_gone_held_counts_as_free_whether_the_report_lags_or_not():
    gone = Standing(actor("a", twins="t", num_cpus=3), "n1", is_gone=True)
    for reported in (4.0, 1.0):
        shape = node("n1", free={"CPU": reported})
        placement = place_actors([shape, node("n2")], [actor("b", twins="t", num_cpus=4)], standing=[gone])
        assert nodes_of(placement) == {"b": "n1"}


def test_nodes_that_lack_the_same_are_told_once():
    text = str(place_actors([node(f"n{i}") for i in range(6)], [actor("a", num_cpus=5)]).unplaceable[0])
    assert text == "a: asks for CPU 5; n0, n1, n2 and 3 more nodes: CPU 5 (4 free of 4)"


def test_without_nodes_nothing_has_a_place():
    assert str(place_actors([], [actor("a")]).unplaceable[0]) == "a: asks for CPU 1; there is no node"


SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0, 2.0])
DEMANDS = st.builds(
    Demand,
    num_cpus=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
    num_gpus=SHARES,
    memory_bytes=st.sampled_from([None, GIB, 3 * GIB]),
    custom=st.sampled_from([{}, {"fast": 1.0}]),
    node_labels=st.sampled_from([{}, {"zone": "a"}]),
)
NODES = st.lists(
    st.builds(
        lambda cpus, gpus, memory, fast, zone: NodeShape(
            "", labels=zone, total={"CPU": cpus, "GPU": gpus, "memory": memory, "fast": fast}
        ),
        st.sampled_from([0.0, 1.0, 4.0]),
        st.sampled_from([0.0, 1.0, 2.0]),
        st.sampled_from([0.0, 4.0 * GIB]),
        st.sampled_from([0.0, 2.0]),
        st.sampled_from([{}, {"zone": "a"}, {"zone": "b"}]),
    ),
    max_size=4,
).map(lambda nodes: [NodeShape(f"n{i}", labels=n.labels, total=n.total) for i, n in enumerate(nodes)])
ACTORS = st.lists(
    st.tuples(DEMANDS, st.sampled_from("lm"), st.sampled_from("tuv"), st.sampled_from(["spread", "pack"])), max_size=10
).map(lambda drawn: [ActorDemand(str(i), *each) for i, each in enumerate(drawn)])


def fixed(amount):
    return round(amount * 10_000)


@given(NODES, ACTORS)
def test_no_node_and_no_device_is_ever_overcommitted_and_labels_are_kept(nodes, actors):
    shapes, by_id = {n.name: n for n in nodes}, {a.actor_id: a for a in actors}
    placement = place_actors(nodes, actors)
    assert {*placement.places, *(each.actor_id for each in placement.unplaceable)} == set(by_id)
    taken, devices = Counter(), defaultdict(Counter)
    for actor_id, place in placement.places.items():
        demand, shape = by_id[actor_id].demand, shapes[place.node]
        assert demand.node_labels.items() <= shape.labels.items()
        amounts = {"CPU": demand.num_cpus, "GPU": demand.num_gpus, "memory": demand.memory_bytes or 0, **demand.custom}
        for name, amount in amounts.items():
            taken[place.node, name] += fixed(amount)
        assert len(place.gpus) == math.ceil(demand.num_gpus)
        for gpu in place.gpus:
            devices[place.node][gpu] += fixed(min(demand.num_gpus, 1.0))
    assert all(amount <= fixed(shapes[name].total.get(kind, 0.0)) for (name, kind), amount in taken.items())
    for name, used in devices.items():
        assert all(gpu < shapes[name].total["GPU"] and amount <= 10_000 for gpu, amount in used.items())


@given(NODES, ACTORS)
def test_twins_share_a_node_only_where_no_other_had_room_for_one(nodes, actors):
    done: list[Standing] = []
    by_id = {a.actor_id: a for a in actors}
    for actor_id, place in place_actors(nodes, actors).places.items():
        twins_on = Counter(each.node for each in done if each.actor.twins == by_id[actor_id].twins)
        others = [n for n in nodes if not twins_on[n.name]]
        if twins_on[place.node]:
            standing = [each for each in done if each.node in {n.name for n in others}]
            assert place_actors(others, [by_id[actor_id]], standing=standing).places == {}
        done.append(Standing(by_id[actor_id], place.node))


@given(NODES, ACTORS)
def test_what_found_no_place_still_has_none_on_what_is_left(nodes, actors):
    by_id = {a.actor_id: a for a in actors}
    placement = place_actors(nodes, actors)
    standing = [Standing(by_id[actor_id], place.node) for actor_id, place in placement.places.items()]
    left = [by_id[each.actor_id] for each in placement.unplaceable]
    assert place_actors(nodes, left, standing=standing).places == {}


@given(NODES, ACTORS)
def test_equal_input_gives_equal_output(nodes, actors):
    assert place_actors(nodes, actors) == place_actors(nodes, actors)
