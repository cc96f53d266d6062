"""What a model whose experts live in actors cannot do, said where it is tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from transformers import PreTrainedModel

from moe_runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from pathlib import Path

#: What ``experts_implementation`` is called for experts in actors.
IMPLEMENTATION = "moe_runtime"
_PICKLING = "a model whose experts live in actors cannot be pickled, since they stay where they are: load it there anew"


class Refusal:
    """Stands in for a method of a model, and raises when it is called."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(self._message)

    def __deepcopy__(self, _memo: object) -> Refusal:
        """A copy of the model refuses the same."""
        return self

    def __reduce__(self) -> NoReturn:
        refuse_pickling()


class FixedImplementation:
    """Stands in for the methods of a model that tell and set its implementation of experts, which is ours for good."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, experts_implementation: str | Mapping[str, str | None] | None = None) -> dict[str, str]:
        """What it is; generation asks, and sets what it has been told.

        Raises:
            UnsupportedModelError: If it is to be another one.
        """
        wanted = experts_implementation
        if wanted is not None and {*(wanted.values() if isinstance(wanted, Mapping) else (wanted,))} != {
            IMPLEMENTATION
        }:
            raise UnsupportedModelError(f"{self._message}: {wanted!r}")
        return {"": IMPLEMENTATION}

    def __deepcopy__(self, _memo: object) -> FixedImplementation:
        return self

    def __reduce__(self) -> NoReturn:
        refuse_pickling()


def refuse_pickling() -> NoReturn:
    """Say why a model cannot be pickled.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(_PICKLING)


def refuse_what_needs_experts(model: PreTrainedModel, *, source: Path) -> None:
    """Have a model refuse what only one with its experts' parameters can do, and so each model inside of it.

    Args:
        model: Whose experts live in actors.
        source: The folder that has all of its parameters, for the messages.
    """
    saving = Refusal(
        f"save_pretrained: the model's experts live in actors, and a checkpoint without them would be none; copy "
        f"{source}, or load the model from there without moe_runtime and save that"
    )
    fixed = FixedImplementation(
        f"set_experts_implementation: expected {IMPLEMENTATION!r}, since the model's experts live in actors, found "
        f"another (load {source} by from_pretrained to run them here)"
    )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in ("save_pretrained", "push_to_hub"):
                setattr(module, name, saving)
            for name in ("get_experts_implementation", "set_experts_implementation"):
                setattr(module, name, fixed)
