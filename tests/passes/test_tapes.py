"""Equal blocks get the nodes that they would get if each were emitted anew, and blocks that differ do not pass for equal."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from graph_build import build
from graph_cases import GraphCase, RouteCase
from graph_draws import Choices
from graph_strategies import judged_cases
from situations import SITUATIONS, case_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from moe_lowering import MoeLowering, simulator
from moe_lowering.matrix.forms import FORMS
from moe_lowering.passes.blocks import shape_key
from moe_lowering.passes.emission import tapes
from moe_lowering.passes.emission.emitter import COPIED_META, Emitter
from moe_lowering.passes.emission.tapes import Tape, Tapes
from moe_lowering.passes.emission.wiring import Wiring, read_wiring
from moe_lowering.passes.run.graph_run import GraphRun

simulator.enable()

aten = torch.ops.aten


def result(case: GraphCase, comm: str = "auto", played: list[int] | None = None) -> str:
    """All that a graph is after the pass, and what the report says of it. ``played`` counts the tapes that were played; None:
    none is."""
    lowering, play = MoeLowering(case.deployment, comm, policy="fixed" if comm != "auto" else "auto"), Tape.play

    def instead(self: Tape, *args: Any) -> Any:
        nodes = None if played is None else play(self, *args)
        if played is not None and nodes is not None:
            played.append(len(nodes))
        return nodes

    gm = build(case).gm
    with mock.patch.object(Tape, "play", instead):
        lowering(gm)
    report, storages = lowering.reports[0], dict[int, int]()
    lines = [
        f"{node.format_node()} {node.meta.get('custom')} {describe(node, storages)} {source(node)}"
        for node in gm.graph.nodes
    ]
    lines += [f"{block} {[*map(str, block.nodes_before)]} {[*map(str, block.nodes_after)]}" for block in report.blocks]
    return "\n".join([*lines, *map(str, report.routers)])


def describe(node: Node, storages: dict[int, int]) -> list[Any]:
    """The metadata of a node's values, and which of them share memory: a storage is told by the number of its first value."""
    values = tree_leaves(node.meta.get("val"))
    return [
        (shape_key(value), storages.setdefault(value.untyped_storage()._cdata, len(storages)))
        if isinstance(value, torch.Tensor)
        else str(value)
        for value in values
    ]


def source(node: Node) -> list[Any]:
    return [node.meta.get(key) for key in COPIED_META]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_equal_blocks_are_what_emitting_each_makes_of_them(situation: str) -> None:
    """A symbolic graph is dear: those are of two forms."""
    played: list[int] = []
    dear = "symbolic" in situation
    for name, form in FORMS.items():
        if form.form != "exact" and (not dear or name in ("allgather", "mc2")):
            case, comm = case_of(name, "w8a8" if situation in ("static", "TP") else "none", situation)
            assert result(case, comm, played) == result(case, comm)
    assert played


@pytest.mark.parametrize(
    "other",
    [
        {"odd": ("weights_late",)}, {"odd": ("weights_last",)}, {"odd": ("counts_read",)}, {"odd": ("w13_late",)},
        {"odd": ("weights_in_16_bits",)},
        {"odd": ("kwargs",)}, {"as_list": (True, True)}, {"mask": True}, {"transposed": True}, {"route": None},
        {"bias": (True, True)}, {"activation": "gelu"}, {"top_k": 2}, {"route": RouteCase(bias=True)},
        {"forms": (("w13", "computed"),)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["allgather", "mc2"])
def test_a_block_that_differs_gets_its_own(name: str, other: dict[str, Any]) -> None:
    case, comm = case_of(name, "none", "static", other, {}, other)
    assert result(case, comm, played := []) == result(case, comm)
    assert played


def test_random_graphs_are_what_emitting_each_block_makes_of_them() -> None:
    draws, played = judged_cases(), []
    for number in range(5):
        case = draws(Choices(generator=random.Random(f"tapes {number}")))
        case = case.replace(blocks=case.blocks * 2)
        assert result(case, played=played) == result(case), number
    assert len(played) > 1


def test_a_tape_whose_constant_was_taken_back_is_not_played() -> None:
    """Which a later failure of a block does: the constant went with it, and the next block makes it anew."""
    case, comm = case_of("allgather", "none", "mask")
    expected, rewrite, count = result(case, comm), GraphRun._rewrite, []

    def fails_first(self: Any, *args: Any) -> None:
        rewrite(self, *args)
        count.append(1)
        if len(count) == 1:
            raise RuntimeError("planted")

    with mock.patch.object(GraphRun, "_rewrite", fails_first):
        left = result(case, comm, played := [])
    assert left != expected
    assert "planted" in left
    assert len(played) == 2  # the third block, and its routing


# --- the key ----------------------------------------------------------------------------------------------------------


class Stage:
    """A graph of one stage that reads x and w, with one thing changed."""

    def __init__(self, **changes: Any) -> None:
        self.mode, self.graph = FakeTensorMode(), Graph()
        self.x = self.input("x", **{"shape": (4, 8), **changes.get("x", {})})
        late = changes.get("late", False)
        self.w = None if late else self.input("w", (4, 8))
        before = self.graph.call_function(aten.relu.default, (self.x,))
        before.meta["val"] = self.x.meta["val"]
        if late:
            self.w = self.graph.call_function(aten.relu.default, (self.x,))
            self.w.meta["val"] = self.x.meta["val"]
        third = self.x if changes.get("alias") else self.w
        arguments = (self.x, self.w, third), {"value": changes.get("scalar", 1)}
        first = self.graph.call_function(aten.addcmul.default, *arguments)
        second = self.graph.call_function(aten.cat.default, ([first, before],))
        if changes.get("after_first"):
            first.append(before)
        self.stages = (first, second)

    def input(self, name: str, shape: tuple[int, ...], **options: Any) -> Node:
        strides = options.pop("strides", None)
        node = self.graph.placeholder(name)
        with self.mode:
            value = torch.empty(shape, **options)
            node.meta["val"] = value if strides is None else torch.empty_strided(shape, strides)
        return node

    @property
    def key(self) -> Any:
        return read_wiring(self.stages, self.stages, self.stages[0]).key


CHANGES: dict[str, dict[str, Any]] = {
    "dtype": {"x": {"dtype": torch.float16}},
    "device": {"x": {"device": "meta"}},
    "shape": {"x": {"shape": (4, 9), "strides": (8, 1)}},
    "strides": {"x": {"strides": (1, 4)}},
    "another node twice": {"alias": True},
    "computed, not stored": {"late": True},
    "True for 1": {"scalar": True},
    "1.0 for 1": {"scalar": 1.0},
    "zero": {"scalar": 0.0},
    "negative zero": {"scalar": -0.0},
    "after the first stage": {"after_first": True},
}


def test_wirings_that_differ_in_one_thing_have_different_keys() -> None:
    keys = {name: Stage(**change).key for name, change in {"as it is": {}, **CHANGES}.items()}
    assert len(set(keys.values())) == len(keys), keys
    assert Stage().key == Stage().key


def test_a_stored_tensor_that_the_outer_graph_computes_is_another() -> None:
    one, other = Stage(), Stage()
    other.w.meta["moe_lowering_computed"] = True
    assert one.key != other.key


def test_the_wiring_that_was_found_is_read_again_when_an_input_was_replaced() -> None:
    stage, memory = Stage(), Tapes({})
    found = read_wiring(stage.stages, stage.stages, stage.stages[0])
    assert memory.read(stage.stages, stage.stages, stage.stages[0], found)[0] is found
    new = stage.input("new", (4, 8), dtype=torch.float16)
    stage.stages[0].prepend(new)
    stage.w.replace_all_uses_with(new)
    again, kind = memory.read(stage.stages, stage.stages, stage.stages[0], found)
    assert new in again.inputs and again.key != found.key and kind == 1


# --- what emitters read ------------------------------------------------------------------------------------------------


class WatchedMeta(dict):
    """The metadata of a node of the traced graph, with the keys that are read."""

    seen: set[str]

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)


# ``prepend`` and ``graph`` are FX's, to insert before a node; the others are what ``read_wiring`` describes.
DESCRIBED = {"args", "kwargs", "target", "op", "meta", "graph", "prepend", "_prepend", "__class__", "_args", "_kwargs"}


@contextmanager
def watched(run: GraphRun, inside: set[Node], seen: dict[str, set[str]]) -> Iterator[None]:
    """Notes what is read of nodes that the pass did not make."""
    theirs, on = {*run.graph.nodes} - {*run.tapes._constants.values()}, [True]
    plain = Node.__getattribute__

    def read(node: Node, name: str) -> Any:
        value = plain(node, name)
        if on[0] and node in theirs:
            seen["attributes"].add(name)
            if name == "meta":
                value = WatchedMeta(value)
                value.seen = seen["inside" if node in inside else "metadata"]
        return value

    def unwatched(method: Callable[..., Any]) -> Callable[..., Any]:
        def walk(*args: Any) -> Any:
            before, on[0] = on[0], False
            try:
                return method(*args)
            finally:
                on[0] = before

        return walk

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Node, "__getattribute__", read))
        # Where constants stand, and the sizes of inputs: the same for every block of a graph, and on no tape
        for name in ("_first_computed", "_find_early"):
            stack.enter_context(mock.patch.object(Emitter, name, unwatched(getattr(Emitter, name))))
        yield


@pytest.mark.parametrize("situation", [name for name in SITUATIONS if "range" not in name])
def test_emitters_read_nothing_of_the_graph_but_what_the_key_describes(situation: str) -> None:
    seen: dict[str, set[str]] = {"attributes": set(), "metadata": set(), "inside": set()}
    done, runs, begun, write = [], [], GraphRun.__init__, Tapes.write

    def begin(self: GraphRun, *args: Any, **kwargs: Any) -> None:
        begun(self, *args, **kwargs)
        runs.append(self)

    def watch(self: Tapes, key: Any, emit: Emitter, stages: Any, wiring: Wiring, make: Any) -> Any:
        inside = {*stages, *(user for stage in stages for user in stage.users)}

        def watched_make() -> Any:
            with watched(runs[-1], inside, seen):
                done.append(make())
            return done[-1]

        return write(self, key, emit, stages, wiring, watched_make)

    with mock.patch.object(GraphRun, "__init__", begin), mock.patch.object(tapes.Tapes, "write", watch):
        for name, form in FORMS.items():
            for quantisation in ("none", "w8a8"):
                if form.form != "exact" and (situation in ("static", "TP") or quantisation == "none"):
                    case, comm = case_of(name, quantisation, situation)
                    case = case.replace(blocks=case.blocks[:1])
                    MoeLowering(case.deployment, comm, policy="fixed")(build(case).gm)
    assert done
    assert seen["attributes"] <= DESCRIBED
    assert seen["metadata"] <= {"val", *COPIED_META}
    assert seen["inside"] <= {*COPIED_META}
