"""Use a kind of expert that a plug-in brings, beside a built-in one.

The plug-in is the package in examples/custom_expert; `make venv` installs it.
Run: python examples/03_custom_expert.py
"""

import numpy as np

import moe_runtime as moe


def config(**options: object) -> dict[str, object]:
    return {
        "name": "example-03",
        "plug_ins": ["moe-runtime-example-expert"],
        "layers": {
            "mixed": {
                "item_shape": [16],
                "policy": {"kind": "dense"},
                "experts": [
                    {"kind": "fourier", "options": {"out_features": 4, **options}},
                    {"kind": "feed_forward", "options": {"out_features": 4}},
                ],
            }
        },
        "router": {"address": "127.0.0.1:0"},
    }


def main() -> None:
    # The plug-in's options are checked before anything starts, as those of the built-in kinds are.
    try:
        moe.serve(config(num_featurs=64), ray=False)
    except moe.ConfigError as error:
        print(f"refused: {error}")

    with moe.serve(config(num_features=64), ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        kinds = [expert["kind"] for expert in client.describe()["layers"]["mixed"]["experts"]]
        result = client.forward(np.ones((5, 16), np.float32), layer="mixed", timeout_s=5.0)
        print(f"served by {' and '.join(kinds)}: {result.outputs.shape}")


if __name__ == "__main__":
    main()
