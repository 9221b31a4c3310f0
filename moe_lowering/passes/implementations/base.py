"""What an implementation of a block is: the operators whose limits bind it, and how it is emitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter


@dataclasses.dataclass(frozen=True)
class Replacement:
    """The nodes that stand for a block's results: y, and the counts when something else reads them."""

    y: Node
    counts: Node | None


def stage_after(block: Block, node: Node) -> Node:
    """The first stage of the block at which ``node`` exists. Anywhere between two stages another scope may be open."""
    return next(stage for stage in (block.dispatch, block.mlp, block.combine) if node < stage)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to communicate.

    Attributes:
        name: its name in configuration, report and tests.
        operators: names of the operators that it would emit for a block on a SoC; their rows in ``limits/data`` are judged.
        emit: emits the replacement. ``quantities`` are those the block was judged with.
    """

    name: str
    operators: Callable[[BlockSpec, str], tuple[str, ...]]
    emit: Callable[[Block, Emitter, Deployment, dict[str, Any]], Replacement]
