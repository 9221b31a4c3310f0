"""Ids that may be no expert on purpose: of vLLM's ``expert_map`` and its kin, which say -1 of another rank's experts.

A table from outside of the graph is an input of it: what it holds is not known. It is taken to hold places of experts, as a
placement (``log2phy``) does, unless the graph shows that it cannot:

- it has more entries than there are experts, so that they are not all experts, or not different ones;
- a number that it gives, or an id from anywhere else, is compared with -1 or with the number of experts, or by an order that
  parts experts from other numbers; and the layer's values meet what follows from that. Such a test is of use only where some
  ids are no experts. What is counted or asserted beside the layer says nothing.

The tests that are known are comparisons with numbers and with filled tensors, also of sums with numbers.
What is stored in the graph itself, a literal of the model, is read (``stored_numbers``).
A model with such ids is right, as it drops or masks what they give. ``dispatch`` takes experts only, and would not be.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, explicit_arguments
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.graph.walks import VIEWS, shape_of, source_of, split_words, stock_name_of
from moe_lowering.passes.raise_foreign.ids_range import made_from, out_of_range
from moe_lowering.passes.raise_foreign.meanings import sizes
from moe_lowering.passes.raise_foreign.records import NotThisForm
from moe_lowering.passes.raise_foreign.stored_numbers import stored_numbers

_LOOK_UPS = split_words("index index_select gather embedding")
_ABOVE = split_words("ge lt")  # tell numbers from a bound on
_BEYOND = split_words("gt le")  # tell numbers above a bound
_EQUAL = split_words("eq ne")
_ONWARD = VIEWS | split_words(
    "cumsum histc bincount sort argsort getitem where masked_fill scatter_add one_hot sum slice clamp clamp_min"
)
_CHOICES = split_words("topk max min argmax argmin")
_STEPS = 60


def require_experts(ids: Node, experts: int, result: Node) -> None:
    """Nothing shows that ids from outside of the graph, or from a table from there, are anything else than experts, for the
    layer that gives ``result``.

    Raises:
        NotThisForm: ``raise.expert_map`` of a table, ``raise.ids_range`` of other ids.
    """
    sources = made_from(ids, experts)
    if all(node.op == "call_function" for node in sources):
        return  # a choice: a test of its ids, as transformers has it, tells nothing
    several = sizes(ids)[-1] != 1
    for node in sources:
        _require_stored(node, ids, experts)
        table, index = _look_up(node)
        test = _tested(node, experts, result)
        if table is not None and test is not None:
            raise _of_table(node, table, test)
        if table is not None and sizes(table)[0] != experts and _is_longer(table, index, experts, several):
            raise NotThisForm(
                node, "raise.expert_map",
                f"ids looked up in {table.name}, a table of {sizes(table)[0]} entries for {experts} experts",
                "a table of at most as many places, each of which is an expert (a placement, log2phy)",
            )  # fmt: skip
        if test is not None:
            raise NotThisForm(
                node, "raise.ids_range", f"ids of which {test.name} ({call_name(test)}) tells those that are no expert",
                "ids that are all experts",
            )  # fmt: skip


def _require_stored(node: Node, ids: Node, experts: int) -> None:
    """Numbers that a graph holds, a table or ids: experts from 0 on, and for several of a token each once.

    A number below zero counts from the last expert where matrices are indexed by it, and names none for ``dispatch``.
    """
    numbers = stored_numbers(node)
    if numbers is None or not numbers:
        return
    is_table = any(_look_up(user)[0] is node for user in _behind_views(node))
    top_k = sizes(ids)[-1]
    line = len(numbers) if is_table else top_k
    lines = [numbers[at : at + line] for at in range(0, len(numbers), line)] if isinstance(line, int) else []
    none = next((number for number in numbers if not 0 <= number < experts), None)
    repeated = (_first_repeated(each) for each in lines if top_k != 1)
    twice = next((number for number in repeated if number is not None), None)
    if none is None and twice is None:
        return
    what = f"{none}, which is no expert of {experts}" if none is not None else f"expert {twice} twice"
    raise NotThisForm(
        node, "raise.expert_map" if is_table else "raise.ids_range",
        f"{node.name}, which ids are {'looked up in' if is_table else 'taken from'} and the graph holds, has {what}",
        f"numbers from 0 to {experts - 1} (of the last expert {experts - 1}, not -1), each once for a token",
    )  # fmt: skip


def _first_repeated(numbers: list[int]) -> int | None:
    seen: set[int] = set()
    for number in numbers:
        if number in seen:
            return number
        seen.add(number)
    return None


def _behind_views(node: Node) -> list[Node]:
    """Readers of a node, and of views and copies of it."""
    readers: list[Node] = []
    pending = [node]
    while pending and len(readers) < _STEPS:
        fresh = [*pending.pop().users]
        readers += fresh
        pending += [user for user in fresh if stock_name_of(user) in VIEWS]
    return readers


def reason_of_map(of_ids: Node | None) -> NotThisForm | None:
    """Why a layer whose ids, or what is computed from them, come from a table that may say -1 is none; None of others."""
    pending, visited = [of_ids] if of_ids is not None else [], {of_ids}
    while pending and len(visited) < _STEPS:
        node = pending.pop()
        table, _ = _look_up(node)
        test = None if table is None else _tested(node, None, None)
        if table is not None and test is not None:
            return _of_table(node, table, test)
        if stock_name_of(node) not in _ONWARD or any(stock_name_of(each) in _CHOICES for each in node.all_input_nodes):
            continue
        fresh = [source for source in node.all_input_nodes if source not in visited]
        visited.update(fresh)
        pending += fresh
    return None


def _of_table(node: Node, table: Node, test: Node) -> NotThisForm:
    return NotThisForm(
        node, "raise.expert_map",
        f"ids looked up in {table.name}, a table in which some are no expert: {test.name} ({call_name(test)}) tells those",
        "ids that are all experts; over ranks those of all ranks, before the table",
    )  # fmt: skip


def _look_up(node: Node) -> tuple[Node | None, Node | None]:
    """(a table [N] of whole numbers from outside of the graph, what looks up in it)."""
    if node.op != "call_function" or stock_name_of(node) not in _LOOK_UPS:
        return None, None
    table = source_of(node.args[0])
    index: Any = node.args[-1]
    if isinstance(index, (list, tuple)):
        index = index[0] if len(index) == 1 else None
    shape = shape_of(table)
    if not isinstance(index, Node) or shape is None or len(shape) != 1 or table.op not in ("placeholder", "get_attr"):
        return None, None
    is_whole = table.meta["val"].dtype in (torch.int32, torch.int64)
    return (table, index) if is_whole else (None, None)


def _is_longer(table: Node, index: Node | None, experts: int, several: bool) -> bool:
    """Whether a table cannot give an expert of its own for each of its entries, where it should: those of one token differ
    where it has several; and what is chosen among as many as there are entries is looked up in all of them."""
    size = sizes(table)[0]
    if isinstance(size, int) and size <= experts:
        return False
    chosen = isinstance(index, Node) and isinstance(size, int) and out_of_range(index, size, given=False) is None
    return several or chosen


def _tested(node: Node, experts: int | None, result: Node | None) -> Node | None:
    """What tells numbers of a node that are no expert from others, for a layer; None where nothing does.

    Args:
        experts: None where their number is not known: then only what is below zero is told.
        result: that of the layer; None where it is not known.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        return None
    pending: list[tuple[Node, float]] = [(node, 0)]
    visited = {node}
    while pending and len(visited) < _STEPS:
        at, added = pending.pop()
        for user in at.users:
            if user in visited:
                continue
            visited.add(user)
            if _tells_apart(user, at, added, experts) and (result is None or _meet(user, result)):
                return user
            more = _adds(user, at)
            if more is not None or stock_name_of(user) in VIEWS:
                pending.append((user, added + (more or 0)))
    return None


def _tells_apart(node: Node, at: Node, added: float, experts: int | None) -> bool:
    """Whether a node parts experts from other numbers. ``at`` are the ids plus ``added``."""
    name = stock_name_of(node)
    if name in ("clamp", "clamp_min"):
        return explicit_arguments(node).get("min") == added
    if name in ("relu", "abs"):
        return True
    bound = _number(node.args[1]) if len(node.args) > 1 and node.args[0] is at else None
    if bound is None or not math.isfinite(bound):
        return False
    bound -= added
    first_above = math.ceil(bound) if name in _ABOVE else math.floor(bound) + 1 if name in _BEYOND else None
    return first_above in (0, experts) if first_above is not None else name in _EQUAL and bound in (-1, experts)


def _adds(node: Node, at: Node) -> float | None:
    """What a sum or a difference adds to ``at``; None of anything else."""
    name = stock_name_of(node)
    number = _number(node.args[1]) if name in ("add", "sub") and len(node.args) > 1 and node.args[0] is at else None
    if number is None or node.kwargs:
        return None
    return number if name == "add" else -number


def _number(operand: Any) -> float | None:
    """A number, or the one that a tensor is filled with."""
    while isinstance(operand, Node) and stock_name_of(operand) in VIEWS:
        operand = operand.args[0]
    if isinstance(operand, Node) and stock_name_of(operand) in ("full", "full_like", "new_full"):
        operand = argument(operand, "fill_value")
    return operand if isinstance(operand, (int, float)) else None


def _meet(test: Node, result: Node) -> bool:
    """Whether what follows from a test meets what the layer computes, or what follows from that."""
    beside = {result, *_readers(result)}
    return any(node in beside for node in (test, *_readers(test)))


def _readers(node: Node) -> set[Node]:
    """All that follows from a node, without what leaves the graph."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        fresh = [user for user in pending.pop().users if user not in found and user.op != "output"]
        found.update(fresh)
        pending += fresh
    return found
