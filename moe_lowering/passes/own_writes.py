"""Writes in place that are read like the operators that return a new tensor: into memory that nothing else reads from there on.

``torch.export(...).module()`` and ``make_fx`` keep ``index_put_``, ``index_add_`` or ``add_`` as the model has them. Where what
is written into was made by an operator and is read by the write alone, as it is or through one view after the other, the write
means what its functional form does.

Contract. Reads only, and holds for operators of ATen alone. Refused are inputs, weights, what is read elsewhere, one of several
views (halves of a tensor); and another dtype beside, since the result keeps the dtype of what is written into.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from moe_lowering.passes.foreign_walks import name_of

_PRODUCTS = ("transformers::grouped_mm_fallback",)  # of others, that give a new tensor
_VIEWS_UNSAID = ("_unsafe_view",)  # of its schema a new tensor


def functional_name(node: Node) -> str:
    """The name of the operator that a node calls; of a write into memory of its own that of the functional form."""
    name = name_of(node)
    return name[:-1] if name.endswith("_") and is_own_write(node) else name


def overload_of(node: Node) -> str:
    """``functional_name`` with the overload behind it, as ``scatter.src``."""
    return (
        f"{functional_name(node)}.{node.target._overloadname}" if isinstance(node.target, torch._ops.OpOverload) else ""
    )


def is_own_write(node: Node) -> bool:
    """Whether a node writes in place into a tensor that some operator made and that nothing else reads from there on.

    Its result is then what the functional form gives. Who reads the tensor before must still do so, or be gone with the
    write (``is_unseen_write`` where nobody does).
    """
    return _is_own(node, read_before=True)


def is_unseen_write(node: Node) -> bool:
    """Whether a node is an own write into what nothing else reads at all: other reads can be moved past it."""
    return _is_own(node, read_before=False)


def _is_own(write: Node, read_before: bool) -> bool:
    if not _writes_first(write.target) or not write.args or not isinstance(write.args[0], Node):
        return False
    node, reader = write.args[0], write
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    while all(user is reader or (read_before and user < write and _takes_no_part(user)) for user in node.users):
        if _makes_memory(node.target) or _is_own(node, read_before) or _is_result(node):
            others = [leaf for leaf in tree_leaves((write.args[1:], write.kwargs)) if isinstance(leaf, Node)]
            return all(_may_stand_beside(other, write.args[0]) for other in others)
        if not _may_be_view(node.target) or not isinstance(node.args[0], Node):
            return False
        node, reader = node.args[0], node
    return False


def _takes_no_part(user: Node) -> bool:
    """Whether what a reader returns is no part of the memory that it reads."""
    return _makes_memory(user.target) or not isinstance(user.meta.get("val"), torch.Tensor | tuple | list)


def _is_result(node: Node) -> bool:
    """Whether a node is one result of an operator whose results are memory of their own, as those of ``topk``."""
    return node.target is operator.getitem and isinstance(node.args[0], Node) and _makes_memory(node.args[0].target)


def _may_stand_beside(other: Node, base: Node) -> bool:
    value, written = other.meta.get("val"), base.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return not isinstance(value, (float, torch.SymFloat))
    return isinstance(written, torch.Tensor) and (value.dtype == written.dtype or not value.dtype.is_floating_point)


@functools.cache
def _writes_first(target: object) -> bool:
    """Of an overload, whether it writes its first argument, no other one, and returns it."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    writes = [bool(argument.alias_info and argument.alias_info.is_write) for argument in target._schema.arguments]
    return (
        target._opname.endswith("_") and writes[:1] == [True] and sum(writes) == 1 and len(target._schema.returns) == 1
    )


@functools.cache
def _may_be_view(target: object) -> bool:
    """Of an overload, whether its result is its first argument's memory or memory of its own, as ``reshape`` and ``squeeze``."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or target._schema.is_mutable:
        return False
    shared = [bool(argument.alias_info) for argument in target._schema.arguments]
    return shared[:1] == [True] and sum(shared) == 1 and len(target._schema.returns) == 1


@functools.cache
def _makes_memory(target: object) -> bool:
    """Of an overload, whether its results are memory of their own, always."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace != "aten":
        return target._schema.name in _PRODUCTS
    schema = target._schema
    name = f"{schema.name}.{schema.overload_name}".rstrip(".")
    made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    shared = any(each.alias_info for each in (*schema.arguments, *schema.returns))
    return not made_of_others and not shared and bool(schema.returns) and target._opname not in _VIEWS_UNSAID
