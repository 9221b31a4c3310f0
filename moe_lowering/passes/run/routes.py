"""The routings of one graph, during one run of the pass.

They are calls of the generic ``route``, and routers raised from a model's own operators. Each is judged (equal ones
once), lowered, and reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Violation
from moe_lowering.limits.wording import Wording
from moe_lowering.passes.blocks import Route, RouteSpec
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.emission.tapes import Tapes
from moe_lowering.passes.emission.wiring import Wiring
from moe_lowering.passes.graph.edit_log import EditLog
from moe_lowering.passes.lower_route import emit_route, judge_route
from moe_lowering.passes.routers import reports
from moe_lowering.passes.routers.lower_router import Guarded, lower_router
from moe_lowering.passes.verifier import generic_nodes, same_value
from moe_lowering.report.records import RouterReport


class RouteLowering:
    """What became of the routings of one run.

    Args:
        rewrite: runs one rewrite with a key of what it emits; the nodes that it created, or why it was undone.
        tapes: what equal routings become.

    Attributes:
        lowered: nodes of the generic operators that were replaced.
        reports: one for each routing that is not left as it was, and for each that was recognised and not raised.
    """

    def __init__(self, deployment: Deployment, edits: EditLog, rewrite: Guarded, tapes: Tapes) -> None:
        self._deployment = deployment
        self._edits = edits
        self._rewrite = rewrite
        self._tapes = tapes
        self._violations: dict[RouteSpec, list[Violation]] = {}
        self.lowered: list[Node] = []
        self.reports: list[RouterReport] = []

    def lower_generic(self, routes: list[Route]) -> list[tuple[Node, str]]:
        """Calls of the generic ``route``; those that are left, and why. One whose readers were left stays with them."""
        left: list[tuple[Node, str]] = []
        for route in routes:
            if _feeds_generic(route):
                continue
            wiring, kind = self._tapes.read((route.node,), (route.node,))
            key = (route.spec, kind)
            failure = self._rewrite(_replacing(self, route, wiring, key), key)
            if isinstance(failure, Wording):
                left.append((route.node, failure.say()))
            else:
                self.lowered.append(route.node)
                self.reports.append(reports.lowered(route, self._violations[route.spec]))
        return left

    def lower_raised(self, route: Route, is_lowered: bool) -> None:
        """A routing in a model's own operators, whose block is lowered or not."""
        self.reports.append(lower_router(route, is_lowered, self._judge, self._rewrite, self._edits))

    def undo(self, reason: str) -> list[tuple[Node, str]]:
        """After all edits were taken back: the reports say so; the nodes of generic operators that are there again."""
        self.reports = [reports.undone(report, reason) for report in self.reports]
        return [(node, reason) for node in self.lowered]

    def replace(self, route: Route, emit: Emitter, wiring: Wiring, key: tuple[Any, ...]) -> None:
        """Emit what a routing becomes, and let its readers read that."""
        use_gating = not self._judge(route)
        weights, ids = self._tapes.write(
            key, emit, (route.node,), wiring, lambda: emit_route(route, emit, use_gating=use_gating)
        )
        pairs = ((route.weights, weights), (route.ids, ids))
        replaced = [(old, new) for old, new in pairs if old is not None and new is not None]
        for old, new in replaced:
            same_value(old, new)
        for old, new in replaced:
            self._edits.replace_uses(old, new)
        self._edits.erase([route.node, *(old for old, _ in replaced)])
        for old, new in replaced:
            self._edits.take_name(new, old)

    def _judge(self, route: Route) -> list[Violation]:
        if route.spec not in self._violations:
            self._violations[route.spec] = judge_route(route.spec, self._deployment)
        return self._violations[route.spec]


def _replacing(lowering: RouteLowering, route: Route, wiring: Wiring, key: tuple[Any, ...]) -> Callable[[Emitter], Any]:
    return lambda emit: lowering.replace(route, emit, wiring, key)


def _feeds_generic(route: Route) -> bool:
    """Whether the routing belongs to what was left as it was: then it stays too."""
    readers = [user for item in (route.weights, route.ids) if item is not None for user in item.users]
    return bool(generic_nodes(readers))
