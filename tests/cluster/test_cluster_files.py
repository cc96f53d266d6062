"""The files in ``cluster/``: what Ray, the clouds and Kubernetes accept, and what every cluster has to have set."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config

from moe_runtime.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
RAY_UP_FILES = ["local.yaml", "aws-gpu.yaml", "gcp-gpu.yaml", "cpu.yaml"]
CLOUD_FILES = RAY_UP_FILES[1:]
KUBERAY_FILES = ["raycluster.yaml", "rayservice.yaml"]
#: What every process of Ray on every node has in its environment.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_timeout_ms_task_wait_for_death_info": "50",
    "RAY_core_worker_internal_heartbeat_ms": "100",
    "RAY_max_direct_call_object_size": "4194304",
    "RAY_worker_niceness": "0",
}
NODE_ENV = {**SETTINGS, "RAY_AUTH_MODE": "token"}
ENVIRONMENT_FILE = ". ~/moe_runtime/env.sh;"
OF_EVERY_NODE = ["--disable-usage-stats", "--node-ip-address=", "--labels=", "--labels-file=", "--object-store-memory="]
OF_THE_HEAD = ["--dashboard-host=127.0.0.1", "--port=6379", "--autoscaling-config=~/ray_bootstrap_config.yaml"]
GPU_TYPES = {"aws-gpu.yaml": {"A10G", "L4"}, "gcp-gpu.yaml": {"L4", "A100"}}


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return loaded


def manifests(name: str) -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text())
    return {document["kind"]: document for document in documents}


def ray_cluster(name: str) -> dict[str, Any]:
    found = manifests(name)
    spec: dict[str, Any] = found["RayCluster"]["spec"] if name == "raycluster.yaml" else found["RayService"]["spec"]
    return spec if name == "raycluster.yaml" else spec["rayClusterConfig"]


def groups(name: str) -> list[dict[str, Any]]:
    spec = ray_cluster(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pinned_ray() -> str:
    found = re.search(r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


# --- ray up ---


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_ray_accepts_the_file_as_it_is(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", CLOUD_FILES)
def test_nothing_of_rays_own_set_up_is_left(name: str) -> None:
    # Ray's defaults install a nightly Ray, and open the dashboard: every list of commands is ours.
    prepared, ours = prepare_config(read(name)), read(name)
    assert prepared["setup_commands"] == ours["setup_commands"]
    assert prepared["head_setup_commands"] == ours["setup_commands"] + ours["head_setup_commands"]
    assert prepared["worker_setup_commands"] == ours["setup_commands"]
    assert set(prepared["available_node_types"]) == set(ours["available_node_types"])


def test_the_local_provider_accepts_the_local_file() -> None:
    config = prepare_config(read("local.yaml"))
    bootstrapped = _get_node_provider_cls(config["provider"]).bootstrap_config(config)
    (node_type,) = bootstrapped["available_node_types"].values()
    # Every worker is to be there, and stays.
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])
    assert bootstrapped["idle_timeout_minutes"] >= 24 * 60 * 365


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_every_node_starts_ray_with_what_it_needs(name: str) -> None:
    config = read(name)
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert head.startswith(ENVIRONMENT_FILE)
    assert worker.startswith(ENVIRONMENT_FILE)
    assert [option for option in OF_EVERY_NODE + OF_THE_HEAD if option not in head] == []
    assert [option for option in OF_EVERY_NODE if option not in worker] == []
    assert 'ray start --address="$RAY_HEAD_IP:6379"' in worker
    assert config["head_start_ray_commands"][0] == config["worker_start_ray_commands"][0] == "ray stop"


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_a_new_head_knows_nothing_of_the_cluster_before(name: str) -> None:
    assert "unset RAY_gcs_storage RAY_gcs_storage_path;" in read(name)["head_start_ray_commands"][-1]


def test_autoscaler_version_2_is_off_where_it_starts_one_worker_only() -> None:
    assert "export RAY_enable_autoscaler_v2=0" in read("local.yaml")["head_start_ray_commands"][-1]


def test_the_files_differ_only_in_their_machines() -> None:
    local, *clouds = (read(name) for name in RAY_UP_FILES)
    for cloud in clouds:
        assert cloud["file_mounts"] == local["file_mounts"]
        assert cloud["worker_start_ray_commands"] == local["worker_start_ray_commands"]
        assert cloud["head_start_ray_commands"] == clouds[0]["head_start_ray_commands"]
        assert cloud["setup_commands"][-1:] == local["setup_commands"]


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_what_is_shipped_to_the_nodes_exists_and_is_enough_to_install(name: str) -> None:
    mounts = read(name)["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert [path for path in mounts.values() if not path.startswith("~") and not (REPOSITORY / path).exists()] == []
    shipped = {target.removeprefix("~/moe_runtime/src/") for target in mounts}
    assert {"moe_runtime", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= shipped


def test_the_environment_of_a_node_has_every_setting_and_says_why() -> None:
    script = CLUSTER / "node_env.sh"
    shell = subprocess.run(
        ["bash", "-c", f". {script}; env"], env={"HOME": "/home/u", "PATH": "/bin:/usr/bin"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    environment = dict(line.split("=", 1) for line in shell.stdout.splitlines() if "=" in line)
    assert {name: environment.get(name) for name in NODE_ENV} == NODE_ENV
    assert environment["PATH"] == "/home/u/moe_runtime/venv/bin:/bin:/usr/bin"
    blocks = script.read_text().strip().split("\n\n")
    assert [block for block in blocks if "RAY_" in block and not block.startswith("#")] == []


@pytest.mark.parametrize("name", CLOUD_FILES)
def test_cloud_nodes_come_and_go_with_the_demand_but_the_head_takes_no_experts(name: str) -> None:
    config = read(name)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert all(0 <= kind["min_workers"] < kind["max_workers"] for kind in types.values())
    assert sum(kind["min_workers"] for kind in types.values()) >= 1
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]


@pytest.mark.parametrize("name", sorted(GPU_TYPES))
def test_each_gpu_type_has_its_accelerators_label_and_room_for_weights(name: str) -> None:
    config = read(name)
    types = [kind for key, kind in config["available_node_types"].items() if key != config["head_node_type"]]
    assert {kind["labels"]["ray.io/accelerator-type"] for kind in types} == GPU_TYPES[name]
    assert all(kind["resources"]["GPU"] >= 1 for kind in types)
    assert re.findall(r"(?:VolumeSize|diskSizeGb): (\d+)", (CLUSTER / name).read_text())[1:] == ["200", "200"]


def test_ec2_knows_every_field_of_the_aws_nodes() -> None:
    pytest.importorskip("boto3", reason="needs boto3, which holds EC2's model: pip install boto3")
    from botocore.session import get_session
    from botocore.validate import ParamValidator
    from ray.autoscaler._private.aws.config import _check_ami, _configure_from_launch_template

    config = prepare_config(read("aws-gpu.yaml"))
    _check_ami(_configure_from_launch_template(config))
    run_instances = get_session().get_service_model("ec2").operation_model("RunInstances")
    for kind in config["available_node_types"].values():
        parameters = {"MinCount": 1, "MaxCount": 1, **kind["node_config"]}
        assert ParamValidator().validate(parameters, run_instances.input_shape).generate_report() == ""


@pytest.mark.parametrize("name", ["gcp-gpu.yaml", "cpu.yaml"])
def test_compute_engine_knows_every_field_of_the_gcp_nodes(name: str) -> None:
    pytest.importorskip("google_auth_httplib2", reason="needs Google's client: pip install google-auth-httplib2")
    pytest.importorskip("googleapiclient", reason="needs Google's client: pip install google-api-python-client")
    import json

    from googleapiclient.discovery_cache import get_static_doc
    from ray.autoscaler._private.gcp.config import get_node_type
    from ray.autoscaler._private.gcp.node import GCPNodeType

    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    for kind in prepare_config(read(name))["available_node_types"].values():
        assert get_node_type(kind["node_config"]) is GCPNodeType.COMPUTE
        assert unknown_fields(kind["node_config"], schemas["Instance"], schemas) == []


def unknown_fields(
    value: Any, schema: dict[str, Any], schemas: dict[str, Any], *, at: str = "node_config"
) -> list[str]:
    """Where a value does not have the form that a discovery document says."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    expected = {"object": dict, "array": list, "boolean": bool, "string": (str, int), "integer": int}[schema["type"]]
    if not isinstance(value, expected):
        return [f"{at}: expected {schema['type']}, found {value!r}"]
    found: list[str] = []
    if isinstance(value, list):
        for position, item in enumerate(value):
            found += unknown_fields(item, schema["items"], schemas, at=f"{at}[{position}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in schema["properties"]:
                found.append(f"{at}.{key}: unknown")
            else:
                found += unknown_fields(item, schema["properties"][key], schemas, at=f"{at}.{key}")
    return found


# --- KubeRay ---


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_manifests_are_of_the_kinds_that_kuberay_and_kubernetes_know(name: str) -> None:
    versions = {kind: document["apiVersion"] for kind, document in manifests(name).items()}
    ray_kind = "RayCluster" if name == "raycluster.yaml" else "RayService"
    assert versions == {
        "ConfigMap": "v1", ray_kind: "ray.io/v1", "Service": "v1", "NetworkPolicy": "networking.k8s.io/v1"
    }  # fmt: skip
    assert all(document["metadata"]["name"] for document in manifests(name).values())


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_pods_are_limited_unprivileged_and_alike(name: str) -> None:
    for group in groups(name):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == ("ray-worker" if "groupName" in group else "ray-head")
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["image"] == groups(name)[0]["template"]["spec"]["containers"][0]["image"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_pods_have_every_setting_and_the_token(name: str) -> None:
    spec = ray_cluster(name)
    # The operator sets the mode and the token, which no manifest holds.
    assert spec["authOptions"] == {"mode": "token"}
    for group in groups(name):
        environment = {item["name"]: item["value"] for item in group["template"]["spec"]["containers"][0]["env"]}
        assert {key: environment.get(key) for key in SETTINGS} == SETTINGS
        assert all(isinstance(value, str) for value in environment.values())


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_worker_groups_have_their_accelerators_label_and_scale(name: str) -> None:
    workers = ray_cluster(name)["workerGroupSpecs"]
    assert {group["labels"]["ray.io/accelerator-type"] for group in workers} == {"A10G", "L4"}
    assert all(group["minReplicas"] <= group["replicas"] < group["maxReplicas"] for group in workers)
    assert ray_cluster(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_only_the_routers_port_is_open_to_others(name: str, tmp_path: Path) -> None:
    found = manifests(name)
    config = tmp_path / "config.yaml"
    config.write_text(found["ConfigMap"]["data"]["config.yaml"])
    port = int(load_config(config).config.router.address.rpartition(":")[2])
    assert [entry["port"] for entry in found["Service"]["spec"]["ports"]] == [port]
    open_to_all = [rule for rule in found["NetworkPolicy"]["spec"]["ingress"] if "from" not in rule]
    assert [[entry["port"] for entry in rule["ports"]] for rule in open_to_all] == [[port]]
    labels = groups(name)[0]["template"]["metadata"]["labels"]
    own = {key: value for key, value in found["Service"]["spec"]["selector"].items() if not key.startswith("ray.io/")}
    assert own.items() <= labels.items()
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels


def test_the_serve_application_is_in_its_config_map_and_uses_what_the_package_has() -> None:
    found = manifests("rayservice.yaml")
    (application,) = yaml.safe_load(found["RayService"]["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    tree = ast.parse(found["ConfigMap"]["data"][f"{module}.py"])
    assert name in {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {deployment["name"] for deployment in application["deployments"]} == classes
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moe_runtime"):
            imported = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(imported, alias.name)] == []


# --- The image ---


def test_the_image_copies_what_exists_and_runs_as_nobody_special() -> None:
    text = re.sub(r"\\\n\s*", "", (CLUSTER / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    instructions = [step[0] for step in steps]
    assert instructions[0] == "FROM"
    sources = [source for step in steps if step[0] == "COPY" for source in step[1].split()[:-1]]
    assert sources
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert [step[1] for step in steps if step[0] == "USER"] == ["1000"]
    assert instructions.index("USER") > max(i for i, name in enumerate(instructions) if name in {"RUN", "COPY"})
    assert not re.search(r"(?i)token|password|secret", " ".join(step[1] for step in steps))


def test_every_pin_of_ray_is_the_projects() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert "--constraint constraints.txt '.[runtime]' 'ray[default,serve]'" in dockerfile
    assert {ray_cluster(name)["rayVersion"] for name in KUBERAY_FILES} == {pinned_ray()}
