"""A model of a config with random weights: as a causal LM where transformers has one, else what makes its text."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.integrations.replaced_experts import replace_experts
from moe_lowering.layers.expert_modules import EXPERTS_IMPLEMENTATION
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.model_configs.small import Dimensions

# Small, and legal for every implementation on one rank; several experts share no token with 32 tokens.
TINY = Dimensions(
    hidden=64,
    intermediate=32,
    experts=8,
    top_k=2,
    heads=4,
    head_dim=16,
    rank=16,
    vocabulary=128,
    groups=2,
    topk_groups=1,
)


def build(config: Any, dtype: torch.dtype, implementation: str | None = EXPERTS_IMPLEMENTATION) -> nn.Module:
    """The model in inference form.

    Args:
        config: of transformers, the part that makes text.
        implementation: of experts; with ``moe_lowering`` modules without transformers' interface are replaced, None leaves the
            model as transformers makes it by default.

    Raises:
        ModelError: transformers cannot build it.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if implementation is not None:
        options["experts_implementation"] = implementation
    try:
        model = _model_class(config)._from_config(config, **options)
    except Exception as error:  # whatever a model's own code raises for a config
        raise ModelError(
            f"{config.model_type} cannot be built: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if implementation is not None:
        replace_experts(model, implementation)
    _keep_in_float32(model)
    module: nn.Module = model.eval().requires_grad_(False)
    return module


def _keep_in_float32(model: Any) -> None:
    """What ``from_pretrained`` keeps in float32 in a bfloat16 model: its code may need it."""
    for pattern in model._keep_in_fp32_modules_strict or ():
        expression = re.compile(rf"((^|\.){pattern}($|\.))")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if expression.search(name) and tensor.is_floating_point():
                tensor.data = tensor.data.float()


def _model_class(config: Any) -> Any:
    """The class of a config: with logits, or else the one whose result they are made of."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel):
        if type(config) in auto._model_mapping:
            model_class = auto._model_mapping[type(config)]
            return model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    code = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    for member in vars(code).values():
        is_model = (
            isinstance(member, type) and issubclass(member, PreTrainedModel) and "PreTrained" not in member.__name__
        )
        if is_model and member.config_class is type(config):
            return member
    raise ValueError(f"transformers has no model of a {type(config).__name__}")


def result(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits of all tokens, or the last hidden states of a model without; ``model`` may be compiled."""
    whole: Any = getattr(model, "_orig_mod", model)
    call = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if whole.config.is_encoder_decoder:
        call["decoder_input_ids"] = input_ids
    output = model(**call, use_cache=False)
    logits: Tensor | None = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights of standard deviation 1 / sqrt(inputs), and noise on what has one dimension: many models start routers, biases
    and norms at values with which an error would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1 and not name.endswith("bias"):
                inputs = tensor.shape[-2] if _is_k_first(model, name) else tensor.shape[-1]
                tensor.copy_(noise * inputs**-0.5)
            elif name.endswith(("bias", "weight", "sinks")):
                tensor.add_((0.1 * noise).to(tensor.dtype))


def _is_k_first(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return bool(getattr(owner, "is_transposed", False))
