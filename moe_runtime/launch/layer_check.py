"""The checks of one layer of a configuration that need nothing started, and its recipe where it passes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.config.load import is_uri
from moe_runtime.errors import ConfigError, WeightsError
from moe_runtime.experts.build import check_weights
from moe_runtime.experts.spec import expert_contract
from moe_runtime.launch.expansion import blocks_of, expand_experts, name_mistakes
from moe_runtime.launch.gates import check_gate_weights, gate_seed, gate_shape
from moe_runtime.launch.nested.inner_checks import inner_mistakes, lacks_inner_layer, settle
from moe_runtime.launch.recipes import LayerRecipe
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.rules import check_rules, resolve_residual

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.launch.expansion import ExpandedExpert
    from moe_runtime.launch.mistakes import Mistakes
    from moe_runtime.routing.policy import Policy


class LayerCheck:
    """Checks one layer of a configuration, and makes its recipe if nothing is wrong with it."""

    def __init__(
        self,
        loaded: LoadedConfig,
        name: str,
        mistakes: Mistakes,
        *,
        inner_layers: Mapping[str, LayerRecipe],
        nodes_have_paths: bool,
    ) -> None:
        self._inner_layers = inner_layers
        self._nodes_have_paths = nodes_have_paths
        self._loaded = loaded
        self._name = name
        self._key = f"layers.{name}"
        self._layer = loaded.config.layers[name]
        self._mistakes = mistakes
        self._experts = [settle(expert, loaded, inner_layers) for expert in expand_experts(loaded, name)]

    def recipe(self, *, level: int) -> LayerRecipe | None:
        """The recipe; None, and more mistakes, where there are some."""
        num_before = len(self._mistakes.lines)
        self._mistakes.add_lines(name_mistakes(self._name, self._layer))
        self._check_devices()
        out_shape = self._check_experts()
        policy = self._policy()
        if policy is not None:
            self._check_gate(policy)
            if out_shape is not None:
                self._check_rules(policy, out_shape)
        if out_shape is None or len(self._mistakes.lines) > num_before:
            return None
        return self._make(out_shape, level)

    def _make(self, out_shape: tuple[int, ...], level: int) -> LayerRecipe:
        layer = self._layer
        item_shape = tuple(layer.item_shape)
        return LayerRecipe(
            name=self._name,
            item_shape=item_shape,
            out_shape=out_shape,
            dtype=layer.dtype,
            gate=layer.gate,
            gate_weights=self._gate_weights,
            gate_seed=gate_seed(self._loaded.config.seed, self._name),
            gate_features=self._gate_features,
            policy=layer.policy,
            capacity=layer.capacity,
            residual=resolve_residual(layer.residual, item_shape=item_shape, out_shape=out_shape),
            weight_on=layer.weight_on,
            timeout_s=layer.timeout_ms / 1000.0,
            allow_non_finite=layer.allow_non_finite,
            max_batches_in_flight=layer.max_batches_in_flight,
            exact=layer.exact,
            wire_dtype=layer.wire_dtype or layer.dtype,
            on_failure=layer.on_failure,
            hedge=layer.hedge,
            experts_per_actor=layer.experts_per_actor,
            actor_group=layer.actor_group,
            strategy=layer.strategy,
            allow_batch_coupled=layer.allow_batch_coupled,
            experts=tuple(expert.recipe for expert in self._experts),
            num_shared=self._num_shared,
            shared_gate=layer.shared_gate,
            level=level,
            balance=layer.balance,
        )

    @property
    def _num_shared(self) -> int:
        return len(self._experts) - self._layer.num_experts

    @property
    def _gate_features(self) -> int:
        return self._layer.gate.in_features or math.prod(self._layer.item_shape)

    @property
    def _gate_weights(self) -> str | None:
        weights = self._layer.gate.weights
        return None if weights is None else self._loaded.locate(weights)

    def _check_devices(self) -> None:
        if self._loaded.config.device != "cpu":
            return
        for name, block in blocks_of(self._layer):
            if block.resources.num_gpus:
                key = f"{self._key}.{name}.resources.num_gpus"
                self._mistakes.add(
                    ConfigError(f"{key}: expected 0 or nothing with device cpu, found {block.resources.num_gpus:g}")
                )

    def _check_experts(self) -> tuple[int, ...] | None:
        """The shape on which all experts agree; None, and more mistakes, where they do not or cannot be built."""
        shapes: dict[str, tuple[int, ...]] = {}
        for expert in self._experts:
            shape = self._out_shape(expert) if expert.is_first else shapes.get(expert.key)
            if shape is not None:
                shapes[expert.key] = shape
                self._check_weights(expert)
        first_key = next(iter(shapes), None)
        if first_key is None:
            return None
        for key, shape in shapes.items():
            if shape != shapes[first_key]:
                self._mistakes.add(
                    ConfigError(
                        f"{key}: expected output rows of shape {list(shapes[first_key])}, which {first_key} gives, "
                        f"found {list(shape)}"
                    )
                )
        return shapes[first_key]

    def _out_shape(self, expert: ExpandedExpert) -> tuple[int, ...] | None:
        spec = expert.recipe.spec
        if lacks_inner_layer(spec, self._inner_layers):
            return None
        try:
            shape = tuple(expert_contract(spec).out_shape)
        except ConfigError as exc:
            self._mistakes.add(exc, prefix=expert.key, instead_of=spec.where)
            return None
        self._mistakes.add_lines(inner_mistakes(expert, self._loaded.config, self._inner_layers))
        return shape

    def _check_weights(self, expert: ExpandedExpert) -> None:
        spec = expert.recipe.spec
        if self._is_elsewhere(spec.weights) or (spec.weights is None and not expert.is_first):
            return
        try:
            check_weights(spec)
        except WeightsError as exc:
            self._mistakes.add(exc, prefix=expert.key, instead_of=spec.where)

    def _policy(self) -> Policy | None:
        try:
            return build_policy(self._layer.policy, num_experts=self._layer.num_experts)
        except ConfigError as exc:
            origin = self._layer.origin_of(str(exc).partition(":")[0])
            self._mistakes.add(ConfigError(f"{exc}{origin}"), prefix=f"{self._key}.")
            return None

    def _check_gate(self, policy: Policy) -> None:
        if self._gate_weights is None or self._is_elsewhere(self._gate_weights):
            return
        try:
            shape = gate_shape(
                policy,
                in_features=self._gate_features,
                num_shared=self._num_shared,
                shared_gate=self._layer.shared_gate,
            )
            check_gate_weights(self._layer.gate, shape, weights=self._gate_weights)
        except WeightsError as exc:
            self._mistakes.add(exc, prefix=f"{self._key}.gate.weights: ")

    def _is_elsewhere(self, source: str | None) -> bool:
        """Whether a file can be checked only where it is used."""
        return self._nodes_have_paths and source is not None and not is_uri(source) and not Path(source).exists()

    def _check_rules(self, policy: Policy, out_shape: tuple[int, ...]) -> None:
        layer = self._layer
        item_shape = tuple(layer.item_shape)
        try:
            check_rules(
                policy,
                capacity=layer.capacity,
                residual=resolve_residual(layer.residual, item_shape=item_shape, out_shape=out_shape),
                weight_on=layer.weight_on,
                item_shape=item_shape,
                out_shape=out_shape,
            )
        except ConfigError as exc:
            self._mistakes.add(exc, prefix=f"{self._key}.")
