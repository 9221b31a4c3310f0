"""The forms of torch_npu chains, for the table of forms; and operators that are known and raised in no form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.raise_foreign.match_first_routing import PERMUTE, ROUTE_V1, match_permute, match_routing_v1
from moe_lowering.passes.raise_foreign.match_gathered_chain import FORM as GATHERED
from moe_lowering.passes.raise_foreign.match_gathered_chain import REDUCED, match_gathered
from moe_lowering.passes.raise_foreign.match_mc2_chain import FIRST, SECOND, WITH_NORM, match_mc2, match_mc2_v1
from moe_lowering.passes.raise_foreign.match_routing_chain import ROUTE, match_routing
from moe_lowering.passes.raise_foreign.npu_chain import Chain, foreign_block
from moe_lowering.passes.raise_foreign.records import ForeignBlock, ForeignForm, NotThisForm

# Operators that begin a chain which is recognised and left, and what would be raised in their place.
NOT_RAISED = {
    "npu_moe_re_routing": "npu_moe_distribute_dispatch_v2, whose counts stay on the device",
    "npu_alltoallv_gmm": "npu_moe_distribute_dispatch_v2, whose counts stay on the device",
    "npu_gmm_alltoallv": "npu_moe_distribute_combine_v2, whose counts stay on the device",
}


def _each(anchors: Sequence[Node]) -> list[list[Node]]:
    return [[node] for node in anchors]


def _form(name: str, anchor: str, match: Callable[[Node, Deployment], Chain]) -> ForeignForm:
    def matched(graph: Graph, anchors: list[Node], deployment: Deployment) -> ForeignBlock:
        return foreign_block(match(anchors[0], deployment), graph)

    return ForeignForm(name, (f"npu.{anchor}.default",), _each, matched)


def _not_raised(graph: Graph, anchors: list[Node], deployment: Deployment) -> ForeignBlock:
    name = getattr(anchors[0].target, "_opname", "")
    raise NotThisForm(anchors[0], "raise.version", f"npu.{name}, which is recognised and not raised", NOT_RAISED[name])


def _match_routing(route: Node, deployment: Deployment) -> Chain:
    """Over one rank, or of tokens that were gathered from several."""
    experts = argument(route, "expert_num")
    whole = list(argument(route, "active_expert_range") or [0, experts]) == [0, experts]
    return (
        match_gathered(route, deployment) if deployment.ep_size != 1 and not whole else match_routing(route, deployment)
    )


def _never(graph: Graph, anchors: list[Node], deployment: Deployment) -> ForeignBlock:
    raise AssertionError("a form without anchors of its own")


NPU_FORMS = (
    ForeignForm(GATHERED, (), _each, _never),  # its anchor is that of routing_v2
    ForeignForm(REDUCED, (), _each, _never),  # likewise
    ForeignForm(WITH_NORM.form, (), _each, _never),  # that of mc2_v2
    _form(SECOND.form, SECOND.dispatch, match_mc2),
    _form(FIRST.form, FIRST.dispatch, match_mc2_v1),
    _form("routing_v2", ROUTE, _match_routing),
    _form("routing_v1", ROUTE_V1, match_routing_v1),
    _form("permute", PERMUTE, match_permute),
    ForeignForm("npu_not_raised", tuple(f"npu.{name}.default" for name in NOT_RAISED), _each, _not_raised),
)
