"""Experts that are layers, as the configuration settles them: what they need to know, and what they cannot be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_runtime.config.gates import MultiGateConfig
from moe_runtime.config.hosts import is_loopback
from moe_runtime.experts.view import resolve_view
from moe_runtime.launch.nested.nesting import MOE_KIND, REMOTE_KIND
from moe_runtime.launch.nested.options import MoEOptions
from moe_runtime.routing.policies.build import build_policy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.experts.spec import ExpertSpec
    from moe_runtime.launch.expansion import ExpandedExpert
    from moe_runtime.launch.recipes import LayerRecipe
    from moe_runtime.routing.policy import Policy

_FILES = ("token_file", "ca", "cert", "key")


def settle(expert: ExpandedExpert, loaded: LoadedConfig, inner_layers: Mapping[str, LayerRecipe]) -> ExpandedExpert:
    """The same expert; one that is a layer with what it cannot know itself.

    Its files' paths are made absolute, it needs no GPU of its own, and it is told the shape of its layer's rows.
    """
    recipe = expert.recipe
    if recipe.spec.kind not in (MOE_KIND, REMOTE_KIND):
        return expert
    options: dict[str, Any] = dict(recipe.spec.options)
    for key in _FILES:
        path = options.get(key)
        if isinstance(path, str) and not path.startswith("~"):
            options[key] = str(loaded.resolve(path))
    inner = _inner_of(recipe.spec, inner_layers)
    if inner is not None and options.get("out_shape") is None:
        options["out_shape"] = [*inner.out_shape]
    resources = recipe.resources
    if resources.num_gpus is None:
        resources = resources.model_copy(update={"num_gpus": 0.0})
    return replace(expert, recipe=replace(recipe, spec=replace(recipe.spec, options=options), resources=resources))


def lacks_inner_layer(spec: ExpertSpec, inner_layers: Mapping[str, LayerRecipe]) -> bool:
    """Whether an expert is a layer that is unknown or has mistakes itself, as was told: no more can be said."""
    return spec.kind == MOE_KIND and isinstance(spec.options.get("layer"), str) and not _inner_of(spec, inner_layers)


def inner_mistakes(
    expert: ExpandedExpert, config: RuntimeConfig, inner_layers: Mapping[str, LayerRecipe]
) -> Iterator[str]:
    """One line per reason why an expert cannot be the layer that it names; its options are well-formed."""
    spec = expert.recipe.spec
    inner = _inner_of(spec, inner_layers)
    if inner is None:
        return
    options = MoEOptions.model_validate(dict(spec.options))
    for key, found, expected in _compared(spec, inner, options):
        if found != expected:
            yield f"{expert.key}.{key}: expected {expected}, as layer {inner.name} has it, found {found}"
    if config.router.replicas == 0:
        yield f"{expert.key}.options.layer: expected router.replicas of at least 1, who ask that layer, found 0"
    policy = build_policy(inner.policy, num_experts=inner.num_routed)
    for reason in _needs(inner, policy):
        yield f"{expert.key}.options.layer: expected a layer whose gate needs nothing but the rows, found {reason}"
    if policy.batch_coupled and not inner.allow_batch_coupled:
        yield (
            f"{expert.key}.options.layer: expected a layer whose rows do not change each other's answers, since rows "
            f"of several requests share a call, found {inner.name}, whose policy {inner.policy.kind} couples those of "
            f"a batch; layers.{inner.name}.allow_batch_coupled: true allows it"
        )
    if spec.exact and not inner.exact:
        yield f"{expert.key}.options.layer: expected an exact layer in an exact one, found {inner.name}, which is not"
    for mistake in _access_mistakes(options, config):
        yield f"{expert.key}.options: {mistake}"


def _inner_of(spec: ExpertSpec, inner_layers: Mapping[str, LayerRecipe]) -> LayerRecipe | None:
    name = spec.options.get("layer")
    return inner_layers.get(name) if spec.kind == MOE_KIND and isinstance(name, str) else None


def _compared(spec: ExpertSpec, inner: LayerRecipe, options: MoEOptions) -> Iterator[tuple[str, Any, Any]]:
    """What has to be equal: the key, what is found, and what is expected."""
    in_shape = resolve_view(spec.item_shape, spec.view).shape
    yield "view.shape" if spec.view is not None else "options.layer: rows of shape", [*in_shape], [*inner.item_shape]
    yield "options.out_shape", options.out_shape, [*inner.out_shape]
    yield "options.layer: rows of dtype", spec.dtype, inner.dtype


def _needs(inner: LayerRecipe, policy: Policy) -> Iterator[str]:
    """What the gate or the policy of a layer needs that no expert passes on."""
    if inner.gate_features != math.prod(inner.item_shape):
        yield f"{inner.name}, whose gate sees a gate_input, {inner.gate_features} wide"
    if isinstance(inner.gate, MultiGateConfig) and inner.gate.default_task is None:
        yield f"{inner.name}, whose gate needs a task and has no default_task"
    if "token_ids" in policy.reads:
        yield f"{inner.name}, whose policy needs token_ids"


def _access_mistakes(options: MoEOptions, config: RuntimeConfig) -> Iterator[str]:
    """Why the runtime's own routers would refuse the expert's calls."""
    security = config.security
    if security.tokens is not None and not options.has_token:
        yield "expected token_env or token_file, since the routers want a token (security.tokens), found neither"
    if (security.tls is not None) != options.uses_tls:
        found = "tls or ca" if options.uses_tls else "neither"
        wanted = "ca, or tls: true" if security.tls is not None else "neither tls nor ca"
        yield f"expected {wanted}, since the routers serve as security.tls says, found {found}"
    if security.tls is not None and security.tls.client_ca is not None and options.cert is None:
        yield "expected cert and key, since the routers want a certificate (security.tls.client_ca), found neither"
    leaves_machine = not is_loopback(config.router.address.rpartition(":")[0])
    if options.has_token and leaves_machine and not options.uses_tls and not options.insecure:
        yield "expected insecure: true, since the token goes to the routers in plain text, found false"
