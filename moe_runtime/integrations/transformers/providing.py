"""Where a model's experts find a runtime: the caller's, to which their layers are added, or one of their own."""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from moe_runtime.errors import ConfigError, MoERuntimeError, UnavailableError
from moe_runtime.integrations.transformers.layers import as_name, free_prefix, layer_blocks, layer_name, present_layers
from moe_runtime.launch.runtime import serve
from moe_runtime.launch.served import Runtime

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from contextlib import ExitStack

    import torch

    from moe_runtime.integrations.transformers.layers import Source
    from moe_runtime.integrations.transformers.placement import Placement

_LOG = logging.getLogger(__name__)

#: In what lines of two experts or layers differ.
_DIGITS = re.compile(r"\d+")
#: Between looking which names are taken and taking some; and between looking which there are and removing some.
_CHANGING = threading.Lock()


class Provider(Protocol):
    """Has a runtime serve a model's experts."""

    def provide(
        self, source: Source, placement: Placement, *, dtypes: Mapping[str, torch.dtype], stack: ExitStack
    ) -> tuple[Runtime, dict[str, str]]:
        """The runtime, and the names of the layers by the paths of the modules that hold experts.

        Args:
            source: Where the experts come from.
            placement: How they live in actors.
            dtypes: Of the experts, by the paths of the modules.
            stack: Gets what ends with the experts.

        Raises:
            StartError: If the experts do not start.
            ConfigError: If the runtime cannot have such layers.
        """
        ...


class GivenRuntime:
    """The caller's runtime; layers that it has already are used as they are, others are added.

    Args:
        runtime: Stays when the experts are closed.
        keeps_layers: Whether those that were added stay as well.

    Raises:
        ConfigError: If it is no runtime.
    """

    def __init__(self, runtime: Runtime, *, keeps_layers: bool = True) -> None:
        if not isinstance(runtime, Runtime):
            raise ConfigError(f"runtime: expected what moe_runtime.serve returns, found {runtime!r}")
        self._runtime = runtime
        self._keeps_layers = keeps_layers

    def provide(
        self, source: Source, placement: Placement, *, dtypes: Mapping[str, torch.dtype], stack: ExitStack
    ) -> tuple[Runtime, dict[str, str]]:
        """See ``Provider``."""
        with _CHANGING:
            config = self._runtime.config
            present = present_layers(source, config, dtypes=dtypes, exact=placement.exact)
            if present:
                return self._runtime, present
            prefix = free_prefix(source, config.layers, wanted=placement.name)
            with _mistakes_once():
                self._runtime.add_layers(layer_blocks(source, placement, dtypes=dtypes, prefix=prefix))
            layers = layers_of(source, prefix)
            if not self._keeps_layers:
                stack.callback(_remove, self._runtime, layers.values())
            return self._runtime, layers


class OwnRuntime:
    """A runtime that is started for the experts, on Ray, and ends with them.

    Args:
        name: Of the runtime; made up when None.
        ray_address: Of the cluster; as ``moe_runtime.serve`` has it.
        start_timeout_s: Bounds the start.
    """

    def __init__(self, *, name: str | None, ray_address: str | None, start_timeout_s: float) -> None:
        self._name = name
        self._ray_address = ray_address
        self._start_timeout_s = start_timeout_s

    def provide(
        self, source: Source, placement: Placement, *, dtypes: Mapping[str, torch.dtype], stack: ExitStack
    ) -> tuple[Runtime, dict[str, str]]:
        """See ``Provider``."""
        name = self._name or as_name(f"{source.folder.name[:32]}-{secrets.token_hex(4)}")
        blocks = layer_blocks(source, placement, dtypes=dtypes, prefix=None)
        config = library_config(name, blocks, start_timeout_s=self._start_timeout_s)
        with _mistakes_once():
            runtime = serve(config, ray_address=self._ray_address)
        stack.callback(runtime.close)
        return runtime, layers_of(source, None)


def library_config(name: str, layers: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The configuration of a runtime without routers, which a program uses as a library."""
    return {"name": as_name(name), **more, "router": {"replicas": 0}, "layers": dict(layers)}


def layers_of(source: Source, prefix: str | None) -> dict[str, str]:
    """The names of a model's layers, by the paths of the modules that hold experts."""
    return {layer.module: layer_name(layer.module, prefix) for layer in source.checkpoint.layers}


def _remove(runtime: Runtime, layers: Collection[str]) -> None:
    try:
        # One after the other: who removes some reads what the others are made of, until they are gone as well.
        with _CHANGING:
            runtime.remove_layers(layers)
    except UnavailableError as exc:
        _LOG.debug("the layers have ended with their runtime: %s", exc)
    except MoERuntimeError as exc:
        _LOG.warning("the runtime keeps the layers %s, since they cannot be removed: %s", ", ".join(layers), exc)


@contextmanager
def _mistakes_once() -> Iterator[None]:
    """Say once what is wrong with every expert of every layer alike, and how often it is.

    Raises:
        ConfigError: What the block raises, or one of its class with fewer lines.
    """
    try:
        yield
    except ConfigError as exc:
        lines = str(exc).splitlines()
        alike = Counter(_DIGITS.sub("", line) for line in lines)
        if len(alike) == len(lines):
            raise
        firsts = {_DIGITS.sub("", line): line for line in reversed(lines)}
        said = (f"{firsts[kind]}{f' (and {n - 1} more like it)' if n > 1 else ''}" for kind, n in alike.items())
        # Its cause has a paragraph for each of those lines.
        raise type(exc)("\n".join(said)) from None
