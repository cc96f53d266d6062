"""The process that runs a model never holds its experts; whoever has them reads only their tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

#: 8 experts of 3 matrices in 2 layers.
HIDDEN, INTERMEDIATE, NUM_EXPERTS, NUM_LAYERS = 512, 3328, 8, 2
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 4 * NUM_EXPERTS * NUM_LAYERS

LOAD = """
import json, sys, threading
from pathlib import Path
import torch, transformers
import moe_runtime.integrations.transformers as moe_hf
from moe_runtime.integrations.transformers import entry
from moe_runtime.errors import StartError
from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint

transformers.utils.logging.disable_progress_bar()
path, small = sys.argv[1:]

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

class NoActors:
    def __init__(self, at_start):
        self.at_start = at_start
    def provide(self, source, placement, *, dtypes, stack):
        self.read = source.checkpoint.bytes_read
        self.grown = anonymous_bytes() - self.at_start
        raise StartError("that was all")

def load(path):
    transformers.AutoConfig.from_pretrained(path)
    provider = NoActors(anonymous_bytes())
    with entry.used(provider, entry.Placement()):
        try:
            transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_runtime")
        except StartError:
            return provider

load(small)  # what is imported meanwhile does not count
found = load(path)
print(json.dumps({"grown": found.grown, "read": found.read}))
"""


def save_mixtral(path: Path, *, hidden: int, intermediate: int) -> None:
    """A checkpoint of zeros in its files' layout, made without the model: of so many bytes that they would be seen."""
    path.mkdir()
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": NUM_LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": NUM_EXPERTS}
    (path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "vocab_size": 64,
                "dtype": "float32",
                **sizes,
                **heads,
            }
        )
    )
    tensors = {
        "model.embed_tokens.weight": (64, hidden),
        "lm_head.weight": (64, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = (hidden,)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = (NUM_EXPERTS, hidden)
        for expert in range(NUM_EXPERTS):
            for name, shape in (
                ("w1", (intermediate, hidden)),
                ("w2", (hidden, intermediate)),
                ("w3", (intermediate, hidden)),
            ):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path / "model.safetensors")


@pytest.mark.timeout(240)
def test_loading_a_model_takes_no_memory_for_its_experts_and_reads_none_of_them(tmp_path):
    save_mixtral(tmp_path / "small", hidden=32, intermediate=64)
    save_mixtral(tmp_path / "large", hidden=HIDDEN, intermediate=INTERMEDIATE)
    assert EXPERT_BYTES > 300e6
    arguments = [sys.executable, "-c", LOAD, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(
        arguments, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True, timeout=220
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["read"] == 0
    assert found["grown"] < 0.1 * EXPERT_BYTES
