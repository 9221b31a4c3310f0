"""``GraphNode``: one node of a block, before or after lowering, as reports have it. It keeps no graph alive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


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


def graph_text(blocks: Sequence[tuple[str, Sequence[GraphNode]]]) -> str:
    """The nodes of some blocks by name, one a line."""
    return "\n".join(line for name, nodes in blocks for line in (f"# {name}", *map(str, nodes)))
