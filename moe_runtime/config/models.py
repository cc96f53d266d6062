"""The configuration of a layer, as pydantic models; an unknown key is an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moe_runtime.config.balance import BalanceConfig, LossesConfig
from moe_runtime.config.experts import ExpertConfig
from moe_runtime.config.gates import GateConfig, LinearGateConfig, MultiGateConfig, NoisyGateConfig
from moe_runtime.config.policies import PolicyConfig, TopKPolicyConfig
from moe_runtime.config.presets.catalogue import find_preset, with_preset
from moe_runtime.config.strict import MAX_COUNT, MAX_ITEM_ELEMENTS, MAX_SECONDS, Name, StrictModel

DTypeName = Literal["float32", "float64", "float16", "bfloat16"]
WireDTypeName = Literal["float32", "float16", "bfloat16"]
ResidualRule = Literal["add", "passthrough", "none", "blend"]
WeightOn = Literal["output", "input"]
Strategy = Literal["spread", "pack"]
SharedGate = Literal["none", "sigmoid"]
FailureStep = Literal["replica", "reroute", "drop", "error"]


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


#: Policies without router logits.
_ASK_NO_GATE = ("hash", "random", "round_robin", "caller")
_NARROWER: dict[DTypeName, tuple[WireDTypeName, ...]] = {
    "float64": ("float32", "float16", "bfloat16"),
    "float32": ("float16", "bfloat16"),
    "float16": (),
    "bfloat16": (),
}


class LayerConfig(StrictModel):
    """One MoE layer: a gate, a policy and the experts behind it."""

    preset: str | None = Field(
        None,
        description="A system of the literature, by its name in [routers.md](routers.md): the layer starts from its "
        "keys, and the layer's own win. `moe-runtime validate --expand` shows what comes of it.",
    )
    item_shape: list[int] = Field(min_length=1, description="Shape of one token: a vector, an image, a sequence.")
    dtype: DTypeName = Field("float32", description="Of tokens, experts and answers.")
    gate: GateConfig = Field(default_factory=LinearGateConfig, description="The network that scores experts.")
    policy: PolicyConfig = Field(default_factory=TopKPolicyConfig, description="How scores become assignments.")
    capacity: CapacityConfig = Field(default_factory=CapacityConfig, description="Capacity and overflow.")
    residual: ResidualRule | None = Field(
        None,
        description="`add`: x + y; `passthrough`: x where nothing was served; `none`: 0 there; `blend`: y + (1 - sum "
        "of the weights) x (BASE). `passthrough` where shapes agree, else `none`, when not given.",
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
    actor_group: Name | None = Field(
        None,
        description="Layers of one group share actors: an actor of the first has the experts of the same places in all "
        "of them. Needs as many experts, and equal `experts_per_actor`, `replicas`, `resources` and `strategy`.",
    )
    strategy: Strategy = Field(
        "spread", description="`spread`: its actors over as many nodes as there are; `pack`: on as few as will do."
    )
    experts: list[ExpertConfig] = Field(min_length=1, description="The experts; gate rows follow their order.")
    shared_experts: list[ExpertConfig] = Field(
        default_factory=list,
        description="Experts that serve every token, outside of `k`, capacity, normalisation and losses (DeepSeekMoE).",
    )
    shared_gate: SharedGate = Field(
        "none", description="Weight of a shared expert: 1, or `sigmoid` of a learned score of the token (Qwen2-MoE)."
    )
    allow_batch_coupled: bool = Field(
        False,
        description="Lets requests share a batch although the policy couples the tokens of a batch.",
    )
    losses: LossesConfig = Field(default_factory=LossesConfig, description="What training adds to its own loss.")
    balance: BalanceConfig = Field(default_factory=BalanceConfig, description="Balance while serving.")

    @model_validator(mode="before")
    @classmethod
    def _on_its_preset(cls, data: Any) -> Any:
        return _with_default_kinds(with_preset(data)) if isinstance(data, Mapping) else data

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
        """Experts that tokens are routed to, after ``count`` is expanded; shared ones are not among them."""
        return sum(expert.count for expert in self.experts)

    def origin_of(self, key: str) -> str:
        """The end of a message about a key such as ``policy.k``: `` (from preset olmoe)`` where the value is its."""
        if self.preset is None:
            return ""
        given: Any = find_preset(self.preset).layer
        own: Any = self
        for part in key.split("."):
            if not isinstance(given, Mapping) or part not in given:
                return ""
            given, own = given[part], getattr(own, part, None)
        return f" (from preset {self.preset})" if given == own else ""

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
    def _hedges_have_replicas(self) -> LayerConfig:
        blocks = (*self.experts, *self.shared_experts)
        if self.hedge is not None and all(block.replicas == 1 for block in blocks):
            raise ValueError("hedge: expected an expert with replicas above 1, which it would ask too, found none")
        return self

    @model_validator(mode="after")
    def _enough_experts(self) -> LayerConfig:
        k = getattr(self.policy, "k", 1)
        if k > self.num_experts:
            raise ValueError(
                f"policy.k: expected at most {self.num_experts}, the layer's experts, found {k}"
                f"{self.origin_of('policy.k')}"
            )
        return self

    @model_validator(mode="after")
    def _bias_has_a_policy(self) -> LayerConfig:
        uses_bias = isinstance(self.policy, TopKPolicyConfig) and self.policy.expert_bias
        if self.balance.online_bias and not uses_bias:
            found = "expert_bias false" if isinstance(self.policy, TopKPolicyConfig) else f"policy {self.policy.kind}"
            raise ValueError(f"balance.online_bias: expected policy top_k with expert_bias true, found {found}")
        return self

    @model_validator(mode="after")
    def _shared_gate_has_experts(self) -> LayerConfig:
        if self.shared_gate != "none" and not self.shared_experts:
            raise ValueError(f"shared_gate: expected none without shared_experts, found {self.shared_gate}")
        return self

    @model_validator(mode="after")
    def _losses_have_what_they_need(self) -> LayerConfig:
        for name, coefficient in self.losses:
            missing = self._missing_for_loss(name)
            # Those of a preset are left alone where a layer has another gate than it: only training reads them.
            if coefficient and missing and not self.origin_of(f"losses.{name}"):
                raise ValueError(f"losses.{name}: expected 0 without {missing}, found {coefficient:g}")
        return self

    def _missing_for_loss(self, name: str) -> str | None:
        if self.policy.kind in _ASK_NO_GATE:
            return "a policy that asks the gate"
        if name == "load" and not isinstance(self.gate, NoisyGateConfig):
            return "a noisy gate"
        if name == "mutual_information" and not isinstance(self.gate, MultiGateConfig):
            return "a gate per task"
        return None

    @model_validator(mode="after")
    def _tasks_are_of_use(self) -> LayerConfig:
        if self.policy.kind in _ASK_NO_GATE and isinstance(self.gate, MultiGateConfig):
            raise ValueError(f"gate.kind: expected linear, found multi: policy {self.policy.kind} asks no gate")
        return self


def _with_default_kinds(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A layer's block in which gate and policy name their kind, the default one where they name none."""
    named = {
        key: {"kind": kind, **layer[key]}
        for key, kind in (("gate", "linear"), ("policy", "top_k"))
        if isinstance(layer.get(key), Mapping) and "kind" not in layer[key]
    }
    return {**layer, **named} if named else layer
