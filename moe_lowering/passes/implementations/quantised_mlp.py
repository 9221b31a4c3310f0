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
The arguments of all these calls: ``quantised_calls``. Dtypes of scales: limits/data/grouped_matmul_quantised.toml.
Sources: vllm_ascend.moe_mlp: unified_apply_mlp; ops_transformer.grouped_matmul; recipes.swiglu_clip_quant.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.limits import check
from moe_lowering.limits.calls.schemas import loaded_libraries
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.context import judged_quantities
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.activation import emit_activation
from moe_lowering.passes.implementations.matmul_calls import MATMUL, matmul_arguments
from moe_lowering.passes.implementations.quantised_calls import (
    CLIP_ROWS,
    CLIPPED,
    DEQUANT,
    DEQUANTISE,
    FUSED,
    GLU,
    INT32,
    JOINED,
    PLAIN,
    QUANTISE,
    SWIGLU_QUANT,
    SWIGLU_ROWS,
    antiquant_arguments,
    chain_calls,
    clip_rows_arguments,
    dequant_arguments,
    quantise_arguments,
    scale_arguments,
    swiglu_quant_arguments,
    swiglu_rows_arguments,
)
from moe_lowering.passes.implementations.scale_casts import as_float32, matmul_scale
from moe_lowering.passes.implementations.tensor_parallel import OwnTokens
from moe_lowering.passes.operator_calls import OperatorCall, emit_call

# The formats that this file has calls for; a format that only the vocabulary has is refused
EMITTED = frozenset({"w8a8", "w4a8", "w4a16"})


def chain(spec: BlockSpec, deployment: Deployment) -> str:
    """The chain that a block takes: the first one whose operators accept it; ``PLAIN`` when none of the others does.

    It depends on what is the same on every rank, and T is not in it: verdict, emission and every rank choose alike.
    """
    if spec.has_h_clip:
        return CLIPPED
    if spec.has_h_smooth:
        return DEQUANT  # it alone multiplies each expert's activations; where it is not legal, the block is not
    for name in _candidates(spec, deployment):
        if all(_is_accepted(call, deployment) for call in chain_calls(name, spec, deployment)):
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
        DEQUANT: eight_bits and (halves or spec.activation in GLU),
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


def block_calls(spec: BlockSpec, deployment: Deployment, chosen: str | None = None) -> tuple[OperatorCall, ...]:
    """The calls that ``emit`` makes for a block; of the chain ``chosen`` when something else emits it."""
    return chain_calls(chosen or chain(spec, deployment), spec, deployment)


def takes_smooth(spec: BlockSpec) -> bool:
    """Whether there is a call that multiplies a block's activations by smooth scales: of int8 weights, by its activation."""
    known = spec.activation in GLU or (spec.activation == "swiglu" and not spec.interleaved)
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
        pair = emit_call(emit, SWIGLU_QUANT, swiglu_quant_arguments(rows, w13, scales, row_scale, counts))
    elif name == DEQUANT:
        sums = emit.item(emit_call(emit, MATMUL, matmul_arguments(rows, w13, counts, INT32)), 0)
        scale = as_float32(emit, w13_scale[0])
        pair = emit_call(emit, DEQUANTISE, dequant_arguments(spec, sums, scale, row_scale, counts, experts.h_smooth))
    else:
        hidden = _scaled_matmul(emit, spec, rows, row_scale, w13, w13_scale, experts.w13_scale_bias or (), counts)
        if name == JOINED:
            pair = emit_call(emit, SWIGLU_ROWS, swiglu_rows_arguments(hidden))
        elif name == CLIPPED:
            pair = emit_call(emit, CLIP_ROWS, clip_rows_arguments(hidden, counts, experts.h_clip))
        else:
            hidden = emit_activation(emit, hidden, counts, spec, deployment.soc)
            pair = emit_call(emit, QUANTISE, quantise_arguments(hidden))
    hidden, row_scale = emit.item(pair, 0), emit.item(pair, 1)
    return _scaled_matmul(emit, spec, hidden, row_scale, w2, w2_scale, experts.w2_scale_bias or (), counts)


def quantise_tokens(emit: Emitter, block: Block, own_tokens: OwnTokens) -> tuple[Node, Node | None]:
    """This rank's share of x [M, H], as it travels: int8 with scales [M] where the weights take int8 rows."""
    x = own_tokens.of(emit.rows(block.x))
    if block.x_scale is not None:
        return x, own_tokens.of(emit.call(aten.reshape.default, block.x_scale, [-1]))
    if block.spec.has_x_smooth:
        return x, None  # made int8 where it is known which expert a row is for
    if not block.spec.format.int8_rows:
        return x, None
    pair = emit_call(emit, QUANTISE, quantise_arguments(x))
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
    arguments = scale_arguments(spec, [matmul_scale(emit, s, spec) for s in scale], list(bias), row_scale)
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
    arguments = matmul_arguments(rows, weight, counts, **antiquant_arguments(scales, offsets))
    return emit.item(emit_call(emit, MATMUL, arguments), 0)


def _zeros(emit: Emitter, value: torch.Tensor) -> Node:
    shape = [int(n) for n in value.shape]
    return emit.constant(aten.full.default, shape, 0, dtype=value.dtype, device=value.device, pin_memory=False)
