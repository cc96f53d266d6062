"""A model's modules and the actors that have their experts, brought together."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.experts.checkpoints.families import expert_modules
from moe_runtime.integrations.transformers.actors import ExpertActors, LayerRows
from moe_runtime.integrations.transformers.belongings import Belongings
from moe_runtime.integrations.transformers.refusals import refuse_what_needs_experts
from moe_runtime.launch.library import LayerCaller

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn

    from moe_runtime.integrations.transformers.layers import Source
    from moe_runtime.integrations.transformers.placement import Placement
    from moe_runtime.integrations.transformers.providing import Provider

_ATTRIBUTE = "moe_runtime_experts"


@contextmanager
def kept_unless_it_fails() -> Iterator[ExitStack]:
    """A stack that is closed if the block fails, and left open for whoever has it by then if not."""
    with ExitStack() as guard:
        yield guard.enter_context(ExitStack())
        guard.pop_all()


def bind_experts(
    model: PreTrainedModel,
    source: Source,
    *,
    provider: Provider,
    placement: Placement,
    dtypes: Mapping[str, torch.dtype],
    stack: ExitStack,
) -> None:
    """Have a model's experts served by actors, and freeze the rest of it.

    Args:
        model: Whose modules that hold experts are to call them.
        source: Where the experts come from.
        provider: Has the actors, or starts them.
        placement: How the experts live in them.
        dtypes: Of the experts, by the paths of the modules that hold them.
        stack: Gets what is to be given back with the experts; closed by them, or by the caller if this fails.

    Raises:
        UnsupportedModelError: If model and checkpoint have different modules that hold experts.
        StartError: If the experts do not start. The model is as it was.
    """
    families = expert_modules(model)
    odd = sorted(families.keys() ^ {layer.module for layer in source.checkpoint.layers})
    if odd:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected experts in the same modules as the checkpoint in {source.folder} has, "
            f"found some in only one of both: {', '.join(odd)}"
        )
    runtime, layers = provider.provide(source, placement, dtypes=dtypes, stack=stack)
    caller = LayerCaller(runtime, layers.values(), on_failure=placement.on_failure)
    stack.callback(caller.close)
    in_order = {name: layers[name] for name in families}
    actors = ExpertActors(runtime, caller=caller, layers=in_order, belongings=Belongings(stack))
    for name, layer in in_order.items():
        rows = LayerRows(actors, layer=layer, dtype=caller.layers[layer].dtype)
        families[name].bind(model.get_submodule(name), rows)
    model.requires_grad_(False)
    refuse_what_needs_experts(model, source=source.folder)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # First, so that pickling meets it before anything that fails less clearly.
            module.__dict__ = {_ATTRIBUTE: actors, **module.__dict__}


def bound_experts(model: nn.Module) -> ExpertActors | None:
    """The actors that serve a model's experts; None if its experts are its own."""
    for module in model.modules():
        actors = module.__dict__.get(_ATTRIBUTE)
        if isinstance(actors, ExpertActors):
            return actors
    return None
