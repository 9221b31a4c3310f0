"""Makes a small Qwen3-MoE with transformers, and continues prompts with it, greedily, on the CPU.

python checkpoint.py FOLDER PROMPTS     # a JSON list of token lists in, one of (tokens, margin) out; see ``continue_prompts``
"""

import json
import os
import sys

TOKENS = 6


def make(folder):
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=2048, decoder_sparse_step=1, mlp_only_layers=[],
        tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def continue_prompts(model, prompts):
    """The tokens of each prompt, chosen one by one from transformers' own logits without a cache."""
    import torch

    found = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(TOKENS):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            found.append(tokens[len(prompt) :])
    return found


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)
    answer = continue_prompts(make(sys.argv[1]), json.loads(sys.argv[2]))
    with os.fdopen(out, "w") as stream:
        print(json.dumps(answer), file=stream)
