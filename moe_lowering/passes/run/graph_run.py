"""One run of the pass over one graph: its blocks are decided on, rewritten and verified one by one, and what was edited can
be taken back, of one block or of all.

Contract. What is raised while a block is lowered leaves that block as it was, with the reason in its report. What the graph
refuses to run with is in ``bounds``, its routings in ``routes``, layers that others wrote in ``foreign`` and
``lower_foreign``, the comparison with other ranks in ``rank_check``, what is said in ``block_reports`` and ``messages``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.fx import Graph, GraphModule, Node

from moe_lowering.deployment import Deployment
from moe_lowering.limits.wording import Wording, make_wording
from moe_lowering.passes.agreement_check import BlockOutcome
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.capturability import may_be_captured, not_capturable
from moe_lowering.passes.decision import Decision, decide
from moe_lowering.passes.emission.emitter import Constants, Emitter, Recording
from moe_lowering.passes.emission.tapes import Tapes
from moe_lowering.passes.emission.wiring import Wiring
from moe_lowering.passes.find_blocks import find_blocks
from moe_lowering.passes.forward_casts import note_casts
from moe_lowering.passes.graph.edit_log import ModuleEdits
from moe_lowering.passes.graph.fake_modes import join_fake_modes
from moe_lowering.passes.graph.graph_nodes import graph_nodes
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.implementations.base import Replacement
from moe_lowering.passes.implementations.tensor_parallel import tokens_per_rank
from moe_lowering.passes.legality import Refusal, refusal
from moe_lowering.passes.lower_foreign import left_as_it_is, lower_foreign
from moe_lowering.passes.overlap import OverlapTarget, overlap
from moe_lowering.passes.policy import Policy
from moe_lowering.passes.raise_foreign.records import ForeignBlock
from moe_lowering.passes.routers.lower_router import find_routers
from moe_lowering.passes.routers.match_router import RouterReader, readers_of
from moe_lowering.passes.run.block_reports import BlockReports, Content, report_error, report_undone
from moe_lowering.passes.run.bounds import TokenBounds
from moe_lowering.passes.run.foreign import ForeignLayers
from moe_lowering.passes.run.messages import describe_internal_error, describe_undo, log_warning
from moe_lowering.passes.run.rank_check import RankCheck
from moe_lowering.passes.run.routes import RouteLowering
from moe_lowering.passes.run.subgraphs import Subgraph
from moe_lowering.passes.verifier import (
    VerificationError,
    call_violations,
    defined_before_readers,
    generic_nodes,
    same_value,
)
from moe_lowering.report.leftovers import NotCapturable
from moe_lowering.report.records import BlockReport
from moe_lowering.vocabulary import RAISE_FOREIGN

if TYPE_CHECKING:
    from moe_lowering.passes.pipeline import MoeLowering


class GraphRun:
    """One run over one graph: the caches of what equal blocks share, and the log of what was done."""

    def __init__(
        self,
        gm: GraphModule,
        deployment: Deployment,
        policy: Policy,
        inside: Subgraph | None = None,
        raise_foreign: str = RAISE_FOREIGN[0],
    ) -> None:
        self.gm = gm
        self.graph: Graph = gm.graph
        self.edits = ModuleEdits(gm)
        self.inside = inside
        self.deployment = deployment
        self.policy = policy
        self.nodes_before = len(self.graph.nodes)
        self.changed = False
        self._failed = False
        self.left: list[tuple[Node, str]] = []
        self.replaced: dict[Node, Node] = {}  # by the erased result of a layer: what stands for it
        self._constants: Constants = {}
        self.tapes = Tapes(self._constants)
        self.foreign = ForeignLayers(self.graph, deployment, raise_foreign)
        self.bounds = TokenBounds(deployment, self.foreign.raised, self.replaced, self._guarded)
        self.rank_check = RankCheck(self.graph, deployment, self.edits)
        self.routes = RouteLowering(deployment, self.edits, self._guarded, self.tapes)
        self._raise_foreign = raise_foreign
        self._decisions: dict[BlockSpec, Decision] = {}
        self.recordings: dict[tuple[Any, ...], Recording] = {}
        self._reports = BlockReports()
        self._blocks: list[Block] = []
        self._targets: dict[Node, OverlapTarget] = {}  # by the erased combine
        self._shape_env: Any = None

    def lower(self) -> list[BlockReport]:
        reports = self._lower()
        if self.inside is None:
            return reports
        return [dataclasses.replace(report, notes=(*report.notes, str(self.inside))) for report in reports]

    def _lower(self) -> list[BlockReport]:
        if self.inside is not None and self.inside.refused:
            self.left = [(node, self.inside.refused) for node in generic_nodes(self.graph.nodes)]
            return []
        fake_mode = join_fake_modes(self.graph)
        if isinstance(fake_mode, str):  # not a graph of torch.compile
            self.left = [(node, fake_mode) for node in generic_nodes(self.graph.nodes)]
            return []
        self.fake_mode, self._shape_env = fake_mode, fake_mode.shape_env
        self.tapes.shape_env = self._shape_env
        try:
            blocks, routes, self.left = find_blocks(self.graph)
        except Exception as error:  # as in _guarded: nothing was edited yet
            log_warning("moe_lowering: looking for blocks failed, the graph is left as it was")
            self.left = [(node, describe_internal_error(error)) for node in generic_nodes(self.graph.nodes)]
            return []
        foreign = self.foreign.find(routes)
        readers = [*readers_of(blocks), *(RouterReader(layer.ids, layer.weights, layer.result) for layer in foreign)]
        raised, self.routes.reports = find_routers(self.graph, readers, self._raise_foreign)
        self.rank_check.find_exchange(foreign)
        reports = self._lower_all(blocks, foreign)
        self.left += self.routes.lower_generic(routes)
        for route in raised:
            end = None if route.raised is None else route.raised.end
            self.routes.lower_raised(route, is_lowered=end in self._targets or end in self.replaced)
        return reports

    def _lower_all(self, blocks: list[Block], foreign: list[ForeignBlock]) -> list[BlockReport]:
        """Each block and each layer that others wrote, in graph order."""
        reports: list[BlockReport] = []
        items = [(block.dispatch, block) for block in blocks] + [(layer.result, layer) for layer in foreign]
        for _, item in sorted(items, key=lambda pair: pair[0]):
            if isinstance(item, Block):
                self._blocks.append(item)
                reports.append(self._lower_or_leave(item))
            else:
                reports += self._raise_or_leave(item)
        return reports

    def _raise_or_leave(self, layer: ForeignBlock) -> list[BlockReport]:
        """The report of a layer that others wrote, where it has a block: else it is put with those that were not touched."""
        try:
            block, report = lower_foreign(self, layer)
        except Exception as error:  # as in _guarded: the layer is as it was
            self.bounds.forget()
            log_warning("moe_lowering: raising failed, %s left as it was", layer.result.name, trace=not self._failed)
            self._failed = True
            block, report = None, left_as_it_is(layer, describe_internal_error(error))
        if block is None:
            self.foreign.untouched.append(report)
            self.rank_check.untouched += [report] if layer.ep_size > 1 else []
            return []
        self._blocks.append(block)
        return [report]

    def replacement_of(self, block: Block) -> Node:
        """What stands for the result of a block that was lowered."""
        return self._targets[block.combine].y

    def take_back(self, block: Block) -> Refusal | None:
        """Forget what was noted of a block whose edits are taken back; why the graph refused to run for its sake."""
        self._targets.pop(block.combine, None)
        return self.bounds.take_back(block)

    def _lower_or_leave(self, block: Block) -> BlockReport:
        created: list[Node] = []  # what is in the steps within is known already
        try:
            with self.edits.step(created):
                return self.lower_block(block)
        except Exception as error:  # as in _guarded: here deciding failed, or reporting
            self._targets.pop(block.combine, None)
            self.bounds.forget()
            log_warning("moe_lowering: deciding failed, %s left as it was", block.name, trace=not self._failed)
            self._failed = True  # equal blocks fail alike: one traceback is enough
            return report_error(block, error)

    def lower_block(self, block: Block) -> BlockReport:
        """Decide, rewrite and verify one block. What it raises leaves edits to be taken back by the caller."""
        before = tuple(operator_name(n) for n in block.stages), graph_nodes(sorted(block.interior))
        decision = self._decisions.get(block.spec)
        if decision is None:
            decision = self._decisions[block.spec] = decide(block.spec, self.deployment, self.policy)
        comm = decision.comm
        after: Content = before[0], ()
        reason = make_wording("{why}", why=decision.reason)
        refused = refusal(block.spec, self.deployment) if comm is not None else None
        if refused is not None:
            comm, reason = None, refused.reason
            self.bounds.refuse_to_run(block, refused)
        if comm is not None:
            chosen, (wiring, kind) = comm, self.tapes.read(block.stages, block.interior, block.mlp, block.wiring)
            key = (chosen, block.spec, kind)
            done = self._guarded(lambda emit: self._rewrite(block, chosen, decision, emit, wiring, key), key)
            if isinstance(done, Wording):
                more = self.bounds.refuse_if_ranks_differ(block)
                comm, reason = None, make_wording("{why}{more}", why=done, more=more)
            else:
                after = self.tapes.describe(key, wiring, done)
                self.bounds.keep(block, decision.enforced)
        report = self._reports.make(block, decision, comm, reason, before, after)
        if decision.guard is not None and comm == decision.comm:  # last: a guard cannot be taken back
            self.bounds.request_guard(block, decision.guard)
        return report

    def _guarded(self, rewrite: Callable[[Emitter], None], key: tuple[Any, ...]) -> list[Node] | Wording:
        """Run one rewrite; the nodes it created, or why it was undone."""
        assert self.fake_mode is not None  # lower() returns before
        emit = Emitter(self.graph, self.fake_mode, self.recordings.get(key), self._constants)
        try:
            with self.edits.step(emit.made):
                rewrite(emit)
        except Exception as error:  # a defect of ours must not fail the user's compile: undo this block, and say so
            if not isinstance(error, VerificationError):
                log_warning("moe_lowering: rewriting failed, block left as it was")
            return describe_undo(error)
        self.recordings.setdefault(key, emit.recording)
        self.changed = True
        return emit.created

    def _rewrite(
        self, block: Block, comm: str, decision: Decision, emit: Emitter, wiring: Wiring, key: tuple[Any, ...]
    ) -> None:
        first = key not in self.recordings

        def write() -> tuple[Node, Node | None]:
            form = IMPLEMENTATIONS[comm].form(decision.judgement.form(comm), self.deployment)
            emitted = form.emit(block, emit, self.deployment, decision.judgement.premises)
            return emitted.y, emitted.counts

        y, counts = self.tapes.write(key, emit, block.stages, wiring, write)
        assert y is not None
        replacement = Replacement(y, counts)
        same_value(block.combine, replacement.y)
        if block.counts is not None:
            assert replacement.counts is not None
            same_value(block.counts, replacement.counts)
            readers = [user for user in block.counts.users if user is not block.mlp]
            defined_before_readers(readers, block.counts, replacement.counts)
        if first:
            self._check_limits(block.spec, decision, emit)
            self._reports.cast_notes[comm, block.spec] = note_casts(block.experts, emit.created, comm)
        if decision.enforced is not None:
            self.bounds.enforce(block, decision.enforced, emit)
        self.edits.replace_uses(block.combine, replacement.y)
        if block.counts is not None and replacement.counts is not None:
            self.edits.replace_uses(block.counts, replacement.counts, but=block.mlp)
        self.replaced[block.combine] = replacement.y
        self.edits.erase(block.interior)
        self.edits.take_name(replacement.y, block.combine)
        if block.counts is not None and replacement.counts is not None:
            self.edits.take_name(replacement.counts, block.counts)
        self._targets[block.combine] = OverlapTarget(comm, emit.created, replacement.y)

    def check_agreement(self, reports: list[BlockReport], lowering: MoeLowering, timeout: float | str) -> None:
        """After ``lower``: the graph compares with the other ranks' before its first exchange."""
        outcomes = (self._outcome(*each) for each in zip(self._blocks, reports, strict=True))
        if self.rank_check.emit(outcomes, (node for node, _ in self.left), lowering, timeout):
            self.changed = True

    def _outcome(self, block: Block, report: BlockReport) -> BlockOutcome:
        target = self._targets.get(block.combine)
        created = [] if target is None else target.nodes
        return BlockOutcome(block, report, created, self.bounds.is_refused(block))

    def overlap(self, reports: list[BlockReport], config: Any) -> list[BlockReport]:
        """After ``lower``: shared experts to a side stream, and the reports with what came of it."""
        targets = [self._targets.get(block.combine) for block in self._blocks]
        notes = iter(overlap(self.edits, [t for t in targets if t is not None], self.deployment, config))
        return [
            report if target is None else dataclasses.replace(report, notes=(*report.notes, next(notes)))
            for report, target in zip(reports, targets, strict=True)
        ]

    def finish(self, reports: list[BlockReport], agree: Callable[[list[BlockReport]], None]) -> list[BlockReport]:
        """Lint and recompile. Where that fails all edits are undone, as which one it was is not known.

        ``agree`` puts the comparison with the other ranks into the graph once more: they may have lowered theirs.
        """
        if not self.changed:
            return reports
        try:
            self.edits.compile()
            return reports
        except Exception as error:  # as in _guarded
            log_warning("moe_lowering: the lowered graph is not sound, all of it left as it was")
            return self._leave_all(reports, describe_undo(error).say(), agree)

    def _leave_all(
        self, reports: list[BlockReport], reason: str, agree: Callable[[list[BlockReport]], None]
    ) -> list[BlockReport]:
        """Undo everything but what must not run beside other ranks; that raises where even this cannot be compiled."""
        refused, self.changed = self.bounds.refused, False
        self.edits.undo()
        self.bounds.refused = []
        for block, why in refused:
            self.bounds.refuse_to_run(block, why)
        left = [self._leave(*each, reason) for each in zip(self._blocks, reports, strict=True)]
        self._targets.clear()
        self.left += self.routes.undo(reason)
        agree(left)
        if self.changed:
            self.edits.compile()
        return left

    def _leave(self, block: Block, report: BlockReport, reason: str) -> BlockReport:
        """The report of a block whose edits were taken back with all others'."""
        if report.comm is None:
            return report
        return report_undone(report, reason + self.bounds.refuse_if_ranks_differ(block))

    def not_capturable(self) -> list[NotCapturable]:
        """What keeps the graph as it is now from being captured; nothing where the deployment does not capture."""
        if not may_be_captured(self.deployment):
            return []
        try:
            return not_capturable(self.graph, self._shape_env, self.deployment)
        except Exception:  # as in _guarded: looking must not fail a compile
            log_warning("moe_lowering: looking for what cannot be captured failed")
            return []

    def end(self) -> None:
        """Let go of all that the run knew: a fourth of the objects that the pass makes, which the garbage collector would look at
        with the others. Most of it is the edits' log."""
        vars(self).clear()  # it is in a circle with parts that have methods of it

    def _check_limits(self, spec: BlockSpec, decision: Decision, emit: Emitter) -> None:
        """Every Ascend node against its limits, from its own arguments and not from the block's record."""
        judged = decision.judgement
        sizes = (tokens_per_rank(spec.tokens, spec), tokens_per_rank(judged.tokens, spec))
        for node in emit.created:
            violations = call_violations(node, self.deployment, judged.prover, sizes, judged.context)
            if violations:
                shown = tuple((f"broken_{i}", each) for i, each in enumerate(violations))
                raise VerificationError(Wording("; ".join(f"{{{name}}}" for name, _ in shown), shown))
