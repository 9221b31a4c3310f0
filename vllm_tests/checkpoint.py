"""Makes small checkpoints with transformers, as models that vLLM serves, and continues prompts with one, greedily, on the CPU.

python checkpoint.py '{"folder": ..., "model": "qwen3_moe", "quantisation": "none", "prompts": [[1, 2], ...]}'    # see Settings

Prints what transformers continues each prompt with (``continue_prompts``). Quantised checkpoints are in the format of
ModelSlim, which vllm-ascend reads: experts alone are quantised, and quant_model_description.json says how each weight is kept.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

TOKENS = 6
DESCRIPTION = "quant_model_description.json"
KINDS = {"w8a8": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to make.

    Attributes:
        folder: of the checkpoint.
        model: a name of ``MODELS``.
        quantisation: of the experts: none, w8a8, w4a8.
        dtype: of the weights that are not quantised.
        prompts: to continue; the model is then computed in float32.
        config: further arguments of the model's configuration.
    """

    folder: str
    model: str = "qwen3_moe"
    quantisation: str = "none"
    dtype: str = "float32"
    prompts: list[list[int]] = dataclasses.field(default_factory=list)
    config: dict[str, object] = dataclasses.field(default_factory=dict)


def qwen3_moe(**changes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "max_position_embeddings": 2048,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "initializer_range": 0.08,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**config, **changes}))


def deepseek_v3(**changes):
    """MLA in its real widths, one dense layer, then shared experts and groups of experts with a correction bias."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.08,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "topk_method": "noaux_tc",  # what vLLM reads, and transformers does not
        "scoring_func": "sigmoid",
    }
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**config, **changes}))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand(buffer.shape) * 0.2)
    return model


MODELS = {"qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}
BEST = 5  # log probabilities of so many first tokens


def make(settings):
    import torch

    torch.manual_seed(0)
    model = MODELS[settings.model](**settings.config).to(getattr(torch, settings.dtype)).eval()
    model.save_pretrained(settings.folder)
    if settings.quantisation != "none":
        quantise(Path(settings.folder), settings.quantisation)
    return model.float()


def quantise(folder, quantisation):
    """Replace the experts' weights [N, K] of a checkpoint by what ModelSlim writes: each line by itself, symmetric."""
    import torch
    from safetensors.torch import load_file, save_file

    [path] = folder.glob("*.safetensors")
    kept, description = {}, {"version": "1.0.0", "group_size": 0, "model_quant_type": KINDS[quantisation]}
    for name, tensor in load_file(path).items():
        if ".mlp.experts." not in name:
            kept[name], description[name] = tensor, "FLOAT"
            continue
        base = name.removesuffix(".weight")
        most = 127 if quantisation == "w8a8" else 7
        scale = tensor.float().abs().amax(1, keepdim=True) / most
        if quantisation == "w8a8":
            scale = scale.to(tensor.dtype).float()  # vllm-ascend keeps it in the model's dtype
        whole = (tensor.float() / scale).round().clamp(-most, most).to(torch.int8)
        parts = {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
        if quantisation == "w8a8":
            parts = {part: value.to(tensor.dtype) for part, value in parts.items()} | {"weight": whole}
        else:
            # two neighbouring lines in one, the first in the lower half
            packed = (whole[1::2] << 4) | (whole[::2] & 15)
            bias = 8 * (whole.float() * scale).sum(1, keepdim=True)
            if "down_proj" in name:  # one column for each of 16 TP ranks; their sum counts
                bias = torch.cat([bias, bias.new_zeros(len(bias), 15)], 1)
            parts |= {"weight": packed.contiguous(), "scale_bias": bias}
        for part, value in parts.items():
            kept[f"{base}.{part}"], description[f"{base}.{part}"] = value, KINDS[quantisation]
    save_file(kept, path, {"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(description))


def continue_prompts(model, prompts):
    """The tokens of each prompt, chosen one by one from transformers' own logits without a cache, and the log probabilities of
    the best first tokens."""
    import torch

    found = {"tokens": [], "logprobs": []}
    with torch.no_grad():
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(TOKENS):
                logits = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
                if len(tokens) == len(prompt):
                    best = logits.topk(BEST)
                    found["logprobs"].append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
                tokens.append(int(logits.argmax()))
            found["tokens"].append(tokens[len(prompt) :])
    return found


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)
    asked = Settings(**json.loads(sys.argv[1]))
    answer = continue_prompts(make(asked), asked.prompts)
    with os.fdopen(out, "w") as stream:
        print(json.dumps(answer), file=stream)
