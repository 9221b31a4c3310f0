"""GE conversion of three models of transformers, whole, from the dump: every layer's MoE block, static and dynamic.

The models are those of the command line: small, two layers, random weights. See test_torchair_conversion.py for what is
checked of one layer.
"""

import functools

import pytest
import torch

from moe_lowering import shard_experts
from moe_lowering.cli.lower import models
from moe_lowering.cli.lower.prepare import register_transformers
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.testing.ge import convert
from moe_lowering.testing.graphs import fake_deployment

pytest.importorskip("transformers")
EP, RANK, TOKENS = 4, 1, 24
# what one MoE layer becomes: (type, how many, attribute that must name the group of the deployment)
BLOCK = {
    "mc2": [
        ("MoeDistributeDispatchV2", 1, "group_ep"),
        ("MoeDistributeCombineV2", 1, "group_ep"),
        ("GroupedMatmul", 2, ""),
    ],
    "allgather": [
        ("MoeInitRoutingV3", 1, ""),
        ("HcomAllGather", 3, ""),
        ("HcomReduceScatter", 1, ""),
        ("GroupedMatmul", 2, ""),
    ],
    "alltoall": [
        ("MoeInitRoutingV3", 1, ""),
        ("HcomAllGather", 3, ""),
        ("HcomAllToAllV", 1, ""),
        ("GroupedMatmul", 2, ""),
    ],
    "fused_mc2": [("DispatchFFNCombineBF16", 1, "group")],
}
NEVER = {"MoeTokenUnpermute", "MoeTokenPermute", "MoeFinalizeRoutingV2"}


@functools.cache
def converted(family, comm, dynamic):
    request = LowerRequest(family, comm=comm, ep=EP, tokens=TOKENS, dynamic=dynamic)
    register_transformers(request)
    made = models.plan_model(request)
    with fake_deployment(ep_size=EP, ep_rank=RANK) as deployment:
        model = models.build(made, torch.bfloat16)
        shard_experts(model, deployment)
        ids = models.input_ids(made, request, request.lengths[0], RANK).to("npu")
        # Python floats of a model (scaling factors) are constants, as the command line compiles it
        with torch._dynamo.config.patch(specialize_float=True):
            forward = functools.partial(models.logits, model.to("npu"))
            graph = convert(forward, (ids,), deployment, comm=comm, dynamic=dynamic)
    return graph, deployment, made, ids.shape


FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3"]
# Mixtral's block differs from Qwen3's by its router alone, which knows nothing of how T varies
KINDS = [
    (family, dynamic) for family in FAMILIES for dynamic in (False, True) if (family, dynamic) != ("mixtral", True)
]
BY_KIND = pytest.mark.parametrize(
    ("family", "dynamic"), KINDS, ids=lambda v: v if isinstance(v, str) else ("static", "dynamic")[v]
)


@pytest.mark.parametrize("comm", BLOCK)
@BY_KIND
def test_every_moe_layer_is_converted(family, comm, dynamic):
    graph, deployment, _, shape = converted(family, comm, dynamic)
    blocks = [block.comm for block in graph.reports[-1].blocks]
    assert blocks and set(blocks) == {comm}
    assert len(graph.of_type("MoeGatingTopK")) == len(graph.reports[-1].routers) == len(blocks)
    for kind, each, attribute in BLOCK[comm]:
        nodes = graph.of_type(kind)
        assert len(nodes) == each * len(blocks), kind
        if attribute:
            assert {node.attributes[attribute] for node in nodes} == {deployment.mc2_group}
    assert not graph.types() & NEVER
    inputs = {node.outputs[0][2] for node in graph.of_type("Data")}
    assert ((-1, -1) in inputs or (2, -1) in inputs, tuple(shape) in inputs) == (dynamic, not dynamic)


@BY_KIND
def test_edges_of_mc2_in_every_layer(family, dynamic):
    """Dispatch's outputs reach combine untouched, counts reach both matmuls, and layers follow each other."""
    graph, _, made, _ = converted(family, "mc2", dynamic)
    previous = None
    for dispatch, combine in zip(
        graph.of_type("MoeDistributeDispatchV2"), graph.of_type("MoeDistributeCombineV2"), strict=True
    ):
        assert combine.edge("assist_info_for_combine") == f"{dispatch.name}:2"
        assert combine.edge("ep_send_counts") == f"{dispatch.name}:4"
        assert combine.edge("expert_ids") == dispatch.edge("expert_ids")
        assert dispatch.attributes["moe_expert_num"] == combine.attributes["moe_expert_num"] == made.experts
        assert dispatch.attributes["ep_rank_id"] == combine.attributes["ep_rank_id"] == RANK
        second = graph.producer(combine.edge("expand_x"))
        first = graph.producer(graph.producer(second.edge("x0")).edge("x"))
        assert (first.type, second.type) == ("GroupedMatmul", "GroupedMatmul")
        assert first.edge("x0") == f"{dispatch.name}:0"
        assert first.edge("group_list") == second.edge("group_list") == f"{dispatch.name}:3"
        assert previous is None or previous in graph.ancestors(dispatch.name)
        previous = combine.name
    assert previous in graph.ancestors("NetOutput")


def test_a_block_that_cannot_be_lowered_is_named():
    """The twin: nothing is converted halfway."""
    request = LowerRequest("mixtral", ep=EP, tokens=TOKENS)
    register_transformers(request)
    made = models.plan_model(request)
    with fake_deployment(ep_size=EP, ep_rank=RANK, soc="A3", weight_format="nd") as deployment:
        model = models.build(made, torch.bfloat16)
        shard_experts(model, deployment)
        ids = models.input_ids(made, request, request.lengths[0], RANK).to("npu")
        with pytest.raises(Exception, match="fused_mc2 was asked for and is not legal"):
            convert(functools.partial(models.logits, model.to("npu")), (ids,), deployment, comm="fused_mc2")
