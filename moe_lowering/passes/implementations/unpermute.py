"""Rows of experts back to tokens: each token is the weighted sum of its k rows.

npugraph_ex: ``npu_moe_token_unpermute``, which takes weights of the dtype of the rows.
GE: torchair has no converter for it (nor for any operator that does the same without ``npu_moe_finalize_routing``'s
inaccuracy), so ATen ``index_select``, multiply, ``sum``, in float32, which all have one. It writes the selected rows
[T * k, H] and their products to memory, which the fused operator does not. Rows that no token may see are taken out of
what was selected, one pass over [T * k, H]: GE graphs are functional, and changing one row means to write all.
Sources: wheel.ge_converters: none; ops_transformer.token_unpermute: the operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.operator_calls import OperatorCall, emit_call, tensor

UNPERMUTE = "npu_moe_token_unpermute"


def combine_calls(spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall, ...]:
    """The Ascend calls that ``emit_combine`` makes for a block: those whose limits bind it."""
    return () if deployment.mode == "ge" else (unpermute_call(spec),)


def unpermute_arguments(rows: Any, index: Any, weights: Any) -> dict[str, Any]:
    """Rows [N, H] to tokens by index [T * k] and weights [T, k], which have the dtype of the rows."""
    return {"permuted_tokens": rows, "sorted_indices": index, "probs": weights}


def unpermute_call(spec: BlockSpec) -> OperatorCall:
    """The call on rows in the dtype of the block's result, which x need not have (int8 with scales)."""
    rows, weights = tensor(spec.dtype, None, spec.hidden), tensor(spec.dtype, None, spec.top_k)
    return OperatorCall(UNPERMUTE, unpermute_arguments(rows, tensor(torch.int32, None), weights))


def weights_dtype(spec: BlockSpec, deployment: Deployment) -> torch.dtype:
    """The dtype in which ``emit_combine`` uses the routing weights of a block."""
    return torch.float32 if deployment.mode == "ge" else spec.dtype


def emit_combine(
    emit: Emitter, rows: Node, index: Node, weights: Node, deployment: Deployment, some_absent: bool = False
) -> Node:
    """Emit y [T, H], y[t] = sum over j of weights[t, j] * rows[index[t * k + j]], in the dtype of ``rows``.

    Args:
        emit: where.
        rows: [N, H], without undefined rows: a row is read even where its weight is 0.
        index: int32 [T * k], every entry in 0..N-1.
        weights: [T, k], any float dtype.
        deployment: its ``mode`` says which operators may be used.
        some_absent: for GE alone: an index may be -1, which stands for a row of zeros, and rows that no index names may
            be undefined.
    """
    dtype = rows.meta["val"].dtype
    if deployment.mode != "ge":
        return emit_call(emit, UNPERMUTE, unpermute_arguments(rows, index, emit.cast(weights, dtype)))
    shape = [-1, int(weights.meta["val"].shape[1]), int(rows.meta["val"].shape[1])]
    selected = _select(emit, rows, index) if some_absent else emit.call(aten.index_select.default, rows, 0, index)
    selected = emit.call(aten.reshape.default, selected, shape)
    column = emit.call(aten.unsqueeze.default, emit.cast(weights, torch.float32), 2)
    weighted = emit.call(aten.mul.Tensor, emit.cast(selected, torch.float32), column)
    return emit.cast(emit.call(aten.sum.dim_IntList, weighted, [1]), dtype)


def _select(emit: Emitter, rows: Node, index: Node) -> Node:
    """Rows by index, zeros for -1. Selected first: a row of a functional graph is changed by writing all of them."""
    selected = emit.call(aten.index_select.default, rows, 0, emit.call(aten.clamp.default, index, 0))
    absent = emit.call(aten.unsqueeze.default, emit.call(aten.lt.Scalar, index, 0), 1)
    return emit.call(aten.masked_fill.Scalar, selected, absent, 0)
