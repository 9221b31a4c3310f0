"""The grouped MLP on device operators, shared by the implementations that do not fuse it: weights without quantisation.

Before: ``grouped_mlp(rows, counts, w13, w2, ...)``. After: ``npu_grouped_matmul`` > activation > ``npu_grouped_matmul``,
with counts per expert as the group list (type 1). Rows past the sum of the counts are undefined afterwards
(aclnnGroupedMatmul leaves them untouched): the caller keeps them out of the result. Quantised weights: ``quantised_mlp``.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter
from moe_lowering.passes.implementations import quantised_mlp
from moe_lowering.passes.implementations.activation import activation_operator, emit_activation
from moe_lowering.passes.implementations.base import Call

# bfloat16 inputs take a float32 bias; others a bias of their own dtype (facts/cann_ops.md §1.4, aclnnGroupedMatmulV4)
_BIAS_DTYPE = {torch.bfloat16: torch.float32}


def mlp_calls(
    spec: BlockSpec, deployment: Deployment, quantised_rows: bool, chosen: str | None = None
) -> tuple[Call, ...]:
    """The calls that ``emit_mlp`` makes for a block; ``quantised_rows`` says that rows arrive as int8 with scales.

    ``chosen`` is the chain of ``quantised_mlp`` of a caller that does not use ``emit_mlp``.
    """
    if spec.quantisation != "none":
        return quantised_mlp.calls(spec, deployment, quantised_rows, chosen)
    name = activation_operator(spec, deployment.soc)
    return (Call("npu_grouped_matmul"), *([Call(name)] if name else []))


def emit_mlp(
    emit: Emitter, block: Block, rows: Node, row_scale: Node | None, counts: Node, deployment: Deployment
) -> Node:
    """rows [N, H] (with row_scale [N] when they are int8) of which the first sum(counts) count -> [N, H] of the block's
    dtype, the rest undefined."""
    if block.spec.quantisation != "none":
        return quantised_mlp.emit(emit, block, rows, row_scale, counts, deployment)
    w13, w2, w13_bias, w2_bias = block.experts
    hidden = emit_activation(emit, _grouped_matmul(emit, rows, w13, w13_bias, counts), block.spec, deployment.soc)
    return _grouped_matmul(emit, hidden, w2, w2_bias, counts)


def _grouped_matmul(emit: Emitter, x: Node, weight: tuple[Node, ...], bias: tuple[Node, ...], counts: Node) -> Node:
    dtype = x.meta["val"].dtype
    biases = [emit.cast(b, _BIAS_DTYPE.get(dtype, dtype)) for b in bias]
    results = emit.call(
        torch.ops.npu.npu_grouped_matmul.default, [x], list(weight), bias=biases or None,
        group_list=counts, split_item=2, group_type=0, group_list_type=1,
    )  # fmt: skip
    return emit.item(results, 0)
