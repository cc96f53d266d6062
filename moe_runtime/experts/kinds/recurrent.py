"""A recurrent expert over sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts.kinds.shapes import require_dims
from moe_runtime.experts.protocol import ExpertContract, ExpertKind

if TYPE_CHECKING:
    from torch import Tensor


class RecurrentOptions(StrictModel):
    """A GRU or LSTM over a sequence of shape (steps, features), then a linear head."""

    cell: Literal["gru", "lstm"] = Field("gru", description="The recurrent cell.")
    hidden_features: int = Field(64, ge=1, description="Width of the hidden state.")
    num_layers: int = Field(1, ge=1, le=1024, description="Recurrent layers on top of each other.")
    out_features: int | None = Field(
        None,
        ge=1,
        description="Width of the output vector, read from the last step; a sequence of the input's shape, read "
        "from every step, when not given.",
    )


class Recurrent(nn.Module):
    """A linear head over the last hidden state, or over every step's.

    GRU: https://arxiv.org/abs/1406.1078. LSTM: https://doi.org/10.1162/neco.1997.9.8.1735.
    """

    def __init__(self, in_shape: tuple[int, ...], options: RecurrentOptions) -> None:
        super().__init__()
        require_dims("recurrent", in_shape, ("steps", "features"))
        num_steps, in_features = in_shape
        hidden = options.hidden_features
        cell, num_gates = (nn.GRU, 3) if options.cell == "gru" else (nn.LSTM, 4)
        self.recurrence = cell(in_features, hidden, num_layers=options.num_layers, batch_first=True)
        self.head = nn.Linear(hidden, options.out_features or in_features)
        self.reads_last_step = options.out_features is not None
        num_weights = num_gates * hidden * (in_features + hidden + (options.num_layers - 1) * 2 * hidden)
        self.contract = ExpertContract(
            in_shape=in_shape,
            out_shape=in_shape if options.out_features is None else (options.out_features,),
            cost_per_row=num_steps * num_weights + hidden * (options.out_features or num_steps * in_features),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """``(num_rows, steps, features)`` to ``(num_rows, out_features)``, or to sequences again."""
        states, _ = self.recurrence(rows)
        outputs: Tensor = self.head(states[:, -1] if self.reads_last_step else states)
        return outputs


RECURRENT = ExpertKind("recurrent", RecurrentOptions, Recurrent)
