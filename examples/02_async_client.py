"""Sixteen requests at once over asyncio; the router joins what arrives together into one batch.

Run: python examples/02_async_client.py
"""

import asyncio

import numpy as np

import moe_runtime as moe

CONFIG = {
    "name": "example-02",
    "layers": {
        "mlp": {
            "item_shape": [32],
            "policy": {"kind": "switch"},
            "experts": [{"kind": "swiglu", "count": 4}],
        }
    },
    "router": {"address": "127.0.0.1:0", "max_wait_ms": 5.0},
}


async def call_together(address: str, num_requests: int) -> list[moe.ForwardResult]:
    rng = np.random.default_rng(0)
    requests = [rng.standard_normal((1 + i, 32), dtype=np.float32) for i in range(num_requests)]
    async with moe.AsyncMoEClient(address) as client:
        return await asyncio.gather(*(client.forward(rows, layer="mlp", timeout_s=5.0) for rows in requests))


def main() -> None:
    # Without Ray, experts and router are threads of this process: for notebooks, tests and small jobs.
    with moe.serve(CONFIG, ray=False) as runtime:
        results = asyncio.run(call_together(runtime.address, 16))
        num_tokens = sum(result.report.num_tokens for result in results)
        largest = max(size for result in results for size in result.report.batch_tokens)
        print(f"{len(results)} requests answered, {num_tokens} tokens")
        print(f"largest batch: {largest} tokens, of several requests: {largest > 16}")


if __name__ == "__main__":
    main()
