"""Suite `transformers`: a model's `generate` with its experts in actors, beside the same model in one process."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.bench.deployment import ray_cluster
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Contender, Effort, interleave
from moe_runtime.bench.suite import Suite
from moe_runtime.bench.whole_model import WholeModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moe_runtime.bench.generation import GenerationCase
    from moe_runtime.bench.sampling import Sample
    from moe_runtime.bench.suite import BenchSettings

_THREADS = (1, 2)
_BATCHES, _QUICK_BATCHES = (1, 4, 16), (1,)
_PREFILL_TOKENS, _QUICK_PREFILL_TOKENS = 512, 128
_CHECKED_TOKENS = 3
_NEEDED = ("transformers", "gguf")
PEER = "one process"


@dataclass(frozen=True)
class _Model:
    """Name in the rows, experts of a layer, and how its checkpoint is made in a folder."""

    name: str
    num_experts: int
    make: Callable[[Path], Path]


def _run(settings: BenchSettings) -> Iterator[Row]:
    with ray_cluster(), tempfile.TemporaryDirectory() as folder:
        for model in _MODELS[:1] if settings.quick else _MODELS:
            yield from _measure(model, Path(folder), settings)


def _missing() -> str | None:
    if all(find_spec(name) is not None for name in _NEEDED):
        return None
    return f"expected {' and '.join(_NEEDED)}, not installed: pip install 'moe-runtime[bench,transformers]'"


def _measure(model: _Model, folder: Path, settings: BenchSettings) -> Iterator[Row]:
    from transformers.utils import logging

    import moe_runtime.integrations.transformers as moe_hf

    logging.disable_progress_bar()
    settings.begin(f"Loading {model.name}, with its experts in actors and in one process")
    path = model.make(folder)
    num_actors = min(os.cpu_count() or 1, model.num_experts)
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(contextlib.closing(WholeModel(path)))
        ours = moe_hf.load(
            path, experts_per_actor=math.ceil(model.num_experts / num_actors), device="cpu", dtype=torch.float32
        )
        stack.callback(moe_hf.close, ours)
        peer.wait_until_ready()
        measuring = settings.begin(f"Generating with {model.name}")
        cases = _cases(quick=settings.quick)
        for num_done, case in enumerate(cases, start=1):
            yield _case(model, case, ours=ours, peer=peer, settings=settings)
            measuring.update(num_done, len(cases))


def _cases(*, quick: bool) -> Sequence[GenerationCase]:
    from moe_runtime.bench.generation import GenerationCase

    batches = _QUICK_BATCHES if quick else _BATCHES
    prefill = GenerationCase("prefill", 1, _QUICK_PREFILL_TOKENS if quick else _PREFILL_TOKENS)
    return [*(GenerationCase("decode", batch) for batch in batches), prefill]


def _case(model: _Model, case: GenerationCase, *, ours: Any, peer: WholeModel, settings: BenchSettings) -> Row:
    _check(case, ours=ours, peer=peer)
    samples = interleave(_contenders(case, ours=ours, peer=peer), effort=_effort(settings))
    our_threads, our_best = _best(samples, "ours")
    peer_threads, peer_best = _best(samples, PEER)
    figures = {
        "tokens_per_s": case.num_tokens / our_best.median_ms * 1000.0,
        "peer_tokens_per_s": case.num_tokens / peer_best.median_ms * 1000.0,
        "threads_here": our_threads,
        "peer_threads": peer_threads,
    }
    about = {"model": model.name, "phase": case.phase, "batch": case.batch, "tokens": case.num_tokens}
    return Row("transformers", about, PEER, our_best, peer_best, figures)


def _effort(settings: BenchSettings) -> Effort:
    return Effort(seconds=1.0, min_rounds=3) if settings.quick else Effort(seconds=6.0, min_rounds=4)


def _contenders(case: GenerationCase, *, ours: Any, peer: WholeModel) -> Sequence[Contender]:
    from moe_runtime.bench.generation import time_generation

    return [
        contender
        for num_threads in _THREADS
        for contender in (
            Contender(_name("ours", num_threads), partial(time_generation, ours, case, num_threads=num_threads)),
            Contender(_name(PEER, num_threads), partial(peer.time_calls, case, num_threads)),
        )
    ]


def _best(samples: dict[str, Sample], name: str) -> tuple[int, Sample]:
    """The number of threads with which one of the two is fastest, and its times."""
    best = min(_THREADS, key=lambda num_threads: samples[_name(name, num_threads)].median_ms)
    return best, samples[_name(name, best)]


def _name(name: str, num_threads: int) -> str:
    return f"{name} {num_threads}"


def _check(case: GenerationCase, *, ours: Any, peer: WholeModel) -> None:
    from moe_runtime.bench.generation import generated

    torch.set_num_threads(1)
    found, expected = generated(ours, case, _CHECKED_TOKENS), peer.generated(case, _CHECKED_TOKENS)
    if not torch.equal(found, expected):
        raise BenchError(
            f"transformers: expected the tokens of the model in one process at batch {case.batch}, "
            f"found {int((found != expected).sum())} others"
        )


def _random_mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    path = folder / "mixtral"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(path)
    return path


def _upcycled_smollm2(_: Path) -> Path:
    from moe_runtime.integrations.transformers.smollm2 import upcycled_smollm2

    return upcycled_smollm2()


_MODELS = (
    _Model("random Mixtral, 4 layers of 8 experts", 8, _random_mixtral),
    _Model("upcycled SmolLM2, 30 layers of 4 experts", 4, _upcycled_smollm2),
)

TRANSFORMERS_SUITE = Suite(
    "transformers", "generate() with experts in actors, beside the same model in one process", _run, _missing
)
