"""Experts that no family knows: a model that has some is refused, for it would run them here without a word.

transformers accepts an implementation of experts for classes that never look at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import nn

#: Classes that hold experts and cannot live in other processes, with the reason.
_REFUSED: Mapping[str, str] = {
    "NllbMoeExperts": "its forward takes the router's mask for expert ids, so that only the first two experts ever run",
    "DogeCDMoE": "each of its thousands of experts is a pair of vectors, which is less than a message",
    "VitPoseNaiveMoe": "its experts are chosen by the data set, and compute part of a layer's columns",
}
#: Experts that stay in the caller's process although others of the same model leave it.
_STAYING = frozenset({"JetMoeMoA"})


def refuse_unknown_experts(model: nn.Module, known: Collection[str]) -> None:
    """Check that a model has no experts beside those that are known.

    Args:
        model: Any model.
        known: Paths of its modules that hold experts of a family.

    Raises:
        UnsupportedModelError: If it has. It says which, and what is supported.
    """
    settled = set(known)
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in settled):
            continue
        kind = type(module).__name__
        if kind in _STAYING:
            settled.add(name)
        elif name not in settled and looks_like_experts(name, type(module)):
            reason = _REFUSED.get(kind, "no family of moe_runtime.experts.checkpoints knows its class")
            raise UnsupportedModelError(
                f"{type(model).__name__}: the experts of {kind} at {name} cannot live in other processes: {reason}; "
                "supported are the models of transformers whose experts are decorated with "
                "@use_experts_implementation, and dbrx, jetmoe, llama4, longcat_flash, step3p7, switch_transformers"
            )


def looks_like_experts(name: str, module_class: type[nn.Module]) -> bool:
    """Whether a module seems to hold routed experts, by its path in the model and its class.

    Args:
        name: Its path; "" where only the class is known.
        module_class: Its class.
    """
    kind = module_class.__name__
    by_class = kind.endswith("Experts") and not kind.endswith("SharedExperts")
    return kind in _REFUSED or by_class or name.rpartition(".")[2] == "experts"
