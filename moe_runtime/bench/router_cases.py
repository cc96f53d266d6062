"""The routers that are compared: a policy's block for any number of experts, and how its gate scores them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from moe_runtime.config.policies import PolicyConfig
from moe_runtime.routing.policies.build import build_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from moe_runtime.routing.policy import Policy


@dataclass(frozen=True)
class RouterCase:
    """One router.

    Attributes:
        name: The policy's kind, and what is special.
        block: The policy's block of the configuration, for a number of experts.
        arrange: From router logits of all experts ``(num_tokens, num_experts)`` and the number of groups to those
            that the policy's own gate gives.
        training: Whether it routes as in training.
    """

    name: str
    block: Callable[[int], Mapping[str, Any]]
    arrange: Callable[[Tensor, int], Tensor] = lambda logits, _: logits
    training: bool = False

    @property
    def kind(self) -> str:
        """The policy's kind."""
        return str(self.block(8)["kind"])

    def policy(self, num_experts: int) -> Policy:
        """The policy, for so many experts."""
        return build_policy(_adapter().validate_python(dict(self.block(num_experts))), num_experts=num_experts)

    def logits(self, logits: Tensor) -> Tensor:
        """What the policy's gate gives where an ordinary one would give these logits."""
        return self.arrange(logits, num_groups(logits.shape[1]))


def num_groups(num_experts: int) -> int:
    """Groups of the policies that have some: 8 as in DeepSeek-V3, 4 of few experts."""
    return 8 if num_experts >= 64 else 4


@cache
def _adapter() -> TypeAdapter[PolicyConfig]:
    return TypeAdapter(PolicyConfig)


def _tree(logits: Tensor, count: int) -> Tensor:
    """Groups, then experts: the two softmaxes multiply to the one over all experts."""
    return torch.cat([logits.reshape(len(logits), count, -1).logsumexp(-1), logits], dim=1)


def _shared_first(logits: Tensor, _: int) -> Tensor:
    """The shared expert, the best of the others for all of them, then each: it is taken where it is the best."""
    return torch.cat([logits[:, :1], logits[:, 1:].amax(1, keepdim=True), logits[:, 1:]], dim=1)


def _none(logits: Tensor, _: int) -> Tensor:
    """Nothing, since no gate is asked."""
    return logits[:, :0]


def _kind(kind: str, **options: Any) -> Callable[[int], Mapping[str, Any]]:
    return lambda _: {"kind": kind, **options}


def _in_groups(num_experts: int) -> Mapping[str, Any]:
    count = num_groups(num_experts)
    return {"kind": "top_k", "k": 2, "groups": {"count": count, "keep": count // 2}}


def _in_tree(num_experts: int) -> Mapping[str, Any]:
    return {"kind": "hierarchical", "mode": "tree", "num_groups": num_groups(num_experts)}


ROUTERS = (
    RouterCase("dense", _kind("dense")),
    RouterCase("top_k", _kind("top_k", k=2)),
    RouterCase("top_k, bias", _kind("top_k", k=2, score="sigmoid", expert_bias=True)),
    RouterCase("top_k, groups", _in_groups),
    RouterCase("switch", _kind("switch")),
    RouterCase("gshard_top2", _kind("gshard_top2")),
    RouterCase("gshard_top2, training", _kind("gshard_top2"), training=True),
    RouterCase("sparsemixer", _kind("sparsemixer")),
    RouterCase("hierarchical, tree", _in_tree, arrange=_tree),
    RouterCase("hierarchical, shared_first", _kind("hierarchical", mode="shared_first"), arrange=_shared_first),
    RouterCase("expert_choice", _kind("expert_choice")),
    RouterCase("global_assignment", _kind("global_assignment")),
    RouterCase("global_assignment, training", _kind("global_assignment"), training=True),
    RouterCase("sinkhorn, training", _kind("sinkhorn"), training=True),
    RouterCase("hash", _kind("hash"), arrange=_none),
    RouterCase("random", _kind("random"), arrange=_none),
    RouterCase("round_robin", _kind("round_robin"), arrange=_none),
    RouterCase("reinforce, training", _kind("reinforce"), training=True),
)
