"""``moe-runtime cluster down``, which is the last that happens to the cluster of this folder's tests."""

from __future__ import annotations

from cluster.ray_cluster import RayCluster, ray_processes


def test_no_host_has_a_process_of_ray_afterwards_and_down_may_be_repeated(ray_cluster: RayCluster) -> None:
    assert all(ray_processes(host) for host in ray_cluster.node_hosts)
    ray_cluster.down()
    assert not [words for host in ray_cluster.node_hosts for words in ray_processes(host)]
    ray_cluster.down()
