"""The configuration of a layer's gate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_runtime.config.strict import MAX_ITEM_ELEMENTS, Name, StrictModel


class LinearGateConfig(StrictModel):
    """Router logits ``x @ W.T (+ b)``."""

    kind: Literal["linear"] = "linear"
    bias: bool = Field(False, description="Adds a learned bias per expert.")
    in_features: int | None = Field(
        None,
        ge=1,
        le=MAX_ITEM_ELEMENTS,
        description="Width of the gate's input; the flattened `item_shape` when not given.",
    )
    jitter_eps: float = Field(
        0.0, ge=0, lt=1, description="Training only: multiplies the gate's copy of the input by U[1-eps, 1+eps]."
    )
    weights: str | None = Field(
        None, description="A safetensors file, relative to the config file; initialised from `seed` without it."
    )


class MLPGateConfig(LinearGateConfig):
    """Linear, ReLU, linear (Eigen, Ranzato, Sutskever 2013)."""

    kind: Literal["mlp"]  # type: ignore[assignment]
    hidden_features: int = Field(ge=1, le=MAX_ITEM_ELEMENTS, description="Width of the hidden layer.")


class NoisyGateConfig(LinearGateConfig):
    """Linear; training adds learned Gaussian noise to the logits (Shazeer et al. 2017)."""

    kind: Literal["noisy"]  # type: ignore[assignment]


class CosineGateConfig(LinearGateConfig):
    """Cosine similarity to a learned prototype per expert, over a temperature (X-MoE, Chi et al. 2022)."""

    kind: Literal["cosine"]  # type: ignore[assignment]
    temperature: float = Field(0.07, gt=0, le=1e6, description="Divides the similarities.")


class MultiGateConfig(LinearGateConfig):
    """One linear gate per task over one pool of experts (MMoE, Ma et al. 2018); a request names its task."""

    kind: Literal["multi"]  # type: ignore[assignment]
    tasks: list[Name] = Field(min_length=1, max_length=65536, description="Names of the tasks, one gate each.")
    default_task: Name | None = Field(
        None, description="Task of requests that name none; they are refused when not given."
    )

    @model_validator(mode="after")
    def _known_tasks(self) -> MultiGateConfig:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: expected each name once, found {self.tasks}")
        if self.default_task is not None and self.default_task not in self.tasks:
            raise ValueError(f"default_task: expected one of {self.tasks}, found {self.default_task!r}")
        return self


GateConfig = Annotated[
    LinearGateConfig | MLPGateConfig | NoisyGateConfig | CosineGateConfig | MultiGateConfig,
    Field(discriminator="kind"),
]
