"""Families whose experts transformers does not decorate, one adapter each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.experts.checkpoints.adapters.dbrx import DbrxFamily
from moe_runtime.experts.checkpoints.adapters.jetmoe import JetMoeFamily
from moe_runtime.experts.checkpoints.adapters.llama4 import Llama4Family
from moe_runtime.experts.checkpoints.adapters.longcat_flash import LongcatFlashFamily
from moe_runtime.experts.checkpoints.adapters.step3p7 import Step3p7Family
from moe_runtime.experts.checkpoints.adapters.switch_transformers import SwitchTransformersFamily

if TYPE_CHECKING:
    from moe_runtime.experts.checkpoints.families import Family

ADAPTERS: tuple[Family, ...] = (
    DbrxFamily(),
    JetMoeFamily(),
    Llama4Family(),
    LongcatFlashFamily(),
    Step3p7Family(),
    SwitchTransformersFamily(),
)
