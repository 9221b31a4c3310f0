"""One run of the pass over one graph: blocks are found, judged, rewritten, verified, and the edits can be taken back."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from moe_lowering.argument_checks import require_choice
from moe_lowering.custom_ops.assert_tokens import NOTHING
from moe_lowering.deployment import Deployment
from moe_lowering.limits import TokenRange, Violation
from moe_lowering.limits.bounds import as_argument
from moe_lowering.limits.wording import Names, Quoted, Wording, make_wording
from moe_lowering.passes import router_reports
from moe_lowering.passes.agreement_check import (
    ASSERT_AGREEMENT,
    BlockOutcome,
    blocks_record,
    emit_check,
    first_exchange,
    settings_record,
    source_meta,
)
from moe_lowering.passes.blocks import Block, BlockSpec, Route, RouteSpec, size_key
from moe_lowering.passes.capturability import may_be_captured, not_capturable
from moe_lowering.passes.decision import Decision, decide
from moe_lowering.passes.edit_log import ModuleEdits
from moe_lowering.passes.emitter import Constants, Emitter, Recording
from moe_lowering.passes.find_blocks import Around, around_of, find_blocks
from moe_lowering.passes.find_foreign import find_foreign
from moe_lowering.passes.graph_nodes import graph_nodes
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.implementations.tensor_parallel import share
from moe_lowering.passes.legality import Refusal, refusal
from moe_lowering.passes.lower_foreign import left_as_it_is, lower_foreign
from moe_lowering.passes.lower_route import emit_route, judge_route
from moe_lowering.passes.lower_router import find_routers, lower_router
from moe_lowering.passes.match_router import RouterReader, readers_of
from moe_lowering.passes.operator_names import operator_name
from moe_lowering.passes.overlap import OverlapTarget, overlap
from moe_lowering.passes.policy import Policy, PolicyError
from moe_lowering.passes.raise_foreign.find_foreign_blocks import find_foreign_blocks
from moe_lowering.passes.raise_foreign.records import ForeignBlock
from moe_lowering.passes.subgraphs import Subgraph
from moe_lowering.passes.symbol_names import dimension_names, name_sizes
from moe_lowering.passes.token_ranges import request_guard
from moe_lowering.passes.verifier import (
    VerificationError,
    call_violations,
    defined_before_readers,
    generic_nodes,
    same_value,
)
from moe_lowering.report.graphs import GraphNode
from moe_lowering.report.records import BlockReport, ForeignMoe, NotCapturable, NotRaised, RouterReport
from moe_lowering.vocabulary import RAISE_FOREIGN

if TYPE_CHECKING:
    from moe_lowering.passes.pipeline import MoeLowering

log = logging.getLogger(__name__)
ASSERT_TOKENS = torch.ops.moe_lowering.assert_tokens.default


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
        self.raise_foreign = raise_foreign
        self.nodes_before = len(self.graph.nodes)
        self.changed = False
        self._failed = False
        self.left: list[tuple[Node, str]] = []
        self.untouched: list[BlockReport] = []  # layers of others that were recognised and have no block
        self.surroundings = Around({}, {}, frozenset())
        self._not_raised: dict[Node, NotRaised] = {}
        self.foreign_blocks: dict[Node, ForeignBlock] = {}  # by the combine of their generic form
        self.replaced: dict[Node, Node] = {}  # by the erased result of a layer: what stands for it
        self._told: set[Node] = set()  # nodes of layers of others that ``blocks`` reports, lowered or not
        self._decisions: dict[BlockSpec, Decision] = {}
        self.recordings: dict[tuple[Any, ...], Recording] = {}
        self._constants: Constants = {}
        self._routes: dict[RouteSpec, list[Violation]] = {}
        self._enforced: set[Any] = set()
        self._refused: list[tuple[Block, Refusal]] = []
        self._lowered_routes: list[Node] = []
        self.routers: list[RouterReport] = []
        self._said: dict[tuple[BlockSpec, str], BlockReport] = {}
        self._blocks: list[Block] = []
        self._targets: dict[Node, OverlapTarget] = {}  # by the erased combine
        self._refusing: set[Node] = set()  # combines of blocks for whose sake the graph refuses to run
        self._first_exchange: tuple[Node, dict[str, Any]] | None = None
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
        fake_mode = _fake_mode(self.graph)
        if fake_mode is None:  # not a graph of torch.compile
            reason = "the graph has no fake values (meta['val']): nothing can be proven"
            self.left = [(node, reason) for node in generic_nodes(self.graph.nodes)]
            return []
        self.fake_mode, self._shape_env = fake_mode, fake_mode.shape_env
        try:
            blocks, routes, self.left = find_blocks(self.graph)
        except Exception as error:  # as in _guarded: nothing was edited yet
            log_warning("moe_lowering: looking for blocks failed, the graph is left as it was")
            self.left = [(node, describe_internal_error(error)) for node in generic_nodes(self.graph.nodes)]
            return []
        foreign = self._find_foreign(routes)
        readers = [*readers_of(blocks), *(RouterReader(layer.ids, layer.weights, layer.result) for layer in foreign)]
        raised, self.routers = find_routers(self.graph, readers, self.raise_foreign)
        self._first_exchange = self._find_first_exchange(foreign)
        reports = self._lower_all(blocks, foreign)
        for route in routes:
            if not _feeds_generic(route):
                self._lower_route(route)
        for route in raised:
            is_lowered = route.raised is not None and (
                route.raised.end in self._targets or route.raised.end in self.replaced
            )
            self.routers.append(lower_router(route, is_lowered, self._judge_route, self._guarded, self.edits))
        return reports

    def _find_foreign(self, routes: list[Route]) -> list[ForeignBlock]:
        """Layers that others wrote, in graph order; none where they are not to be raised."""
        if self.raise_foreign == "off":
            return []
        try:
            layers, self._not_raised = find_foreign_blocks(self.graph, self.deployment)
        except Exception:  # as in _guarded: nothing was edited yet
            log_warning("moe_lowering: looking for layers that others wrote failed, they are left as they were")
            return []
        if layers:
            self.surroundings = around_of(self.graph, routes)
        if self.raise_foreign == "auto":
            return layers
        require_choice("GraphRun", "raise_foreign", self.raise_foreign, RAISE_FOREIGN)
        reason = f"[raise.report] recognised, and left: raise_foreign is {self.raise_foreign!r}"
        self.untouched += [left_as_it_is(block, reason) for block in layers]
        self._told.update(node for block in layers for node in block.interior)
        return []

    def _find_first_exchange(self, foreign: list[ForeignBlock]) -> tuple[Node, dict[str, Any]] | None:
        """As ``first_exchange`` has it, of generic operators and of layers that others wrote."""
        exchanges = [first for first in [first_exchange(self.graph)] if first is not None]
        if not self.graph.find_nodes(op="call_function", target=ASSERT_AGREEMENT):
            exchanges += [(block.x, source_meta(block.result)) for block in foreign if block.ep_size > 1]
        return min(exchanges, key=lambda pair: pair[0], default=None)

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
        self._told.update(layer.interior)
        try:
            block, report = lower_foreign(self, layer)
        except Exception as error:  # as in _guarded: the layer is as it was
            self._enforced.clear()
            log_warning("moe_lowering: raising failed, %s left as it was", layer.result.name, trace=not self._failed)
            self._failed = True
            self.untouched.append(left_as_it_is(layer, describe_internal_error(error)))
            return []
        if block is None:
            self.untouched.append(report)
            return []
        self._blocks.append(block)
        return [report]

    def replacement_of(self, block: Block) -> Node:
        """What stands for the result of a block that was lowered."""
        return self._targets[block.combine].y

    def take_back(self, block: Block) -> Refusal | None:
        """Forget what was noted of a block whose edits are taken back; why the graph refused to run for its sake."""
        self._targets.pop(block.combine, None)
        refused = next((why for other, why in self._refused if other is block), None)
        self._refused = [pair for pair in self._refused if pair[0] is not block]
        self._refusing.discard(block.combine)
        self._enforced.clear()  # its assert_tokens went with it: the next block of this T brings its own
        return refused

    def _lower_or_leave(self, block: Block) -> BlockReport:
        created: list[Node] = []  # what is in the steps within is known already
        try:
            with self.edits.step(created):
                return self.lower_block(block)
        except Exception as error:  # as in _guarded: here deciding failed, or reporting
            self._targets.pop(block.combine, None)
            self._enforced.clear()  # its assert_tokens went with it: the next block of this T brings its own
            log_warning("moe_lowering: deciding failed, %s left as it was", block.name, trace=not self._failed)
            self._failed = True  # equal blocks fail alike: one traceback is enough
            before = tuple(operator_name(n) for n in block.stages)
            return BlockReport(block.name, None, describe_internal_error(error), before, before, {})

    def lower_block(self, block: Block) -> BlockReport:
        """Decide, rewrite and verify one block. What it raises leaves edits to be taken back by the caller."""
        before, nodes = tuple(operator_name(n) for n in block.stages), graph_nodes(sorted(block.interior))
        decision = self._decisions.get(block.spec)
        if decision is None:
            decision = self._decisions[block.spec] = decide(block.spec, self.deployment, self.policy)
        comm, after = decision.comm, before
        made: tuple[GraphNode, ...] = ()
        reason = make_wording("{why}", why=decision.reason)
        refused = refusal(block.spec, self.deployment) if comm is not None else None
        if refused is not None:
            comm, reason = None, refused.reason
            self.refuse_to_run(block, refused)
        if comm is not None:
            chosen = comm
            done = self._guarded(lambda emit: self._rewrite(block, chosen, decision, emit), (chosen, block.spec))
            if isinstance(done, Wording):
                comm, reason = None, make_wording("{why}{more}", why=done, more=self._refuse_if_ranks_differ(block))
            else:
                in_order = sorted(done)
                after = tuple(operator_name(n) for n in in_order if n.target is not operator.getitem)
                made = graph_nodes(in_order)
                self._enforced.add((size_key(block.spec.tokens), decision.enforced))
        report = self._report(block.spec, comm, reason, decision)
        report = dataclasses.replace(
            report, name=block.name, ops_before=before, ops_after=after, nodes_before=nodes, nodes_after=made
        )
        if decision.guard is not None and comm == decision.comm:  # last: a guard cannot be taken back
            self._request_guard(block, decision.guard)
        return report

    def _report(self, spec: BlockSpec, comm: str | None, reason: Wording, decision: Decision) -> BlockReport:
        """What equal blocks say alike, in the user's names."""
        key = (spec, reason.say())
        if key not in self._said:
            names = () if isinstance(spec.tokens, int) else _names(spec.tokens)
            done = comm is not None
            report = BlockReport(
                "", comm, reason.say(names), (), (), decision.judgement.verdicts, decision.notes,
                enforced=decision.enforced if done else None, sizes=decision.sizes if done else None,
                count=decision.count,
            )  # fmt: skip
            self._said[key] = name_sizes(report, names)
        return self._said[key]

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
            return _describe_undo(error)
        self.recordings.setdefault(key, emit.recording)
        self.changed = True
        return emit.created

    def _rewrite(self, block: Block, comm: str, decision: Decision, emit: Emitter) -> None:
        first = (comm, block.spec) not in self.recordings
        form = IMPLEMENTATIONS[comm].form(decision.judgement.form(comm), self.deployment)
        replacement = form.emit(block, emit, self.deployment, decision.judgement.premises)
        same_value(block.combine, replacement.y)
        if block.counts is not None:
            assert replacement.counts is not None
            same_value(block.counts, replacement.counts)
            readers = [user for user in block.counts.users if user is not block.mlp]
            defined_before_readers(readers, block.counts, replacement.counts)
        if first:
            self._check_limits(block.spec, decision, emit)
        if decision.enforced is not None:
            self._enforce(block, decision.enforced, emit)
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
        first = self._first_exchange
        if first is None:
            return
        try:
            settings = settings_record(self.deployment, lowering, ep_group=True)
            outcomes = [self._outcome(*each) for each in zip(self._blocks, reports, strict=True)]
            blocks = blocks_record(outcomes, [node for node, _ in self.left], self.deployment)
            created: list[Node] = []
            with self.edits.step(created):
                created.append(emit_check(self.graph, first, self.deployment.ep_group, timeout, settings, blocks))
            self.changed = True
        except Exception:  # as in _guarded: a defect of ours must not fail the user's compile
            if lowering.strict:
                raise
            log_warning("moe_lowering: the graph does not compare itself with the other ranks'")

    def _outcome(self, block: Block, report: BlockReport) -> BlockOutcome:
        target = self._targets.get(block.combine)
        created = [] if target is None else target.nodes
        return BlockOutcome(block, report, created, block.combine in self._refusing)

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
            return self._leave_all(reports, _describe_undo(error).say(), agree)

    def _leave_all(
        self, reports: list[BlockReport], reason: str, agree: Callable[[list[BlockReport]], None]
    ) -> list[BlockReport]:
        """Undo everything but what must not run beside other ranks; that raises where even this cannot be compiled."""
        refused, self.changed = self._refused, False
        self.edits.undo()
        self._refused = []
        for block, why in refused:
            self.refuse_to_run(block, why)
        left = [
            dataclasses.replace(
                report, comm=None, reason=reason + self._refuse_if_ranks_differ(block), ops_after=report.ops_before,
                enforced=None, sizes=None,
            ) if report.comm is not None else report
            for report, block in zip(reports, self._blocks, strict=True)
        ]  # fmt: skip
        self._targets.clear()
        self.routers = [router_reports.undone(router, reason) for router in self.routers]
        self.left += [(node, reason) for node in self._lowered_routes]
        agree(left)
        if self.changed:
            self.edits.compile()
        return left

    def not_capturable(self) -> list[NotCapturable]:
        """What keeps the graph as it is now from being captured; nothing where the deployment does not capture."""
        if not may_be_captured(self.deployment):
            return []
        try:
            return not_capturable(self.graph, self._shape_env, self.deployment)
        except Exception:  # as in _guarded: looking must not fail a compile
            log_warning("moe_lowering: looking for what cannot be captured failed")
            return []

    def foreign(self) -> list[ForeignMoe]:
        """MoE layers that are left in the graph and are not written with the generic operators."""
        try:
            return find_foreign(self.graph, self._told, self._not_raised)
        except Exception as error:  # as in _guarded; what could not be looked for is not taken to be absent
            log_warning("moe_lowering: looking for other MoE layers failed")
            return [
                ForeignMoe("graph", "", (), "foreign.not_looked", describe_internal_error(error), "it may hold others")
            ]

    def _check_limits(self, spec: BlockSpec, decision: Decision, emit: Emitter) -> None:
        """Every Ascend node against its limits, from its own arguments and not from the block's record."""
        judged = decision.judgement
        sizes = (share(spec.tokens, spec), share(judged.tokens, spec))
        for node in emit.created:
            violations = call_violations(node, self.deployment, judged.prover, sizes, judged.context)
            if violations:
                texts = "; ".join(f"{{{i}}}" for i in range(len(violations)))
                raise VerificationError(Wording(texts, tuple((str(i), v) for i, v in enumerate(violations))))

    def _enforce(self, block: Block, interval: TokenRange, emit: Emitter) -> None:
        """The graph refuses to run outside of the range that its choice rests on, once per range of one T."""
        if (size_key(block.spec.tokens), interval) not in self._enforced:
            self._emit_assert(block, interval, emit, min(emit.created))

    def _request_guard(self, block: Block, interval: TokenRange) -> None:
        """After the block is rewritten, or left because no size nearby is legal; never for one that was undone."""
        try:
            request_guard(block.spec.tokens, interval)
        except (
            Exception
        ):  # the graph itself refuses sizes outside of its range: without the guard it only recompiles less
            log_warning("moe_lowering: no guard on %s could be requested for %s", interval, block.name)

    def _emit_assert(self, block: Block, interval: TokenRange | None, emit: Emitter, position: Node) -> None:
        with emit.at(position, position):
            emit.call(ASSERT_TOKENS, self._tokens_of(block), *_assert_bounds(interval), **self._declared())

    def _tokens_of(self, block: Block) -> Node:
        """Its x; of a layer that others wrote the one that stays when the layer is left."""
        layer = self.foreign_blocks.get(block.combine)
        return block.x if layer is None else layer.reading(self.replaced).x

    def _declared(self) -> dict[str, int]:
        """The range of T that the deployment declares, if any, for what ``assert_tokens`` says."""
        deployment = self.deployment
        if not deployment.max_tokens:
            return {}
        return {"min_tokens": deployment.min_tokens, "max_tokens": deployment.max_tokens}

    def refuse_to_run(self, block: Block, refused: Refusal) -> None:
        """The others communicate as they decided, so this rank must not run its generic operators beside them."""
        self._refused.append((block, refused))
        self._refusing.add(block.combine)
        x, layer = self._tokens_of(block), self.foreign_blocks.get(block.combine)
        position = block.dispatch if layer is None else layer.first or layer.result
        args = (x, *_assert_bounds(refused.accepted))
        if not any(user.target is ASSERT_TOKENS and user.args == args for user in x.users):
            key = ("refuse", block.spec)
            self._guarded(lambda emit: self._emit_assert(block, refused.accepted, emit, position), key)

    def _refuse_if_ranks_differ(self, block: Block) -> str:
        """After an undone rewrite: what to add to the reason where ranks with another T may have succeeded."""
        if self.deployment.ep_size == 1 or self.deployment.equal_tokens:
            return ""
        text = "; ranks with another T may have lowered it: the graph refuses to run"
        self.refuse_to_run(block, Refusal(make_wording(text)))
        return text

    def _lower_route(self, route: Route) -> None:
        failure = self._guarded(lambda emit: self._rewrite_route(route, emit), (route.spec,))
        if isinstance(failure, Wording):
            self.left.append((route.node, failure.say()))
        else:
            self._lowered_routes.append(route.node)
            self.routers.append(router_reports.lowered(route, self._routes[route.spec]))

    def _judge_route(self, route: Route) -> list[Violation]:
        if route.spec not in self._routes:
            self._routes[route.spec] = judge_route(route.spec, self.deployment)
        return self._routes[route.spec]

    def _rewrite_route(self, route: Route, emit: Emitter) -> None:
        weights, ids = emit_route(route, emit, use_gating=not self._judge_route(route))
        for old, new in ((route.weights, weights), (route.ids, ids)):
            if old is not None:
                same_value(old, new)
        replaced = [(old, new) for old, new in ((route.weights, weights), (route.ids, ids)) if old is not None]
        for old, new in replaced:
            self.edits.replace_uses(old, new)
        self.edits.erase([route.node, *(old for old, _ in replaced)])
        for old, new in replaced:
            self.edits.take_name(new, old)


def _feeds_generic(route: Route) -> bool:
    """Whether the routing belongs to what was left as it was: then it stays too."""
    readers = [user for item in (route.weights, route.ids) if item is not None for user in item.users]
    return bool(generic_nodes(readers))


def _names(tokens: Any) -> Names:
    """The user's names of the symbols of T. They are for people: without them the block is lowered all the same."""
    try:
        return dimension_names(tokens)
    except Exception:  # as in _guarded
        log_warning("moe_lowering: no names could be given to the sizes in %s", tokens)
        return ()


def _assert_bounds(interval: TokenRange | None) -> tuple[int, int]:
    """The bounds of ``assert_tokens`` that accept a range; None is no T at all."""
    return (0, NOTHING) if interval is None else (interval.low, as_argument(interval.high))


def _fake_mode(graph: Graph) -> FakeTensorMode | None:
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    return torch._guards.detect_fake_mode(values)


def describe_internal_error(error: Exception) -> str:
    """What the report says of an error that nobody expected."""
    if isinstance(error, PolicyError):
        return str(error)
    return f"internal error, please report it: {type(error).__name__}: {error}"


def _describe_undo(error: Exception) -> Wording:
    why = error.wording if isinstance(error, VerificationError) else Quoted(str(error))
    return make_wording("rewrite undone: {kind}: {why}", kind=type(error).__name__, why=why)


def log_warning(text: str, *args: Any, trace: bool = True, level: int = logging.WARNING) -> None:
    """Log; with the exception under way, unless ``trace`` is False."""
    with contextlib.suppress(Exception):  # whoever listens must not fail the compile
        log.log(level, text, *args, exc_info=trace)
