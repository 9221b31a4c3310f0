"""Values of a graph that have fake modes of their own, as make_fx gives those of tensors."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from moe_lowering.passes.graph.fake_modes import MIXED, NO_VALUES, join_fake_modes


def layer(x):
    values, ids = torch.topk(x.t(), 2)
    return values[:, :1], ids


def graph(mode):
    return make_fx(layer, tracing_mode=mode)(torch.randn(3, 5)).graph


def fake_values(of):
    return [leaf for node in of.nodes for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, FakeTensor)]


def test_values_of_modes_of_their_own_get_one():
    made = graph("real")
    before = [(value.shape, value.stride(), value.dtype, value.device) for value in fake_values(made)]
    assert len({value.fake_mode for value in fake_values(made)}) > 1
    mode = join_fake_modes(made)
    assert {value.fake_mode for value in fake_values(made)} == {mode}
    assert [(value.shape, value.stride(), value.dtype, value.device) for value in fake_values(made)] == before


def test_one_mode_stays():
    made = graph("symbolic")
    before = fake_values(made)
    assert join_fake_modes(made) is before[0].fake_mode
    assert all(a is b for a, b in zip(fake_values(made), before, strict=True))


def test_sizes_that_are_not_known_stay_in_their_mode():
    made, other = graph("symbolic"), graph("real")
    output = made.output_node().all_input_nodes[0]
    output.meta["val"] = other.output_node().all_input_nodes[0].meta["val"]
    before = fake_values(made)
    assert join_fake_modes(made) == MIXED
    assert all(a is b for a, b in zip(fake_values(made), before, strict=True))


def test_no_values():
    made = graph("real")
    for node in made.nodes:
        node.meta.pop("val", None)
    assert join_fake_modes(made) == NO_VALUES


def test_a_real_tensor_beside_fake_ones():
    made = graph("fake")
    assert join_fake_modes(made) is not NO_VALUES
    with made.inserting_before(next(iter(made.nodes))):
        made.placeholder("weight").meta["val"] = torch.ones(2)
    assert join_fake_modes(made) == NO_VALUES
