"""Grouped matmuls of torch_npu chains, and what stands around them: what all forms of experts have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.raise_foreign.chain_walk import (
    Walk,
    is_operator,
    other_operator,
    require,
    require_value,
    tensors,
    value_of,
)
from moe_lowering.passes.raise_foreign.group_lists import Groups
from moe_lowering.passes.raise_foreign.records import NotThisForm

MATMUL, QUANTISE = "npu_grouped_matmul", "npu_dynamic_quant"
DTYPES = {torch.float16: 5, torch.bfloat16: 15}  # numbers of dtypes that ``output_dtype`` takes


@dataclasses.dataclass
class Experts:
    """What a chain's experts compute: the arguments of ``grouped_mlp`` by name, but for rows, row_scale and counts.

    Attributes:
        given: those arguments.
        result: the rows that the second matmul makes, behind views.
        first, last: the two matmuls.
        h_smooth: [E, I], what the activation is multiplied by before it is quantised; None for nothing.
    """

    given: dict[str, Any]
    result: Node
    first: Node
    last: Node
    h_smooth: Node | None = None


def check_matmul(walk: Walk, node: Node, rows: Node, groups: Groups) -> Node:
    """A grouped matmul of all rows at once, in groups along the rows."""
    if not is_operator(node, MATMUL):
        raise other_operator(node, f"rows go to {node.target}", f"npu.{MATMUL}")
    if tensors(node, "x") != [rows]:
        raise NotThisForm(node, "raise.other_value", f"{node.name}: x is {argument(node, 'x')}", f"[{rows}]")
    formats = ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype")
    require(node, dict.fromkeys(formats, (None,)), "raise.format")
    rest = ("offset", "activation_input", "activation_quant_scale", "activation_quant_offset")
    none = dict.fromkeys(rest, (None,))
    require(node, {**none, "split_item": (2, 3), "group_type": (0,), "act_type": (0, None)})
    groups.require(node, "group_list", argument(node, "group_list_type") or 0)
    if not tensors(node, "weight"):
        raise NotThisForm(node, "raise.weights", f"{node.name}: weight is {argument(node, 'weight')}", "a list")
    return node


def result_of(walk: Walk, matmul: Node) -> Node:
    """The only result of a matmul."""
    output = walk.results(matmul, 1)[0]
    if output is None:
        raise NotThisForm(
            matmul, "raise.unused", f"the result of {matmul.name} is not read", "a value that the form reads"
        )
    return output


def second_matmul(walk: Walk, rows: Node, groups: Groups) -> Node:
    reader, path = walk.onward(rows, "the activation's result")
    return check_matmul(walk, reader, path, groups)


SCALES = ("scale", "per_token_scale", "antiquant_scale", "antiquant_offset")


def require_none(node: Node, *names: str) -> None:
    require(node, dict.fromkeys(names, (None,)))


def require_own_dtype(node: Node, dtype: torch.dtype) -> None:
    """The result of a matmul has the dtype of its rows."""
    require(node, {"output_dtype": (None, DTYPES.get(dtype))}, "raise.dtype")


def require_weight_dtype(node: Node, dtype: torch.dtype) -> None:
    for weight in tensors(node, "weight"):
        if value_of(weight).dtype != dtype:
            raise NotThisForm(
                node, "raise.weights", f"{node.name}: weight is {value_of(weight).dtype}", f"{dtype} for its rows"
            )


def experts_of(walk: Walk, first: Node, last: Node, fields: dict[str, Any], smooth: Node | None = None) -> Experts:
    """``fields`` may have ``w13`` already, of an operator that takes it otherwise."""
    fields = {"w13": tensors(first, "weight"), **fields, "w2": tensors(last, "weight")}
    return Experts(fields, result_of(walk, last), first, last, smooth)


def quantised_rows(walk: Walk, rows: Node, what: str) -> tuple[Node, Node]:
    """Rows and their scales after ``npu_dynamic_quant``."""
    node, path = walk.onward(rows, what)
    if not is_operator(node, QUANTISE):
        raise other_operator(node, f"{what} goes to {node.target}", f"npu.{QUANTISE}")
    require_value(node, "input", path)
    require(node, {"smooth_scales": (None,)}, "raise.smooth_scales")
    require(node, {"group_index": (None,), "dst_type": (None, 1), "quant_mode": ("pertoken",), "dst_type_max": (0.0,)})
    return both_results(walk, node)


def both_results(walk: Walk, node: Node) -> tuple[Node, Node]:
    """Both results of an operator that quantises."""
    rows, scales = walk.results(node, 2)
    if rows is None or scales is None:
        raise NotThisForm(node, "raise.unused", f"a result of {node.name} is not read", "a value that the form reads")
    return rows, scales
