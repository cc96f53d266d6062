"""What callers do with models whose experts live in actors: configure, load, use, look, close."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from moe_runtime.errors import ConfigError, UnsupportedModelError
from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint
from moe_runtime.integrations.transformers.binding import bound_experts
from moe_runtime.integrations.transformers.layers import Source, layer_blocks
from moe_runtime.integrations.transformers.loading import checkpoint_folder
from moe_runtime.integrations.transformers.looking import view_of
from moe_runtime.integrations.transformers.placement import Placement, chosen_dtype
from moe_runtime.integrations.transformers.providing import GivenRuntime, OwnRuntime, library_config
from moe_runtime.integrations.transformers.refusals import IMPLEMENTATION
from moe_runtime.integrations.transformers.using import used

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from moe_runtime.integrations.transformers.actors import ExpertActors
    from moe_runtime.integrations.transformers.looking import ExpertsView
    from moe_runtime.integrations.transformers.placement import OnFailure
    from moe_runtime.integrations.transformers.providing import Provider
    from moe_runtime.launch.served import Runtime

#: Every actor imports transformers first, and reads its experts.
START_TIMEOUT_S = 180.0


def load(  # noqa: PLR0913  # each argument is a choice of its own
    path: str | Path,
    *,
    experts_per_actor: int = 1,
    replicas: int = 1,
    resources: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    exact: bool = True,
    on_failure: OnFailure = "wait",
    runtime: Runtime | None = None,
    ray_address: str | None = None,
    name: str | None = None,
    auto_class: Any = None,
    options: Mapping[str, Any] | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> PreTrainedModel:
    """A checkpoint's model in this process, but for its experts, which live in actors.

    The model is one of transformers, to call and to ``generate`` with. Its attention, routers and everything else are
    here; each actor reads its own experts' tensors from the checkpoint's files, and nobody else does. With ``exact``
    its outputs are bit-equal to those of the model in one process with ``grouped_mm``, given as many threads.

    Without ``runtime`` one is started for it, on Ray as it is initialised, else on a cluster at ``ray_address`` or
    ``RAY_ADDRESS``, else on one started here. It ends with ``close(model)``, when the model is forgotten, or with this
    process. With ``runtime`` the model's layers are added to that one, unless it has them already (see ``config``),
    and stay there.

    Args:
        path: Folder of the checkpoint: safetensors files and ``config.json``. Every node with actors sees it as well.
        experts_per_actor: Neighbouring experts that share an actor; it has them in every MoE layer of the model.
        replicas: Actors that serve each expert.
        resources: What an expert asks of the cluster: ``resources`` of an expert's configuration.
        device: Of what stays here: ``auto`` is cuda where torch has a GPU, else cpu.
        dtype: Of the whole model; ``auto`` is what the checkpoint says.
        exact: Whether outputs are bit-identical to one process's. Without it, requests may be joined and split.
        on_failure: What becomes of tokens whose expert fails: ``wait`` for its replacement, up to the runtime's
            ``start_timeout_s``, unless it is there and fails twice in a row; or ``drop`` the expert from the token's
            sum, which is counted and logged once.
        runtime: Where the experts are to live, of ``moe_runtime.serve`` with ``router.replicas: 0``.
        ray_address: Address of the cluster to start a runtime on.
        name: Of the runtime that is started, or what precedes the names of the layers in the one that is given.
        auto_class: Of transformers; by default ``AutoModelForSeq2SeqLM`` for a model with an encoder and a decoder,
            ``AutoModelForCausalLM`` for others.
        options: More keyword arguments of ``from_pretrained``, such as ``attn_implementation``.
        start_timeout_s: Bounds the start of a runtime of its own.

    Returns:
        The model in eval mode, with all of its parameters frozen.

    Raises:
        UnsupportedModelError: If the model has no experts, or such as cannot live in actors; or for an option that
            they cannot follow.
        WeightsError: If there is no checkpoint, or a file or a tensor of it is missing or broken.
        ConfigError: If an argument is none that it can be, or the runtime cannot have such layers.
        StartError: If the experts do not start. Nothing is left behind.
    """
    placement = Placement(
        experts_per_actor=experts_per_actor,
        replicas=replicas,
        resources={} if resources is None else resources,
        exact=exact,
        on_failure=on_failure,
        name=name,
        start_timeout_s=start_timeout_s,
    )
    chosen_dtype(dtype)
    place = _device(device)
    provider: Provider
    if runtime is None:
        provider = OwnRuntime(name=name, ray_address=ray_address, start_timeout_s=start_timeout_s)
    else:
        provider = GivenRuntime(runtime)
    chosen = _auto_class(path) if auto_class is None else auto_class
    with used(provider, placement):
        model = chosen.from_pretrained(path, experts_implementation=IMPLEMENTATION, dtype=dtype, **(options or {}))
    moved: PreTrainedModel = model.to(place)
    return moved


@contextmanager
def use(
    runtime: Runtime,
    *,
    experts_per_actor: int = 1,
    replicas: int = 1,
    resources: Mapping[str, Any] | None = None,
    exact: bool = True,
    on_failure: OnFailure = "wait",
    name: str | None = None,
) -> Iterator[None]:
    """Within it, ``from_pretrained(path, experts_implementation="moe_runtime")`` puts experts into a runtime's actors.

    It holds for the thread that enters it; of several, the innermost. Models that were loaded within it live on after
    it, as long as the runtime does. Loads that do not ask for ``moe_runtime`` are left alone; loads that do, outside
    of it, raise ``UnsupportedModelError`` before they read anything.

    Args:
        runtime: Gets the layers of the models; of ``moe_runtime.serve`` with ``router.replicas: 0``.
        experts_per_actor: Neighbouring experts that share an actor.
        replicas: Actors that serve each expert.
        resources: What an expert asks of the cluster: ``resources`` of an expert's configuration.
        exact: Whether outputs are bit-identical to one process's.
        on_failure: What becomes of tokens whose expert fails, as ``load`` has it.
        name: What precedes the names of the layers; chosen when None.

    Raises:
        ConfigError: If an argument is none that it can be; before anything is loaded.
    """
    placement = Placement(
        experts_per_actor=experts_per_actor,
        replicas=replicas,
        resources={} if resources is None else resources,
        exact=exact,
        on_failure=on_failure,
        name=name,
    )
    with used(GivenRuntime(runtime), placement):
        yield


def config(  # noqa: PLR0913  # each argument is a choice of its own
    path: str | Path,
    *,
    experts_per_actor: int = 1,
    replicas: int = 1,
    resources: Mapping[str, Any] | None = None,
    exact: bool = True,
    dtype: str | torch.dtype = "auto",
    name: str | None = None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """The configuration that serves a checkpoint's experts: to be changed, written as YAML, and deployed.

    ``load(path, runtime=moe_runtime.serve(config(path)))`` finds its layers there, and adds none. What the
    configuration says of them then counts, whatever ``load`` was told.

    Args:
        path: Folder of the checkpoint, as the actors see it.
        experts_per_actor: Neighbouring experts that share an actor.
        replicas: Actors that serve each expert.
        resources: What an expert asks of the cluster.
        exact: Whether outputs are bit-identical to one process's.
        dtype: Of the experts; ``auto`` is what the checkpoint says.
        name: Of the runtime; after the folder when None.
        architecture: Class of transformers that will be loaded; the checkpoint's own when None.

    Returns:
        Plain values: a runtime without routers, with one layer for each of the model's.

    Raises:
        UnsupportedModelError: If the model has no experts, or such as cannot live in actors.
        WeightsError: If there is no checkpoint, or its configuration is broken.
        ConfigError: If an argument is none that it can be.
    """
    placement = Placement(
        experts_per_actor=experts_per_actor,
        replicas=replicas,
        resources={} if resources is None else resources,
        exact=exact,
        name=name,
    )
    named = chosen_dtype(dtype)
    folder = checkpoint_folder(path)
    source = Source(open_checkpoint(folder, architecture=architecture), architecture=architecture)
    found = source.checkpoint.dtype if named is None else named
    dtypes = dict.fromkeys((layer.module for layer in source.checkpoint.layers), found)
    return library_config(name or folder.name, layer_blocks(source, placement, dtypes=dtypes, prefix=None))


def experts(model: torch.nn.Module) -> ExpertsView:
    """What a model's experts have done so far, and where they are now: by layer and expert.

    Raises:
        UnsupportedModelError: If the model's experts are its own.
        UnavailableError: If they were closed.
        StartError: If the runtime's controller does not answer.
    """
    return view_of(_bound(model))


def close(model: torch.nn.Module) -> None:
    """Give back what a model's experts hold; the model cannot be called from then on. Safe to call twice.

    Ends the runtime that ``load`` started for it. A runtime that was given goes on, and keeps the layers that ``load``
    added; those that ``adopt`` added are removed, and then the files that it made of the experts.

    Raises:
        UnsupportedModelError: If the model's experts are its own.
    """
    _bound(model).close()


def _bound(model: torch.nn.Module) -> ExpertActors:
    actors = bound_experts(model)
    if actors is None:
        raise UnsupportedModelError(
            f"expected a model whose experts live in actors, found {type(model).__name__} with its own"
        )
    return actors


def _device(wanted: str | torch.device) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as exc:
        raise ConfigError(f"device: expected auto or a device of torch, found {wanted!r}") from exc
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: expected auto or cpu, since torch finds no GPU, found {wanted!r}")
    return device


def _auto_class(path: str | Path) -> Any:
    checkpoint = open_checkpoint(checkpoint_folder(path))
    return AutoModelForSeq2SeqLM if checkpoint.config.is_encoder_decoder else AutoModelForCausalLM
