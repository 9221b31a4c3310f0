"""Grouped matmuls of torch_npu chains, and what stands around them: what all forms of experts have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.graph.operator_names import call_name
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

aten = torch.ops.aten
MATMUL, QUANTISE = "npu_grouped_matmul", "npu_dynamic_quant"
DTYPES = {torch.float16: 5, torch.bfloat16: 15}  # numbers of dtypes that ``output_dtype`` takes


@dataclasses.dataclass
class Experts:
    """What a chain's experts compute: the arguments of ``grouped_mlp`` by name, but for rows, row_scale and counts.

    Attributes:
        given: those arguments. Where gate and up are two matmuls, lists of ``w13`` are those of gate, then those of up.
        result: the rows that the second matmul makes, behind views.
        firsts: the first matmul; or that of gate and that of up, in the order in which their columns are in ``w13``.
        last: the second matmul.
        h_smooth: [E, I], what the activation is multiplied by before it is quantised; None for nothing.
        h_clip: [E], at which share of its largest value a row of the activation is clipped; None for nothing.
    """

    given: dict[str, Any]
    result: Node
    firsts: tuple[Node, ...]
    last: Node
    h_smooth: Node | None = None
    h_clip: Node | None = None

    @property
    def first(self) -> Node:
        """The first matmul, of two the one that stands first in the graph."""
        return min(self.firsts)


def check_matmul(walk: Walk, node: Node, rows: Node, groups: Groups) -> Node:
    """A grouped matmul of all rows at once, in groups along the rows."""
    if not is_operator(node, MATMUL):
        raise other_operator(node, f"rows go to {call_name(node)}", f"npu.{MATMUL}")
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


def first_matmuls(walk: Walk, rows: Node, groups: Groups) -> tuple[Node, ...]:
    """The matmul that takes the rows, or both where gate and up are one each."""
    ways = walk.ways(rows, "rows")
    if len(ways) == 2 and all(is_operator(reader, MATMUL) for reader, _ in ways):
        pair = tuple(check_matmul(walk, reader, path, groups) for reader, path in ways)
        if pair[0] is not pair[1]:
            return pair
    return (check_matmul(walk, *walk.onward(rows, "rows"), groups),)


def side_by_side(walk: Walk, matmuls: tuple[Node, ...]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """(the matmuls, their results). Of two results that are only put side by side: in that order, and what that gives."""
    results = tuple(result_of(walk, matmul) for matmul in matmuls)
    readers = [walk.readers(result) for result in results]
    if len(results) == 2 and readers[0] == readers[1] and len(readers[0]) == 1:
        (cat,) = readers[0]
        parts: Any = cat.args[0]
        by_column = cat.target is aten.cat.default and argument(cat, "dim") in (-1, value_of(cat).dim() - 1)
        if by_column and [*parts] in ([*results], [*results[::-1]]):
            walk.add(cat)
            return (matmuls if parts[0] is results[0] else matmuls[::-1]), (cat,)
    return matmuls, results


def of_firsts(firsts: tuple[Node, ...], name: str) -> list[Node]:
    """A list of tensors that the first matmul was given; of two the lists one behind the other, which are equally long."""
    lists = [tensors(first, name) for first in firsts]
    if len({*map(len, lists)}) != 1:
        seen = f"{name} of {len(lists[0])} tensors at {firsts[0].name}, of {len(lists[1])} at {firsts[1].name}"
        raise NotThisForm(firsts[1], "raise.weights", seen, "gate and up in one form")
    return [each for tensors_of_one in lists for each in tensors_of_one]


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
    last = check_matmul(walk, reader, path, groups)
    columns = value_of(rows).shape[-1]
    for weight in tensors(last, "weight"):
        lines = value_of(weight).shape[-2]
        if type(lines) is type(columns) is int and lines != columns:
            seen = f"{last.name}: {weight.name} has {lines} lines for rows of {columns}"
            raise NotThisForm(last, "raise.weights", seen, f"{columns}, one for each column that the activation makes")
    return last


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


def make_experts(
    walk: Walk,
    firsts: tuple[Node, ...],
    last: Node,
    fields: dict[str, Any],
    smooth: Node | None = None,
    clip: Node | None = None,
) -> Experts:
    """``fields`` may have ``w13`` already, of an operator that takes it otherwise."""
    fields = {**fields, "w2": tensors(last, "weight")}
    if "w13" not in fields:
        fields["w13"] = of_firsts(firsts, "weight")
    return Experts(fields, result_of(walk, last), firsts, last, smooth, clip)


def quantised_rows(walk: Walk, rows: Node, what: str) -> tuple[Node, Node]:
    """Rows and their scales after ``npu_dynamic_quant``."""
    node, path = walk.onward(rows, what)
    if not is_operator(node, QUANTISE):
        raise other_operator(node, f"{what} goes to {call_name(node)}", f"npu.{QUANTISE}")
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
