"""What a value of a graph is, in terms of tokens, choices and experts: the words in which foreign forms are proven.

A ``Value`` says of each dimension of a tensor which index it runs over, and of its elements what they are:

- ``dims``: one entry per dimension, the axes whose product the dimension is, slowest first. Axes of size 1 are left out, so
  ``()`` is a dimension of size 1. A flattened [T, k] is ``((token, choice),)``; in order of experts it is ``((sorted,),)``.
- ``term``: what stands there (``terms.py``), e.g. ``Expert(rows, weight, ids)`` for "the row times the matrix of the slot's
  expert".

A slot is a pair of a token and one of its k choices. Values are equal where their terms are: forms that spell the same
layer in other orders and layouts have one term. Every rule that makes a value says what is true of its node, whatever
that node is used for; what is no part of an expert layer is a ``Tensor``, an opaque one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch.fx import Node

from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.raise_foreign.records import NotThisForm
from moe_lowering.passes.raise_foreign.terms import (
    CHOICE,
    FEATURE,
    SORTED,
    SPREAD,
    TENSOR,
    TOKEN,
    Axis,
    Counts,
    Dim,
    Dims,
    Ends,
    OneHot,
    Past,
    Place,
    Position,
    Slot,
    Tensor,
    Term,
    TokenOf,
)

_WHOLE = (Slot, Place, TokenOf, Position, Counts, OneHot, Past, Ends)


@dataclasses.dataclass(frozen=True)
class Value:
    dims: Dims
    term: Term

    @property
    def is_opaque(self) -> bool:
        """Whether it is a node's own tensor, in its own layout."""
        return isinstance(self.term, Tensor) and self.dims == self.term.dims

    @property
    def is_slotted(self) -> bool:
        """Whether it is more than an opaque tensor in some layout."""
        return not isinstance(self.term, Tensor) or any(axis.kind in (SPREAD, SORTED) for axis in flat(self.dims))


def dim(*axes: Axis) -> Dim:
    """A dimension over these axes."""
    return tuple(axis for axis in axes if axis.size != 1)


def flat(dims: Dims) -> Dim:
    return tuple(axis for each in dims for axis in each)


def product(axes: Dim) -> Any:
    size: Any = 1
    for axis in axes:
        size = size * axis.size
    return size


def sizes(node: Node) -> tuple[Any, ...]:
    """The sizes of a node's value, as ints and sympy expressions.

    Raises:
        NotThisForm: it has no value.
    """
    value = node.meta.get("val")
    if value is None:
        raise NotThisForm(
            node, "raise.no_value", f"{node.name} has no fake value (meta['val'])", "a node of torch.compile's"
        )
    return tuple(size_key(size) for size in value.shape)


def opaque(node: Node) -> Value:
    dims = tuple(dim(Axis(TENSOR, size, node, index)) for index, size in enumerate(sizes(node)))
    return Value(dims, Tensor(node, dims))


def flattened(node: Node) -> Value:
    """[..., n] as one dimension."""
    shape = sizes(node)
    lead: Any = 1
    for size in shape[:-1]:
        lead = lead * size
    dims = (dim(Axis(TENSOR, lead, node, 0)), dim(Axis(TENSOR, shape[-1], node, len(shape) - 1)))
    return Value((dims[0] + dims[1],), Tensor(node, dims))


def feature(size: Any) -> Dim:
    return dim(Axis(FEATURE, size))


def is_whole(term: Term) -> bool:
    """Whether what a term stands for are whole numbers, whatever dtype they have."""
    return isinstance(term, _WHOLE) or (isinstance(term, Tensor) and not is_float(term))


def is_float(tensor: Tensor) -> bool:
    return bool(tensor.node.meta["val"].is_floating_point())


def slots(ids: Tensor) -> Dim:
    """The axes of all slots, by token."""
    return flat(ids.dims)


def tokens(ids: Tensor) -> Dim:
    return flat(ids.dims[:-1])


def choices(ids: Tensor) -> Dim:
    return ids.dims[-1]


Mapped: TypeAlias = Mapping[Axis, Dim]


def substitute_dims(dims: Dims, mapped: Mapped) -> Dims:
    if not mapped:
        return dims
    return tuple(tuple(new for axis in each for new in mapped.get(axis, (axis,))) for each in dims)


def substitute(term: Term, mapped: Mapped) -> Term:
    """A term in which opaque tensors run over other axes."""
    if not mapped:
        return term
    if isinstance(term, Tensor):
        return Tensor(term.node, substitute_dims(term.dims, mapped))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(term):
        value = getattr(term, field.name)
        if isinstance(value, Term):
            changes[field.name] = substitute(value, mapped)
        elif field.name == "over":
            (changes["over"],) = substitute_dims((value,), mapped)
        elif field.name == "factors":
            changes[field.name] = tuple(substitute(factor, mapped) for factor in value)
    return dataclasses.replace(term, **changes) if changes else term


def mapped_value(value: Value, mapped: Mapped) -> Value:
    return Value(substitute_dims(value.dims, mapped), substitute(value.term, mapped))


def as_ids(value: Value) -> tuple[Value, Tensor] | None:
    """An opaque integer tensor [..., k] as the ids of experts: the value over token and choice, and the ids."""
    term = value.term
    if not isinstance(term, Tensor) or len(term.dims) < 2:
        return None
    last = len(term.dims) - 1
    mapped = {
        axis: (Axis(CHOICE if at == last else TOKEN, axis.size, term.node, at),)
        for at, axes in enumerate(term.dims)
        for axis in axes
        if axis.kind == TENSOR
    }
    changed = mapped_value(value, mapped)
    assert isinstance(changed.term, Tensor)
    return changed, changed.term


def match_dims(a: Dim, b: Dim) -> dict[Axis, Dim] | None:
    """What the free axes of two dimensions of one size must be for both to run over the same index; None if they do not."""
    mapped: dict[Axis, Dim] = {}
    left, right = list(a), list(b)
    while left or right:
        if not left or not right:
            return None
        p, q = left.pop(0), right.pop(0)
        if p == q:
            continue
        if not _is_free(p) or (_is_free(q) and p.kind == TENSOR and q.kind == SPREAD):
            p, q, left, right = q, p, right, left
        if not _is_free(p):
            return None
        matched = [q]
        while product(tuple(matched)) != p.size and right:
            matched.append(right.pop(0))
        if product(tuple(matched)) != p.size:
            return None
        mapped[p] = tuple(matched)
    return mapped


def _is_free(axis: Axis) -> bool:
    return axis.kind in (TENSOR, SPREAD)


def regroup(dims: Dims, shape: tuple[Any, ...]) -> Dims | None:
    """The axes of ``dims`` as dimensions of other sizes, in the same order; None where an axis would be cut."""
    axes, front = list(flat(dims)), []
    todo = list(shape)
    while todo and len(todo) > 1:
        axes_taken = _take(axes, todo[0])
        if axes_taken is None:
            break
        front.append(axes_taken)
        axes, todo = axes[len(axes_taken) :], todo[1:]
    back: list[Dim] = []
    while len(todo) > 1:
        axes_taken = _take(axes[::-1], todo[-1])
        if axes_taken is None:
            return None
        back.insert(0, axes_taken[::-1])
        axes, todo = axes[: len(axes) - len(axes_taken)], todo[:-1]
    if not todo:
        return tuple(front) if not axes else None
    return (*front, tuple(axes), *back)  # what is left is of the size that is left


def _take(axes: list[Axis], size: Any) -> Dim | None:
    axes_taken: list[Axis] = []
    while product(tuple(axes_taken)) != size:
        if len(axes_taken) == len(axes):
            return None
        axes_taken.append(axes[len(axes_taken)])
    return tuple(axes_taken)
