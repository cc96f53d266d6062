"""A kind of expert that misbehaves when a row asks for it, as a plug-in that tests install."""

from __future__ import annotations

import builtins
import os
import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts import ExpertContract, ExpertKind

#: First column of a row that asks for each: whole numbers far from what tests send otherwise.
FAULTS = {
    name: 1000.0 + number
    for number, name in enumerate(
        ["raise", "system_exit", "interrupt", "none", "shape", "dtype", "rows", "nan", "sleep", "spin", "exit", "break"]
    )
}
SLEEP_S = 0.2


class FaultyOptions(StrictModel):
    """What is wrong from the start."""

    raises_when_built: Literal["RuntimeError", "KeyboardInterrupt", "MemoryError"] | None = None


class Faulty(nn.Module):
    """Ten times the rows, unless the first column of one holds a value of ``FAULTS``."""

    def __init__(self, in_shape: tuple[int, ...], options: FaultyOptions) -> None:
        super().__init__()
        if options.raises_when_built is not None:
            raise getattr(builtins, options.raises_when_built)("it cannot be built")
        self.contract = ExpertContract(in_shape, in_shape)
        self.factor = nn.Parameter(torch.full((1,), 10.0))

    def forward(self, rows: torch.Tensor) -> object:
        outputs = rows * self.factor
        for name, value in FAULTS.items():
            asking = rows[:, 0] == value
            if bool(asking.any()):
                return getattr(self, f"_{name}")(outputs, asking)
        return outputs

    def _raise(self, outputs, asking):
        raise ValueError("a row asked for it")

    def _system_exit(self, outputs, asking):
        raise SystemExit(3)

    def _interrupt(self, outputs, asking):
        raise KeyboardInterrupt

    def _none(self, outputs, asking):
        return None

    def _shape(self, outputs, asking):
        return outputs[:, :1]

    def _dtype(self, outputs, asking):
        return outputs.double()

    def _rows(self, outputs, asking):
        return outputs[~asking]

    def _nan(self, outputs, asking):
        return outputs.masked_fill(asking.unsqueeze(1), float("nan"))

    def _sleep(self, outputs, asking):
        time.sleep(SLEEP_S)
        return outputs

    def _spin(self, outputs, asking):
        # What holds the interpreter: no other thread of this process runs Python meanwhile.
        until = time.monotonic() + SLEEP_S
        while time.monotonic() < until:
            sum(range(1_000_000))
        return outputs

    def _exit(self, outputs, asking):
        os._exit(7)

    def _break(self, outputs, asking):
        # From now on, every answer is wrong.
        self.factor.data.fill_(float("nan"))
        return outputs * self.factor


FAULTY = ExpertKind("faulty", FaultyOptions, Faulty)


def install(site: Path) -> str:
    """Leave in a folder what pip would leave of this plug-in; the folder, for ``sys.path``."""
    info = site / "faulty_experts-1.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-experts\nVersion: 1.0.0\n")
    (info / "entry_points.txt").write_text("[moe_runtime.experts]\nfaulty = fakes.faulty_experts:FAULTY\n")
    return str(site)
