"""The reports of the blocks of one run: lowered or left as they were, left because of an error, taken back with all others.

What equal blocks say alike is put into words once, with the user's names of sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from moe_lowering.limits.wording import Wording
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.decision import Decision
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.passes.graph.symbol_names import name_sizes
from moe_lowering.passes.run.messages import describe_internal_error, name_symbols
from moe_lowering.report.graphs import GraphNode
from moe_lowering.report.records import BlockReport

# The operators that a block is made of, and its nodes
Content: TypeAlias = tuple[tuple[str, ...], Sequence[GraphNode]]


class BlockReports:
    """Makes the reports of one run.

    Attributes:
        cast_notes: of a block's record and an implementation, what is said of experts that are cast in every forward.
    """

    def __init__(self) -> None:
        self._alike: dict[tuple[BlockSpec, str], BlockReport] = {}  # of equal blocks, by what becomes of them
        self.cast_notes: dict[tuple[str, BlockSpec], tuple[str, ...]] = {}

    def make(
        self,
        block: Block,
        decision: Decision,
        comm: str | None,
        reason: Wording,
        before: Content,
        after: Content,
    ) -> BlockReport:
        """The report of a block.

        Args:
            comm: the implementation that it became; None where it is left.
            before, after: the block, and what stands for it.
        """
        key = (block.spec, reason.say())
        alike = self._alike.get(key)
        if alike is None:
            alike = self._alike[key] = _say_alike(block.spec, comm, reason, decision)
        notes = alike.notes if comm is None else (*alike.notes, *self.cast_notes.get((comm, block.spec), ()))
        return dataclasses.replace(
            alike,
            notes=notes,
            name=block.name,
            ops_before=before[0],
            ops_after=after[0],
            nodes_before=before[1],
            nodes_after=after[1],
        )


def _say_alike(spec: BlockSpec, comm: str | None, reason: Wording, decision: Decision) -> BlockReport:
    """What equal blocks say alike, in the user's names."""
    names, is_lowered = name_symbols(spec.tokens), comm is not None
    report = BlockReport(
        name="",
        comm=comm,
        reason=reason.say(names),
        ops_before=(),
        ops_after=(),
        verdicts=decision.judgement.verdicts,
        notes=decision.notes,
        enforced=decision.enforced if is_lowered else None,
        sizes=decision.sizes if is_lowered else None,
        count=decision.count,
    )
    return name_sizes(report, names)


def report_error(block: Block, error: Exception) -> BlockReport:
    """Of a block that is as it was, since deciding on it or reporting it failed."""
    operators = tuple(operator_name(n) for n in block.stages)
    return BlockReport(block.name, None, describe_internal_error(error), operators, operators, {})


def report_undone(report: BlockReport, reason: str) -> BlockReport:
    """Of a lowered block whose edits were taken back."""
    return dataclasses.replace(report, comm=None, reason=reason, ops_after=report.ops_before, enforced=None, sizes=None)
