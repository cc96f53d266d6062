"""A Hugging Face model whose experts live in Ray actors, and the same model in one process.

Run: python examples/06_hugging_face.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import moe_runtime.integrations.transformers as moe_hf

# Tiny and random, so that nothing has to be fetched: any Mixtral, Qwen, DeepSeek, gpt-oss, ... goes the same way.
CONFIG = MixtralConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
)


def main() -> None:
    torch.manual_seed(0)
    prompt = torch.tensor([[1, 17, 42, 99]])
    with tempfile.TemporaryDirectory() as path:
        MixtralForCausalLM(CONFIG).save_pretrained(path)
        whole = AutoModelForCausalLM.from_pretrained(path, experts_implementation="grouped_mm")

        # Two actors of two experts each, for all three layers; Ray is started when there is none.
        model = moe_hf.load(path, experts_per_actor=2)
        try:
            here = sum(parameter.numel() for parameter in model.parameters())
            print(f"parameters: {here:,} here, of {sum(parameter.numel() for parameter in whole.parameters()):,}")

            tokens = model.generate(prompt, max_new_tokens=12, do_sample=False)
            same = torch.equal(tokens, whole.generate(prompt, max_new_tokens=12, do_sample=False))
            print(f"tokens: {tokens[0, 4:].tolist()}, {'the same' if same else 'others'} in one process")

            view = moe_hf.experts(model)
            print(f"actors: {len({actor.pid for layer in view.layers for e in layer.experts for actor in e.actors})}")
            for layer in view.layers:
                print(f"{layer.module}: {[expert.num_assignments for expert in layer.experts]} tokens per expert")
        finally:
            moe_hf.close(model)


if __name__ == "__main__":
    main()
