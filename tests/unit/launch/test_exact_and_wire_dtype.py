"""``exact`` gives the bits of one process; ``wire_dtype`` gives its rounding and no more. Served as threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import moe_runtime as moe
from fakes.alone import _one_thread  # noqa: F401  a fixture
from moe_runtime.config.load import load_config
from moe_runtime.experts.build import build_expert
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.router_process import build_routed_layer

WIDTH, NUM_EXPERTS, TOP_K = 64, 4, 2


def config(**layer: Any) -> dict[str, Any]:
    return {
        "name": "exactness",
        "device": "cpu",
        "router": {"address": "127.0.0.1:0", "max_batch_tokens": 64},
        "layers": {
            "layer": {
                "item_shape": [WIDTH],
                "policy": {"kind": "top_k", "k": TOP_K},
                "residual": "none",
                "timeout_ms": 20_000,
                "experts": [{"kind": "feed_forward", "count": NUM_EXPERTS, "options": {"hidden_features": 96}}],
                **layer,
            }
        },
    }


def in_one_process(tokens: torch.Tensor, served: dict[str, Any]) -> torch.Tensor:
    """The layer as anybody would write it: softmax, top-k, one product per expert, weights, sum over slots."""
    (layer,) = build_layers(load_config(served))
    with torch.inference_mode():
        probabilities = torch.softmax(build_routed_layer(layer).gate(tokens), dim=-1)
        scores, expert_ids = torch.topk(probabilities, TOP_K)
        weights = scores / scores.sum(dim=-1, keepdim=True)
        slots = torch.zeros(tokens.shape[0] * TOP_K, WIDTH)
        for expert_id, expert in enumerate(layer.experts):
            chosen = (expert_ids.reshape(-1) == expert_id).nonzero().squeeze(1)
            slots[chosen] = build_expert(expert.spec).module(tokens[chosen // TOP_K])
        return (slots * weights.reshape(-1, 1)).view(-1, TOP_K, WIDTH).sum(dim=1)


def random_tokens(num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.timeout(120)
def test_an_exact_layer_gives_the_bits_of_one_process_whatever_else_is_asked_of_it() -> None:
    served = config(exact=True, experts_per_actor=2, max_batches_in_flight=4)
    with moe.serve(served, ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        requests = [random_tokens(1 + 5 * number, number) for number in range(12)]
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(lambda tokens: client.forward(tokens, layer="layer"), requests))
        for tokens, result in zip(requests, results, strict=True):
            assert torch.equal(result.outputs, in_one_process(tokens, served))
            assert result.report.batch_tokens == (tokens.shape[0],)
        with pytest.raises(moe.RequestTooLargeError, match="one batch of at most 64 tokens, found 65"):
            client.forward(random_tokens(65, 0), layer="layer")


@pytest.mark.parametrize(("wire_dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_a_narrow_wire_rounds_rows_and_answers_stay_in_the_layers_dtype(wire_dtype: str, tolerance: float) -> None:
    served = config(wire_dtype=wire_dtype)
    tokens = random_tokens(48, 1)
    with moe.serve(served, ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        outputs = client.forward(tokens, layer="layer").outputs
        expected = in_one_process(tokens, served)
        assert outputs.dtype == torch.float32
        assert not torch.equal(outputs, expected)
        torch.testing.assert_close(outputs, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_token_beyond_the_wires_range_is_refused_instead_of_becoming_infinite() -> None:
    tokens = random_tokens(2, 1)
    tokens[1, 3] = 1e5
    with moe.serve(config(wire_dtype="float16"), ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        with pytest.raises(moe.NonFiniteError, match="range of wire_dtype float16, 65504, found 100000"):
            client.forward(tokens, layer="layer")
        assert client.forward(tokens[:1], layer="layer").report.num_dropped_failure == 0
