"""Nodes erased by the pass leave what ``Graph.erase_node`` leaves (``passes/graph/erased_nodes.py``)."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule

from moe_lowering.passes.graph import erased_nodes
from moe_lowering.passes.graph.erased_nodes import eraser

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def forgotten():
    """What this process knows of torch is forgotten before and after."""
    erased_nodes._is_whole.cache_clear()
    yield
    erased_nodes._is_whole.cache_clear()


def graph_of(count=3):
    """A graph, and some of its nodes that nobody reads."""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    dead = [graph.call_function(aten.cat.default, ([x, y],), {"dim": 0}) for _ in range(count)]
    dead += [graph.call_function(operator.getitem, (dead[0], 0)), graph.get_attr("w"), graph.call_method("relu", (y,))]
    graph.output((x, y))
    return graph, dead


def describe(graph, nodes):
    names, index = graph._graph_namespace, graph._find_nodes_lookup_table.table
    kept = [(repr(n), repr(n.args), [*map(repr, n.users)]) for n in graph.nodes]
    gone = [
        (repr(n), repr(n.args), type(n.args), repr(n.kwargs), type(n.kwargs), n._erased, [*map(repr, n._input_nodes)])
        for n in nodes
    ]
    entries = [(str(key), [*map(repr, found)]) for key, found in index.items()]
    return kept, gone, entries, len(graph.nodes), [*map(repr, names._obj_to_name.items())], sorted(names._used_names)


def test_a_graph_and_what_was_erased_are_as_erase_node_leaves_them():
    ours, theirs = graph_of(), graph_of()
    erase = eraser(ours[0])
    assert erase is erased_nodes._erase
    for mine, other in zip(reversed(ours[1]), reversed(theirs[1]), strict=True):
        erase(ours[0], mine)
        theirs[0].erase_node(other)
        assert describe(*ours) == describe(*theirs)
        ours[0].lint()
    assert len(ours[0].nodes) == 3


def test_what_cannot_be_erased_is_told_as_erase_node_tells_it():
    graph, dead = graph_of()
    erase, before = eraser(graph), len(graph.nodes)
    with pytest.raises(RuntimeError, match="still had 1 users"):
        erase(graph, dead[0])
    with pytest.raises(RuntimeError, match="from wrong graph"):
        erase(Graph(), dead[1])
    assert len(graph.nodes) == before
    erase(graph, dead[1])
    with pytest.warns(UserWarning, match="already erased"):
        erase(graph, dead[1])
    assert len(graph.nodes) == before - 1


def test_hooks_of_a_graph_module_hear_of_erased_nodes():
    root = torch.nn.Module()
    root.w = torch.nn.Parameter(torch.ones(1))
    graph, _ = graph_of()
    gm, heard = GraphModule(root, graph), []
    last = [*gm.graph.nodes][-2]
    gm._register_erase_node_hook(heard.append)
    eraser(gm.graph)(gm.graph, last)
    assert heard == [last]


def test_a_torch_that_does_more_is_asked_itself(monkeypatch):
    class OtherGraph(Graph):
        pass

    theirs = Graph.erase_node

    def erase_node(self, node):
        theirs(self, node)
        node.meta["more"] = True

    assert eraser(OtherGraph()) is theirs
    monkeypatch.setattr(Graph, "erase_node", erase_node)
    erased_nodes._is_whole.cache_clear()
    with pytest.warns(RuntimeWarning, match="an erasure here differs in the node"):
        assert eraser(Graph()) is erase_node
