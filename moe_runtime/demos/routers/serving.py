"""One runtime that is rolled from policy to policy while its five expert actors stay what they are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from moe_runtime.demos.digits.recipe import LAYER
from moe_runtime.demos.routers.policies import CAPACITY_FACTOR
from moe_runtime.experts.weights import save_weights
from moe_runtime.launch.runtime import serve, upgrade
from moe_runtime.rpc.client import MoEClient
from moe_runtime.wire.messages import RequestOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from moe_runtime.demos.digits.recipe import Recipe
    from moe_runtime.demos.routers.policies import DemoPolicy, PolicyGate, TrainedGate
    from moe_runtime.launch.served import Runtime
    from moe_runtime.wire.messages import ForwardResult

_NAME = "routers-demo"
#: Whatever is drawn at random is drawn from this, so that every run shows the same.
_SEED = 0
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Answer:
    """What one policy answered.

    Attributes:
        policy: Which one.
        result: Logits ``(num_images, 10)`` and the report, routing included.
        pids: Process id of each expert's host.
        rolling_s: Seconds that it took to get from the policy before to this one.
    """

    policy: DemoPolicy
    result: ForwardResult
    pids: tuple[int, ...]
    rolling_s: float


@dataclass(frozen=True)
class Served:
    """One policy, ready to be served.

    Attributes:
        policy: Which one.
        config: The whole configuration.
        gate: Its gate.
    """

    policy: DemoPolicy
    config: Mapping[str, Any]
    gate: PolicyGate


def prepare(
    policies: Sequence[DemoPolicy], gate: TrainedGate, *, recipe: Recipe, experts: Path, folder: Path
) -> list[Served]:
    """The configurations that serve the recipe's experts by each of the policies.

    Args:
        policies: Which.
        gate: The trained one.
        recipe: Of the trained layer.
        experts: Where the trained experts lie.
        folder: Where the policies' gates are put.
    """
    served = []
    for number, policy in enumerate(policies):
        own = policy.gate(gate)
        path = folder / f"gate-{number}.safetensors"
        if own.tensors:
            save_weights(path, own.tensors, {"policy": policy.name})
        served.append(Served(policy, _config(policy, own, path, recipe=recipe, experts=experts), own))
    return served


def _config(policy: DemoPolicy, gate: PolicyGate, path: Path, *, recipe: Recipe, experts: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(recipe.config_text)
    layer = config["layers"][LAYER]
    gate_block: dict[str, Any] = {"kind": "linear"}
    if gate.tensors:
        gate_block = {**gate_block, "weights": str(path), "in_features": gate.tensors["weight"].shape[1]}
    layer = {
        **layer,
        "gate": gate_block,
        "policy": dict(policy.block),
        "capacity": {"factor": None if policy.sets_capacity else CAPACITY_FACTOR},
        "experts": [{**expert, "weights": str(experts / expert["weights"])} for expert in layer["experts"]],
    }
    router = {**config["router"], "address": "127.0.0.1:0"}
    return {**config, "name": _NAME, "router": router, "layers": {LAYER: layer}}


def answers(
    served: Sequence[Served], pixels: Tensor, *, logits: Tensor, ray: bool, on_start: Callable[[int, int], None]
) -> Iterator[Answer]:
    """What each policy answers to one request of all images.

    On Ray the runtime starts once, and is upgraded from policy to policy; its actors stay. Without, it starts anew.

    Args:
        served: The policies.
        pixels: The images, ``(num_images, 64)``.
        logits: The trained gate's of them.
        ray: Whether experts and router are Ray actors; otherwise they are threads of this process.
        on_start: Called with the number of actors that are ready, and of all.
    """
    if not ray:
        for each in served:
            started = time.perf_counter()
            with serve(each.config, ray=False, on_progress=on_start) as runtime:
                rolling_s = time.perf_counter() - started
                yield _answer(runtime, each, pixels, logits=logits, rolling_s=rolling_s)
        return
    with serve(served[0].config, on_progress=on_start) as runtime:
        for each in served:
            started = time.perf_counter()
            upgrade(each.config)
            rolling_s = time.perf_counter() - started
            yield _answer(runtime, each, pixels, logits=logits, rolling_s=rolling_s)


def _answer(runtime: Runtime, served: Served, pixels: Tensor, *, logits: Tensor, rolling_s: float) -> Answer:
    inputs = served.gate.inputs
    options: RequestOptions[Tensor] = RequestOptions(
        gate_input=None if inputs is None else inputs(logits), seed=_SEED, isolated=True
    )
    with MoEClient(runtime.address) as client:
        result = client.forward(pixels, layer=LAYER, options=options, timeout_s=_TIMEOUT_S, return_routing=True)
        experts = client.describe()["layers"][LAYER]["experts"]
    return Answer(served.policy, result, tuple(expert["replicas"][0]["pid"] for expert in experts), rolling_s)
