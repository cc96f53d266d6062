"""The layers of a runtime that the MoE layers of a checkpoint become, as configuration."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    import torch

    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.experts.checkpoints.checkpoint import Checkpoint, ExpertLayer
    from moe_runtime.integrations.transformers.placement import Placement

KIND = "transformers"
#: Of names in a configuration.
MAX_NAME_LENGTH = 63
#: Experts on a busy CPU may have a long prompt before them; that a host has died is seen at once all the same.
TIMEOUT_MS = 60_000.0


@dataclass(frozen=True)
class Source:
    """Where a model's experts come from.

    Attributes:
        checkpoint: Holds them.
        architecture: Class of transformers that the checkpoint's modules are named after; its own when None.
    """

    checkpoint: Checkpoint
    architecture: str | None = None

    @property
    def folder(self) -> Path:
        """The checkpoint's, absolute: processes elsewhere open it too, maybe through other links."""
        return self.checkpoint.folder.absolute()

    def expert_options(self, layer: ExpertLayer) -> list[dict[str, Any]]:
        """The options of the kind ``transformers`` for each expert of a layer."""
        version = self.checkpoint.version
        named = {} if self.architecture is None else {"architecture": self.architecture}
        return [
            {"checkpoint": str(self.folder), "version": version, "module": layer.module, "expert": expert, **named}
            for expert in range(layer.num_experts)
        ]


def as_name(text: str) -> str:
    """A text as a name that a configuration accepts: other characters become ``-``, what is too long ends in a hash."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip("_.-") or "model"
    if len(name) <= MAX_NAME_LENGTH:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME_LENGTH - 9]}-{digest}"


def layer_blocks(
    source: Source, placement: Placement, *, dtypes: Mapping[str, torch.dtype], prefix: str | None
) -> dict[str, dict[str, Any]]:
    """One layer of the configuration for each MoE layer of a model, by name, in the model's order.

    Args:
        source: Where the experts come from.
        placement: How they live in actors.
        dtypes: Of tokens and experts, by the paths of the modules that hold them.
        prefix: Put before the paths of the modules to name the layers.
    """
    return {
        layer_name(layer.module, prefix): {
            "dtype": str(dtypes[layer.module]).removeprefix("torch."),
            "actor_group": layer_name("experts", prefix),
            **_block(source, layer, placement),
        }
        for layer in source.checkpoint.layers
    }


def layer_name(module: str, prefix: str | None) -> str:
    """What the layer of a module is called: its path in the model, behind the prefix."""
    return as_name(module if prefix is None else f"{prefix}.{module}")


def free_prefix(source: Source, taken: Container[str], *, wanted: str | None) -> str | None:
    """A prefix under which none of a model's layers has a name that is taken.

    Args:
        source: Where the experts come from.
        taken: The names of the layers that are there.
        wanted: The prefix that the caller asks for; when None, none if it will do, else one after the folder.

    Raises:
        ConfigError: If the wanted prefix will not do.
    """
    for prefix in _prefixes(source.folder) if wanted is None else (wanted,):
        names = (layer_name(layer.module, prefix) for layer in source.checkpoint.layers)
        clash = next((name for name in names if name in taken), None)
        if clash is None:
            return prefix
    raise ConfigError(f"name: expected one under which the runtime has no layers, found {wanted!r}: it has {clash!r}")


def present_layers(
    source: Source, config: RuntimeConfig, *, dtypes: Mapping[str, torch.dtype], exact: bool
) -> dict[str, str]:
    """The runtime's layers that compute what a model's experts do: their names, by the paths of the modules.

    Empty unless every MoE layer of the model is there, with all of its experts in order, of the same weights.

    Args:
        source: Where the experts come from.
        config: The runtime's.
        dtypes: Of the experts, by the paths of the modules that hold them.
        exact: Whether the layers have to be exact; those that are will do in any case.
    """
    wanted = {layer.module: source.expert_options(layer) for layer in source.checkpoint.layers}
    found: dict[str, str] = {}
    for name, block in config.layers.items():
        module = str(block.experts[0].options.get("module"))
        is_plain = all(expert.kind == KIND and expert.count == 1 for expert in block.experts)
        if not is_plain or module not in wanted or (exact and not block.exact):
            continue
        options = [expert.options for expert in block.experts]
        if f"torch.{block.dtype}" == str(dtypes[module]) and _are_same(options, wanted[module]):
            found.setdefault(module, name)
    return found if len(found) == len(wanted) else {}


def _are_same(present: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> bool:
    return len(present) == len(wanted) and all(map(_is_same, present, wanted))


def _is_same(present: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    # Who has written no version into a configuration means whatever is there.
    version = present.get("version")
    folder = Path(str(present.get("checkpoint"))).expanduser().resolve()
    return (
        folder == Path(wanted["checkpoint"]).resolve()
        and all(present.get(key) == wanted.get(key) for key in ("module", "expert", "architecture"))
        and version in (None, wanted["version"])
    )


def _prefixes(folder: Path) -> Iterator[str | None]:
    name = as_name(folder.name)
    yield None
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _block(source: Source, layer: ExpertLayer, placement: Placement) -> dict[str, Any]:
    resources = {"resources": dict(placement.resources)} if placement.resources else {}
    return {
        "item_shape": [layer.hidden_size],
        "policy": {"kind": "caller"},
        "residual": "none",
        "exact": placement.exact,
        # What a model makes of its padding may overflow, in one process too.
        "allow_non_finite": True,
        "timeout_ms": TIMEOUT_MS,
        "experts_per_actor": placement.experts_per_actor,
        "experts": [
            {"kind": KIND, "name": f"expert-{index}", "replicas": placement.replicas, **resources, "options": options}
            for index, options in enumerate(source.expert_options(layer))
        ],
    }
