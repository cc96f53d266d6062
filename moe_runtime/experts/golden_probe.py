"""A few rows and what an expert made of them while it was known to be right: tells whether it still is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import ExpertError, WeightsError
from moe_runtime.experts.foreign import in_one_line
from moe_runtime.experts.outputs import output_mistake

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from moe_runtime.experts.protocol import ExpertContract

#: Names of a probe's tensors in a weight file; no tensor of a module may be called so.
PROBE_INPUT, PROBE_OUTPUT = "golden_probe.input", "golden_probe.output"
NUM_PROBE_ROWS = 4
#: Largest difference, as a share of the largest expected value: devices and libraries add in different orders.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_SMALLEST_SCALE = 1e-3


@dataclass(frozen=True, eq=False)
class GoldenProbe:
    """Rows, and the outputs that they must give.

    Attributes:
        rows: ``(num_rows, *in_shape)``, as the expert sees them, in the layer's dtype.
        outputs: ``(num_rows, *out_shape)``, in the same dtype and on the same device.
    """

    rows: Tensor
    outputs: Tensor

    def to(self, device: torch.device) -> GoldenProbe:
        """The same on a device."""
        return GoldenProbe(self.rows.to(device), self.outputs.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """What a weight file holds of it."""
        return {PROBE_INPUT: self.rows, PROBE_OUTPUT: self.outputs}

    def check_fit(self, contract: ExpertContract, dtype: torch.dtype) -> None:
        """Check that it is of an expert with this contract and dtype.

        Raises:
            WeightsError: If it is of another one.
        """
        num_rows = self.rows.shape[0] if self.rows.dim() else 0
        if not num_rows or self.rows.shape[1:] != contract.in_shape or self.rows.dtype != dtype:
            raise WeightsError(
                f"{PROBE_INPUT}: expected rows of shape {list(contract.in_shape)} and {dtype}, "
                f"found {list(self.rows.shape)} of {self.rows.dtype}"
            )
        mistake = output_mistake(self.outputs, num_rows=num_rows, contract=contract, dtype=dtype)
        if mistake is not None:
            raise WeightsError(f"{PROBE_OUTPUT}: {mistake}")

    def mistake(self, module: nn.Module) -> str | None:
        """What is wrong with an expert's answer to the probe; None if nothing is. Never raises for what it does."""
        try:
            with torch.inference_mode():
                outputs = module(self.rows.clone())
        except BaseException as exc:
            # Whatever a plug-in raises, SystemExit as well, is the answer that was asked for.
            return f"its golden probe raised {in_one_line(exc)}"
        expected = self.outputs
        if not isinstance(outputs, torch.Tensor) or (outputs.shape, outputs.dtype) != (expected.shape, expected.dtype):
            found = (
                f"{list(outputs.shape)} of {outputs.dtype}"
                if isinstance(outputs, torch.Tensor)
                else type(outputs).__name__
            )
            return f"its golden probe gave {found}, expected {list(expected.shape)} of {expected.dtype}"
        return self._difference(outputs)

    def _difference(self, outputs: Tensor) -> str | None:
        expected, found = self.outputs.double(), outputs.double()
        # An infinity that is expected differs from itself by NaN.
        differences = torch.where(expected == found, 0.0, (expected - found).abs())
        differences[expected.isnan() & found.isnan()] = 0.0
        largest = float(differences.max())
        scale = float(expected[expected.isfinite()].abs().max()) if bool(expected.isfinite().any()) else 0.0
        allowed = _TOLERANCES[self.outputs.dtype] * max(scale, _SMALLEST_SCALE)
        if largest <= allowed:
            return None
        return f"its golden probe differs by {largest:.3g}, expected at most {allowed:.3g}"


def golden_probe(
    module: nn.Module, contract: ExpertContract, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> GoldenProbe:
    """A probe of a trained module, to be stored with its weights by ``save_weights``.

    Args:
        module: The expert; it is run in eval mode, and left in the mode that it is in.
        contract: The shapes of its rows.
        dtype: In which it will be served.
        seed: Of the rows, which are drawn from a normal distribution.

    Returns:
        The probe, on the CPU.

    Raises:
        ExpertError: If the module does not keep its contract for these rows, or gives NaN or infinities.
    """
    drawn = torch.randn(NUM_PROBE_ROWS, *contract.in_shape, generator=torch.Generator().manual_seed(seed))
    rows = drawn.to(dtype)
    parameter = next(module.parameters(), rows)
    were_training = [part for part in module.modules() if part.training]
    try:
        with torch.inference_mode():
            outputs = module.eval()(rows.to(parameter.device, copy=True))
    finally:
        for part in were_training:
            part.training = True
    mistake = output_mistake(outputs, num_rows=NUM_PROBE_ROWS, contract=contract, dtype=dtype)
    if mistake is None and not bool(outputs.isfinite().all()):
        mistake = "expected finite outputs, found NaN or infinity"
    if mistake is not None:
        raise ExpertError(f"a golden probe of {type(module).__name__}: {mistake}")
    return GoldenProbe(rows, outputs.cpu().clone())


def probe_in(tensors: Mapping[str, Tensor]) -> GoldenProbe | None:
    """The probe among the tensors of a weight file; None if it holds none.

    Raises:
        WeightsError: If it holds half of one.
    """
    found = [name for name in (PROBE_INPUT, PROBE_OUTPUT) if name in tensors]
    if len(found) == 1:
        raise WeightsError(f"expected {PROBE_INPUT!r} and {PROBE_OUTPUT!r} or neither, found {found[0]!r} alone")
    return GoldenProbe(tensors[PROBE_INPUT], tensors[PROBE_OUTPUT]) if found else None
