"""All or nothing: whatever is raised at whatever edit, the graph is as it was, and the compile goes on."""

from __future__ import annotations

import contextlib
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from edit_faults import (
    ASSERT,
    CASES,
    MANY,
    ONE,
    Fault,
    Faults,
    Remembering,
    aten,
    block,
    check_numbers,
    lowering,
    one,
    quiet,
)
from graph_build import build
from graph_cases import GraphCase
from graph_snapshot import differences, snapshot
from overlap_layers import Layer
from test_overlap import InsideNpugraphEx
from torch.fx import Graph, GraphModule
from torch.fx import graph as graph_module
from torch.fx import node as node_module

from moe_lowering import LoweringError, MoE, MoeLowering
from moe_lowering.backends import ge_rewrites
from moe_lowering.passes import verifier
from moe_lowering.passes.emission import emitter
from moe_lowering.passes.graph import edit_log
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.run import graph_run
from moe_lowering.testing import fake_deployment, lower_graph

COMPARE = torch.ops.moe_lowering.assert_agreement.default


def forms(case: GraphCase) -> set[tuple[str, str]]:
    """(implementation, form) of the blocks that a case is lowered to; checks that it is what its name says."""
    low = lowering(case)
    low(build(case).gm)
    found = {(b.comm, b.verdicts[b.comm].form) for b in low.reports[0].blocks if b.comm}
    assert found or case is CASES["refused, T as not declared"], [b.reason for b in low.reports[0].blocks]
    return found


def test_the_cases_have_every_form_of_every_implementation():
    """And so has what is below: a new form is a case more."""
    with quiet():
        have = set().union(*map(forms, CASES.values()))
    deployments = (ONE, MANY, MANY.replace(capture=False))
    assert have == {
        (name, form.name) for name, i in IMPLEMENTATIONS.items() for d in deployments for form in i.forms(d)
    }


@pytest.mark.parametrize("name", CASES)
def test_the_nth_operation_of_a_rewrite_raises(name):
    """For every n the pass gives the same graph back, or lowers all of it but what failed, and says so."""
    case, number, seen, memory = CASES[name], 0, set(), Remembering(meta_functions=len(CASES[name].blocks) > 1)
    built = build(case)
    graph, before = built.gm.graph, snapshot(built.gm.graph)
    with quiet(), memory.on():
        lowering(case)(built.gm)
        memory.last.edits.undo()
        assert not (changed := differences(before, snapshot(graph))), changed
        while True:
            number += 1
            faults = Faults(number, Fault if number % 3 == 0 else ZeroDivisionError, after=bool(number % 2))
            low = lowering(case)
            with faults.planted(), contextlib.suppress(Fault):
                low(built.gm)
            if low.reports:  # the compile went on
                check_left(low, graph, before)
                check_numbers(case, built)
                memory.last.edits.undo()
            else:
                assert faults.error is Fault, f"{faults.raised} (n = {number}) fails the compile"
            assert not (changed := differences(before, snapshot(graph))), f"{faults.raised} (n = {number}): {changed}"
            if not faults.raised:
                break
            seen.add(faults.raised)
    check_numbers(case, built)
    assert number > 8 and {"_insert", "_update_args_kwargs", "BlockReport", "lint", "recompile"} <= seen, seen


def check_left(low: MoeLowering, graph: Graph, before: dict[str, Any]) -> None:
    """What is left is told; where all is left, the graph is as it was, but for what makes it refuse to run."""
    report = low.reports[0]
    graph.lint()
    left = {b.name for b in report.blocks if b.comm is None} | {where for where, _ in report.unrecognised}
    generic = {next(iter(n.meta["nn_module_stack"])) for n in verifier.generic_nodes(graph.nodes)}
    assert generic == left, f"generic operators are left in {generic}, and the report names {left}"
    for b in report.blocks:
        assert b.comm is None or b.ops_after != b.ops_before
    if all(b.comm is None for b in report.blocks) and not any("npu." in str(n.target) for n in graph.nodes):
        checks = {str(ASSERT), str(COMPARE)}
        names = [entry[2] for entry in snapshot(graph)["nodes"] if entry[3] not in checks]
        assert names == [entry[2] for entry in before["nodes"]]


@pytest.mark.parametrize("at", ["create", "erase", "replace"])
def test_a_hook_of_the_users_that_always_raises(at):
    """It raises while edits are taken back as well; and nodes that it kept from the graph leave no trace as readers."""
    case = CASES["allgather, one rank"]
    built = build(case)

    def hook(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("planted")

    getattr(built.gm, f"_register_{at}_node_hook")(hook)
    low, before = lowering(case), snapshot(built.gm.graph)
    with quiet():
        low(built.gm)
    assert not (changed := differences(before, snapshot(built.gm.graph))), changed
    assert all("ZeroDivisionError: planted" in b.reason for b in low.reports[0].blocks)
    check_numbers(case, built)


class Interrupted(KeyboardInterrupt):
    pass


def test_ctrl_c_between_any_two_lines():
    """Of the pass and of FX: the graph is as it was, and the interrupt passes on. A twin without one lowers the graph."""
    case, line, hits = CASES["mc2"], 0, 0
    built, memory = build(case), Remembering(meta_functions=False)
    before = snapshot(built.gm.graph)
    files = tuple(part.__file__ for part in (edit_log, emitter, graph_module, node_module))

    def interrupted_at(expected: int) -> Any:
        count = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.startswith(files):
                return None if event == "call" else trace
            if event == "line" and frame.f_code.co_name != "_back_to":
                count += 1
                if count == expected:
                    sys.settrace(None)
                    raise Interrupted
            return trace

        return trace

    with quiet(), memory.on():
        lowering(case)(built.gm)
        memory.last.edits.undo()
        while True:
            line += 37
            low = lowering(case)
            sys.settrace(interrupted_at(line))
            try:
                low(built.gm)
                break
            except Interrupted:
                hits += 1
            finally:
                sys.settrace(None)
            assert not (changed := differences(before, snapshot(built.gm.graph))), f"line {line}: {changed}"
            assert not low.reports
    assert hits > 20 and [b.comm for b in low.reports[0].blocks] == ["mc2", "mc2"]


def test_what_fails_after_the_last_block_undoes_all_of_it(monkeypatch):
    """A graph that cannot be compiled is not left; where other ranks may have lowered theirs, it refuses to run."""
    for case, refuses in ((CASES["allgather, one rank"], 0), (CASES["allgather, another T"], 1)):
        for place, name in ((Graph, "lint"), (GraphModule, "recompile")):
            built, calls = build(case), []
            before, true = snapshot(built.gm.graph), getattr(place, name)

            def fails_once(self: Any, *args: Any, calls: Any = calls, true: Any = true) -> Any:
                calls.append(self)
                if len(calls) == 1:
                    raise ZeroDivisionError("planted")
                return true(self, *args)

            low = lowering(case)
            with quiet(), monkeypatch.context() as patched:
                patched.setattr(place, name, fails_once)
                low(built.gm)
            asserts = built.gm.graph.find_nodes(op="call_function", target=ASSERT)
            assert len(asserts) == refuses
            assert ("assert_tokens" in built.gm.code) == bool(refuses)
            compares = built.gm.graph.find_nodes(op="call_function", target=COMPARE)
            assert len(compares) == (case.deployment.ep_size > 1)  # with ranks that may have lowered theirs
            for node in (*asserts, *compares):
                built.gm.graph.erase_node(node)
            assert not (changed := differences(before, snapshot(built.gm.graph))), changed
            for b in low.reports[0].blocks:
                assert b.comm is None and "rewrite undone: ZeroDivisionError: planted" in b.reason
                assert ("refuses to run" in b.reason) == bool(refuses) and b.ops_after == b.ops_before


def test_strict_raises_and_leaves_the_graph_as_it_was():
    """Also the blocks that could be lowered, and the module's code."""
    good, bad = block(experts=4, intermediate=8), block(experts=4, intermediate=8, odd=("rows_read",))
    case = GraphCase(ONE, (good, bad), hidden=16, comm="allgather")
    built = build(case)
    before, code = snapshot(built.gm.graph), built.gm.code
    with quiet(), pytest.raises(LoweringError, match=r"raise\.single_use"):
        lowering(case, strict=True)(built.gm)
    assert not (changed := differences(before, snapshot(built.gm.graph))), changed
    assert built.gm.code == code
    low = lowering(case)
    with quiet():
        low(built.gm)
    assert [b.comm for b in low.reports[0].blocks] == ["allgather"] and built.gm.code != code


# What other passes of the package edit


def test_ge_edits_are_all_or_nothing():
    """For every n; the error passes on, since a graph without them may hang."""
    import torchair  # noqa: F401  # it defines the operator of all-to-all

    where = MANY.replace(mode="ge", equal_tokens=False, max_tokens=8, max_rows=1)  # buffers: three exchanges to split
    case = one(where, "alltoall", block(mask=True), lead=(4,))
    built = build(case)
    lowering(case)(built.gm)
    graph, number = built.gm.graph, 0
    x = next(n for n in graph.nodes if n.name == "x")
    last = next(iter(graph.find_nodes(op="output")))
    with graph.inserting_before(last):
        graph.call_function(aten.lt.Tensor, (x, x)).meta["val"] = x.meta["val"]
    before = snapshot(graph)
    with mock.patch.object(ge_rewrites, "_group", lambda node, name: ("tag", [0, 1])):
        while True:
            number += 1
            faults, log = Faults(number, Fault, after=bool(number % 2)), edit_log.ModuleEdits(built.gm)
            with faults.planted(), contextlib.suppress(Fault), log.step():
                ge_rewrites.finish(log)
            if not faults.raised:
                break
            assert not (changed := differences(before, snapshot(graph))), f"{faults.raised} (n = {number}): {changed}"
    assert number > 20
    log.undo()
    assert not (changed := differences(before, snapshot(graph))), changed


class EveryN(InsideNpugraphEx):
    """The pass with overlap, whose n-th operation of that stage raises, for every n; then once without."""

    number, seen = 0, frozenset[str]()

    def __call__(self, gm: GraphModule, example_inputs: Any = None, config: Any = None) -> None:
        before, true, memory, faults = (
            snapshot(gm.graph),
            graph_run.overlap,
            Remembering(False),
            Faults(0, Fault, False),
        )

        def planted(*arguments: Any) -> Any:
            with faults.planted():
                return true(*arguments)

        with quiet(), memory.on(), mock.patch.object(graph_run, "overlap", planted):
            while faults.raised or not self.number:
                self.number += 1
                error = Fault if self.number % 3 == 0 else ZeroDivisionError
                faults, told = Faults(self.number, error, after=bool(self.number % 2)), len(self.reports)
                with contextlib.suppress(Fault):
                    super().__call__(gm, example_inputs, config)
                if len(self.reports) > told:
                    failed = "[overlap.failed]" in self.reports[-1].blocks[0].notes[-1]
                    assert failed == bool(faults.raised), self.reports[-1].blocks[0].notes
                    assert failed != any("scope_enter" in str(node.target) for node in gm.graph.nodes)
                    memory.last.edits.undo()
                assert not (changed := differences(before, snapshot(gm.graph))), f"{faults.raised}: {changed}"
                self.seen |= {faults.raised}
        super().__call__(gm, example_inputs, config)


def test_the_nth_operation_of_an_overlap_raises():
    with fake_deployment(ep_size=2) as where:
        module = Layer(1024, 128, 12, 3, torch.bfloat16)
        module.moe = MoE(1024, 128, 12, 3, dtype=torch.bfloat16, deployment=where)
        low = EveryN(where, "mc2", overlap=True)
        lower_graph(module, torch.randn(8, 1024, dtype=torch.bfloat16), deployment=where, lowering=low)
    assert low.number > 15 and {"create_node", "prepend", "_tensors"} <= low.seen
