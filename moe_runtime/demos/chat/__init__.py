"""``moe-runtime demo chat``: a real language model whose experts live in Ray actors answers in the terminal."""

from moe_runtime.demos.chat.demo import run
from moe_runtime.demos.chat.result import ChatResult
from moe_runtime.demos.chat.settings import ChatSettings, Sampling

__all__ = ["ChatResult", "ChatSettings", "Sampling", "run"]
