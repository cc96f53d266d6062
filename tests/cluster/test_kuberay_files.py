"""The manifests for KubeRay and the image that they use, as far as they can be checked without Kubernetes."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.settings import SETTINGS
from moe_runtime.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
KUBERAY_FILES = ["raycluster.yaml", "rayservice.yaml"]


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
