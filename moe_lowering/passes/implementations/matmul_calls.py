"""Calls of grouped matmuls as a block is judged for them: from the same arguments, by the same readers, as when they are
verified (``limits/calls``), so that no rule sees another weight, bias or scale than the emitted call has."""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.limits.calls import quantities
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.implementations.base import Call
from moe_lowering.passes.operands import Operand, Operands, weight_format

# How many rows there are is no matter of these calls: none of their rules on rows compares them with a limit.
_ROWS = 1
_OF_ROWS = ("rows", "per_token_rows", "x_scale_rows")
_GROUPED_MATMUL = {
    "bias": None, "scale": None, "offset": None, "antiquant_scale": None, "antiquant_offset": None,
    "per_token_scale": None, "activation_input": None, "activation_quant_scale": None, "activation_quant_offset": None,
    "split_item": 2, "group_type": 0, "group_list_type": 1, "act_type": 0, "output_dtype": None,
}  # fmt: skip


def rows_of(width: int, dtype: torch.dtype) -> Operand:
    """Rows of activations [N, width]."""
    return Operand((_ROWS, width), dtype, stored=False)


def row_scales() -> Operand:
    """Scales of int8 rows, [N] float32."""
    return Operand((_ROWS,), torch.float32, stored=False)


def counts_of(spec: BlockSpec) -> Operand:
    """The group list: rows of each expert."""
    return Operand((spec.local_experts,), torch.int64, stored=False)


def call_of(operator: str, arguments: dict[str, Any], deployment: Deployment, *weights: Operands) -> Call:
    """The call of an operator with these arguments, all of its schema; ``weights`` are those that it reads."""
    found = quantities(operator, arguments)
    found.update({name: None for name in _OF_ROWS if name in found})
    return Call(operator, {**found, "weight_format": weight_format(deployment, *weights)})


def matmul_call(
    spec: BlockSpec,
    deployment: Deployment,
    inner: int,
    weight: Operands,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Call:
    """``npu_grouped_matmul`` of rows [N, inner], of the block's dtype unless given, by the experts' weights."""
    x = [rows_of(inner, dtype or spec.dtype)]
    given = {"x": x, "weight": weight.items, "group_list": counts_of(spec), **_GROUPED_MATMUL, **arguments}
    return call_of("npu_grouped_matmul", given, deployment, weight)
