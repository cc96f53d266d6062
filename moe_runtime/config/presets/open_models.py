"""Models whose weights or code are open: 2022 to 2025."""

from __future__ import annotations

from moe_runtime.config.presets.preset import Preset

MEGABLOCKS = Preset(
    name="megablocks",
    title="MegaBlocks dMoE",
    year=2022,
    source="https://arxiv.org/abs/2211.15841",
    about="Gale et al.: block-sparse products make a layer in which no token is ever dropped as quick as one that "
    "drops.",
    formula="p = softmax(W x);  y = sum over the top k of p_i f_i(x), not renormalised;  no capacity",
    figures="64 experts, k = 1; Transformer-Medium has 1024-4096-1024 with GELU; loss 1e-1.",
    differs="The library normalises only where `moe_normalize_expert_weights` names a norm; its kind of layer with a "
    "capacity rounds that down.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 1, "score": "softmax", "normalize": "none"},
        "capacity": {"factor": None},
        "residual": "none",
        "losses": {"load_balancing": 0.1},
        "experts": [{"kind": "feed_forward", "count": 64, "options": {"hidden_features": 4096, "activation": "gelu"}}],
    },
)

MIXTRAL = Preset(
    name="mixtral",
    title="Mixtral 8x7B",
    year=2023,
    source="https://arxiv.org/abs/2401.04088",
    about="Jiang et al.: Mistral 7B with eight experts in each layer, of which a token takes two.",
    formula="w = softmax over the top 2 of W x;  y = sum_i w_i f_i(x)",
    figures="8 experts 4096-14336-4096 with SwiGLU, k = 2; loss 2e-2 in the released configuration.",
    differs="Hugging Face takes the softmax over all and divides by the sum of the two: the same. It jitters its input "
    "in place when `router_jitter_noise` is set.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 2, "score": "softmax", "normalize": "before_drop"},
        "residual": "none",
        "losses": {"load_balancing": 0.02},
        "experts": [{"kind": "swiglu", "count": 8, "options": {"hidden_features": 14336}}],
    },
)

DBRX = Preset(
    name="dbrx",
    title="DBRX",
    year=2024,
    source="https://www.databricks.com/blog/introducing-dbrx-new-state-art-open-llm",
    about="Databricks: finer experts than Mixtral's, four of sixteen, weights divided by their p-norm.",
    formula="p = softmax(W x);  w = top 4 of p, divided by their p-norm;  y = sum_i w_i f_i(x)",
    figures="16 experts 6144-10752-6144, gated by SiLU, k = 4, p = 1; loss 5e-2.",
    differs="Hugging Face takes the softmax in the dtype of the tokens, not in float32, and jitters its input in place "
    "in training where that is asked for.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 4, "score": "softmax", "normalize": "before_drop", "norm_p": 1.0},
        "residual": "none",
        "losses": {"load_balancing": 0.05},
        "experts": [{"kind": "swiglu", "count": 16, "options": {"hidden_features": 10752}}],
    },
)

OPENMOE = Preset(
    name="openmoe",
    title="OpenMoE-8B/32E",
    year=2024,
    source="https://arxiv.org/abs/2402.01739",
    about="Xue et al.: open models in the manner of ST-MoE, studied for what their experts learn: token ids, early in "
    "training.",
    formula="p = softmax(W x);  y = sum over the top 2 of p_i f_i(x), not renormalised",
    figures="32 experts 2048-8192-2048 with SwiGLU, k = 2; capacity factor 1.25 in training, 2.0 in evaluation, at "
    "least 4; losses 1e-2 and z 1e-4.",
    differs="A layer has one capacity factor: the preset has that of evaluation. The released model adds a dense "
    "feed-forward with a residual of its own after the layer.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 2, "score": "softmax", "normalize": "none"},
        "capacity": {"factor": 2.0, "min": 4, "drop": "position"},
        "residual": "none",
        "losses": {"load_balancing": 0.01, "z": 0.0001},
        "experts": [{"kind": "swiglu", "count": 32, "options": {"hidden_features": 8192}}],
    },
)

OLMOE = Preset(
    name="olmoe",
    title="OLMoE-1B-7B",
    year=2024,
    source="https://arxiv.org/abs/2409.02060",
    about="Muennighoff et al.: 8 of 64 small experts, dropless, with everything about the training open.",
    formula="p = softmax(W x);  y = sum over the top 8 of p_i f_i(x), not renormalised",
    figures="64 experts 2048-1024-2048 with SwiGLU, k = 8; losses 1e-2 and z 1e-3.",
    differs="Hugging Face has `norm_topk_prob: false`, as here: weights sum to less than 1.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 8, "score": "softmax", "normalize": "none"},
        "residual": "none",
        "losses": {"load_balancing": 0.01, "z": 0.001},
        "experts": [{"kind": "swiglu", "count": 64, "options": {"hidden_features": 1024}}],
    },
)

PHI_MOE = Preset(
    name="phi_moe",
    title="Phi-3.5-MoE",
    year=2024,
    source="https://arxiv.org/abs/2409.12136",
    about="Liu et al. (GRIN) and Phi-3.5-MoE: SparseMixer estimates the gradient through the choice itself. In "
    "evaluation each of two experts is weighted among the logits close to its own.",
    formula="twice: i = argmax h;  w_i = softmax over {j: (h_i - h_j) / max(|h_j|, h_i) <= 2 eps}, then i is masked;  "
    "y = sum_i w_i f_i(x)",
    figures="16 experts 4096-6400-4096 with SwiGLU, k = 2, eps = 1e-2.",
    differs="Weights do not sum to 1. Training there samples the experts and corrects the gradient by Heun's method; "
    "Hugging Face jitters the input in the layer and again in the router.",
    layer={
        "gate": {"kind": "linear", "jitter_eps": 0.01},
        "policy": {"kind": "sparsemixer", "jitter_eps": 0.01},
        "residual": "none",
        "experts": [{"kind": "swiglu", "count": 16, "options": {"hidden_features": 6400}}],
    },
)

LLAMA4 = Preset(
    name="llama4",
    title="Llama 4 Scout",
    year=2025,
    source="https://ai.meta.com/blog/llama-4-multimodal-intelligence/",
    about="Meta: one routed expert and a shared one per token. The weight scales what the routed expert sees.",
    formula="i = argmax W x;  y = f_shared(x) + f_i(sigmoid((W x)_i) x)",
    figures="16 experts (128 in Maverick) 5120-8192-5120 with SwiGLU, k = 1, one shared expert as wide.",
    differs="Hugging Face runs every expert on every token, the unselected ones on zeros; the answer is the same.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 1, "score": "sigmoid", "normalize": "none"},
        "residual": "none",
        "weight_on": "input",
        "experts": [{"kind": "swiglu", "count": 16, "options": {"hidden_features": 8192}}],
        "shared_experts": [{"kind": "swiglu", "options": {"hidden_features": 8192}}],
    },
)

GPT_OSS = Preset(
    name="gpt_oss",
    title="gpt-oss-120b",
    year=2025,
    source="https://arxiv.org/abs/2508.10925",
    about="OpenAI: four of 128 experts, by a gate with a bias; the softmax is over the four logits alone.",
    formula="h = W x + b;  w = softmax over the top 4 of h;  y = sum_i w_i f_i(x)",
    figures="128 experts (32 in gpt-oss-20b) 2880-2880-2880, k = 4.",
    differs="Its experts have biases and a clamped gated activation; `swiglu` has neither.",
    layer={
        "gate": {"kind": "linear", "bias": True},
        "policy": {"kind": "top_k", "k": 4, "score": "softmax_after_topk", "normalize": "none"},
        "residual": "none",
        "experts": [{"kind": "swiglu", "count": 128, "options": {"hidden_features": 2880}}],
    },
)

PRESETS = (MEGABLOCKS, MIXTRAL, DBRX, OPENMOE, OLMOE, PHI_MOE, LLAMA4, GPT_OSS)
