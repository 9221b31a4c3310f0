"""Fused operators in GE graphs: their inputs, attributes and outputs, by their IR, and what surrounds them."""

import struct

import ge_checks
import pytest
import torch
from test_torchair_conversion import (
    EP,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    RANK,
    TOKENS,
    TOP_K,
    deployed,
    layer,
    refusal,
    tokens,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from moe_lowering.backends import ge_converters, ge_rewrites
from moe_lowering.simulator import ge
from moe_lowering.testing.ge import convert


def experts(dtype=torch.int8, local=4):
    shapes = (local, HIDDEN, 2 * INTERMEDIATE), (local, INTERMEDIATE, HIDDEN)
    w13, w2 = (torch.ones(shape, dtype=dtype).to("npu") for shape in shapes)
    scales = [torch.ones(local, width).to("npu") for width in (2 * INTERMEDIATE, HIDDEN)]
    return w13, w2, *scales


def routing():
    ids = torch.arange(TOKENS * TOP_K, dtype=torch.int32).reshape(TOKENS, TOP_K) % EXPERTS
    return ids.to("npu"), torch.rand(TOKENS, TOP_K).to("npu"), (torch.arange(TOKENS) < 20).to("npu")


def test_scales_keep_their_bits():
    """int64 with the float32's bits in the low half and nothing in the high one, against struct."""
    scale = torch.tensor([1.0, -0.5, 3.1e-7, 0.0, -2.5e5])
    with FakeTensorMode() as fake:
        graph = Graph()
        node = graph.placeholder("scale")
        node.meta["val"] = fake.from_tensor(scale)
        graph.output(ge_rewrites._wide(graph, node))
    expected = [struct.unpack("<I", struct.pack("<f", value))[0] for value in scale.tolist()]
    wide = GraphModule({}, graph)(scale)
    assert wide.dtype == torch.int64 and wide.tolist() == expected


@pytest.mark.parametrize("masked", [False, True])
def test_dispatch_ffn_combine_quantised(masked):
    with deployed() as deployment:

        def f(x, ids, weights, mask, w13, w2, s13, s2):
            return torch.ops.moe_lowering.dispatch_ffn_combine(
                x, [w13], [w2], ids, weights, deployment.mc2_group, EP, 512, "w8a8", [s13], [s2],
                mask=mask if masked else None, swiglu_limit=7.0,
            )  # fmt: skip

        graph = convert(f, (tokens(), *routing(), *experts()), deployment)
    fused = ge_checks.one(graph, "DispatchFFNCombine")
    ge_checks.attributes(fused, M=512, group=deployment.mc2_group, swigluLimit=7.0)
    assert (
        graph.dtype(fused.edge("scale10")) == "DT_INT64" and graph.producer(fused.edge("scale10")).type == "BitwiseAnd"
    )
    assert ge_checks.inferred(fused)
    y = ge_checks.one(graph, "NetOutput").inputs[0][1]
    assert (graph.producer(fused.edge("expertIdx")).type == "TensorMove") == masked  # it writes into masked tokens' ids
    assert (graph.producer(y).type == "SelectV2") == masked
    if masked:
        assert graph.producer(y).edge("then") == fused.output("out")


def test_dispatch_gmm_combine_decode():
    with deployed() as deployment:

        def f(x, ids, weights, mask, w13, w2, s13, s2):
            return torch.ops.moe_lowering.dispatch_gmm_combine_decode(
                x, [w13], [w2], ids, weights, deployment.mc2_group, EP, RANK, EXPERTS, [s13], [s2]
            )

        graph = convert(f, (tokens(), *routing(), *experts()), deployment)
    fused = ge_checks.one(graph, "DispatchGmmCombineDecode")
    ge_checks.attributes(
        fused,
        group_ep=deployment.mc2_group,
        ep_rank_size=EP,
        ep_rank_id=RANK,
        moe_expert_num=EXPERTS,
        quant_mode=0,
        global_bs=0,
    )
    assert fused.edge("expert_smooth_scales") == "" and graph.dtype(fused.edge("gmm1_permuted_weight0")) == "DT_INT8"
    assert [kind for _, kind, _ in fused.outputs] == ["DT_BF16", "DT_INT64"] and ge_checks.inferred(fused)


def test_an_older_operator_takes_one_stacked_tensor_and_must_count():
    inputs, outputs, attributes = ge.OPERATORS["DispatchFFNCombineBF16"]
    older = dict.fromkeys(inputs, "required")
    with deployed() as deployment:
        model = layer(deployment)
        one_tensor = {"DispatchFFNCombineBF16": (older, outputs, attributes)}
        graph = convert(model, (tokens(),), deployment, comm="fused_mc2", operators=one_tensor)
        fused = ge_checks.one(graph, "DispatchFFNCombineBF16")
        assert [name for name, _ in fused.inputs] == list(inputs)
        oldest = {"DispatchFFNCombineBF16": (older, {"out": "required"}, attributes)}
        text = refusal(model, (tokens(),), deployment, comm="fused_mc2", operators=oldest)
    assert "dispatch_ffn_combine: expert_token_nums is needed, and the IR of DispatchFFNCombineBF16" in text


def test_the_operator_is_told_the_size_of_its_group_where_it_asks():
    """Required from vllm-ascend 0.30 on; an older IR does not have it."""
    for type_, quantisation in zip(ge_converters.TYPES["dispatch_ffn_combine"], ("none", "w8a8", "w4a8"), strict=True):
        inputs, outputs, attributes = ge.OPERATORS[type_]
        newer = {type_: (inputs, outputs, {**attributes, "worldSize": "VT_INT"})}
        with deployed() as deployment:
            model = layer(deployment, quantisation)
            for operators, size in ((newer, EP), ({type_: ge.OPERATORS[type_]}, None)):
                graph = convert(model, (tokens(),), deployment, comm="fused_mc2", operators=operators)
                assert ge_checks.one(graph, type_).attributes.get("worldSize") == size


def test_a_fused_operator_that_is_not_registered():
    with deployed() as deployment:
        text = refusal(layer(deployment), (tokens(),), deployment, comm="fused_mc2", operators={})
    assert "moe_lowering.dispatch_ffn_combine.default): no IR DispatchFFNCombineBF16 is registered with GE" in text
