"""The suites by name, in the order in which they run."""

from moe_runtime.bench.exchange import EXCHANGE
from moe_runtime.bench.generating import TRANSFORMERS_SUITE
from moe_runtime.bench.layer import LAYER_SUITE
from moe_runtime.bench.peers import PEERS
from moe_runtime.bench.routers import ROUTERS_SUITE
from moe_runtime.bench.scale import SCALE
from moe_runtime.bench.service import SERVICE
from moe_runtime.bench.skew import SKEW
from moe_runtime.bench.wire import WIRE

_ALL = (EXCHANGE, LAYER_SUITE, PEERS, ROUTERS_SUITE, SERVICE, SCALE, SKEW, TRANSFORMERS_SUITE, WIRE)
SUITES = {suite.name: suite for suite in _ALL}
