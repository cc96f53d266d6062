"""Mixtures of experts before Transformers: 1991 to 2018."""

from __future__ import annotations

from moe_runtime.config.presets.preset import Preset

JACOBS_1991 = Preset(
    name="jacobs_1991",
    title="Adaptive Mixtures of Local Experts",
    year=1991,
    source="https://doi.org/10.1162/neco.1991.3.1.79",
    about="Jacobs, Jordan, Nowlan and Hinton: small networks that compete for the cases of a task. Every expert serves "
    "every token; the gate's softmax says how much each counts.",
    formula="w = softmax(W x + b);  y = sum_i w_i f_i(x)",
    figures="Vowels by two formants: 4 or 8 experts, 4 classes.",
    differs="The paper's experts have linear decision surfaces, and its training maximises the likelihood of a mixture "
    "rather than the accuracy of the sum. `feed_forward` has a hidden layer.",
    layer={
        "gate": {"kind": "linear", "bias": True},
        "policy": {"kind": "dense"},
        "residual": "none",
        "experts": [{"kind": "feed_forward", "count": 4, "options": {"hidden_features": 4}}],
    },
)

EIGEN_2013 = Preset(
    name="eigen_2013",
    title="Deep Mixture of Experts",
    year=2013,
    source="https://arxiv.org/abs/1312.4314",
    about="Eigen, Ranzato and Sutskever: two mixtures on top of each other, each with a gate of its own that has a "
    "hidden layer, so that a token's path is a product of choices.",
    formula="w = softmax(W2 relu(W1 x + b1) + b2);  y = sum_i w_i f_i(x), per layer",
    figures="Jittered MNIST: two layers of 4 experts with 100 units, gates with 50 and 20 hidden units.",
    differs="The paper's expert is one linear layer with ReLU; `feed_forward` has a second. In training it bars "
    "experts that are ahead of the mean by a margin; here training has the losses of `losses` instead.",
    layer={
        "gate": {"kind": "mlp", "bias": True, "hidden_features": 50},
        "policy": {"kind": "dense"},
        "residual": "none",
        "experts": [{"kind": "feed_forward", "count": 4, "options": {"hidden_features": 100, "activation": "relu"}}],
    },
)

SHAZEER_2017 = Preset(
    name="shazeer_2017",
    title="Sparsely-Gated Mixture-of-Experts",
    year=2017,
    source="https://arxiv.org/abs/1701.06538",
    about="Shazeer et al.: only the best k of many experts serve a token, and noise on the logits, learned per expert, "
    "lets others be tried. Two losses keep importance and load even.",
    formula="H = W x + N(0,1) (softplus(W_noise x) + 1e-2) in training;  w = softmax over the top k of H;  "
    "y = sum_i w_i f_i(x)",
    figures="Language model MoE-256: 256 experts 512-1024-512 with ReLU, k = 4. Coefficients of both losses: 1e-2 in "
    "translation, 1e-1 in language modelling.",
    differs="The softmax is over the k selected; V-MoE's is over all. The hierarchical variants (k = 2 of groups, then "
    "k = 2 within) are policy `hierarchical`, `mode: tree`.",
    layer={
        "gate": {"kind": "noisy"},
        "policy": {"kind": "top_k", "k": 4, "score": "softmax_after_topk", "normalize": "none"},
        "residual": "none",
        "losses": {"importance": 0.01, "load": 0.01},
        "experts": [{"kind": "feed_forward", "count": 256, "options": {"hidden_features": 1024, "activation": "relu"}}],
    },
)

MULTIMODEL = Preset(
    name="multimodel",
    title="MultiModel (One Model To Learn Them All)",
    year=2017,
    source="https://arxiv.org/abs/1706.05137",
    about="Kaiser et al.: one network for eight tasks in several modalities, with the layer of Shazeer et al. inside; "
    "the tasks share its experts.",
    formula="As shazeer_2017.",
    figures="240 experts for the eight tasks together, 60 for a single one; k = 4.",
    differs="The paper gives no width of an expert; 2048 is taken here.",
    layer={
        "gate": {"kind": "noisy"},
        "policy": {"kind": "top_k", "k": 4, "score": "softmax_after_topk", "normalize": "none"},
        "residual": "none",
        "losses": {"importance": 0.01, "load": 0.01},
        "experts": [{"kind": "feed_forward", "count": 240, "options": {"hidden_features": 2048, "activation": "relu"}}],
    },
)

MMOE = Preset(
    name="mmoe",
    title="Multi-gate Mixture-of-Experts",
    year=2018,
    source="https://doi.org/10.1145/3219819.3220007",
    about="Ma et al.: several tasks over one pool of experts, each task with a gate of its own. A request names its "
    "task.",
    formula="w = softmax(W_task x);  y_task = sum_i w_i f_i(x)",
    figures="8 experts with 16 units; two tasks, such as income and marital status of the census.",
    differs="The paper's towers, one per task on top of y, are the caller's. There every token is asked for all "
    "tasks; here a request asks for one.",
    layer={
        "gate": {"kind": "multi", "tasks": ["income", "marital_status"]},
        "policy": {"kind": "dense"},
        "residual": "none",
        "experts": [{"kind": "feed_forward", "count": 8, "options": {"hidden_features": 16, "activation": "relu"}}],
    },
)

PRESETS = (JACOBS_1991, EIGEN_2013, SHAZEER_2017, MULTIMODEL, MMOE)
