"""All or nothing: whatever is raised at whatever edit, the graph is as it was, and the compile goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import operator
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from graph_build import Built, build
from graph_cases import BlockCase, GraphCase, RouteCase
from graph_data import Data
from graph_snapshot import differences, snapshot
from overlap_layers import Layer
from test_overlap import InsideNpugraphEx
from torch.fx import Graph, GraphModule, Node
from torch.fx import graph as graph_module
from torch.fx import node as node_module

from moe_lowering import Deployment, LoweringError, MoE, MoeLowering
from moe_lowering.backends import ge_rewrites
from moe_lowering.passes import edits, emitting, overlap, pipeline, verifying
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.testing import fake_deployment, lower_graph

M, aten = torch.ops.moe_lowering, torch.ops.aten
ASSERT = M.assert_tokens.default
ONE = Deployment()
MANY = Deployment(
    ep_size=8, ep_group="ep", mc2_group="mc2", hccl_buffer_mb=8192, weight_format="nz",
    providers=(("vllm_ascend", "0.23.0"),),
)  # fmt: skip
UNEQUAL = {"equal_tokens": False, "max_tokens": 64}
BLOCK = BlockCase(experts=32, top_k=2, intermediate=512)
BIG = {"hidden": 1024, "dtype": torch.float16}


def block(**changes: Any) -> BlockCase:
    return dataclasses.replace(BLOCK, **changes)


def one(deployment: Deployment, comm: str, spec: BlockCase = BLOCK, count: int = 1, **more: Any) -> GraphCase:
    return GraphCase(deployment, (spec,) * count, comm=comm, **{**BIG, **more})


ROUTED = block(route=RouteCase(bias=True), odd=("counts_read",))
CASES = {
    "allgather, one rank": one(ONE, "allgather", ROUTED, 2, hidden=16, dtype=torch.float32),
    "allgather, groups of experts": one(ONE, "allgather", block(route=RouteCase(num_groups=4, topk_groups=2), mask=True)),
    "allgather, ranks": one(MANY, "allgather", block(mask=True)),
    "allgather, tensor parallel": one(MANY.replace(tp_size=2, tp_group="tp"), "allgather", lead=(5,)),
    "allgather, another T": one(MANY.replace(**UNEQUAL), "allgather"),
    "allgather, symbolic T": one(MANY.replace(max_tokens=64), "allgather", sizes="dynamic"),
    "alltoall, static": one(MANY, "alltoall", ROUTED),
    "alltoall, exact": one(MANY.replace(capture=False), "alltoall", block(mask=True)),
    "mc2": one(MANY, "mc2", block(odd=("counts_read",)), 2),
    "mc2, w8a8": one(MANY, "mc2", block(quantisation="w8a8")),
    "allgather, w4a16": one(MANY, "allgather", block(quantisation="w4a16")),
    "fused_mc2": one(MANY, "fused_mc2"),
    "refused, T as not declared": one(MANY.replace(equal_tokens=False, max_tokens=2), "mc2"),
}  # fmt: skip


class Fault(BaseException):
    """As a KeyboardInterrupt: nobody may take it for one of the errors that it handles."""


class Faults:
    """Makes the n-th of the operations that a rewrite is made of raise, before or after it did its work."""

    PLACES: tuple[tuple[Any, str], ...] = (
        (Graph, "create_node"), (Graph, "erase_node"), (Graph, "inserting_before"), (Node, "replace_all_uses_with"),
        (Node, "_replace_input_with"), (Node, "_update_args_kwargs"), (Node, "prepend"), (emitting.Emitter, "_value"),
        (pipeline, "same_value"), (pipeline, "call_violations"), (pipeline, "defined_before_readers"),
        (pipeline, "decide"), (pipeline, "emit_route"), (pipeline, "request_guard"), (pipeline, "in_users_words"),
        (pipeline, "BlockReport"), (Graph, "lint"), (GraphModule, "recompile"), (pipeline, "not_capturable"),
        (overlap, "_tensors"),
    )  # fmt: skip

    def __init__(self, number: int, error: type[BaseException], after: bool) -> None:
        self.number, self.error, self.after = number, error, after
        self.count, self.raised = 0, ""

    def _of(self, place: Any, name: str) -> Any:
        function = getattr(place, name)

        @functools.wraps(function)
        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            mine = self.count == self.number
            if mine:
                self.raised = name
            if mine and not self.after:
                raise self.error("planted")
            result = function(*args, **kwargs)
            if mine:
                raise self.error("planted")
            return result

        return mock.patch.object(place, name, faulty)

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for place, name in self.PLACES:
                stack.enter_context(self._of(place, name))
            yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class Remembering:
    """Runs of the pass on one graph: each begins with what the first one judged and computed, and can be taken back."""

    def __init__(self, meta_functions: bool) -> None:
        self.known: dict[Any, Any] = {}
        self.recordings: dict[Any, Any] = {}
        self.routes: dict[Any, Any] = {}
        self.last: pipeline._Run
        self.meta_functions = meta_functions

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        memory, decide, init = self, pipeline.decide, pipeline._Run.__init__

        def decided(spec: Any, *rest: Any) -> Any:
            if spec not in memory.known:
                memory.known[spec] = decide(spec, *rest)
            return memory.known[spec]

        def begun(run: Any, *args: Any) -> None:
            init(run, *args)
            memory.last = run
            run._routes = memory.routes
            if not memory.meta_functions:
                run._recordings = memory.recordings

        with mock.patch.object(pipeline, "decide", decided), mock.patch.object(pipeline._Run, "__init__", begun):
            yield


def lowering(case: GraphCase, **options: Any) -> MoeLowering:
    return MoeLowering(case.deployment, case.comm, **options)


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
    assert number > 8 and {"create_node", "_update_args_kwargs", "BlockReport", "lint", "recompile"} <= seen, seen


def check_left(low: MoeLowering, graph: Graph, before: dict[str, Any]) -> None:
    """What is left is told; where all is left, the graph is as it was, but for what makes it refuse to run."""
    report = low.reports[0]
    graph.lint()
    left = {b.name for b in report.blocks if b.comm is None} | {where for where, _ in report.unrecognised}
    generic = {next(iter(n.meta["nn_module_stack"])) for n in verifying.generic_nodes(graph.nodes)}
    assert generic == left, f"generic operators are left in {generic}, and the report names {left}"
    for b in report.blocks:
        assert b.comm is None or b.ops_after != b.ops_before
    if all(b.comm is None for b in report.blocks) and not any("npu." in str(n.target) for n in graph.nodes):
        names = [entry[2] for entry in snapshot(graph)["nodes"] if entry[3] != str(ASSERT)]
        assert names == [entry[2] for entry in before["nodes"]]


def check_numbers(case: GraphCase, built: Built) -> None:
    """Where one process can run the graph."""
    if case.deployment.ep_size == 1 and case.hidden == 16:
        data = Data(case)
        with torch.no_grad():
            assert not (wrong := data.wrong(built, built.gm(*data.inputs(built)))), wrong


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
    files = tuple(part.__file__ for part in (edits, emitting, graph_module, node_module))

    def interrupted_at(wanted: int) -> Any:
        count = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.startswith(files):
                return None if event == "call" else trace
            if event == "line" and frame.f_code.co_name != "_back_to":
                count += 1
                if count == wanted:
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
            for node in asserts:
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


# Which output a getitem takes


def negative(graph: Graph, target: Any, index: Any, again: bool) -> None:
    """Rewrite or repeat one getitem of an operator."""
    item = next(n for n in graph.nodes if n.target is operator.getitem and n.args[0].target is target)
    if not again:
        item.args = (item.args[0], index)
        return
    with graph.inserting_after(item):
        twin = graph.call_function(operator.getitem, (item.args[0], index))
    twin.meta = {**item.meta}
    (output,) = graph.find_nodes(op="output")
    output.args = ((*output.args[0], twin),)


@pytest.mark.parametrize(("target", "index", "again", "lowered"), [
    (M.route.default, -2, False, True), (M.dispatch.default, -4, False, True), (M.route.default, True, False, False),
    (M.dispatch.default, -4, True, False), (M.dispatch.default, 4, False, False), (M.dispatch.default, -5, True, False),
    (M.dispatch.default, slice(0, 1), True, False), (M.route.default, -2, True, False), (M.route.default, 2, True, False),
    (M.route.default, slice(None), True, False),
])  # fmt: skip
def test_getitems_by_any_index(target, index, again, lowered):
    """The same output under two indices, one that there is none for, a slice: left as it was, with the reason."""
    case = dataclasses.replace(CASES["allgather, one rank"], blocks=(dataclasses.replace(ROUTED, odd=()),))
    built = build(case)
    graph = built.gm.graph
    negative(graph, target, index, again)
    low, before = lowering(case), snapshot(graph)
    with quiet():
        low(built.gm)
    report = low.reports[0]
    said = [why for _, why in report.unrecognised] + [b.reason for b in report.blocks if b.comm is None]
    assert not any("undone" in why or "internal" in why for why in said), said
    if lowered:
        assert report.fully_lowered and not verifying.generic_nodes(graph.nodes)
        check_numbers(case, built)
    else:
        assert any("[raise.whole_result]" in why for why in said), said
        if target is M.dispatch.default:
            assert not (changed := differences(before, snapshot(graph))), changed


# Exported programs


class Exported(torch.nn.Module):
    """Results of two layers, counts and a buffer that is written: all that a signature may name."""

    def __init__(self, *, functional: bool = True) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(MoE(32, 16, 8, 2) for _ in range(2))
        self.register_buffer("seen", torch.zeros(8, dtype=torch.int64))
        self.w13, self.w2 = torch.nn.Parameter(torch.randn(8, 32, 32)), torch.nn.Parameter(torch.randn(8, 16, 32))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = self.layers[0](x)
        weights, ids = M.route(x[:, :8], None, 2, "softmax", True, 1, 1, "max", 1.0)
        rows, scale, counts, handle = M.dispatch(x, None, ids, None, 8, "", 1, "", 1, 0, 0)
        rows = M.grouped_mlp(rows, scale, counts, [self.w13], [self.w2], [], [], "swiglu", 0.0, 1.702, False)
        y = M.combine(rows, weights, ids, handle, None, 8, "", 1, "", 1, 0)
        self.seen.copy_(counts)  # the signature names the node of the buffer's new value
        scratch.copy_(y)
        return first, self.layers[1](first), counts, y, weights


def test_an_exported_program_can_be_saved_and_loaded_and_runs_right():
    torch.manual_seed(0)
    module, x = Exported(), torch.randn(5, 32)
    expected = [value.clone() for value in module(x, torch.zeros(5, 32))]
    seen = module.seen.clone()
    module.seen.zero_()
    program = torch.export.export(module, (x, torch.zeros(5, 32)))
    low = MoeLowering(ONE, strict=True)
    low(program.graph_module)
    assert [b.comm for b in low.reports[0].blocks] == ["allgather"] * 3
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded, scratch = torch.export.load(file).module(), torch.zeros(5, 32)
    for a, b in zip(loaded(x, scratch), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scratch, expected[3], rtol=1e-4, atol=1e-5)
    assert torch.equal(dict(loaded.named_buffers())["seen"], seen)


# What other passes of the package edit


def test_ge_edits_are_all_or_nothing():
    """For every n; the error passes on, since a graph without them may hang."""
    import torchair  # noqa: F401  # it defines the operator of all-to-all

    case = one(MANY.replace(mode="ge", equal_tokens=False, max_tokens=8), "alltoall", block(mask=True), lead=(4,))
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
            faults, log = Faults(number, Fault, after=bool(number % 2)), edits.ModuleEdits(built.gm)
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
        before, true, memory, faults = snapshot(gm.graph), pipeline.overlap, Remembering(False), Faults(0, Fault, False)

        def planted(*arguments: Any) -> Any:
            with faults.planted():
                return true(*arguments)

        with quiet(), memory.on(), mock.patch.object(pipeline, "overlap", planted):
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
