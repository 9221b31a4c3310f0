"""Rules of ``meaning`` for the operators with which routers score, choose and weigh experts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeGuard

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import Source
from moe_lowering.passes.routers.group_rules import dropped
from moe_lowering.passes.routers.meaning import (
    EXACT,
    Meaning,
    arg,
    aten_name_of,
    dtype_of,
    is_last,
    is_number,
    keeps_axis,
    raw,
    rule,
    same_lead,
    same_sizes,
    source,
)
from moe_lowering.passes.routers.values import (
    FLOAT16,
    BestTwo,
    Chosen,
    Const,
    Grouped,
    GroupIds,
    GroupScore,
    Mask,
    Opaque,
    Reason,
    Scores,
    Selection,
    Taken,
    Total,
    Value,
    last,
    val,
)

# --------------------------------------------------------------------------------------------------------------- scores


@rule("_softmax", "softmax")
def _softmax(meaning: Meaning, node: Node) -> Value | None:
    if not is_last(node, arg(node, 1, "dim")):
        return None
    value = meaning.of(node.args[0])
    if not _keeps_precision(node):
        return None
    if isinstance(value, Taken):
        return _softmax_of_chosen(value, node)
    return _scored(node, node, "softmax")


def _keeps_precision(node: Node) -> bool:
    """Whether an operator computes in the dtype of its argument or a wider one; ``softmax.int`` may round it first."""
    before = val(node.args[0])
    return before is not None and (before.dtype == dtype_of(node) or (before.dtype, dtype_of(node)) in EXACT)


def _softmax_of_chosen(value: Taken, node: Node) -> Value | None:
    """The softmax over the k best logits is the softmax over all of them, divided by the sum of the k."""
    if value.scores.scoring or value != Taken(value.by, value.scores):
        return None
    scores = dataclasses.replace(value.scores, scoring="softmax")
    if dtype_of(node) not in (torch.float32, *FLOAT16):
        return None
    return Taken(value.by, scores, renormalised=True, rounded=dtype_of(node) in FLOAT16)


@rule("sigmoid")
def _sigmoid(meaning: Meaning, node: Node) -> Value | None:
    value = meaning.of(node.args[0])
    if isinstance(value, Taken) and not value.scores.scoring:
        return Opaque(
            node,
            Reason(
                "router.saturates",
                node,
                "experts are chosen by logits and weighted by their sigmoid, which is 1 for all logits above 17 in float32",
                "experts chosen by the scores that weigh them, or by logits with a softmax",
            ),
        )
    return _scored(node, node, "sigmoid")


@rule("sqrt")
def _sqrt(meaning: Meaning, node: Node) -> Value | None:
    inner = node.args[0]
    if not isinstance(inner, Node) or aten_name_of(inner) != "softplus":
        return None
    if arg(inner, 1, "beta", 1) != 1 or arg(inner, 2, "threshold", 20) != 20 or dtype_of(inner) != dtype_of(node):
        return None
    meaning.of(inner)
    return _scored(node, inner, "sqrtsoftplus")


def _scored(node: Node, reader: Node, scoring: str) -> Value | None:
    logits = source(reader, 0)
    if logits is None or dtype_of(node) not in (torch.float32, *FLOAT16):
        return None
    rounded = dtype_of(node) if dtype_of(node) in FLOAT16 else None
    return Scores(logits.node, logits, scoring, rounded=rounded)


@rule("add")
def _add(meaning: Meaning, node: Node) -> Value | None:
    if arg(node, 2, "alpha", 1) != 1 or len(node.args) < 2:
        return None
    values = [meaning.of(operand) for operand in node.args[:2]]
    for at, operand in enumerate(values):
        other = node.args[1 - at]
        if (
            isinstance(operand, Total)
            and operand.epsilon is None
            and _is_epsilon(other)
            and dtype_of(node) is torch.float32
        ):
            return dataclasses.replace(operand, epsilon=float(other))
        if isinstance(operand, Scores) and operand.scoring and isinstance(other, Node):
            return _biased(operand, values[1 - at], node, 1 - at)
    return None


def _is_epsilon(number: Any) -> TypeGuard[int | float]:
    return is_number(number) and math.isfinite(number) and number >= 0


def _biased(scores: Scores, other: Value, node: Node, at: int) -> Value | None:
    if not isinstance(other, Opaque):
        return None
    bias = _bias_source(node, at)
    if bias is None or last(bias.node) != last(node):
        seen = f"{node.args[at]} is added to the scores"
        return Opaque(node, Reason("router.bias_shape", node, seen, "a bias [E], the same for all tokens"))
    if scores.bias is not None or scores.groups is not None or not same_sizes(node, node.args[1 - at]):
        return None
    if dtype_of(node) is not torch.float32 and scores.rounded is None:
        return None
    return dataclasses.replace(scores, bias=bias.node, bias_source=bias)


def _bias_source(node: Node, at: int) -> Source | None:
    """The one-dimensional tensor that an argument is, or is a view of with leading axes of 1."""
    reader, index = node, at
    while True:
        operand = reader.args[index] if len(reader.args) > index else None
        value = val(operand)
        if value is None or any(type(size) is not int or size != 1 for size in value.shape[:-1]):
            return None
        if value.dim() == 1:
            return Source(reader, index)
        assert isinstance(operand, Node)
        if aten_name_of(operand) not in ("view", "reshape", "unsqueeze", "_unsafe_view"):
            return None
        reader, index = operand, 0


# ------------------------------------------------------------------------------------------------------------ selection


@rule("getitem")
def _getitem(meaning: Meaning, node: Node) -> Value | None:
    called, index = node.args[0], node.args[1]
    if not isinstance(called, Node) or index not in (0, 1):
        return None
    name = aten_name_of(called)
    k, dim, largest = _chosen(called)
    if k is None or not is_last(called.args[0], dim):
        return None
    value = meaning.of(called.args[0])
    if largest is not True:
        seen = "the smallest are taken"
        return Opaque(node, Reason("router.smallest", called, seen, "the largest"))
    if isinstance(value, Grouped):
        if name == "topk" and k == 2 and index == 0:
            return BestTwo(value)
        return GroupScore(value, "max") if name == "max" and index == 0 and not keeps_axis(called) else None
    if isinstance(value, GroupScore):
        return GroupIds(value, k) if name == "topk" and index == 1 else None
    return _select(called, value, k, bool(index == 1)) if name == "topk" or keeps_axis(called) else None


def _chosen(node: Node) -> tuple[int | None, Any, Any]:
    """(k, axis, whether the largest) of a top-k or a maximum along an axis; k is None where it is not fixed."""
    if aten_name_of(node) == "topk":
        k = arg(node, 1, "k")
        return k if type(k) is int else None, arg(node, 2, "dim", -1), arg(node, 3, "largest", True)
    return 1 if aten_name_of(node) == "max" and len(node.args) > 1 else None, arg(node, 1, "dim"), True


def _select(called: Node, value: Value, k: int, is_ids: bool) -> Value | None:
    scores = value if isinstance(value, Scores) else raw(called, 0, value)
    if scores is None or last(called.args[0]) is None:
        return None
    by = Selection(called, scores, k)
    return Chosen(by) if is_ids else Taken(by, scores)


@rule("gather")
def _gather(meaning: Meaning, node: Node) -> Value | None:
    if len(node.args) < 3 or not is_last(node.args[0], node.args[1]):
        return None
    value, ids = meaning.of(node.args[0]), meaning.of(node.args[2])
    if not isinstance(ids, Chosen) or not same_lead(node.args[0], node.args[2]):
        return None
    scores = value if isinstance(value, Scores) else raw(node, 0, value)
    return None if scores is None else Taken(ids.by, scores)


# -------------------------------------------------------------------------------------------------------------- weights


@rule("div")
def _div(meaning: Meaning, node: Node) -> Value | None:
    if "rounding_mode" in node.kwargs or len(node.args) < 2:
        return None
    value, total = meaning.of(node.args[0]), meaning.of(node.args[1])
    if not isinstance(value, Taken) or not isinstance(total, Total) or total.of != value:
        return None
    if value.renormalised or value.scale is not None or value.rounded or dtype_of(node) is not torch.float32:
        return None
    if not value.scores.scoring or last(node.args[1]) != (1,) or not same_lead(node.args[0], node.args[1]):
        return None
    return dataclasses.replace(value, renormalised=True, epsilon=total.epsilon or 0.0)


@rule("mul")
def _mul(meaning: Meaning, node: Node) -> Value | None:
    if len(node.args) < 2:
        return None
    value, other = meaning.of(node.args[0]), node.args[1]
    if isinstance(value, Taken) and is_number(other) and math.isfinite(other):
        plain = value.scale is None and not value.rounded and value.scores.scoring and dtype_of(node) is torch.float32
        return dataclasses.replace(value, scale=float(other)) if plain else None
    values = (value, meaning.of(other))
    for at, (scores, mask) in enumerate((values, values[::-1])):
        if isinstance(scores, (Scores, Grouped)) and isinstance(mask, (Mask, Const)) and isinstance(other, Node):
            return dropped(node, scores, mask, True, Const(0.0)) if same_sizes(node, node.args[at]) else None
    return None
