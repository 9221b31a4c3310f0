"""Chains whose operators are called with every argument by name: those of torch_npu are read, those of ATen told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_match_npu_chains import MC2, ROUTED, graph_of, mc2_layer, routed_layer

from moe_lowering import Deployment, MoeLowering, simulator, testing


@pytest.fixture(scope="module")
def pair():
    simulator.enable("A3")
    with testing.fake_deployment(ep_size=2) as deployment:
        yield deployment


def name_arguments(graph: torch.fx.Graph, libraries: tuple[str, ...]) -> int:
    """How many calls of these libraries have their arguments by name now."""
    calls = [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in libraries and node.args
    ]
    for node in calls:
        names = [argument.name for argument in node.target._schema.arguments]
        node.args, node.kwargs = (), {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return len(calls)


def lowered(pair: Deployment, case: str, libraries: tuple[str, ...]) -> tuple[int, Any]:
    deployment = pair if case in MC2 else Deployment(soc="A3")
    layer = mc2_layer(pair, **MC2[case]) if case in MC2 else routed_layer(**ROUTED[case])
    graph = graph_of(layer, deployment)
    named, lowering = name_arguments(graph, libraries), MoeLowering(deployment, "allgather", policy="fixed")
    lowering(torch.fx.GraphModule(layer, graph))
    return named, lowering.reports[0]


@pytest.mark.parametrize("case", [*MC2, *ROUTED])
def test_operators_of_torch_npu_are_read_by_name(pair: Deployment, case: str) -> None:
    named, report = lowered(pair, case, ("npu", "custom"))
    assert named > 3 and len(report.blocks) == 1


@pytest.mark.parametrize("case", [*MC2, *ROUTED])
def test_operators_of_aten_by_name_are_told(pair: Deployment, case: str) -> None:
    named, report = lowered(pair, case, ("aten",))
    assert named
    if not report.blocks:
        text = str(report)
        assert ("[raise.by_name]" in text or "[raise.activation]" in text) and "[raise.internal]" not in text
