"""Where the package could make objects, or run code, of bytes: few places, and none that the network reaches."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_runtime

PACKAGE = Path(moe_runtime.__file__).parent
#: Factories are pickled in the operator's process, and unpickled in the actors that the controller gives them to, and
#: in programs on the cluster that route for the runtime themselves or add layers to it.
MAY_PICKLE = {
    "bench/bare/victims.py",
    "launch/adding.py",
    "launch/plans.py",
    "ray_backend/expert_actor.py",
    "ray_backend/member.py",
    "ray_backend/router_actor.py",
    "ray_backend/session.py",
}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {"torch.load", "torch.jit.load", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    parents = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names | parents}


def test_only_what_ray_carries_is_pickled() -> None:
    assert {name for name, tree in sources() if imported(tree) & UNSAFE_MODULES} == MAY_PICKLE


@pytest.mark.parametrize("layer", ["rpc", "wire", "transport", "service", "experts", "routing", "config"])
def test_no_layer_that_the_network_reaches_makes_code_of_text_or_objects_of_bytes(layer: str) -> None:
    calls = {
        (name, ast.unparse(node.func))
        for name, tree in sources()
        if name.startswith(f"{layer}/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert {call for call in calls if call[1] in UNSAFE_CALLS | UNSAFE_METHODS} == set()
    # zmq's and Ray's own ways to send objects.
    assert {call for call in calls if call[1].endswith((".recv_pyobj", ".send_pyobj", "allow_pickle"))} == set()


def test_weights_in_any_other_form_than_safetensors_are_refused(tmp_path: Path) -> None:
    import torch

    from moe_runtime.errors import WeightsError
    from moe_runtime.experts.weights import load_weights

    pickled = tmp_path / "weights.safetensors"
    torch.save({"weight": torch.zeros(2)}, pickled)
    with pytest.raises(WeightsError):
        load_weights(pickled)
