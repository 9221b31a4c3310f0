"""What ``explain`` judges: one MoE block, from a model's config and the command's own values. Nothing is built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moe_lowering import vocabulary
from moe_lowering.cli.arguments import DTYPES, Request, UsageError
from moe_lowering.cli.explain_arguments import ExplainRequest
from moe_lowering.cli.model_check import NAMES, check_size, path_of, read_config
from moe_lowering.cli.model_error import ModelError
from moe_lowering.deployment import Deployment
from moe_lowering.passes.block_specs import Layer, spec_of_layer
from moe_lowering.passes.blocks import BlockSpec

ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_LIMIT, _ALPHA = 7.0, 1.702  # of gpt-oss, where a config does not say


@dataclasses.dataclass(frozen=True)
class Gate:
    """What experts compute between their projections, beside the activation that a config names."""

    activation: str
    interleaved: bool = False
    has_bias: bool = False


# Models whose experts do not compute act(gate) * up; the same as `_OWN_GATES` of integrations.transformers, by type.
GATES = {
    "gpt_oss": Gate("swiglu_oai", interleaved=True, has_bias=True),
    "openai_privacy_filter": Gate("swiglu_oai", has_bias=True),
    "minimax_m3_vl_text": Gate("swiglu_oai"),
    "deepseek_v4": Gate("swiglu_clamp"),
    "hy_v4": Gate("swiglu_clamp"),
    "glm5_next_text": Gate("swiglu_clamp"),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """One MoE block of a model, on all ranks.

    Attributes:
        model: the model's type or file, None for a description.
        assumptions: what was taken for granted about it.
    """

    model: str | None
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str
    gate: Gate
    limit: float
    alpha: float
    assumptions: tuple[str, ...]


def describe(request: ExplainRequest) -> Block:
    """The block that a command asks about.

    Raises:
        UsageError: a dimension that neither the command nor the model gives, an unknown model, a config that cannot be
            read, an activation that the pass does not know, biases with quantised weights.
    """
    config, assumptions = _config(request)
    sizes: dict[str, int] = {name: getattr(request, name) or size_of(config, names) for name, names in NAMES.items()}
    if missing := [f"--{name}" for name, value in sizes.items() if not value]:
        what = "no model is given" if request.model is None else f"the config of {request.model} does not say all sizes"
        raise UsageError(
            f"argument MODEL: {what}: {', '.join(missing)} missing; accepted: a model with MoE layers, or all of "
            "--hidden --intermediate --experts --topk"
        )
    if sizes["topk"] > sizes["experts"]:
        raise UsageError(
            f"argument --topk: is {sizes['topk']}; accepted: 1 to the number of experts, {sizes['experts']}"
        )
    gate = _gate(config, request, assumptions)
    if gate.has_bias and request.quant != "none":
        raise UsageError(
            f"argument --quant: is {request.quant}, and the experts of {request.model} have biases; accepted: none, as "
            "quantised matmuls take no biases"
        )
    clamped = vocabulary.ACTIVATIONS[gate.activation].clamped
    return Block(
        model=request.model,
        hidden=sizes["hidden"],
        intermediate=sizes["intermediate"],
        experts=sizes["experts"],
        top_k=sizes["topk"],
        dtype=request.dtype or _dtype(config) or "bfloat16",
        gate=gate,
        limit=float(getattr(config, "swiglu_limit", None) or _LIMIT) if clamped else 0.0,
        alpha=float(getattr(config, "swiglu_alpha", None) or _ALPHA),
        assumptions=tuple(assumptions),
    )


def spec_of(block: Block, deployment: Deployment, tokens: int, quantisation: str) -> BlockSpec:
    """The record that the pass would make of the block in a graph."""
    layer = Layer(
        hidden=block.hidden,
        intermediate=block.intermediate,
        experts=block.experts,
        top_k=block.top_k,
        dtype=getattr(torch, block.dtype),
        activation=block.gate.activation,
        limit=block.limit,
        alpha=block.alpha,
        interleaved=block.gate.interleaved,
        has_bias=block.gate.has_bias,
    )
    return spec_of_layer(layer, deployment, tokens, quantisation)


def _config(request: ExplainRequest) -> tuple[Any, list[str]]:
    """A model's config (anything with attributes), and what was assumed in reading it."""
    if request.model is None:
        return SimpleNamespace(), ["SwiGLU with the gate half first, no biases"]
    from moe_lowering.cli import configs, model_check

    if request.model == model_check.OWN:
        full = configs.FULL_OWN
        own = {names[0]: full[name] for name, names in NAMES.items() if name in full}
        return SimpleNamespace(**own, num_experts_per_tok=full["top_k"], hidden_act="silu"), []
    path = path_of(request.model)
    if path is not None:
        return _config_of_file(request, path)
    return _transformers_config(request), []


def _config_of_file(request: ExplainRequest, path: Path) -> tuple[Any, list[str]]:
    values = read_config(path)
    text = {**values, **(values.get("text_config") or {})}
    assumptions = []
    if (quantisation := text.get("quantization_config")) and request.quant == "none":
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else quantisation
        assumptions.append(f"the file's quantization_config ({method}) is not read: give --quant")
    if _is_known_type(values.get("model_type")):
        config = _transformers_config(request)
        config.dtype = text.get("dtype") or text.get("torch_dtype")
        return config, assumptions
    assumptions.append(f"transformers has no model_type {values.get('model_type')!r}: the file is read as it stands")
    return SimpleNamespace(**{"dtype": text.get("torch_dtype"), **text}), assumptions


def _is_known_type(kind: Any) -> bool:
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return False
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _transformers_config(request: ExplainRequest) -> Any:
    """The config of a type or a file, of the part that makes text."""
    from moe_lowering.cli import configs

    asked = Request(request.model or "", fake=True)
    try:
        return configs.config_of(asked)
    except ImportError:  # some configs import torch_npu, which needs CANN or its stand-in
        from moe_lowering.cli.run import enable_simulator

        enable_simulator(request.soc)
        return configs.config_of(asked)


def size_of(config: Any, names: tuple[str, ...]) -> int:
    """The first of these attributes that a config has, 0 when it has none; a list counts when all of its values are the same.

    Raises:
        UsageError: that attribute is no size: another one is not taken in its place.
    """
    for name in names:
        value = getattr(config, name, None)
        try:
            check_size(name, value)
        except ModelError as error:
            raise UsageError(f"argument MODEL: {error}") from error
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _gate(config: Any, request: ExplainRequest, assumptions: list[str]) -> Gate:
    kind = getattr(config, "model_type", "")
    if kind in GATES:
        return GATES[kind]
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if name is None:
        if request.model is not None:
            assumptions.append("SwiGLU: the config names no activation")
        return Gate("swiglu")
    if name not in ACTIVATIONS:
        raise UsageError(
            f"argument MODEL: the activation of {request.model} is {name}, which the pass does not know; accepted: "
            f"{', '.join(ACTIVATIONS)}"
        )
    return Gate(ACTIVATIONS[name])


def _dtype(config: Any) -> str | None:
    """The dtype that a config names, when it is one of those that are lowered."""
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return name if name in DTYPES else None
