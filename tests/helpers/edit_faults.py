"""Blocks of every form, and operations of a rewrite that raise: for ``test_edit_log``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from graph_build import Built
from graph_cases import BlockCase, GraphCase, RouteCase
from graph_data import Data
from torch.fx import Graph, GraphModule, Node

from moe_lowering import Deployment, MoeLowering
from moe_lowering.passes import overlap
from moe_lowering.passes.emission import emitter, new_nodes
from moe_lowering.passes.graph import erased_nodes
from moe_lowering.passes.run import block_reports, graph_run
from moe_lowering.passes.run import bounds as run_bounds
from moe_lowering.passes.run import messages as run_messages
from moe_lowering.passes.run import routes as run_routes

M, aten = torch.ops.moe_lowering, torch.ops.aten
ASSERT = M.assert_tokens.default
ONE = Deployment()
MANY = Deployment(
    ep_size=8, ep_rank=0, ep_group="ep", mc2_group="mc2", hccl_buffer_mb=6140, weight_format="nz",
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
    "allgather, tensor parallel": one(MANY.replace(tp_size=2, tp_rank=0, tp_group="tp"), "allgather", lead=(5,)),
    "allgather, another T": one(MANY.replace(**UNEQUAL), "allgather"),
    "allgather, symbolic T": one(MANY.replace(max_tokens=64), "allgather", sizes="dynamic"),
    "alltoall, static": one(MANY, "alltoall", ROUTED),
    "alltoall, buffers": one(MANY.replace(max_rows=1), "alltoall", block(mask=True)),
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
        (Graph, "create_node"), (new_nodes, "_insert"), (Graph, "erase_node"), (erased_nodes, "_erase"),
        (Graph, "inserting_before"), (Node, "replace_all_uses_with"),
        (Node, "_replace_input_with"), (Node, "_update_args_kwargs"), (Node, "prepend"), (emitter.Emitter, "_value"),
        (graph_run, "same_value"), (graph_run, "call_violations"), (graph_run, "defined_before_readers"),
        (run_routes, "same_value"),
        (graph_run, "decide"), (run_routes, "emit_route"), (run_bounds, "request_guard"), (run_messages, "dimension_names"),
        (block_reports, "BlockReport"), (Graph, "lint"), (GraphModule, "recompile"), (graph_run, "not_capturable"),
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
            own = self.count == self.number
            if own:
                self.raised = name
            if own and not self.after:
                raise self.error("planted")
            result = function(*args, **kwargs)
            if own:
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
        self.last: graph_run.GraphRun
        self.meta_functions = meta_functions

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        memory, decide, init = self, graph_run.decide, graph_run.GraphRun.__init__

        def decided(spec: Any, *rest: Any) -> Any:
            if spec not in memory.known:
                memory.known[spec] = decide(spec, *rest)
            return memory.known[spec]

        def begun(run: Any, *args: Any) -> None:
            init(run, *args)
            memory.last = run
            run.routes._violations = memory.routes
            if not memory.meta_functions:
                run.recordings = memory.recordings

        with (
            mock.patch.object(graph_run, "decide", decided),
            mock.patch.object(graph_run.GraphRun, "__init__", begun),
            mock.patch.object(graph_run.GraphRun, "end", lambda run: None),  # ``last`` can still be taken back
        ):
            yield


def lowering(case: GraphCase, **options: Any) -> MoeLowering:
    return MoeLowering(case.deployment, case.comm, **options)


def check_numbers(case: GraphCase, built: Built) -> None:
    """Where one process can run the graph."""
    if case.deployment.ep_size == 1 and case.hidden == 16:
        data = Data(case)
        with torch.no_grad():
            assert not (wrong := data.wrong(built, built.gm(*data.inputs(built)))), wrong
