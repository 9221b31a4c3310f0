"""Checks of ``overlap``: may the operators of a shared expert be moved to a stream beside the block?

They must be pure and without an exchange between ranks, and nothing that they are moved past may be a scope, an event,
or an operator that writes. ``CODES`` has every reason why a shared expert stays in plain order.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from moe_lowering.passes.emission.emitter import is_emitted
from moe_lowering.passes.graph.communication import may_communicate
from moe_lowering.passes.graph.memory_effects import writes
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.passes.graph.scopes import is_marker

aten = torch.ops.aten


CODES = {
    "overlap.no_streams": "plain order: only npugraph_ex's graphs have stream scopes",
    "overlap.no_events": "plain order: the block is one operator, which nothing can stand inside",
    "overlap.no_shared_expert": "nothing that could overlap is added to the block's result",
    "overlap.no_matmul": "plain order: what is added to the block's result has no matrix product",
    "overlap.used_elsewhere": "plain order: the shared expert's result is read by more than the addition",
    "overlap.depends_on_block": "plain order: what is added to the block's result depends on that result",
    "overlap.late_input": "plain order: the shared expert reads what exists only after the block's dispatch",
    "overlap.scope": "plain order: the shared expert or the block is in a scope, or one lies between them",
    "overlap.side_effect": "plain order: the shared expert, or what it would move past, writes or draws random numbers",
    "overlap.communicates": "plain order: the shared expert communicates between ranks",
    "overlap.failed": "plain order: moving the shared expert failed and was undone",
}


THROUGH = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._to_copy.default, aten.clone.default,
    aten.squeeze.dim, aten.unsqueeze.default, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.alias.default,
    torch.ops.prims.convert_element_type.default,
})  # fmt: skip


_UNSAFE_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Refused(Exception):
    """A key of ``CODES``, and what to say beside it. ``overlap`` catches it and leaves the block in plain order."""

    def __init__(self, code: str, more: str = "") -> None:
        super().__init__(f"[{code}] {CODES[code]}{f': {more}' if more else ''}")


def check_region(region: Sequence[Node]) -> None:
    """Raise ``Refused`` unless all of a shared expert may be moved: pure operators, on this rank alone, in no scope."""
    for node in region:
        if is_marker(node):
            raise Refused("overlap.scope")
        if may_communicate(node):
            raise Refused("overlap.communicates", operator_name(node))
        if not _is_pure(node):
            raise Refused("overlap.side_effect", operator_name(node))


def check_between(first: Node, last: Node, members: set[Node]) -> None:
    """Nothing that the region would be moved past is a wall: a scope, an event, or something that writes."""
    node = first
    while node is not last:
        if node not in members:
            if is_marker(node) or getattr(node.target, "namespace", "") == "npugraph_ex":
                raise Refused("overlap.scope")
            # what a lowered block writes is memory that it has made: no shared expert reads it
            if isinstance(node.target, torch._ops.HigherOrderOperator) or (writes(node) and not is_emitted(node)):
                raise Refused("overlap.side_effect", operator_name(node))
        node = node.next


def _is_pure(node: Node) -> bool:
    """An operator whose result depends on its arguments only, that writes nothing, and that the host need not wait for."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _is_safe(target) and not node.is_impure()
    return target is operator.getitem or isinstance(node.meta.get("val"), (int, torch.SymInt))


@functools.lru_cache(maxsize=1024)
def _is_safe(target: torch._ops.OpOverload) -> bool:
    return not (target._schema.is_mutable or any(tag in target.tags for tag in _UNSAFE_TAGS))
