"""Configs of the models that ``lower`` takes, in full or in a small size. No model is built, and no torch is imported."""

from __future__ import annotations

from typing import Any

from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.check import ACCEPTED, NAMES, OWN, OWN_SIZES, first_of, path_of, read_config
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.model_configs.read import read_text_config

# Dimensions of a small instance, for every implementation the same. They are the smallest that MC2 takes (hidden 1024)
# with experts for 8 ranks of two or more; heads are few and the vocabulary small because they do not matter here.
SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_local_experts": 16,
    "num_experts": 16,
    "n_routed_experts": 16,
    "moe_num_experts": 16,
    "num_experts_per_tok": 4,
    "top_k_experts": 4,
    "moe_topk": 4,
    "moe_k": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # multi-head latent attention; the rotary part is what such configs call head_dim
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
EXPERT_COUNTS = NAMES["experts"]
# Set where the default is None too; elsewhere None says that a model does without (e.g. q_lora_rank).
NEEDED = (*EXPERT_COUNTS, "num_experts_per_tok", "moe_intermediate_size", "head_dim")
SMALL_LAYERS = 2
SMALL_GROUPS = {"n_group": 4, "topk_group": 2}  # for models whose default is grouped: 8 experts remain, of which 4
FULL_OWN_LAYERS = 4  # of OWN with its full sizes


def config_of(request: LowerRequest) -> Any:
    """The config of a type or of a file, with the command's number of layers; of a type, small unless ``--fake``.

    Raises:
        UsageError: one line with what is wrong with the model.
    """
    try:
        config = read_text_config(request.model)
    except ModelError as error:
        raise UsageError(f"argument MODEL: {error}") from error
    if path_of(request.model) is None and not request.fake:
        config = _shrink(config, request.layers or SMALL_LAYERS)
    if request.layers is not None and request.layers != config.num_hidden_layers:
        config = _rebuild(config, _with_layers(config, request.layers))
    return config


def check_ranks(request: LowerRequest) -> None:
    """Refuse ranks that cannot share the experts equally, where their number is known without transformers.

    Raises:
        UsageError: one line with the numbers.
    """
    path = path_of(request.model) if request.model != OWN else None
    name, experts = request.model, None
    if request.model == OWN:
        experts = OWN_SIZES["experts"] if request.fake else SMALL["num_experts"]
    elif path is not None:
        values = read_config(path)
        experts = first_of({**values, **(values.get("text_config") or {})}, EXPERT_COUNTS)
        name = str(values.get("model_type"))
    elif not request.fake:
        experts = SMALL["num_experts"]
    if isinstance(experts, int) and experts > 1:
        refuse_uneven(request.ep, name, experts)


def refuse_uneven(ep: int, name: str, experts: int) -> None:
    """Refuse a number of ranks that does not divide the experts."""
    if experts % ep:
        raise UsageError(f"argument --ep: is {ep}, and {name} has {experts} experts; accepted: a divisor of that")


def _shrink(config: Any, layers: int) -> Any:
    """The config with the dimensions of a small instance; what it derives from them is derived anew."""
    sizes = {
        name: value
        for name, value in SMALL.items()
        if getattr(config, name, None) is not None or (name in NEEDED and hasattr(config, name))
    }
    if "qk_rope_head_dim" in sizes and "head_dim" in sizes:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    if (getattr(config, "n_group", None) or 1) > 1:
        sizes.update(SMALL_GROUPS)
    return _rebuild(config, {**sizes, **_with_layers(config, layers)})


def _with_layers(config: Any, layers: int) -> dict[str, Any]:
    """The number of layers, and a number of leading dense layers that leaves MoE layers."""
    changes = {"num_hidden_layers": layers}
    for name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        if isinstance(value := getattr(config, name, None), int):
            changes[name] = min(value, layers - 1)
    return changes


def _rebuild(config: Any, changes: dict[str, Any]) -> Any:
    """A config of the same type with some values changed, so that per-layer lists follow."""
    values = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in ("transformers_version", "model_type")
        and not (isinstance(value, list) and len(value) == config.num_hidden_layers)
    }
    try:
        return type(config)(**{**values, **changes})
    except Exception as error:
        raise UsageError(f"argument MODEL: {config.model_type} cannot be resized: {error}") from error


def experts_of(config: Any) -> int:
    """Number of routed experts."""
    for name in EXPERT_COUNTS:
        if isinstance(value := getattr(config, name, None), int) and value > 1:
            return value
    raise UsageError(f"argument MODEL: {config.model_type} has no MoE layers; accepted: {ACCEPTED}")
