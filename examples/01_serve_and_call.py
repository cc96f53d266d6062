"""Serve one layer of different experts on Ray, call it, and read the answer's report.

Run: python examples/01_serve_and_call.py
"""

import numpy as np

import moe_runtime as moe

CONFIG = {
    "name": "example-01",
    "layers": {
        "mixed": {
            "item_shape": [64],
            "policy": {"kind": "top_k", "k": 2},
            "capacity": {"factor": 1.25},
            "experts": [
                {"kind": "feed_forward", "options": {"hidden_features": 128, "out_features": 10}},
                {"kind": "conv", "view": {"shape": [1, 8, 8]}, "options": {"channels": 8, "out_features": 10}},
                {"kind": "recurrent", "view": {"shape": [8, 8]}, "options": {"out_features": 10}},
            ],
        }
    },
    "router": {"address": "127.0.0.1:0"},
}


def main() -> None:
    tokens = np.random.default_rng(0).standard_normal((32, 64), dtype=np.float32)

    # Joins a running Ray cluster where there is one; else Ray starts here, and ends with the runtime.
    with moe.serve(CONFIG) as runtime, moe.MoEClient(runtime.address) as client:
        for expert in client.describe()["layers"]["mixed"]["experts"]:
            [replica] = expert["replicas"]
            print(f"{expert['name']}: {replica['state']}, process {replica['pid']} on {replica['device']}")

        result = client.forward(tokens, layer="mixed", timeout_s=5.0, return_routing=True)
        report = result.report
        print(f"outputs: {result.outputs.shape} {result.outputs.dtype}")
        print(
            f"assignments: {report.num_assignments} asked for, {report.num_served} served, "
            f"{report.num_dropped_capacity} over capacity, {report.num_dropped_failure} failed"
        )
        print(f"token 0 asked experts {report.expert_ids[:2].tolist()}; weights {report.expert_weights[:2].round(3)}")
        print(f"in the router: {report.timings.total_ms:.1f} ms, of them in experts {report.timings.experts_ms:.1f} ms")


if __name__ == "__main__":
    main()
