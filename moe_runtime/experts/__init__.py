"""The experts: what one is, how a config block becomes a module with its weights, and who runs it."""

from moe_runtime.experts.protocol import ExpertContract, ExpertKind

__all__ = ["ExpertContract", "ExpertKind"]
