"""Options by the names that their meaning has elsewhere: fields of ``Deployment`` in refusals, words of models' configs and of
vLLM."""

from __future__ import annotations

import re

# The option of `explain` and `lower` for a field of Deployment, which is what refusals name; with the value that an option
# without one stands for.
FIELD_OPTIONS = {
    "soc": "--soc",
    "ep_size": "--ep",
    "tp_size": "--tp",
    "max_tokens": "--max-tokens",
    "equal_tokens=False": "--unequal-tokens",
    "hccl_buffer_mb": "--buffer-mb",
    "weight_format": "--weight-format",
    "cann": "--cann",
    "providers": "--provider",
    "fused_mode": "--fused-mode",
    "mc2_hierarchy": "--hierarchy",
    "unpermute_operator": "--unpermute-operator",
    "ranks_per_node": "--ranks-per-node",
    "measured": "--measured",
}

# What configs of models, vLLM and Deployment call what an option says.
OTHER_NAMES = {
    "hidden_size": "--hidden",
    "intermediate_size": "--intermediate",
    "moe_intermediate_size": "--intermediate",
    "num_experts": "--experts",
    "num_local_experts": "--experts",
    "n_routed_experts": "--experts",
    "num_experts_per_tok": "--topk",
    "top_k": "--topk",
    "quantisation": "--quant",
    "quantization": "--quant",
    "ep_size": "--ep",
    "tp_size": "--tp",
    "tensor_parallel_size": "--tp",
    "hccl_buffer_mb": "--buffer-mb",
    "providers": "--provider",
    "max_num_batched_tokens": "--max-tokens",
}


def name_options(text: str) -> str:
    """The options for the fields of Deployment that a text names; "" for none."""
    named = dict.fromkeys(re.findall(r"\bDeployment\.(\w+)", text))
    options = {field.partition("=")[0]: (field, option) for field, option in FIELD_OPTIONS.items()}
    texts = {name: f"Deployment.{options[name][0]} is {options[name][1]}" for name in named if name in options}
    if "max_tokens" in texts:  # a bound below T is refused
        texts["max_tokens"] += " (T itself is --tokens)"
    return ", ".join(texts.values())
