"""What ``ray up cluster/local.yaml`` makes of three machines."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from cluster.ray_cluster import RayCluster

ASK_HEAD = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).cluster_id)"
RUN_ON_WORKER = """
import ray, os
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=0, label_selector={"ray.io/accelerator-type": "L4"})
def look():
    return os.uname().nodename, os.getpriority(os.PRIO_PROCESS, 0), os.environ["RAY_max_direct_call_object_size"]
print(*ray.get(look.remote(), timeout=30))
"""
DASHBOARD_PORT, GCS_PORT = 8265, 6379


def test_every_host_joins_under_its_own_address_and_name(ray_cluster: RayCluster) -> None:
    nodes = ray_cluster.nodes()
    hosts = {node["NodeManagerAddress"]: node["Labels"]["moe-host"] for node in nodes}
    assert hosts == {host.address: host.name for host in (ray_cluster.head, *ray_cluster.workers)}


def test_labels_say_what_each_host_is(ray_cluster: RayCluster) -> None:
    labels = {node["Labels"]["moe-host"]: node["Labels"] for node in ray_cluster.nodes()}
    assert labels["h1"]["moe-role"] == "head"
    assert labels["h2"]["moe-role"] == labels["h3"]["moe-role"] == "worker"
    assert labels["h2"]["ray.io/accelerator-type"] == "A100"
    assert labels["h3"]["ray.io/accelerator-type"] == "L4"


def test_a_label_selects_the_host_and_its_workers_have_the_settings(ray_cluster: RayCluster) -> None:
    assert ray_cluster.on(ray_cluster.head, RUN_ON_WORKER).stdout.split() == ["h3", "0", "4194304"]


@pytest.mark.parametrize(
    "credentials",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["no-token", "wrong-token"],
)
def test_a_client_without_the_token_is_refused_by_the_head(
    ray_cluster: RayCluster, credentials: dict[str, str]
) -> None:
    refused = ask_head(ray_cluster, credentials)
    assert refused.returncode != 0
    assert "InvalidAuthToken" in refused.stderr


def test_a_client_with_the_token_is_answered(ray_cluster: RayCluster) -> None:
    assert ask_head(ray_cluster, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray_cluster.token}).returncode == 0


def ask_head(ray_cluster: RayCluster, credentials: dict[str, str]) -> CompletedProcess[str]:
    """What came of asking the head from a machine that is no node, without the patience of ``ray.init``."""
    head = f"{ray_cluster.head.address}:{GCS_PORT}"
    return ray_cluster.operator.run(["python", "-c", ASK_HEAD, head], env=credentials, check=False)


def test_the_token_is_readable_by_its_owner_only(ray_cluster: RayCluster) -> None:
    for host in (ray_cluster.head, *ray_cluster.workers):
        token = Path(host.folder, "root/.ray/auth_token")
        assert token.read_text() == ray_cluster.token
        assert token.stat().st_mode & 0o777 == 0o600


def test_the_dashboard_is_for_the_head_itself_only(ray_cluster: RayCluster) -> None:
    (dashboard,) = (words for words in ray_cluster.head.pids().values() if "dashboard/dashboard.py" in words)
    assert "--host=127.0.0.1" in dashboard
    # Ray without its [default] extra has a dashboard process, but one that does not listen.
    listening = ray_cluster.head.run(["ss", "--listening", "--tcp", "--numeric", "--no-header"]).stdout.splitlines()
    addresses = {line.split()[3] for line in listening if line.split()[3].endswith(f":{DASHBOARD_PORT}")}
    assert addresses <= {f"127.0.0.1:{DASHBOARD_PORT}"}


def test_ray_exec_runs_on_the_head_with_its_environment(ray_cluster: RayCluster) -> None:
    done = ray_cluster.operator.run(["ray", "exec", str(ray_cluster.file), "ray status"])
    assert "3 local.cluster.node" in done.stdout
