"""The models that the command lowers: built locally from a config, with random weights that show errors."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.cli.arguments import Request, UsageError
from moe_lowering.layers import MoE

OWN = "moe"
ACCEPTED = f"{OWN}, a transformers model type (mixtral, qwen3_moe, deepseek_v3, ...), or a path to a config.json"

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
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Set where the default is None too; elsewhere None says that a model does without (e.g. q_lora_rank).
NEEDED = (*EXPERT_COUNTS, "num_experts_per_tok", "moe_intermediate_size", "head_dim")
SMALL_LAYERS = 2
SMALL_GROUPS = {"n_group": 4, "topk_group": 2}  # for models whose default is grouped: 8 experts remain, of which 4
FULL_OWN = {"hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "layers": 4}  # DeepSeek-V3's MoE layer
OWN_SCALE = 2.5  # DeepSeek-V3's routed_scaling_factor
NOISE = 0.1  # standard deviation of what is added to one-dimensional parameters (norms, biases, sinks)
SEED = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to build: a transformers config, or None for this package's own MoE; and its name in the report."""

    name: str
    config: Any
    layers: int
    vocabulary: int
    experts: int


class MoeStack(nn.Module):
    """A decoder without attention: embedding, ``layers`` times x + MoE(norm(x)), norm, output projection.

    Its router is DeepSeek-V3's (sigmoid, correction bias, groups), so ``route`` is lowered with all that it can do.
    """

    def __init__(
        self, hidden: int, intermediate: int, experts: int, top_k: int, layers: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SMALL["vocab_size"], hidden, dtype=dtype)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-6, dtype=dtype) for _ in range(layers))
        self.layers = nn.ModuleList(
            MoE(
                hidden, intermediate, experts, top_k, scoring="sigmoid", selection_bias=True, scale=OWN_SCALE,
                num_groups=SMALL_GROUPS["n_group"], topk_groups=SMALL_GROUPS["topk_group"], dtype=dtype,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.head = nn.Linear(hidden, SMALL["vocab_size"], bias=False, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)


def plan(request: Request) -> Plan:
    """What a command's MODEL means.

    Raises:
        UsageError: an unknown model, an unreadable config.json, a type without a causal LM, experts that the ranks
            cannot share equally.
    """
    if request.model == OWN:
        small = SMALL["num_experts"]
        layers = request.layers or (FULL_OWN["layers"] if request.fake else SMALL_LAYERS)
        made = Plan(OWN, None, layers, SMALL["vocab_size"], FULL_OWN["experts"] if request.fake else small)
    else:
        config = config_of(request)
        layers = int(config.num_hidden_layers)
        made = Plan(config.model_type, config, layers, int(config.vocab_size), _experts(config))
    if made.experts % request.ep:
        raise UsageError(
            f"argument --ep: is {request.ep}, and {made.name} has {made.experts} experts; accepted: a divisor of that"
        )
    return made


def build(made: Plan, dtype: torch.dtype, *, fake: bool = False) -> nn.Module:
    """The model in inference form, its experts on the generic operators.

    Raises:
        UsageError: transformers cannot build it as a causal LM.
    """
    if made.config is None:
        size = FULL_OWN if fake else {k: SMALL[v] for k, v in _OWN_SIZES.items()}
        size = {**size, "layers": made.layers}
        return MoeStack(**size, dtype=dtype).eval().requires_grad_(False)
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_config(
            made.config, dtype=dtype, attn_implementation="eager", experts_implementation="moe_lowering"
        )
    except Exception as error:
        raise UsageError(
            f"argument MODEL: {made.name} cannot be built as a causal LM: {type(error).__name__}: {error}"
        ) from error
    return model.eval().requires_grad_(False)


_OWN_SIZES = {
    "hidden": "hidden_size",
    "intermediate": "moe_intermediate_size",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
}


def skeleton(made: Plan) -> nn.Module:
    """The model without data, on device meta: what it is made of, and how large it is."""
    with torch.device("meta"):
        return build(made, torch.bfloat16)


def available_memory() -> int | None:
    """Bytes of memory that are free, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The output that is compared; ``model`` may be compiled. The attention mask of ones is what a tokenizer gives."""
    if isinstance(getattr(model, "_orig_mod", model), MoeStack):
        return model(input_ids)
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits


def randomise(model: nn.Module, seed: int = SEED) -> None:
    """Weights of standard deviation 1/sqrt(inputs); noise on norms, biases, sinks and the router's correction bias.

    Many models start biases, correction biases and even router weights at zero, where a lowering that forgot them would
    look right. What is equal on every rank comes from ``seed`` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    buffers = ((name, b) for name, b in model.named_buffers() if name.endswith("bias"))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() == 1 or name.endswith("bias"):
                tensor.add_((noise * NOISE).to(tensor.dtype))
            else:
                tensor.copy_(noise.mul_(_inputs(model, name, tensor) ** -0.5))


def _inputs(model: nn.Module, name: str, weight: Tensor) -> int:
    """How many inputs an output of this weight sums over."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Embedding):
        return 1
    k_first = isinstance(owner, MoE) or getattr(owner, "is_transposed", False)
    return weight.shape[-2 if weight.dim() == 3 and k_first else -1]


def input_ids(made: Plan, request: Request, length: int, rank: int) -> Tensor:
    """Tokens of one rank, [batch, length]; other ranks have others."""
    generator = torch.Generator().manual_seed(SEED + 1 + rank)
    return torch.randint(3, made.vocabulary, (request.batch, length), generator=generator)


def config_of(request: Request) -> Any:
    """The config of a type or of a file, with the command's number of layers."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise UsageError(
            f"argument MODEL: {request.model} needs transformers, which does not import ({error}); accepted: {OWN}, or "
            "install it with: pip install 'moe-lowering[transformers]'"
        ) from error
    path = Path(request.model)
    if path.exists() or path.suffix == ".json" or "/" in request.model:
        config = _config_of_file(path / "config.json" if path.is_dir() else path)
    elif request.model in CONFIG_MAPPING:
        config = _text_config(CONFIG_MAPPING[request.model]())
        if not request.fake:
            config = _shrink(config, request.layers or SMALL_LAYERS)
    else:
        close = difflib.get_close_matches(request.model, [OWN, *CONFIG_MAPPING], n=3)
        hint = f" (did you mean {', '.join(close)}?)" if close else ""
        raise UsageError(f"argument MODEL: is {request.model!r}{hint}; accepted: {ACCEPTED}")
    if request.layers is not None and request.layers != config.num_hidden_layers:
        config = _rebuild(config, _with_layers(config, request.layers))
    return config


def _config_of_file(path: Path) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"argument MODEL: {path} is not a readable config.json ({error}); accepted: {ACCEPTED}"
        ) from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in CONFIG_MAPPING:
        raise UsageError(f"argument MODEL: model_type in {path} is {kind!r}; accepted: a type that transformers knows")
    values.pop("quantization_config", None)  # the weights are random, of --dtype
    try:
        return _text_config(CONFIG_MAPPING[kind].from_dict(values))
    except Exception as error:
        raise UsageError(f"argument MODEL: {path} is not a valid {kind} config: {error}") from error


def _text_config(config: Any) -> Any:
    text = config.get_text_config()
    if getattr(text, "num_hidden_layers", None) is None or getattr(text, "vocab_size", None) is None:
        raise UsageError(f"argument MODEL: {config.model_type} is not a decoder; accepted: {ACCEPTED}")
    return text


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


def _experts(config: Any) -> int:
    """Number of routed experts."""
    for name in EXPERT_COUNTS:
        if isinstance(value := getattr(config, name, None), int) and value > 1:
            return value
    raise UsageError(f"argument MODEL: {config.model_type} has no MoE layers; accepted: {ACCEPTED}")
