"""Rules of operators that change where elements stand, or their dtype, and not what they are."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, explicit_arguments
from moe_lowering.passes.graph.walks import name_of, source_of
from moe_lowering.passes.raise_foreign.meanings import (
    Value,
    dim,
    feature,
    flat,
    flattened,
    is_whole,
    opaque,
    regroup,
    sizes,
)
from moe_lowering.passes.raise_foreign.read_meanings import Reader, item_rule, rule
from moe_lowering.passes.raise_foreign.terms import SPREAD, Axis, Counts, Dims, Ends, Expert, OneHot, Part, Tensor

_NO_END = 2**62  # an ``end`` that torch means by none
_SAME_ORDER = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"),
    *("flatten", "unflatten", "view_as", "reshape_as"),  # before decompositions
)
_WHOLE_NUMBERS = (torch.int32, torch.int64, torch.float32, torch.float64)  # that hold any id and any count of slots


@rule(*_SAME_ORDER)
def view(reader: Reader, node: Node) -> Value | None:
    """The same elements in the same order."""
    source = _source(node)
    if source.meta["val"].dtype != node.meta["val"].dtype:  # a view of the bits
        return None
    value, shape = reader.value(source), sizes(node)
    if value is None:
        return None
    if value.is_opaque:
        assert isinstance(value.term, Tensor)
        if len([n for n in shape if n != 1]) == 1 and len(value.dims) > 1 and len(flat(value.dims)) > 1:
            value = flattened(value.term.node)
        elif [n for n in shape if n != 1] != [n for n in sizes(source) if n != 1]:
            return opaque(node)  # nearer to what reads it: x as [T, H]
    dims = regroup(value.dims, shape)
    return None if dims is None else Value(dims, value.term)


@rule("permute", "transpose", "t")
def permute(reader: Reader, node: Node) -> Value | None:
    value = reader.value(_source(node))
    return None if value is None else Value(tuple(value.dims[at] for at in order_of(node)), value.term)


def order_of(node: Node) -> list[int]:
    """Which dimension of its argument each dimension of a permute, transpose or t is."""
    count = len(sizes(node))
    arguments = explicit_arguments(node)
    if "dims" in arguments:
        return [at % count for at in arguments["dims"]]
    order = [*range(count)]
    if count >= 2:
        a, b = (arguments[name] % count if name in arguments else at for name, at in (("dim0", 0), ("dim1", 1)))
        order[a], order[b] = order[b], order[a]
    return order


@rule("expand", "expand_as")
def expand(reader: Reader, node: Node) -> Value | None:
    """Along a dimension that was of size 1, nothing changes."""
    source = _source(node)
    value, shape = reader.value(source), sizes(node)
    if value is None:
        return None
    before = sizes(source)
    added = len(shape) - len(before)
    dims: list[Any] = [dim(Axis(SPREAD, size, node, at)) for at, size in enumerate(shape[:added])]
    for at, (old, new) in enumerate(zip(before, shape[added:], strict=True)):
        dims.append(value.dims[at] if old == new else dim(Axis(SPREAD, new, node, added + at)))
    return Value(tuple(dims), value.term)


@rule("repeat_interleave")
def repeat(reader: Reader, node: Node) -> Value | None:
    """Each line several times, one after the other, as an expanded dimension behind it would have them."""
    source = _source(node)
    value, arguments = reader.value(source), explicit_arguments(node)
    at, repeats = arguments.get("dim"), arguments.get("repeats")
    if value is None or not isinstance(repeats, int) or (at is None and len(value.dims) != 1):
        return None
    at = (at or 0) % len(value.dims)
    lines = (*value.dims[at], *dim(Axis(SPREAD, repeats, node, at)))
    return Value((*value.dims[:at], lines, *value.dims[at + 1 :]), value.term)


@rule("clone", "contiguous", "alias", "detach", "lift_fresh_copy")
def same(reader: Reader, node: Node) -> Value | None:
    value = reader.value(_source(node))
    return opaque(node) if value is not None and value.is_opaque else value


@rule("_to_copy", "to", "type_as", "convert_element_type")
def cast(reader: Reader, node: Node) -> Value | None:
    """Another dtype. What a dtype rounds away of a layer's values is looked at when all of it is known."""
    source = _source(node)
    value = reader.value(source)
    new, old = node.meta["val"], source.meta["val"]
    if value is None or (value.is_opaque and old.is_floating_point()):
        return None
    if new.device != old.device:
        return reader.refuse(node, "raise.device", f"a copy from {old.device} to {new.device}", "one device")
    counted = is_whole(value.term) and old.dtype in _WHOLE_NUMBERS and new.dtype in _WHOLE_NUMBERS
    counted = counted or (isinstance(value.term, OneHot) and new.dtype in _WHOLE_NUMBERS)
    if counted or (old.is_floating_point() and new.is_floating_point()):
        return value
    if value.is_opaque:
        return None
    return reader.refuse(node, "raise.cast", f"a cast from {old.dtype} to {new.dtype}", "one that keeps the values")


@rule("slice")
def columns(reader: Reader, node: Node) -> Value | None:
    """Some columns of an expert's result; or the counts of the first experts."""
    source = _source(node)
    value = reader.value(source)
    if value is None:
        return None
    count = len(value.dims)
    at, width = argument(node, "dim") % count, sizes(source)[argument(node, "dim") % count]
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    if start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end >= _NO_END)):
        return value
    bounds = (0 if start is None else start, width if end is None else end, step)
    if not all(isinstance(n, int) for n in (*bounds, width)):
        return None
    span = range(width)[slice(*bounds)]
    if len(span) == width:
        return value
    term = value.term
    if isinstance(term, (Counts, Ends)) and count == 1 and (span.start, span.step) == (0, 1) and len(span):
        return Value((feature(len(span)),), type(term)(term.ids, len(span)))  # without a last bin for ids of others
    return None if value.is_opaque else _part(reader, node, value, at, span.start, span.step, len(span))


@item_rule("split", "split_with_sizes", "chunk")
def pieces(reader: Reader, node: Node, index: int) -> Value | None:
    source = _source(node)
    value = reader.value(source)
    outputs = node.meta["val"]
    if value is None or value.is_opaque:
        return None
    at = argument(node, "dim") % len(value.dims)
    widths = [piece.shape[at] for piece in outputs]
    if not all(isinstance(n, int) for n in widths):
        return None
    index %= len(widths)
    return _part(reader, node, value, at, sum(widths[:index]), 1, widths[index])


def _part(reader: Reader, node: Node, value: Value, at: int, start: int, step: int, size: int) -> Value | None:
    if not isinstance(value.term, (Expert, Part)):
        source = source_of(_source(node))
        seen = f"{node.name} cuts {source.name} ({name_of(source)}), which is no product of the experts"
        return reader.refuse(
            node, "raise.operation", seen, "gate and up cut from the product, with its biases or without"
        )
    if value.dims[at] != feature(_whole(value.dims, at)):
        return None
    dims = (*value.dims[:at], feature(size), *value.dims[at + 1 :])
    term = value.term
    if isinstance(term, Part):
        return Value(dims, Part(term.whole, term.start + start * term.step, term.step * step, size))
    return Value(dims, Part(term, start, step, size))


def _whole(dims: Dims, at: int) -> Any:
    return dims[at][0].size if len(dims[at]) == 1 else 1


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source
