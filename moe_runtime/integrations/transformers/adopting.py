"""A model that is in this process's memory hands its experts' parameters over to actors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint
from moe_runtime.experts.checkpoints.families import expert_modules
from moe_runtime.experts.checkpoints.skeleton import drop_experts
from moe_runtime.integrations.transformers.binding import bind_experts, bound_experts, kept_unless_it_fails
from moe_runtime.integrations.transformers.expert_files import folder_for, write_experts
from moe_runtime.integrations.transformers.layers import Source
from moe_runtime.integrations.transformers.placement import DTYPES, Placement
from moe_runtime.integrations.transformers.providing import GivenRuntime

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from moe_runtime.experts.checkpoints.families import Family
    from moe_runtime.integrations.transformers.placement import OnFailure
    from moe_runtime.launch.served import Runtime


def adopt(  # noqa: PLR0913  # each argument is a choice of its own
    model: PreTrainedModel,
    runtime: Runtime,
    *,
    experts_per_actor: int = 1,
    replicas: int = 1,
    resources: Mapping[str, Any] | None = None,
    exact: bool = True,
    on_failure: OnFailure = "wait",
    name: str | None = None,
    folder: str | Path | None = None,
) -> PreTrainedModel:
    """Move the parameters of a model's experts into a runtime's actors, and free them here.

    They are written as safetensors files, layer by layer, for the actors to read. The files stay as long as the model
    does, since an actor that is replaced reads them again: until ``close(model)``, or until the model is forgotten or
    the process ends. Then the runtime loses the model's layers first. If anything fails the model is as it was, and
    layers and files are gone.

    Args:
        model: Any of transformers with experts, on any device; its parameters are plain floating tensors.
        runtime: Gets the model's layers; of ``moe_runtime.serve`` with ``router.replicas: 0``.
        experts_per_actor: Neighbouring experts that share an actor.
        replicas: Actors that serve each expert.
        resources: What an expert asks of the cluster: ``resources`` of an expert's configuration.
        exact: Whether outputs are bit-identical to one process's.
        on_failure: What becomes of tokens whose expert fails, as ``load`` has it.
        name: What precedes the names of the layers; chosen when None.
        folder: Where to write, for actors on other nodes: a new or empty folder that all of them see. It is left
            there in the end. None is a folder of this machine that only its user can enter, and which is removed.

    Returns:
        The same model, in eval mode, with all of its parameters frozen.

    Raises:
        UnsupportedModelError: If the model has no experts, or such as cannot live in actors, or is served by some
            already; or its experts' parameters are quantised, or not in memory.
        ConfigError: If the runtime cannot have such layers, or the folder holds something.
        StartError: If the files cannot be written, or the experts do not start.
    """
    families = _adoptable(model)
    placement = Placement(
        experts_per_actor=experts_per_actor,
        replicas=replicas,
        resources=resources or {},
        exact=exact,
        on_failure=on_failure,
        name=name,
    )
    provider = GivenRuntime(runtime, keeps_layers=False)
    with kept_unless_it_fails() as stack:
        place = folder_for(folder, stack, kind=model.config.model_type)
        write_experts(model, families, place)
        architecture = type(model).__name__
        source = Source(open_checkpoint(place, architecture=architecture), architecture=architecture)
        dtypes = {path: _dtype_of(model, path, family) for path, family in families.items()}
        bind_experts(model, source, provider=provider, placement=placement, dtypes=dtypes, stack=stack)
    for path in families:
        drop_experts(model.get_submodule(path))
    model.eval()
    return model


def _adoptable(model: PreTrainedModel) -> dict[str, Family]:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a model of transformers, found {type(model).__name__}; merge adapters into theirs first"
        )
    if bound_experts(model) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected a model with experts of its own, found one whose "
            "experts live in actors already"
        )
    families = expert_modules(model)
    for path, family in families.items():
        _dtype_of(model, path, family)
    return families


def _dtype_of(model: PreTrainedModel, path: str, family: Family) -> torch.dtype:
    """The one dtype of a module's experts."""
    module = model.get_submodule(path)
    found: set[torch.dtype] = set()
    for name in sorted({rows.parameter for rows in family.parameters(module, 0).values()}):
        parameter = module.get_parameter(name)
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{path}.{name}: expected a parameter in memory, found one on the meta device or offloaded; load the "
                "model whole, or give its checkpoint to load(path)"
            )
        if type(parameter) is not torch.nn.Parameter or parameter.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{path}.{name}: expected a plain parameter of float32, float64, float16 or bfloat16, found "
                f"{type(parameter).__name__} of {parameter.dtype}; dequantise the model first"
            )
        found.add(parameter.dtype)
    if len(found) > 1:
        raise UnsupportedModelError(f"{path}: expected parameters of one dtype, found {sorted(map(str, found))}")
    return found.pop()
