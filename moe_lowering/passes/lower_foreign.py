"""Lower a layer that others wrote: all of it, or nothing of it.

Contract. Within one step of the log of edits the generic operators are put in front of the layer's result, its readers read
them, and the ordinary path decides, rewrites and verifies that block. Where it is not lowered the step is taken back, and
the graph is node for node as it was; the report says why. Where it is, what was there for the result's sake alone is erased.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.fx import Node
from torch.fx.node import map_arg

from moe_lowering.number_words import megabytes
from moe_lowering.passes.blocks import Block
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.find_blocks import find_block, module_path
from moe_lowering.passes.graph.graph_nodes import graph_nodes
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.passes.legality import Refusal
from moe_lowering.passes.raise_foreign.emit_generic import Generic, emit_generic
from moe_lowering.passes.raise_foreign.keep_foreign import is_unchanged, order_notes
from moe_lowering.passes.raise_foreign.records import ForeignBlock
from moe_lowering.passes.verifier import same_value
from moe_lowering.report.records import BlockReport

if TYPE_CHECKING:
    from moe_lowering.passes.run.graph_run import GraphRun

COMPUTED_EVERY_FORWARD = (
    "gate and up projection are two tensors: they are put side by side in every forward, which copies "
    "{copied}; {advice}"
)
LEFT_APART = "gate and up projection are two tensors, {copied}: as one their experts have fewer operators; {advice}"
JOIN_ONCE = "moe_lowering.projections.join_projections(model) does it once"
STORE_ONE = "store them as one, [E, H, 2I]"


class _Left(Exception):
    """The block was not lowered."""

    def __init__(self, block: Block | None, report: BlockReport, refused: Refusal | None = None) -> None:
        self.block, self.report, self.refused = block, report, refused


def lower_foreign(run: GraphRun, layer: ForeignBlock) -> tuple[Block | None, BlockReport]:
    """The block in generic form, None where it is not even that, and what became of it.

    Raises:
        Exception: what deciding or rewriting raised; the graph is as it was.
    """
    before, nodes = original_operators(layer), graph_nodes(sorted(layer.interior))
    layer = layer.reading(run.replaced)
    block: Block | None
    ordered: tuple[str, ...] = ()
    try:
        block, report = _lower(run, layer)
        ordered = order_notes(layer, report.comm)
    except _Left as left:
        block, report = left.block, dataclasses.replace(left.report, ops_after=before)
        # other ranks may exchange: this one must not run beside them
        if block is not None and left.refused is not None:
            run.bounds.refuse_to_run(block, left.refused)
    notes = (*report.notes, *layer.notes, *_weights_notes(layer, report.ops_after == before), *ordered)
    return block, dataclasses.replace(
        report, ops_before=before, raised_from=layer.form, notes=notes, nodes_before=nodes
    )


def _lower(run: GraphRun, layer: ForeignBlock) -> tuple[Block, BlockReport]:
    assert run.fake_mode is not None
    key = ("raise", layer.kind)
    emit = Emitter(run.graph, run.fake_mode, run.recordings.get(key))
    with run.edits.step(emit.made):
        try:
            generic = emit_generic(layer, emit, run.deployment)
        except (ValueError, TypeError) as error:  # of the generic operators' fake kernels: they know more than a form
            raise _Left(
                None, left_as_it_is(layer, f"[raise.generic] the generic operators refuse it: {error}")
            ) from error
        for old, new in generic.results:
            same_value(old, new)
        _move_readers(run, layer, generic)
        block = find_block(generic.dispatch, run.foreign.summary)
        if isinstance(block, str):
            raise _Left(None, left_as_it_is(layer, block))
        run.foreign.raised[block.combine] = layer
        for old, new in generic.results:
            run.edits.replace_uses(old, new)
        report = run.lower_block(block)
        if report.comm is None:
            raise _Left(block, report, run.take_back(block))
        if is_unchanged(layer, report):
            run.take_back(block)
            raise _Left(None, _unchanged(layer, report))
        _erase(run, layer, generic, block)
    run.recordings.setdefault(key, emit.recording)
    return block, report


def _move_readers(run: GraphRun, layer: ForeignBlock, generic: Generic) -> None:
    """Who reads the counts reads those of the generic dispatch; who waits for a value inside waits for x or the result."""
    if layer.counts is not None:
        same_value(layer.counts, generic.counts)
        inside, swap = {*layer.interior}, {layer.counts: generic.counts}
        for user in [user for user in layer.counts.users if user not in inside]:
            args, kwargs = map_arg((user.args, user.kwargs), lambda node: swap.get(node, node))
            run.edits.set_arguments(user, args, kwargs)
    for waiter, _ in layer.edges:
        run.edits.set_arguments(waiter, (waiter.args[0], layer.result if layer.result < waiter else layer.x), {})


def _erase(run: GraphRun, layer: ForeignBlock, generic: Generic, block: Block) -> None:
    """What nobody reads any more, and the result's name to what stands for it."""
    dead: set[Node] = set()
    for node in sorted({*layer.interior, *layer.shared}, reverse=True):
        if all(user in dead for user in node.users):
            dead.add(node)
    run.edits.erase([*dead])
    result = generic.result if generic.result is not generic.combine else run.replacement_of(block)
    run.edits.take_name(result, layer.result)
    run.replaced.update({**dict(generic.results), layer.result: result})


def original_operators(layer: ForeignBlock) -> tuple[str, ...]:
    """Names of the operators that a layer consists of, in graph order."""
    return tuple(operator_name(node) for node in layer.interior if node.op == "call_function" and not _is_item(node))


def _is_item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _weights_notes(layer: ForeignBlock, left: bool) -> Sequence[str]:
    if not layer.w13.joined:
        return ()
    size = sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in layer.w13.nodes)
    copied = megabytes(size) if isinstance(size, int) else "tensors whose sizes are not known"
    lines_last = layer.w13.transposed or all(operator_name(node).endswith("transpose") for node in layer.w13.nodes)
    note = LEFT_APART if left else COMPUTED_EVERY_FORWARD
    return (note.format(copied=copied, advice=JOIN_ONCE if lines_last else STORE_ONE),)


def _unchanged(layer: ForeignBlock, report: BlockReport) -> BlockReport:
    """The report of a layer that is what would be chosen."""
    reason = f"[raise.already] it is written as {report.comm}, which is what would be chosen: left as it is"
    return dataclasses.replace(report, reason=reason, ops_after=original_operators(layer), notes=())


def left_as_it_is(layer: ForeignBlock, reason: str) -> BlockReport:
    """The report of a layer that was recognised and not touched."""
    operators = original_operators(layer)
    name = module_path(layer.result)
    return BlockReport(name, None, reason, operators, operators, {}, raised_from=layer.form, notes=layer.notes)
