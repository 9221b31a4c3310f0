"""Small transformers models, and servers of them, for the tests of ``moe_lowering.serving``."""

import torch
import transformers

from moe_lowering.serving import Server

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
    "n_routed_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "initializer_range": 0.2, "max_position_embeddings": 128,
}  # fmt: skip
TOP_K = SIZES["num_experts_per_tok"]


def make(family="qwen3_moe", attention="sdpa", where="cpu", **changes):
    default = transformers.AutoConfig.for_model(family)
    sizes = {name: value for name, value in {**SIZES, **changes}.items() if hasattr(default, name)}
    if family == "deepseek_v3":
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    torch.manual_seed(0)
    config = type(default)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.set_experts_implementation("moe_lowering")
    return model.to(where)


def small(model, **options):
    """A server on CPU, without captures."""
    return Server(model, **{"buckets": (2,), "max_length": 16, "prefill_lengths": (), "force_eager": True, **options})
