"""What can go wrong in a benchmark that is nobody's bug."""

from moe_runtime.errors import MoERuntimeError


class BenchError(MoERuntimeError):
    """A benchmark that cannot run as asked, or whose contenders disagree; the message says what to do."""
