"""The parts of a preset in the words of a table's cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from moe_runtime.config.presets.preset import Preset

_GATES = {"noisy": "noisy gate", "mlp": "mlp gate", "cosine": "cosine gate", "multi": "a gate per task"}
_DROPS = {"priority": "by priority", "score": "by score", "random": "at random"}


def policy_text(preset: Preset) -> str:
    """Its policy with the options that matter, its gate where that is not linear, and shared experts."""
    policy = preset.layer["policy"]
    parts = [policy["kind"]]
    if "k" in policy:
        parts.append(f"k = {policy['k']}")
    score = policy.get("score", "softmax")
    if score != "softmax":
        parts.append(score.replace("_", " "))
    if policy["kind"] == "top_k" and policy.get("normalize") == "none" and score in ("softmax", "sigmoid"):
        parts.append("not renormalised")
    if "groups" in policy:
        parts.append(f"{policy['groups']['keep']} of {policy['groups']['count']} groups")
    if policy.get("expert_bias"):
        parts.append("expert bias")
    gate = _GATES.get(preset.layer.get("gate", {}).get("kind"))
    return ", ".join([*parts, *([gate] if gate else []), *_shared(preset.layer)])


def experts_text(preset: Preset) -> str:
    """How many experts of which kind it has."""
    return ", ".join(f"{block.get('count', 1)} {block['kind']}" for block in preset.layer["experts"])


def capacity_text(preset: Preset) -> str:
    """Its capacity factor, and who is dropped where that is not by position; what the policy says where it decides."""
    policy = preset.layer["policy"]
    if "capacity_factor" in policy:
        return f"{policy['capacity_factor']}, of the policy"
    capacity = preset.layer.get("capacity", {})
    if capacity.get("factor") is None:
        return "dropless"
    drop = _DROPS.get(capacity.get("drop", "position"))
    return f"{capacity['factor']}, {drop}" if drop else str(capacity["factor"])


def losses_text(preset: Preset) -> str:
    """Its auxiliary losses with their coefficients."""
    losses = preset.layer.get("losses", {})
    return ", ".join(f"{name.replace('_', ' ')} {coefficient:g}" for name, coefficient in losses.items()) or "none"


def _shared(layer: Mapping[str, Any]) -> list[str]:
    num_shared = sum(block.get("count", 1) for block in layer.get("shared_experts", ()))
    if not num_shared:
        return []
    gated = "gated " if layer.get("shared_gate", "none") != "none" else ""
    return [f"{num_shared} {gated}shared"]
