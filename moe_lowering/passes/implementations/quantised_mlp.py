"""The grouped MLP with quantised weights on device operators.

    w8a8   quantise rows > ``npu_grouped_matmul_swiglu_quant_v2`` > ``npu_grouped_matmul``
           quantise rows > ``npu_grouped_matmul`` (int32) > ``npu_dequant_swiglu_quant`` > ``npu_grouped_matmul``
           quantise rows > ``npu_grouped_matmul`` > activation > quantise > ``npu_grouped_matmul``
    w4a8   the third line, with int4 weights, their scales as bits and their compensation as bias
    w4a16  ``npu_grouped_matmul`` (antiquant scale and offset) > activation > ``npu_grouped_matmul``

W8A8 takes the first line whose operators accept the block, by their rows in ``limits/data`` (``chain``): the first two know
SwiGLU with the gate first only, and have limits of their own on format, layout and width. "quantise" is
``npu_dynamic_quant``, left out where rows arrive as int8 with scales (MC2's dispatch with quant_mode 2).
Counts per expert are the group list (type 1). Rows past the sum of the counts are undefined afterwards.
Dtypes of scales: limits/data/grouped_matmul_quantised.toml.
Sources: vllm_ascend.moe_mlp: unified_apply_mlp; ops_transformer.grouped_matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.limits import check
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter, aten
from moe_lowering.passes.implementations.activation import activation_calls, emit_activation
from moe_lowering.passes.implementations.base import Call, result_quantities
from moe_lowering.passes.implementations.matmul_calls import call_of, counts_of, matmul_call, row_scales, rows_of
from moe_lowering.passes.implementations.tensor_parallel import Share
from moe_lowering.passes.operands import Operands
from moe_lowering.passes.quantities import expert_quantities

_TORCH_NPU_DTYPES = {torch.float16: 5, torch.bfloat16: 15}  # numbers that npu_grouped_matmul's output_dtype takes
_INT32 = 3
FLOAT32 = 6  # of torch's numbers of dtypes; not the default of dequant_dtype before torch_npu 2.11, which is 0
_LOW_HALF = 0xFFFFFFFF

EMITTED = frozenset({"w8a8", "w4a8", "w4a16"})  # the formats that this file has calls for; not what the vocabulary has
FUSED, DEQUANT, PLAIN = "fused", "dequant", "plain"  # the chains, in order of preference


def chain(spec: BlockSpec, deployment: Deployment) -> str:
    """The chain that a block takes: the first one whose operators accept it; ``PLAIN`` when neither of the others does.

    It depends on what is the same on every rank, and T is not in it: verdict, emission and every rank choose alike.
    """
    if spec.format.weight_dtype == "int8" and spec.activation == "swiglu" and not spec.interleaved:
        for name in (FUSED, DEQUANT):
            if all(_accepted(call, spec, deployment) for call in _matmuls(name, spec, deployment)):
                return name
    return PLAIN


def _accepted(call: Call, spec: BlockSpec, deployment: Deployment) -> bool:
    given = {**expert_quantities(spec, deployment), **call.given}
    return _legal(call.operator, deployment.soc, tuple(deployment.versions.items()), frozenset(given.items()))


@functools.lru_cache(maxsize=256)
def _legal(operator: str, soc: str, versions: tuple[tuple[str, str], ...], given: frozenset[tuple[str, Any]]) -> bool:
    return not check(operator, soc, dict(given), versions=dict(versions))


def calls(spec: BlockSpec, deployment: Deployment, quantised_rows: bool, chosen: str | None = None) -> tuple[Call, ...]:
    """The calls that ``emit`` makes for a block; of the chain ``chosen`` when something else emits it."""
    rows = () if quantised_rows or not spec.format.int8_rows else (_quantise_call(spec),)
    return (*rows, *_matmuls(chosen or chain(spec, deployment), spec, deployment))


def _quantise_call(spec: BlockSpec) -> Call:
    return Call(
        "npu_dynamic_quant",
        result_quantities(spec, quant_mode="pertoken", dst_type=1, dst_type_max=0, x_dims=2, has_groups=False),
    )


def _matmuls(name: str, spec: BlockSpec, deployment: Deployment) -> tuple[Call, ...]:
    """The calls of one chain, without the quantisation of its rows."""
    experts, arguments = spec.tensors, _second_arguments(spec)
    second = matmul_call(spec, deployment, spec.intermediate, experts.w2, _rows_dtype(spec), **arguments)
    if name == FUSED:
        return _swiglu_quant_call(spec, deployment), second
    if name == DEQUANT:
        unscaled = matmul_call(spec, deployment, spec.hidden, experts.w13, torch.int8, output_dtype=_INT32)
        return unscaled, _dequant_call(spec, deployment), second
    first = matmul_call(spec, deployment, spec.hidden, experts.w13, _rows_dtype(spec), **_first_arguments(spec))
    requantise = (_quantise_call(spec),) if spec.format.int8_rows else ()
    return first, *activation_calls(spec, deployment.soc), *requantise, second


def _rows_dtype(spec: BlockSpec) -> torch.dtype:
    return torch.int8 if spec.format.int8_rows else spec.dtype


def _first_arguments(spec: BlockSpec) -> dict[str, Any]:
    experts = spec.tensors
    return _arguments(spec, experts.w13_scale, experts.w13_offset, experts.w13_scale_bias)


def _second_arguments(spec: BlockSpec) -> dict[str, Any]:
    experts = spec.tensors
    return _arguments(spec, experts.w2_scale, experts.w2_offset, experts.w2_scale_bias)


def _arguments(spec: BlockSpec, scale: Operands, offset: Operands, bias: Operands) -> dict[str, Any]:
    """What a call of ``npu_grouped_matmul`` gets beside rows and weights, as ``emit`` passes it."""
    if spec.format.weight_only:
        offsets = (offset or scale).cast(spec.dtype)
        return {"antiquant_scale": scale.cast(spec.dtype).items, "antiquant_offset": offsets.items}
    return {
        "scale": scale.cast(_scale_dtype(spec)).items,
        "bias": bias.items or None,
        "per_token_scale": [row_scales()],
        "output_dtype": _TORCH_NPU_DTYPES.get(spec.dtype),  # other dtypes are refused: block.quantised_dtype
    }


def _swiglu_quant_call(spec: BlockSpec, deployment: Deployment) -> Call:
    weight, scale = spec.tensors.w13, spec.tensors.w13_scale.cast(torch.float32)
    given = {
        "x": rows_of(spec.hidden, torch.int8), "weight": weight.items, "weight_scale": scale.items,
        "x_scale": row_scales(), "group_list": counts_of(spec), "smooth_scale": None, "weight_assist_matrix": None,
        "bias": None, "dequant_mode": 0, "dequant_dtype": FLOAT32, "quant_mode": 0, "quant_dtype": 1, "group_list_type": 1,
        "x_dtype": None, "weight_dtype": None, "weight_scale_dtype": None, "x_scale_dtype": None,
    }  # fmt: skip
    return call_of("npu_grouped_matmul_swiglu_quant_v2", given, deployment, weight)


def _dequant_call(spec: BlockSpec, deployment: Deployment) -> Call:
    scale = spec.tensors.w13_scale.cast(torch.float32)
    given = {
        "x": rows_of(2 * spec.intermediate, torch.int32), "weight_scale": scale.first, "activation_scale": row_scales(),
        "bias": None, "quant_scale": None, "quant_offset": None, "group_index": counts_of(spec), "activate_left": True,
        "quant_mode": 1, "dst_type": None, "round_mode": None, "activate_dim": None, "swiglu_mode": 0,
    }  # fmt: skip
    return call_of("npu_dequant_swiglu_quant", given, deployment)


def _scale_dtype(spec: BlockSpec) -> torch.dtype:
    """What ``npu_grouped_matmul`` takes as scale of int8 rows: bits for int4 weights, else by the result's dtype."""
    if spec.format.bits_of_scales:
        return torch.int64
    return torch.bfloat16 if spec.dtype == torch.bfloat16 else torch.float32


def emit(emit: Emitter, block: Block, rows: Node, row_scale: Node | None, counts: Node, deployment: Deployment) -> Node:
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
        hidden = emit_activation(emit, hidden, spec, deployment.soc)
        return _antiquant_matmul(emit, hidden, w2, w2_scale, experts.w2_offset or (), counts)
    if row_scale is None:
        rows, row_scale = _quantise(emit, rows)
    name = chain(spec, deployment)
    if name == FUSED:
        pair = emit.call(
            torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2.default, rows, list(w13), [as_float32(emit, w13_scale[0])],
            row_scale, counts, dequant_dtype=FLOAT32, group_list_type=1,
        )  # fmt: skip
        hidden, row_scale = emit.item(pair, 0), emit.item(pair, 1)
    elif name == DEQUANT:
        hidden, row_scale = _dequant_swiglu_quant(emit, rows, row_scale, w13, w13_scale[0], counts)
    else:
        hidden = _scaled_matmul(emit, spec, rows, row_scale, w13, w13_scale, experts.w13_scale_bias or (), counts)
        hidden, row_scale = _quantise(emit, emit_activation(emit, hidden, spec, deployment.soc))
    return _scaled_matmul(emit, spec, hidden, row_scale, w2, w2_scale, experts.w2_scale_bias or (), counts)


def _quantise(emit: Emitter, rows: Node) -> tuple[Node, Node]:
    pair = emit.call(torch.ops.npu.npu_dynamic_quant.default, rows)
    return emit.item(pair, 0), emit.item(pair, 1)


def quantise_tokens(emit: Emitter, block: Block, mine: Share) -> tuple[Node, Node | None]:
    """This rank's share of x [M, H], as it travels: int8 with scales [M] where the weights take int8 rows."""
    x = mine.of(emit.rows(block.x))
    if block.x_scale is not None:
        return x, mine.of(emit.call(aten.reshape.default, block.x_scale, [-1]))
    return _quantise(emit, x) if block.spec.format.int8_rows else (x, None)


def _dequant_swiglu_quant(
    emit: Emitter, rows: Node, row_scale: Node, weight: Sequence[Node], scale: Node, counts: Node
) -> tuple[Node, Node]:
    """int8 rows by int8 weights in int32, then scales, SwiGLU and quantisation in one: int8 [N, I], scales [N]."""
    sums = emit.call(
        torch.ops.npu.npu_grouped_matmul.default, [rows], list(weight), group_list=counts, split_item=2, group_type=0,
        group_list_type=1, output_dtype=_INT32,
    )  # fmt: skip
    pair = emit.call(
        torch.ops.npu.npu_dequant_swiglu_quant.default, emit.item(sums, 0), weight_scale=as_float32(emit, scale),
        activation_scale=row_scale, group_index=counts, activate_left=True, quant_mode=1,
    )  # fmt: skip
    return emit.item(pair, 0), emit.item(pair, 1)


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
    results = emit.call(
        torch.ops.npu.npu_grouped_matmul.default, [rows], list(weight), bias=list(bias) or None,
        scale=[_scale(emit, s, spec) for s in scale], per_token_scale=[row_scale], group_list=counts, split_item=2,
        group_type=0, group_list_type=1, output_dtype=_TORCH_NPU_DTYPES[spec.dtype],
    )  # fmt: skip
    return emit.item(results, 0)


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
    results = emit.call(
        torch.ops.npu.npu_grouped_matmul.default, [rows], list(weight), antiquant_scale=scales,
        antiquant_offset=offsets, group_list=counts, split_item=2, group_type=0, group_list_type=1,
    )  # fmt: skip
    return emit.item(results, 0)


def _zeros(emit: Emitter, value: torch.Tensor) -> Node:
    shape = [int(n) for n in value.shape]
    return emit.constant(aten.full.default, shape, 0, dtype=value.dtype, device=value.device, pin_memory=False)


def _scale(emit: Emitter, scale: Node, spec: BlockSpec) -> Node:
    if spec.format.bits_of_scales:
        return _as_bits(emit, scale)
    return emit.cast(_as_float(emit, scale), _scale_dtype(spec))


def _as_float(emit: Emitter, scale: Node) -> Node:
    """Scales that are kept as bits (float32 in the low half of int64, for dispatch_ffn_combine) as float32."""
    if scale.meta["val"].dtype != torch.int64:
        return scale
    return emit.call(aten.view.dtype, emit.cast(scale, torch.int32), torch.float32)


def as_float32(emit: Emitter, scale: Node) -> Node:
    """Scales as the float32 numbers that they are, also where they are kept as bits."""
    return emit.cast(_as_float(emit, scale), torch.float32)


def _as_bits(emit: Emitter, scale: Node) -> Node:
    """The bits of float32 in the low half of int64, and nothing in the high one, where the sign would go and hardware
    reads flags. With a tensor for the mask: torchair has no converter of ``bitwise_and.Scalar``."""
    value = scale.meta["val"]
    if value.dtype == torch.int64:
        return scale
    bits = emit.cast(emit.call(aten.view.dtype, emit.cast(scale, torch.float32), torch.int32), torch.int64)
    low = emit.constant(aten.full.default, [], _LOW_HALF, dtype=torch.int64, device=value.device, pin_memory=False)
    return emit.call(aten.bitwise_and.Tensor, bits, low)
