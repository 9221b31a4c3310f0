"""The MoE layers of one graph that are not written with the generic operators, during one run of the pass.

``find``: those to be raised to the generic operators; others that were recognised are reported and left. ``remaining``:
what is still in the graph at the end.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Route
from moe_lowering.passes.find_blocks import GraphSummary, summarise
from moe_lowering.passes.leftovers.find_foreign import find_foreign
from moe_lowering.passes.lower_foreign import left_as_it_is
from moe_lowering.passes.raise_foreign.find_foreign_blocks import find_foreign_blocks
from moe_lowering.passes.raise_foreign.records import ForeignBlock
from moe_lowering.passes.run.messages import describe_internal_error, log_warning
from moe_lowering.report.leftovers import ForeignMoe, NotRaised
from moe_lowering.report.records import BlockReport


class ForeignLayers:
    """What one run knows of such layers.

    Attributes:
        raised: the layers that are in generic form, by their combine.
        untouched: reports of layers that were recognised and have no block.
        summary: what ``find_block`` reads of the whole graph.
    """

    def __init__(self, graph: Graph, deployment: Deployment, raise_foreign: str) -> None:
        self._graph = graph
        self._deployment = deployment
        self._raise_foreign = raise_foreign
        self._not_raised: dict[Node, NotRaised] = {}
        self._told: set[Node] = set()  # nodes of layers that a report is about, lowered or not
        self.raised: dict[Node, ForeignBlock] = {}
        self.untouched: list[BlockReport] = []
        self.summary = GraphSummary({}, {}, frozenset())

    def find(self, routes: list[Route]) -> list[ForeignBlock]:
        """Layers that are to be raised, in graph order."""
        if self._raise_foreign == "off":
            return []
        try:
            layers, self._not_raised = find_foreign_blocks(self._graph, self._deployment)
        except Exception:  # a defect of ours must not fail the user's compile, and nothing was edited yet
            log_warning("moe_lowering: looking for layers that others wrote failed, they are left as they were")
            return []
        if layers:
            self.summary = summarise(self._graph, routes)
        self._told.update(node for layer in layers for node in layer.interior)
        if self._raise_foreign == "auto":
            return layers
        # "report": MoeLowering took no other word
        reason = f"[raise.report] recognised, and left: raise_foreign is {self._raise_foreign!r}"
        self.untouched += [left_as_it_is(layer, reason) for layer in layers]
        return []

    def remaining(self) -> list[ForeignMoe]:
        """MoE layers that are left in the graph, are not written with the generic operators, and that no report is about."""
        try:
            return find_foreign(self._graph, self._told, self._not_raised)
        except Exception as error:  # what could not be looked for is not taken to be absent
            log_warning("moe_lowering: looking for other MoE layers failed")
            return [
                ForeignMoe("graph", "", (), "foreign.not_looked", describe_internal_error(error), "it may hold others")
            ]
