"""Rules for ids past the last expert of a rank: a mask of their slots, zeros in their rows or weights, clamped ids.

A slot is a pair of a token and one of its k choices. Under expert parallelism transformers gives a slot whose expert is
on another rank the number of this rank's experts as its id. The rules take each operator for the identity, which is
true only while all ids are experts; each adds to ``Reader.bounds`` what it assumed. Who makes a block of the result
must prove that the ids are in range, or that they were put out of it on purpose (``expert_parallel``).
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from moe_lowering.passes.graph.arguments import explicit_arguments
from moe_lowering.passes.graph.walks import stock_name_of
from moe_lowering.passes.raise_foreign.meanings import Value, as_ids, is_float, mapped_value, match_dims
from moe_lowering.passes.raise_foreign.read_meanings import Reader, near_rule
from moe_lowering.passes.raise_foreign.terms import Past, Tensor


@near_rule("ge", "gt")
def past_the_last(reader: Reader, node: Node) -> Value | None:
    """Ids that are at least a number, as a number of experts."""
    value, number = reader.value(node.args[0]), node.args[1]
    if value is None or not isinstance(value.term, Tensor) or is_float(value.term) or not isinstance(number, int):
        return None
    ids = as_ids(value)
    if ids is None:
        return None
    return Value(ids[0].dims, Past(ids[1], number + (stock_name_of(node) == "gt")))


@near_rule("masked_fill", "where")
def zeroed_rows(reader: Reader, node: Node) -> Value | None:
    """Rows, or weights, of slots past the last expert to zero."""
    if stock_name_of(node) == "where":
        mask_node, fill, rows_node = node.args[:3]
    else:
        rows_node, mask_node, fill = node.args[:3]
    mask, rows = reader.value(mask_node), reader.value(rows_node)
    if mask is None or rows is None or not isinstance(mask.term, Past) or not _is_zero(fill):
        return None
    dims = ((),) * (len(rows.dims) - len(mask.dims)) + mask.dims
    for at, over in enumerate(dims):
        if not over:
            continue
        mapped = match_dims(rows.dims[at], over)
        if mapped is None:
            return reader.refuse(
                node, "raise.mask", f"rows {rows.dims[at]} by a mask of {over}", "a mask of the same slots"
            )
        rows = mapped_value(rows, mapped)
    reader.bounds.append((node, mask.term.ids, mask.term.experts))
    return rows


def clamped_ids(reader: Reader, node: Node) -> Value | None:
    """Ids clamped to the experts that there are."""
    value, arguments = reader.value(node.args[0]), explicit_arguments(node)
    low, high = arguments.get("min"), arguments.get("max")
    if value is None or not isinstance(value.term, Tensor) or low not in (None, 0) or type(high) is not int:
        return None
    ids = as_ids(value)
    if ids is None:
        return None
    reader.bounds.append((node, ids[1], high + 1))
    return value


def _is_zero(value: Any) -> bool:
    """A zero as a number, or as a tensor that is made of one."""
    if isinstance(value, Node):
        made_of = {"scalar_tensor": 0, "full": 1, "full_like": 1}.get(stock_name_of(value))
        return made_of is not None and value.args[made_of] in (0, 0.0)
    return isinstance(value, (int, float)) and value == 0
