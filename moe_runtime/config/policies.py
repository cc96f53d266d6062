"""The configuration of a layer's policy: how scores become assignments."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_runtime.config.strict import MAX_COUNT, StrictModel

#: Experts of one layer, and choices of one token.
MAX_EXPERTS = 65536

Normalize = Literal["before_drop", "after_drop", "none"]
#: How the second expert of GShard's top-2 is kept.
SecondExpert = Literal["threshold", "proportional", "always", "never"]
#: What a policy that balances a batch, or samples, does outside training.
Evaluation = Literal["greedy", "as_in_training"]


class DensePolicyConfig(StrictModel):
    """Every expert serves every token, weighted by the softmax (Jacobs, Jordan, Nowlan, Hinton 1991)."""

    kind: Literal["dense"]
    normalize: Normalize = Field("before_drop", description="Which assignments the weights are normalised over.")


class GroupsConfig(StrictModel):
    """Neighbouring experts form groups; a token's experts come from its best ones (DeepSeek-V2 and -V3)."""

    count: int = Field(ge=2, le=MAX_EXPERTS, description="Groups of equal size; neighbouring experts form one.")
    keep: int = Field(ge=1, le=MAX_EXPERTS, description="Groups that a token's experts may come from.")
    score: Literal["top2_sum", "max"] | None = Field(
        None,
        description="Score of a group: the sum of its two best experts' scores, or the best; `top2_sum` with "
        "`expert_bias`, else `max`, when not given.",
    )

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> GroupsConfig:
        if self.keep > self.count:
            raise ValueError(f"keep: expected at most the {self.count} groups, found {self.keep}")
        return self


class TopKPolicyConfig(StrictModel):
    """Each token goes to its `k` experts of the highest score (Shazeer et al. 2017)."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(2, ge=1, le=MAX_EXPERTS, description="Experts per token.")
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
    expert_bias: bool = Field(
        False,
        description="Experts are selected by score plus a bias that balances them; weights are unbiased "
        "(DeepSeek-V3). The bias is the gate's `expert_bias`.",
    )
    groups: GroupsConfig | None = Field(None, description="Limits a token's experts to its best groups of them.")


class SwitchPolicyConfig(StrictModel):
    """One expert per token, weighted by its probability among all (Switch Transformers 2021)."""

    kind: Literal["switch"]


class GShardPolicyConfig(StrictModel):
    """The best expert always, the second by chance of its weight (GShard, Lepikhin et al. 2020)."""

    kind: Literal["gshard_top2"]
    second: SecondExpert = Field(
        "threshold",
        description="Training. With g2 the second's share of the pair, it is kept with probability: `threshold` "
        "min(1, g2 / threshold); `proportional` min(1, 2 g2); `always` 1; `never` 0.",
    )
    threshold: float = Field(0.2, gt=0, le=1, description="Share above which `threshold` always keeps the second.")
    second_in_evaluation: SecondExpert = Field("always", description="As `second`, outside training.")
    normalize: Normalize = Field("before_drop", description="Which assignments the weights are normalised over.")


class SparseMixerPolicyConfig(StrictModel):
    """Two experts, each weighted by a softmax over the logits near its own (Phi-3.5-MoE, evaluation form)."""

    kind: Literal["sparsemixer"]
    jitter_eps: float = Field(
        0.01, gt=0, lt=1, description="Logits within twice this of the best, relative to its size, count."
    )


class HierarchicalPolicyConfig(StrictModel):
    """Two levels of softmax: first a group of experts, then experts inside it; weights are products."""

    kind: Literal["hierarchical"]
    mode: Literal["tree", "shared_first"] = Field(
        "tree",
        description="`tree`: the best `k_groups` of `num_groups`, then the best `k` in each. `shared_first`: expert 0 "
        "is shared; a token goes to it, or to its best `k` of the others, as the first level says (NLLB).",
    )
    num_groups: int = Field(2, ge=2, le=MAX_EXPERTS, description="`tree`: groups of neighbouring experts.")
    k_groups: int = Field(1, ge=1, le=MAX_EXPERTS, description="`tree`: groups per token.")
    k: int = Field(2, ge=1, le=MAX_EXPERTS, description="Experts per token and group.")
    normalize: Normalize = Field("none", description="Which assignments the weights are normalised over.")


class ExpertChoicePolicyConfig(StrictModel):
    """Each expert takes its best tokens (Zhou et al. 2022); some tokens get none, some get many."""

    kind: Literal["expert_choice"]
    capacity_factor: float = Field(
        2.0, gt=0, le=1e6, description="An expert takes ceil(tokens x this / experts) of them, all at most."
    )
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="How router logits become scores.")
    normalize: Normalize = Field("none", description="Which assignments the weights are normalised over.")


class GlobalAssignmentPolicyConfig(StrictModel):
    """One expert per token, every expert as many tokens, at the highest total score (BASE, Lewis et al. 2021)."""

    kind: Literal["global_assignment"]
    solver: Literal["auto", "exact", "auction"] = Field(
        "auto",
        description="`exact`: scipy's, which holds up the router for seconds above 1000 tokens; `auction`: close to "
        "it, and quicker in large batches; `auto`: by size.",
    )
    evaluation: Evaluation = Field("greedy", description="`greedy`: each token's best expert.")


class SinkhornPolicyConfig(StrictModel):
    """The best experts after the batch's scores were scaled to equal loads (Clark et al. 2022)."""

    kind: Literal["sinkhorn"]
    k: int = Field(1, ge=1, le=MAX_EXPERTS, description="Experts per token.")
    tolerance: float = Field(
        1e-4, gt=0, lt=1, description="Scaling ends when no load is further from the mean than this share of it."
    )
    max_iterations: int = Field(100, ge=1, le=1000, description="Scaling ends after so many rounds.")
    evaluation: Evaluation = Field("greedy", description="`greedy`: each token's best experts.")


class HashPolicyConfig(StrictModel):
    """Experts by fixed hashes of a token's id (Roller et al. 2021); the gate is not asked."""

    kind: Literal["hash"]
    k: int = Field(1, ge=1, le=MAX_EXPERTS, description="Hashes, and experts per token, each of weight 1/k.")
    seed: int = Field(0, ge=0, le=MAX_COUNT, description="Another seed is another assignment of ids to experts.")


class RandomPolicyConfig(StrictModel):
    """Experts at random, by the request's seed and its rows; the gate is not asked."""

    kind: Literal["random"]
    k: int = Field(1, ge=1, le=MAX_EXPERTS, description="Experts per token, each of weight 1/k.")


class RoundRobinPolicyConfig(StrictModel):
    """Experts in turn, by the row within its request; the gate is not asked."""

    kind: Literal["round_robin"]
    k: int = Field(1, ge=1, le=MAX_EXPERTS, description="Experts per token, each of weight 1/k.")


class ReinforcePolicyConfig(StrictModel):
    """Experts sampled from the softmax, whose gate learns from a reward (Bengio et al. 2015)."""

    kind: Literal["reinforce"]
    k: int = Field(1, ge=1, le=MAX_EXPERTS, description="Experts per token, sampled without replacement.")
    evaluation: Evaluation = Field("greedy", description="`greedy`: each token's most likely experts.")
    normalize: Normalize = Field("before_drop", description="Which assignments the weights are normalised over.")


class CallerPolicyConfig(StrictModel):
    """The program that uses the layer as a library routes its tokens itself, and sums what experts answer.

    Such a layer is not served to clients: `router.replicas` is 0.
    """

    kind: Literal["caller"]


PolicyConfig = Annotated[
    DensePolicyConfig
    | TopKPolicyConfig
    | SwitchPolicyConfig
    | GShardPolicyConfig
    | SparseMixerPolicyConfig
    | HierarchicalPolicyConfig
    | ExpertChoicePolicyConfig
    | GlobalAssignmentPolicyConfig
    | SinkhornPolicyConfig
    | HashPolicyConfig
    | RandomPolicyConfig
    | RoundRobinPolicyConfig
    | ReinforcePolicyConfig
    | CallerPolicyConfig,
    Field(discriminator="kind"),
]
