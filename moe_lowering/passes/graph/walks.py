"""Walks through a graph by what operators do: views, pointwise operators, products, choices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import is_by_position

_STEPS = 400  # nodes that one walk may visit


def split_words(text: str) -> frozenset[str]:
    """The words of a text: a set of names that is easy to read."""
    return frozenset(text.split())


VIEWS = split_words(
    "view _unsafe_view reshape permute transpose t expand unsqueeze squeeze clone contiguous alias detach _to_copy to "
    "convert_element_type flatten unflatten _reshape_alias repeat lift_fresh_copy"
)
# Operators that functionalisation without views puts in their place: ``view_copy`` for ``view``, with the same arguments
_COPIED_VIEWS = split_words(
    "view permute transpose t expand unsqueeze squeeze alias detach slice select split split_with_sizes unbind _reshape_alias"
)
POINTWISE = split_words(
    "add sub mul div neg clamp clamp_min clamp_max minimum maximum rsub addcmul square where split split_with_sizes "
    "unbind chunk slice select getitem cat chunk_cat npu_format_cast exp reciprocal"
)
_ACTIVATIONS = ("silu", "swish", "glu", "gelu", "sigmoid", "relu", "tanh", "erf", "mish", "softplus", "pow", "elu")
MATMULS = split_words("mm bmm addmm baddbmm matmul linear addbmm einsum _scaled_mm npu_bmmv2 addmv mv _int_mm")
BATCHED = ("bmm", "baddbmm")
PRODUCTS = (*BATCHED, "mm", "addmm")
# What makes a matrix over experts from ids, and what is done to it before it weights or selects rows.
SPREADS = VIEWS | split_words(
    "scatter scatter_add eq ne one_hot where mul add sum any bitwise_and logical_and bitwise_or logical_or "
    "select slice gt ge lt getitem sigmoid masked_fill index_put select_scatter slice_scatter logical_not bitwise_not "
    "bincount histc cumsum"
)
ONE_HOT = split_words("scatter one_hot eq")
WRITES = ("scatter", "index_put", "index_copy", "copy_")  # parts of the names of what puts rows into its first argument
CHOICES = split_words("topk argmax sort argsort max kthvalue")

Walk = Callable[[Node], Any]  # a question about a node


_NAMES: dict[int, tuple[Any, str]] = {}  # by id: an operator's own hash is Python code, asked for 450 times a graph


def without_copy(name: str) -> str:
    """The name of an operator, of ``view_copy`` and its kin that of the view."""
    return name[:-5] if name.endswith("_copy") and name[:-5] in _COPIED_VIEWS else name


def target_name(target: Any) -> str:
    """The name of an operator without namespace and overload; empty of another target."""
    known = _NAMES.get(id(target))
    if known is not None and known[0] is target:
        return known[1]
    if isinstance(target, torch._ops.OpOverload):
        name = without_copy(target._schema.name.partition("::")[2])
        _NAMES[id(target)] = target, name
        return name
    return "getitem" if target is operator.getitem else ""


def name_of(node: Node) -> str:
    """The name of what a node calls; "" of operators of ATen whose arguments do not stand as in traced graphs, by position."""
    if node.op != "call_function":
        return node.op
    name = target_name(node.target)
    return name if node.args or not name or is_by_position(node) else ""


def stock_name_of(node: Node) -> str:
    """``name_of``; "" of another library's operators, which may be something else than those of that name."""
    target = node.target
    return name_of(node) if not isinstance(target, torch._ops.OpOverload) or target.namespace in _STOCK else ""


_STOCK = split_words("aten prims npu moe_lowering _c10d_functional")


def is_activation(name: str) -> bool:
    """Whether an operator of that name computes an activation, going by the name alone."""
    return any(word in name for word in _ACTIVATIONS) and "backward" not in name


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The shape of a node's fake value; None where it is no tensor, and of what is no node."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def source_of(node: Any) -> Any:
    """What a node is a view, a cast or a copy of."""
    while isinstance(node, Node) and name_of(node) in VIEWS and node.args:
        node = node.args[0]
    return node


def walk_readers(starts: list[Node], through: Walk, ends: Walk) -> Iterator[Node]:
    """Readers of ``starts`` for which ``ends`` holds, through nodes for which ``through`` does."""
    visited, pending = set(starts), list(starts)
    while pending and len(visited) < _STEPS:
        for user in pending.pop().users:
            if user in visited:
                continue
            visited.add(user)
            if ends(user):
                yield user
            if through(user):
                pending.append(user)


def depends_on(starts: list[Node], through: Walk, ends: Walk) -> bool:
    """Whether ``ends`` holds for one of the nodes that ``starts`` are computed from, through nodes with ``through``."""
    visited, pending = set(starts), list(starts)
    while pending and len(visited) < _STEPS:
        node = pending.pop()
        if ends(node):
            return True
        if through(node):
            fresh = [source for source in node.all_input_nodes if source not in visited]
            visited.update(fresh)
            pending += fresh
    return False
