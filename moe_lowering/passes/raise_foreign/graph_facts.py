"""What the proof of a closed region needs of a whole graph: made once while it is searched, not once per layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from torch.fx import Graph, Node

from moe_lowering.passes.graph.memory_effects import Writes
from moe_lowering.passes.graph.scopes import scope_paths


class GraphFacts:
    """Scopes and writes of a graph, as it is when they are first asked for; ``results`` of the layers of ATen found so far."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.results: list[Node] = []

    @cached_property
    def scopes(self) -> dict[Node, tuple[str, ...]]:
        return scope_paths(self.graph)

    @cached_property
    def writes(self) -> Writes:
        return Writes(self.graph)


_read: list[GraphFacts] = []


@contextmanager
def reading(graph: Graph) -> Iterator[None]:
    """Within it nothing is edited, so that ``facts_of`` may return the same record again."""
    _read.append(GraphFacts(graph))
    try:
        yield
    finally:
        _read.pop()


def facts_of(graph: Graph) -> GraphFacts:
    return next((facts for facts in _read if facts.graph is graph), None) or GraphFacts(graph)
