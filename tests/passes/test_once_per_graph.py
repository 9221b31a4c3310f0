"""What is equal in all layers is made once per graph: no node of a layer computes a tensor from sizes and numbers alone."""

from typing import Any

import pytest
import torch
from graph_build import build
from situations import SITUATIONS, case_of
from torch.fx import Graph, Node

from moe_lowering import MoeLowering, simulator
from moe_lowering.matrix.forms import FORMS
from moe_lowering.passes.emission.emitter import MARK

simulator.enable()

SIZES = (torch.ops.aten.sym_size.int,)
MEMORY = (torch.ops.aten.empty.memory_format,)  # not computed: what a layer writes into it is data


def made_without_data(graph: Graph) -> list[Node]:
    """Nodes of layers whose value is a tensor that follows from sizes: nothing that they read, read at any depth, is data."""
    has_data: dict[Node, bool] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            has_data[node] = isinstance(node.meta.get("val"), torch.Tensor)
        else:
            has_data[node] = node.target in MEMORY or (
                node.target not in SIZES and any(has_data[each] for each in node.all_input_nodes)
            )
    return [
        node
        for node, data in has_data.items()
        if not data and node.meta.get("custom") == {MARK: "emitted"} and isinstance(node.meta["val"], torch.Tensor)
    ]


def lowered(name: str, situation: str, quantisation: str) -> Any:
    """The graph, where the form is legal in the situation."""
    case, comm = case_of(name, quantisation, situation)
    lowering, gm = MoeLowering(case.deployment, comm, policy="fixed"), build(case).gm
    lowering(gm)
    return gm if {block.comm for block in lowering.reports[0].blocks} == {comm} else None


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.form != "exact"])
def test_no_layer_makes_a_tensor_of_sizes_alone(name: str) -> None:
    graphs = {
        (situation, quantisation): lowered(name, situation, quantisation)
        for situation in SITUATIONS
        for quantisation in ("none", "w8a8")
    }
    found = {key: made_without_data(gm.graph) for key, gm in graphs.items() if gm is not None}
    assert {key: nodes for key, nodes in found.items() if nodes} == {}
    assert len(found) > len(SITUATIONS) // 2  # where the form is not legal the others are looked at


def test_the_check_sees_one() -> None:
    gm = lowered("allgather", "TP", "none")
    first = next(node for node in gm.graph.nodes if node.meta.get("custom") == {MARK: "constant"})
    first.meta["custom"] = {MARK: "emitted"}
    assert made_without_data(gm.graph) == [first]


def test_a_size_of_an_input_behind_what_is_computed_is_asked_in_each_layer() -> None:
    """Graphs of torch.compile have inputs first; nothing is read before it is defined in others."""
    case, comm = case_of("allgather", "none", "TP, symbolic")
    lowering, gm = MoeLowering(case.deployment, comm, policy="fixed"), build(case).gm
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        made = gm.graph.call_function(torch.ops.aten.full.default, ([1], 0.0))
    values = [node.meta["val"] for node in gm.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    with values[0].fake_mode:
        made.meta["val"] = torch.full([1], 0.0)
    lowering(gm)
    assert {block.comm for block in lowering.reports[0].blocks} == {comm}
    gm.graph.lint()
