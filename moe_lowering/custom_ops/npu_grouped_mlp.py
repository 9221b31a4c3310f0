"""``grouped_mlp`` with the operators of an NPU, called one by one: what ``alltoall_experts`` runs on a device.

    none   npu_grouped_matmul > activation > npu_grouped_matmul
    w8a8   [npu_dynamic_quant >] npu_grouped_matmul > activation > npu_dynamic_quant > npu_grouped_matmul
    w4a8   the same, with int4 weights, the bits of their scales in int64, and their compensation as bias
    w4a16  npu_grouped_matmul (antiquant scale and offset) > activation > npu_grouped_matmul

These take weights in both formats, ND and FRACTAL_NZ; ``npu_grouped_matmul_swiglu_quant_v2`` takes one of them, which a
tensor does not show. SwiGLU is npu_swiglu; other activations are ATen's in float32, rounded once.
The same operators as a graph: passes/implementations/{mlp,quantised_mlp}.py. Dtypes of scales and biases:
limits/data/grouped_matmul*.toml.
Sources: vllm_ascend.moe_mlp: unified_apply_mlp; ops_transformer.grouped_matmul, wheel.docs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lowering.custom_ops.fused import wide_scale
from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall, activate
from moe_lowering.custom_ops.quantised import float_scale
from moe_lowering.vocabulary import EXPERT_FORMATS

Tensors = Sequence[Tensor]
# The formats with calls below; a format that only the vocabulary has is refused
_COMPUTED = frozenset({"none", "w8a8", "w4a8", "w4a16"})
OUTPUT_DTYPES = {torch.float16: 5, torch.bfloat16: 15}  # numbers that npu_grouped_matmul's output_dtype takes
# By the dtype of weights that are not quantised.
BIAS_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float16, torch.float32: torch.float32}


def npu_grouped_mlp(call: GroupedMlpCall[Tensor]) -> Tensor:
    """As ``grouped_mlp``, for at least one row; arguments are taken as checked. No synchronisation with the host.

    Rows past the sum of ``counts`` are undefined in the result.
    """
    rows, row_scale, counts, w13, w2 = call.rows, call.row_scale, call.counts, call.w13, call.w2
    dtype = call.out_dtype or rows.dtype
    experts = counts.shape[0]

    def gated(hidden: Tensor) -> Tensor:
        if call.activation == "swiglu" and not call.interleaved:
            return torch.ops.npu.npu_swiglu(hidden, -1)
        gate = (call.activation, call.limit, call.alpha, call.interleaved)
        return activate(hidden, *gate, torch.float32).to(dtype)

    if call.quantisation not in _COMPUTED:
        raise ValueError(f"grouped_mlp: quantisation is {call.quantisation!r}, which has no operators on a device")
    form = EXPERT_FORMATS[call.quantisation]
    if not form.quantised:
        hidden = gated(_matmul(rows, counts, w13, bias=_biases(w13, call.w13_bias, experts)))
        return _matmul(hidden, counts, w2, bias=_biases(w2, call.w2_bias, experts))
    w13_scale, w2_scale = call.w13_scale or (), call.w2_scale or ()
    if form.weight_only:
        hidden = gated(_antiquant_matmul(rows, counts, w13, w13_scale, call.w13_offset or ()))
        return _antiquant_matmul(hidden, counts, w2, w2_scale, call.w2_offset or ())
    if rows.dtype != torch.int8:
        rows, row_scale = torch.ops.npu.npu_dynamic_quant(rows)
    hidden = gated(_scaled_matmul(rows, row_scale, counts, w13, w13_scale, call.w13_scale_bias or (), dtype))
    rows, row_scale = torch.ops.npu.npu_dynamic_quant(hidden)
    return _scaled_matmul(rows, row_scale, counts, w2, w2_scale, call.w2_scale_bias or (), dtype)


def _matmul(rows: Tensor, counts: Tensor, weights: Tensors, **options: Any) -> Tensor:
    single = [weights[0].unsqueeze(0)] if _one_matrix(weights) else list(weights)
    (result,) = torch.ops.npu.npu_grouped_matmul(
        [rows], single, group_list=counts, split_item=2, group_type=0, group_list_type=1, **options
    )
    return result


def _biases(weights: Tensors, biases: Tensors, experts: int) -> list[Tensor] | None:
    if not biases:
        return None
    dtype = BIAS_DTYPES[weights[0].dtype]
    return _match_layout(weights, biases, experts, lambda bias: bias.to(dtype))


def _scaled_matmul(
    rows: Tensor,
    row_scale: Tensor,
    counts: Tensor,
    weights: Tensors,
    scales: Tensors,
    bias: Tensors,
    dtype: torch.dtype,
) -> Tensor:
    """int8 rows by int8 or int4 weights, scaled by weight column and by row: [N, n] of ``dtype``."""
    experts = counts.shape[0]

    def taken(scale: Tensor) -> Tensor:
        """What the operator takes as scale: bits for int4 weights, else by the dtype of the result."""
        if weights[0].dtype == torch.int32:
            return wide_scale(scale)
        return float_scale(scale).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)

    return _matmul(
        rows,
        counts,
        weights,
        scale=_match_layout(weights, scales, experts, taken),
        per_token_scale=[row_scale],
        bias=_match_layout(weights, bias, experts) if bias else None,
        output_dtype=OUTPUT_DTYPES[dtype],
    )


def _antiquant_matmul(rows: Tensor, counts: Tensor, weights: Tensors, scales: Tensors, offsets: Tensors) -> Tensor:
    """16-bit rows by int4 weights, (w + offset) * scale: [N, n] of the rows' dtype."""
    matched = _match_layout(weights, scales, counts.shape[0])
    zero_points = (
        _match_layout(weights, offsets, counts.shape[0]) if offsets else [torch.zeros_like(scale) for scale in matched]
    )
    return _matmul(rows, counts, weights, antiquant_scale=matched, antiquant_offset=zero_points)


def _one_matrix(weights: Tensors) -> bool:
    """Whether this is the list of the one expert's weight; in quantised forms the operator wants one stacked tensor."""
    return len(weights) == 1 and weights[0].dim() == 2


def _match_layout(
    weights: Tensors, vectors: Tensors, experts: int, change: Callable[[Tensor], Tensor] = lambda vector: vector
) -> list[Tensor]:
    """Scales, offsets or biases as one tensor or as a list, whichever the weights are, each changed by ``change``."""
    changed = [change(vector) for vector in vectors]
    together = len(changed) == 1 and changed[0].dim() > 1 and changed[0].shape[0] == experts
    if len(weights) > 1:
        return list(changed[0].unbind(0)) if together else changed
    return changed if together else [torch.stack(changed)]
