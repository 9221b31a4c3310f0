"""Weights that are zero for the slots of some experts, by a mask that is proven to be of these: ``masks_by_id``.

A slot whose expert is not among those that a routing keeps has row index -1, whose absolute value is another row: only a weight
of zero makes it nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.raise_foreign.chain_walk import same_value_before, value_of
from moe_lowering.passes.raise_foreign.masks_by_id import experts_of_mask
from moe_lowering.passes.raise_foreign.records import NotThisForm

aten = torch.ops.aten
_NO_VALUE = (0, 0.0)


def weights_before_mask(weights: Node, route: Node, first: int, last: int) -> tuple[Any, Any]:
    """(the weights before those of experts that the routing does not keep became zero, the dtype that rounds them afterwards).

    Args:
        first, last: the routing keeps the experts from ``first`` to ``last`` - 1.

    Raises:
        NotThisForm: ``raise.partial_range``: no mask, or none that is known to be that of these experts.
    """
    node, rounded = behind_casts(weights)
    unmasked, mask, kept = _unmasked(node, route)
    ids, experts = behind_casts(argument(route, "expert_idx"))[0], argument(route, "expert_num")
    found = experts_of_mask(mask, ids, experts)
    if found != [kept == (first <= expert < last) for expert in range(experts)]:
        chosen = None if found is None else [expert for expert, own in enumerate(found) if own == kept]
        seen = "no function of the ids that the graph shows" if chosen is None else f"the experts {chosen}"
        raise NotThisForm(
            mask, "raise.partial_range", f"weights by {mask}: {seen}",
            f"those of ids from {first} to {last - 1}, by comparisons, arithmetic or tables made in the graph",
        )  # fmt: skip
    return unmasked, rounded


def behind_casts(value: Any) -> tuple[Any, Any]:
    """What a value is behind casts from float to float or int to int and copies, and the dtype of 16 bits on the way, if any."""
    node, narrow = same_value_before(value), set[torch.dtype]()
    while node.target in (aten._to_copy.default, aten.clone.default):
        before: Any = node.args[0]
        new, old = value_of(node).dtype, value_of(before).dtype
        if new.is_floating_point != old.is_floating_point or torch.bool in (new, old):
            break
        if not new.is_floating_point and torch.iinfo(new).bits < 32:  # ids past its largest number would be others
            break
        narrow |= {new} - {torch.float32, torch.float64, old} if new.is_floating_point else set()
        node = same_value_before(before)
    return (node, next(iter(narrow), None)) if len(narrow) < 2 else (same_value_before(value), None)


def _unmasked(weights: Node, route: Node) -> tuple[Any, Any, bool]:
    """Weights that are zero by a mask: those before, the mask, and whether they are kept where it is True."""
    args: Any = weights.args
    if weights.target is aten.where.self:
        if _is_zero(args[2]):
            return args[1], args[0], True
        if _is_zero(args[1]):
            return args[2], args[0], False
    if weights.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and _is_zero(args[2]):
        return args[0], args[1], False
    if weights.target is aten.mul.Tensor:
        for gathered, mask in (args[:2], args[1::-1]):
            while isinstance(mask, Node) and mask.target in (aten._to_copy.default, aten.clone.default):
                mask = mask.args[0]
            if isinstance(mask, Node) and value_of(mask).dtype == torch.bool:
                return gathered, mask, True
    raise NotThisForm(
        route, "raise.partial_range", f"weights from {weights.name} of all experts, for rows of some",
        "weights that are zero for experts of other ranks",
    )  # fmt: skip


def _is_zero(value: Any) -> bool:
    if isinstance(value, Node):
        made = {
            aten.scalar_tensor.default: 0, aten.full.default: 1, aten.full_like.default: 1, aten.zeros_like.default: None,
            aten.zeros.default: None, aten.new_zeros.default: None,
        }  # fmt: skip
        if value.target not in made:
            return False
        at = made[value.target]
        return at is None or value.args[at] in _NO_VALUE
    return value in _NO_VALUE
