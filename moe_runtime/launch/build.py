"""From a loaded configuration to recipes, with every check that needs nothing started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.config.load import load_config
from moe_runtime.errors import PlugInError
from moe_runtime.experts.registry import check_plug_ins
from moe_runtime.launch.layer_check import LayerCheck
from moe_runtime.launch.mistakes import Mistakes
from moe_runtime.launch.nested.kinds import register_nested_kinds
from moe_runtime.launch.nested.nesting import sort_layers
from moe_runtime.launch.packing import group_mistakes, pack_layer
from moe_runtime.launch.recipes import ConfigSummary, LayerSummary, RouterRecipe
from moe_runtime.rpc.server import check_security

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.launch.recipes import LayerRecipe


def validate(source: str | Path | Mapping[str, Any] | RuntimeConfig) -> ConfigSummary:
    """What a configuration would serve, after every check that needs nothing started.

    Args:
        source: What ``serve`` takes.

    Raises:
        ConfigError: With one line per mistake: the key's path, what was expected, what was found.
    """
    loaded = load_config(source)
    config = loaded.config
    layers = build_layers(loaded)
    security = config.security.located(loaded.base_dir)
    are_here = all(Path(path).expanduser().exists() for path in security.files.values())
    if are_here:
        check_security(security)
    return ConfigSummary(
        name=config.name,
        layers=tuple(_summary(layer) for layer in layers),
        num_routers=config.router.replicas,
        address=config.router.address,
        unchecked_files={} if are_here else security.files,
    )


def build_router(loaded: LoadedConfig, *, nodes_have_paths: bool = False) -> RouterRecipe:
    """The recipe of the routers, after the checks of ``build_layers``.

    Args:
        loaded: The configuration.
        nodes_have_paths: Whether a weight file that is not on this machine may be on the nodes that need it, and the
            files of ``security`` are there.

    Raises:
        ConfigError: With one line per mistake.
    """
    config = loaded.config
    layers = build_layers(loaded, nodes_have_paths=nodes_have_paths)
    security = config.security.located(loaded.base_dir)
    if not nodes_have_paths:
        check_security(security)
    return RouterRecipe(
        runtime=config.name,
        layers=layers,
        router=config.router,
        limits=config.limits,
        security=security,
        encryption=config.data_plane.encryption,
        metrics=config.metrics,
    )


def build_layers(loaded: LoadedConfig, *, nodes_have_paths: bool = False) -> tuple[LayerRecipe, ...]:
    """The recipes of all layers.

    Checks plug-ins, kinds, options, views and shapes on the meta device, weight files against their manifest and
    their module, names, routing rules, and what the device rules out.

    Args:
        loaded: The configuration.
        nodes_have_paths: Whether a weight file that is not on this machine may be on the nodes that need it.

    Raises:
        ConfigError: With one line per mistake. Where mistakes are of one kind only, it is that kind's error:
            ``PlugInError`` or ``WeightsError``.
    """
    register_nested_kinds()
    mistakes = Mistakes(loaded.origin)
    try:
        check_plug_ins(loaded.config.plug_ins)
    except PlugInError as exc:
        mistakes.add(exc)
    nesting = sort_layers(loaded.config.layers)
    mistakes.add_lines(nesting.mistakes)
    recipes: dict[str, LayerRecipe] = {}
    for name in nesting.innermost_first:
        check = LayerCheck(loaded, name, mistakes, inner_layers=recipes, nodes_have_paths=nodes_have_paths)
        if (recipe := check.recipe(level=nesting.levels[name])) is not None:
            recipes[name] = recipe
    built = tuple(recipes[name] for name in loaded.config.layers if name in recipes)
    mistakes.add_lines(group_mistakes(built))
    mistakes.raise_any()
    return built


def _summary(layer: LayerRecipe) -> LayerSummary:
    return LayerSummary(
        name=layer.name,
        item_shape=layer.item_shape,
        out_shape=layer.out_shape,
        dtype=layer.dtype,
        policy=layer.policy.kind,
        experts={expert.spec.name: expert.spec.kind for expert in layer.experts[: layer.num_routed]},
        shared_experts={expert.spec.name: expert.spec.kind for expert in layer.experts[layer.num_routed :]},
        num_actors=sum(pack[0].replicas for pack in pack_layer(layer)),
        actor_group=layer.actor_group,
    )
