import io
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray import cloudpickle

from moe_runtime.ray_backend import node_calls, node_probe


def wheel_of(name: str) -> bytes:
    info = f"{name}-1.0.dist-info"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return content.getvalue()


def test_the_versions_of_what_is_here_are_found_and_what_is_not_is_none() -> None:
    assert node_probe.installed(["ray", "no-such-thing"]) == {
        "python": platform.python_version(),
        "ray": __import__("ray").__version__,
        "no-such-thing": None,
    }


def test_the_probe_runs_where_this_package_is_missing(tmp_path: Path) -> None:
    assert node_calls.node_probe is node_probe
    pickled = tmp_path / "probe"
    pickled.write_bytes(cloudpickle.dumps(node_probe.installed))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))(['moe-runtime', 'ray'])['moe-runtime'])"
    block = "import sys; sys.modules['moe_runtime'] = None; "
    done = subprocess.run(
        [sys.executable, "-c", block + code, str(pickled)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout in ("None\n", "0.1.0\n"), done.stderr


@pytest.fixture
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.mark.usefixtures("_offline")
def test_a_wheel_that_is_sent_along_is_installed(tmp_path: Path) -> None:
    assert node_probe.install([], {"sent_along-1.0-py3-none-any.whl": wheel_of("sent_along")}, 50.0) is None
    assert (tmp_path / "site" / "sent_along.py").is_file()


@pytest.mark.usefixtures("_offline")
def test_what_pip_says_is_told() -> None:
    error = node_probe.install(["no-such-thing==9"], {}, 50.0)
    assert error is not None
    assert "No matching distribution found for no-such-thing==9" in error
