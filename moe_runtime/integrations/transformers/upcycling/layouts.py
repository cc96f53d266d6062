"""The mixture's configuration that computes what a dense one does, and the names of its tensors.

Mixtral is Llama and Mistral with experts, Qwen2-MoE is Qwen2 with experts and a shared one. In both, the weights of a
token's experts are made to sum to 1, so that equal experts are the dense layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig

from moe_runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

    from moe_runtime.integrations.transformers.upcycling.options import Upcycling

#: Settings that mean the same in all five families.
_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "attention_dropout", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip

#: Intermediate size of a shared expert that there shouldn't be: with 0, torch warns whenever the model is built.
_UNUSED_SHARED_SIZE = 1


@dataclass(frozen=True)
class Layout:
    """How a family's checkpoints name what upcycling adds; the tensors outside of MLPs keep their names.

    Attributes:
        config: Of the mixture.
        block: What stands for ``mlp`` in the names of a layer's tensors.
        projections: The names of an expert's matrices, by those of the dense MLP.
        shared_size: Intermediate size of the shared expert; 0 in a layout that has none.
    """

    config: PreTrainedConfig
    block: str
    projections: dict[str, str]
    shared_size: int = 0


def choose_layout(path: Path, config: PreTrainedConfig, options: Upcycling) -> Layout:
    """The mixture of a dense configuration.

    Raises:
        UnsupportedModelError: If the dense model has settings that the mixture's family cannot express.
    """
    _refuse_inexpressible(path, config)
    common = {name: getattr(config, name) for name in _COMMON}
    if getattr(config, "head_dim", None) is not None:
        common["head_dim"] = config.head_dim
    if options.shared or config.model_type == "qwen2":
        layout = _qwen2_moe(config, common, options)
    else:
        layout = _mixtral(config, common, options)
    _check_rotations(path, config, layout.config)
    return layout


def _mixtral(config: PreTrainedConfig, common: dict[str, Any], options: Upcycling) -> Layout:
    mixture = MixtralConfig(
        **common,
        intermediate_size=config.intermediate_size,
        sliding_window=getattr(config, "sliding_window", None),
        num_local_experts=options.experts,
        num_experts_per_tok=options.top_k,
        architectures=["MixtralForCausalLM"],
    )
    return Layout(mixture, "block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})


def _qwen2_moe(config: PreTrainedConfig, common: dict[str, Any], options: Upcycling) -> Layout:
    shared_size = config.intermediate_size if options.shared else _UNUSED_SHARED_SIZE
    mixture = Qwen2MoeConfig(
        **common,
        **_sliding_layers(config),
        qkv_bias=config.model_type == "qwen2",
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=shared_size,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        architectures=["Qwen2MoeForCausalLM"],
    )
    return Layout(mixture, "mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")}, shared_size)


def _sliding_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """Which layers attend to a window, as Qwen2-MoE says it: layer by layer."""
    window = getattr(config, "sliding_window", None)
    kinds = config.layer_types if config.model_type == "qwen2" else None
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": list(kinds)}


def _refuse_inexpressible(path: Path, config: PreTrainedConfig) -> None:
    refused = [
        f"{name} {getattr(config, name)}" for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)
    ]
    if not getattr(config, "is_causal", True):
        refused.append("is_causal False")
    known_kinds = {"full_attention", "sliding_attention"} if config.model_type == "qwen2" else set()
    if unknown := set(getattr(config, "layer_types", None) or ()) - known_kinds:
        refused.append(f"layer_types {', '.join(sorted(unknown))}")
    if refused:
        raise UnsupportedModelError(
            f"{path}: expected a model whose every setting its mixture can have too; "
            f"Mixtral and Qwen2-MoE cannot have {'; '.join(refused)}"
        )


def _check_rotations(path: Path, dense: PreTrainedConfig, mixture: PreTrainedConfig) -> None:
    """Compare the rotary embeddings, whatever their type is: both models compute them from their configurations."""
    expected, found = _rotary_embedding(dense), _rotary_embedding(mixture)
    if not torch.equal(expected.inv_freq, found.inv_freq) or expected.attention_scaling != found.attention_scaling:
        raise UnsupportedModelError(
            f"{path}: expected rotary embeddings that {mixture.model_type} computes too, found {dense.rope_parameters}"
        )


def _rotary_embedding(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    return type(rotary)(config)
