"""Arguments of ``npu_grouped_matmul``, made once for legality and rewrite, with and without quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.operands import Operand, Operands
from moe_lowering.passes.operator_calls import OperatorCall, tensor

MATMUL = "npu_grouped_matmul"


def matmul_arguments(
    x: Any, weight: Sequence[Any], counts: Any, output_dtype: int | None = None, **tensors: Any
) -> dict[str, Any]:
    """``npu_grouped_matmul`` of rows x [N, K] in groups of ``counts`` [E_local] rows, by the experts' weights."""
    return {
        "x": [x],
        "weight": list(weight),
        **tensors,
        "group_list": counts,
        "split_item": 2,
        "group_type": 0,
        "group_list_type": 1,
        **({} if output_dtype is None else {"output_dtype": output_dtype}),
    }


def matmul_call(
    spec: BlockSpec, inner: int, weight: Operands, dtype: torch.dtype | None = None, **more: Any
) -> OperatorCall:
    """The call on rows [N, inner], of the block's dtype unless given."""
    x = tensor(dtype or spec.dtype, None, inner)
    return OperatorCall(MATMUL, matmul_arguments(x, weight.items, counts_of(spec), **more))


def row_scales() -> Operand:
    """Scales of int8 rows, [N] float32."""
    return tensor(torch.float32, None)


def counts_of(spec: BlockSpec) -> Operand:
    """The group list: rows of each expert."""
    return tensor(torch.int64, spec.local_experts)
