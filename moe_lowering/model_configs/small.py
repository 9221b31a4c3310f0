"""A config of the same type with the dimensions of a small instance, and few layers, the last of which has experts.

What a config derives from its sizes is derived anew. What is said per layer (a list as long as the model is deep) is cut to
the layers that are left: MoE layers rather than dense ones, full attention where the model has it. What no rule covers
stands in ``OF_TYPE``, by the type of the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_lowering.model_configs.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """Those of a small instance.

    Attributes:
        intermediate: of routed and shared experts and of dense layers.
        rank: of the projections of multi-head latent attention, and the parts of its heads.
        groups, topk_groups: of experts, for models that route in groups.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    head_dim: int
    rank: int
    vocabulary: int
    groups: int
    topk_groups: int


# Names that configs have for a dimension, beside those that only some types have (OF_TYPE).
_NAMES = {
    "hidden": ("hidden_size", "d_model"),
    "intermediate": (
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_experts_intermediate_size",
        "shared_intermediate_size",
        "expert_ffn_hidden_size",
        "ffn_hidden_size",
        "share_expert_dim",
        "intermediate_size_mlp",
        "dense_intermediate_size",
        "d_ff",
    ),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_k",
        "moe_top_k",
    ),
    "heads": ("num_attention_heads", "num_key_value_heads", "num_heads", "n_heads"),
    "head_dim": ("head_dim", "kv_channels"),
    "rank": ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "o_lora_rank"),
    "vocabulary": ("vocab_size",),
}
# Set where the default is None too; elsewhere None says that a model does without (q_lora_rank).
_NEEDED = (*_NAMES["experts"], "num_experts_per_tok", "top_k_experts", "moe_intermediate_size", "head_dim")
_GROUPS = (("n_group", "topk_group"), ("num_expert_group", "topk_group"))
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# Layers of these kinds are taken from a list per layer, in this order; where it has none, those that it ends with.
_PREFERRED = ("sparse", "moe", "full_attention")
# Numbers of layers that a config derives anew, or that name layers that are gone; without them each layer has experts.
_OF_WHOLE_DEPTH: dict[str, Any] = {"mlp_only_layers": [], "moe_layers": None, "kv_source_layers": None}
_DERIVED = ("transformers_version", "model_type", "per_layer_config")  # per_layer_config: layers are alike then

# By the type of the config: what it needs beside the names above. A function takes the dimensions and the number of layers.
OF_TYPE: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": lambda sizes, layers: {"kv_n_heads": sizes.heads, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": lambda sizes, layers: {
            "hidden_size": sizes.hidden,
            "ffn_hidden_size": sizes.intermediate,
            "moe_num_experts": sizes.experts,
            "moe_top_k": sizes.top_k,
        },
    },
    "deepseek_ocr2_text": {"mlp_layer_types": lambda sizes, layers: ["sparse"] * layers},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": lambda sizes, layers: {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "mrope_section": [sizes.head_dim // 8, sizes.head_dim // 8, sizes.head_dim // 4],
        },
        "head_dim": lambda sizes, layers: sizes.head_dim,
    },
    "flint": {"decoder_sparse_step": 1},
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe_text": {
        "rope_parameters": lambda sizes, layers: {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [sizes.head_dim // 16, sizes.head_dim // 16, sizes.head_dim // 8],
        },
        "head_dim": lambda sizes, layers: sizes.head_dim,
    },
    "mistral4": {"head_dim": lambda sizes, layers: 2 * sizes.rank},
    "granitemoehybrid": {
        "layer_types": lambda sizes, layers: ["full_attention"] * layers,
        "mamba_n_heads": lambda sizes, layers: sizes.heads,
        "mamba_d_head": "auto",
    },
    "lfm2_moe": {"layer_types": lambda sizes, layers: ["full_attention"] * layers},
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0},
    "longcat_flash": {  # two attentions in each layer count as two
        "zero_expert_num": 2,
        "num_layers": lambda sizes, layers: layers,
        "num_hidden_layers": lambda sizes, layers: 2 * layers,
    },
    "muse_spark_text": {"moe_hidden_size": lambda sizes, layers: sizes.hidden},
    "nemotron_h": {"layers_block_type": lambda sizes, layers: ["moe"] * layers},
    "nllb-moe": {
        "encoder_layers": lambda sizes, layers: layers,
        "decoder_layers": lambda sizes, layers: layers,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "encoder_ffn_dim": lambda sizes, layers: sizes.intermediate,
        "decoder_ffn_dim": lambda sizes, layers: sizes.intermediate,
        "encoder_attention_heads": lambda sizes, layers: sizes.heads,
        "decoder_attention_heads": lambda sizes, layers: sizes.heads,
    },
    "qwen4_exp_text": {
        # its other kind of attention chooses blocks by what tokens hold, which no graph has whole
        "layer_types": lambda sizes, layers: ["linear_attention"] * layers,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": lambda sizes, layers: sizes.head_dim,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 4,
    },
    "step3p5": {"sliding_window": 128},  # of step3p7; its default is None, which its own code refuses
    "switch_transformers": {
        "num_layers": lambda sizes, layers: layers,
        "num_decoder_layers": lambda sizes, layers: layers,
        "num_sparse_encoder_layers": lambda sizes, layers: layers,
        "num_sparse_decoder_layers": lambda sizes, layers: layers,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "d_kv": lambda sizes, layers: sizes.head_dim,
    },
}


def shrink(config: Any, sizes: Dimensions, layers: int) -> Any:
    """The config of a small instance with ``layers`` layers.

    Raises:
        ModelError: its class refuses the sizes.
    """
    return rebuild(config, {**_of_layers(config, layers), **_of_sizes(config, sizes, layers)})


def with_layers(config: Any, layers: int) -> Any:
    """The config with another number of layers, of which MoE layers are left."""
    return rebuild(config, _of_layers(config, layers)) if layers != config.num_hidden_layers else config


def _of_sizes(config: Any, sizes: Dimensions, layers: int) -> dict[str, Any]:
    old, values = config.to_dict(), {}
    for dimension, names in _NAMES.items():
        new = getattr(sizes, dimension)
        for name in names:
            value = old.get(name)
            if value is None and not (name in _NEEDED and hasattr(config, name)):
                continue
            if value != 0:  # of a part that the model does without
                values[name] = [new] * len(value) if isinstance(value, list) else new
    if old.get("num_experts_per_tok") == 1:
        values["num_experts_per_tok"] = 1  # of models whose routing is written for one expert
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]  # what such configs call head_dim
    if old.get("qk_head_dim"):  # the sum of its parts
        values["qk_head_dim"] = values.get("qk_rope_head_dim", 0) + values.get("qk_nope_head_dim", 0)
    for groups, used in _GROUPS:
        if (old.get(groups) or 1) > 1:
            values |= {groups: sizes.groups, used: sizes.topk_groups}
    values |= {name: token for name, token in _TOKENS.items() if name in old}
    for name, value in OF_TYPE.get(config.model_type, {}).items():
        values[name] = value(sizes, layers) if callable(value) else value
    return values


def _of_layers(config: Any, layers: int) -> dict[str, Any]:
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    for name in _DENSE_FIRST:
        if isinstance(value := getattr(config, name, None), int):
            changes[name] = min(value, layers - 1)
    return changes | {name: value for name, value in _OF_WHOLE_DEPTH.items() if name in config.to_dict()}


def rebuild(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config of the same type with some values changed; lists per layer are cut to its layers.

    Raises:
        ModelError: its class refuses the values.
    """
    depth = config.num_hidden_layers
    layers = changes.get("num_hidden_layers", depth)
    values = {name: value for name, value in config.to_diff_dict().items() if name not in _DERIVED}
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth != layers:
            values[name] = _cut(value, layers)
    try:
        return type(config)(**{**values, **changes})
    except Exception as error:  # whatever a config class raises for its values
        raise ModelError(f"{config.model_type} cannot be resized: {' '.join(str(error).split())}") from error


def _cut(values: list[Any], layers: int) -> list[Any]:
    """What is left of a list per layer."""
    kind = next((kind for kind in _PREFERRED if kind in values), None)
    if kind is not None:
        return [kind] * layers
    if isinstance(values[0], str):
        return (values * layers)[-layers:]
    return (values * layers)[:layers]
