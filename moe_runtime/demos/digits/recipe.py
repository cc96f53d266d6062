"""What the demo trains and serves: the configuration of its layer and the numbers of its training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moe_runtime.config.load import LoadedConfig
from moe_runtime.config.runtime import RuntimeConfig
from moe_runtime.launch.expansion import expand_experts

if TYPE_CHECKING:
    from moe_runtime.experts.spec import ExpertSpec

LAYER = "digits"

#: The served configuration as it is written beside the weights, comments and all.
CONFIG_TEXT = """\
# Handwritten digits, classified by five experts of different kinds behind one gate.
# Serve it:  moe-runtime serve PATH_OF_THIS_FILE
name: digits-demo
device: auto
start_timeout_s: 120                        # seven processes import torch, on two cores maybe
plug_ins: [moe-runtime-example-expert]
layers:
  digits:
    item_shape: [64]                        # an 8x8 image, flattened, from 0 (paper) to 1 (ink)
    gate: {kind: linear, weights: gate.safetensors}
    policy: {kind: top_k, k: 2, normalize: before_drop}
    capacity: {factor: 1.25, min: 4, drop: position, overflow: drop}
    residual: none
    timeout_ms: 2000
    experts:                                # each answers with 10 logits, one per digit
      - kind: conv                          # sees the image
        name: conv-0
        weights: conv-0.safetensors
        view: {shape: [1, 8, 8]}
        options: {channels: 16, out_features: 10}
        resources: {num_cpus: 0.1, num_gpus: 0}
      - kind: recurrent                     # reads the image row by row
        name: recurrent-0
        weights: recurrent-0.safetensors
        view: {shape: [8, 8]}
        options: {cell: gru, hidden_features: 64, out_features: 10}
        resources: {num_cpus: 0.1, num_gpus: 0}
      - kind: transformer                   # its tokens are the image's rows
        name: transformer-0
        weights: transformer-0.safetensors
        view: {shape: [8, 8]}
        options: {hidden_size: 32, num_heads: 4, num_layers: 1, out_features: 10}
        resources: {num_cpus: 0.1, num_gpus: 0}
      - kind: feed_forward
        name: feed_forward-0
        weights: feed_forward-0.safetensors
        options: {hidden_features: 128, out_features: 10}
        resources: {num_cpus: 0.1, num_gpus: 0}
      - kind: fourier                       # the plug-in of examples/custom_expert
        name: fourier-0
        weights: fourier-0.safetensors
        options: {num_features: 256, length_scale: 3.0, out_features: 10}
        resources: {num_cpus: 0.1, num_gpus: 0}
router: {replicas: 1, max_batch_tokens: 4096, max_wait_ms: 2.0, max_queued_tokens: 65536, address: "127.0.0.1:50051"}
"""

# Part of every recipe's key: another format of the saved files needs another folder.
_FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """Everything that the trained weights depend on; equal recipes give equal weights.

    Attributes:
        config_text: The served configuration, YAML.
        seed: Of the split, the initial parameters, the batches and the dropout.
        held_out_share: Share of the images that is never trained on.
        num_epochs: Passes over the training images.
        batch_size: Images per training step.
        learning_rate: Highest learning rate of AdamW's one cycle.
        weight_decay: AdamW's.
        label_smoothing: Of the cross-entropy; keeps logits small.
        alone_coefficient: Weight of the experts' own cross-entropy, so that each learns to stand alone.
        balance_coefficient: Weight of the load-balancing loss.
        expert_dropout: Probability that an expert is hidden from the gate, per image.
    """

    config_text: str = CONFIG_TEXT
    seed: int = 0
    held_out_share: float = 0.25
    num_epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    label_smoothing: float = 0.05
    alone_coefficient: float = 1.0
    balance_coefficient: float = 0.1
    expert_dropout: float = 0.4

    @property
    def key(self) -> str:
        """Short hash of the recipe, for the name of its cache folder."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def config(self) -> RuntimeConfig:
        """The served configuration."""
        return RuntimeConfig.model_validate(yaml.safe_load(self.config_text))

    def expert_specs(self) -> tuple[ExpertSpec, ...]:
        """The experts before training, in the order of the gate's rows."""
        experts = expand_experts(LoadedConfig(self.config, base_dir=Path()), LAYER)
        return tuple(replace(expert.recipe.spec, weights=None, seed=self.seed) for expert in experts)


DEFAULT_RECIPE = Recipe()
