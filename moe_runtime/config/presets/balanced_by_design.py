"""Systems whose loads are even by construction, without a loss or a learned gate: 2021 to 2024."""

from __future__ import annotations

from moe_runtime.config.presets.preset import Preset

BASE_LAYERS = Preset(
    name="base_layers",
    title="BASE Layers",
    year=2021,
    source="https://arxiv.org/abs/2103.16716",
    about="Lewis et al.: in training, a linear assignment gives every expert equally many tokens at the highest total "
    "score, so that no loss is needed; in evaluation each token takes its best expert.",
    formula="training: maximise the sum of x . c_e under T / E tokens per expert;  evaluation: e = argmax x . c_e;  "
    "a = sigmoid(x . c_e);  y = a f_e(x) + (1 - a) x",
    figures="128 experts, one per GPU, 2048-8192-2048 with ReLU.",
    differs="fairseq's expert is a stack of residual sublayers with norms of their own, and its tokens are shuffled "
    "between workers first.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "global_assignment"},
        "residual": "blend",
        "experts": [{"kind": "feed_forward", "count": 128, "options": {"hidden_features": 8192, "activation": "relu"}}],
    },
)

HASH_LAYERS = Preset(
    name="hash_layers",
    title="Hash Layers",
    year=2021,
    source="https://arxiv.org/abs/2106.04426",
    about="Roller et al.: a fixed hash of the token's id names the expert. Nothing is learned, and it rivals what is.",
    formula="e = hash(token id) mod E;  y = f_e(x)",
    figures="One layer of 64 experts 1024-4096-1024.",
    differs="The paper's best tables are balanced by the frequency of the ids; the hash here is even over ids, not "
    "over text. Its MultiHash splits an expert's matrices; `k: 2` here is two whole experts of weight 1/2.",
    layer={
        "policy": {"kind": "hash", "k": 1},
        "residual": "none",
        "experts": [{"kind": "feed_forward", "count": 64, "options": {"hidden_features": 4096, "activation": "relu"}}],
    },
)

EXPERT_CHOICE = Preset(
    name="expert_choice",
    title="Expert Choice",
    year=2022,
    source="https://arxiv.org/abs/2202.09368",
    about="Zhou et al.: experts choose tokens. Loads are equal by construction; a token may get several experts, or "
    "none.",
    formula="S = softmax(X W) over experts;  each expert takes the top C = c T / E of its column of S;  "
    "y_t = sum over the experts that took t of S_te f_e(x_t)",
    figures="8B/64E: 64 experts 2048-8192-2048, c = 2.",
    differs="A token's answer depends on its batch, future tokens included; so a request is a batch of its own unless "
    "`allow_batch_coupled` is true. The paper's variant with a cap on experts per token is not here.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "expert_choice", "capacity_factor": 2.0, "score": "softmax", "normalize": "none"},
        "residual": "none",
        "experts": [{"kind": "feed_forward", "count": 64, "options": {"hidden_features": 8192, "activation": "gelu"}}],
    },
)

DIFFUSION_MOE = Preset(
    name="diffusion_moe",
    title="EC-DiT",
    year=2024,
    source="https://arxiv.org/abs/2410.02098",
    about="Sun et al.: a diffusion Transformer whose experts choose among the patches of one image, so that detailed "
    "regions get more of them. The gate sees the time step with the patch.",
    formula="S = softmax(W [x_t; embedding of the time step]) over experts;  each expert takes the top C = c T / E "
    "patches;  y_t = sum over the experts that took t of S_te f_e(x_t)",
    figures="Up to 97 billion parameters with 64 experts, c = 2. The width here is DiT-XL's, 1152-4608-1152.",
    differs="A request is one image: send the gate's own input, patch and embedding side by side, as `gate_input`, "
    "and set `gate.in_features` to its width. There the time step reaches the gate through the norm before it.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "expert_choice", "capacity_factor": 2.0, "score": "softmax", "normalize": "none"},
        "residual": "none",
        "allow_batch_coupled": False,
        "experts": [{"kind": "feed_forward", "count": 64, "options": {"hidden_features": 4608, "activation": "gelu"}}],
    },
)

PRESETS = (BASE_LAYERS, HASH_LAYERS, EXPERT_CHOICE, DIFFUSION_MOE)
