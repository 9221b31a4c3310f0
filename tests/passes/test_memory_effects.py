"""Writes in place between a block's stages: of all that the lowering reads elsewhere, none is moved past one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
import random
from typing import Any

import pytest
import torch
from graph_build import Built, build
from graph_cases import BlockCase, GraphCase, RouteCase
from graph_data import Data
from torch.fx import Graph, GraphModule, Node

from moe_lowering import Deployment, MoeLowering
from moe_lowering.passes.graph import memory_effects
from moe_lowering.passes.overlap_region import Refused, check_between

aten, M = torch.ops.aten, torch.ops.moe_lowering
BLOCK = BlockCase(experts=4, top_k=2, intermediate=8, bias=(True, True), mask=True, odd=("counts_read",))
CASE = GraphCase(Deployment(), (BLOCK,), comm="allgather")
VARIANTS = (
    BLOCK,
    BlockCase(4, 2, 8, odd=("counts_read_early", "weights_late")),
    BlockCase(4, 2, 8, route=RouteCase(bias=True), odd=("ids_read",)),
    BlockCase(4, 2, 8, as_list=(True, False), transposed=True, odd=("w13_late",)),
    BlockCase(4, 2, 8, quantisation="w8a8", mask=True),
)
library = torch.library.Library("written_between", "FRAGMENT")
library.define("mix(Tensor(a!) x, Tensor y) -> Tensor")  # its result may share memory with either
library.define("push(Tensor x) -> ()")  # there for what it does to x, whatever its schema says
for name, function in {"mix": lambda x, y: x.mul_(2).clone(), "push": lambda x: x.mul_(2) and None}.items():
    library.impl(name, function, "CompositeExplicitAutograd")
mix, push = torch.ops.written_between.mix.default, torch.ops.written_between.push.default


def stages(graph: Graph) -> list[Node]:
    targets = [getattr(M, name).default for name in ("dispatch", "grouped_mlp", "combine")]
    return [graph.find_nodes(op="call_function", target=target)[0] for target in targets]


def run(built: Built, data: Data) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and inputs afterwards."""
    inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in data.inputs(built)]
    with torch.no_grad():
        outputs = GraphModule(built.gm, built.gm.graph)(*inputs)
    return list(outputs), inputs


def lower(built: Built, case: GraphCase = CASE) -> tuple[str | None, list[str]]:
    """(implementation, why not)."""
    low = MoeLowering(case.deployment, case.comm)
    logging.disable(logging.CRITICAL)
    try:
        low(built.gm)
    finally:
        logging.disable(logging.NOTSET)
    (report,) = low.reports
    assert not any("undone" in b.reason or "internal" in b.reason for b in report.blocks), report.blocks
    comm = report.blocks[0].comm if report.blocks else None
    return comm, [why for _, why in report.unrecognised] + [b.reason for b in report.blocks if b.comm is None]


def insert(graph: Graph, before: Node, target: Any, *args: Any, fresh: bool = False, **kwargs: Any) -> Node:
    """A node with its value; ``fresh``: a value with a storage of its own, as passes leave it that copy metadata."""
    from torch.fx.node import map_arg

    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    given, named = map_arg((args, kwargs), lambda n: n.meta["val"])
    first = next(v for v in torch.utils._pytree.tree_leaves(given) if isinstance(v, torch.Tensor))
    with first.fake_mode:
        value = target(*given, **named)
        node.meta["val"] = torch.empty_like(value) if fresh and isinstance(value, torch.Tensor) else value
    return node


def write(graph: Graph, before: Node, value: Node, fresh: bool = False) -> Node:
    """Write in place what changes the result and keeps ids distinct and in range."""
    dtype = value.meta["val"].dtype
    if dtype == torch.bool:
        return insert(graph, before, aten.logical_not_.default, value, fresh=fresh)
    if dtype == torch.int8:
        return insert(graph, before, aten.neg_.default, value, fresh=fresh)
    if dtype.is_floating_point:
        return insert(graph, before, aten.mul_.Scalar, value, 1.5, fresh=fresh)
    return insert(graph, before, aten.bitwise_xor_.Scalar, value, 1, fresh=fresh)


READ = ("x", "ids0", "weights0", "mask", "w13_0", "w2_0", "w13_bias_0", "w2_bias_0")
ALIASES = {
    "itself": lambda g, at, v, fresh: v,
    "view": lambda g, at, v, fresh: insert(g, at, aten.view.default, v, [-1], fresh=fresh),
    "reshape": lambda g, at, v, fresh: insert(g, at, aten.reshape.default, v, [-1], fresh=fresh),
    "_unsafe_view": lambda g, at, v, fresh: insert(g, at, aten._unsafe_view.default, v, [-1], fresh=fresh),
    "as_strided": lambda g, at, v, fresh: insert(g, at, aten.as_strided.default, v, [1], [1], 1, fresh=fresh),
    "chunk": lambda g, at, v, fresh: insert(g, at, operator.getitem, insert(g, at, aten.split.Tensor, v, 2), 0),
    "result of a write": lambda g, at, v, fresh: insert(g, at, aten.detach_.default, v, fresh=fresh),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_the_block_reads_is_written_between_its_ends(name):
    """Through any alias, whatever the metadata says of it: refused, with the node's name. The twins: before, after, a copy."""
    for alias, make in ALIASES.items():
        for position, fresh in ((1, False), (2, True), (1, True)):
            built = build(CASE)
            graph = built.gm.graph
            value = next(n for n in graph.nodes if n.name == name)
            at = stages(graph)[position]
            node = write(graph, at, make(graph, stages(graph)[0], value, fresh), fresh)
            node.meta["stack_trace"] = 'File "model.py", line 7, in forward\n    x.mul_(2)'
            before = str(graph)
            comm, why = lower(built)
            assert comm is None, f"{name} through {alias} at {position}"
            assert "[raise.written_between]" in why[0] and node.name in why[0] and "model.py:7" in why[0], why
            assert str(graph) == before


@pytest.mark.parametrize("where", ["before", "after", "a copy", "another value"])
def test_what_is_written_elsewhere_is_lowered_and_right(where):
    for name in READ:
        built, data = build(CASE), Data(CASE)
        graph = built.gm.graph
        dispatch, mlp, combine = stages(graph)
        value = next(n for n in graph.nodes if n.name == name)
        if where == "a copy":
            value = insert(graph, dispatch, aten.clone.default, value)
        if where == "another value":
            value = insert(graph, dispatch, aten.full_like.default, value, 1)
        write(graph, {"before": dispatch, "after": combine.next}.get(where, mlp), value)
        expected = run(built, data)
        comm, why = lower(built)
        assert comm == "allgather", (name, why)
        for a, b in zip(
            [t for part in run(built, data) for t in part], [t for part in expected for t in part], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_counts_that_others_write_are_refused_between_the_ends_and_right_after_them():
    for between in (True, False):
        built, data = build(CASE), Data(CASE)
        graph = built.gm.graph
        counts = next(n for n in graph.nodes if n.target is operator.getitem and n.args[1] == 2)
        insert(graph, stages(graph)[2] if between else stages(graph)[2].next, aten.zero_.default, counts)
        expected = run(built, data) if not between else None
        comm, why = lower(built)
        assert (comm is None) == between and (not between or "written_between" in why[0])
        if expected:
            for a, b in zip(run(built, data)[0], expected[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Inner(torch.nn.Module):
    def __init__(self, target: Any) -> None:
        super().__init__()
        graph = Graph()
        graph.output((graph.call_function(target, (graph.placeholder("a"), 2.0)),))
        self.inner = GraphModule(torch.nn.Module(), graph)


def other_writers(graph: Graph, at: Node, x: Node, kind: str) -> Node:
    """A node before ``at`` that may write x, or surely does not."""
    owner = graph.owning_module
    with graph.inserting_before(at):
        if kind == "setitem":
            return graph.call_function(operator.setitem, (x, 0, 1.0))
        if kind in ("iadd", "add"):
            return graph.call_function(getattr(operator, kind), (x, 1.0))
        if kind in ("mul_", "mul"):
            return graph.call_method(kind, (x, 2.0))
        if kind == "module":
            owner.add_submodule("part", torch.nn.ReLU(inplace=True))
            return graph.call_module("part", (x,))
        if kind == "out=":
            return graph.call_function(aten.add.out, (x, 1), {"out": x})
        if kind == "a list":
            return graph.call_function(torch.ops.aten._foreach_mul_.Scalar, ([x], 2.0))
        if kind == "custom operator":
            return graph.call_function(mix, (x, x))
        if kind == "alias from a custom operator":
            alias = insert(graph, stages(graph)[0], mix, insert(graph, stages(graph)[0], aten.clone.default, x), x)
            return graph.call_function(aten.zero_.default, (alias,))
        if kind == "no result":
            return graph.call_function(push, (x,))
        if kind == "no value":
            return graph.call_function(aten.zero_.default, (graph.call_function(aten.clone.default, (x,)),))
        if kind == "packet":
            return graph.call_function(torch.ops.aten.mul_, (x, 2.0))
        if kind == "resize":
            return graph.call_function(torch.ops.inductor.resize_storage_bytes_.default, (x, 0))
        if kind == "set_":
            return graph.call_function(aten.set_.source_Tensor, (x, x))
        if kind == "looks":
            return graph.call_function(M.keep_alive.default, ([x],))
        owner.add_module("part", Inner(aten.mul_.Scalar if kind == "graph that writes" else aten.mul.Scalar).inner)
        part = graph.get_attr("part")
        return graph.call_function(torch.ops.higher_order.invoke_subgraph, (part, "part", x))


WRITE = (
    "setitem", "iadd", "mul_", "module", "out=", "a list", "custom operator", "alias from a custom operator", "no result",
    "no value", "packet", "resize", "set_", "graph that writes",
)  # fmt: skip


@pytest.mark.parametrize("kind", [*WRITE, "add", "mul", "looks", "graph that reads"])
def test_writers_of_every_kind(kind):
    built = build(CASE)
    graph = built.gm.graph
    x, mlp = next(n for n in graph.nodes if n.name == "x"), stages(graph)[1]
    node = other_writers(graph, mlp, x, kind)
    comm, why = lower(built)
    assert (comm is None) == (kind in WRITE), (comm, why)
    if comm is None:
        assert f"written_between] {node.name} (" in why[0]
    walls = kind in WRITE or kind == "graph that reads"  # a shared expert is moved past no graph
    with pytest.raises(Refused) if walls else contextlib.nullcontext():
        check_between(node, node.next, set())


def test_operators_of_the_package_without_a_result_only_look():
    """The comparison of the ranks stands behind x: it would be a wall for a shared expert that is moved past it."""
    looking = {str(op) for name in dir(M) for op in [getattr(getattr(M, name), "default", None)] if without_result(op)}
    assert {"moe_lowering.assert_agreement.default", "moe_lowering.assert_tokens.default"} <= looking
    assert [name for name in sorted(looking) if memory_effects._may_write(getattr(M, name.split(".")[1]).default)] == []
    assert memory_effects._may_write(push)


def without_result(op: Any) -> bool:
    return op is not None and not op._schema.returns and not op._schema.is_mutable


def test_a_graph_that_writes_nothing_between_is_not_walked(monkeypatch):
    """Functional but for copies into its inputs at the end, as AOTAutograd leaves it."""
    asked = []
    monkeypatch.setattr(memory_effects, "_shared_memory", lambda graph: asked.append(graph))
    for target in (None, aten.copy_.default):
        built = build(CASE)
        graph = built.gm.graph
        if target is not None:
            y, x = stages(graph)[2], next(n for n in graph.nodes if n.name == "x")
            insert(graph, next(iter(graph.find_nodes(op="output"))), target, x, y)
        assert lower(built)[0] == "allgather"
    assert not asked


def test_random_writes_are_right_or_refused():
    """At random places into random values through random aliases, with true metadata or without: nothing is wrong."""
    rng, seen = random.Random(0), {"lowered": 0, "refused": 0, "illegal": 0, "wrong before": 0}
    for number in range(160):
        case = dataclasses.replace(CASE, blocks=(rng.choice(VARIANTS),), seed=number)
        built, data = build(case), Data(case)
        graph = built.gm.graph
        for name in ("x", "weights0", "w13_0"):  # values that the block does not read
            for source in [n for n in graph.nodes if n.name == name]:
                insert(graph, stages(graph)[0], aten.clone.default, source)
        for _ in range(rng.choice((1, 1, 2))):
            inner = [n for n in graph.nodes if n.op == "call_function"]
            near = [n for n in inner if stages(graph)[0] < n < stages(graph)[2].next]
            at = rng.choice(near if rng.random() < 0.4 else inner)
            values = [
                n
                for n in graph.nodes
                if n < at and isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].numel()
            ]
            value, fresh = rng.choice(values), rng.random() < 0.5
            alias = rng.choice(("itself", "view", "_unsafe_view", "as_strided", "result of a write"))
            with contextlib.suppress(RuntimeError, ValueError):  # no such view of this value
                write(graph, at, ALIASES[alias](graph, at, value, fresh), fresh)
        graph.lint()
        try:
            expected = run(built, data)
        except Exception:  # counts or handles that are none any more
            expected = None
        comm, why = lower(built, case)
        if comm is None:
            assert why
            seen["illegal"] += not all(w.startswith("[raise.") for w in why)
            seen["refused"] += any("written_between" in w for w in why)
        elif expected is not None:
            seen["lowered"] += 1
            actual = run(built, data)
            tolerance = (
                {"rtol": 1e-4, "atol": 1e-4}
                if "w8a8" not in case.blocks[0].quantisation
                else {"rtol": 0.2, "atol": 0.3}
            )
            for a, b in zip([t for part in actual for t in part], [t for part in expected for t in part], strict=True):
                torch.testing.assert_close(a, b, **tolerance, equal_nan=True)
        else:
            seen["wrong before"] += 1
    assert seen["lowered"] > 30 and seen["refused"] > 30, seen
    print(seen)
