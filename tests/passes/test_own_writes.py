"""Which writes in place mean what their functional forms do, on graphs of a few nodes."""

from __future__ import annotations

import operator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from moe_lowering.passes.graph.own_writes import functional_name, is_own_write, is_unseen_write

aten = torch.ops.aten


class Small:
    """A graph with values, of x [4, 4], for one write."""

    def __init__(self) -> None:
        self.graph, self._mode = Graph(), FakeTensorMode()
        self.x = self.graph.placeholder("x")
        with self._mode:
            self.x.meta["val"] = torch.empty(4, 4)

    def call(self, target, *args) -> Node:
        node = self.graph.call_function(target, args)
        with self._mode:
            node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        return node

    def made(self) -> Node:
        return self.call(aten.mul.Tensor, self.x, 2.0)

    def write(self, base: Node, by=1.0) -> Node:
        return self.call(aten.add_.Tensor, base, by)


def plain(g):
    return g.write(g.made())


def through_views(g):
    return g.write(g.call(aten.squeeze.default, g.call(aten.view.default, g.made(), [4, 1, 4])))


def twice(g):
    return g.write(g.write(g.made()))


def of_topk(g):
    values = g.call(operator.getitem, g.call(aten.topk.default, g.made(), 2), 0)
    return g.write(values)


def by_integers(g):
    return g.write(g.made(), g.call(aten.arange.default, 4))


def read_before(g):
    base = g.made()
    g.call(aten.sum.default, base)
    return g.write(base)


def read_before_its_view(g):
    base = g.made()
    g.call(aten.sum.default, base)
    return g.write(g.call(aten.view.default, base, [16]))


def read_after(g):
    base = g.made()
    write = g.write(base)
    g.call(aten.sum.default, base)
    return write


def viewed_before(g):
    base = g.made()
    g.call(aten.view.default, base, [16])
    return g.write(base)


def maybe_viewed_before(g):
    base = g.made()
    g.call(aten.dropout.default, base, 0.5, False)  # returns its argument
    return g.write(base)


def of_a_maybe_view(g):
    base = g.made()
    write = g.write(g.call(aten.dropout.default, base, 0.5, False))
    g.call(aten.sum.default, base)
    return write


def a_view_read_after(g):
    base = g.made()
    write = g.write(g.call(aten.view.default, base, [16]))
    g.call(aten.sum.default, base)
    return write


def one_half(g):
    chunks = g.call(aten.chunk.default, g.made(), 2)
    write = g.write(g.call(operator.getitem, chunks, 0))
    g.call(operator.getitem, chunks, 1)
    return write


def expanded(g):
    return g.write(g.call(aten.expand.default, g.call(aten.zeros.default, [1, 4]), [4, 4]))


def overlapping(g):
    return g.write(g.call(aten.as_strided.default, g.made(), [4, 4], [1, 1]))


def part_of_unsafe_split(g):  # its schema says nothing of views
    return g.write(g.call(operator.getitem, g.call(aten.unsafe_split.Tensor, g.made(), 2), 0))


def lifted(g):
    return g.write(g.call(aten.lift.default, g.x))


def another_storage(g):
    return g.write(g.call(aten.set_.source_Tensor, g.call(aten.empty.memory_format, [0]), g.x))


def other_sizes(g):
    return g.call(aten.unsqueeze_.default, g.made(), 0)


def one_result_taken_twice(g):
    both = g.call(aten.topk.default, g.made(), 2)
    write = g.write(g.call(operator.getitem, both, 0))
    g.call(operator.getitem, both, 0)
    return write


def an_input(g):
    return g.write(g.x)


def a_view_of_an_input(g):
    return g.write(g.call(aten.view.default, g.x, [16]))


CASES = {  # own, unseen
    plain: (True, True),
    through_views: (True, True),
    twice: (True, True),
    of_topk: (True, True),
    by_integers: (True, True),
    read_before: (True, False),
    read_before_its_view: (True, False),
    read_after: (False, False),
    viewed_before: (False, False),
    maybe_viewed_before: (False, False),
    of_a_maybe_view: (False, False),
    a_view_read_after: (False, False),
    one_half: (False, False),
    expanded: (False, False),
    overlapping: (False, False),
    part_of_unsafe_split: (False, False),
    lifted: (False, False),
    another_storage: (False, False),
    other_sizes: (False, False),
    one_result_taken_twice: (False, False),
    an_input: (False, False),
    a_view_of_an_input: (False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_writes(case):
    write = case(Small())
    assert (is_own_write(write), is_unseen_write(write)) == CASES[case]
    assert functional_name(write).endswith("_") != CASES[case][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_tensor_of_another_dtype_beside(dtype):
    """bfloat16 += float32 rounds once, where their sum is float32."""
    g = Small()
    other = g.call(aten.ones_like.default, g.x)
    other.meta["val"] = other.meta["val"].to(dtype)
    assert not is_own_write(g.write(g.made(), other))


def test_functional_operators_write_nothing():
    g = Small()
    assert not is_own_write(g.made()) and functional_name(g.made()) == "mul"
