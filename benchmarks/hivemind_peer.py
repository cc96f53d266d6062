"""Times hivemind's remote experts; runs in a virtual environment of its own (`make bench-peers`).

Started by the suite `peers`, which writes one JSON object per line to its standard input and reads one per line from
its standard output: first `{"ready": true}`, then, for each `{"kind": "gated" | "direct", "tokens": PATH, "calls": n}`,
`{"times_s": [...], "outputs": PATH}`. It ends when its input does.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from hivemind.dht import DHT
from hivemind.moe import RemoteExpert, RemoteMixtureOfExperts, get_experts
from hivemind.moe.server import background_server

PREFIX = "expert."
# Processes that take requests; the default, eight per expert, would only wait for each other on a few cores.
NUM_HANDLERS = 4
MODULE = Path(__file__).with_name("hivemind_experts.py")


def main(folder: Path) -> None:
    """Serve the experts whose weights lie in a folder, and time calls to them."""
    # Nothing that a library prints may end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["MOE_BENCH_EXPERTS"] = str(folder)
    gate_weight = torch.from_numpy(np.load(folder / "gate.npy"))
    num_experts, in_features = gate_weight.shape
    uids = [f"{PREFIX}{i}" for i in range(num_experts)]
    with background_server(
        expert_uids=uids,
        expert_cls="bench_feed_forward",
        num_handlers=NUM_HANDLERS,
        hidden_dim=in_features,
        custom_module_path=str(MODULE),
        optim_cls=None,
        device="cpu",
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
    ) as server:
        dht = DHT(initial_peers=server.addrs, start=True, client_mode=True)
        gated = RemoteMixtureOfExperts(
            in_features=in_features, grid_size=(num_experts,), dht=dht, uid_prefix=PREFIX, k_best=2, k_min=2
        )
        gated.proj.weight.data, gated.proj.bias.data = gate_weight, torch.zeros(num_experts)
        direct = find_expert(dht, uids[0])
        serve({"gated": gated, "direct": direct}, answers)
        dht.shutdown()


def find_expert(dht: DHT, uid: str) -> RemoteExpert:
    """The remote expert of that name, as soon as its server has announced it."""
    deadline = time.monotonic() + 60
    while (expert := get_experts(dht, [uid])[0]) is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"{uid}: expected its server to announce it within 60 s")
        time.sleep(0.5)
    return expert


def serve(callables: dict, answers) -> None:
    """Answer commands until there are no more."""
    answer(answers, {"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        tokens = torch.from_numpy(np.load(command["tokens"]))
        call = callables[command["kind"]]
        times = []
        with torch.no_grad():
            for _ in range(command["calls"]):
                started = time.perf_counter()
                outputs = call(tokens)
                times.append(time.perf_counter() - started)
        np.save(command["outputs"], outputs.numpy())
        answer(answers, {"times_s": times})


def answer(answers, value: dict) -> None:
    """Write one answer."""
    print(json.dumps(value), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    try:
        main(Path(sys.argv[1]))
    finally:
        traceback.print_exc()
        # hivemind leaves processes behind, also when it is shut down in order.
        os.killpg(0, signal.SIGKILL)
