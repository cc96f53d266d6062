"""Fixtures: real distributions on the path, as pip would leave them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Protocol

import pytest


class InstallPlugIn(Protocol):
    def __call__(self, name: str, kinds: dict[str, str], *, source: str = "", version: str = "1.0.0") -> None: ...


@pytest.fixture
def install_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallPlugIn:
    """Put a distribution with a module of the same name on the path; ``kinds`` maps kind to attribute."""

    def install(name: str, kinds: dict[str, str], *, source: str = "", version: str = "1.0.0") -> None:
        site = tmp_path / f"site-{name}"
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        points = "".join(f"{kind} = {name}:{attribute}\n" for kind, attribute in kinds.items())
        (info / "entry_points.txt").write_text(f"[moe_runtime.experts]\n{points}" if kinds else "")
        monkeypatch.syspath_prepend(str(site))

    return install
