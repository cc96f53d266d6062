"""What experts need, what a machine and its control groups leave, and what is said where it is too little."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.config.experts import ResourcesConfig
from moe_runtime.errors import PlugInError, StartError
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.launch.host_memory import (
    available_bytes,
    check_memory,
    is_out_of_memory,
    needed_bytes,
    resident_bytes,
)
from moe_runtime.launch.recipes import HostedExpert, HostSpec

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    """Lays out ``/proc`` and ``/sys`` as a machine has them."""

    def write(files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def spec_of(**fields):
    defaults = {"layer": "l", "expert_id": 0, "name": "e", "kind": "feed_forward", "item_shape": (1024,)}
    return ExpertSpec(**defaults | fields)


def host_of(*specs):
    experts = tuple(HostedExpert(f"l/e/{i}", spec) for i, spec in enumerate(specs))
    return HostSpec("l/e/0", experts, "cpu", ResourcesConfig())


MEMINFO = "MemTotal: 2048 kB\nMemFree: 100 kB\nMemAvailable:    1024 kB\n"


def test_without_control_groups_the_machine_s_memory_counts(machine):
    assert available_bytes(machine({"proc/meminfo": MEMINFO})) == MIB


def test_nothing_is_said_where_nothing_tells(tmp_path):
    assert available_bytes(tmp_path) is None


def test_the_tightest_of_a_group_and_those_that_it_lies_in_counts(machine):
    root = machine({
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/pods/mine\n",
        "sys/fs/cgroup/pods/mine/memory.max": "max\n",
        "sys/fs/cgroup/pods/mine/memory.current": "4096\n",
        "sys/fs/cgroup/pods/memory.max": "800000\n",
        "sys/fs/cgroup/pods/memory.current": "500000\n",
        "sys/fs/cgroup/pods/memory.stat": "anon 1\ninactive_file 100000\n",
    })  # fmt: skip
    # What the kernel keeps of files, it can drop.
    assert available_bytes(root) == 800_000 - 500_000 + 100_000


def test_a_group_of_the_first_version_counts_too(machine):
    root = machine({
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "123\n",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "600000\n",
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "200000\n",
        "sys/fs/cgroup/memory/x/memory.stat": "total_inactive_file 7\n",
    })  # fmt: skip
    assert available_bytes(root) == 400_007


def test_a_group_that_is_over_its_limit_leaves_nothing(machine):
    root = machine({
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "100\n",
        "sys/fs/cgroup/memory.current": "200\n",
    })  # fmt: skip
    assert available_bytes(root) == 0


def test_this_machine_has_some_memory_and_this_process_takes_some():
    found = available_bytes()
    assert found is not None
    assert found > MIB
    assert 10 * MIB < resident_bytes() < 64 << 30


def test_need_is_the_parameters_of_all_and_what_the_largest_takes_while_it_is_loaded():
    seeded = spec_of(options={"hidden_features": 2048})
    resident = 4 * (1024 * 2048 * 2 + 2048 + 1024)
    assert needed_bytes([seeded]) == (resident, 0)
    assert needed_bytes([seeded, spec_of(options={"hidden_features": 2048}, weights="/w.safetensors")]) == (
        2 * resident, resident
    )  # fmt: skip
    # Drawn in float32, kept in half of that.
    assert needed_bytes([spec_of(options={"hidden_features": 2048}, dtype="bfloat16")]) == (resident // 2, resident)


def test_experts_that_do_not_fit_are_refused_before_they_are_built(machine):
    root = machine({"proc/meminfo": MEMINFO})
    spec = host_of(*[spec_of(options={"hidden_features": 2048})] * 3)
    with pytest.raises(StartError) as caught:
        check_memory(spec, node="node-7", root=root)
    assert str(caught.value) == ("expert host l/e/0: its experts need 48.0 MiB, 1.0 MiB are available on node node-7")


def test_experts_that_fit_are_let_through(machine):
    check_memory(host_of(spec_of(item_shape=(4,))), node="node-7", root=machine({"proc/meminfo": MEMINFO}))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_an_error_that_was_caused_by_a_lack_of_memory_is_known_as_one(error):
    outer = PlugInError("building it raised something")
    outer.__cause__ = error
    assert is_out_of_memory(error)
    assert is_out_of_memory(outer)
    assert not is_out_of_memory(PlugInError("something else"))


def test_what_torch_says_when_no_memory_is_left_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)
