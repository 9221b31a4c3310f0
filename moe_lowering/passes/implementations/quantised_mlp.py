"""The grouped MLP with quantised weights on device operators.

    w8a8   quantise rows > ``npu_grouped_matmul_swiglu_quant_v2`` > ``npu_grouped_matmul``
           quantise rows > ``npu_grouped_matmul`` (int32) > ``npu_dequant_swiglu_quant`` > ``npu_grouped_matmul``
           quantise rows > ``npu_grouped_matmul`` > ``npu_swiglu_quant`` > ``npu_grouped_matmul``
           quantise rows > ``npu_grouped_matmul`` > activation > quantise > ``npu_grouped_matmul``
           quantise rows > ``npu_grouped_matmul`` > ``custom::npu_swiglu_clip_quant`` > ``npu_grouped_matmul``
    w4a8   the last three lines, with int4 weights, their scales as bits and their compensation as bias
    w4a16  ``npu_grouped_matmul`` (antiquant scale and offset) > activation > ``npu_grouped_matmul``

The first line is taken whose operators accept the block, by their rows in ``limits/data`` (``chain``). The first and the
third know SwiGLU with the gate first only, the second also with clamps and of alternating columns; each has limits of its own
on format, layout and width. The third has no converter for GE graphs. It is not told which rows are valid: it wants counts
in int32, and documentation wants them not to fall. Smooth scales of activations are an argument of the second line's
operator alone. The last line is for blocks that clip; its operator is of a library that a model brings. "quantise" is
``npu_dynamic_quant``, left out where rows arrive as int8 with scales (MC2's dispatch with quant_mode 2).
Counts per expert are the group list (type 1). Rows past the sum of the counts are undefined afterwards.
Dtypes of scales: limits/data/grouped_matmul_quantised.toml.
Sources: vllm_ascend.moe_mlp: unified_apply_mlp; ops_transformer.grouped_matmul; recipes.swiglu_clip_quant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.limits import check
from moe_lowering.limits.calls.schemas import loaded_libraries
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.calls import OperatorCall, emit_call, tensor
from moe_lowering.passes.context import judged_quantities
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.activation import activation_calls, emit_activation
from moe_lowering.passes.implementations.matmul_calls import (
    MATMUL,
    counts_of,
    matmul_arguments,
    matmul_call,
    row_scales,
)
from moe_lowering.passes.implementations.scale_casts import as_float32, matmul_scale, scale_dtype
from moe_lowering.passes.implementations.tensor_parallel import Share
from moe_lowering.passes.operands import Operands

_TORCH_NPU_DTYPES = {torch.float16: 5, torch.bfloat16: 15}  # numbers that npu_grouped_matmul's output_dtype takes
_INT32 = 3
FLOAT32 = 6  # of torch's numbers of dtypes; not the default of dequant_dtype before torch_npu 2.11, which is 0

# The formats that this file has calls for; a format that only the vocabulary has is refused
EMITTED = frozenset({"w8a8", "w4a8", "w4a16"})
QUANTISE, DEQUANTISE = "npu_dynamic_quant", "npu_dequant_swiglu_quant"
SWIGLU_QUANT = "npu_grouped_matmul_swiglu_quant_v2"
SWIGLU_ROWS, CLIP_ROWS = "npu_swiglu_quant", "npu_swiglu_clip_quant"
FUSED, DEQUANT, JOINED, PLAIN = "fused", "dequant", "joined", "plain"  # the chains, in order of preference
CLIPPED = "clipped"  # and the one of blocks that clip


def chain(spec: BlockSpec, deployment: Deployment) -> str:
    """The chain that a block takes: the first one whose operators accept it; ``PLAIN`` when none of the others does.

    It depends on what is the same on every rank, and T is not in it: verdict, emission and every rank choose alike.
    """
    if spec.has_h_clip:
        return CLIPPED
    if spec.has_h_smooth:
        return (
            DEQUANT  # the only one that multiplies each expert's activations; where it is not legal, the block is not
        )
    for name in _candidates(spec, deployment):
        if all(_is_accepted(call, deployment) for call in _matmuls(name, spec, deployment)):
            return name
    return PLAIN


def _candidates(spec: BlockSpec, deployment: Deployment) -> tuple[str, ...]:
    """The chains but ``PLAIN`` that compute a block's activation."""
    if not spec.format.int8_rows:
        return ()
    halves = spec.activation == "swiglu" and not spec.interleaved
    eight_bits = spec.format.weight_dtype == "int8"
    known = {
        FUSED: eight_bits and halves,
        DEQUANT: eight_bits and (halves or spec.activation in _GLU),
        JOINED: halves and deployment.mode != "ge",
    }
    return tuple(name for name, computes in known.items() if computes)


def _is_accepted(call: OperatorCall, deployment: Deployment) -> bool:
    all_quantities = judged_quantities(call, None, deployment, {})  # no rule of theirs reads the context
    return _legal(call.operator, deployment.soc, tuple(deployment.versions.items()), frozenset(all_quantities.items()))


@functools.lru_cache(maxsize=256)
def _legal(
    operator: str, soc: str, versions: tuple[tuple[str, str], ...], quantities: frozenset[tuple[str, Any]]
) -> bool:
    return not check(operator, soc, dict(quantities), versions=dict(versions))


def calls(spec: BlockSpec, deployment: Deployment, chosen: str | None = None) -> tuple[OperatorCall, ...]:
    """The calls that ``emit`` makes for a block; of the chain ``chosen`` when something else emits it."""
    return _matmuls(chosen or chain(spec, deployment), spec, deployment)


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


def _matmuls(name: str, spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall, ...]:
    """The calls of one chain."""
    experts, arguments = spec.tensors, _second_arguments(spec)
    second = matmul_call(spec, spec.intermediate, experts.w2, _rows_dtype(spec), **arguments)
    counts = counts_of(spec)
    if name == FUSED:
        scales = experts.w13_scale.cast(torch.float32).items
        x = tensor(torch.int8, None, spec.hidden)
        first_arguments = _swiglu_quant_arguments(x, experts.w13.items, scales, row_scales(), counts)
        return OperatorCall(SWIGLU_QUANT, first_arguments), second
    if name == DEQUANT:
        sums = matmul_call(spec, spec.hidden, experts.w13, torch.int8, output_dtype=_INT32)
        scale = experts.w13_scale.cast(torch.float32).first
        x = tensor(torch.int32, None, spec.first_width)
        smooth = tensor(torch.float32, spec.local_experts, spec.intermediate) if spec.has_h_smooth else None
        dequantise = _dequant_arguments(spec, x, scale, row_scales(), counts, smooth)
        return sums, OperatorCall(DEQUANTISE, dequantise), second
    first = matmul_call(spec, spec.hidden, experts.w13, _rows_dtype(spec), **_first_arguments(spec))
    if name == JOINED:
        rows = tensor(spec.dtype, None, spec.first_width)
        return first, OperatorCall(SWIGLU_ROWS, _swiglu_rows_arguments(rows)), second
    if name == CLIPPED:
        rows, clip = tensor(spec.dtype, None, spec.first_width), tensor(torch.float32, spec.local_experts)
        return first, OperatorCall(CLIP_ROWS, _clip_rows_arguments(rows, counts, clip)), second
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
        return _antiquant_arguments(scale.cast(spec.dtype).items, offsets.items)
    return _scale_arguments(spec, scale.cast(scale_dtype(spec)).items, bias.items, row_scales())


def _antiquant_arguments(scales: list[Any], offsets: list[Any]) -> dict[str, Any]:
    return {"antiquant_scale": scales, "antiquant_offset": offsets}


def _scale_arguments(spec: BlockSpec, scales: list[Any], bias: list[Any], row_scale: Any) -> dict[str, Any]:
    return {
        "bias": bias or None,
        "scale": scales,
        "per_token_scale": [row_scale],
        "output_dtype": _TORCH_NPU_DTYPES.get(spec.dtype),  # other dtypes are refused: block.quantised_dtype
    }


def _swiglu_quant_arguments(
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


def _swiglu_rows_arguments(rows: Any) -> dict[str, Any]:
    """``npu_swiglu_quant`` of rows [N, 2I]: SwiGLU, and a scale for each row."""
    return {"x": rows, "activate_left": True, "quant_mode": 1, "dst_type": torch.int8}


def _clip_rows_arguments(rows: Any, counts: Any, clip: Any) -> dict[str, Any]:
    """``custom::npu_swiglu_clip_quant`` of rows [N, 2I]: SwiGLU, clips, and a scale for each row."""
    return {"x": rows, "group_index": counts, "group_alpha": clip, "activate_left": True}


def _dequant_arguments(
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
    if spec.activation in _GLU:
        alpha, bias = _GLU[spec.activation](spec.alpha)
        mode = _COLUMNS if spec.interleaved else _HALVES
        arguments |= {"swiglu_mode": mode, "clamp_limit": spec.limit, "glu_alpha": alpha, "glu_bias": bias}
    return arguments


_COLUMNS, _HALVES = 1, 2  # swiglu_mode with clamps: even and odd columns, or halves
_GLU: dict[
    str, Callable[[float], tuple[float, float]]
] = {  # glu_alpha and glu_bias of the activations with clamps before
    "swiglu_clamp": lambda alpha: (1.0, 0.0),
    "swiglu_oai": lambda alpha: (alpha, 1.0),
}


def takes_smooth(spec: BlockSpec) -> bool:
    """Whether there is a call that multiplies a block's activations by smooth scales: of int8 weights, by its activation."""
    known = spec.activation in _GLU or (spec.activation == "swiglu" and not spec.interleaved)
    return spec.format.weight_dtype == "int8" and known


def takes_clip(spec: BlockSpec, deployment: Deployment) -> bool:
    """Whether there is a call that clips a block's activations: of SwiGLU, where a model's library has it. What GE makes of it
    is not known."""
    known = spec.activation == "swiglu" and not spec.interleaved and not spec.has_h_smooth
    return spec.format.int8_rows and known and deployment.mode != "ge" and CLIP_ROWS in loaded_libraries()


def emit(
    emit: Emitter,
    block: Block,
    rows: Node,
    row_scale: Node | None,
    counts: Node,
    deployment: Deployment,
    chosen: str | None = None,
) -> Node:
    """As ``mlp.emit_mlp``."""
    spec = block.spec
    experts = block.experts
    w13, w13_scale = experts.w13, experts.w13_scale or ()
    w2, w2_scale = experts.w2, experts.w2_scale or ()
    if spec.quantisation not in EMITTED:
        raise ValueError(
            f"quantised_mlp: quantisation is {spec.quantisation!r}; accepted: {', '.join(sorted(EMITTED))}"
        )
    if spec.format.weight_only:
        hidden = _antiquant_matmul(emit, rows, w13, w13_scale, experts.w13_offset or (), counts)
        hidden = emit_activation(emit, hidden, counts, spec, deployment.soc)
        return _antiquant_matmul(emit, hidden, w2, w2_scale, experts.w2_offset or (), counts)
    assert row_scale is not None  # rows travel as int8 where the weights take them so
    name = chosen or chain(spec, deployment)
    if name == FUSED:
        scales = [as_float32(emit, w13_scale[0])]
        pair = emit_call(emit, SWIGLU_QUANT, _swiglu_quant_arguments(rows, w13, scales, row_scale, counts))
        hidden, row_scale = emit.item(pair, 0), emit.item(pair, 1)
    elif name == DEQUANT:
        sums = emit.item(emit_call(emit, MATMUL, matmul_arguments(rows, w13, counts, _INT32)), 0)
        scale = as_float32(emit, w13_scale[0])
        pair = emit_call(emit, DEQUANTISE, _dequant_arguments(spec, sums, scale, row_scale, counts, experts.h_smooth))
        hidden, row_scale = emit.item(pair, 0), emit.item(pair, 1)
    else:
        hidden = _scaled_matmul(emit, spec, rows, row_scale, w13, w13_scale, experts.w13_scale_bias or (), counts)
        if name in (JOINED, CLIPPED):
            operator, arguments = SWIGLU_ROWS, _swiglu_rows_arguments(hidden)
            if name == CLIPPED:
                operator, arguments = CLIP_ROWS, _clip_rows_arguments(hidden, counts, experts.h_clip)
            pair = emit_call(emit, operator, arguments)
            hidden, row_scale = emit.item(pair, 0), emit.item(pair, 1)
        else:
            hidden, row_scale = _quantise(emit, emit_activation(emit, hidden, counts, spec, deployment.soc))
    return _scaled_matmul(emit, spec, hidden, row_scale, w2, w2_scale, experts.w2_scale_bias or (), counts)


def _quantise(emit: Emitter, rows: Node) -> tuple[Node, Node]:
    pair = emit_call(emit, QUANTISE, quantise_arguments(rows))
    return emit.item(pair, 0), emit.item(pair, 1)


def quantise_tokens(emit: Emitter, block: Block, share: Share) -> tuple[Node, Node | None]:
    """This rank's share of x [M, H], as it travels: int8 with scales [M] where the weights take int8 rows."""
    x = share.of(emit.rows(block.x))
    if block.x_scale is not None:
        return x, share.of(emit.call(aten.reshape.default, block.x_scale, [-1]))
    if block.spec.has_x_smooth:
        return x, None  # made int8 where it is known which expert a row is for
    return _quantise(emit, x) if block.spec.format.int8_rows else (x, None)


def _scaled_matmul(
    emit: Emitter,
    spec: BlockSpec,
    rows: Node,
    row_scale: Node,
    weight: Sequence[Node],
    scale: Sequence[Node],
    bias: Sequence[Node],
    counts: Node,
) -> Node:
    """int8 rows by int8 or int4 weights: scaled by weight column and by row, in the block's dtype."""
    arguments = _scale_arguments(spec, [matmul_scale(emit, s, spec) for s in scale], list(bias), row_scale)
    return emit.item(emit_call(emit, MATMUL, matmul_arguments(rows, weight, counts, **arguments)), 0)


def _antiquant_matmul(
    emit: Emitter,
    rows: Node,
    weight: Sequence[Node],
    scale: Sequence[Node],
    offset: Sequence[Node],
    counts: Node,
) -> Node:
    """16-bit rows by int4 weights, which the operator turns into 16 bits: (w + offset) * scale."""
    dtype = rows.meta["val"].dtype
    scales = [emit.cast(s, dtype) for s in scale]
    if offset:
        offsets = [emit.cast(o, dtype) for o in offset]
    else:
        offsets = [_zeros(emit, s.meta["val"]) for s in scales]
    arguments = matmul_arguments(rows, weight, counts, **_antiquant_arguments(scales, offsets))
    return emit.item(emit_call(emit, MATMUL, arguments), 0)


def _zeros(emit: Emitter, value: torch.Tensor) -> Node:
    shape = [int(n) for n in value.shape]
    return emit.constant(aten.full.default, shape, 0, dtype=value.dtype, device=value.device, pin_memory=False)
