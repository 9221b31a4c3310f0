"""Rules of torch_npu's products and activations among ATen operators that move rows: what early code for Ascend writes.

Chains whose rows torch_npu's operators move are read otherwise (``npu_forms``).
Sources: ops_transformer.grouped_matmul: arguments, group_list_type; wheel.docs: npu_swiglu.
"""

from __future__ import annotations

from torch.fx import Node

from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.raise_foreign.meanings import Value, feature, sizes
from moe_lowering.passes.raise_foreign.read_meanings import Reader, item_rule, near_rule
from moe_lowering.passes.raise_foreign.rules_of_experts import is_in_order, operand, times
from moe_lowering.passes.raise_foreign.terms import Counts, Ends, Expert, Part, Sigmoid

_PLAIN = (
    "scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale", "bias", "activation_input",
    "activation_quant_scale", "activation_quant_offset", "scale_dtype", "per_token_scale_dtype", "x_dtype", "weight_dtype",
)  # fmt: skip
_PREFIX_SUMS, _COUNTS = 0, 1  # group_list_type


@item_rule("npu_grouped_matmul")
def npu_grouped_product(reader: Reader, node: Node, index: int) -> Value | None:
    """torch_npu's: the only result, of floats by stacked matrices."""
    rows_list, weights, groups = (argument(node, name) for name in ("x", "weight", "group_list"))
    quantised = [name for name in _PLAIN if argument(node, name) not in (None, [], ())]
    split, along, act = (argument(node, name) for name in ("split_item", "group_type", "act_type"))
    alone = len(rows_list) == len(weights) == 1 and index == 0
    if quantised or not alone or split not in (2, 3) or along != 0 or act or not isinstance(groups, Node):
        seen = f"{node.name} with {', '.join(quantised) or 'several tensors, or other groups than of rows'}"
        return reader.refuse(
            node, "raise.operation", seen, "one tensor of rows by one of stacked matrices, both of floats"
        )
    (rows_node,), (weight,) = rows_list, weights
    rows, until, kind = reader.value(rows_node), reader.value(groups), argument(node, "group_list_type") or 0
    if rows is None:
        return None
    term, counted = None if until is None else until.term, {_PREFIX_SUMS: Ends, _COUNTS: Counts}.get(kind, ())
    if not isinstance(term, (Ends, Counts)) or not isinstance(term, counted):
        seen = f"{groups.name} ({call_name(groups)}) as group_list of type {kind}"
        return reader.refuse(node, "raise.offsets", seen, "prefix sums (type 0) or counts (type 1) of the ids")
    ids, experts = term.ids, term.experts
    made = node.meta["val"][0]
    if not is_in_order(reader, rows, ids) or made.dtype != rows_node.meta["val"].dtype:
        return reader.refuse(
            node,
            "raise.rows",
            f"rows from {rows_node.name}, in another order or dtype",
            "in the order of a sort of the ids",
        )
    if len(sizes(weight)) != 3 or sizes(weight)[0] != experts or not weight.meta["val"].is_floating_point():
        return reader.refuse(
            node, "raise.experts", f"weights {sizes(weight)} of {experts} experts", f"[{experts}, K, N]"
        )
    columns = feature(size_key(made.shape[1]))
    return Value((rows.dims[0], columns), Expert(rows.term, weight, transposed=False, ids=ids, experts=experts))


@near_rule("npu_swiglu")
def npu_swiglu(reader: Reader, node: Node) -> Value | None:
    """silu of the first half of the columns, times the second."""
    value, width = operand(reader, node), sizes(node)[-1]
    if value is None or argument(node, "dim") not in (-1, len(sizes(node)) - 1) or value.dims[-1] != feature(2 * width):
        return None
    gate, up = (Part(value.term, start, 1, width) for start in (0, width))
    return Value((*value.dims[:-1], feature(width)), times(1.0, gate, Sigmoid(gate), up))
