"""torchair's GE mode converts what the lowering emits: one MoE layer, every implementation, static and dynamic.

The conversion is real; the engine is not there, and the look-up of registered operators is a stand-in (simulator/ge.py).
"""

import contextlib
import functools

import ge_checks
import pytest
import torch

from moe_lowering import MoE, shard_experts
from moe_lowering.backends import ge_converters, ge_missing
from moe_lowering.simulator import ge
from moe_lowering.testing.ge import convert
from moe_lowering.testing.graphs import fake_deployment

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 1024, 512, 16, 4, 24


EP, RANK = 4, 1


COMMS = {"buffers": "alltoall", "finalize_routing": "allgather"}
FIELDS = {
    "buffers": {"max_rows": 90},  # fewer than 24 tokens to 4 experts each
    "finalize_routing": {"unpermute_operator": "finalize_routing"},
}


def layer(deployment, quantisation="none"):
    model = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, dtype=torch.bfloat16).eval().requires_grad_(False)
    if deployment.ep_size > 1:
        shard_experts(model, deployment)
    if quantisation != "none":
        from moe_lowering import quantise_experts

        quantise_experts(model, quantisation)
    return model.to("npu")


def tokens(count=TOKENS):
    return torch.randn(count, HIDDEN, dtype=torch.bfloat16).to("npu")


@contextlib.contextmanager
def deployed(ep=EP, **fields):
    with fake_deployment(ep_size=ep, ep_rank=RANK if ep > 1 else 0, **fields) as deployment:
        yield deployment


@functools.cache
def converted(comm, dynamic, ep=EP, quantisation="none", weight_format="nz"):
    """The GE graph of one layer, and the deployment it is for; ``buffers`` is a form of AllToAll, ``finalize_routing`` AllGather
    with that operator."""
    with deployed(ep, weight_format=weight_format, **FIELDS.get(comm, {})) as deployment:
        module, given = layer(deployment, quantisation), (tokens(),)
        return convert(module, given, deployment, dynamic=dynamic, comm=COMMS.get(comm, comm)), deployment


def refusal(model, args, deployment, **options):
    """The message with which a conversion fails."""
    with pytest.raises(Exception) as caught:
        convert(model, args, deployment, **options)
    return str(caught.value)


ALL = [("allgather", 1), ("allgather", EP), ("alltoall", EP), ("buffers", EP), ("mc2", EP), ("fused_mc2", EP)]
ALL += [("finalize_routing", EP)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("comm", "ep"), ALL)
def test_node_types_attributes_and_edges(comm, ep, dynamic):
    graph, deployment = converted(comm, dynamic, ep)
    assert [block.comm for block in graph.reports[-1].blocks] == [COMMS.get(comm, comm)]
    # the shorter of max_rows and a size that varies is no size that torchair converts
    form = comm if comm == "buffers" and not dynamic else COMMS.get(comm, comm)
    ge_checks.CHECKS[form](graph, deployment, EXPERTS, TOP_K)
    assert graph.mixed() == []
    shapes = [node.outputs[0][2] for node in graph.of_type("Data")]
    assert ((-1, HIDDEN) in shapes, (TOKENS, HIDDEN) in shapes) == (dynamic, not dynamic)


def exchange_weights(first, last):
    """Of both matmuls."""
    first.args, last.args = (first.args[0], last.args[1]), (last.args[0], first.args[1])


def exchange_aids(first, last):
    """What dispatch tells combine."""
    last.args = (*last.args[:2], last.args[3], last.args[2], *last.args[4:])


def name_another_group(first, last):
    last.kwargs = {**last.kwargs, "group": "another"}


def uneven_splits(at):
    """The same sum, one element more for the first rank."""

    def change(*nodes):
        node = nodes[at]
        splits = [node.args[1][0] + 1, node.args[1][1] - 1, *node.args[1][2:]]
        node.args = (node.args[0], splits, splits, *node.args[3:])

    return change


def split_counts(first, *nodes):
    """The rows' splits where there should be four experts' counts, as many in all."""
    counts = min(nodes, key=lambda node: node.args[1][0])
    size = sum(counts.args[1]) // 2
    counts.args = (counts.args[0], [size, 0, size, 0], [size, 0, size, 0], *counts.args[3:])


def send_home_in_order_of_sending(first, second, *nodes):
    """The results by the places of the rows that this rank sent."""
    second.args = (*second.args[:2], first.args[2])


def count_what_was_sent(first, last):
    """Both matmuls with the counts of the first sort."""
    sorts = [n for n in first.graph.nodes if getattr(n.target, "__name__", "").startswith("npu_moe_init_routing_v2")]
    items = [n for n in sorts[0].users if n.args[1] == 2]
    for matmul in (first, last):
        matmul.kwargs = {**matmul.kwargs, "group_list": items[0]}


def let_undefined_rows_through(*nodes):
    """Where the row index of a slot is -1."""
    nodes[-1].replace_all_uses_with(nodes[-1].args[0])


WRONG = [
    ("mc2", "npu_moe_distribute_combine_v2", exchange_aids),
    ("fused_mc2", "dispatch_ffn_combine", name_another_group),
    ("allgather", "npu_grouped_matmul", exchange_weights),
    ("alltoall", "npu_grouped_matmul", exchange_weights),
    ("alltoall", "all_to_all_single", uneven_splits(0)),
    ("buffers", "npu_grouped_matmul", exchange_weights),
    ("buffers", "all_to_all_single", uneven_splits(0)),
    ("buffers", "all_to_all_single", uneven_splits(-1)),
    ("buffers", "all_to_all_single", split_counts),
    ("buffers", "index_select", send_home_in_order_of_sending),
    ("buffers", "npu_grouped_matmul", count_what_was_sent),
    ("allgather", "masked_fill", let_undefined_rows_through),
    ("alltoall", "masked_fill", let_undefined_rows_through),
]


@pytest.mark.parametrize(("comm", "operator", "change"), WRONG)
def test_the_checks_see_one_wrong_input(comm, operator, change):
    """The twin of the test above: a pass after the lowering exchanges two inputs, or names another group or split."""
    changed = []

    def swap(gm, example_inputs, config):
        nodes = [n for n in gm.graph.nodes if getattr(n.target, "__name__", "").startswith(operator)]
        change(*(nodes if comm in ("alltoall", "buffers") else (nodes[0], nodes[-1])))
        changed.append(change)

    import torchair

    config = torchair.CompilerConfig()
    config.post_grad_custom_post_pass = swap
    with deployed(**FIELDS.get(comm, {})) as deployment:
        module, given = layer(deployment), (tokens(),)
        graph = convert(module, given, deployment, comm=COMMS.get(comm, comm), config=config)
    assert changed == [change]
    with pytest.raises(AssertionError):
        ge_checks.CHECKS[comm](graph, deployment, EXPERTS, TOP_K)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("comm", ["allgather", "mc2"])
def test_w8a8(comm, dynamic):
    graph, _ = converted(comm, dynamic, quantisation="w8a8")
    assert [block.comm for block in graph.reports[-1].blocks] == [comm]
    types = graph.types()
    assert not types & {"MoeInitRoutingQuant", "GroupedMatmulSwigluQuant", "SwiGluQuant"}  # these have no converter
    matmuls = graph.of_type("GroupedMatmul", "GroupedMatmulSwigluQuantV2")
    assert len(matmuls) == 2
    for matmul in matmuls:
        weight = next(edge for name, edge in matmul.inputs if name.startswith("weight"))
        assert graph.dtype(weight) == "DT_INT8"
    assert len({matmul.edge("group_list") for matmul in matmuls}) == 1
    if comm == "mc2":
        dispatch = ge_checks.one(graph, "MoeDistributeDispatchV2")
        ge_checks.attributes(dispatch, quant_mode=2)
        assert f"{dispatch.name}:3" == matmuls[0].edge("group_list")
        assert f"{dispatch.name}:0" in {edge for _, edge in matmuls[0].inputs}
        assert dispatch.name in graph.ancestors(matmuls[0].name)
        assert graph.readers(f"{dispatch.name}:1")  # scales of the tokens
    assert graph.mixed() == []


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("comm", ["allgather", "mc2"])
def test_w8a8_in_nd(comm, dynamic):
    """The first matmul in int32, scaled by the operator that quantises; the twin with FRACTAL_NZ has none."""
    graph, _ = converted(comm, dynamic, quantisation="w8a8", weight_format="nd")
    assert [block.comm for block in graph.reports[-1].blocks] == [comm]
    first, second = graph.of_type("GroupedMatmul")
    dequant = ge_checks.one(graph, "DequantSwigluQuant")
    ge_checks.attributes(dequant, activate_left=True, quant_mode="dynamic", activate_dim=-1)
    assert dequant.attributes.get("swiglu_mode", 0) == 0  # written when it is not the default
    assert dequant.edge("x") == f"{first.name}:0" and graph.dtype(dequant.edge("x")) == "DT_INT32"
    assert graph.dtype(dequant.edge("weight_scale")) == "DT_FLOAT"
    assert graph.dtype(dequant.edge("activation_scale")) == "DT_FLOAT"
    assert dequant.edge("group_index") == first.edge("group_list") == second.edge("group_list")
    assert not {"bias", "quant_scale", "quant_offset"} & {name for name, edge in dequant.inputs if edge}
    assert {f"{dequant.name}:0", f"{dequant.name}:1"} <= {edge for _, edge in second.inputs}
    assert graph.mixed() == []
    assert not converted(comm, dynamic, quantisation="w8a8")[0].of_type("DequantSwigluQuant")


def test_w4a8_scales_are_masked_bits():
    graph, _ = converted("allgather", False, quantisation="w4a8")
    masks = graph.of_type("BitwiseAnd")
    assert len(masks) == 2
    for matmul in graph.of_type("GroupedMatmul"):
        assert graph.ancestors(matmul.name) & {mask.name for mask in masks}
        (scale,) = (edge for name, edge in matmul.inputs if name.startswith("scale"))
        assert graph.dtype(scale) == "DT_UINT64"


def test_w8a8_fused():
    graph, deployment = converted("fused_mc2", False, quantisation="w8a8")
    fused = ge_checks.one(graph, "DispatchFFNCombine")
    ge_checks.attributes(fused, group=deployment.mc2_group, weightNz=True)
    assert {graph.dtype(fused.edge(n)) for n in ("w10", "w20")} == {"DT_INT8"}
    assert {graph.dtype(fused.edge(n)) for n in ("scale10", "scale20")} == {"DT_INT64"}
    assert ge_checks.inferred(fused) and fused.edge("xActiveMaskOptional") == ""


# ------------------------------------------------------------------------------------------------- what cannot be converted


def test_an_operator_without_converter_is_named_before_torchair_fails():
    def f(x, index):
        return torch.ops.npu.npu_moe_token_unpermute(x, index) + torch.ops.npu.npu_swiglu_quant(x)[1].sum()

    with deployed(1) as deployment:
        text = refusal(f, (tokens(), torch.arange(TOKENS, dtype=torch.int32).to("npu")), deployment)
    assert "torchair's GE mode cannot convert" in text
    assert "npu_moe_token_unpermute.default): no GE converter" in text
    assert "npu.npu_swiglu_quant.default): no GE converter" in text
    assert "test_torchair_conversion.py" in text  # the line of the model
    assert "get_or_auto_gen_converter" not in text  # torchair was not asked


def test_operators_with_converter_are_not_refused():
    def f(x, ids):
        return (
            torch.ops.npu.npu_swiglu(x).relu()
            + torch.ops.npu.npu_moe_init_routing_v2(
                x, ids, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, 4]
            )[0][:TOKENS, : HIDDEN // 2]
        )

    ids = torch.zeros(TOKENS, 2, dtype=torch.int32).to("npu")
    with deployed(1) as deployment:
        graph = convert(f, (tokens(), ids), deployment)
    assert {"SwiGlu", "MoeInitRoutingV3", "Relu"} <= graph.types()


def test_a_block_that_stays_is_named_with_the_reason():
    with deployed(weight_format="nd") as deployment:
        text = refusal(layer(deployment), (tokens(),), deployment, comm="fused_mc2")
    assert "moe_lowering.dispatch.default): a generic operator of moe_lowering" in text
    assert "fused_mc2 was asked for and is not legal" in text


def test_mega_moe_has_no_converter_and_says_why():
    with ge.engine():
        ge_converters.register()
        assert "symmetric buffer" in ge_missing.missing_converter(torch.ops.moe_lowering.mega_moe.default)


@pytest.mark.parametrize(
    "name",
    [
        "npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2",
        "npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant_v2", "npu_dynamic_quant", "npu_clipped_swiglu", "npu_swiglu",
        "npu_dequant_swiglu_quant",
    ],
)  # fmt: skip
def test_operators_of_the_lowering_have_converters(name):
    with ge.engine():
        assert ge_missing.missing_converter(getattr(torch.ops.npu, name).default) == ""


@pytest.mark.parametrize(
    "name",
    [
        "npu_moe_token_permute", "npu_moe_token_unpermute", "npu_moe_init_routing_quant", "npu_grouped_matmul_swiglu_quant",
        "npu_swiglu_quant",
    ],
)  # fmt: skip
def test_operators_without_converter_are_known(name):
    if not hasattr(torch.ops.npu, name):
        pytest.skip(f"this torch_npu has no {name}")
    with ge.engine():
        assert "no GE converter" in ge_missing.missing_converter(getattr(torch.ops.npu, name).default)
