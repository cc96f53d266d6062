from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.launch.cluster_file import read_nodes

GIB = 1 << 30


def nodes(tmp_path, text):
    path = tmp_path / "nodes.yaml"
    path.write_text(text, encoding="utf-8")
    return read_nodes(path)


def mistake(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        nodes(tmp_path, text)
    return str(caught.value)


def test_a_list_of_nodes_counts_alike_ones(tmp_path):
    found = nodes(
        tmp_path,
        """
nodes:
  - {name: head, resources: {CPU: 4}}
  - {name: gpu, count: 2, resources: {CPU: 8, GPU: 2, memory: 64GiB, fast: 1}, labels: {zone: a}, gpu_memory: 80GB}
""",
    )
    assert [node.shape.name for node in found] == ["head", "gpu-0", "gpu-1"]
    assert found[0].shape.total == {"CPU": 4.0, "memory": math.inf}
    assert found[0].gpu_memory_bytes is None
    assert found[1].shape.total == {"CPU": 8.0, "GPU": 2.0, "memory": 64.0 * GIB, "fast": 1.0}
    assert found[1].shape.labels == {"zone": "a", "ray.io/node-id": "gpu-0"}
    assert found[1].gpu_memory_bytes == 80 * 10**9


def test_a_file_for_ray_up_counts_every_type_with_its_max_workers_and_the_head_once(tmp_path):
    found = nodes(
        tmp_path,
        """
provider: {type: aws, region: eu-central-1}
max_workers: 5
head_node_type: head
available_node_types:
  gpu: {max_workers: 2, resources: {CPU: 8, GPU: 1, memory: 68719476736}, labels: {kind: gpu}}
  none: {max_workers: 0, resources: {CPU: 1}}
  head: {resources: {CPU: 2}}
""",
    )
    assert [node.shape.name for node in found] == ["head", "gpu-0", "gpu-1"]
    assert found[1].shape.total == {"CPU": 8.0, "GPU": 1.0, "memory": 64.0 * GIB}
    assert found[1].shape.labels["kind"] == "gpu"


def test_a_file_for_ray_up_on_machines_of_ones_own_is_read_with_the_flags_of_ray_start(tmp_path):
    found = nodes(
        tmp_path,
        """
provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}
head_start_ray_commands: [ray stop, "ulimit -n 20000; ray start --head --port=6379 --num-cpus=1 --labels=role=router"]
worker_start_ray_commands:
  - ray stop
  - >-
    ray start --address=$RAY_HEAD_IP:6379 --num-cpus 16 --num-gpus=2 --resources='{"slot": 2}'
    --labels=role=expert,zone=a
""",
    )
    assert [node.shape.name for node in found] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert found[0].shape.total == {"CPU": 1.0, "GPU": 0.0, "memory": math.inf}
    assert found[0].shape.ip == "10.0.0.1"
    assert found[2].shape.total == {"CPU": 16.0, "GPU": 2.0, "memory": math.inf, "slot": 2.0}
    assert found[2].shape.labels == {"role": "expert", "zone": "a", "ray.io/node-id": "10.0.0.3"}


def test_the_example_in_the_documentation_is_such_a_list(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "clusters.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL) if "gpu_memory" in block]
    assert [node.shape.name for node in nodes(tmp_path, example)] == ["head", *(f"gpu-{i}" for i in range(4))]


def test_what_ray_start_is_not_told_of_cpus_is_not_limited(tmp_path):
    (node,) = nodes(tmp_path, "provider: {type: local, head_ip: h}\nhead_start_ray_commands: [ray start --head]\n")
    assert node.shape.total["CPU"] == math.inf


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", "nodes.yaml: expected a mapping with the key nodes, or a file for ray up with provider"),
        ("nodes: []", "nodes.yaml: nodes: "),
        ("nodes: [{name: a, resources: {CPU: many}}]", "CPU: expected a number, found 'many'"),
        ("nodes: [{name: a, resources: {memory: 3 apples}}]", "memory: expected a number of bytes, or 64GiB"),
        ("nodes: [{name: a, resources: {CPU: -1}}]", "CPU: expected a number of at least 0, found -1"),
        ("nodes: [{name: a, resorces: {CPU: 1}}]", "did you mean resources?"),
        ("nodes: [{name: a, resources: {}}, {name: a, resources: {}}]", "found a more than once"),
        ("provider: {type: local}", "nodes.yaml: provider: expected head_ip and worker_ips"),
        ("provider: {type: gcp}", "expected available_node_types with the head_node_type, found None"),
        (
            "{provider: {type: gcp}, head_node_type: h, available_node_types: {h: {node_config: {}}}}",
            "available_node_types.h.resources: expected CPU",
        ),
    ],
)
def test_a_file_that_says_too_little_is_told_which_key_it_is(tmp_path, text, expected):
    assert expected in mistake(tmp_path, text)
