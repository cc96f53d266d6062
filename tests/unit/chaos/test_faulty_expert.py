"""The faulty expert computes what it should, misbehaves where it is asked to, and is nowhere but in a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_runtime.chaos.arming import PLUG_IN, armed
from moe_runtime.chaos.faulty_expert import KIND, KIND_NAME, MAGIC, FaultyExpert, FaultyOptions, Poison
from moe_runtime.chaos.layer import LAYER, chaos_config, draw_weights, write_weights
from moe_runtime.chaos.reference import Reference, Routing
from moe_runtime.errors import ConfigError
from moe_runtime.experts.registry import ENTRY_POINT_GROUP, check_plug_ins, known_kinds, resolve_kind
from moe_runtime.launch.build import validate
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient


def make(**options: float) -> FaultyExpert:
    return FaultyExpert((32,), FaultyOptions(**options)).eval()


def poisoned(poison: Poison) -> torch.Tensor:
    rows = torch.randn(4, 32)
    rows[2, 0] = MAGIC[poison]
    return rows


def test_ordinary_rows_are_fed_forward():
    expert, rows = make(), torch.randn(4, 32)
    torch.testing.assert_close(expert(rows), expert.feed_forward(rows))


def test_a_row_can_make_it_raise():
    with pytest.raises(RuntimeError, match="asked this expert to raise"):
        make()(poisoned(Poison.RAISE))


def test_a_row_can_make_its_own_output_nan():
    outputs = make()(poisoned(Poison.NAN))
    assert outputs.isnan().all(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("poison", "option"), [(Poison.SLOW, "slow_s"), (Poison.HANG, "hang_s")])
def test_a_row_can_make_it_sleep(poison: Poison, option: str):
    expert, rows = make(**{option: 0.05}), poisoned(poison)
    started = time.monotonic()
    outputs = expert(rows)
    assert time.monotonic() - started >= 0.05
    torch.testing.assert_close(outputs, expert.feed_forward(rows))


def test_a_row_can_make_it_exit():
    code = (
        "import torch; from moe_runtime.chaos.faulty_expert import *;"
        "FaultyExpert((32,), FaultyOptions())(torch.full((1, 32), MAGIC[Poison.EXIT]))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 66


def test_magic_values_are_exact_in_float32():
    assert all(np.float32(value) == value for value in MAGIC.values())
    assert len(set(MAGIC.values())) == len(Poison)


def test_the_kind_is_known_while_it_is_armed_and_to_children_too(tmp_path: Path):
    code = f"import importlib.metadata as m; print([each.name for each in m.entry_points(group={ENTRY_POINT_GROUP!r})])"
    child = [sys.executable, "-c", code]
    assert KIND_NAME not in known_kinds()
    before = dict(os.environ), list(sys.path)
    with armed(tmp_path):
        assert resolve_kind(KIND_NAME) is KIND
        check_plug_ins([PLUG_IN])
        assert KIND_NAME in subprocess.run(child, capture_output=True, text=True, check=True).stdout
    assert (dict(os.environ), list(sys.path)) == before
    assert KIND_NAME not in known_kinds()
    assert KIND_NAME not in subprocess.run(child, capture_output=True, text=True, check=True).stdout


def test_a_configuration_with_the_kind_is_refused_without_a_run(tmp_path: Path):
    write_weights(tmp_path, draw_weights(0))
    with pytest.raises(ConfigError, match=PLUG_IN):
        validate(chaos_config("c", tmp_path))


def test_the_served_layer_is_the_references(tmp_path: Path):
    weights = draw_weights(0)
    write_weights(tmp_path, weights)
    rows = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    with (
        armed(tmp_path),
        serve(chaos_config("c", tmp_path), ray=False) as runtime,
        MoEClient(runtime.address) as client,
    ):
        result = client.forward(rows, layer=LAYER, return_routing=True)
    report = result.report
    assert report.num_served == 128
    reference = Reference(weights)
    served = Routing(report.token_ids, report.expert_ids, report.expert_weights)
    np.testing.assert_allclose(result.outputs, reference.outputs(rows, served), rtol=1e-5, atol=1e-5)
    routing, is_clear = reference.routing(rows, np.full(64, 2))
    assert is_clear.all()
    assert np.array_equal(routing.expert_ids, report.expert_ids)
    np.testing.assert_allclose(routing.weights, report.expert_weights, atol=1e-6)
