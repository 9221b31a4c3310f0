"""``call_name``: what a node is, for people."""

import math
import operator

import pytest
import torch
from torch.fx import Graph

from moe_lowering.passes.graph.memory_effects import describe
from moe_lowering.passes.graph.operator_names import call_name

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.eq.Scalar, "aten.eq.Scalar"),
        (aten.eq, "aten.eq"),
        (math.sqrt, "math.sqrt"),
        (operator.add, "operator.add"),
        (torch.sym_max, "torch.sym_max"),
        (torch.ops.higher_order.cond, "cond"),
    ],
)
def test_of_a_call(target, name):
    graph = Graph()
    node = graph.call_function(target, (graph.placeholder("x"),))
    assert call_name(node) == name


def test_of_results_inputs_and_methods():
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.create_node("get_attr", "w")
    ids = graph.call_function(operator.getitem, (graph.call_function(aten.topk.default, (x, 2)), 1))
    assert call_name(ids) == "aten.topk.default[1]" and describe(ids) == "getitem (aten.topk.default[1])"
    assert [call_name(each) for each in (x, weight)] == ["an input", "a constant"]
    assert call_name(graph.call_method("sum", (x,))) == "sum"
    assert call_name(graph.output(x)) == "the output"
    assert call_name(graph.call_function(operator.getitem, ((1, 2), 0))) == "operator.getitem"
