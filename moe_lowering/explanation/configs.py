"""``BlockDescription`` of a model's config: of a model type of transformers, of a config.json, or of a config object.

No model is built. An activation that the pass does not know is an error; what a config does not say (an activation, a dtype)
is assumed, and most of what was assumed is listed in ``assumptions``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moe_lowering import vocabulary
from moe_lowering.explanation.description import DTYPES, SIZES, BlockDescription, describe_changes
from moe_lowering.explanation.errors import ExplainError, MissingSizesError
from moe_lowering.explanation.moe_layers import count_moe_layers
from moe_lowering.explanation.routing_weights import FLOAT32, routing_weights_of
from moe_lowering.model_configs.check import (
    NAMES,
    OWN,
    OWN_SIZES,
    check_model,
    check_values,
    path_of,
    read_config,
    size_of,
)
from moe_lowering.model_configs.errors import ModelError, write_value
from moe_lowering.model_configs.presets import PRESETS, presets_of
from moe_lowering.model_configs.read import config_of_values, is_known_type, read_text_config, text_part
from moe_lowering.vocabulary import SWIGLU_ALPHA

ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
NO_TYPE = "transformers has no model_type"  # as an assumption begins
_WHAT_OWN_MEANS = f"{OWN} is one layer of this package, of the sizes of DeepSeek-V3's where the command says no other"
_LIMIT = 7.0  # of gpt-oss, where a config does not say
_LIMITS, _ALPHAS = {"swiglu_softcap": "mlp_gate_softcap"}, {"swiglu_softcap": "mlp_up_softcap"}

# Models whose experts do not compute act(gate) * up: the models of ``expert_gates.OWN_GATES``, which a test compares, by type.
GATES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"activation": "swiglu_oai", "interleaved": True, "has_bias": True},
    "openai_privacy_filter": {"activation": "swiglu_oai", "has_bias": True},
    "minimax_m3_vl_text": {"activation": "swiglu_oai"},
    "deepseek_v4": {"activation": "swiglu_clamp"},
    "hy_v4": {"activation": "swiglu_clamp"},
    "glm5_next_text": {"activation": "swiglu_clamp"},
    "inkling2_text": {"activation": "swiglu_softcap"},
    "step3p5": {"activation": "swiglu_clamp_after"},
}
# Models whose experts have no gate, and where their configs name the activation.
WITHOUT_GATE = {"nemotron_h": "mlp_hidden_act", "switch_transformers": "dense_act_fn"}


def describe_config(
    model: str | os.PathLike[str] | Mapping[str, Any] | Any | None,
    *,
    quantisation: str = "none",
    dtype: torch.dtype | None = None,
    **sizes: int,
) -> BlockDescription:
    """The block of a config, by name, path, values or as it is; None: the sizes say it all.

    Args:
        dtype: of weights and activations; None for the config's, or bfloat16.
        sizes: ``hidden``, ``intermediate``, ``experts``, ``top_k``; each overrides the config's.

    Raises:
        ExplainError: an unknown model, a config that cannot be read, a size that nobody gives, an activation that the pass does
            not know; and as ``BlockDescription`` does.
        ImportError: the config's module needs what is not there, such as torch_npu without CANN.
    """
    try:
        config, name, assumptions = _config(model, quantisation)
        of_config = {size: size_of(config, names) for size, names in NAMES.items()}
    except ModelError as error:
        raise ExplainError("model", str(error)) from error
    values: dict[str, Any] = {size: sizes.get(size, of_config[size]) for size in SIZES}
    if missing := tuple(size for size in SIZES if size not in sizes and not values[size]):
        raise MissingSizesError(name, missing)
    pairs = {size: (of_config[size], sizes.get(size)) for size in SIZES}
    changes = () if name == OWN else describe_changes({**pairs, "dtype": (_dtype(config), dtype)})
    if (layers := count_moe_layers(config)) == 0:
        assumptions.append(f"{name} has a layer with experts (by its config none has)")
    gate = _gate(config, name, assumptions)
    clamped = vocabulary.ACTIVATIONS[gate["activation"]].clamped
    return BlockDescription(
        **values,
        dtype=dtype or _dtype(config) or torch.bfloat16,
        quantisation=quantisation,
        limit=_number(config, _LIMITS.get(gate["activation"], "swiglu_limit"), _LIMIT) if clamped else 0.0,
        alpha=_number(config, _ALPHAS.get(gate["activation"], "swiglu_alpha"), SWIGLU_ALPHA),
        routing_weights=FLOAT32 if name == OWN else routing_weights_of(getattr(config, "model_type", "")),
        layers=layers or None,
        model=name,
        changes=changes,
        assumptions=tuple(assumptions),
        **gate,
    )


def _config(model: Any, quantisation: str) -> tuple[Any, str | None, list[str]]:
    """A config (anything with attributes), the model's name, and what was assumed in reading it."""
    if model is None:
        return SimpleNamespace(), None, ["SwiGLU with the gate half first, no biases"]
    if hasattr(model, "get_text_config"):
        return text_part(model), str(model.model_type), []
    if isinstance(model, Mapping):
        values = dict(model)
        check_values(values, None, needs_type=False)
        config, assumptions = _config_of_values(values, None, quantisation)
        return config, str(values.get("model_type") or "an unnamed model"), assumptions
    if not isinstance(model, (str, os.PathLike)):
        raise ModelError(
            f"is {write_value(model)}; accepted: a torch.nn.Module, a config of transformers, the name of a model type, "
            "a path to a config.json or its values, or a moe_lowering.BlockDescription"
        )
    name = os.fspath(model)
    check_model(name, needs_type=False, needs_experts=False)
    if name == OWN:
        own = {NAMES[size][0]: value for size, value in OWN_SIZES.items()}
        return SimpleNamespace(**own, hidden_act="silu", num_hidden_layers=1), name, [_WHAT_OWN_MEANS]
    path = path_of(name)
    if path is not None:
        config, assumptions = _config_of_values(read_config(path), path, quantisation)
        return config, name, assumptions
    if name in PRESETS:
        preset = PRESETS[name]
        config, assumptions = _config_of_values(preset.config, None, "none")
        return config, name, [f"{name} is {preset.hub} ({preset.billions:g} billion parameters)", *assumptions]
    return read_text_config(name), name, [_what_a_type_means(name)]


def _what_a_type_means(kind: str) -> str:
    """Which size the name of a model type stands for."""
    presets = presets_of(kind)
    others = f"; published sizes of it are {', '.join(presets)}" if presets else ""
    return f"{kind} means the sizes of transformers' default config of that type, which may be no published model's{others}"


def _config_of_values(values: dict[str, Any], path: Path | None, quantisation: str) -> tuple[Any, list[str]]:
    """The config of a type that transformers knows, or else the values as they stand; and what was assumed."""
    text = {**values, **(values.get("text_config") or {})}
    what, assumptions = "the file" if path is not None else "the config", []
    if (quantised := text.get("quantization_config")) and quantisation == "none":
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        assumptions.append(f"{what}'s quantization_config ({method}) is not read: say how the experts are quantised")
    if is_known_type(values.get("model_type")):
        config = config_of_values(values, path)
        config.dtype = text.get("dtype") or text.get("torch_dtype")
        return config, assumptions
    assumptions.append(f"{NO_TYPE} {values.get('model_type')!r}: {what} is read as it stands")
    return SimpleNamespace(**{"dtype": text.get("torch_dtype"), **text}), assumptions


def _gate(config: Any, model: str | None, assumptions: list[str]) -> dict[str, Any]:
    """What the experts compute between their projections, as fields of a ``BlockDescription``."""
    kind = getattr(config, "model_type", "")
    if kind in WITHOUT_GATE:
        return {"activation": _without_gate(str(model), getattr(config, WITHOUT_GATE[kind], None))}
    if kind == "step3p5" and not any(getattr(config, "swiglu_limits", None) or ()):
        return {"activation": "swiglu"}  # it clamps the layers that this list says
    if kind in GATES:
        return GATES[kind]
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if name is None:
        if model is not None:
            assumptions.append("SwiGLU: the config names no activation")
        return {"activation": "swiglu"}
    if name not in ACTIVATIONS:
        raise ExplainError(
            "model",
            f"the activation of {model} is {name}, which the pass does not know; accepted: {', '.join(ACTIVATIONS)}",
        )
    return {"activation": ACTIVATIONS[name]}


def _without_gate(model: str, name: Any) -> str:
    ungated = [record.name for record in vocabulary.ACTIVATIONS.values() if not record.gated]
    if name not in ungated:
        raise ExplainError(
            "model",
            f"the activation of {model}, without a gate, is {write_value(name)}; accepted: {', '.join(ungated)}",
        )
    return str(name)


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None) or default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ExplainError("model", f"{name} is {write_value(value)}; accepted: a finite number of 0 or more")
    return float(value)


def _dtype(config: Any) -> torch.dtype | None:
    """The dtype that a config names, when it is one of those that are lowered."""
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}.get(name)
