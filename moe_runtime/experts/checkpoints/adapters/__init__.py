"""Families whose experts transformers does not decorate, one adapter each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_runtime.experts.checkpoints.families import Family

ADAPTERS: tuple[Family, ...] = ()
