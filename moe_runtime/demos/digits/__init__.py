"""``moe-runtime demo digits``: real images classified by five kinds of experts, each in its own Ray actor."""

from moe_runtime.demos.digits.demo import run
from moe_runtime.demos.digits.result import DigitsResult

__all__ = ["DigitsResult", "run"]
