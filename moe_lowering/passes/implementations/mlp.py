"""The grouped MLP on device operators, shared by the implementations that do not fuse it.

Before: ``grouped_mlp(rows, counts, w13, w2, ...)``. After: ``npu_grouped_matmul`` > activation > ``npu_grouped_matmul``,
with counts per expert as the group list (type 1). Rows past the sum of the counts are undefined afterwards
(aclnnGroupedMatmul leaves them untouched): the caller keeps them out of the result.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter, aten

# bfloat16 inputs take a float32 bias; others a bias of their own dtype (facts/cann_ops.md §1.4, aclnnGroupedMatmulV4)
_BIAS_DTYPE = {torch.bfloat16: torch.float32}


def mlp_operators(spec: BlockSpec, soc: str) -> tuple[str, ...]:
    """The operators that ``emit_mlp`` uses for a block."""
    name = _activation_operator(spec, soc)
    return ("npu_grouped_matmul", *([name] if name else []))


def _activation_operator(spec: BlockSpec, soc: str) -> str | None:
    """The device operator of an activation; None where it is composed of ATen operators."""
    if spec.activation == "swiglu" and not spec.interleaved:
        return "npu_swiglu"
    if spec.activation == "swiglu_oai" and soc in ("A2", "A3"):
        return "npu_clipped_swiglu"  # documented for A2 and A3 only
    return None


def emit_mlp(emit: Emitter, block: Block, rows: Node, counts: Node, soc: str) -> Node:
    """rows [N, H] of which the first sum(counts) count -> [N, H], the rest undefined."""
    w13, w2, w13_bias, w2_bias = block.experts
    hidden = _activate(emit, _grouped_matmul(emit, rows, w13, w13_bias, counts), block.spec, soc)
    return _grouped_matmul(emit, hidden, w2, w2_bias, counts)


def _grouped_matmul(emit: Emitter, x: Node, weight: tuple[Node, ...], bias: tuple[Node, ...], counts: Node) -> Node:
    dtype = x.meta["val"].dtype
    biases = [emit.cast(b, _BIAS_DTYPE.get(dtype, dtype)) for b in bias]
    results = emit.call(
        torch.ops.npu.npu_grouped_matmul.default, [x], list(weight), bias=biases or None,
        group_list=counts, split_item=2, group_type=0, group_list_type=1,
    )  # fmt: skip
    return emit.item(results, 0)


def _activate(emit: Emitter, h: Node, spec: BlockSpec, soc: str) -> Node:
    operator = _activation_operator(spec, soc)
    if operator == "npu_swiglu":
        return emit.call(torch.ops.npu.npu_swiglu.default, h, -1)
    if operator == "npu_clipped_swiglu":
        return emit.call(
            torch.ops.npu.npu_clipped_swiglu.default, h,
            alpha=spec.alpha, limit=spec.limit, bias=1.0, interleaved=spec.interleaved,
        )  # fmt: skip
    gate, up = _halves(emit, h, spec)
    if spec.activation in ("swiglu_clamp", "swiglu_oai"):
        gate = emit.call(aten.clamp.default, gate, None, spec.limit)
        up = emit.call(aten.clamp.default, up, -spec.limit, spec.limit)
    if spec.activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if spec.activation == "gelu_tanh" else "none"
        gate = emit.call(aten.gelu.default, gate, approximate=approximate)
    elif spec.activation == "swiglu_oai":
        slope = emit.call(aten.sigmoid.default, emit.call(aten.mul.Tensor, gate, spec.alpha))
        gate = emit.call(aten.mul.Tensor, gate, slope)
        up = emit.call(aten.add.Tensor, up, 1)
    else:
        gate = emit.call(aten.silu.default, gate)
    return emit.call(aten.mul.Tensor, gate, up)


def _halves(emit: Emitter, h: Node, spec: BlockSpec) -> tuple[Node, Node]:
    if spec.interleaved:
        last = 2 * spec.intermediate
        return (
            emit.call(aten.slice.Tensor, h, 1, 0, last, 2),
            emit.call(aten.slice.Tensor, h, 1, 1, last, 2),
        )
    pair = emit.call(aten.split.Tensor, h, spec.intermediate, 1)
    return emit.item(pair, 0), emit.item(pair, 1)
