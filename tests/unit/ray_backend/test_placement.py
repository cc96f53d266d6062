from __future__ import annotations

from moe_runtime.ray_backend.placement import actor_options, explain_unmet, place_options
from moe_runtime.ray_backend.plan import Demand


def test_a_demand_becomes_rays_options():
    demand = Demand(num_cpus=0.5, num_gpus=0.25, memory_bytes=1 << 30, custom={"fast": 1}, node_labels={"zone": "a"})
    assert actor_options(demand) == {
        "num_cpus": 0.5,
        "num_gpus": 0.25,
        "memory": 1 << 30,
        "resources": {"fast": 1},
    }


def test_an_actor_with_a_chosen_node_runs_there_or_fails_at_once():
    node_id = "ab" * 28
    strategy = place_options(Demand(node_labels={"zone": "a"}), node_id=node_id, spread=True)["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft, strategy._fail_on_unavailable) == (node_id, False, True)


def test_an_actor_without_a_chosen_node_is_left_to_ray_with_its_labels_and_its_strategy():
    demand = Demand(node_labels={"zone": "a"})
    assert place_options(demand, node_id=None, spread=True) == {
        "scheduling_strategy": "SPREAD",
        "label_selector": {"zone": "a"},
    }
    assert place_options(Demand(), node_id=None, spread=False) == {"scheduling_strategy": "DEFAULT"}


def test_what_is_not_asked_for_is_not_passed_on():
    assert actor_options(Demand()) == {"num_cpus": 0.1, "num_gpus": 0.0}


def test_an_unmet_demand_is_told_beside_what_the_cluster_has():
    text = explain_unmet(
        Demand(num_cpus=0.1, num_gpus=2, custom={"fast": 1}, node_labels={"zone": "a"}),
        total={"CPU": 4.0, "GPU": 1.0},
        free={"CPU": 3.5},
        nodes=[{"zone": "b"}, {"zone": "a"}],
    )
    assert text == (
        "asks for CPU 0.1, GPU 2, fast 1, label zone=a; the cluster has CPU 3.5 free of 4, GPU 0 free of 1, "
        "fast 0 free of 0, 1 of 2 nodes with label zone=a"
    )


def test_memory_is_told_in_gib():
    text = explain_unmet(Demand(num_cpus=0, memory_bytes=3 << 30), total={"memory": float(2 << 30)}, free={}, nodes=[])
    assert text == "asks for memory 3.00 GiB; the cluster has memory 0.00 GiB free of 2.00 GiB"
