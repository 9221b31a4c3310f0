"""The operators with which routers drop groups of experts, and those that change no element, as rules of ``router_meaning``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.router_meaning import (
    CASTS,
    EXACT,
    INTEGERS,
    Meaning,
    arg,
    dtype_of,
    is_last,
    is_number,
    is_plain_cast,
    keeps_axis,
    name_of,
    rule,
    same_lead,
    same_sizes,
)
from moe_lowering.passes.router_values import (
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
    given = meaning.of(node.args[0])
    plain = isinstance(given, Grouped) and is_last(node.args[0], arg(node, 1, "dim")) and not keeps_axis(node)
    return GroupScore(given, "max") if isinstance(given, Grouped) and plain else None


@rule("sum")
def _sum(meaning: Meaning, node: Node) -> Value | None:
    given = meaning.of(node.args[0])
    if not is_last(node.args[0], arg(node, 1, "dim")):
        return None
    if isinstance(given, BestTwo) and not keeps_axis(node):
        return GroupScore(given.of, "top2_sum") if dtype_of(node) == dtype_of(node.args[0]) else None
    if isinstance(given, Taken) and not given.rounded and dtype_of(node) is torch.float32:
        return Total(given)
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
    if not isinstance(ids, Node) or name_of(ids) != "getitem" or not isinstance(ids.args[0], Node):
        return False
    called, width = ids.args[0], last(base)
    if name_of(called) != "topk" or ids.args[1] != 1 or not is_last(called.args[0], arg(called, 2, "dim", -1)):
        return False
    return width is not None and last(called.args[0]) == width and last(ids) == width


@rule("bitwise_not", "logical_not")
def _not(meaning: Meaning, node: Node) -> Value | None:
    given = meaning.of(node.args[0])
    if dtype_of(node) is not torch.bool or val(node.args[0]) is None:
        return None
    if name_of(node) == "bitwise_not" and dtype_of(node.args[0]) is not torch.bool:
        return None
    return _flipped(given)


@rule("eq", "ne")
def _compared(meaning: Meaning, node: Node) -> Value | None:
    given, number = meaning.of(node.args[0]), node.args[1]
    if not is_number(number) or number not in (0, 1):
        return None
    return given if (name_of(node) == "eq") == (number == 1) and isinstance(given, Mask) else _flipped(given)


def _flipped(given: Value) -> Value | None:
    if isinstance(given, Mask):
        return dataclasses.replace(given, keeps=not given.keeps)
    if isinstance(given, Const) and given.number in (0.0, 1.0):
        return Const(1.0 - given.number)
    return None


@rule("masked_fill")
def _masked_fill(meaning: Meaning, node: Node) -> Value | None:
    scores, mask, put = (meaning.of(given) for given in node.args[:3])
    return dropped(node, scores, mask, False, put) if same_sizes(node, node.args[0]) else None


@rule("where")
def _where(meaning: Meaning, node: Node) -> Value | None:
    if len(node.args) < 3:
        return None
    mask, yes, no = (meaning.of(given) for given in node.args[:3])
    if isinstance(yes, Const) and same_sizes(node, node.args[2]):
        return dropped(node, no, mask, False, yes)
    return dropped(node, yes, mask, True, no) if same_sizes(node, node.args[1]) else None


def dropped(node: Node, given: Value, mask: Value, keeps: bool, put: Value) -> Value | None:
    """Scores with the number ``put`` where the mask says not to keep them (``keeps``: it says which to keep)."""
    if not isinstance(put, Const) or not isinstance(given, (Scores, Grouped)):
        return None
    if isinstance(mask, Const):
        return given if mask.number == (1.0 if keeps else 0.0) else None
    if not isinstance(mask, Mask) or mask.level != ("expert" if isinstance(given, Scores) else "spread"):
        return None
    scores = given if isinstance(given, Scores) else given.scores
    if isinstance(given, Grouped) and given.count != mask.groups.count:
        return None
    if mask.keeps != keeps:
        seen = "scores of the best groups are dropped"
        return Opaque(node, Reason("router.group_mask", node, seen, "scores of the other groups dropped"))
    if scores.groups is not None or not scores.alike(mask.ids.of.of.scores) or mask.ids.of.of.scores.groups is not None:
        seen = "the groups are chosen by other scores than they mask"
        return Opaque(node, Reason("router.group_scores", node, seen, "the same scores"))
    done = dataclasses.replace(scores, groups=mask.groups, fill=put.number)
    return done if isinstance(given, Scores) else Grouped(done, given.count)


# --------------------------------------------------------------------------------------- casts, views, constant tensors


@rule(*CASTS)
def _cast(meaning: Meaning, node: Node) -> Value | None:
    if not is_plain_cast(node):
        return None
    given, dtype, before = meaning.of(node.args[0]), dtype_of(node), dtype_of(node.args[0])
    if isinstance(given, (Mask, Const)):
        return given if isinstance(given, Mask) or given.number in (0.0, 1.0) else None
    if dtype == before:
        return given
    if isinstance(given, Chosen):
        return given if dtype in INTEGERS else None
    if isinstance(given, Scores):
        if dtype in FLOAT16 and before is torch.float32:
            return dataclasses.replace(given, rounded=dtype)
        return given if (before, dtype) in EXACT else None
    if isinstance(given, Taken):
        if not given.scores.scoring:
            return given if (before, dtype) in EXACT else None
        narrow = dtype in FLOAT16 and before is torch.float32 and not given.rounded
        return dataclasses.replace(given, rounded=True) if narrow else None
    return None


@rule(*VIEWS)
def _view(meaning: Meaning, node: Node) -> Value | None:
    """Nothing here changes the order of elements, so the last sizes tell what the axes are."""
    given = meaning.of(node.args[0])
    if isinstance(given, Const):
        return given
    if name_of(node) == "expand" and not isinstance(given, Mask) and not same_sizes(node, node.args[0]):
        return None
    if isinstance(given, Scores):
        return _viewed_scores(given, node)
    if isinstance(given, Grouped):
        if last(node, 2) == last(node.args[0], 2):
            return given
        grouped = last(node.args[0], 2)
        return given.scores if grouped is not None and last(node) == (grouped[0] * grouped[1],) else None
    if isinstance(given, Mask):
        return _viewed_mask(given, node)
    if isinstance(given, Total):
        return given if last(node) == (1,) or same_sizes(node, node.args[0]) else None
    if isinstance(given, (Chosen, Taken)):
        return given if last(node) == (given.by.k,) and last(node.args[0]) == last(node) else None
    return given if same_sizes(node, node.args[0]) and isinstance(given, (BestTwo, GroupScore, GroupIds)) else None


def _viewed_scores(given: Scores, node: Node) -> Value | None:
    before, after, pair = last(node.args[0]), last(node), last(node, 2)
    if before is None or after is None:
        return None
    if after == before:
        return given
    if pair is not None and pair[0] * pair[1] == before[0] and pair[0] > 1:
        return Grouped(given, pair[0])
    return None


def _viewed_mask(given: Mask, node: Node) -> Value | None:
    """From groups to experts, by a new last axis that is repeated and merged."""
    count, before, after, pair = given.groups.count, node.args[0], last(node), last(node, 2)
    if same_sizes(node, before):
        return given
    width = last(given.ids.of.of.scores.source.node)
    each = width[0] // count if width is not None else 0
    if name_of(node) == "expand":
        grows = given.level == "spread" and last(before, 2) == (count, 1) and pair == (count, each)
        first, second = val(before), val(node)
        assert first is not None and second is not None
        lead = [size_key(s) for s in first.shape[:-1]] == [size_key(s) for s in second.shape[:-1]]
        return given if grows and lead else None
    if given.level == "group" and pair == (count, 1):
        return dataclasses.replace(given, level="spread")
    if given.level == "group" and after == (count,):
        return given
    if given.level == "spread" and last(before, 2) == (count, each):
        if after == (count * each,):
            return dataclasses.replace(given, level="expert")
        return given if pair == (count, each) else None
    return None


@rule("zeros_like", "zeros", "new_zeros")
def _zeros(meaning: Meaning, node: Node) -> Value | None:
    return Const(0.0)


@rule("ones_like", "ones", "new_ones")
def _ones(meaning: Meaning, node: Node) -> Value | None:
    return Const(1.0)


@rule("full", "full_like", "new_full", "scalar_tensor")
def _full(meaning: Meaning, node: Node) -> Value | None:
    number = node.args[0 if name_of(node) == "scalar_tensor" else 2 if name_of(node) == "new_full" else 1]
    return Const(float(number)) if isinstance(number, (int, float)) else None
