"""``GraphNode``: one node of a block, before or after lowering, as reports have it. It keeps no graph alive."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, overload


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """One node: its name, its operator (``namespace.name``), and the names of the nodes that it reads, in their order."""

    name: str
    operator: str
    inputs: tuple[str, ...]

    def __str__(self) -> str:
        return f"%{self.name} = {self.operator}({', '.join(f'%{name}' for name in self.inputs)})"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "operator": self.operator, "inputs": list(self.inputs)}


# Of each node the number of its name, its operator, and the numbers of the names of what it reads.
Pattern = tuple[tuple[int, str, tuple[int, ...]], ...]


class NamedNodes(Sequence[GraphNode]):
    """The nodes of a block that is equal to others but for the names. Records are made when somebody reads them."""

    def __init__(self, names: Sequence[str], pattern: Pattern) -> None:
        self._names, self._pattern = names, pattern

    @functools.cached_property
    def _nodes(self) -> tuple[GraphNode, ...]:
        names = self._names
        return tuple(
            GraphNode(names[name], operator, tuple([names[each] for each in inputs]))
            for name, operator, inputs in self._pattern
        )

    def __len__(self) -> int:
        return len(self._pattern)

    @overload
    def __getitem__(self, index: int) -> GraphNode: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[GraphNode, ...]: ...

    def __getitem__(self, index: int | slice) -> GraphNode | tuple[GraphNode, ...]:
        return self._nodes[index]


def graph_text(blocks: Sequence[tuple[str, Sequence[GraphNode]]]) -> str:
    """The nodes of some blocks by name, one a line."""
    return "\n".join(line for name, nodes in blocks for line in (f"# {name}", *map(str, nodes)))
