"""What must hold of a graph of ``graph_cases`` after the pass, found without running it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import sympy
import torch
from graph_build import Built, build, text
from graph_cases import FOREIGN, GraphCase
from torch.fx import Graph, Node

from moe_lowering import MoeLowering
from moe_lowering.limits import Prover
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.find_blocks import find_blocks
from moe_lowering.passes.graph.scopes import scope_paths
from moe_lowering.passes.implementations.tensor_parallel import tokens_per_rank
from moe_lowering.passes.legality import declared_tokens, judge, outside_declared_range
from moe_lowering.passes.token_ranges import SEARCH_LIMIT, TokenRange, known_range, prover_for
from moe_lowering.passes.verifier import call_violations, generic_nodes, is_ascend, repropagate
from moe_lowering.report.records import BlockReport, LoweringReport

assert_tokens = torch.ops.moe_lowering.assert_tokens.default
assert_agreement = torch.ops.moe_lowering.assert_agreement.default


@dataclasses.dataclass
class Lowered:
    """A case after the pass, and what is needed of the graph before it."""

    case: GraphCase
    built: Built
    report: LoweringReport
    specs: dict[str, BlockSpec]
    known: dict[str, TokenRange]
    before: dict[str, list[Line]]
    whole_before: list[Line]
    scopes: dict[str, tuple[str, ...]]

    @property
    def comms(self) -> dict[str, str | None]:
        return {block.name: block.comm for block in self.report.blocks}


def module_of(node: Node) -> str:
    return next(iter(node.meta.get("nn_module_stack") or {"": ""}))


class Line:
    """A node as text, made when it is asked for: a size that was fixed meanwhile is a number then, before and after."""

    def __init__(self, node: Node) -> None:
        self._parts = (node.name, node.target, node.args, node.kwargs)

    def __str__(self) -> str:
        return "{} {} {} {}".format(*self._parts)

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Line) and str(self) == str(other)


def lines(graph: Graph) -> list[Line]:
    return [Line(node) for node in graph.nodes]


def by_module(graph: Graph) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            found.setdefault(module_of(node), []).append(Line(node))
    return found


def lower(case: GraphCase, built: Built | None = None) -> Lowered:
    """Build the graph of a case, unless it is given, and run the pass on it."""
    built = built or build(case)
    graph = built.gm.graph
    before, whole = by_module(graph), without_agreement(lines(graph))
    blocks, _, _ = find_blocks(graph)
    paths = scope_paths(graph)
    specs = {block.name: block.spec for block in blocks}
    known = {name: known_range(spec.tokens) for name, spec in specs.items()}
    scopes = {block.name: paths.get(block.combine, ()) for block in blocks}
    guards = len(built.env.guards) if built.env else 0
    lowering = MoeLowering(case.deployment, case.comm, policy=case.policy)
    lowering(built.gm)
    if built.env and (case.sizes == "strict" or case.deployment.guards == "forbid" or not case.deployment.equal_tokens):
        narrowing = [str(g.expr) for g in built.env.guards[guards:] if narrows(g.expr, case)]
        assert not narrowing, f"guards: {narrowing}"
    return Lowered(case, built, lowering.reports[-1], specs, known, before, whole, scopes)


SIZES = (2, 3, 4, 5, 7, 8, 9, 16, 31, 64, 257, 512, 513, 4096, 2**24)


def narrows(guard: sympy.Basic, case: GraphCase) -> bool:
    """Whether a guard excludes some T of the declared range; what torch_npu's meta functions add excludes none."""
    bound = case.deployment.max_tokens
    tp = max([case.deployment.tp_size, *(dict(block.arguments).get("tp_size", 1) for block in case.blocks)])
    low = 2
    if tp > 1 and case.sizes != "strict":  # torch's own, for a share of T that may be 1: else one more graph
        if math.prod(case.lead) <= tp or (isinstance(guard, sympy.Ne | sympy.Eq) and guard.rhs == 1):
            return False
        low = tp + 1
    high = bound or case.bounds[1] or SIZES[-1]
    named = [int(number) for number in guard.atoms(sympy.Integer)]
    sizes = sorted({low, high, *(size for size in (*SIZES, *named) if low <= size <= high)})
    symbols = sorted(guard.free_symbols, key=str)
    static = math.prod(n for n, symbolic in zip(case.lead, case.symbolic, strict=True) if not symbolic)
    points = (p for p in itertools.product(sizes, repeat=len(symbols)) if not bound or math.prod(p) * static <= bound)
    return not all(guard.subs(dict(zip(symbols, point, strict=True))) for point in points)


def check_judged(case: GraphCase) -> set[str]:
    """Lower a case and check the graph; the outcomes of its blocks."""
    lowered = lower(case)
    lowered.built.gm.graph.lint()
    check_accounted_for(lowered)
    check_refused(lowered)
    for index, block in enumerate(case.blocks):
        assert not set(block.odd) & set(FOREIGN) or not lowered.comms.get(f"layers.{index}"), f"{block.odd} was lowered"
    for report in lowered.report.blocks:
        if report.comm is not None:
            check_replaced(lowered, report)
            check_range(lowered, report)
    if any(lowered.comms.values()):
        check_unshared(lowered)
    check_twice(lowered)
    if case.seed % 2:  # slow, and so for a half of the cases each
        check_propagation(lowered)
    else:
        check_other_rank(lowered)
    return outcomes(lowered)


def outcomes(lowered: Lowered) -> set[str]:
    """What is counted of a case: what its blocks may be, what they became, and what kept them from it."""
    found = {"not recognised"} if lowered.report.unrecognised else set()
    for block in lowered.report.blocks:
        found |= {f"{comm} legal" for comm, verdict in block.verdicts.items() if verdict.legal}
        undone = "rewrite undone" in block.reason
        found.add(f"{block.comm} lowered" if block.comm else "undone" if undone else "illegal, left as it was")
    return found


def check_refused(lowered: Lowered) -> None:
    """What was not lowered is as it was."""
    graph, report = lowered.built.gm.graph, lowered.report
    after = by_module(graph)
    for block in report.blocks:
        if block.comm is None:
            check_untouched(lowered, block, after)
    for name, why in report.unrecognised:
        assert "internal error" not in why and "undone" not in why, why
        place = name if name.startswith("layers.") else f"layers.{name}"
        now = without_agreement(after.get(place, []))
        assert now == lowered.before.get(place, []), f"{name} was not recognised, and changed"
    if not any(lowered.comms.values()):
        now = without_refusals(lowered, lines(graph))
        assert now == lowered.whole_before, "nothing was lowered, and the graph changed"


def check_accounted_for(lowered: Lowered) -> None:
    """Every generic operator that is left has a reason in the report."""
    told = {block.name for block in lowered.report.blocks if block.comm is None}
    told |= {name for name, _ in lowered.report.unrecognised}
    left = {module_of(node) for node in generic_nodes(lowered.built.gm.graph.nodes)}
    assert left <= told, f"left without a word: {sorted(left - told)}"


def without_agreement(lines: list[Line]) -> list[Line]:
    """The text without the operator that compares ranks, whatever became of the blocks."""
    return [line for line in lines if str(assert_agreement) not in str(line)]


def without_refusals(lowered: Lowered, lines: list[Line]) -> list[Line]:
    """The text without the assertions that stop a rank whose T the deployment rules out, or whose rewrite was undone."""
    allowed = any(outside_declared_range(spec.tokens, lowered.case.deployment) for spec in lowered.specs.values())
    allowed |= any("the graph refuses to run" in block.reason for block in lowered.report.blocks)
    lines = without_agreement(lines)
    return [line for line in lines if not (allowed and str(assert_tokens) in str(line))]


def check_untouched(lowered: Lowered, block: BlockReport, after: dict[str, list[Line]]) -> None:
    now = without_refusals(lowered, after[block.name])
    assert now == lowered.before[block.name], f"{block.name} was refused ({block.reason}), and changed"
    assert "internal error" not in block.reason and "undone" not in block.reason, block.reason


def check_replaced(lowered: Lowered, block: BlockReport) -> None:
    """No generic operator of the block is left, its limits hold from the calls themselves, scopes are as they were."""
    case, graph = lowered.case, lowered.built.gm.graph
    own = [node for node in graph.nodes if module_of(node) == block.name]
    assert not generic_nodes(own), f"{block.name}: generic operators are left"
    assert block.verdicts[block.comm].legal, f"{block.name}: {block.comm} was chosen and is not legal"
    spec, paths = lowered.specs[block.name], scope_paths(graph)
    tokens, prover = None, None
    if not case.deployment.equal_tokens:
        tokens = (tokens_per_rank(spec.tokens, spec), tokens_per_rank(declared_tokens(case.deployment), spec))
    elif not isinstance(spec.tokens, int):
        prover = prover_for(spec.tokens, accepted_range(lowered, block))
    for node in own:
        if isinstance(node.target, torch._ops.OpOverload) and is_ascend(node.target):
            assert not (found := call_violations(node, case.deployment, prover, tokens)), found
            if "gating" not in str(node.target):
                assert paths.get(node, ()) == lowered.scopes[block.name], f"{node} is in another scope than its block"


def accepted_range(lowered: Lowered, block: BlockReport) -> TokenRange:
    """The values of T with which the lowered graph runs the block: what it knew, and what it asserts."""
    known = lowered.known[block.name]
    low, high = known.low, known.high
    for node in lowered.built.gm.graph.find_nodes(op="call_function", target=assert_tokens):
        low = max(low, node.args[1])
        high = node.args[2] if high is None else min(high, node.args[2])
    return TokenRange(low, high)


def check_range(lowered: Lowered, block: BlockReport) -> None:
    """Whatever T the lowered graph accepts, the implementation is legal for it."""
    deployment, spec = lowered.case.deployment, lowered.specs[block.name]
    if not deployment.equal_tokens or isinstance(spec.tokens, int):
        return
    interval = accepted_range(lowered, block)
    assert not interval.empty
    high = min(SEARCH_LIMIT if interval.high is None else interval.high, SEARCH_LIMIT)
    for tokens in {interval.low, high, (interval.low + high) // 2, min(high, interval.low + 1)}:
        verdict = judge(spec, deployment, tokens, Prover()).verdicts[block.comm]
        codes = [v.code for v in verdict.violations if v.code != "fused.receive_bound"]
        assert not codes, f"{block.name}: {block.comm} runs with T = {tokens}, illegal: {codes}"


def check_propagation(lowered: Lowered) -> None:
    """Metadata is what propagation gives."""
    if any(lowered.comms.values()) and not any(
        "no_value" in block.odd or "quantised" in block.odd for block in lowered.case.blocks
    ):
        repropagate(lowered.built.gm)


def check_unshared(lowered: Lowered) -> None:
    """No value is shared between two nodes."""
    owners: dict[int, Node] = {}
    for node in lowered.built.gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            owner = owners.setdefault(id(value), node)
            assert owner is node or owner.args == node.args, f"{node} and {owner} share one value"


def check_twice(lowered: Lowered) -> None:
    case, before = lowered.case, text(lowered.built.gm.graph)
    again = MoeLowering(case.deployment, case.comm, policy=case.policy)
    again(lowered.built.gm)
    assert text(lowered.built.gm.graph) == before, "a second run of the pass changes the graph"


def check_other_rank(lowered: Lowered) -> None:
    """Another rank, with another T where the deployment allows that, decides the same."""
    case, d = lowered.case, lowered.case.deployment
    if case.sizes == "unbacked":
        return  # on every rank alike, and not what a static graph is
    other = case.replace(deployment=d.replace(ep_rank=d.ep_size - 1 - d.ep_rank, tp_rank=d.tp_size - 1))
    if not d.equal_tokens:
        if any(outside_declared_range(spec.tokens, d) for spec in lowered.specs.values()):
            return
        tokens = d.max_tokens if case.seed % 4 else d.min_tokens
        lead = (*(1,) * (len(case.lead) - 1), tokens)
        other = other.replace(lead=lead if case.lead else (), sizes="static")
    elif d.ep_size == 1 or case.seed % 8:
        return  # T is the same, so that only the rank's index could tell the ranks apart
    beside = lower(other)
    if not any("the graph refuses to run" in block.reason for run in (lowered, beside) for block in run.report.blocks):
        assert beside.comms == lowered.comms, f"decided otherwise: {other.deployment.ep_rank}, {other.lead}"
