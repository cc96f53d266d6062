"""Kill an expert's process while it serves: requests go on without it, and it comes back.

Run: python examples/04_failures.py
"""

import os
import signal
import time

import numpy as np

import moe_runtime as moe

CONFIG = {
    "name": "example-04",
    "layers": {
        "mlp": {
            "item_shape": [16],
            "policy": {"kind": "dense"},
            "residual": "passthrough",
            "timeout_ms": 500,
            "experts": [{"kind": "feed_forward", "name": "mlp", "count": 3}],
        }
    },
    "router": {"address": "127.0.0.1:0"},
}
DEADLINE_S = 20.0


def main() -> None:
    tokens = np.ones((8, 16), np.float32)
    with moe.serve(CONFIG) as runtime, moe.MoEClient(runtime.address) as client:

        def failed_assignments() -> int:
            return client.forward(tokens, layer="mlp", timeout_s=5.0).report.num_dropped_failure

        print(f"three experts: {failed_assignments()} of 24 assignments failed")

        [replica] = client.describe()["layers"]["mlp"]["experts"][1]["replicas"]
        os.kill(replica["pid"], signal.SIGKILL)
        print(f"killed mlp-1: {failed_assignments()} of 24 assignments failed, the other 16 were answered")

        end = time.monotonic() + DEADLINE_S
        while failed_assignments() and time.monotonic() < end:
            time.sleep(0.2)
        print(f"restarted: {failed_assignments()} of 24 assignments failed")

    # A request that is wrong is refused with an error of its own type, and harms nobody else.
    with moe.serve(CONFIG, ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        for rows in (tokens[:, :3], tokens.astype(np.float64), np.full_like(tokens, np.nan)):
            try:
                client.forward(rows, layer="mlp", timeout_s=5.0)
            except moe.InvalidRequestError as error:
                print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
