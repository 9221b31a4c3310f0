"""``MoeLowering``, the pass: it lowers the MoE blocks of one graph and of the graphs inside of it, in place.

It finds blocks, judges them, chooses an implementation, rewrites, verifies and reports, with one recompile at the end.

Contract (npugraph_ex and torchair hooks): called as ``pass(gm, example_inputs, config)``; edits ``gm`` in place; the
return value is ignored. Running it twice changes nothing the second time. It never makes a compile fail that would have
worked without it: a block that cannot be lowered, or whose rewrite fails verification, is left as it was and reported.
In strict mode it raises ``LoweringError`` instead. After any exception, Ctrl-C too, the whole graph is as it was
(``edit_log``). A deployment that contradicts this process's groups (another rank's, say) is a ``ValueError`` in every
mode: its graph would be wrong in silence.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import time
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from moe_lowering import _versions
from moe_lowering.argument_checks import require_choice, require_flag, require_instance
from moe_lowering.deployment import Deployment
from moe_lowering.passes.capturability import is_captured
from moe_lowering.passes.costs.cost_model import Cost
from moe_lowering.passes.find_blocks import module_path
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.passes.policy import NONE_LEGAL, Policy
from moe_lowering.passes.run.graph_run import GraphRun
from moe_lowering.passes.run.messages import describe_internal_error, log_warning
from moe_lowering.passes.run.subgraphs import Subgraph, computed_inputs, find_subgraphs
from moe_lowering.passes.trace_artifacts import readable_graph, write_artifacts
from moe_lowering.passes.verifier import (
    generic_nodes,
    repropagate,
)
from moe_lowering.report.records import BlockReport, LoweringReport
from moe_lowering.stray_output import silence_torch_npu
from moe_lowering.vocabulary import RAISE_FOREIGN

log = logging.getLogger(__name__)


class LoweringError(RuntimeError):
    """Strict mode: a block was left unlowered, or the graph cannot be captured. The message names each place and why."""

    def __init__(self, message: str = "") -> None:
        # npugraph_ex makes it anew of the message, this file's traceback, in which the message stands again, and its own code
        text, _, rest = message.partition("\nTraceback (most recent call last):\n")
        super().__init__(text + rest.rpartition(text)[2] if text and text in rest else message)


class MoeLowering:
    """The pass: it finds the MoE blocks of a graph, and lowers what is legal.

    One instance serves many graphs; it keeps the report of each.

    Args:
        deployment: what the pass may assume; see ``Deployment``.
        comm: ``auto``, or the only implementation to use: ``allgather``, ``alltoall``, ``mc2`` or ``fused_mc2``.
        strict: raise instead of leaving a block alone or giving a graph that cannot be captured to a backend that
            captures, and re-propagate fake tensors through the whole graph.
        policy: how ``auto`` chooses: ``auto`` (cheapest), ``vllm_ascend_0_13`` or ``vllm_ascend_main``. ``fixed`` goes with
            a ``comm`` that is a name, and says the same.
        cost: (implementation, ``passes.costs.cost_model.Load``) to estimated microseconds, in place of the prices of
            ``passes.costs.price``. It must give the same figures on every rank.
        overlap: move the shared expert of each block to a side stream where the graph has stream scopes, which is inside
            npugraph_ex; see ``passes.overlap``. The report's notes say what overlaps, or why not.
        raise_foreign: what is done with MoE layers that are written with other operators than the generic ones, in a
            form that is known (docs/raising.md): ``auto`` raises and lowers them, ``report`` names them, ``off``
            does not look for them.

    Attributes:
        reports: one ``LoweringReport`` per graph seen, in order.

    Raises:
        ValueError: an argument that is not accepted, with its value and what is; here and when it is called, a deployment
            that contradicts its process groups.
    """

    def __init__(
        self,
        deployment: Deployment,
        comm: str = "auto",
        strict: bool = False,
        policy: str = "auto",
        cost: Cost | None = None,
        overlap: bool = False,
        raise_foreign: str = RAISE_FOREIGN[0],
    ) -> None:
        require_instance("MoeLowering", "deployment", deployment, Deployment, "a moe_lowering.Deployment")
        require_flag("MoeLowering", "strict", strict)
        require_flag("MoeLowering", "overlap", overlap)
        require_choice("MoeLowering", "raise_foreign", raise_foreign, RAISE_FOREIGN)
        _versions.warn_if_untested()
        self.deployment = deployment.placed()
        self.overlap = overlap
        self.policy = Policy(comm, policy, cost)
        self.strict = strict
        self.raise_foreign = raise_foreign
        self.reports: list[LoweringReport] = []

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Any = None,
        config: Any = None,
        agreement_timeout: float | str | None = "auto",
    ) -> None:
        """Lower the MoE blocks of a graph in place, and append its report to ``reports``.

        Args:
            gm: a graph of ATen, torch_npu and generic operators, with fake values in ``meta["val"]``.
            example_inputs, config: what a pass of npugraph_ex gets; the inputs are not read.
            agreement_timeout: as for ``npugraph_ex_options``; None puts no check of the other ranks in the graph.

        Raises:
            LoweringError: strict mode, see there; the graph is as it was.
            ValueError: the deployment contradicts its process groups.
        """
        # A graph for another rank's place would be wrong in silence, so that the compile fails in every mode
        self.deployment.placed()
        silence_torch_npu()
        graph_before, count = readable_graph(gm), len(self.reports)
        runs = [GraphRun(gm, self.deployment, self.policy, None, self.raise_foreign)]
        subgraphs, missed = self._find_subgraphs(gm)
        runs += [GraphRun(sub.gm, self.deployment, self.policy, sub, self.raise_foreign) for sub in subgraphs]
        with _collector_paused():
            try:
                with computed_inputs(gm, subgraphs):
                    self._lower(gm, runs, config, agreement_timeout, missed)
            except BaseException:
                for run in reversed(runs):
                    run.edits.undo()
                raise
            finally:
                if len(self.reports) > count:  # strict mode's error too: the report says why
                    write_artifacts(graph_before, gm, self.reports[-1])
                for run in runs:
                    run.end()

    def _find_subgraphs(self, gm: GraphModule) -> tuple[list[Subgraph], list[tuple[str, str]]]:
        """The graphs inside of a graph; where looking fails, what the report says of it: it must not fail a compile."""
        try:
            return find_subgraphs(gm, self.deployment), []
        except Exception as error:
            log_warning("moe_lowering: looking for graphs inside of the graph failed")
            return [], [
                (
                    "graph",
                    f"[subgraph.not_looked] graphs inside of it were not looked at: {describe_internal_error(error)}",
                )
            ]

    def _lower(
        self,
        gm: GraphModule,
        runs: list[GraphRun],
        config: Any,
        agreement_timeout: float | str | None,
        missed: list[tuple[str, str]],
    ) -> None:
        start = time.perf_counter()
        blocks: list[BlockReport] = []

        def agree(run: GraphRun, reports: list[BlockReport]) -> None:
            if agreement_timeout is not None:
                run.check_agreement(reports, self, agreement_timeout)

        for run in runs:
            reports = run.lower()
            agree(run, reports)
            if self.overlap and run.inside is None:
                reports = run.overlap(reports, config)
            blocks += [*run.finish(reports, functools.partial(agree, run)), *run.foreign.untouched]
        findings = [finding for run in runs for finding in run.not_capturable()]
        foreign = [layer for run in runs for layer in run.foreign.remaining()]
        report = LoweringReport(
            blocks=tuple(blocks),
            unrecognised=(*((module_path(node), reason) for run in runs for node, reason in run.left), *missed),
            nodes_before=sum(run.nodes_before for run in runs),
            nodes_after=sum(len(run.graph.nodes) for run in runs),
            pass_ms=(time.perf_counter() - start) * 1e3,
            not_capturable=tuple(findings),
            deployment=self.deployment,
            detected=self.deployment.detected,
            foreign=tuple(foreign),
            routers=tuple(router for run in runs for router in run.routes.reports),
        )
        self.reports.append(report)
        captured = is_captured(self.deployment, config)
        _log(report, captured)
        if self.strict:
            _require_lowered(report, [node for run in runs for node in generic_nodes(run.graph.nodes)])
            if captured:
                _require_capturable(report)
            for run in runs:
                repropagate(run.gm)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector: what the pass makes is kept or let go of by its end, and one full collection takes 190 ms
    with torch_npu loaded."""
    enabled = gc.isenabled()
    try:
        gc.disable()  # within: Ctrl-C is raised where a call returns
        yield
    finally:
        if enabled:
            gc.enable()


def _require_lowered(report: LoweringReport, remaining: list[Node]) -> None:
    left = [block for block in report.blocks if block.comm is None]
    lines = [f"{block.name}: {block.reason}" for block in left]
    lines += dict.fromkeys(rule for block in left for rule in _broken_rules(block))
    lines += [f"{where}: {why}" for where, why in report.unlowered]
    if not lines:
        lines = [f"{node.name}: {operator_name(node)} is still in the graph" for node in remaining]
    if lines:
        raise LoweringError("moe_lowering (strict): left unlowered:\n  " + "\n  ".join(lines))


def _broken_rules(block: BlockReport) -> list[str]:
    """The rules that left a block unlowered, in sentences, each once: those that its reason names; all where it names none."""
    broken = [(verdict.implementation, rule) for verdict in block.verdicts.values() for rule in verdict.violations]
    named = [each for each in broken if each[1].code in block.reason]
    refused: dict[str, list[str]] = {}
    for name, rule in named or broken:
        refused.setdefault(f"{rule} ({rule.advice})" if rule.advice else str(rule), []).append(name)
    return [f"not {', '.join(dict.fromkeys(names))}: {text}" for text, names in refused.items()]


def _codes_of_none(block: BlockReport) -> str:
    """Where no implementation is legal: the codes that break all of them, or else the first of each."""
    if not block.reason.endswith(NONE_LEGAL):
        return ""
    codes = [[violation.code for violation in verdict.violations] for verdict in block.verdicts.values()]
    shared = [code for code in next(iter(codes), []) if all(code in each for each in codes)]
    named = dict.fromkeys(shared or [each[0] for each in codes if each])
    return f": [{', '.join(named)}]" if named else ""


def _require_capturable(report: LoweringReport) -> None:
    if report.not_capturable:
        lines = "\n  ".join(str(finding) for finding in report.not_capturable)
        raise LoweringError(f"moe_lowering (strict): cannot be captured:\n  {lines}")


def _log(report: LoweringReport, captured: bool) -> None:
    for block in report.blocks:
        if block.comm is None:
            reason = block.reason + _codes_of_none(block)
            log_warning("moe_lowering: %s left as it was: %s", block.name, reason, trace=False)
        else:
            log_warning(
                "moe_lowering: %s is %s: %s", block.name, block.comm, block.reason, trace=False, level=logging.INFO
            )
    for where, why in report.unlowered:
        log_warning("moe_lowering: not recognised as an MoE block: %s: %s", where, why, trace=False)
    # Without a capture, findings only tell what one on an NPU would refuse
    level = logging.WARNING if captured else logging.INFO
    for finding in report.not_capturable:
        log_warning("moe_lowering: cannot be captured: %s", finding, trace=False, level=level)
    if report.blocks:
        text = "moe_lowering: the pass took %.1f ms; MoE blocks: %d"
        log_warning(text, report.pass_ms, len(report.blocks), trace=False, level=logging.INFO)
