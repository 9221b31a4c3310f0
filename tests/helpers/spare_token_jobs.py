"""What runs on ranks that send a token of no expert behind their own, whole and broken on purpose."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import shared_rank_jobs as jobs
import torch
from shared_rank_jobs import Case
from torch.fx import GraphModule, Node

from moe_lowering import MoeLowering, lowering_backend, shard_experts

aten = torch.ops.aten


def lower_and_run(rank: int, case: Case, mutation: str = "") -> list[torch.Tensor]:
    """This rank's results of each call; the lowered graph is changed by ``mutation`` before it runs."""
    where = jobs.deployment(rank, case)

    def change(gm: GraphModule, *_: Any) -> None:
        assert find(gm, aten.fill_.Scalar), "no row is zero whatever the counts are: no token is spare"
        if mutation:
            MUTATIONS[mutation](gm)
            gm.recompile()

    torch._dynamo.reset()
    lowering = MoeLowering(where, case.comm, strict=True)
    module = shard_experts(jobs.whole(case), where)
    compiled = torch.compile(
        module, backend=lowering_backend(lowering, change), fullgraph=True, dynamic=case.dynamic or None
    )
    outputs = []
    with torch.no_grad():
        for per_rank in case.counts:
            x, mask = jobs.tokens(case, rank, per_rank[rank])
            outputs.append(compiled(x) if mask is None else compiled(x, mask))
    return outputs


def find(gm: GraphModule, target: Any) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def _let_the_last_row_through(gm: GraphModule) -> None:
    for node in find(gm, aten.fill_.Scalar):
        gm.graph.erase_node(node)


def _give_it_experts(gm: GraphModule) -> None:
    (ids,) = find(gm, aten.arange.start)
    first, end = ids.args
    ids.args = (0, end - first)


def _keep_it_in_front(gm: GraphModule) -> None:
    """The result's first line is dropped in place of its last."""
    slices = [node for node in find(gm, aten.slice.Tensor) if node.args[1:] == (0, 0, -1)]
    assert slices
    for node in slices:
        node.args = (node.args[0], 0, 1, sys.maxsize)


MUTATIONS: dict[str, Callable[[GraphModule], None]] = {
    "the last row is let through": _let_the_last_row_through,
    "the spare token has experts": _give_it_experts,
    "the first token is dropped": _keep_it_in_front,
}
