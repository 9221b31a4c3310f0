"""What GE mode needs after the lowering: all-to-all, checks of the token count, communication that stays, fused operators."""

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

from moe_lowering import Deployment, MoeLowering, torchair_config
from moe_lowering.backends import ge_converters, ge_missing, ge_rewrites
from moe_lowering.passes.graph.edit_log import EditLog
from moe_lowering.simulator import ge
from moe_lowering.testing.ge import convert

SPLITS = [[2, 0, 3, 1], [1, 1, 1, 1], [0, 4, 0, 2], [5, 0, 1, 0]]  # rows from rank i to rank j


# --------------------------------------------------------------------------------------------------------------- all-to-all


def exchanged(shape, received, sent, group):
    """The arguments of the GE form of one all-to-all."""
    import torchair  # noqa: F401  # it defines the operator

    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(shape)
    node = graph.call_function(torch.ops._c10d_functional.all_to_all_single.default, (x, received, sent, group))
    node.meta["val"] = torch.empty((sum(received), *shape[1:]))
    graph.output(graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (node,)))
    ge_rewrites.split_all_to_all(EditLog(graph))
    [new] = graph.find_nodes(op="call_function", target=torch.ops.npu_define.all_to_all_single_npu.default)
    assert not graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_to_all_single.default)
    assert next(iter(new.users)).target is torch.ops._c10d_functional.wait_tensor.default
    return new.args[1:]


@pytest.mark.parametrize("row", [(), (3,), (2, 3)])
def test_all_to_all_moves_the_same_elements(row):
    """The counts and displacements of four ranks, followed by hand, against splitting rows."""
    inputs = [torch.randn(sum(splits), *row) for splits in SPLITS]
    with deployed() as deployment:
        arguments = [
            exchanged(inputs[r].shape, [SPLITS[i][r] for i in range(EP)], SPLITS[r], deployment.ep_group)
            for r in range(EP)
        ]
    for r in range(EP):
        counts, starts = arguments[r][2:4]
        flat = torch.full((sum(counts),), torch.nan)
        for i in range(EP):
            sent, at = arguments[i][0][r], arguments[i][1][r]
            assert sent == counts[i]
            flat[starts[i] : starts[i] + counts[i]] = inputs[i].flatten()[at : at + sent]
        expected = torch.cat([inputs[i].split(SPLITS[i])[r] for i in range(EP)])
        assert torch.equal(flat.reshape(-1, *row), expected)
        assert arguments[r][5:] == (list(range(EP)), EP)


def test_all_to_all_of_a_group_that_is_not_there():
    with deployed(), pytest.raises(ge_missing.GeConversionError, match="group 'nowhere' names no process group"):
        exchanged((4, 2), [1] * EP, [1] * EP, "nowhere")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_form_of_the_lowering_has_no_converter_before_the_rewrite(dynamic, monkeypatch):
    monkeypatch.setattr(ge_rewrites, "split_all_to_all", lambda edits: None)
    with deployed() as deployment:
        text = refusal(layer(deployment), (tokens(),), deployment, comm="alltoall", dynamic=dynamic)
    assert "_c10d_functional.all_to_all_single.default): no GE converter" in text


# -------------------------------------------------------------------------------------------------------------- token checks


def with_tokens(graph, count):
    """The arguments of a call with another number of tokens."""
    given = []
    for argument in graph.arguments:
        if isinstance(argument, int):
            given.append(count)
        elif argument.shape == (TOKENS, HIDDEN):
            given.append(tokens(count))
        else:
            given.append(argument)
    return given


def test_a_dynamic_graph_refuses_other_sizes_in_the_cached_program():
    with deployed(max_tokens=32, equal_tokens=False) as deployment:
        graph = convert(layer(deployment), (tokens(),), deployment, dynamic=True, comm="mc2")
        ge.call(graph, *with_tokens(graph, TOKENS))
        ge.call(graph, *with_tokens(graph, 32))
        with pytest.raises(RuntimeError, match="T is 33, but this graph was lowered for T from"):
            ge.call(graph, *with_tokens(graph, 33))


def test_a_check_of_several_dimensions():
    """T is the product of the leading dimensions."""
    with deployed(max_tokens=64, equal_tokens=False) as deployment:
        x = tokens().reshape(2, 12, HIDDEN)
        graph = convert(layer(deployment), (x,), deployment, dynamic=True, comm="mc2")

        def called(batch, length):
            numbers = iter((batch, length))
            ge.call(graph, *(
                next(numbers) if isinstance(a, int) else tokens(batch * length).reshape(batch, length, HIDDEN)
                if a.shape == x.shape else a
                for a in graph.arguments
            ))  # fmt: skip

        called(4, 16)
        with pytest.raises(RuntimeError, match="T is 65, but"):
            called(5, 13)


def test_without_the_rewrite_there_is_no_check(monkeypatch):
    """The twin: then the program runs with any size."""

    def drop(edits):
        for node in edits.graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.assert_tokens.default):
            edits.erase([node])

    monkeypatch.setattr(ge_rewrites, "place_token_checks", drop)
    with deployed(max_tokens=32, equal_tokens=False) as deployment:
        graph = convert(layer(deployment), (tokens(),), deployment, dynamic=True, comm="mc2")
        ge.call(graph, *with_tokens(graph, 33))


def test_a_static_size_outside_of_the_range_fails_the_conversion():
    with deployed(max_tokens=16, equal_tokens=False) as deployment:
        text = refusal(layer(deployment), (tokens(),), deployment, comm="mc2")
    assert f"T is {TOKENS}, but this graph was lowered for T from" in text


# ------------------------------------------------------------------------------------------------------------- communication


@pytest.mark.parametrize(
    ("comm", "kept"),
    [("mc2", True), ("allgather", True), ("fused_mc2", True), ("mc2", False), ("allgather", False)],
)
def test_communication_that_no_output_needs_is_kept(comm, kept, monkeypatch):
    """Without the rewrite it is lost; fused operators are kept by their converter."""
    if not kept:
        monkeypatch.setattr(ge_rewrites, "keep_communication", lambda graph: None)
    last = {"mc2": "MoeDistributeCombineV2", "allgather": "HcomReduceScatter", "fused_mc2": "DispatchFFNCombineBF16"}[
        comm
    ]
    with deployed() as deployment:
        model = layer(deployment)

        def forward(x):
            model(x)
            return x * 2

        graph = convert(forward, (tokens(),), deployment, comm=comm)
    assert (ge_checks.one(graph, last).name in graph.ancestors("NetOutput")) == kept


class Compares(torch.nn.Module):
    """A layer whose results are kept where one integer is less than another, of another type."""

    def __init__(self, deployment):
        super().__init__()
        self.layer = layer(deployment)

    def forward(self, x):
        return torch.where(x[:, :1].to(torch.int32) < x[:, 1:2].to(torch.int64), self.layer(x), x)


@pytest.mark.parametrize("rewritten", [True, False])
def test_comparisons_are_of_one_type(monkeypatch, rewritten):
    if not rewritten:
        monkeypatch.setattr(ge_rewrites, "compare_in_one_type", lambda edits: None)
    with deployed() as deployment:
        graph = convert(Compares(deployment), (tokens(),), deployment, comm="allgather")
    assert ["Less" in said for said in graph.mixed()] == [True] * (not rewritten)


# ----------------------------------------------------------------------------------------------------------- fused operators


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


# ------------------------------------------------------------------------------------------------------------- configuration


def test_config_is_checked():
    import torchair

    deployment = Deployment()
    other = torchair.CompilerConfig()
    other.mode = "reduce-overhead"
    with pytest.raises(ValueError, match=r"config\.mode is 'reduce-overhead'; accepted: 'max-autotune'"):
        torchair_config(deployment, config=other)
    with pytest.raises(ValueError, match=r"with mode 'ge' \(it has 'npugraph_ex'\)"):
        torchair_config(deployment, lowering=MoeLowering(deployment))
    with pytest.raises(ValueError, match="give either lowering, or comm"):
        torchair_config(deployment, lowering=MoeLowering(deployment.replace(mode="ge")), comm="mc2")
    with pytest.raises(ValueError, match=r"deployment\.capture is False"):
        torchair_config(deployment.replace(capture=False))
    assert torchair_config(deployment).mode.value == "max-autotune"


def test_the_users_own_pass_runs_first():
    import torchair

    seen = []
    config = torchair.CompilerConfig()
    config.post_grad_custom_pre_pass = lambda gm, *_: seen.append([str(n.target) for n in gm.graph.nodes])
    with deployed(1) as deployment:
        convert(layer(deployment), (tokens(),), deployment, config=config)
    assert "moe_lowering.dispatch.default" in seen[0] and len(seen) == 1


def test_the_hook_names_its_deployment():
    """torchair's compile cache hashes the hook's code: another deployment is another constant in it."""
    hooks = [
        torchair_config(Deployment(soc=soc, max_tokens=bound)).post_grad_custom_pre_pass.value
        for soc, bound in (("A3", 0), ("A3", 0), ("A2", 0), ("A3", 64))
    ]
    constants = [hook.__code__.co_consts for hook in hooks]
    assert constants[0] == constants[1] and len({str(c) for c in constants}) == 3


def test_a_converter_that_only_raises_is_none():
    with ge.engine(), FakeTensorMode():
        assert "not supported" in ge_missing.missing_converter(torch.ops.aten.bitwise_and.Scalar)
        assert ge_missing.missing_converter(torch.ops.aten.bitwise_and.Tensor) == ""


def test_nothing_is_left_of_an_empty_graph():
    graph = Graph()
    graph.output(graph.placeholder("x"))
    ge_rewrites.finish(EditLog(graph))
    ge_missing.require_converters(graph)
    assert len(GraphModule({}, graph).graph.nodes) == 2
