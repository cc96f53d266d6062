"""The ``ray up`` files: what Ray and the clouds accept, and what every cluster has to have set."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.settings import NODE_ENV

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
RAY_UP_FILES = ["local.yaml", "aws-gpu.yaml", "gcp-gpu.yaml", "cpu.yaml"]
CLOUD_FILES = RAY_UP_FILES[1:]
ENVIRONMENT_FILE = ". ~/moe_runtime/env.sh;"
OF_EVERY_NODE = ["--disable-usage-stats", "--node-ip-address=", "--labels=", "--labels-file=", "--object-store-memory="]
OF_THE_HEAD = ["--dashboard-host=127.0.0.1", "--port=6379", "--autoscaling-config=~/ray_bootstrap_config.yaml"]
GPU_TYPES = {"aws-gpu.yaml": {"A10G", "L4"}, "gcp-gpu.yaml": {"L4", "A100"}}


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return loaded


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
