"""Deploying onto a cluster, again, otherwise, and away again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import ray
import torch

from moe_runtime.config.state_folder import STATE_FOLDER_VARIABLE
from moe_runtime.errors import AlreadyRunningError, ConfigError, PlugInError
from moe_runtime.experts.weights import save_weights, sha256_of, write_manifest
from moe_runtime.launch.deploy import deploy
from moe_runtime.launch.teardown import teardown
from moe_runtime.rpc.client import MoEClient

NUM_EXPERTS = 2


@pytest.fixture
def write_config(tmp_path, make_config):
    """Writes a configuration with weight files beside it; gives its path."""

    def write(name, **layer):
        folder = tmp_path / name
        (folder / "w").mkdir(parents=True)
        for i in range(NUM_EXPERTS):
            tensors = {"up.weight": torch.full((4, 8), float(i + 1)), "up.bias": torch.zeros(4)}
            save_weights(folder / "w" / f"e{i}.safetensors", tensors)
        path = folder / "config.yaml"
        path.write_text(json.dumps(make_config(name, **layer)))
        return path

    return write


@pytest.mark.timeout(180)
def test_a_deployment_serves_is_left_alone_when_repeated_and_leaves_nothing_behind(write_config, actor_names):
    config = write_config("shipped")
    first = deploy(config)
    print(first)
    second = deploy(config)
    print(second, actor_names("shipped"))
    print(teardown("shipped"), actor_names("shipped"))
    print(teardown("shipped"))
