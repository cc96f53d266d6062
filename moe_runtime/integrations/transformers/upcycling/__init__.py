"""Dense checkpoints made into mixtures of experts: each layer's MLP becomes several copies behind a gate."""

from moe_runtime.integrations.transformers.upcycling.checkpoint import open_dense, upcycle
from moe_runtime.integrations.transformers.upcycling.loading import load_dense
from moe_runtime.integrations.transformers.upcycling.options import Upcycling

__all__ = ["Upcycling", "load_dense", "open_dense", "upcycle"]
