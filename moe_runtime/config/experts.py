"""The configuration of a layer's experts."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from moe_runtime.config.strict import MAX_BYTES, Name, StrictModel


class ViewConfig(StrictModel):
    """The part of a token that an expert sees, and in which shape."""

    columns: tuple[int, int] | None = Field(
        None, description="Half-open range of the flattened token's columns; all when not given."
    )
    shape: list[int] | None = Field(None, description="Shape of what the expert sees; flat when not given.")

    @field_validator("columns")
    @classmethod
    def _ascending(cls, columns: tuple[int, int] | None) -> tuple[int, int] | None:
        if columns is not None and not 0 <= columns[0] < columns[1]:
            raise ValueError(f"expected [start, stop] with 0 <= start < stop, found {list(columns)}")
        return columns


class ResourcesConfig(StrictModel):
    """What an expert's actor asks of the cluster."""

    num_cpus: float = Field(0.1, ge=0, le=65536, description="CPUs that Ray reserves.")
    num_gpus: float | None = Field(
        None,
        ge=0,
        le=1024,
        description="GPUs that Ray reserves, a share of one or whole ones; 1 where `device` resolves to cuda, else 0.",
    )
    memory_bytes: int | None = Field(None, ge=1, le=MAX_BYTES, description="Memory that Ray reserves.")
    max_rss_bytes: int | None = Field(
        None,
        ge=1,
        le=MAX_BYTES,
        description="Resident memory of the actor's process above which it is drained and replaced.",
    )
    custom: dict[str, float] = Field(default_factory=dict, description="Custom Ray resources.")
    node_labels: dict[str, str] = Field(default_factory=dict, description="Labels that the node must have.")

    @field_validator("num_gpus")
    @classmethod
    def _share_or_whole(cls, num_gpus: float | None) -> float | None:
        if num_gpus is not None and num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError(f"expected a whole number above 1, as Ray shares only a single GPU; found {num_gpus:g}")
        return num_gpus


class ExpertConfig(StrictModel):
    """One expert, or `count` alike."""

    kind: str = Field(description="A built-in kind or one that a plug-in registers.")
    name: Name | None = Field(
        None, description="Unique in the layer; `<kind>-<n>` when not given; `<name>-<n>` where `count` is above 1."
    )
    count: int = Field(1, ge=1, le=65536, description="How many experts this block stands for.")
    replicas: int = Field(
        1,
        ge=1,
        le=1024,
        description="Actors that serve each of these experts, on nodes of their own where there is room.",
    )
    weights: str | None = Field(
        None,
        description="A safetensors file, relative to the config file; `{i}` is the index within `count`. "
        "Initialised from `seed` without it.",
    )
    view: ViewConfig | None = Field(None, description="The part of the token that the expert sees.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the kind.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="Demands of the expert's actor.")

    @model_validator(mode="after")
    def _one_file_per_expert(self) -> ExpertConfig:
        if self.count > 1 and self.weights is not None and "{i}" not in self.weights:
            raise ValueError(f"weights: with count {self.count}, expected a name with {{i}}, found {self.weights!r}")
        return self
