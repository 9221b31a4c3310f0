"""``Implementation`` and ``Form``: what a way to communicate tells legality, the choice and the rewrite.

An implementation has one or more forms, of which the first legal one is taken. A form has two functions of one block: the
calls that it would make, whose limits are judged, and the emission of its ``Replacement``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.operator_calls import OperatorCall, Premises, Rules


@dataclasses.dataclass(frozen=True)
class Replacement:
    """The nodes that stand for a block's results: y, and the counts when something else reads them."""

    y: Node
    counts: Node | None


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to write an implementation down.

    Attributes:
        name: its name in verdicts and reports.
        calls: the calls that it would make for a block; their rows in ``limits/data`` are judged.
        emit: emits the replacement. The last argument is what the block was judged with.
        note: what the user should know of its cost at a number of tokens, for the report.
        sends_masks: other ranks receive part of this rank's mask, so that all must have one or none. If False, the rows of
            masked tokens stay on their rank.
        lines: the lines of each buffer of its exchange with equal splits, for T; None when it has no such exchange.
        told_rows: the bound on rows that its operator is told; None when it is told none.
        keeps_max_rows: it has room for ``max_rows`` rows and no more; the others for every row that could arrive.
    """

    name: str
    calls: Callable[[BlockSpec, Deployment], tuple[OperatorCall | Rules, ...]]
    emit: Callable[[Block, Emitter, Deployment, Premises], Replacement]
    note: Callable[[BlockSpec, Deployment, int], str] | None = None
    lines: Callable[[BlockSpec, Any], Any] | None = None
    told_rows: Callable[[BlockSpec, Deployment, Premises], int | None] | None = None
    sends_masks: bool = True
    keeps_max_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to communicate.

    Attributes:
        name: its name in configuration, report and tests.
        rules: those under its name in ``limits/data``, with what they read.
        forms: in order of preference, for a deployment; at least one. The first legal one is taken.
        ruled_out: forms that the deployment alone excludes: never taken, judged for the reason.
    """

    name: str
    rules: Callable[[BlockSpec, Deployment], Rules]
    forms: Callable[[Deployment], tuple[Form, ...]]
    ruled_out: Callable[[Deployment], tuple[Form, ...]] = lambda deployment: ()

    def form(self, name: str, deployment: Deployment) -> Form:
        """The form of that name."""
        return next(form for form in self.forms(deployment) if form.name == name)


def stage_after(block: Block, node: Node) -> Node:
    """The first stage of the block at which ``node`` exists. Anywhere between two stages another scope may be open."""
    return next(stage for stage in (block.dispatch, block.mlp, block.combine) if node < stage)
