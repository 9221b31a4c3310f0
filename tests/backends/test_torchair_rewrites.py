"""What GE mode needs after the lowering: all-to-all, checks of the token count, communication that stays; its configuration."""

import ge_checks
import pytest
import torch
from test_torchair_conversion import (
    EP,
    HIDDEN,
    TOKENS,
    deployed,
    layer,
    refusal,
    tokens,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from moe_lowering import Deployment, MoeLowering, torchair_config
from moe_lowering.backends import ge_missing, ge_rewrites
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
