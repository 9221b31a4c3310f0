"""``BlockDescription`` of a model's modules: this package's ``MoE`` and the experts modules of transformers. No data is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from moe_lowering.explanation.description import BlockDescription
from moe_lowering.explanation.errors import ExplainError
from moe_lowering.explanation.routing_weights import FLOAT32, routing_weights_of
from moe_lowering.integrations.transformers import form_of
from moe_lowering.layers.expert_modules import is_experts_module, weight_names
from moe_lowering.layers.moe import MoE
from moe_lowering.model_configs.check import NAMES, size_of
from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS


def describe_modules(model: nn.Module) -> BlockDescription:
    """The description of a model's MoE layers, which must all be equal; sharded or whole, quantised or not.

    Raises:
        ExplainError: it has no MoE layer, one whose experts are a list or compute something unknown, or unlike ones.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    blocks: dict[BlockDescription, str] = {}
    layers = 0
    for name, module in model.named_modules():
        if isinstance(module, MoE) or is_experts_module(module):
            layers += 1
            blocks.setdefault(_describe(name, module, config, type(model).__name__), name)
    if not blocks:
        raise ExplainError("model", f"{type(model).__name__} has no MoE layer; accepted: a model with MoE layers")
    if len(blocks) > 1:
        differ = " and ".join(repr(name) for name in list(blocks.values())[:2])
        raise ExplainError(
            "model",
            f"{type(model).__name__} has MoE layers that differ, such as {differ}; accepted: one of these modules",
        )
    return dataclasses.replace(next(iter(blocks)), layers=layers)


def _describe(name: str, module: nn.Module, config: Any, model: str) -> BlockDescription:
    what = f"{name or model} ({type(module).__name__})"
    if any(isinstance(getattr(module, weights, None), nn.ParameterList) for weights in weight_names(module)):
        raise ExplainError("model", f"{what} holds a tensor for each expert; accepted: stacked experts")
    if not isinstance(module, MoE) and not size_of(config, NAMES["top_k"]):
        raise ExplainError(
            "model", f"{what} does not say how many experts a token has; accepted: the model that it is a part of"
        )
    quantisation = getattr(module, "moe_lowering_quantisation", "none")
    block = describe_experts(module, config, model=model, quantisation=quantisation)
    if block is None:
        raise ExplainError(
            "model",
            f"{what} computes what the pass does not know; accepted: moe_lowering.MoE, or experts of transformers with a gate "
            "that is known",
        )
    return block


def describe_experts(
    module: nn.Module, config: Any, *, model: str, quantisation: str = "none", dtype: torch.dtype | None = None
) -> BlockDescription | None:
    """What a module computes; None of any other module, and where it is not known.

    Args:
        config: of the model; the experts modules of transformers do not say how many experts a token has.
        quantisation: of the experts as they are, or as they will be.
        dtype: of weights and activations; None for the module's own.
    """
    known: Any = module
    block: dict[str, Any]
    factors: dict[str, Any]
    if isinstance(module, MoE):
        weight, factors = module.w13, {"limit": module._factors[1], "alpha": module._factors[2]}
        block = {"activation": module.activation, "interleaved": module.interleaved, "top_k": module.top_k}
        block |= {"has_bias": module.w13_bias is not None, "weights_contiguous": True, "routing_weights": FLOAT32}
        dtype = dtype or module.gate.weight.dtype
    elif is_experts_module(module) and (form := form_of(module)).unrecognised == "":
        weight, factors = getattr(known, weight_names(module)[0]), {"limit": form.limit, "alpha": form.alpha}
        block = {"activation": form.activation, "interleaved": form.interleaved, "has_bias": bool(known.has_bias)}
        block |= {"top_k": size_of(config, NAMES["top_k"]), "weights_contiguous": bool(known.is_transposed)}
        block |= {"routing_weights": routing_weights_of(getattr(config, "model_type", ""))}
        weight = weight if known.is_transposed else weight.transpose(-2, -1)
    else:
        return None
    if not block["top_k"]:
        return None
    _, hidden, width = weight.shape
    stored = EXPERT_FORMATS[quantisation].packed if weight.dtype == torch.int32 else 1
    return BlockDescription(
        hidden=hidden,
        intermediate=width * stored // ACTIVATIONS[block["activation"]].parts,
        experts=getattr(module, "moe_lowering_num_experts", known.num_experts),
        dtype=dtype or (weight.dtype if weight.dtype.is_floating_point else torch.bfloat16),
        quantisation=quantisation,
        model=model,
        **{name: value for name, value in factors.items() if value is not None},
        **block,
    )
