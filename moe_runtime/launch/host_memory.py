"""Whether a host's experts fit into memory: told before they are loaded, not by the kernel's out-of-memory killer."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_runtime.errors import StartError
from moe_runtime.experts.foreign import in_one_line
from moe_runtime.experts.spec import build_module

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from moe_runtime.experts.spec import ExpertSpec
    from moe_runtime.launch.recipes import HostSpec

_MIB = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
#: What torch says where it has no class of error for it: of the CPU's allocator.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


class Need(NamedTuple):
    """What experts take, in bytes.

    Attributes:
        resident: Their parameters and buffers, for as long as they live.
        loading: What the largest of them takes besides while it is built and its file is read.
    """

    resident: int
    loading: int


def check_memory(spec: HostSpec, *, node: str, root: Path = Path("/")) -> None:
    """Check that the experts of a host fit into what is free on its device, and in its node's memory.

    Args:
        spec: The host's.
        node: How the message names the node.
        root: Where ``/proc`` and ``/sys`` are.

    Raises:
        StartError: If they do not.
        ConfigError: If one of them cannot be built.
    """
    need = needed_bytes(hosted.spec for hosted in spec.experts)
    if spec.device == "cuda":
        free, _ = torch.cuda.mem_get_info(0)
        _compare(spec, need.resident, free, where=f"on the GPU of node {node}")
        # Each goes through the node's memory on its way.
        need = Need(0, need.resident if len(spec.experts) == 1 else need.loading)
    free_bytes = available_bytes(root)
    if free_bytes is not None:
        _compare(spec, need.resident + need.loading, free_bytes, where=f"on node {node}")


def out_of_memory(spec: HostSpec, *, node: str, error: Exception) -> StartError:
    """The error of a host whose experts turned out not to fit while they were loaded."""
    return StartError(
        f"expert host {spec.host_id}: no memory was left on node {node} while its experts were loaded; give it a "
        f"node, or a GPU, with more, or fewer experts: {in_one_line(error)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that there was no memory left."""
    return any(
        isinstance(cause, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(cause, RuntimeError) and any(words in str(cause).lower() for words in _OUT_OF_MEMORY))
        for cause in _causes(error)
    )


def needed_bytes(specs: Iterable[ExpertSpec]) -> Need:
    """What some experts take, found without allocating it.

    Raises:
        ConfigError: If one of them cannot be built.
    """
    resident = loading = 0
    for spec in specs:
        with torch.device("meta"):
            module = build_module(spec)
            drawn = _bytes_of(module)
            kept = _bytes_of(module.to(spec.torch_dtype))
        resident += kept
        # Parameters are drawn in torch's own dtype; a file is read beside the parameters that it replaces.
        loading = max(loading, kept if spec.weights is not None else 0, drawn if drawn != kept else 0)
    return Need(resident, loading)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process may still take: of the machine, and of every control group that it is in.

    What the kernel could drop from its file cache counts as free. None where nothing tells.

    Args:
        root: Where ``/proc`` and ``/sys`` are.
    """
    found = [*_machine_bytes(root), *_group_bytes(root)]
    return max(0, min(found)) if found else None


def resident_bytes() -> int:
    """Memory that this process has of the machine's."""
    _, resident = Path("/proc/self/statm").read_bytes().split(maxsplit=2)[:2]
    return int(resident) * _PAGE_BYTES


def _compare(spec: HostSpec, needed: int, free: int, *, where: str) -> None:
    if needed > free:
        raise StartError(
            f"expert host {spec.host_id}: its experts need {_mib(needed)}, {_mib(free)} are available {where}"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.1f} MiB"


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _machine_bytes(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _group_bytes(root: Path) -> Iterator[int]:
    """What each control group, and each that it lies in, leaves; version 2, and 1 where its memory is controlled."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            folder = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = folder / path.lstrip("/")
        for group in (own, *own.parents):
            yield from _room_in(group, names)
            if group == folder:
                break


def _room_in(group: Path, names: tuple[str, str, str]) -> Iterator[int]:
    limit_name, usage_name, cached_name = names
    limit, usage = _lines(group / limit_name), _lines(group / usage_name)
    if not limit or not usage or not limit[0].isdigit():
        return
    stat = dict(line.split(" ", 1) for line in _lines(group / "memory.stat"))
    yield int(limit[0]) - int(usage[0]) + int(stat.get(cached_name, 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
