"""What importing the package does, and what it does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import moe_runtime


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_and_clients_load_neither_ray_nor_torch_nor_zmq() -> None:
    loaded = run_python(
        """
        import sys
        import numpy
        import moe_runtime as moe
        from moe_runtime.rpc.arrays import to_wire

        assert "grpc" not in sys.modules
        client = moe.MoEClient("127.0.0.1:50051")
        moe.AsyncMoEClient("127.0.0.1:50051")
        moe.RequestOptions(seed=1)
        to_wire(numpy.zeros(2, numpy.float32))
        client.close()
        print(sorted({"ray", "torch", "zmq", "yaml", "typer", "rich", "safetensors"} & set(sys.modules)))
        """
    )
    assert loaded == "[]"


@pytest.mark.parametrize("missing", ["torch"])
def test_serving_without_the_runtime_extra_says_what_to_install(missing: str) -> None:
    message = run_python(
        f"""
        import importlib.abc
        import sys

        class Missing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == {missing!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
                return None

        sys.meta_path.insert(0, Missing())
        import moe_runtime
        try:
            moe_runtime.serve
        except ImportError as exc:
            print(exc)
        """
    )
    assert message == (
        f"moe_runtime.serve needs the package {missing}, which the client alone does not: "
        "pip install 'moe-runtime[runtime]'"
    )


def test_every_public_name_is_there() -> None:
    for name in set(moe_runtime.__all__):
        assert getattr(moe_runtime, name).__name__ == name
    assert set(moe_runtime.__all__) <= set(dir(moe_runtime))


def test_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = moe_runtime.train
