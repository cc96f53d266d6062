"""The layer in one process, as others compute it: Hugging Face's Mixtral block, and a plain torch loop.

Runs in a process of its own, so that its threads neither wait for the runtime's nor hinder them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.bench.children import Child
from moe_runtime.bench.library import gate_weight
from moe_runtime.experts.build import build_expert
from moe_runtime.launch.router_process import build_routed_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from moe_runtime.experts.spec import ExpertSpec
    from moe_runtime.launch.recipes import LayerRecipe

Implementation = Literal["grouped_mm", "eager", "torch loop"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("grouped_mm", "eager", "torch loop")


@dataclass(frozen=True)
class _Routing:
    """Top-k of a linear gate: softmax over all experts, divided by the sum of those chosen, as in Mixtral."""

    gate_weight: Tensor
    k: int

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and weights, each ``(num_tokens, k)``."""
        probabilities = F.linear(tokens, self.gate_weight).softmax(dim=-1)
        weights, expert_ids = probabilities.topk(self.k, dim=-1)
        return expert_ids, weights / weights.sum(dim=-1, keepdim=True)


class InProcessLayer:
    """The peer's process, seen from ours."""

    def __init__(self, recipe: LayerRecipe, *, k: int = 2) -> None:
        """Start the process, which builds the same experts and the same gate."""
        weight = gate_weight(build_routed_layer(recipe)).detach().numpy()
        self.child = Child(serve_in_process, [expert.spec for expert in recipe.experts], weight, k)

    def wait_until_ready(self) -> None:
        """Return as soon as it computes."""
        self.child.answer()

    def set_tokens(self, tokens: Tensor) -> None:
        """Use these tokens from now on."""
        self.child.ask("tokens", tokens.numpy())

    def outputs(self, implementation: Implementation) -> Tensor:
        """What an implementation makes of the tokens."""
        return torch.from_numpy(self.child.ask("outputs", implementation))

    def time_calls(self, implementation: Implementation, num_threads: int, num_calls: int) -> Sequence[float]:
        """Seconds of each of some forwards of the tokens."""
        times: Sequence[float] = self.child.ask("time", implementation, num_threads, num_calls)
        return times

    def close(self) -> None:
        """End the process."""
        self.child.close()


def serve_in_process(connection: Connection, specs: list[ExpertSpec], weight: NDArray[np.float32], k: int) -> None:
    """Compute the layer as it is asked to, until the parent closes the connection."""
    routing = _Routing(torch.from_numpy(weight), k)
    modules = [build_expert(spec, device="cpu").module for spec in specs]
    layers = _layers(specs[0], modules, routing)
    tokens = torch.empty(0)
    connection.send(None)
    with torch.inference_mode():
        while True:
            command, *arguments = connection.recv()
            if command == "tokens":
                tokens = torch.from_numpy(arguments[0])
                connection.send(None)
            elif command == "outputs":
                connection.send(layers[arguments[0]](tokens).numpy())
            else:
                name, num_threads, num_calls = arguments
                connection.send(_time(layers[name], tokens, num_threads=num_threads, num_calls=num_calls))


def _time(layer: Callable[[Tensor], Tensor], tokens: Tensor, *, num_threads: int, num_calls: int) -> list[float]:
    torch.set_num_threads(num_threads)
    times = []
    for _ in range(num_calls):
        started = time.perf_counter()
        layer(tokens)
        times.append(time.perf_counter() - started)
    return times


def _layers(spec: ExpertSpec, modules: Sequence[nn.Module], routing: _Routing) -> dict[str, Callable[[Tensor], Tensor]]:
    from moe_runtime.experts.checkpoints.internals import choose_experts

    make = {"swiglu": _mixtral_experts, "feed_forward": _plain_experts}[spec.kind]
    experts, config = make(modules)

    def hugging_face(implementation: str) -> Callable[[Tensor], Tensor]:
        def layer(tokens: Tensor) -> Tensor:
            choose_experts(config, implementation)
            outputs: Tensor = experts(tokens, *routing(tokens))
            return outputs

        return layer

    return {
        "grouped_mm": hugging_face("grouped_mm"),
        "eager": hugging_face("eager"),
        "torch loop": lambda tokens: _loop(tokens, modules, routing),
    }


def _loop(tokens: Tensor, modules: Sequence[nn.Module], routing: _Routing) -> Tensor:
    expert_ids, weights = routing(tokens)
    outputs = torch.zeros_like(tokens)
    for expert_id, module in enumerate(modules):
        token_ids, slots = torch.where(expert_ids == expert_id)
        if token_ids.numel():
            outputs.index_add_(0, token_ids, module(tokens[token_ids]) * weights[token_ids, slots, None])
    return outputs


def _mixtral_experts(modules: Sequence[Any]) -> tuple[nn.Module, Any]:
    """Mixtral's experts with the weights of some SwiGLU modules."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    hidden_features, in_features = modules[0].gate.weight.shape
    config = MixtralConfig(
        num_local_experts=len(modules), hidden_size=in_features, intermediate_size=hidden_features, hidden_act="silu"
    )
    experts = MixtralExperts(config)
    experts.gate_up_proj = _stacked([torch.cat([m.gate.weight, m.up.weight]) for m in modules])
    experts.down_proj = _stacked([module.down.weight for module in modules])
    return experts, config


def _plain_experts(modules: Sequence[Any]) -> tuple[nn.Module, Any]:
    """The library's experts without a gate projection, those of Nemotron-H, with some feed-forward weights."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    hidden_features, in_features = modules[0].up.weight.shape
    config = NemotronHConfig(
        n_routed_experts=len(modules),
        hidden_size=in_features,
        moe_intermediate_size=hidden_features,
        mlp_hidden_act="relu",
    )
    experts = NemotronHExperts(config)
    experts.up_proj = _stacked([module.up.weight for module in modules])
    experts.down_proj = _stacked([module.down.weight for module in modules])
    return experts, config


def _stacked(weights: Sequence[Tensor]) -> nn.Parameter:
    return torch.nn.Parameter(torch.stack([weight.detach() for weight in weights]), requires_grad=False)
