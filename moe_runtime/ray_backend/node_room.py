"""What one node has left, as Ray counts it: amounts in ten-thousandths, GPUs device by device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_runtime.ray_backend.placement import demanded_resources, resource_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_runtime.ray_backend.plan import Demand

#: Ray's fixed point: sums of shares such as 0.1 are exact.
_UNIT = 10_000
#: Stands for what is not known, and so not limited.
_UNLIMITED = 1 << 100
_GPU = "GPU"


class NodeRoom:
    """The room of one node, from which demands are taken one after the other."""

    def __init__(self, total: Mapping[str, float], *, labels: Mapping[str, str]) -> None:
        """An empty node.

        Args:
            total: What it has, by Ray's names; infinite where that is not known.
            labels: Its labels.
        """
        self._labels = dict(labels)
        self._total = {name: _fixed(amount) for name, amount in total.items()}
        self._left = dict(self._total)
        self._gpus = [_UNIT] * (self._total.get(_GPU, 0) // _UNIT)

    def take_foreign(self, free: Mapping[str, float], *, known: Sequence[Demand]) -> None:
        """Take what is reserved on the node and is not of these known demands; of GPUs, whole ones first.

        Which devices others share is not known; that they share as few as can be is what Ray does.
        """
        for name, total in self._total.items():
            own = sum(_fixed(demanded_resources(demand).get(name, 0.0)) for demand in known)
            # Reports lag behind: what is ours may still be told as free, and then nothing is foreign.
            foreign = max(0, total - _fixed(free.get(name, 0.0)) - own)
            self._left[name] = max(0, self._left[name] - foreign)
            if name == _GPU:
                self._drain_devices(foreign)

    def fits(self, demand: Demand) -> bool:
        """Whether the node has the labels and the room."""
        return not self._lacks(demand)

    def take(self, demand: Demand, *, whatever_is_left: bool = False) -> tuple[int, ...]:
        """Reserve what a demand asks for; the numbers of the GPUs that it gets.

        Args:
            demand: One that fits.
            whatever_is_left: Take what there is of one that does not.
        """
        for name, amount in demanded_resources(demand).items():
            self._left[name] = max(0, self._left.get(name, 0) - _fixed(amount))
        return self._take_devices(_fixed(demand.num_gpus), whatever_is_left=whatever_is_left)

    def lack(self, demand: Demand) -> str:
        """What the node lacks for a demand, in words; empty where it fits."""
        return ", ".join(self._lacks(demand))

    def share_used(self) -> float:
        """The share that is reserved of the resource of which most is: 0 for an empty node, 1 for a full one."""
        shares = [1 - self._left[name] / total for name, total in self._total.items() if total > 0]
        return max(shares, default=0.0)

    def _lacks(self, demand: Demand) -> list[str]:
        lacks = [
            f"label {key}={value} (has {key}={self._labels[key]})"
            if key in self._labels
            else f"label {key}={value} (has none)"
            for key, value in demand.node_labels.items()
            if self._labels.get(key) != value
        ]
        for name, amount in demanded_resources(demand).items():
            left, total = self._left.get(name, 0), self._total.get(name, 0)
            if left < _fixed(amount):
                has = f"{resource_text(name, left / _UNIT)} free of {resource_text(name, total / _UNIT)}"
                lacks.append(f"{name} {resource_text(name, amount)} ({has})")
            elif name == _GPU and not self._devices_for(_fixed(amount)):
                best = max(self._gpus, default=0) / _UNIT
                lacks.append(f"GPU {amount:g} on whole devices" if amount >= 1 else f"GPU {amount:g} on one device")
                lacks[-1] += f" ({left / _UNIT:g} free in all, at most {best:g} on one)"
        return lacks

    def _devices_for(self, amount: int) -> tuple[int, ...]:
        """Numbers of the GPUs on which so much fits: the fullest that will do for a share, free ones else."""
        if amount < _UNIT:
            fitting = [i for i, left in enumerate(self._gpus) if left >= amount]
            return (min(fitting, key=lambda i: self._gpus[i]),) if fitting else ()
        free = [i for i, left in enumerate(self._gpus) if left == _UNIT]
        number = -(-amount // _UNIT)
        return tuple(free[:number]) if len(free) >= number else ()

    def _take_devices(self, amount: int, *, whatever_is_left: bool) -> tuple[int, ...]:
        if amount == 0 or not self._gpus:
            return ()
        devices = self._devices_for(amount)
        if not devices and whatever_is_left:
            return self._drain_devices(amount)
        for i in devices:
            self._gpus[i] -= min(amount, _UNIT)
        return devices

    def _drain_devices(self, amount: int) -> tuple[int, ...]:
        """Take so much wherever it is, from the freest device on."""
        taken = []
        for i in sorted(range(len(self._gpus)), key=lambda i: -self._gpus[i]):
            part = min(amount, self._gpus[i])
            if part:
                self._gpus[i] -= part
                amount -= part
                taken.append(i)
        return tuple(taken)


def _fixed(amount: float) -> int:
    return _UNLIMITED if math.isinf(amount) else round(amount * _UNIT)
