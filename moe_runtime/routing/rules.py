"""Which combinations of a layer's routing rules make sense; called once, when a layer is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.config.models import CapacityConfig, ResidualRule, WeightOn
    from moe_runtime.routing.policy import Policy


def resolve_residual(
    residual: ResidualRule | None, *, item_shape: Sequence[int], out_shape: Sequence[int]
) -> ResidualRule:
    """The residual rule of a layer: as configured, else ``passthrough`` where shapes agree, else ``none``."""
    if residual is not None:
        return residual
    return "passthrough" if tuple(item_shape) == tuple(out_shape) else "none"


def check_rules(
    policy: Policy, *, capacity: CapacityConfig, residual: ResidualRule, weight_on: WeightOn,
    item_shape: Sequence[int], out_shape: Sequence[int],
) -> None:  # fmt: skip
    """Refuse rules that contradict each other, before anything is served.

    Args:
        policy: The layer's policy.
        capacity: The layer's ``capacity`` block.
        residual: The layer's residual rule, resolved.
        weight_on: Where weights are applied.
        item_shape: Shape of one token.
        out_shape: Shape of one output row.

    Raises:
        ConfigError: With one line per mistake, each beginning with the key within the layer.
    """
    mistakes = []
    if policy.sets_capacity and capacity.factor is not None:
        mistakes.append(
            f"capacity.factor: expected null, found {capacity.factor:g}: the policy itself decides how many tokens an "
            "expert takes"
        )
    if capacity.overflow == "reroute" and not policy.can_reroute:
        mistakes.append(
            "capacity.overflow: expected drop, found reroute: the policy has no scores for experts that a "
            "token did not select"
        )
    if weight_on == "input" and policy.weight_rule.normalize == "after_drop":
        mistakes.append(
            "weight_on: expected output, found input: with normalize after_drop a weight is only known when "
            "the experts have answered"
        )
    if residual != "none" and tuple(item_shape) != tuple(out_shape):
        mistakes.append(
            f"residual: expected none, found {residual}: tokens have shape {list(item_shape)}, outputs "
            f"{list(out_shape)}"
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
