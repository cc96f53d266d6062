"""What enters and leaves the router service: a validated request and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.wire.messages import RequestOptions

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.wire.messages import Report


@dataclass(frozen=True)
class LayerRequest:
    """One caller's tokens for one layer.

    Attributes:
        request_id: Chosen by the caller.
        layer: Name of the layer.
        tokens: ``(num_tokens, *item_shape)`` in the layer's dtype.
        options: The caller's wishes.
        return_routing: Whether the report lists every assignment.
        deadline: Clock time after which nobody waits for the answer; None is the layer's default.
        client: Who asks: the name of a token or a certificate, else an address; the queue is shared
            between clients. Empty for callers in this process.
    """

    request_id: str
    layer: str
    tokens: Tensor
    options: RequestOptions[Tensor] = field(default_factory=RequestOptions)
    return_routing: bool = False
    deadline: float | None = None
    client: str = ""


@dataclass(frozen=True)
class LayerAnswer:
    """The answer to one ``LayerRequest``: ``(num_tokens, *out_shape)`` and its report."""

    outputs: Tensor
    report: Report
