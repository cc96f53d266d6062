"""``moe-runtime demo routers``: one batch of real images through every policy, over one pool of trained experts."""

from moe_runtime.demos.routers.demo import run
from moe_runtime.demos.routers.result import RoutersResult

__all__ = ["RoutersResult", "run"]
