"""The configuration of what keeps experts balanced: auxiliary losses, and the bias that moves while serving."""

from __future__ import annotations

from pydantic import Field

from moe_runtime.config.strict import MAX_COUNT, MAX_SECONDS, StrictModel

_MAX_COEFFICIENT = 1e6


class LossesConfig(StrictModel):
    """Coefficients of the auxiliary losses that training adds to its own; 0 leaves one out."""

    load_balancing: float = Field(0.0, ge=0, le=_MAX_COEFFICIENT, description="Switch Transformers; usually 1e-2.")
    importance: float = Field(0.0, ge=0, le=_MAX_COEFFICIENT, description="Shazeer et al. 2017; usually 1e-2.")
    load: float = Field(
        0.0, ge=0, le=_MAX_COEFFICIENT, description="Shazeer et al. 2017; needs a noisy gate; usually 1e-2."
    )
    z: float = Field(0.0, ge=0, le=_MAX_COEFFICIENT, description="ST-MoE's on large logits; usually 1e-3.")
    sequence: float = Field(0.0, ge=0, le=_MAX_COEFFICIENT, description="DeepSeek-V3's per sequence; usually 1e-4.")
    entropy: float = Field(
        0.0, ge=0, le=_MAX_COEFFICIENT, description="Rewards gates that are unsure, of `reinforce` for instance."
    )
    mutual_information: float = Field(
        0.0, ge=0, le=_MAX_COEFFICIENT, description="Rewards experts that tell the tasks apart; for multi-task gates."
    )


class BalanceConfig(StrictModel):
    """The selection bias of `expert_bias`, moved while serving by the loads of all routers."""

    online_bias: bool = Field(False, description="Whether it moves while serving.")
    rate: float = Field(1e-3, gt=0, le=1, description="By how much in one step.")
    interval_s: float = Field(10.0, ge=0.1, le=MAX_SECONDS, description="Time between steps.")
    min_assignments: int = Field(
        1024, ge=1, le=MAX_COUNT, description="Steps are made of at least so many assignments."
    )
