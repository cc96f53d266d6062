"""Suite `peers`: hivemind's remote experts, in an environment and processes of their own, beside the runtime's."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from moe_runtime.bench.deployment import deploy, layer_config, library_layer, ray_cluster, recipe_of
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.library import gate_weight
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Contender, interleave, time_calls
from moe_runtime.bench.suite import Suite
from moe_runtime.bench.tokens import spread_evenly, tokens_for
from moe_runtime.experts.build import build_expert
from moe_runtime.launch.router_process import build_routed_layer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from moe_runtime.bench.library import LibraryLayer
    from moe_runtime.bench.suite import BenchSettings
    from moe_runtime.launch.recipes import LayerRecipe

Kind = Literal["gated", "direct"]

_PYTHON_VARIABLE = "MOE_BENCH_HIVEMIND_PYTHON"
_REPOSITORY = Path(__file__).parents[2]
_SCRIPT = _REPOSITORY / "benchmarks" / "hivemind_peer.py"
_DEFAULT_PYTHON = _REPOSITORY / ".venv-hivemind" / "bin" / "python"
_HIDDEN_FEATURES = {"ffn": 4096, "small": 64}
_NUM_EXPERTS = 8
_GATED_SIZES, _QUICK_GATED_SIZES = (1, 16, 64), (16,)
_DIRECT_SIZES, _QUICK_DIRECT_SIZES = (1, 64, 256), (256,)
_PEER_NAMES = {"gated": "hivemind RemoteMixtureOfExperts", "direct": "hivemind RemoteExpert"}
_TOLERANCE = 1e-3
_ANSWER_WITHIN_S, _END_WITHIN_S = 120.0, 10.0


class HivemindPeer:
    """hivemind's server and client, as processes of their environment; used by one thread."""

    def __init__(self, experts: Path, *, python: Path) -> None:
        """Begin to serve the experts whose weights lie in a folder."""
        self._folder = experts
        self._log = (experts / "log").open("w")
        self._process = subprocess.Popen(
            [python, _SCRIPT, experts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": ""},
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        """Return as soon as it serves.

        Raises:
            BenchError: If it does not start.
        """
        self._answer()

    def time_calls(self, kind: Kind, num_calls: int) -> Sequence[float]:
        """Seconds of each of some calls with the tokens that were set."""
        command = {"kind": kind, "tokens": str(self._tokens), "outputs": str(self._outputs), "calls": num_calls}
        try:
            print(json.dumps(command), file=self._stdin, flush=True)
        except BrokenPipeError as exc:
            raise BenchError(f"hivemind has ended: {self._last_words()}") from exc
        times: Sequence[float] = self._answer()["times_s"]
        return times

    def set_tokens(self, tokens: Tensor) -> None:
        """Use these tokens from now on."""
        np.save(self._tokens, tokens.numpy())

    def outputs(self) -> Tensor:
        """What the last call gave."""
        return torch.from_numpy(np.load(self._outputs))

    def close(self) -> None:
        """End it; it ends its own processes."""
        self._stdin.close()
        try:
            self._process.wait(timeout=_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    @property
    def _tokens(self) -> Path:
        return self._folder / "tokens.npy"

    @property
    def _outputs(self) -> Path:
        return self._folder / "outputs.npy"

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        readable, _, _ = select.select([stdout.fileno()] if stdout else [], [], [], _ANSWER_WITHIN_S)
        line = stdout.readline() if stdout is not None and readable else ""
        if not line:
            state = "has ended" if readable else f"has not answered within {_ANSWER_WITHIN_S:g} s"
            raise BenchError(f"hivemind {state}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        lines = (self._folder / "log").read_text().splitlines()
        return " / ".join(lines[-3:])


def _run(settings: BenchSettings) -> Iterator[Row]:
    with ray_cluster():
        for expert in ("small",) if settings.quick else _HIDDEN_FEATURES:
            yield from _measure(expert, python=_python(), settings=settings)


def _missing() -> str | None:
    if _python().exists() and _SCRIPT.exists():
        return None
    return f"expected hivemind's environment, found no {_python()}; `make bench-peers` makes it and runs this suite"


def _python() -> Path:
    """The interpreter of hivemind's environment."""
    return Path(os.environ.get(_PYTHON_VARIABLE, _DEFAULT_PYTHON))


def _measure(expert: str, *, python: Path, settings: BenchSettings) -> Iterator[Row]:
    options = {"hidden_features": _HIDDEN_FEATURES[expert], "bias": False}
    starting = settings.begin(f"Starting 8 {expert} actors, and hivemind with the same experts")
    config = layer_config(num_experts=_NUM_EXPERTS, kind="feed_forward", options=options)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-bench-")))
        _write_experts(recipe_of(config), folder)
        # Before the actors: much of its start is waiting.
        peer = stack.enter_context(contextlib.closing(HivemindPeer(folder, python=python)))
        deployment = stack.enter_context(deploy(config, on_progress=starting.update))
        ours = stack.enter_context(library_layer(deployment))
        peer.wait_until_ready()
        cases = _cases(quick=settings.quick)
        measuring = settings.begin(f"Calling {expert}")
        for num_done, (kind, num_tokens) in enumerate(cases, start=1):
            yield _case(kind, num_tokens, expert=expert, ours=ours, peer=peer, settings=settings)
            measuring.update(num_done, len(cases))


def _cases(*, quick: bool) -> list[tuple[Kind, int]]:
    gated = _QUICK_GATED_SIZES if quick else _GATED_SIZES
    direct = _QUICK_DIRECT_SIZES if quick else _DIRECT_SIZES
    return [*(("gated", size) for size in gated), *(("direct", size) for size in direct)]


def _write_experts(recipe: LayerRecipe, folder: Path) -> None:
    """The weights of experts and gate, for hivemind's server to read."""
    for expert in recipe.experts:
        parameters = dict(build_expert(expert.spec, device=torch.device("cpu")).module.named_parameters())
        up, down = (parameters[f"{name}.weight"].detach().numpy() for name in ("up", "down"))
        np.savez(folder / f"{expert.spec.expert_id}.npz", up=up, down=down)
    np.save(folder / "gate.npy", gate_weight(build_routed_layer(recipe)).detach().numpy())


def _case(
    kind: Kind, num_tokens: int, *, expert: str, ours: LibraryLayer, peer: HivemindPeer, settings: BenchSettings
) -> Row:
    if kind == "gated":
        choices, k = spread_evenly(num_tokens, num_experts=_NUM_EXPERTS), None
    else:
        choices, k = torch.zeros((num_tokens, 1), dtype=torch.int64), 1
    tokens = tokens_for(ours.gate_weight, choices)
    peer.set_tokens(tokens)
    peer.time_calls(kind, 1)
    _check(ours.forward(tokens, k=k).outputs, peer.outputs(), kind)
    name = _PEER_NAMES[kind]
    samples = interleave(
        [
            Contender("ours", lambda n: time_calls(lambda: ours.forward(tokens, k=k), n)),
            Contender(name, lambda n: peer.time_calls(kind, n)),
        ],
        effort=settings.effort,
    )
    return Row("peers", {"kind": kind, "expert": expert, "tokens": num_tokens}, name, samples["ours"], samples[name])


def _check(outputs: Tensor, theirs: Tensor, kind: Kind) -> None:
    if not torch.allclose(outputs, theirs, atol=_TOLERANCE, rtol=_TOLERANCE):
        raise BenchError(
            f"peers, {kind}: expected hivemind's outputs within {_TOLERANCE:g}, "
            f"found a difference of {float((outputs - theirs).abs().max()):.3g}"
        )


PEERS = Suite("peers", "hivemind's remote experts with the same weights, beside the runtime's", _run, _missing)
