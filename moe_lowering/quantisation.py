"""Quantised expert weights: from floats to what ``grouped_mlp`` takes, and back; for one weight, or for a whole model.

Round to nearest, without calibration: enough to try a deployment and to test, not what a released checkpoint is made with.
Weights that another tool quantised fit in as well: see ``QuantisedWeight`` for the layout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.argument_checks import require_choice, require_instance, require_integer
from moe_lowering.custom_ops.quantised import PER_INT32, dequantise_weight, float_scale, quantise_rows, unpack_int4
from moe_lowering.layers.expert_modules import (
    moe_modules,
    refuse_computed,
    refuse_lists,
    warn_of_other_implementations,
    weight_names,
)
from moe_lowering.layers.moe import MoE
from moe_lowering.vocabulary import EXPERT_FORMATS

__all__ = [
    "FORMATS",
    "QuantisedWeight",
    "dequantise",
    "pack_int4",
    "quantise_experts",
    "quantise_rows",
    "quantise_weight",
    "scale_bits",
    "unpack_int4",
]

FORMATS = tuple(format.name for format in EXPERT_FORMATS.values() if format.quantised)
_HALVES = (torch.float16, torch.bfloat16)
# What the device's kernel adds to each int4 weight. Source: ops_transformer.grouped_matmul: A8W4, bias 8 * sum(w * scale).
_SCALE_BIAS = 8


@dataclasses.dataclass(frozen=True)
class QuantisedWeight:
    """Experts' weights [..., K, N] in one of the ``FORMATS``.

    Attributes:
        weight: int8 [..., K, N] (w8a8), or int32 [..., K, N / 8] of packed int4.
        scale: [..., N]; w4a16 in groups of K / G lines: [..., G, N].
        offset: w4a16: like scale; weight = (int4 + offset) * scale.
        scale_bias: w4a8: float32 [..., N], 8 * the sum over K of weight * scale.
    """

    format: str
    weight: Tensor
    scale: Tensor
    offset: Tensor | None = None
    scale_bias: Tensor | None = None


def quantise_weight(
    w: Tensor, format: str, *, scale_dtype: torch.dtype | None = None, group_size: int | None = None
) -> QuantisedWeight:
    """Quantise ``w [..., K, N]``, each column by itself.

    ``w8a8`` and ``w4a8`` are symmetric, in [-127, 127] and [-7, 7]. ``w4a16`` uses all of [-8, 7], with whole numbers as
    offsets, chosen so that 0 stays 0.

    Args:
        w: float32, float16 or bfloat16.
        scale_dtype: float32 (when None), or bfloat16 for w8a8; for w4a16 that of the activations (when None: that of w).
            The values are rounded after the scale was.
        group_size: w4a16: a scale for every ``group_size`` lines of a column; one for the whole column when None.

    Raises:
        ValueError, TypeError: an argument out of range, with its value and what is accepted.
    """
    require_instance("quantise_weight", "w", w, Tensor, "a tensor [..., K, N]")
    scale_dtype = _scale_dtype(w, format, scale_dtype)
    _check_weight(w, format, group_size)
    form = EXPERT_FORMATS[format]
    half = 2 ** (form.bits - 1)
    if form.has_offset:
        lines = group_size or w.shape[-2]
        groups = w.float().reshape(*w.shape[:-2], w.shape[-2] // lines, lines, w.shape[-1])
        low, high = groups.amin(-2, keepdim=True).clamp(max=0), groups.amax(-2, keepdim=True).clamp(min=0)
        scale = _not_zero((high - low) / (2**form.bits - 1), scale_dtype)
        offset = (low / scale).round() + half
        whole = ((groups / scale).round() - offset).clamp(-half, half - 1).flatten(-3, -2)
        scale, offset = (values.to(scale_dtype).squeeze(-2) for values in (scale, offset))
        if group_size is None:
            scale, offset = scale.squeeze(-2), offset.squeeze(-2)
        return QuantisedWeight(format, _store(whole, format), scale, offset)
    scale = _not_zero(w.float().abs().amax(-2, keepdim=True) / (half - 1), scale_dtype)
    whole = (w.float() / scale).round().clamp(1 - half, half - 1)
    column = scale.squeeze(-2).to(scale_dtype)
    bias = _SCALE_BIAS * (whole.double() * scale.double()).sum(-2) if form.has_scale_bias else None
    return QuantisedWeight(format, _store(whole, format), column, scale_bias=None if bias is None else bias.float())


def _store(whole: Tensor, format: str) -> Tensor:
    """Whole numbers as the format keeps them."""
    return pack_int4(whole.to(torch.int8)) if EXPERT_FORMATS[format].packed > 1 else whole.to(torch.int8)


def dequantise(quantised: QuantisedWeight) -> Tensor:
    """The weights in float32 [..., K, N]. Scales may be bits in int64, as ``scale_bits`` makes them."""
    require_instance("dequantise", "quantised", quantised, QuantisedWeight, "a QuantisedWeight")
    _check_quantised(quantised)
    return dequantise_weight(quantised.weight, quantised.scale, quantised.offset)


def _check_quantised(quantised: QuantisedWeight) -> None:
    """Tensors of shapes and dtypes that belong together."""
    weight, where = quantised.weight, "dequantise: quantised."
    integers = isinstance(weight, Tensor) and weight.dtype in (torch.int8, torch.int32)
    if not integers or weight.dim() < 2:
        raise TypeError(f"{where}weight is {_write_value(weight)}; accepted: int8 [..., K, N] or int32 [..., K, N / 8]")
    *lead, lines, columns = weight.shape
    columns *= PER_INT32 if weight.dtype == torch.int32 else 1
    values: list[tuple[str, Any]] = [("scale", quantised.scale)]
    if quantised.offset is not None:
        values.append(("offset", quantised.offset))
    for name, value in values:
        numbers = isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.int64)
        shape = list(value.shape) if numbers else []
        grouped = shape[:-2] == lead and len(shape) == len(lead) + 2 and shape[-2] > 0 and lines % shape[-2] == 0
        if shape != [*lead, columns] and not (grouped and shape[-1] == columns):
            accepted = f"floats {[*lead, columns]}, or one line for each of G groups of {lines} lines"
            raise TypeError(f"{where}{name} is {_write_value(value)}; accepted: {accepted}")


def _write_value(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def pack_int4(values: Tensor) -> Tensor:
    """int8 [..., N] in [-8, 7] as int32 [..., N / 8]: eight in each, the first in the lowest bits.

    Raises:
        ValueError: N is not a multiple of 8; a value is out of range.
    """
    require_instance("pack_int4", "values", values, Tensor, "an int8 tensor [..., N]")
    if values.dtype != torch.int8 or values.dim() < 1 or values.shape[-1] % PER_INT32:
        raise ValueError(
            f"pack_int4: values is {values.dtype} of shape {list(values.shape)}; accepted: int8 [..., N], N a multiple of 8"
        )
    if _readable(values) and values.numel() and not -8 <= int(values.min()) <= int(values.max()) <= 7:
        raise ValueError(f"pack_int4: values is {int(values.min())} to {int(values.max())}; accepted: -8 to 7")
    nibbles = (values.to(torch.int32) & 15).reshape(*values.shape[:-1], values.shape[-1] // PER_INT32, PER_INT32)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    return (nibbles << shifts).sum(-1, dtype=torch.int32)  # no two have a bit in common


def scale_bits(scale: Tensor) -> Tensor:
    """float32 scales as the fused operators read them: int64, the float32's bits in the low half, 0 in the high one."""
    require_instance("scale_bits", "scale", scale, Tensor, "a tensor of float32 scales")
    if scale.dtype not in (torch.float32, *_HALVES, torch.int64):
        raise TypeError(f"scale_bits: scale is {scale.dtype}; accepted: float32, float16, bfloat16, or int64 of bits")
    return float_scale(scale).contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def quantise_experts(model: nn.Module, format: str, *, group_size: int | None = None) -> nn.Module:
    """Quantise the experts of every MoE module in ``model``, in place; routers stay as they are, and so do shared experts
    but those of a ``MoE`` module itself.

    Modules are those of ``shard_experts``, which may be called before or after. Their weights become int8 or packed int4
    [E_local, K, N], K before N; beside each, NAME, there are then the parameters ``NAME_scale``, and what the format has
    of ``NAME_offset`` and ``NAME_scale_bias``. A module of transformers must be computed by ``moe_lowering``
    (``experts_implementation="moe_lowering"``): its other implementations cannot read such weights.

    The dtype of the weights is taken as that of the activations: cast the model first. For w8a8 the scale of the second
    weight is bfloat16 where that is bfloat16, as Ascend's grouped matmul wants it. A state dict of quantised experts loads
    into a model that was quantised the same way, also into one on device "meta" (with ``assign=True``).

    Returns:
        ``model``.

    Raises:
        ValueError, TypeError: no MoE module; one that has biases or weights that are computed, is quantised already, or was
            sharded by transformers; sizes or dtypes that the format cannot have. The model is as it was then.
    """
    targets = _quantisable(model, format, group_size)  # first all checks, so that an error leaves the model as it was
    for _, module in targets:
        _quantise(module, format, group_size)
    warn_of_other_implementations("quantise_experts", targets)
    return model


def require_quantisable(model: nn.Module, format: str, *, group_size: int | None = None) -> None:
    """Raise what ``quantise_experts`` would, and change nothing; a model on device "meta" is enough."""
    _quantisable(model, format, group_size)


def _quantisable(model: nn.Module, format: str, group_size: int | None) -> list[tuple[str, nn.Module]]:
    targets = moe_modules("quantise_experts", model)
    require_choice("quantise_experts", "format", format, FORMATS)
    if group_size is not None:
        require_integer("quantise_experts", "group_size", group_size, 1)
    for name, module in targets:
        _check_module(f"quantise_experts: {name or type(module).__name__}", module, format, group_size)
    return targets


def _names(module: nn.Module) -> tuple[str, ...]:
    """The experts' weights in pairs, the second of each last: routed ones, and the shared ones of a whole ``MoE``."""
    if not isinstance(module, MoE):
        return weight_names(module)
    shared = ("shared_w13", "shared_w2") if getattr(module, "shared_w13", None) is not None else ()
    return ("w13", "w2", *shared)


def _matrices(module: nn.Module, name: str) -> Tensor:
    weight: Tensor = getattr(module, name)
    transposed = isinstance(module, MoE) or bool(module.is_transposed)
    return weight if transposed else weight.transpose(1, 2)


def _check_module(what: str, module: nn.Module, format: str, group_size: int | None) -> None:
    experts: Any = module  # two families of modules
    if getattr(experts, "moe_lowering_quantisation", "none") != "none":
        raise ValueError(
            f"{what} is {experts.moe_lowering_quantisation} already; accepted: experts that are not quantised"
        )
    refuse_lists(what, module)
    refuse_computed(what, module)
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(f"{what} was sharded by transformers; accepted: a model loaded without expert parallelism")
    has_bias = experts.w13_bias is not None if isinstance(module, MoE) else experts.has_bias
    if has_bias:
        raise ValueError(f"{what} has expert biases; accepted: experts without, as quantised matmuls take none")
    for name in _names(module):
        try:
            _scale_dtype(_matrices(module, name), format, None)
            _check_weight(_matrices(module, name), format, group_size)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{what}: {name}: {error}") from error


def _quantise(module: nn.Module, format: str, group_size: int | None) -> None:
    experts: Any = module
    for name in _names(module):
        weights = _matrices(module, name).detach()
        second = name in _names(module)[1::2]
        halves = second and "bfloat16" in EXPERT_FORMATS[format].scale_dtypes and weights.dtype == torch.bfloat16
        scale_dtype = torch.bfloat16 if halves else None
        # one expert at a time: the float32 copies of all would be several times as large as the weights
        parts = [quantise_weight(w, format, scale_dtype=scale_dtype, group_size=group_size) for w in weights.unbind(0)]
        setattr(module, name, _parameter([part.weight for part in parts]))
        for field in ("scale", "offset", "scale_bias"):
            values = [value for part in parts if (value := getattr(part, field)) is not None]
            module.register_parameter(f"{name}_{field}", _parameter(values) if values else None)
    if not isinstance(module, MoE):
        experts.is_transposed = True
    experts.moe_lowering_quantisation = format


def _parameter(parts: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack(parts), requires_grad=False)


def _scale_dtype(w: Tensor, format: str, requested: torch.dtype | None) -> torch.dtype:
    """The dtype of scales; ``requested``, or the format's own when that is None."""
    require_choice("quantise_weight", "format", format, FORMATS)
    require_instance("quantise_weight", "scale_dtype", requested, (torch.dtype, type(None)), "a torch.dtype, or None")
    names = (name for name in EXPERT_FORMATS[format].scale_dtypes if name != "int64")  # bits: see scale_bits
    accepted = tuple(getattr(torch, name) for name in names) or _HALVES
    scale_type = requested or (torch.float32 if torch.float32 in accepted else w.dtype)
    if scale_type not in accepted:
        shown = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        source = "scale_dtype" if requested else "scale_dtype is None and w"
        raise TypeError(f"quantise_weight: {source} is {scale_type} for {format}; accepted: {shown}")
    return scale_type


def _check_weight(w: Tensor, format: str, group_size: int | None) -> None:
    if w.dtype not in (torch.float32, *_HALVES) or w.dim() < 2 or not w.shape[-2]:
        raise TypeError(
            f"quantise_weight: w is {w.dtype} of shape {list(w.shape)}; accepted: float32, float16, bfloat16 [..., K, N], "
            "K 1 or more"
        )
    if EXPERT_FORMATS[format].packed > 1 and w.shape[-1] % PER_INT32:
        raise ValueError(f"quantise_weight: w has {w.shape[-1]} columns for {format}; accepted: a multiple of 8")
    if _readable(w) and not bool(w.isfinite().all()):  # int8 has no NaN: a NaN would become an arbitrary number
        raise ValueError("quantise_weight: w has NaN or infinity; accepted: finite weights")
    if group_size is None:
        return
    if not EXPERT_FORMATS[format].weight_only:
        raise ValueError(
            f"quantise_weight: group_size is {group_size} for {format}; accepted: None; only w4a16 has groups"
        )
    require_integer("quantise_weight", "group_size", group_size, 1)
    if w.shape[-2] % group_size:
        raise ValueError(
            f"quantise_weight: group_size is {group_size}; accepted: a divisor of {w.shape[-2]}, w's lines"
        )


def _not_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 scales that ``dtype`` can hold, 1 where that would be zero."""
    scale = scale.to(dtype).float()
    return torch.where(scale == 0, 1.0, scale)


def _readable(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
