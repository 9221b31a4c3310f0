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

from moe_lowering.passes.graph.walks import name_of, split_words

# Writes that have a functional form among the rules. Those that change sizes or storage (unsqueeze_, set_) are none.
_WRITES = split_words(
    "add_ sub_ mul_ div_ floor_divide_ clamp_ clamp_min_ clamp_max_ relu_ silu_ sigmoid_ tanh_ square_ pow_ masked_fill_ "
    "scatter_ scatter_add_ scatter_reduce_ index_put_ index_add_ index_copy_"
)
# Results that are memory of their own, always, each element once. A schema does not say so: dropout returns what it is given.
_MAKERS = split_words(
    "empty empty_like zeros zeros_like ones ones_like full full_like new_empty new_zeros new_ones new_full arange clone _to_copy "
    "mm bmm addmm matmul linear _grouped_mm grouped_mm_fallback gather index index_select embedding topk sort argsort cumsum "
    "sum mean softmax _softmax histc cat scatter scatter_add index_add index_put masked_fill where add sub mul div neg exp "
    "sigmoid silu tanh relu gelu clamp clamp_min clamp_max pow square eq ne lt gt le ge floor_divide amax amin"
)
# Views of each element once, and what returns its argument or a copy
_VIEWS = split_words("view reshape squeeze unsqueeze transpose permute t flatten unflatten contiguous to alias detach")
_SIZES = ("sym_size", "sym_numel", "_assert_tensor_metadata")  # read no element
_NAMESPACES = ("aten", "transformers")


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

    Its result is then what the functional form gives. A caller must not let anybody read the tensor at a later place than
    before, unless the write is erased.
    """
    return _is_own(node, read_before=True)


def is_unseen_write(node: Node) -> bool:
    """Whether a node is an own write into what nothing else reads at all: what reads other tensors can be moved past it."""
    return _is_own(node, read_before=False)


def _is_own(write: Node, read_before: bool) -> bool:
    if not _writes_first(write.target) or not write.args or not isinstance(write.args[0], Node):
        return False
    node, reader = write.args[0], write
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    while all(user is reader or (read_before and user < write and _takes_no_part(user)) for user in node.users):
        if makes_memory(node.target) or _is_own(node, read_before) or _is_result(node):
            others = [leaf for leaf in tree_leaves((write.args[1:], write.kwargs)) if isinstance(leaf, Node)]
            return all(_may_stand_beside(other, write.args[0]) for other in others)
        if _name(node.target) not in _VIEWS or not isinstance(node.args[0], Node):
            return False
        node, reader = node.args[0], node
    return False


def _takes_no_part(user: Node) -> bool:
    """Whether what a reader returns is no part of the memory that it reads."""
    return makes_memory(user.target) or _name(user.target) in _SIZES


def _is_result(node: Node) -> bool:
    """Whether a node is one result of an operator whose results are memory of their own, as those of ``topk``, taken once."""
    if (
        node.target is not operator.getitem
        or not isinstance(node.args[0], Node)
        or not makes_memory(node.args[0].target)
    ):
        return False
    taken = [user.args[1] for user in node.args[0].users if user.target is operator.getitem]
    return len(taken) == len(node.args[0].users) and taken.count(node.args[1]) == 1


def _may_stand_beside(other: Node, base: Node) -> bool:
    value, written = other.meta.get("val"), base.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return not isinstance(value, (float, torch.SymFloat))
    return isinstance(written, torch.Tensor) and (value.dtype == written.dtype or not value.dtype.is_floating_point)


@functools.cache
def _writes_first(target: object) -> bool:
    """Of an overload, whether it writes its first argument, no other one, and returns it."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or target._opname not in _WRITES:
        return False
    writes = [bool(argument.alias_info and argument.alias_info.is_write) for argument in target._schema.arguments]
    return writes[:1] == [True] and sum(writes) == 1


def makes_memory(target: object) -> bool:
    """Of an overload, whether its results are memory of their own, always."""
    return isinstance(target, torch._ops.OpOverload) and _name(target) in _MAKERS and not target._schema.is_mutable


def _name(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target._opname)
    return ""
