"""The check that a graph compares itself with the other ranks' before its first exchange, during one run of the pass.

Where that exchange is must be looked for before blocks are lowered; what is compared is known after that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.agreement_check import (
    ASSERT_AGREEMENT,
    BlockOutcome,
    blocks_record,
    emit_check,
    first_exchange,
    settings_record,
    source_meta,
)
from moe_lowering.passes.graph.edit_log import EditLog
from moe_lowering.passes.raise_foreign.records import ForeignBlock
from moe_lowering.passes.run.messages import log_warning
from moe_lowering.report.records import BlockReport

if TYPE_CHECKING:
    from moe_lowering.passes.pipeline import MoeLowering


class RankCheck:
    """What one run knows of the check.

    Attributes:
        untouched: reports of layers that others wrote, that exchange tokens, and that have no block.
    """

    def __init__(self, graph: Graph, deployment: Deployment, edits: EditLog) -> None:
        self._graph = graph
        self._deployment = deployment
        self._edits = edits
        self._first_exchange: tuple[Node, dict[str, Any]] | None = None
        self.untouched: list[BlockReport] = []

    def find_exchange(self, foreign: list[ForeignBlock]) -> None:
        """As ``first_exchange`` has it, of generic operators and of layers that others wrote."""
        exchanges = [first for first in [first_exchange(self._graph)] if first is not None]
        if not self._graph.find_nodes(op="call_function", target=ASSERT_AGREEMENT):
            exchanges += [(block.x, source_meta(block.result)) for block in foreign if block.ep_size > 1]
        self._first_exchange = min(exchanges, key=lambda pair: pair[0], default=None)

    def emit(
        self, outcomes: Iterable[BlockOutcome], left: Iterable[Node], lowering: MoeLowering, timeout: float | str
    ) -> bool:
        """Put the check in front of the first exchange; whether that edited the graph.

        Args:
            outcomes: what became of each block; not read where no tokens are exchanged, as ``left``.
            left: nodes of generic operators that are left and may belong to no block.
            lowering: whose settings the ranks compare.
            timeout: as for ``npugraph_ex_options``.
        """
        first = self._first_exchange
        if first is None:
            return False
        try:
            settings = settings_record(self._deployment, lowering, ep_group=True)
            blocks = blocks_record(outcomes, left, self.untouched, self._deployment)
            created: list[Node] = []
            with self._edits.step(created):
                created.append(emit_check(self._graph, first, self._deployment.ep_group, timeout, settings, blocks))
        except Exception:  # a defect of ours must not fail the user's compile
            if lowering.strict:
                raise
            log_warning("moe_lowering: the graph does not compare itself with the other ranks'")
            return False
        return True
