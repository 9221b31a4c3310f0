"""Nodes made by the pass are those that FX makes (``passes/emission/new_nodes.py``)."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule

from moe_lowering.passes.emission import new_nodes
from moe_lowering.passes.emission.new_nodes import insert_call, repeated_call

aten = torch.ops.aten


def number_1(x):
    """A function whose nodes FX numbers in another way."""
    return x


CALLS = (
    (aten.add.Tensor, lambda x: (x, x), {"alpha": 2}),
    (aten.cat.default, lambda x: ([x, x], 1), {}),
    (operator.getitem, lambda x: (x, 0), {}),
    (max, lambda x: (x,), {}),
    (number_1, lambda x: (x,), {}),
    (torch.ops._c10d_functional.wait_tensor.default, lambda x: (x,), {}),
)


def graph_of(make, *taken):
    graph = Graph()
    x = graph.placeholder("x")
    for name in taken:
        graph.placeholder(name)
    for target, arguments, named in CALLS * 3:
        make(graph)(graph, target, arguments(x), named)
    graph.output(x)
    return graph


@pytest.fixture(autouse=True)
def forgotten():
    """What this process knows of names and of torch is forgotten before and after."""
    new_nodes._CANDIDATES.clear()
    new_nodes._is_whole.cache_clear()
    yield
    new_nodes._CANDIDATES.clear()
    new_nodes._is_whole.cache_clear()


def repeating(graph):
    """As a tape makes nodes: the first of a target is emitted."""

    def make(graph, target, args, kwargs):
        if not graph.find_nodes(op="call_function", target=target):
            return insert_call(graph)(graph, target, args, kwargs)
        return repeated_call(graph, target)(graph._root, args, kwargs)  # it stands behind the last node

    return make


@pytest.mark.parametrize("make", [insert_call, repeating])
@pytest.mark.parametrize("taken", [(), ("add_tensor", "getitem_1", "cat_default_2", "wait_tensor")])
def test_nodes_names_and_index_are_those_of_call_function(taken, make):
    for _ in range(2):  # with names that were not met, and that were
        ours, theirs = graph_of(make, *taken), graph_of(lambda graph: Graph.call_function, *taken)
        assert [new_nodes._describe_node(n) for n in ours.nodes] == [new_nodes._describe_node(n) for n in theirs.nodes]
        assert str(ours) == str(theirs)
        assert [n.name for n in ours.nodes] == [n.name for n in theirs.nodes]
        assert ours._graph_namespace._base_count == theirs._graph_namespace._base_count
        for target, _, _ in CALLS:
            found = [[n.name for n in g.find_nodes(op="call_function", target=target)] for g in (ours, theirs)]
            assert found[0] == found[1] and len(found[0]) == 3
        ours.lint()
    assert new_nodes._CANDIDATES, "no name was kept: all of this was FX's own"


def test_hooks_of_a_graph_module_hear_of_new_nodes():
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(x)
    gm, heard = GraphModule(torch.nn.Module(), graph), []
    insert_call(gm.graph)(gm.graph, aten.relu.default, (x,), {})
    assert not heard
    gm._register_create_node_hook(heard.append)
    with gm.graph.inserting_before(next(iter(reversed(gm.graph.nodes)))):  # no iterator in torch 2.10
        node = insert_call(gm.graph)(gm.graph, aten.relu.default, (next(iter(gm.graph.nodes)),), {})
        again = repeated_call(gm.graph, aten.relu.default)(node, (next(iter(gm.graph.nodes)),), {})
    assert heard == [node, again]
    assert again.next is node


def test_a_repeated_call_stands_before_the_node_that_is_named():
    graph = Graph()
    x = graph.placeholder("x")
    insert_call(graph)(graph, aten.relu.default, (x,), {})
    last = graph.output(x)
    make = repeated_call(graph, aten.relu.default)
    first, second = (make(last, (x,), {}) for _ in range(2))
    assert [*graph.nodes][-3:] == [first, second, last]
    assert last > second > first > x
    graph.lint()


def test_a_torch_that_does_more_is_asked_itself(monkeypatch):
    class MoreNodes(Graph):
        pass

    theirs = Graph.call_function

    def call_function(self, *args, **kwargs):
        node = theirs(self, *args, **kwargs)
        node.meta["more"] = True
        return node

    assert insert_call(Graph()) is new_nodes._insert
    assert insert_call(MoreNodes()) is not new_nodes._insert
    monkeypatch.setattr(Graph, "call_function", call_function)
    new_nodes._is_whole.cache_clear()
    with pytest.warns(RuntimeWarning, match="those made here differ in nodes"):
        assert insert_call(Graph()) is call_function
