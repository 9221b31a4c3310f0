"""The calls of the grouped MLP with quantised weights, made once for legality and rewrite: those of each chain.

Which chain a block takes, and what stands between the calls: ``quantised_mlp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.implementations.activation import activation_calls
from moe_lowering.passes.implementations.matmul_calls import counts_of, matmul_call, row_scales
from moe_lowering.passes.implementations.scale_casts import scale_dtype
from moe_lowering.passes.operands import Operands
from moe_lowering.passes.operator_calls import OperatorCall, tensor

_TORCH_NPU_DTYPES = {torch.float16: 5, torch.bfloat16: 15}  # numbers that npu_grouped_matmul's output_dtype takes
INT32 = 3
FLOAT32 = 6  # of torch's numbers of dtypes; not the default of dequant_dtype before torch_npu 2.11, which is 0

QUANTISE, DEQUANTISE = "npu_dynamic_quant", "npu_dequant_swiglu_quant"
SWIGLU_QUANT = "npu_grouped_matmul_swiglu_quant_v2"
SWIGLU_ROWS, CLIP_ROWS = "npu_swiglu_quant", "npu_swiglu_clip_quant"
FUSED, DEQUANT, JOINED, PLAIN = "fused", "dequant", "joined", "plain"  # the chains, in order of preference
CLIPPED = "clipped"  # and the one of blocks that clip
_COLUMNS, _HALVES = 1, 2  # swiglu_mode with clamps: even and odd columns, or halves
# glu_alpha and glu_bias of the activations with clamps before, by the block's alpha
GLU: dict[str, Callable[[float], tuple[float, float]]] = {
    "swiglu_clamp": lambda alpha: (1.0, 0.0),
    "swiglu_oai": lambda alpha: (alpha, 1.0),
}


def chain_calls(name: str, spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall, ...]:
    """The calls of one chain."""
    experts, arguments = spec.tensors, _second_arguments(spec)
    second = matmul_call(spec, spec.intermediate, experts.w2, _rows_dtype(spec), **arguments)
    counts = counts_of(spec)
    if name == FUSED:
        scales = experts.w13_scale.cast(torch.float32).items
        x = tensor(torch.int8, None, spec.hidden)
        first_arguments = swiglu_quant_arguments(x, experts.w13.items, scales, row_scales(), counts)
        return OperatorCall(SWIGLU_QUANT, first_arguments), second
    if name == DEQUANT:
        sums = matmul_call(spec, spec.hidden, experts.w13, torch.int8, output_dtype=INT32)
        scale = experts.w13_scale.cast(torch.float32).first
        x = tensor(torch.int32, None, spec.first_width)
        smooth = tensor(torch.float32, spec.local_experts, spec.intermediate) if spec.has_h_smooth else None
        dequantise = dequant_arguments(spec, x, scale, row_scales(), counts, smooth)
        return sums, OperatorCall(DEQUANTISE, dequantise), second
    first = matmul_call(spec, spec.hidden, experts.w13, _rows_dtype(spec), **_first_arguments(spec))
    if name == JOINED:
        rows = tensor(spec.dtype, None, spec.first_width)
        return first, OperatorCall(SWIGLU_ROWS, swiglu_rows_arguments(rows)), second
    if name == CLIPPED:
        rows, clip = tensor(spec.dtype, None, spec.first_width), tensor(torch.float32, spec.local_experts)
        return first, OperatorCall(CLIP_ROWS, clip_rows_arguments(rows, counts, clip)), second
    return first, *activation_calls(spec, deployment.soc), *quantise_calls(spec, spec.intermediate), second


def _rows_dtype(spec: BlockSpec) -> torch.dtype:
    return torch.int8 if spec.format.int8_rows else spec.dtype


def _first_arguments(spec: BlockSpec) -> dict[str, Any]:
    experts = spec.tensors
    return _arguments(spec, experts.w13_scale, experts.w13_offset, experts.w13_scale_bias)


def _second_arguments(spec: BlockSpec) -> dict[str, Any]:
    experts = spec.tensors
    return _arguments(spec, experts.w2_scale, experts.w2_offset, experts.w2_scale_bias)


def _arguments(spec: BlockSpec, scale: Operands, offset: Operands, bias: Operands) -> dict[str, Any]:
    """What a call of ``npu_grouped_matmul`` gets beside rows and weights, as records."""
    if spec.format.weight_only:
        offsets = (offset or scale).cast(spec.dtype)
        return antiquant_arguments(scale.cast(spec.dtype).items, offsets.items)
    return scale_arguments(spec, scale.cast(scale_dtype(spec)).items, bias.items, row_scales())


def antiquant_arguments(scales: list[Any], offsets: list[Any]) -> dict[str, Any]:
    return {"antiquant_scale": scales, "antiquant_offset": offsets}


def scale_arguments(spec: BlockSpec, scales: list[Any], bias: list[Any], row_scale: Any) -> dict[str, Any]:
    return {
        "bias": bias or None,
        "scale": scales,
        "per_token_scale": [row_scale],
        "output_dtype": _TORCH_NPU_DTYPES.get(spec.dtype),  # other dtypes are refused: block.quantised_dtype
    }


def swiglu_quant_arguments(
    x: Any, weight: Sequence[Any], scales: list[Any], row_scale: Any, counts: Any
) -> dict[str, Any]:
    """``npu_grouped_matmul_swiglu_quant_v2`` of int8 rows [N, H]."""
    return {
        "x": x,
        "weight": list(weight),
        "weight_scale": scales,
        "x_scale": row_scale,
        "group_list": counts,
        "dequant_dtype": FLOAT32,
        "group_list_type": 1,
    }


def swiglu_rows_arguments(rows: Any) -> dict[str, Any]:
    """``npu_swiglu_quant`` of rows [N, 2I]: SwiGLU, and a scale for each row."""
    return {"x": rows, "activate_left": True, "quant_mode": 1, "dst_type": torch.int8}


def clip_rows_arguments(rows: Any, counts: Any, clip: Any) -> dict[str, Any]:
    """``custom::npu_swiglu_clip_quant`` of rows [N, 2I]: SwiGLU, clips, and a scale for each row."""
    return {"x": rows, "group_index": counts, "group_alpha": clip, "activate_left": True}


def dequant_arguments(
    spec: BlockSpec, sums: Any, scale: Any, row_scale: Any, counts: Any, smooth: Any
) -> dict[str, Any]:
    """``npu_dequant_swiglu_quant`` of int32 sums [N, 2I]: scales, SwiGLU, smooth scales and quantisation in one."""
    arguments = {
        "x": sums,
        "weight_scale": scale,
        "activation_scale": row_scale,
        "group_index": counts,
        "activate_left": True,
        "quant_mode": 1,
    }
    if smooth is not None:
        arguments["quant_scale"] = smooth
    if spec.activation in GLU:
        alpha, bias = GLU[spec.activation](spec.alpha)
        mode = _COLUMNS if spec.interleaved else _HALVES
        arguments |= {"swiglu_mode": mode, "clamp_limit": spec.limit, "glu_alpha": alpha, "glu_bias": bias}
    return arguments


def quantise_arguments(rows: Any) -> dict[str, Any]:
    """``npu_dynamic_quant``: a scale for each row."""
    return {"input": rows}


def quantise_calls(spec: BlockSpec, width: int) -> tuple[OperatorCall, ...]:
    """Of rows [N, width] of the block's dtype, where the weights take int8 rows."""
    return (
        (OperatorCall(QUANTISE, quantise_arguments(tensor(spec.dtype, None, width))),) if spec.format.int8_rows else ()
    )


def tokens_calls(spec: BlockSpec) -> tuple[OperatorCall, ...]:
    """The calls that ``quantise_tokens`` makes for a block."""
    return () if spec.quantised_input or spec.has_x_smooth else quantise_calls(spec, spec.hidden)
