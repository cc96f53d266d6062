"""One Ray cluster per test session, and one runtime on it that most tests share."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before ray is imported, which reads it once.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import ray

from moe_runtime.config.state_folder import STATE_FOLDER_VARIABLE
from moe_runtime.launch.runtime import serve
from moe_runtime.launch.served import Runtime
from moe_runtime.ray_backend.names import NAMESPACE, belongs_to

DEADLINE_S = 45.0
#: A plug-in with an expert that builds in one process only: the configuration is fine, the actor fails; and with one
#: that takes its time: to be built until a file is there, and to compute while another one is.
PLUG_IN = """
import os
import time
from pathlib import Path

import torch
from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts import ExpertContract, ExpertKind


class Options(StrictModel):
    allowed_pid: int


class Picky(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.contract = ExpertContract(shape, shape)

    def forward(self, rows):
        return rows


def build(in_shape, options):
    if os.getpid() != options.allowed_pid:
        raise RuntimeError("the licence server is gone")
    return Picky(in_shape)


KIND = ExpertKind("picky", Options, build)


class PatientOptions(StrictModel):
    quick_pid: int
    built_when: str | None = None
    busy_while: str | None = None


class Patient(nn.Module):
    def __init__(self, shape, options):
        super().__init__()
        self.contract = ExpertContract(shape, shape)
        self.options = options

    def forward(self, rows):
        while self.options.busy_while is not None and Path(self.options.busy_while).exists():
            time.sleep(0.01)
        return rows


def build_patiently(in_shape, options):
    is_quick = os.getpid() == options.quick_pid or options.built_when is None
    while not is_quick and not Path(options.built_when).exists():
        time.sleep(0.01)
    return Patient(in_shape, options)


PATIENT = ExpertKind("patient", PatientOptions, build_patiently)


class LicensedOptions(StrictModel):
    licence: str


def build_licensed(in_shape, options):
    if not Path(options.licence).exists():
        raise RuntimeError("the licence server is gone")
    return Picky(in_shape)


LICENSED = ExpertKind("licensed", LicensedOptions, build_licensed)


class SickOptions(StrictModel):
    hoards_when: str | None = None
    num_hoarded_mib: int = 0
    wrong_while: str | None = None


class Sick(nn.Module):
    def __init__(self, shape, options):
        super().__init__()
        self.contract = ExpertContract(shape, shape)
        self.options = options
        self.hoard = None

    def forward(self, rows):
        if self.options.hoards_when is not None and self.hoard is None and Path(self.options.hoards_when).exists():
            # By torch, which lets other threads run meanwhile.
            self.hoard = torch.ones(self.options.num_hoarded_mib << 18)
        # More rows than the golden probe has: that does not see what is wrong.
        if self.options.wrong_while is not None and len(rows) > 2 and Path(self.options.wrong_while).exists():
            return rows[:, :1]
        return rows


SICK = ExpertKind("sick", SickOptions, Sick)
"""


@pytest.fixture(scope="session")
def plug_in_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the workers' path with an installed plug-in."""
    folder = tmp_path_factory.mktemp("plug-in")
    (folder / "picky_expert.py").write_text(PLUG_IN)
    info = folder / "picky_expert-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: picky-expert\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[moe_runtime.experts]\npicky = picky_expert:KIND\npatient = picky_expert:PATIENT\n"
        "licensed = picky_expert:LICENSED\nsick = picky_expert:SICK\n"
    )
    return folder


@pytest.fixture(scope="session")
def wheel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip, run on the nodes, finds what it is to install."""
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="session")
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bundles and fetched weights are kept, instead of the home of whoever runs the tests."""
    return tmp_path_factory.mktemp("state") / "moe"


@pytest.fixture(scope="session")
def cluster(plug_in_folder: Path, state_folder: Path, wheel_folder: Path) -> Iterator[str]:
    """The address of the session's cluster: 4 CPUs, no GPU, 2 of the custom resource ``fast``."""
    sys.path.insert(0, str(plug_in_folder))
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(plug_in_folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        patch.setenv(STATE_FOLDER_VARIABLE, str(state_folder))
        # What pip installs on the nodes comes from the tests, and goes where the nodes look for plug-ins.
        for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(wheel_folder)), ("TARGET", str(plug_in_folder))):
            patch.setenv(f"PIP_{name}", value)
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
        context = ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            resources={"fast": 2},
            include_dashboard=False,
            object_store_memory=128 << 20,
            log_to_driver=False,
        )
        yield context.address_info["address"]
        ray.shutdown()
    sys.path.remove(str(plug_in_folder))


def layer_config(**changes: Any) -> dict[str, Any]:
    experts = [{"kind": "feed_forward", "count": 2, "options": {"hidden_features": 16, "out_features": 4}}]
    return {"item_shape": [8], "experts": experts, **changes}


def runtime_config(name: str, *, router: dict[str, Any] | None = None, **layer: Any) -> dict[str, Any]:
    return {
        "name": name,
        "device": "cpu",
        "layers": {"l": layer_config(**layer)},
        "router": {"address": "127.0.0.1:0", **(router or {})},
    }


@pytest.fixture(scope="session")
def make_config(cluster: str) -> Callable[..., dict[str, Any]]:
    """Makes a runtime's configuration: a name, ``router=``, and what is different in its one layer, ``l``."""
    return runtime_config


@pytest.fixture(scope="session")
def runtime(cluster: str) -> Iterator[Runtime]:
    """A runtime of two feed-forward experts that tests share; they leave it healthy."""
    with serve(runtime_config("shared")) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def actor_names(cluster: str) -> Callable[[str], list[str]]:
    """The names of a runtime's living actors."""

    def names(runtime: str) -> list[str]:
        actors = ray.util.list_named_actors(all_namespaces=True)
        return sorted(a["name"] for a in actors if a["namespace"] == NAMESPACE and belongs_to(a["name"], runtime))

    return names


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """Asks until the answer is truthy, and gives it; fails after a deadline."""

    def ask(question: Callable[[], Any], *, deadline_s: float = DEADLINE_S) -> Any:
        give_up_at = time.monotonic() + deadline_s
        while not (answer := question()):
            assert time.monotonic() < give_up_at, f"still {answer!r} after {deadline_s} s"
            time.sleep(0.05)
        return answer

    return ask
