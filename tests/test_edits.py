"""All or nothing: whatever is raised at whatever edit, the graph is as it was, and the compile goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from graph_build import Built, build
from graph_cases import BlockCase, GraphCase, RouteCase
from graph_data import Data
from graph_snapshot import differences, snapshot
from torch.fx import Graph, GraphModule, Node

from moe_lowering import Deployment, LoweringError, MoE, MoeLowering, testing
from moe_lowering.passes import emitting, overlap, pipeline, verifying
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.testing.graphs import fake_deployment

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
