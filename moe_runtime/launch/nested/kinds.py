"""The kinds ``moe`` and ``remote``: experts whose forward asks the routers of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from moe_runtime.errors import ConfigError, InnerLayerError
from moe_runtime.experts.protocol import ExpertContract, ExpertKind
from moe_runtime.experts.registry import register_built_in
from moe_runtime.launch.nested.asked_layer import AskedLayer, LayerCalls
from moe_runtime.launch.nested.nesting import MOE_KIND, REMOTE_KIND
from moe_runtime.launch.nested.options import MoEOptions, RemoteOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from moe_runtime.launch.nested.options import AccessOptions


class LayerExpert(nn.Module):
    """The output of a layer, residual rule and all. A ``DistantExpert``.

    Args:
        layer: Which.
        access: How its routers are called.
        version: Stands for the version of weights.
        find_routers: Finds the routers' addresses; called when they are needed.
    """

    def __init__(
        self,
        layer: AskedLayer,
        access: AccessOptions,
        *,
        version: str,
        find_routers: Callable[[], Sequence[str]],
    ) -> None:
        super().__init__()
        self.contract = ExpertContract(in_shape=layer.in_shape, out_shape=layer.out_shape)
        self.weights_version = version
        self._calls = LayerCalls(layer, access, find_routers=find_routers)

    def counts(self) -> Mapping[str, int]:
        """Calls, and what became of the layer's assignments. Thread-safe."""
        return self._calls.counts()

    def close(self) -> None:
        """End the call that is under way, and make no other. Thread-safe; safe to call twice."""
        self._calls.close()

    def forward(self, rows: Tensor) -> Tensor:
        """``(num_rows, *in_shape)`` to ``(num_rows, *out_shape)``, by the layer's routers.

        Raises:
            InvalidRequestError: If they refuse the rows.
            InnerLayerError: If there is no answer, or none of its experts had a part in it.
        """
        return self._calls.forward(rows)


class RemoteExpert(LayerExpert):
    """A layer of another runtime, at addresses that are known."""

    def __init__(self, in_shape: tuple[int, ...], options: RemoteOptions) -> None:
        out_shape = in_shape if options.out_shape is None else tuple(options.out_shape)
        place = f"{','.join(options.addresses)}/{options.layer}"
        layer = AskedLayer(options.layer, f"layer {place}", in_shape, out_shape)
        super().__init__(layer, options, version=f"remote:{place}", find_routers=lambda: options.addresses)


class MoEExpert(LayerExpert):
    """Another layer of the runtime that serves this one, whose routers the host finds."""

    def __init__(self, in_shape: tuple[int, ...], options: MoEOptions) -> None:
        if options.out_shape is None:
            raise ConfigError("options.out_shape: expected the shape of the layer's rows, found none")
        layer = AskedLayer(options.layer, f"layer {options.layer}", in_shape, tuple(options.out_shape))
        super().__init__(layer, options, version=f"moe:{options.layer}", find_routers=self._find)
        self._find_routers: Callable[[], Sequence[str]] | None = None

    def connect(self, find_routers: Callable[[], Sequence[str]]) -> None:
        """Say how the runtime's routers are found, before the first rows come."""
        self._find_routers = find_routers

    def _find(self) -> Sequence[str]:
        if self._find_routers is None:
            raise InnerLayerError("expected an expert that a runtime serves, found one alone: nobody knows its routers")
        return self._find_routers()


REMOTE = ExpertKind(REMOTE_KIND, RemoteOptions, RemoteExpert)
MOE = ExpertKind(MOE_KIND, MoEOptions, MoEExpert)


def register_nested_kinds() -> None:
    """Make the kinds known to the experts' registry, in whatever process builds, checks or documents experts."""
    register_built_in((REMOTE, MOE))
