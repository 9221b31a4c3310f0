"""What a run of the pass calls for routers in a model's own operators.

``find_routers`` finds those of a graph; ``lower_router`` replaces a router by the device's operator, or leaves it as it
was; the report says which, and why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch.fx import Graph

from moe_lowering.limits import Violation
from moe_lowering.limits.wording import Wording
from moe_lowering.passes.blocks import Route
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.graph.edit_log import EditLog
from moe_lowering.passes.routers import reports
from moe_lowering.passes.routers.match_router import RouterLeft, RouterReader, match_routers
from moe_lowering.passes.routers.rewrite_router import recording_key, rewrite_router
from moe_lowering.report.records import RouterReport

log = logging.getLogger(__name__)

RAISE_ROUTERS = ("auto", "report", "off")
# Runs a rewrite in a step of the log: why it was undone, or the nodes that it made. The key is of equal rewrites.
Guarded = Callable[[Callable[[Emitter], None], tuple[object, ...]], object]


def find_routers(
    graph: Graph, readers: Sequence[RouterReader], raise_routers: str = "auto"
) -> tuple[list[Route], list[RouterReport]]:
    """The routers to lower, and what is said of those that stay. Nothing is edited; no error leaves this.

    Args:
        graph: before any block of it is lowered.
        readers: what reads ids and weights, of blocks and of layers that others wrote.
        raise_routers: ``auto``; ``report`` to prove and to leave all; ``off``.
    """
    if raise_routers not in RAISE_ROUTERS:
        raise ValueError(f"find_routers: raise_routers is {raise_routers!r}; accepted: {', '.join(RAISE_ROUTERS)}")
    if raise_routers == "off":
        return [], []
    try:
        routes, left = match_routers(graph, readers)
        if raise_routers != "auto":
            left += [RouterLeft(route.node, "[router.report] proven equal, and left as asked") for route in routes]
            routes = []
        return routes, [*map(reports.left, left), *reports.kept(graph)]
    except Exception as error:  # a defect of ours must not fail the user's compile
        log.warning("moe_lowering: looking for routers failed, they are left as they were", exc_info=True)
        return [], [reports.not_looked(f"internal error, please report it: {type(error).__name__}: {error}")]


def lower_router(
    route: Route, is_lowered: bool, judge: Callable[[Route], list[Violation]], guarded: Guarded, edits: EditLog
) -> RouterReport:
    """What became of one router; its block may have been left (not ``is_lowered``): then so is it."""
    why = _rewrite(route, judge, guarded, edits) if is_lowered else "[router.block_left] its block was left as it was"
    return reports.left(RouterLeft(route.node, why)) if why else reports.lowered(route, ())


def _rewrite(route: Route, judge: Callable[[Route], list[Violation]], guarded: Guarded, edits: EditLog) -> str:
    """Why a router stays as it was; "" when it was rewritten."""
    try:
        broken = judge(route)
    except Exception as error:  # as in find_routers
        log.warning("moe_lowering: judging a router failed, it is left as it was", exc_info=True)
        return f"internal error, please report it: {type(error).__name__}: {error}"
    if broken:
        return "; ".join(map(str, broken))
    done = guarded(lambda emit: rewrite_router(route, emit, edits), recording_key(route))
    return done.say() if isinstance(done, Wording) else ""
