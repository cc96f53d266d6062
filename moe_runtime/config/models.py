"""The configuration of a layer, as pydantic models; an unknown key is an error."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: Native code behind the fields has no unbounded integers.
MAX_COUNT = 2**31 - 1
MAX_BYTES = 2**40
#: Elements of one token: 1 GiB in float32.
MAX_ITEM_ELEMENTS = 2**28
MAX_THREADS = 1024
MAX_SECONDS = 30 * 24 * 3600

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
DTypeName = Literal["float32", "float64", "float16", "bfloat16"]
WireDTypeName = Literal["float32", "float16", "bfloat16"]
ResidualRule = Literal["add", "passthrough", "none"]
Normalize = Literal["before_drop", "after_drop", "none"]
WeightOn = Literal["output", "input"]
Strategy = Literal["spread", "pack"]
FailureStep = Literal["replica", "reroute", "drop", "error"]


class StrictModel(BaseModel):
    """Base of every configuration block: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


GateConfig = Annotated[LinearGateConfig | MLPGateConfig | NoisyGateConfig, Field(discriminator="kind")]


class DensePolicyConfig(StrictModel):
    """Every expert serves every token, weighted by the softmax (Jacobs, Jordan, Nowlan, Hinton 1991)."""

    kind: Literal["dense"]
    normalize: Normalize = Field("before_drop", description="Which assignments the weights are normalised over.")


class TopKPolicyConfig(StrictModel):
    """Each token goes to its `k` experts of the highest score (Shazeer et al. 2017)."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(2, ge=1, le=65536, description="Experts per token.")
    score: Literal["softmax", "sigmoid", "softmax_after_topk"] = Field(
        "softmax", description="How router logits become scores."
    )
    normalize: Normalize = Field(
        "before_drop",
        description="`before_drop`: over the token's assignments, dropped ones included (a half-dropped token is "
        "attenuated); `after_drop`: over the served ones (a lone survivor gets weight 1); `none`: scores as they are.",
    )
    norm_p: float = Field(
        1.0, ge=0.1, le=100, description="The p of the norm that weights are divided by; 1 is their sum."
    )
    scaling_factor: float = Field(1.0, gt=0, le=1e6, description="Multiplies the weights, last.")


class SwitchPolicyConfig(StrictModel):
    """One expert per token, weighted by its probability among all (Switch Transformers 2021)."""

    kind: Literal["switch"]


PolicyConfig = Annotated[DensePolicyConfig | TopKPolicyConfig | SwitchPolicyConfig, Field(discriminator="kind")]


class CapacityConfig(StrictModel):
    """How many assignments one expert accepts in one batch, and what happens to the rest."""

    factor: float | None = Field(
        None, gt=0, le=1e6, description="Capacity is ceil(factor x requested assignments / experts); null is dropless."
    )
    min: int = Field(4, ge=1, le=MAX_COUNT, description="Capacity is at least this.")
    drop: Literal["position", "priority", "score", "random"] = Field(
        "position", description="Who is dropped when an expert is full."
    )
    overflow: Literal["drop", "reroute"] = Field(
        "drop", description="`reroute`: an overflowed assignment tries the token's next-best experts first."
    )
    max_reroutes: int = Field(2, ge=1, le=65536, description="Experts that one overflowed assignment tries.")


class OnFailureConfig(StrictModel):
    """What becomes of an assignment whose expert is dead, late, or wrong."""

    order: tuple[FailureStep, ...] = Field(
        ("replica", "reroute", "drop"),
        min_length=1,
        description="Tried one after the other. `replica`: another replica of the expert; `reroute`: the token's "
        "next-best expert, where the policy scores them; `drop`: the residual; `error`: the request fails.",
    )

    @field_validator("order")
    @classmethod
    def _ends(cls, order: tuple[FailureStep, ...]) -> tuple[FailureStep, ...]:
        if len(set(order)) < len(order):
            raise ValueError(f"expected each step once, found {list(order)}")
        if order[-1] not in ("drop", "error") or {"drop", "error"} & {*order[:-1]}:
            raise ValueError(f"expected drop or error as the last step and nowhere else, found {list(order)}")
        return order


class HedgeConfig(StrictModel):
    """A second replica is asked too when the first takes unusually long (Dean, Barroso 2013)."""

    quantile: float = Field(0.99, gt=0, lt=1, description="Of the expert's recent answer times.")
    times: float = Field(2.0, ge=1, le=1000, description="How many times that an answer may take before it is hedged.")
    max_share: float = Field(0.05, gt=0, le=1, description="Share of messages that may be hedged.")


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


_NARROWER: dict[DTypeName, tuple[WireDTypeName, ...]] = {
    "float64": ("float32", "float16", "bfloat16"),
    "float32": ("float16", "bfloat16"),
    "float16": (),
    "bfloat16": (),
}


class LayerConfig(StrictModel):
    """One MoE layer: a gate, a policy and the experts behind it."""

    item_shape: list[int] = Field(min_length=1, description="Shape of one token: a vector, an image, a sequence.")
    dtype: DTypeName = Field("float32", description="Of tokens, experts and answers.")
    gate: GateConfig = Field(default_factory=LinearGateConfig, description="The network that scores experts.")
    policy: PolicyConfig = Field(default_factory=TopKPolicyConfig, description="How scores become assignments.")
    capacity: CapacityConfig = Field(default_factory=CapacityConfig, description="Capacity and overflow.")
    residual: ResidualRule | None = Field(
        None,
        description="`add`: x + y; `passthrough`: x where nothing was served; `none`: 0 there. "
        "`passthrough` where shapes agree, else `none`, when not given.",
    )
    weight_on: WeightOn = Field("output", description="`input` scales what the expert sees (Llama 4).")
    on_failure: OnFailureConfig = Field(
        default_factory=OnFailureConfig, description="What becomes of an assignment whose expert fails."
    )
    hedge: HedgeConfig | None = Field(
        None, description="Asks a second replica when the first takes unusually long; never when null."
    )
    timeout_ms: float = Field(2000.0, gt=0, le=MAX_SECONDS * 1000, description="Bounds a batch, from its dispatch.")
    allow_non_finite: bool = Field(False, description="Accept NaN and infinities in the input.")
    max_batches_in_flight: int = Field(
        2, ge=1, le=65536, description="Batches of this layer that a router has under way."
    )
    exact: bool = Field(
        False,
        description="Bit-identical to one process: a request is a batch of its own, hosts merge nothing, and experts' "
        "outputs are summed in the order of choice.",
    )
    wire_dtype: WireDTypeName | None = Field(
        None, description="Of rows on their way to experts and back; `dtype` when not given. Halves their bytes."
    )
    experts_per_actor: int = Field(1, ge=1, le=65536, description="Neighbouring experts that share an actor.")
    strategy: Strategy = Field(
        "spread", description="`spread`: its actors over as many nodes as there are; `pack`: on as few as will do."
    )
    experts: list[ExpertConfig] = Field(min_length=1, description="The experts; gate rows follow their order.")

    @field_validator("item_shape")
    @classmethod
    def _positive(cls, shape: list[int]) -> list[int]:
        if any(size < 1 for size in shape):
            raise ValueError(f"expected sizes of at least 1, found {shape}")
        if math.prod(shape) > MAX_ITEM_ELEMENTS:
            raise ValueError(f"expected at most {MAX_ITEM_ELEMENTS} elements, found {shape}")
        return shape

    @property
    def num_experts(self) -> int:
        """Experts of the layer, after ``count`` is expanded."""
        return sum(expert.count for expert in self.experts)

    @model_validator(mode="after")
    def _wire_dtype_narrows(self) -> LayerConfig:
        if self.wire_dtype is None or self.wire_dtype == self.dtype:
            return self
        narrower = _NARROWER[self.dtype]
        if self.wire_dtype not in narrower:
            raise ValueError(
                f"wire_dtype: with dtype {self.dtype}, expected one of {narrower}, found {self.wire_dtype}"
            )
        if self.wire_dtype == "float16" and self.weight_on == "input":
            raise ValueError(
                "wire_dtype: with weight_on input, expected bfloat16, found float16: weights may overflow it"
            )
        if self.exact:
            raise ValueError(f"wire_dtype: expected nothing in an exact layer, found {self.wire_dtype}: it would round")
        return self

    @model_validator(mode="after")
    def _exact_is_not_hedged(self) -> LayerConfig:
        if self.exact and self.hedge is not None:
            raise ValueError("hedge: expected null in an exact layer, found one: answers of two replicas may differ")
        return self

    @model_validator(mode="after")
    def _enough_experts(self) -> LayerConfig:
        if isinstance(self.policy, TopKPolicyConfig) and self.policy.k > self.num_experts:
            raise ValueError(
                f"policy.k: expected at most {self.num_experts}, the layer's experts, found {self.policy.k}"
            )
        return self
