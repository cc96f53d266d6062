"""Transformers that grew by experts: GShard and what followed it, 2020 to 2022."""

from __future__ import annotations

from moe_runtime.config.presets.preset import Preset

GSHARD = Preset(
    name="gshard",
    title="GShard",
    year=2020,
    source="https://arxiv.org/abs/2006.16668",
    about="Lepikhin et al.: translation of 100 languages with two experts per token, the second by chance of its "
    "weight, and a capacity beyond which assignments are dropped.",
    formula="g = softmax(W x);  g1, g2 = top 2 of g, divided by g1 + g2;  the second is kept with probability "
    "min(1, 2 g2);  y = g1 f_1(x) + g2 f_2(x);  C = 2 T / E",
    figures="600 billion parameters: 2048 experts per layer, 1024-8192-1024 with ReLU.",
    differs="Mesh-TensorFlow keeps the second with probability min(1, g2 / 0.2). NLLB's code compares the "
    "un-normalised g2. The paper gives no weight of its loss; 1e-2 is Mesh-TensorFlow's. It counts only first choices "
    "in the loss; here all count.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "gshard_top2", "second": "proportional", "normalize": "before_drop"},
        "capacity": {"factor": 1.0, "drop": "position"},
        "residual": "none",
        "losses": {"load_balancing": 0.01},
        "experts": [
            {"kind": "feed_forward", "count": 2048, "options": {"hidden_features": 8192, "activation": "relu"}}
        ],
    },
)

SWITCH = Preset(
    name="switch",
    title="Switch Transformer",
    year=2021,
    source="https://arxiv.org/abs/2101.03961",
    about="Fedus, Zoph and Shazeer: one expert per token is enough. Its output is scaled by the probability among all "
    "experts, which is what trains the gate.",
    formula="p = softmax(W x), x jittered by U[0.99, 1.01] in training;  i = argmax p;  y = p_i f_i(x);  "
    "C = 1.25 T / E",
    figures="Switch-Base: 128 experts 768-2048-768 with ReLU; capacity factors 1.0 to 2.0; loss 1e-2.",
    differs="Hugging Face counts capacity per sequence, as a fixed number (64), and places tokens by position. "
    "Mesh-TensorFlow's evaluation takes a factor of 2.0.",
    layer={
        "gate": {"kind": "linear", "jitter_eps": 0.01},
        "policy": {"kind": "switch"},
        "capacity": {"factor": 1.25, "drop": "position"},
        "residual": "none",
        "losses": {"load_balancing": 0.01},
        "experts": [
            {
                "kind": "feed_forward",
                "count": 128,
                "options": {"hidden_features": 2048, "activation": "relu", "bias": False},
            }
        ],
    },
)

GLAM = Preset(
    name="glam",
    title="GLaM",
    year=2021,
    source="https://arxiv.org/abs/2112.06905",
    about="Du et al.: a language model of 1.2 trillion parameters that activates 97 billion: every other layer has 64 "
    "experts, of which a token takes two.",
    formula="g = softmax(W x);  y = sum over the top 2 of g_i / (g_1 + g_2) f_i(x)",
    figures="64B/64E: 64 experts 8192-32768-8192, k = 2, loss 1e-2.",
    differs="The paper gives no capacity; GShard's is taken, without its chance for the second expert.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "top_k", "k": 2, "score": "softmax", "normalize": "before_drop"},
        "capacity": {"factor": 1.0, "drop": "position"},
        "residual": "none",
        "losses": {"load_balancing": 0.01},
        "experts": [{"kind": "feed_forward", "count": 64, "options": {"hidden_features": 32768, "activation": "gelu"}}],
    },
)

VMOE = Preset(
    name="vmoe",
    title="Vision MoE",
    year=2021,
    source="https://arxiv.org/abs/2106.05974",
    about="Riquelme et al.: a Vision Transformer with experts over image patches. When an expert is full, the patches "
    "with the lowest gate scores are dropped: batch priority routing.",
    formula="g = softmax(W x + noise);  y = sum over the top k of g_i f_i(x), not renormalised;  "
    "C = 1.05 k T / E, places given by the highest score first",
    figures="V-MoE-L/16: 32 experts 1024-4096-1024 with GELU, k = 2, capacity ratio 1.05; importance and load losses "
    "share 1e-2.",
    differs="The noise there is N(0, 1/E^2), fixed; the `noisy` gate here learns its size. There C is rounded up to a "
    "multiple of 4; here it is at least 4. The released code evaluates with a larger capacity.",
    layer={
        "gate": {"kind": "noisy"},
        "policy": {"kind": "top_k", "k": 2, "score": "softmax", "normalize": "none"},
        "capacity": {"factor": 1.05, "drop": "priority"},
        "residual": "none",
        "losses": {"importance": 0.005, "load": 0.005},
        "experts": [{"kind": "feed_forward", "count": 32, "options": {"hidden_features": 4096, "activation": "gelu"}}],
    },
)

ST_MOE = Preset(
    name="st_moe",
    title="ST-MoE",
    year=2022,
    source="https://arxiv.org/abs/2202.08906",
    about="Zoph et al.: what makes sparse models stable and good to fine-tune; the z-loss on the logits is theirs.",
    formula="g = softmax(W x);  top 2, divided by their sum, the second kept with probability min(1, g2 / 0.2) in "
    "training;  loss += 1e-3 mean(logsumexp(W x)^2)",
    figures="ST-MoE-32B: 64 experts 5120-20480-5120, k = 2; capacity factor 1.25 in training, 2.0 in evaluation; "
    "losses 1e-2 and 1e-3.",
    differs="A layer has one capacity factor: the preset has that of evaluation, so set `capacity: {factor: 1.25}` to "
    "train. The paper's experts are gated by GELU; `swiglu` is by SiLU.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "gshard_top2", "second": "threshold", "threshold": 0.2, "normalize": "before_drop"},
        "capacity": {"factor": 2.0, "drop": "position"},
        "residual": "none",
        "losses": {"load_balancing": 0.01, "z": 0.001},
        "experts": [{"kind": "swiglu", "count": 64, "options": {"hidden_features": 20480}}],
    },
)

NLLB = Preset(
    name="nllb",
    title="NLLB-200 (conditional MoE routing)",
    year=2022,
    source="https://arxiv.org/abs/2207.04672",
    about="No Language Left Behind: translation of 200 languages. A first gate decides between a shared feed-forward "
    "and the experts, so that rare languages need not learn to use many; then two experts are chosen.",
    formula="(s, 1 - s) = softmax of the first level;  g = softmax over the experts;  "
    "y = s f_shared(x), or (1 - s) times the sum over the top 2 of g_i f_i(x)",
    figures="54.5 billion parameters: 128 experts 2048-8192-2048 with ReLU every fourth layer, k = 2, loss 1e-2; no "
    "drops in evaluation.",
    differs="fairseq computes both sides and blends them in training. Hugging Face has the top-2 level alone and "
    "normalises by a flag, after dropping by default; with `second_expert_policy: random` it compares the "
    "un-normalised probability and so undoes a normalisation before dropping.",
    layer={
        "gate": {"kind": "linear"},
        "policy": {"kind": "hierarchical", "mode": "shared_first", "k": 2},
        "residual": "none",
        "losses": {"load_balancing": 0.01},
        "experts": [
            {
                "kind": "feed_forward",
                "name": "shared",
                "options": {"hidden_features": 8192, "activation": "relu"},
            },
            {"kind": "feed_forward", "count": 128, "options": {"hidden_features": 8192, "activation": "relu"}},
        ],
    },
)

PRESETS = (GSHARD, SWITCH, GLAM, VMOE, ST_MOE, NLLB)
