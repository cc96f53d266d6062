"""DeepSeek and Qwen: many small experts, and shared ones beside them, 2024 to 2025."""

from __future__ import annotations

from moe_runtime.config.presets.preset import Preset

DEEPSEEK_MOE = Preset(
    name="deepseek_moe",
    title="DeepSeekMoE 16B",
    year=2024,
    source="https://arxiv.org/abs/2401.06066",
    about="Dai et al.: experts cut into finer ones, more of which serve a token, and shared ones that serve all and "
    "hold what everybody needs.",
    formula="s = softmax(W x);  y = sum_shared f_s(x) + sum over the top 6 of s_i f_i(x), not renormalised",
    figures="64 routed and 2 shared experts 2048-1408-2048 with SwiGLU, k = 6; loss 1e-3 per expert.",
    differs="The paper's larger models add losses per device. DeepSeek-V2's code can renormalise "
    "(`norm_topk_prob`), Hugging Face's ignores that flag and multiplies by `routed_scaling_factor`, 1 here; both fuse "
    "the shared experts into one of the sum of their widths.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 6, "score": "softmax", "normalize": "none"},
        "residual": "none",
        "losses": {"load_balancing": 0.001},
        "experts": [{"kind": "swiglu", "count": 64, "options": {"hidden_features": 1408}}],
        "shared_experts": [{"kind": "swiglu", "count": 2, "options": {"hidden_features": 1408}}],
    },
)

DEEPSEEK_V3 = Preset(
    name="deepseek_v3",
    title="DeepSeek-V3",
    year=2024,
    source="https://arxiv.org/abs/2412.19437",
    about="Sigmoid scores, and balance without a loss to speak of: a bias per expert moves the selection, never the "
    "weights. A token's experts come from 4 of 8 groups, so that it crosses to few nodes.",
    formula="s = sigmoid(W x);  groups scored by the sum of their two best s + b, the best 4 kept;  the top 8 of s + b "
    "in them;  w = 2.5 s_i / sum of the eight s;  y = f_shared(x) + sum_i w_i f_i(x);  after a step "
    "b += 1e-3 sign(mean load - load)",
    figures="256 routed experts and a shared one, 7168-2048-7168 with SwiGLU, k = 8, 8 groups of 32; sequence loss "
    "1e-4.",
    differs="Hugging Face adds 1e-20 to the sum, and for a while masked groups with 0 instead of -inf, so that "
    "negative biased scores could leak. Here b is centred after each step. It stands still while serving unless "
    "`balance.online_bias` is true.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {
            "kind": "top_k",
            "k": 8,
            "score": "sigmoid",
            "normalize": "before_drop",
            "scaling_factor": 2.5,
            "expert_bias": True,
            "groups": {"count": 8, "keep": 4, "score": "top2_sum"},
        },
        "residual": "none",
        "losses": {"sequence": 0.0001},
        "balance": {"rate": 0.001},
        "experts": [{"kind": "swiglu", "count": 256, "options": {"hidden_features": 2048}}],
        "shared_experts": [{"kind": "swiglu", "options": {"hidden_features": 2048}}],
    },
)

QWEN2_MOE = Preset(
    name="qwen2_moe",
    title="Qwen2-57B-A14B",
    year=2024,
    source="https://arxiv.org/abs/2407.10671",
    about="Yang et al.: 8 of 64 experts, and a shared one, as wide as eight, whose weight is a sigmoid of the token.",
    formula="p = softmax(W x);  y = sigmoid(x . g) f_shared(x) + sum over the top 8 of p_i f_i(x), not renormalised",
    figures="64 routed experts 3584-2560-3584 with SwiGLU, k = 8, a shared one of 20480; loss 1e-3.",
    differs="Hugging Face has `norm_topk_prob: false`, as here. Qwen1.5-MoE-A2.7B, of the same code, has 60 experts, "
    "k = 4 and a shared one of 5632.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 8, "score": "softmax", "normalize": "none"},
        "residual": "none",
        "losses": {"load_balancing": 0.001},
        "experts": [{"kind": "swiglu", "count": 64, "options": {"hidden_features": 2560}}],
        "shared_experts": [{"kind": "swiglu", "options": {"hidden_features": 20480}}],
        "shared_gate": "sigmoid",
    },
)

QWEN3_MOE = Preset(
    name="qwen3_moe",
    title="Qwen3-235B-A22B",
    year=2025,
    source="https://arxiv.org/abs/2505.09388",
    about="Yang et al.: 8 of 128 experts and no shared one; weights are renormalised, unlike Qwen2's.",
    formula="p = softmax(W x);  w = top 8 of p, divided by their sum;  y = sum_i w_i f_i(x)",
    figures="128 experts 4096-1536-4096 with SwiGLU, k = 8; loss 1e-3 over the global batch.",
    differs="Hugging Face's class has `norm_topk_prob: false` by default; the released models set it to true.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 8, "score": "softmax", "normalize": "before_drop"},
        "residual": "none",
        "losses": {"load_balancing": 0.001},
        "experts": [{"kind": "swiglu", "count": 128, "options": {"hidden_features": 1536}}],
    },
)

PRESETS = (DEEPSEEK_MOE, DEEPSEEK_V3, QWEN2_MOE, QWEN3_MOE)
