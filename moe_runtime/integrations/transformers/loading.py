"""A checkpoint's model in this process, with its experts in actors."""

from __future__ import annotations

import copy
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import UnsupportedModelError, WeightsError
from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint
from moe_runtime.experts.checkpoints.internals import dequantizing_anywhere, ignoring_keys, untied
from moe_runtime.experts.checkpoints.skeleton import without_experts
from moe_runtime.integrations.transformers.binding import bind_experts, kept_unless_it_fails
from moe_runtime.integrations.transformers.completeness import check_all_loaded, check_shards
from moe_runtime.integrations.transformers.layers import Source
from moe_runtime.integrations.transformers.placement import chosen_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from transformers import PreTrainedModel

    from moe_runtime.integrations.transformers.placement import Placement
    from moe_runtime.integrations.transformers.providing import Provider

#: Arguments of ``from_pretrained`` that say that parameters come from elsewhere, have other names, or are shared out.
_REFUSED = (
    "state_dict",
    "gguf_file",
    "key_mapping",
    "variant",
    "subfolder",
    "distributed_config",
    "tp_plan",
    "tp_size",
)
#: Held while transformers builds any model: it takes the tying of weights off its class meanwhile, and would leave it
#: off for good if two threads did so at once; and without experts it is built by changing its classes for a while.
BUILDING = threading.RLock()


def load_model(
    build: Callable[..., Any],
    model_class: type[PreTrainedModel],
    path: Any,
    *,
    options: Mapping[str, Any],
    provider: Provider,
    placement: Placement,
) -> Any:
    """What ``from_pretrained`` gives, with the experts in actors.

    Args:
        build: ``from_pretrained`` of transformers for ``model_class``; takes the path and keyword arguments.
        model_class: Class of the model.
        path: The folder of a checkpoint.
        options: Keyword arguments of ``from_pretrained``.
        provider: Has the actors, or starts them.
        placement: How the experts live in them.

    Returns:
        The model; a pair of it and information where ``output_loading_info`` asks for that.

    Raises:
        UnsupportedModelError: If the model has no experts, or none that can live in actors, or is to be loaded in a
            way that they cannot follow.
        WeightsError: If there is no checkpoint, or a file or a tensor of it is missing or broken.
        ConfigError: If experts cannot have the dtype, or the runtime cannot have such layers.
        StartError: If the experts do not start.
    """
    wanted = options.get("dtype", options.get("torch_dtype"))
    if wanted is not None and not isinstance(wanted, dict):
        chosen_dtype(wanted)
    source = _open_source(path, model_class, options)
    checkpoint = source.checkpoint
    check_shards(checkpoint.folder)
    with (
        BUILDING,
        ignoring_keys(model_class, _keys_of_experts(source, model_class)),
        without_experts(checkpoint.expert_classes),
        untied(checkpoint.model, checkpoint.plan),
        dequantizing_anywhere(),
    ):
        # A tensor of another shape is an error below, which names it.
        noted = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, about = build(path, **{**_dequantised(source, options), **noted})
    check_all_loaded(about, checkpoint.folder, may_differ=bool(options.get("ignore_mismatched_sizes")))
    dtype: torch.dtype = model.config.dtype  # what it was loaded in, by now
    dtypes = dict.fromkeys((layer.module for layer in source.checkpoint.layers), dtype)
    with kept_unless_it_fails() as stack:
        bind_experts(model, source, provider=provider, placement=placement, dtypes=dtypes, stack=stack)
    return (model, about) if options.get("output_loading_info") else model


def checkpoint_folder(path: Any) -> Path:
    """The folder that a caller names.

    Raises:
        WeightsError: If it is none: experts in actors read their tensors from files, where the actors are.
    """
    if not isinstance(path, str | os.PathLike) or not Path(path).expanduser().is_dir():
        raise WeightsError(
            f"expected the folder of a checkpoint that this process and the actors can read, found {path!r}; "
            "huggingface_hub.snapshot_download(name) fetches a model from the hub and returns its folder"
        )
    return Path(path).expanduser().absolute()


def _open_source(path: Any, model_class: type[PreTrainedModel], options: Mapping[str, Any]) -> Source:
    folder = checkpoint_folder(path)
    for name in _REFUSED:
        if options.get(name):
            raise UnsupportedModelError(
                f"from_pretrained: expected no {name} with experts_implementation 'moe_runtime', found "
                f"{options[name]!r}: experts in actors read the safetensors files in {folder} as they are"
            )
    name = model_class.__name__
    checkpoint = open_checkpoint(folder, architecture=name)
    is_its_own = name in (checkpoint.config.architectures or ())[:1]
    return Source(checkpoint, architecture=None if is_its_own else name)


def _keys_of_experts(source: Source, model_class: type[PreTrainedModel]) -> set[str]:
    """Patterns of the tensors that the checkpoint has for experts, which are nothing strange in it."""
    prefix = f"{model_class.base_model_prefix}."
    modules = (layer.module.removeprefix(prefix) for layer in source.checkpoint.layers)
    return {rf"(^|\.){re.escape(module)}\." for module in modules}


def _dequantised(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which a quantised checkpoint's other parameters are plain ones too, as its experts are."""
    config = options.get("config") or source.checkpoint.config
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return dict(options)
    config = copy.deepcopy(config)
    if isinstance(settings, dict):
        config.quantization_config = {**settings, "dequantize": True}
    else:
        config.quantization_config.dequantize = True
    return {**options, "config": config}
