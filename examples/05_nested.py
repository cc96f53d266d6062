"""A layer whose experts are layers: one of the same runtime, and one of another runtime.

Run: python examples/05_nested.py
"""

import numpy as np

import moe_runtime as moe

FEED_FORWARD = {"kind": "feed_forward", "count": 3, "options": {"hidden_features": 32, "out_features": 10}}

# Another runtime, which could be on another cluster.
FAR = {
    "name": "example-05-far",
    "layers": {"far": {"item_shape": [16], "policy": {"kind": "switch"}, "experts": [FEED_FORWARD]}},
    "router": {"address": "127.0.0.1:0"},
}


def near(far_address: str) -> dict:
    """A layer of three experts, of which one is the layer ``inner``, with experts of its own, and one is far."""
    return {
        "name": "example-05",
        "layers": {
            "outer": {
                "item_shape": [16],
                "policy": {"kind": "dense"},
                "experts": [
                    {"kind": "feed_forward", "options": {"hidden_features": 32, "out_features": 10}},
                    {"kind": "moe", "name": "near", "options": {"layer": "inner"}},
                    {
                        "kind": "remote",
                        "name": "far",
                        # Stated, so that the configuration can be checked before the other runtime is there.
                        "options": {"target": far_address, "layer": "far", "out_shape": [10]},
                    },
                ],
            },
            "inner": {"item_shape": [16], "policy": {"kind": "top_k", "k": 2}, "experts": [FEED_FORWARD]},
        },
        "router": {"address": "127.0.0.1:0"},
    }


def main() -> None:
    tokens = np.random.default_rng(0).standard_normal((8, 16), dtype=np.float32)

    with (
        moe.serve(FAR, ray=False) as far,
        moe.serve(near(far.address), ray=False) as runtime,
        moe.MoEClient(runtime.address) as client,
    ):
        result = client.forward(tokens, layer="outer", timeout_s=5.0)
        print(f"outputs: {result.outputs.shape}, {result.report.num_served} of 24 assignments served")
        for expert in client.describe()["layers"]["outer"]["experts"]:
            version = expert["replicas"][0]["weights_version"].replace(far.address, "FAR")
            print(f"{expert['name']}: {version}")

        # The other runtime goes away: that is one expert's failure.
        far.close()
        report = client.forward(tokens, layer="outer", timeout_s=5.0).report
        print(f"without the far one: {report.num_served} of 24 assignments served")
        print(report.warnings[0])

    # Layers that contain themselves are refused before anything starts.
    config = near("127.0.0.1:50051")
    config["layers"]["inner"]["experts"].append({"kind": "moe", "options": {"layer": "outer"}})
    try:
        moe.serve(config, ray=False)
    except moe.ConfigError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
