"""One plot per kind of policy: how the tokens of a skewed batch spread over its experts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.bench.plots import save_figure
from moe_runtime.bench.router import CAPACITY_FACTOR, build_router
from moe_runtime.bench.router_batches import NUM_TOKENS, make_batch
from moe_runtime.bench.router_cases import ROUTERS
from moe_runtime.bench.shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moe_runtime.bench.router_cases import RouterCase

#: Zipf: every expert is wanted by somebody, and the first far more than the last.
SHAPE = SHAPES[2]
NUM_EXPERTS = 64
_SERVED, _DROPPED, _LINE = "#3b7dd8", "#e0894a", "#808080"


@dataclass(frozen=True)
class SpreadOfTokens:
    """What became of the assignments of one batch, by expert.

    Attributes:
        admitted: Those that found a place, one number per expert.
        dropped: Those that did not.
        capacity: Places per expert; None where there is no such number.
    """

    admitted: tuple[int, ...]
    dropped: tuple[int, ...]
    capacity: int | None


@torch.inference_mode()
def spread_of_tokens(case: RouterCase) -> SpreadOfTokens:
    """What a router makes of one batch of 4,096 tokens that want experts by Zipf's law."""
    batch = make_batch(SHAPE, 0, num_experts=NUM_EXPERTS)
    admission = build_router(case, SHAPE, num_experts=NUM_EXPERTS).admit(case.logits(batch.logits), batch.info)
    asked = admission.assignments.expert_ids
    admitted = torch.bincount(asked[admission.admitted], minlength=NUM_EXPERTS)
    dropped = torch.bincount(asked, minlength=NUM_EXPERTS) - admitted
    return SpreadOfTokens(tuple(admitted.tolist()), tuple(dropped.tolist()), admission.capacity)


def plot_routers(folder: Path, cases: Sequence[RouterCase] = ROUTERS) -> list[Path]:
    """Draw ``routers-<kind>.svg`` for every kind of policy, with a panel per case of that kind.

    Args:
        folder: Where to.
        cases: Of which routers.

    Returns:
        The files, in the order of the cases.

    Raises:
        BenchError: If matplotlib is not installed.
    """
    kinds: dict[str, list[RouterCase]] = defaultdict(list)
    for case in cases:
        kinds[case.kind].append(case)
    paths = []
    for kind, members in kinds.items():
        path = folder / f"routers-{kind}.svg"
        with save_figure(path, num_panels=len(members), height=2.6) as axes:
            for axis, case in zip(axes, members, strict=True):
                _draw(axis, spread_of_tokens(case), title=case.name)
            axes[0].set_ylabel("assignments")
        paths.append(path)
    return paths


def _draw(axis: Any, spread: SpreadOfTokens, *, title: str) -> None:
    asked = [sum(pair) for pair in zip(spread.admitted, spread.dropped, strict=True)]
    axis.stairs(spread.admitted, fill=True, color=_SERVED, label="served")
    if any(spread.dropped):
        axis.stairs(asked, baseline=spread.admitted, fill=True, color=_DROPPED, label="dropped")
    mean = sum(asked) / NUM_EXPERTS
    axis.axhline(mean, color=_LINE, linewidth=0.9, label="mean load")
    if spread.capacity is not None and spread.capacity < NUM_TOKENS:
        axis.axhline(spread.capacity, color=_LINE, linewidth=0.9, linestyle="--", label=f"capacity {CAPACITY_FACTOR}")
    axis.set(title=title, xlabel=f"expert of {NUM_EXPERTS}", xlim=(0, NUM_EXPERTS))
    axis.legend(fontsize=7)
