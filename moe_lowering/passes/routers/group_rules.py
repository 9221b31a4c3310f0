"""Rules of ``meaning`` for operators that drop groups of experts, for casts and views, and for constant tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import equal_sizes
from moe_lowering.passes.routers.meaning import (
    CASTS,
    EXACT,
    INTEGERS,
    Meaning,
    arg,
    aten_name_of,
    dtype_of,
    is_last,
    is_number,
    is_plain_cast,
    keeps_axis,
    rule,
    same_lead,
    same_sizes,
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
    Taken,
    Total,
    Value,
    last,
    val,
)

VIEWS = (
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "unsqueeze",
    "squeeze",
    "expand",
    "clone",
    "alias",
    "detach",
    "contiguous",
    "lift_fresh_copy",
    "flatten",
    "unflatten",
)

# --------------------------------------------------------------------------------------------------------------- groups


@rule("amax")
def _amax(meaning: Meaning, node: Node) -> Value | None:
    value = meaning.of(node.args[0])
    plain = isinstance(value, Grouped) and is_last(node.args[0], arg(node, 1, "dim")) and not keeps_axis(node)
    return GroupScore(value, "max") if isinstance(value, Grouped) and plain else None


@rule("sum")
def _sum(meaning: Meaning, node: Node) -> Value | None:
    value = meaning.of(node.args[0])
    if not is_last(node.args[0], arg(node, 1, "dim")):
        return None
    if isinstance(value, BestTwo) and not keeps_axis(node):
        return GroupScore(value.of, "top2_sum") if dtype_of(node) == dtype_of(node.args[0]) else None
    if isinstance(value, Taken) and not value.rounded and dtype_of(node) is torch.float32:
        return Total(value)
    return None


@rule("scatter")
def _scatter(meaning: Meaning, node: Node) -> Value | None:
    base, dim, ids, put = (*node.args, None, None, None, None)[:4]
    into, put_value = meaning.of(base), meaning.of(put)
    if node.kwargs or not isinstance(into, Const) or not isinstance(put_value, Const) or not is_last(base, dim):
        return None
    groups = meaning.of(ids)
    if _takes_all(base, ids) and same_lead(base, ids):
        return put_value
    if not isinstance(groups, GroupIds) or last(base) != (groups.of.of.count,) or not same_lead(base, ids):
        return None
    if {into.number, put_value.number} != {0.0, 1.0}:
        return None
    return Mask(groups, put_value.number == 1.0, "group")


def _takes_all(base: Any, ids: Any) -> bool:
    """Whether the ids of a row are all of a row's places: those of a top-k of as many as there are."""
    if not isinstance(ids, Node) or aten_name_of(ids) != "getitem" or not isinstance(ids.args[0], Node):
        return False
    called, width = ids.args[0], last(base)
    if aten_name_of(called) != "topk" or ids.args[1] != 1 or not is_last(called.args[0], arg(called, 2, "dim", -1)):
        return False
    return width is not None and last(called.args[0]) == width and last(ids) == width


@rule("bitwise_not", "logical_not")
def _not(meaning: Meaning, node: Node) -> Value | None:
    value = meaning.of(node.args[0])
    if dtype_of(node) is not torch.bool or val(node.args[0]) is None:
        return None
    if aten_name_of(node) == "bitwise_not" and dtype_of(node.args[0]) is not torch.bool:
        return None
    return _flipped(value)


@rule("eq", "ne")
def _compared(meaning: Meaning, node: Node) -> Value | None:
    value, number = meaning.of(node.args[0]), node.args[1]
    if not is_number(number) or number not in (0, 1):
        return None
    if isinstance(value, Const):
        return Const(float((value.number == number) == (aten_name_of(node) == "eq")))
    if not isinstance(value, Mask):
        return None
    return value if (aten_name_of(node) == "eq") == (number == 1) else _flipped(value)


def _flipped(value: Value) -> Value | None:
    if isinstance(value, Mask):
        return dataclasses.replace(value, keeps=not value.keeps)
    if isinstance(value, Const) and value.number in (0.0, 1.0):
        return Const(1.0 - value.number)
    return None


@rule("masked_fill")
def _masked_fill(meaning: Meaning, node: Node) -> Value | None:
    scores, mask, put = (meaning.of(operand) for operand in node.args[:3])
    return dropped(node, scores, mask, False, put) if same_sizes(node, node.args[0]) else None


@rule("where")
def _where(meaning: Meaning, node: Node) -> Value | None:
    if len(node.args) < 3:
        return None
    mask, yes, no = (meaning.of(operand) for operand in node.args[:3])
    if isinstance(yes, Const) and same_sizes(node, node.args[2]):
        return dropped(node, no, mask, False, yes)
    return dropped(node, yes, mask, True, no) if same_sizes(node, node.args[1]) else None


def dropped(node: Node, value: Value, mask: Value, keeps: bool, put: Value) -> Value | None:
    """Scores with the number ``put`` where the mask says not to keep them (``keeps``: it says which to keep)."""
    if not isinstance(put, Const) or not isinstance(value, (Scores, Grouped)):
        return None
    if isinstance(mask, Const):
        return value if mask.number == (1.0 if keeps else 0.0) else None
    if not isinstance(mask, Mask) or mask.level != ("expert" if isinstance(value, Scores) else "spread"):
        return None
    scores = value if isinstance(value, Scores) else value.scores
    if isinstance(value, Grouped) and value.count != mask.groups.count:
        return None
    if mask.keeps != keeps:
        seen = "scores of the best groups are dropped"
        return Opaque(node, Reason("router.group_mask", node, seen, "scores of the other groups dropped"))
    if scores.groups is not None or not scores.alike(mask.ids.of.of.scores) or mask.ids.of.of.scores.groups is not None:
        seen = "the groups are chosen by other scores than they mask"
        return Opaque(node, Reason("router.group_scores", node, seen, "the same scores"))
    done = dataclasses.replace(scores, groups=mask.groups, fill=put.number)
    return done if isinstance(value, Scores) else Grouped(done, value.count)


# --------------------------------------------------------------------------------------- casts, views, constant tensors


@rule(*CASTS)
def _cast(meaning: Meaning, node: Node) -> Value | None:
    if not is_plain_cast(node):
        return None
    value, dtype, before = meaning.of(node.args[0]), dtype_of(node), dtype_of(node.args[0])
    if isinstance(value, (Mask, Const)):
        return value if isinstance(value, Mask) or value.number in (0.0, 1.0) else None
    if dtype == before:
        return value
    if isinstance(value, Chosen):
        return value if dtype in INTEGERS else None
    if isinstance(value, Scores):
        if dtype in FLOAT16 and before is torch.float32:
            return dataclasses.replace(value, rounded=dtype)
        return value if (before, dtype) in EXACT else None
    if isinstance(value, Taken):
        if not value.scores.scoring:
            return value if (before, dtype) in EXACT else None
        narrow = dtype in FLOAT16 and before is torch.float32 and not value.rounded
        return dataclasses.replace(value, rounded=True) if narrow else None
    return None


@rule(*VIEWS)
def _view(meaning: Meaning, node: Node) -> Value | None:
    """Nothing here changes the order of elements, so the last sizes tell what the axes are."""
    value = meaning.of(node.args[0])
    if isinstance(value, Const):
        return value
    if aten_name_of(node) == "expand" and not isinstance(value, Mask) and not same_sizes(node, node.args[0]):
        return None
    if isinstance(value, Scores):
        return _viewed_scores(value, node)
    if isinstance(value, Grouped):
        if last(node, 2) == last(node.args[0], 2):
            return value
        grouped = last(node.args[0], 2)
        return value.scores if grouped is not None and last(node) == (grouped[0] * grouped[1],) else None
    if isinstance(value, Mask):
        return _viewed_mask(value, node)
    if isinstance(value, Total):
        return value if last(node) == (1,) or same_sizes(node, node.args[0]) else None
    if isinstance(value, (Chosen, Taken)):
        return value if last(node) == (value.by.k,) and last(node.args[0]) == last(node) else None
    return value if same_sizes(node, node.args[0]) and isinstance(value, (BestTwo, GroupScore, GroupIds)) else None


def _viewed_scores(value: Scores, node: Node) -> Value | None:
    before, after, pair = last(node.args[0]), last(node), last(node, 2)
    if before is None or after is None:
        return None
    if after == before:
        return value
    if pair is not None and pair[0] * pair[1] == before[0] and pair[0] > 1:
        return Grouped(value, pair[0])
    return None


def _viewed_mask(value: Mask, node: Node) -> Value | None:
    """From groups to experts, by a new last axis that is repeated and merged."""
    count, before, after, pair = value.groups.count, node.args[0], last(node), last(node, 2)
    if same_sizes(node, before):
        return value
    width = last(value.ids.of.of.scores.source.node)
    each = width[0] // count if width is not None else 0
    if aten_name_of(node) == "expand":
        grows = value.level == "spread" and last(before, 2) == (count, 1) and pair == (count, each)
        first, second = val(before), val(node)
        assert first is not None and second is not None
        lead = equal_sizes(first.shape[:-1], second.shape[:-1])
        return value if grows and lead else None
    if value.level == "group" and pair == (count, 1):
        return dataclasses.replace(value, level="spread")
    if value.level == "group" and after == (count,):
        return value
    if value.level == "spread" and last(before, 2) == (count, each):
        if after == (count * each,):
            return dataclasses.replace(value, level="expert")
        return value if pair == (count, each) else None
    return None


@rule("zeros_like", "zeros", "new_zeros")
def _zeros(meaning: Meaning, node: Node) -> Value | None:
    return Const(0.0)


@rule("ones_like", "ones", "new_ones")
def _ones(meaning: Meaning, node: Node) -> Value | None:
    return Const(1.0)


@rule("full", "full_like", "new_full", "scalar_tensor")
def _full(meaning: Meaning, node: Node) -> Value | None:
    places = {"scalar_tensor": (0, "s"), "new_full": (2, "fill_value")}
    number = arg(node, *places.get(aten_name_of(node), (1, "fill_value")))
    return Const(float(number)) if isinstance(number, (int, float)) else None
