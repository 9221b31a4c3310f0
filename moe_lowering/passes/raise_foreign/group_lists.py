"""What tells the operators of a chain how many rows each expert has: a value of the routing, and what is computed from it.

    counts       the rows of each expert                    group_list_type 1
    prefix sums  where the rows of each expert end          group_list_type 0
    pairs        (expert, rows), those without rows last    group_list_type 2

``cumsum`` makes prefix sums of counts, a difference of neighbours behind the first one counts of prefix sums; casts between
int32 and int64, copies and views to the same shape keep what they are. Anything else is another value.
Sources: ops_transformer.grouped_matmul: group_list_type; vllm_ascend.moe_mlp: cumsum_group_list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, input_node
from moe_lowering.passes.raise_foreign.chain_walk import Walk, equal_values, is_same, same_value_before, value_of
from moe_lowering.passes.raise_foreign.records import NotThisForm

aten = torch.ops.aten
PREFIX_SUMS, COUNTS, PAIRS = 0, 1, 2  # group_list_type
_NAMES = {PREFIX_SUMS: "prefix sums", COUNTS: "counts", PAIRS: "pairs"}
_WHOLE = (torch.int32, torch.int64)
_NO_END = 2**62  # an ``end`` that torch means by none


class Groups:
    """The groups of one routing: ``source`` of type ``kind``, and all that is found to be computed from it."""

    def __init__(self, source: Node, kind: int) -> None:
        self.source, self.kind = source, kind
        self._kinds: dict[Node, int | None] = {}

    def kind_of(self, value: Any) -> int | None:
        """The group_list_type of a value; None where it is none of these groups."""
        if not isinstance(value, Node):
            return None
        if value not in self._kinds:
            self._kinds[value] = self.kind if equal_values(value, self.source) else self._computed(value)
        return self._kinds[value]

    def require(self, node: Node, name: str, told: int | None) -> None:
        """An argument of an operator is these groups, of the type that the operator is told."""
        value = argument(node, name)
        kind = self.kind_of(value)
        if kind is None:
            seen = f"{node.name}: {name} is {value!r}"
            raise NotThisForm(node, "raise.counts", seen, f"{self.source!r}, or what is computed from it")
        if kind != told:
            seen = f"{node.name}: {name} {value!r} are {_NAMES[kind]}, read as those of group_list_type {told}"
            raise NotThisForm(node, "raise.counts", seen, f"{kind}")

    def add_to(self, walk: Walk) -> None:
        """What was computed from the groups for the chain alone goes with it."""
        for node in sorted(self._kinds, reverse=True):
            if node is not self.source and self._kinds[node] is not None:
                _add_back(walk, node, self.source)

    def _computed(self, node: Node) -> int | None:
        if node.op != "call_function" or not node.args or value_of(node).dtype not in _WHOLE:
            return None
        if is_same(node) or node.target in (aten._to_copy.default, aten.clone.default):
            same = isinstance(node.args[0], Node) and value_of(node.args[0]).device == value_of(node).device
            return self.kind_of(node.args[0]) if same else None
        if node.target is aten.cumsum.default:
            by_expert = value_of(node).dim() == 1
            return PREFIX_SUMS if by_expert and self.kind_of(node.args[0]) == COUNTS else None
        sums = _neighbours(node)
        return COUNTS if sums is not None and self.kind_of(sums) == PREFIX_SUMS else None


def _add_back(walk: Walk, node: Node, source: Node) -> None:
    """A node, and what it alone is computed from."""
    if node is source or node <= source or node.op != "call_function":
        return
    if all(user in walk.interior for user in node.users):
        walk.add(node)
        for each in node.all_input_nodes:
            _add_back(walk, each, source)


def _neighbours(node: Node) -> Any:
    """The value [E] of whose neighbours a node is the differences, with the first element in front as it is."""
    if node.target is aten.cat.default:
        first, rest = _two_parts(node)
        sums = _differences(rest)
        return sums if sums is not None and _first_of(first) is sums else None
    if node.target is not aten.sub.Tensor or argument(node, "alpha") != 1:
        return None
    sums, before = node.args
    if isinstance(sums, Node) and _shifted(before) is sums:
        return sums
    zero, sums = _two_parts(_differences(node))
    return sums if _is_zero(zero) else None


def _two_parts(node: Any) -> tuple[Any, Any]:
    """What a node [E] is put together from, one behind the other; (None, None) where it is not."""
    if isinstance(node, Node) and node.target is aten.cat.default and value_of(node).dim() == 1:
        parts: Any = node.args[0]
        if len(parts) == 2:
            return same_value_before(parts[0]), same_value_before(parts[1])
    return None, None


def _shifted(node: Any) -> Any:
    """The value [E] that a node has without its last element, behind a zero."""
    zero, rest = _two_parts(node)
    if isinstance(node, Node) and node.target is aten.constant_pad_nd.default:
        padded = [*argument(node, "pad")] == [1, 0] and argument(node, "value") in (0, 0.0)
        span = _span(node.args[0]) if padded else None
    else:
        span = _span(rest) if _is_zero(zero) else None
    return span[0] if span is not None and span[1:] == (0, value_of(span[0]).shape[0] - 1) else None


def _first_of(node: Any) -> Any:
    """The value [E] of which a node [1] is the first element."""
    if isinstance(node, Node) and node.target is aten.unsqueeze.default:
        at = input_node(node)
        chosen = at.target is aten.select.int and argument(at, "index") == 0
        return at.args[0] if chosen and value_of(at).dim() == 0 else None
    span = _span(node)
    return span[0] if span is not None and span[1:] == (0, 1) else None


def _differences(node: Any) -> Any:
    """The value of which a node is ``value[1:] - value[:-1]``."""
    if not isinstance(node, Node) or node.target is not aten.sub.Tensor or argument(node, "alpha") != 1:
        return None
    after, before = _span(node.args[0]), _span(node.args[1])
    if after is None or before is None or after[0] is not before[0]:
        return None
    size = value_of(after[0]).shape[0]
    return after[0] if after[1:] == (1, size) and before[1:] == (0, size - 1) else None


def _span(node: Any) -> tuple[Node, int, int] | None:
    """(value, first, end) of a slice of a value [E]."""
    if not isinstance(node, Node) or node.target is not aten.slice.Tensor or argument(node, "step") != 1:
        return None
    source = node.args[0]
    if not isinstance(source, Node) or value_of(source).dim() != 1 or not isinstance(value_of(source).shape[0], int):
        return None
    start, end, size = argument(node, "start") or 0, argument(node, "end"), value_of(source).shape[0]
    end = size if end is None or (isinstance(end, int) and end > _NO_END) else end
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    span = range(size)[start:end]
    return source, span.start, span.stop


def _is_zero(node: Any) -> bool:
    """A tensor [1] of 0."""
    if not isinstance(node, Node) or [*value_of(node).shape] != [1]:
        return False
    if node.target in (aten.full.default, aten.full_like.default, aten.new_full.default):
        return argument(node, "fill_value") in (0, 0.0)
    return node.target in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
