"""Suite `wire`: what each way of carrying rows costs beside the next plainer one, and how soon a lost host is known.

One engine, the same no-op experts and the same tokens; only the way between router and hosts differs. All ways of a
size take turns in one run.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.children import Child
from moe_runtime.bench.deployment import LAYER, layer_config, ray_cluster, recipe_of
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.faults import measure_faults
from moe_runtime.bench.hosts import NODE, hosts_of, serve_hosts, table_of
from moe_runtime.bench.library import LibraryLayer
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Contender, interleave, time_calls
from moe_runtime.bench.suite import Suite
from moe_runtime.bench.tokens import spread_evenly, tokens_for
from moe_runtime.bench.wire_error import NARROW, measure_errors
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.transport.zmq_router import ZmqTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from moe_runtime.bench.suite import BenchSettings
    from moe_runtime.config.models import DTypeName
    from moe_runtime.launch.recipes import HostSpec
    from moe_runtime.service.routing_table import RoutingTable
    from moe_runtime.transport.curve import Encryption

NUM_EXPERTS = 8
_SIZES, _QUICK_SIZES = (16, 64, 256, 1024), (16, 256)
#: Rounding to bfloat16's 8 bits of a sum of two weighted rows; float32 is checked as closely as `exchange` does.
_TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
_ERROR_KINDS = {
    "ffn": ("feed_forward", {"hidden_features": 4096, "bias": False}),
    "swiglu": ("swiglu", {"hidden_features": 2816}),
}


@dataclass(frozen=True)
class _Way:
    """One way of carrying rows.

    Attributes:
        name: For the peers' column.
        encryption: Of the hosts' tcp addresses.
        node: What the router calls its node.
        wire_dtype: Of the rows.
        shares_memory: Whether large rows may lie in shared memory, where both ends are on one node.
    """

    name: str
    encryption: Encryption = "none"
    node: str = "elsewhere"
    wire_dtype: DTypeName = "float32"
    shares_memory: bool = True


_CURVE, _TCP = _Way("tcp, curve", encryption="curve"), _Way("tcp, none")
_IPC = _Way("ipc, shared memory", node=NODE)
_IPC_FRAMES = _Way("ipc, no shared memory", node=NODE, shares_memory=False)
_NARROW_WAYS = tuple(_Way(f"tcp, {dtype}", wire_dtype=dtype) for dtype in NARROW)
_WAYS = (_CURVE, _TCP, _IPC, _IPC_FRAMES, *_NARROW_WAYS)


@dataclass(frozen=True)
class _Pair:
    """Two ways beside each other, and what the first one is about: a key of the case and its value."""

    key: str
    value: str
    ours: _Way
    theirs: _Way
    peer: str = ""


_PAIRS = (
    _Pair("encryption", "curve", _CURVE, _TCP),
    _Pair("encryption", "none", _TCP, _IPC),
    _Pair("shared_memory", "on", _IPC, _IPC_FRAMES),
    *(_Pair("wire_dtype", way.wire_dtype, way, _TCP, "tcp, float32") for way in _NARROW_WAYS),
)


def _run(settings: BenchSettings) -> Iterator[Row]:
    yield from _measure_ways(settings)
    settings.begin("Starting Ray")
    with ray_cluster():
        yield from measure_faults(settings)


def _measure_ways(settings: BenchSettings) -> Iterator[Row]:
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    starting = settings.begin("Starting 8 processes, each with a no-op expert on ipc, tcp and CURVE")
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(contextlib.closing(_Fleet()))
        errors = _errors(settings)
        layers = {way: stack.enter_context(contextlib.closing(fleet.open(way))) for way in _WAYS}
        starting.update(NUM_EXPERTS, NUM_EXPERTS)
        measuring = settings.begin("Exchanging rows in every way")
        for num_done, num_rows in enumerate(sizes, start=1):
            yield from _case(num_rows, layers, errors, settings=settings)
            measuring.update(num_done, len(sizes))


def _errors(settings: BenchSettings) -> dict[str, dict[str, float]]:
    """By ``wire_dtype``: the errors of real experts, in percent."""
    kinds = ["ffn"] if settings.quick else list(_ERROR_KINDS)
    stage = settings.begin("Measuring what a narrow wire rounds")
    figures: dict[str, dict[str, float]] = {dtype: {} for dtype in NARROW}
    for num_done, name in enumerate(kinds, start=1):
        kind, options = _ERROR_KINDS[name]
        for dtype, error in measure_errors(kind, options):
            figures[dtype] |= {f"{name}_rms_error_percent": error.rms, f"{name}_largest_error_percent": error.largest}
        stage.update(num_done, len(kinds))
    return figures


def _case(
    num_rows: int,
    layers: Mapping[_Way, LibraryLayer],
    errors: Mapping[str, Mapping[str, float]],
    *,
    settings: BenchSettings,
) -> Iterator[Row]:
    tokens = tokens_for(layers[_TCP].gate_weight, spread_evenly(num_rows, num_experts=NUM_EXPERTS))
    for way, layer in layers.items():
        _check(way, layer, tokens)
    samples = interleave(
        [Contender(way.name, _timer(layer, tokens)) for way, layer in layers.items()], effort=settings.effort
    )
    for pair in _PAIRS:
        yield Row(
            "wire",
            {"rows": num_rows, pair.key: pair.value},
            pair.peer or pair.theirs.name,
            samples[pair.ours.name],
            samples[pair.theirs.name],
            errors.get(pair.value, {}),
        )


def _timer(layer: LibraryLayer, tokens: Tensor) -> Callable[[int], list[float]]:
    return lambda num_calls: time_calls(lambda: layer.forward(tokens), num_calls)


def _check(way: _Way, layer: LibraryLayer, tokens: Tensor) -> None:
    """Identity experts whose weights sum to 1 give the tokens back, but for the wire's rounding."""
    outputs = layer.forward(tokens).outputs
    tolerance = _TOLERANCES[way.wire_dtype]
    if not torch.allclose(outputs, tokens, atol=tolerance, rtol=tolerance):
        raise BenchError(
            f"wire, {way.name}: expected identity experts to give back {len(tokens)} tokens, "
            f"found a difference of {float((outputs - tokens).abs().max()):.3g}"
        )


class _Fleet:
    """Eight processes, each the host of one expert: encrypted, and plain with a replica for each ``wire_dtype``."""

    def __init__(self) -> None:
        config = layer_config(num_experts=NUM_EXPERTS)
        self._layer = build_routed_layer(recipe_of(config))
        self._hosts = [(_encrypted(host), _plain(host)) for host in hosts_of(config)]
        self._children = [Child(serve_hosts, list(hosts), preload=[serve_hosts.__module__]) for hosts in self._hosts]
        self._tables: dict[str, RoutingTable] = {}

    def open(self, way: _Way) -> LibraryLayer:
        """An engine that reaches the experts in one way."""
        if not self._tables:
            self._wait_until_ready()
        limits = {} if way.shares_memory else {"max_shared_bytes": 0}
        transport = ZmqTransport(node=way.node, encryption=way.encryption, **limits)
        if transport.public_key is not None:
            for child in self._children:
                child.ask(transport.public_key)
        layer = replace(self._layer, name=_layer_name(way.wire_dtype), wire_dtype=getattr(torch, way.wire_dtype))
        return LibraryLayer(layer, self._tables[way.encryption], transport, node=way.node)

    def close(self) -> None:
        """End the processes, all at once."""
        for child in self._children:
            child.hang_up()
        for child in self._children:
            child.close()

    def _wait_until_ready(self) -> None:
        reports = [child.answer() for child in self._children]
        for i, encryption in enumerate(("curve", "none")):
            self._tables[encryption] = table_of([hosts[i] for hosts in self._hosts], [each[i] for each in reports])


def _encrypted(host: HostSpec) -> HostSpec:
    return replace(host, encryption="curve")


def _plain(host: HostSpec) -> HostSpec:
    """The host with a replica of its expert for each dtype of the wire, each in a layer of its own."""
    (hosted,) = host.experts
    experts = tuple(
        replace(
            hosted,
            replica_id=f"{hosted.replica_id}/{dtype}",
            spec=replace(hosted.spec, layer=_layer_name(dtype), wire_dtype=dtype),
        )
        for dtype in ("float32", *NARROW)
    )
    return replace(host, encryption="none", experts=experts)


def _layer_name(wire_dtype: str) -> str:
    return LAYER if wire_dtype == "float32" else f"{LAYER}-{wire_dtype}"


WIRE = Suite("wire", "encryption, narrow rows, shared memory: each way beside a plainer one; and lost hosts", _run)
