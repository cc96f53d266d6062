"""docs/plug-ins.md: its package works when it is installed as written, and its steps run in order."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml

from moe_runtime.config.runtime import RuntimeConfig
from moe_runtime.experts.build import build_expert
from moe_runtime.experts.spec import ExpertSpec

if TYPE_CHECKING:
    from conftest import InstallPlugIn

PAGE = (Path(__file__).parents[3] / "docs" / "plug-ins.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_page_leads_from_its_package_to_saved_weights(
    install_plug_in: InstallPlugIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tomllib.loads(blocks("toml")[0])["project"]
    ((kind, target),) = project["entry-points"]["moe_runtime.experts"].items()
    module, checks, saving = blocks("python")
    name, _, attribute = target.partition(":")
    install_plug_in(name, {kind: attribute}, source=module, version=project["version"])
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(checks + saving, namespace)
    assert "out_shape=(10,)" in capsys.readouterr().out
    experts = RuntimeConfig.model_validate(yaml.safe_load(blocks("yaml")[0])).layers["digits"].experts
    for index, expert in enumerate(experts):
        spec = ExpertSpec("digits", index, f"e-{index}", expert.kind, (64,), expert.view, expert.options)
        assert build_expert(spec).contract.out_shape == (10,)
    path = tmp_path / "weights" / "maxout-0.safetensors"
    spec = ExpertSpec("digits", 0, "maxout-0", "maxout", (64,), options={"out_features": 10}, weights=str(path))
    trained = namespace["module"]
    assert isinstance(trained, torch.nn.Module)
    assert torch.equal(next(build_expert(spec).module.parameters()), next(trained.parameters()))
