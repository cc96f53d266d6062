"""What an expert is to the runtime: a module with a contract, built by a registered kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

from moe_runtime.config.strict import StrictModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

OptionsT = TypeVar("OptionsT", bound=StrictModel)


@dataclass(frozen=True)
class ExpertContract:
    """What an expert promises about its rows.

    Attributes:
        in_shape: Shape of one row that the expert sees: the item's, or the view's where there is one.
        out_shape: Shape of one row that it answers with.
        cost_per_row: Multiply-adds that one row takes, roughly; a hint for placement.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    cost_per_row: float = 0.0


@runtime_checkable
class Expert(Protocol):
    """The module that a kind builds: a ``torch.nn.Module`` with a contract.

    Guarantees: ``forward`` is pure. In eval mode the same rows give the same outputs, the input is not
    changed, no state is kept, and what a row becomes does not depend on the rows beside it. The runtime may
    therefore merge rows of several requests, run rows twice, and run them on another replica.
    """

    contract: ExpertContract

    def __call__(self, rows: Tensor) -> Tensor:
        """``(num_rows, *in_shape)`` to ``(num_rows, *out_shape)``, in the same dtype and on the same device."""
        ...


@runtime_checkable
class DistantExpert(Expert, Protocol):
    """An expert whose rows another process computes, which may not be there yet, or no more.

    So nothing of it is tried when it is built, it has no golden probe, and no weights of its own. An error that says
    that the other process gave no answer is an ``InnerLayerError``: its forward is not tried again in parts.
    """

    #: What stands for the version of weights that it does not know.
    weights_version: str


@runtime_checkable
class StoredExpert(Expert, Protocol):
    """An expert that brings its own weights, from where its options say: it has no weight file and draws nothing.

    It is built with its parameters on the meta device, whatever torch's default device, and has them once it is loaded.
    """

    #: What stands for the version of its weights; known before they are loaded.
    stored_version: str

    def load(self) -> None:
        """Read the parameters, on the CPU, in the dtypes that the module has been brought to.

        Raises:
            WeightsError: If they are missing, corrupt, or do not fit.
        """
        ...


@dataclass(frozen=True)
class ExpertKind(Generic[OptionsT]):
    """A kind of expert: what a plug-in registers and a config's ``kind`` names.

    Attributes:
        name: What the config writes; for a plug-in also the name of its entry point.
        options: Model of the config's ``options``; its fields' descriptions become the documentation.
        build: ``build(in_shape, options)`` makes the module, with initial parameters drawn from torch's global
            generator, on torch's default device: both are set around the call. Raises ``ConfigError`` where the
            options or the shape do not fit. It is also called on the meta device, so it must not look at
            the values of tensors.
    """

    name: str
    options: type[OptionsT]
    build: Callable[[tuple[int, ...], OptionsT], nn.Module]
