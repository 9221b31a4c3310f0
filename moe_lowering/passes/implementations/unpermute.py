"""Rows of experts back to tokens: each token is the weighted sum of its k rows.

By ``Deployment.unpermute_operator``:

token_unpermute   npugraph_ex: ``npu_moe_token_unpermute``, which takes weights of the dtype of the rows and has no index
                  that stands for no row (``gathered`` makes one row of zeros). GE: torchair has no converter for it, so
                  ATen ``index_select``, multiply, ``sum``, in float32, which all have one. It writes the selected rows
                  [T * k, H] and their products to memory, which the fused operator does not. Rows that no token may see
                  are taken out of what was selected, one pass over [T * k, H]: GE graphs are functional, and changing
                  one row means to write all.
finalize_routing  both modes: ``npu_moe_finalize_routing`` with drop_pad_mode 3, which reads -1 as no row. The rows are
                  [E, C, H] to it: E row buffers of C = 1 line, as it wants no fewer of them than a token has rows.

The second is not the default: vllm-ascend says that the operator is inaccurate, not in which mode, and nobody here has run
it on a device. In mode 3 its kernels neither read a row nor add one where the index is -1. In mode 2, which is not made for
-1, they multiply what the row before left in their buffer. bfloat16 is added up in float32, float16 in float16
(``finalize.float16``). With k = 4 and rows that the core's memory does not hold a row is lost (``finalize.wide_rows``).
Others call it as it is emitted here, with tokens of all ranks, this rank's experts and a reduce_scatter behind.
Sources: wheel.ge_converters: none for unpermute, one for finalize_routing; ops_transformer.token_unpermute,
ops_transformer.finalize_routing: the operators; ops_kernels.finalize_bf16, ops_kernels.finalize_bf16_whole: mode 3 and
mode 2, the sum in float32 [derived]; vllm_ascend_wheel.comm_method: the doubt; omni_infer.pangu: the same call;
omni_infer.all_gather: with rows [1, N, H].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.operator_calls import OperatorCall, emit_call, tensor
from moe_lowering.passes.quantities import dtype_name
from moe_lowering.vocabulary import FINALIZE_ROUTING

UNPERMUTE, FINALIZE = "npu_moe_token_unpermute", "npu_moe_finalize_routing"
_BY_ROW_DROP = 3  # drop_pad_mode: the index of (t, j) is at t * k + j, as init_routing_v2 gives it, and may be -1


def combine_calls(
    spec: BlockSpec,
    deployment: Deployment,
    tokens: Callable[[Any], Any],
    rows: Callable[[Any], Any] = lambda tokens: None,
) -> tuple[OperatorCall, ...]:
    """The Ascend calls that ``emit_combine`` makes for a block: those whose limits bind it.

    Args:
        tokens: how many tokens it gives, for T as the rules see it. rows: likewise the rows that it is given; None where
            they are no fewer than the slots of a token, whatever T is.
    """
    if deployment.unpermute_operator == FINALIZE_ROUTING:
        return (_finalize_call(spec, tokens, rows),)
    return () if deployment.mode == "ge" else (unpermute_call(spec),)


def unpermute_arguments(rows: Any, index: Any, weights: Any) -> dict[str, Any]:
    """Rows [N, H] to tokens by index [T * k] and weights [T, k], which have the dtype of the rows."""
    return {"permuted_tokens": rows, "sorted_indices": index, "probs": weights}


def unpermute_call(spec: BlockSpec) -> OperatorCall:
    """The call on rows in the dtype of the block's result, which x need not have (int8 with scales)."""
    rows, weights = tensor(spec.dtype, None, spec.hidden), tensor(spec.dtype, None, spec.top_k)
    return OperatorCall(UNPERMUTE, unpermute_arguments(rows, tensor(torch.int32, None), weights))


def _finalize_arguments(rows: Any, index: Any, weights: Any) -> dict[str, Any]:
    """Rows [N, 1, H] to tokens by index [T * k], -1 for no row, and weights [T, k], which have the dtype of the rows."""
    return {
        "expanded_permuted_rows": rows,
        "skip1": None,
        "skip2": None,
        "bias": None,
        "scales": weights,
        "expanded_src_to_dst_row": index,
        "export_for_source_row": None,
        "drop_pad_mode": _BY_ROW_DROP,
    }


def _finalize_call(spec: BlockSpec, tokens: Callable[[Any], Any], rows: Callable[[Any], Any]) -> OperatorCall:
    """The call on rows in the dtype of the block's result; it takes no empty tensor, so that T is read."""

    def arguments(premises: Any) -> dict[str, Any]:
        count, lines = tokens(premises.tokens), rows(premises.tokens)
        index, weights = tensor(torch.int32, count * spec.top_k), tensor(spec.dtype, count, spec.top_k)
        return _finalize_arguments(tensor(spec.dtype, lines, 1, spec.hidden), index, weights)

    return OperatorCall(FINALIZE, arguments)


def unpermute_words(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    """What rules of a form that emits ``emit_combine`` read of its choice."""
    return {
        "unpermute_operator": deployment.unpermute_operator,
        "result_dtype": dtype_name(spec.dtype),
    }


def takes_no_row(deployment: Deployment) -> bool:
    """Whether ``emit_combine`` takes -1 for no row, and leaves undefined rows that no index names unread."""
    return deployment.mode == "ge" or deployment.unpermute_operator == FINALIZE_ROUTING


def _in_aten(deployment: Deployment) -> bool:
    return deployment.mode == "ge" and deployment.unpermute_operator != FINALIZE_ROUTING


def weights_dtype(spec: BlockSpec, deployment: Deployment) -> torch.dtype:
    """The dtype in which ``emit_combine`` uses the routing weights of a block."""
    return torch.float32 if _in_aten(deployment) else spec.dtype


def emit_combine(
    emit: Emitter, rows: Node, index: Node, weights: Node, deployment: Deployment, some_absent: bool = False
) -> Node:
    """Emit y [T, H], y[t] = sum over j of weights[t, j] * rows[index[t * k + j]], in the dtype of ``rows``.

    Args:
        emit: where.
        rows: [N, H], without undefined rows: a row is read even where its weight is 0.
        index: int32 [T * k], every entry in 0..N-1.
        weights: [T, k], any float dtype.
        deployment: its ``mode`` and ``unpermute_operator`` say which operators may be used.
        some_absent: only where ``takes_no_row``: an index may be -1, which stands for a row of zeros, and rows that no
            index names may be undefined.
    """
    dtype = rows.meta["val"].dtype
    if deployment.unpermute_operator == FINALIZE_ROUTING:
        lines = emit.call(aten.unsqueeze.default, rows, 1)
        return emit_call(emit, FINALIZE, _finalize_arguments(lines, index, emit.cast(weights, dtype)))
    if not _in_aten(deployment):
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
