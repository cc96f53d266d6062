"""The suites by name."""

from moe_runtime.bench.exchange import EXCHANGE
from moe_runtime.bench.layer import LAYER_SUITE

SUITES = {suite.name: suite for suite in (EXCHANGE, LAYER_SUITE)}
