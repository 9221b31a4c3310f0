"""The grouped MLP on device operators, shared by the implementations that do not fuse it: weights without quantisation.

Before: ``grouped_mlp(rows, counts, w13, w2, ...)``. After: ``npu_grouped_matmul`` > activation > ``npu_grouped_matmul``,
with counts per expert as the group list (type 1). Rows past the sum of the counts are undefined afterwards
(aclnnGroupedMatmul leaves them untouched): the caller keeps them out of the result. Quantised weights: ``quantised_mlp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.implementations import quantised_mlp
from moe_lowering.passes.implementations.activation import EMITTED, activation_calls, emit_activation
from moe_lowering.passes.implementations.matmul_calls import MATMUL, matmul_arguments, matmul_call
from moe_lowering.passes.operands import Operand, Operands
from moe_lowering.passes.operator_calls import OperatorCall, Rules, emit_call

# bfloat16 inputs take a float32 bias; others a bias of their own dtype. Source: ops_transformer.grouped_matmul
_BIAS_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float16, torch.float32: torch.float32}


def mlp_calls(spec: BlockSpec, deployment: Deployment, chosen: str | None = None) -> tuple[OperatorCall | Rules, ...]:
    """The calls that ``emit_mlp`` makes for a block.

    ``chosen`` is the chain of ``quantised_mlp`` of a caller that does not use ``emit_mlp``.
    """
    words = mlp_words(spec, deployment)
    if not all(words[name] for name in _NEEDED):
        return (Rules("grouped_mlp", words),)  # a block that has no emitter makes no calls
    if spec.format.quantised:
        return Rules("grouped_mlp", words), *quantised_mlp.block_calls(spec, deployment, chosen)
    experts = spec.tensors
    first = matmul_call(spec, spec.hidden, experts.w13, bias=_biases(spec, experts.w13_bias))
    second = matmul_call(spec, spec.intermediate, experts.w2, bias=_biases(spec, experts.w2_bias))
    return Rules("grouped_mlp", words), first, *activation_calls(spec, deployment.soc), second


_NEEDED = ("activation_is_known", "quantisation_is_known", "smooth_scales_have_a_call", "clips_have_a_call")


def mlp_words(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    """Quantities of the rules of ``grouped_mlp``, which makes no call itself: whether the block's words have an
    emitter."""
    known = spec.quantisation == "none" or spec.quantisation in quantised_mlp.EMITTED
    return {
        "activation": spec.activation,
        "activation_is_known": spec.activation in EMITTED,
        "quantisation": spec.quantisation,
        "quantisation_is_known": known,
        "smooth_scales_have_a_call": not spec.has_h_smooth or quantised_mlp.takes_smooth(spec),
        "clips_have_a_call": not spec.has_h_clip or quantised_mlp.takes_clip(spec, deployment),
    }


def _biases(spec: BlockSpec, bias: Operands) -> list[Operand] | None:
    return bias.cast(bias_dtype(spec.dtype)).items or None


def bias_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a bias is cast to for rows of ``dtype``."""
    return _BIAS_DTYPES[dtype]


def emit_mlp(
    emit: Emitter,
    block: Block,
    rows: Node,
    row_scale: Node | None,
    counts: Node,
    deployment: Deployment,
    chosen: str | None = None,
) -> Node:
    """rows [N, H] (with row_scale [N] where the weights take int8 rows) of which the first sum(counts) count -> [N, H] of
    the block's dtype, the rest undefined. ``chosen``: as for ``mlp_calls``."""
    if block.spec.format.quantised:
        return quantised_mlp.emit(emit, block, rows, row_scale, counts, deployment, chosen)
    experts = block.experts
    hidden = _grouped_matmul(emit, rows, experts.w13, experts.w13_bias, counts)
    hidden = emit_activation(emit, hidden, counts, block.spec, deployment.soc)
    return _grouped_matmul(emit, hidden, experts.w2, experts.w2_bias, counts)


def _grouped_matmul(emit: Emitter, x: Node, weight: Sequence[Node], bias: Sequence[Node], counts: Node) -> Node:
    biases = [emit.cast(b, bias_dtype(x.meta["val"].dtype)) for b in bias]
    return emit.item(emit_call(emit, MATMUL, matmul_arguments(x, weight, counts, bias=biases or None)), 0)
