"""The pass: raise, judge, choose, rewrite, verify, report, on one graph, in place, with one recompile.

Contract (npugraph_ex and torchair hooks): called as ``pass(gm, example_inputs, config)``; edits ``gm`` in place; the
return value is ignored. Running it twice changes nothing the second time. It never makes a compile fail that would have
worked without it: a block that cannot be lowered, or whose rewrite fails verification, is left as it was and reported.
In strict mode it raises ``LoweringError`` instead, before or after having edited nothing of that block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import operator
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Violation
from moe_lowering.passes.agreement_check import Outcome, blocks_record, emit_check, first_exchange, settings_record
from moe_lowering.passes.blocks import Block, BlockSpec, Route, RouteSpec, size_key
from moe_lowering.passes.capturing import is_captured, may_be_captured, not_capturable
from moe_lowering.passes.choosing import Cost, Policy, PolicyError
from moe_lowering.passes.costs import estimate
from moe_lowering.passes.deciding import Decision, decide
from moe_lowering.passes.emitting import Emitter, Recording, erase
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.implementations.tensor_parallel import share
from moe_lowering.passes.judging import Refusal, refusal
from moe_lowering.passes.naming import dimension_names, in_users_words
from moe_lowering.passes.overlap import Target, overlap
from moe_lowering.passes.raising import find_blocks, place
from moe_lowering.passes.routing import emit_route, judge_route
from moe_lowering.passes.token_ranges import TokenRange, request_guard
from moe_lowering.passes.verifying import (
    VerificationError,
    call_violations,
    defined_before_readers,
    generic_nodes,
    repropagate,
    same_value,
)
from moe_lowering.report.records import BlockReport, LoweringReport, NotCapturable

log = logging.getLogger(__name__)
ASSERT_TOKENS = torch.ops.moe_lowering.assert_tokens.default


class LoweringError(RuntimeError):
    """Strict mode: a block was left unlowered, or the graph cannot be captured. The message names each place and why."""


class MoeLowering:
    """The pass object. One instance serves many graphs; it keeps the report of each.

    Args:
        deployment: what the pass may assume; see ``Deployment``.
        comm: ``auto``, or the name of the only implementation to use.
        strict: raise instead of leaving a block alone or giving a graph that cannot be captured to a backend that
            captures, and re-propagate fake tensors through the whole graph.
        policy: how ``auto`` chooses: ``auto`` (cheapest), ``vllm_ascend_0_13`` or ``vllm_ascend_main``.
        cost: estimated microseconds of an implementation under a ``costs.Load``, in place of the built-in model. It must
            give the same figures on every rank.
        overlap: move the shared expert of each block to a side stream where the graph has stream scopes, which is inside
            npugraph_ex; see ``passes.overlap``. The report's notes say what overlaps, or why not.

    Attributes:
        reports: one ``LoweringReport`` per graph seen, in order.

    Raises:
        ValueError: for an unknown ``comm`` or ``policy``.
    """

    def __init__(
        self,
        deployment: Deployment,
        comm: str = "auto",
        strict: bool = False,
        policy: str = "auto",
        cost: Cost = estimate,
        overlap: bool = False,
    ) -> None:
        self.deployment = deployment
        self.overlap = overlap
        self.policy = Policy(comm, policy, cost)
        self.strict = strict
        self.reports: list[LoweringReport] = []

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Any = None,
        config: Any = None,
        agreement_timeout: float | str | None = "auto",
    ) -> None:
        """``agreement_timeout``: as for ``npugraph_ex_options``; None puts no check of the other ranks in the graph."""
        start = time.perf_counter()
        run = _Run(gm, self.deployment, self.policy)
        with _collector_paused():
            blocks = run.lower()
            if agreement_timeout is not None:
                run.check_agreement(blocks, self, agreement_timeout)
            if self.overlap:
                blocks = run.overlap(blocks, config)
            if run.changed:
                gm.graph.lint()
                gm.recompile()
            findings = run.not_capturable()
        report = LoweringReport(
            blocks=tuple(blocks),
            unrecognised=tuple((place(node), reason) for node, reason in run.left),
            nodes_before=run.nodes_before,
            nodes_after=len(gm.graph.nodes),
            pass_ms=(time.perf_counter() - start) * 1e3,
            not_capturable=tuple(findings),
        )
        self.reports.append(report)
        captured = is_captured(self.deployment, config)
        _log(report, captured)
        if self.strict:
            _require_lowered(report, generic_nodes(gm.graph.nodes))
            if captured:
                _require_capturable(report)
            repropagate(gm)


class _Run:
    """One run over one graph: the caches of what equal blocks share, and the log of what was done."""

    def __init__(self, gm: GraphModule, deployment: Deployment, policy: Policy) -> None:
        self.graph: Graph = gm.graph
        self.deployment = deployment
        self.policy = policy
        self.nodes_before = len(self.graph.nodes)
        self.changed = False
        self._failed = False
        self.left: list[tuple[Node, str]] = []
        self._decisions: dict[BlockSpec, Decision] = {}
        self._recordings: dict[tuple[Any, ...], Recording] = {}
        self._routes: dict[RouteSpec, list[Violation]] = {}
        self._enforced: set[Any] = set()
        self._said: dict[tuple[BlockSpec, str], BlockReport] = {}
        self._blocks: list[Block] = []
        self._targets: dict[Node, Target] = {}  # by the erased combine
        self._refusing: set[Node] = set()  # combines of blocks for whose sake the graph refuses to run
        self._first_exchange: tuple[Node, dict[str, Any]] | None = None
        self._shape_env: Any = None

    def lower(self) -> list[BlockReport]:
        fake_mode = _fake_mode(self.graph)
        if fake_mode is None:  # not a graph of torch.compile
            reason = "the graph has no fake values (meta['val']): nothing can be proven"
            self.left = [(node, reason) for node in generic_nodes(self.graph.nodes)]
            return []
        self.fake_mode, self._shape_env = fake_mode, fake_mode.shape_env
        try:
            blocks, routes, self.left = find_blocks(self.graph)
        except Exception as error:  # as in _guarded: nothing was edited yet
            log.warning("moe_lowering: looking for blocks failed, the graph is left as it was", exc_info=True)
            self.left = [(node, _internal(error)) for node in generic_nodes(self.graph.nodes)]
            return []
        self._blocks = blocks
        self._first_exchange = first_exchange(self.graph)
        reports = [self._lower_or_leave(block) for block in blocks]
        for route in routes:
            if not _feeds_generic(route):
                self._lower_route(route)
        return reports

    def _lower_or_leave(self, block: Block) -> BlockReport:
        try:
            return self._lower_block(block)
        except Exception as error:  # as in _guarded, which undoes edits: here deciding failed
            log.warning("moe_lowering: deciding failed, %s left as it was", block.name, exc_info=not self._failed)
            self._failed = True  # equal blocks fail alike: one traceback is enough
            before = tuple(_op_name(n) for n in block.stages)
            return BlockReport(block.name, None, _internal(error), before, before, {})

    def _lower_block(self, block: Block) -> BlockReport:
        before = tuple(_op_name(n) for n in block.stages)
        decision = self._decisions.get(block.spec)
        if decision is None:
            decision = self._decisions[block.spec] = decide(block.spec, self.deployment, self.policy)
        comm, reason, after = decision.comm, decision.reason, before
        refused = refusal(block.spec, self.deployment) if comm is not None else None
        if refused is not None:
            comm, reason = None, refused.reason
            self._refuse_to_run(block, refused)
        if comm is not None:
            chosen = comm
            done = self._guarded(lambda emit: self._rewrite(block, chosen, decision, emit), (chosen, block.spec))
            if isinstance(done, str):
                comm, reason = None, done
                if self.deployment.ep_size > 1 and not self.deployment.equal_tokens:
                    reason += "; ranks with another T may have lowered it: the graph refuses to run"
                    self._refuse_to_run(block, Refusal(0, -1, reason))
            else:
                after = tuple(_op_name(n) for n in sorted(done) if n.target is not operator.getitem)
                self._enforced.add((size_key(block.spec.tokens), decision.enforced))
        if decision.guard is not None and comm == decision.comm:
            self._request_guard(block, decision.guard)
        report = BlockReport(
            block.name, comm, reason, before, after, decision.judgement.verdicts, decision.notes,
            enforced=str(decision.enforced or "") if comm is not None else "",
            sizes=decision.sizes if comm is not None else None,
        )  # fmt: skip
        if isinstance(block.spec.tokens, int):  # then T is a number, or the declared one, which is named T
            return report
        said = self._said.get((block.spec, reason))
        if said is None:
            said = self._said[block.spec, reason] = _in_users_words(report, block.spec.tokens)
        return dataclasses.replace(said, name=block.name, ops_before=before, ops_after=after)

    def _guarded(self, rewrite: Callable[[Emitter], None], key: tuple[Any, ...]) -> list[Node] | str:
        """Run one rewrite; the nodes it created, or why it was undone."""
        assert self.fake_mode is not None  # lower() returns before
        emit = Emitter(self.graph, self.fake_mode, self._recordings.get(key))
        try:
            rewrite(emit)
        except Exception as error:  # a defect of ours must not fail the user's compile: undo this block, and say so
            emit.undo()
            if not isinstance(error, VerificationError):
                log.warning("moe_lowering: rewriting failed, block left as it was", exc_info=True)
            return f"rewrite undone: {type(error).__name__}: {error}"
        self._recordings.setdefault(key, emit.recording)
        self.changed = True
        return emit.created

    def _rewrite(self, block: Block, comm: str, decision: Decision, emit: Emitter) -> None:
        first = (comm, block.spec) not in self._recordings
        form = IMPLEMENTATIONS[comm].form(decision.judgement.form(comm), self.deployment)
        replacement = form.emit(block, emit, self.deployment, decision.judgement.quantities)
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
        block.combine.replace_all_uses_with(replacement.y)
        if block.counts is not None and replacement.counts is not None:
            block.counts.replace_all_uses_with(replacement.counts, delete_user_cb=lambda user: user is not block.mlp)
        erase(self.graph, block.interior)
        self._targets[block.combine] = Target(comm, emit.created, replacement.y)

    def check_agreement(self, reports: list[BlockReport], lowering: MoeLowering, timeout: float | str) -> None:
        """After ``lower``: the graph compares with the other ranks' before its first exchange."""
        first = self._first_exchange
        if first is None:
            return
        try:
            settings = settings_record(self.deployment, lowering, ep_group=True)
            outcomes = [self._outcome(*each) for each in zip(self._blocks, reports, strict=True)]
            blocks = blocks_record(outcomes, [node for node, _ in self.left], self.deployment)
            emit_check(self.graph, first, self.deployment.ep_group, timeout, settings, blocks)
            self.changed = True
        except Exception:  # as in _guarded: a defect of ours must not fail the user's compile
            if lowering.strict:
                raise
            log.warning("moe_lowering: the graph does not compare itself with the other ranks'", exc_info=True)

    def _outcome(self, block: Block, report: BlockReport) -> Outcome:
        target = self._targets.get(block.combine)
        created = [] if target is None else target.nodes
        return Outcome(block, report, created, block.combine in self._refusing)

    def overlap(self, reports: list[BlockReport], config: Any) -> list[BlockReport]:
        """After ``lower``: shared experts to a side stream, and the reports with what came of it."""
        targets = [self._targets.get(block.combine) for block in self._blocks]
        found = iter(overlap(self.graph, [t for t in targets if t is not None], self.deployment, config))
        return [
            report if target is None else dataclasses.replace(report, notes=(*report.notes, next(found)))
            for report, target in zip(reports, targets, strict=True)
        ]

    def not_capturable(self) -> list[NotCapturable]:
        """What keeps the graph as it is now from being captured; nothing where the deployment does not capture."""
        if not may_be_captured(self.deployment):
            return []
        try:
            return not_capturable(self.graph, self._shape_env, self.deployment)
        except Exception:  # as in _guarded: looking must not fail a compile
            log.warning("moe_lowering: looking for what cannot be captured failed", exc_info=True)
            return []

    def _check_limits(self, spec: BlockSpec, decision: Decision, emit: Emitter) -> None:
        """Every Ascend node against its limits, from its own arguments and not from the block's record."""
        judged = decision.judgement
        sizes = (share(spec.tokens, spec), share(judged.tokens, spec))
        for node in emit.created:
            violations = call_violations(node, self.deployment, judged.prover, sizes, judged.quantities["received"])
            if violations:
                raise VerificationError("; ".join(str(v) for v in violations))

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
            log.warning("moe_lowering: no guard on %s could be requested for %s", interval, block.name, exc_info=True)

    def _emit_assert(self, block: Block, interval: TokenRange, emit: Emitter, position: Node) -> None:
        high = sys.maxsize if interval.high is None else interval.high
        with emit.at(position, block.dispatch):
            emit.call(ASSERT_TOKENS, block.x, interval.low, high)

    def _refuse_to_run(self, block: Block, refused: Refusal) -> None:
        """The others communicate as they decided, so this rank must not run its generic operators beside them."""
        self._refusing.add(block.combine)
        args = (block.x, refused.low, refused.high)
        if not any(user.target is ASSERT_TOKENS and user.args == args for user in block.x.users):
            interval = TokenRange(refused.low, refused.high)
            key = ("refuse", block.spec)
            self._guarded(lambda emit: self._emit_assert(block, interval, emit, block.dispatch), key)

    def _lower_route(self, route: Route) -> None:
        failure = self._guarded(lambda emit: self._rewrite_route(route, emit), (route.spec,))
        if isinstance(failure, str):
            self.left.append((route.node, failure))

    def _rewrite_route(self, route: Route, emit: Emitter) -> None:
        violations = self._routes.get(route.spec)
        if violations is None:
            violations = self._routes[route.spec] = judge_route(route.spec, self.deployment)
        weights, ids = emit_route(route, emit, use_gating=not violations)
        for old, new in ((route.weights, weights), (route.ids, ids)):
            if old is not None:
                same_value(old, new)
        for old, new in ((route.weights, weights), (route.ids, ids)):
            if old is not None:
                old.replace_all_uses_with(new)
        erase(self.graph, [n for n in (route.weights, route.ids, route.node) if n is not None])


def _feeds_generic(route: Route) -> bool:
    """Whether the routing belongs to what was left as it was: then it stays too."""
    readers = [user for item in (route.weights, route.ids) if item is not None for user in item.users]
    return bool(generic_nodes(readers))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile: what the pass makes stays, and a full one takes 190 ms with torch_npu loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _in_users_words(report: BlockReport, tokens: Any) -> BlockReport:
    """Names are for people: without them the block is lowered all the same."""
    try:
        return in_users_words(report, dimension_names(tokens))
    except Exception:  # as in _guarded
        log.warning("moe_lowering: no names could be given to the sizes of %s", report.name, exc_info=True)
        return report


def _fake_mode(graph: Graph) -> FakeTensorMode | None:
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    return torch._guards.detect_fake_mode(values)


def _internal(error: Exception) -> str:
    if isinstance(error, PolicyError):
        return str(error)
    return f"internal error, please report it: {type(error).__name__}: {error}"


def _op_name(node: Node) -> str:
    return _name(node.target)


@functools.lru_cache(maxsize=1024)
def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    return getattr(target, "__name__", str(target))


def _require_lowered(report: LoweringReport, remaining: list[Node]) -> None:
    lines = [f"{b.name}: {b.reason}" for b in report.blocks if b.comm is None]
    lines += [f"{where}: {why}" for where, why in report.unrecognised]
    if not lines:
        lines = [f"{node.name}: {_op_name(node)} is still in the graph" for node in remaining]
    if lines:
        raise LoweringError("moe_lowering (strict): left unlowered:\n  " + "\n  ".join(lines))


def _require_capturable(report: LoweringReport) -> None:
    if report.not_capturable:
        lines = "\n  ".join(str(finding) for finding in report.not_capturable)
        raise LoweringError(f"moe_lowering (strict): cannot be captured:\n  {lines}")


def _log(report: LoweringReport, captured: bool) -> None:
    for block in report.blocks:
        if block.comm is None:
            log.warning("moe_lowering: %s left as it was: %s", block.name, block.reason)
    for where, why in report.unrecognised:
        log.warning("moe_lowering: %s not recognised: %s", where, why)
    for finding in report.not_capturable:  # without captures it only says what an NPU would refuse
        log.log(logging.WARNING if captured else logging.INFO, "moe_lowering: cannot be captured: %s", finding)
    if report.blocks:
        log.info("moe_lowering: %d blocks, pass took %.1f ms", len(report.blocks), report.pass_ms)
