"""The report's records of routers: what each was written with, what it became, or why it stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from moe_lowering.limits import Violation
from moe_lowering.passes.blocks import Route
from moe_lowering.passes.emission.emitter import is_emitted
from moe_lowering.passes.find_blocks import module_path
from moe_lowering.passes.leftovers.foreign_operators import ROUTER, kind_of, library_and_name
from moe_lowering.passes.routers.match_router import RouterLeft
from moe_lowering.report.records import RouterReport
from moe_lowering.source_lines import innermost

GATING = "npu.npu_moe_gating_top_k"
COMPOSED = "aten"


def lowered(route: Route, violations: Iterable[Violation]) -> RouterReport:
    """Of a routing that was rewritten; a raised one becomes the operator or nothing."""
    broken = "; ".join(map(str, violations))
    was = "moe_lowering.route" if route.raised is None else "aten"
    notes = () if route.raised is None else route.raised.notes
    reason = f"{GATING} is illegal: {broken}" if broken else "proven equal" if route.raised else "legal"
    return RouterReport(module_path(route.node), _line(route.node), was, COMPOSED if broken else GATING, reason, notes)


def left(router: RouterLeft) -> RouterReport:
    """Of a router that stays as the model wrote it."""
    return RouterReport(module_path(router.node), _line(router.at or router.node), "aten", None, router.reason)


def kept(graph: Graph) -> list[RouterReport]:
    """Of routers that are written with an operator of torch_npu's: what a lowering would make of them."""
    nodes = [
        node
        for (op, target), called in list(graph._find_nodes_lookup_table.table.items())
        if op == "call_function" and isinstance(target, torch._ops.OpOverload) and kind_of(target) == ROUTER
        for node in called
        if not is_emitted(node)
    ]
    return [_kept(node) for node in sorted(nodes)]


def _kept(node: Node) -> RouterReport:
    was = ".".join(library_and_name(node.target))
    after = _after(node)
    reason = f"[router.is_operator] a router's operator already{after}; left as it is"
    return RouterReport(module_path(node), _line(node), was, was, reason)


def _after(node: Node) -> str:
    """What a model does with the weights of an operator that does not divide them by their sum."""
    weights = [user for user in node.users if len(user.args) == 2 and user.args[1] == 0]
    for each in weights:
        names = {library_and_name(user.target)[1] for user in each.users}
        if {"sum", "div"} <= names:
            total = next(user for user in each.users if library_and_name(user.target)[1] == "sum")
            epsilon = [user.args[1] for user in total.users if library_and_name(user.target)[1] == "add"]
            return ", its weights divided by their sum" + (f" + {epsilon[0]}" if epsilon else "")
    return ""


def undone(router: RouterReport, reason: str) -> RouterReport:
    """Of a router whose graph was put back as it was."""
    return (
        router
        if router.became in (None, router.was)
        else dataclasses.replace(router, became=None, reason=reason, notes=())
    )


def not_looked(error: str) -> RouterReport:
    """Looking for routers failed, so nothing is known of them."""
    return RouterReport("graph", "", "aten", None, f"[router.not_looked] {error}")


def _line(node: Node) -> str:
    line = innermost(node.meta.get("stack_trace") or "")
    return "" if line is None else str(line)
