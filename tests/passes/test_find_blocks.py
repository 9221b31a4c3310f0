"""Which graphs are MoE blocks. Each positive case has twins that differ in one thing and must be left alone."""

import pytest
import torch

from moe_lowering import Deployment, LoweringError, MoE, MoeLowering, lowering_backend, moe_experts, route, testing
from moe_lowering.passes.find_blocks import module_path

ops = torch.ops.moe_lowering
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 64, 32, 4, 2, 6
LOCAL = (EXPERTS, "", 1, "", 1, 0)  # num_experts, ep_group, ep_size, tp_group, tp_size, max_tokens


def tensors(tokens=TOKENS):
    torch.manual_seed(0)
    return (
        torch.randn(tokens, HIDDEN),
        torch.rand(tokens, TOP_K),
        torch.arange(tokens * TOP_K, dtype=torch.int32).reshape(tokens, TOP_K) % EXPERTS,
        torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE),
        torch.randn(EXPERTS, INTERMEDIATE, HIDDEN),
    )


def mlp(rows, scale, counts, w13, w2):
    return ops.grouped_mlp(rows, scale, counts, [w13], [w2], [], [], "swiglu", 0.0, 1.702, False)


def block(x, weights, ids, w13, w2, *, change="none"):
    """The generic chain, with at most one thing changed."""
    mask = torch.ones(x.shape[0], dtype=torch.bool) if change == "mask at one end" else None
    rows, scale, counts, handle = ops.dispatch(x, None, ids, mask, *LOCAL, 0)
    extra = None
    if change == "rows read elsewhere":
        extra = rows.sum()
    if change == "operation before the MLP":
        rows = rows * 2
    y = mlp(rows, scale, counts + 0 if change == "other counts" else counts, w13, w2)
    if change == "MLP read elsewhere":
        extra = y.sum()
    if change == "operation after the MLP":
        y = y * 2
    if change == "handle read elsewhere":
        extra = handle.sum()
    if change == "other handle":
        handle = torch.zeros(rows.shape[0], 3, dtype=torch.int32)
    if change == "MLP twice":
        y = mlp(y, scale, counts, w13, w2)
    arguments = list(LOCAL)
    if change == "other token bound":
        arguments[5] = 64
    if change == "other number of experts":
        arguments[0] = EXPERTS * 2
    end_ids = ids.clone() if change == "other ids" else ids
    y = ops.combine(y, weights, end_ids, handle, None, *arguments)
    if change == "counts read elsewhere":
        extra = counts.sum()
    return (y, extra) if extra is not None else y


def lower(function, *args, **options):
    return testing.lower_graph(function, *args, deployment=Deployment(), comm="allgather", **options)


def test_chain_is_a_block():
    lowered = lower(block, *tensors())
    testing.assert_lowered(lowered, comm="allgather", blocks=1, ops=["npu.npu_moe_init_routing_v2", "npu.npu_swiglu"])
    assert not any(name.startswith("moe_lowering.") for name in lowered.ops_after)


CHANGES = {
    "rows read elsewhere": "rows is read by 2 operations",
    "operation before the MLP": "rows goes to aten.mul",
    "other counts": "grouped_mlp does not take rows, row_scale and counts of the same dispatch",
    "MLP read elsewhere": "the grouped MLP's result is read by 2 operations",
    "operation after the MLP": "the grouped MLP's result goes to aten.mul",
    "handle read elsewhere": "handle is also read by",
    "other handle": "combine does not take the rows and the handle of the same dispatch",
    "MLP twice": "the grouped MLP's result goes to moe_lowering.grouped_mlp",
    "other token bound": "dispatch has max_tokens 0, combine has 64",
    "other number of experts": "dispatch has num_experts 4, combine has 8",
    "other ids": "dispatch has ids",
    "mask at one end": "dispatch has mask",
}
CODES = {
    "rows read elsewhere": "raise.single_use",
    "operation before the MLP": "raise.operation_between",
    "other counts": "raise.other_stage",
    "MLP read elsewhere": "raise.single_use",
    "operation after the MLP": "raise.operation_between",
    "handle read elsewhere": "raise.single_use",
    "other handle": "raise.other_stage",
    "MLP twice": "raise.operation_between",
    "other token bound": "raise.both_ends",
    "other number of experts": "raise.both_ends",
    "other ids": "raise.both_ends",
    "mask at one end": "raise.both_ends",
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_and_it_is_left_alone(change):
    lowered = lower(lambda *a: block(*a, change=change), *tensors())
    assert not lowered.report.blocks
    assert CHANGES[change] in " ".join(reason for _, reason in lowered.report.unrecognised)
    testing.assert_refused(lowered, code=CODES[change])
    assert lowered.ops_after == lowered.ops_before
    with pytest.raises(AssertionError, match="not every block was lowered"):
        testing.assert_lowered(lowered)


def test_counts_may_be_read_elsewhere():
    lowered = lower(lambda *a: block(*a, change="counts read elsewhere"), *tensors())
    testing.assert_lowered(lowered, comm="allgather", blocks=1)


def test_strict_raises_for_what_is_left():
    with pytest.raises(LoweringError, match="rows is read by 2 operations"):
        lower(lambda *a: block(*a, change="rows read elsewhere"), *tensors(), strict=True)


@pytest.mark.parametrize(
    ("stack", "name"),
    [
        ("L['self'].layers.3.experts", "layers.3.experts"),
        ("L['self']._modules['layers']._modules['3'].experts", "layers.3.experts"),
        ("L['fn'].0.experts", "0.experts"),  # of nn.Sequential
        ("L['fn'].0.fn", "0.fn"),
        ("L['draft'].0.experts", "draft.0.experts"),  # an argument of a function: which of them it is matters
        ("L['self']", "node"),
    ],
)
def test_block_names_are_paths_in_the_compiled_module(stack, name):
    node = torch.fx.Graph().placeholder("node")
    node.meta["nn_module_stack"] = {"0": (stack, torch.nn.Module)}
    assert module_path(node) == name


def test_block_names_come_from_the_model():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K) for _ in range(3)])

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    lowered = lower(Model(), torch.randn(TOKENS, HIDDEN))
    assert [b.name for b in lowered.report.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert {b.ops_after for b in lowered.report.blocks} == {lowered.report.blocks[0].ops_after}


def test_a_scope_inside_is_a_wall_and_around_is_not():
    """npugraph_ex marks stream scopes by nodes; a block may lie inside one, never across its border."""
    scope = torch.ops.npugraph_ex

    def across(x, weights, ids, w13, w2):
        rows, scale, counts, handle = ops.dispatch(x, None, ids, None, *LOCAL, 0)
        scope.scope_enter(["_user_stream_label"], ["s"])
        y = mlp(rows, scale, counts, w13, w2)
        scope.scope_exit()
        return ops.combine(y, weights, ids, handle, None, *LOCAL)

    def around(x, weights, ids, w13, w2):
        scope.scope_enter(["_user_stream_label"], ["s"])
        y = block(x, weights, ids, w13, w2)
        scope.scope_exit()
        return y

    import npugraph_ex  # noqa: F401  (defines the scope operators)

    testing.assert_lowered(lower(around, *tensors()), comm="allgather", blocks=1)
    crossed = lower(across, *tensors())
    testing.assert_refused(crossed, code="block.scope", comm="allgather")
    assert crossed.ops_after == crossed.ops_before


def test_routing_of_a_refused_block_stays():
    """A block that is left alone is left whole: its routing too."""

    def model(x, logits, w13, w2):
        weights, ids = route(logits, TOP_K)
        return moe_experts(x, weights, ids, w13, w2)

    x, _, _, w13, w2 = tensors()
    lowered = testing.lower_graph(model, x, torch.randn(TOKENS, EXPERTS), w13, w2, deployment=Deployment(), comm="mc2")
    testing.assert_refused(lowered, code="mc2.ep_size", comm="mc2")
    assert lowered.ops_after == lowered.ops_before
    with pytest.raises(AssertionError, match=r"; mc2\.epsize is no code .* \(did you mean mc2\.ep_size\?\)$"):
        testing.assert_refused(lowered, code="mc2.epsize", comm="mc2")
    with pytest.raises(AssertionError, match=r"was refused with mc2\.hidden; found \[.*'mc2\.ep_size'\)\]$"):
        testing.assert_refused(lowered, code="mc2.hidden", comm="mc2")


def test_the_pass_is_idempotent():
    lowered = lower(block, *tensors())
    again = MoeLowering(Deployment(), "allgather", strict=True)
    code = lowered.gm.code
    again(lowered.gm)
    assert lowered.gm.code == code
    assert not again.reports[0].blocks


@pytest.mark.parametrize("broken", ["find_blocks", "decide", "request_guard", "judge_route"])
def test_a_defect_of_the_pass_never_fails_the_compile(monkeypatch, broken):
    """Whatever goes wrong inside, the graph still computes the same, and the report says what happened."""
    from moe_lowering.passes.run import bounds as run_bounds
    from moe_lowering.passes.run import graph_run
    from moe_lowering.passes.run import routes as run_routes

    def fail(*args, **kwargs):
        raise ZeroDivisionError("planted")

    module = {"judge_route": run_routes, "request_guard": run_bounds}.get(broken, graph_run)
    monkeypatch.setattr(module, broken, fail)

    def model(x, logits, w13, w2):
        weights, ids = route(logits, TOP_K)
        return moe_experts(x, weights, ids, w13, w2)

    x, _, _, w13, w2 = tensors()
    logits = torch.randn(TOKENS, EXPERTS)
    lowering = MoeLowering(Deployment(), "allgather")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lowering_backend(lowering), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, logits, w13, w2), model(x, logits, w13, w2), rtol=1e-4, atol=1e-2)
    report = lowering.reports[0]
    said = [b.reason for b in report.blocks] + [why for _, why in report.unrecognised]
    assert broken == "request_guard" or any("ZeroDivisionError: planted" in text for text in said)


def test_strict_sees_every_generic_operator_that_is_left():
    def whole(logits):
        return route(logits, TOP_K)[0], torch.ops.moe_lowering.route(logits, None, 1, "softmax", True, 1, 1, "max", 1.0)

    lowered = lower(whole, torch.randn(TOKENS, EXPERTS))
    assert lowered.ops_after.count("moe_lowering.route") == len(lowered.report.unrecognised)

    gm = torch.fx.symbolic_trace(
        lambda x, ids: torch.ops.moe_lowering.route.default(x, None, 1, "softmax", True, 1, 1, "max", 1.0)
    )
    with pytest.raises(LoweringError, match="the graph has no fake values"):
        MoeLowering(Deployment(), strict=True)(gm)


def test_a_collective_on_mc2s_communicator_is_refused():
    """No other operator may use that group; the twin uses the EP group."""

    def model(layer, x, group):
        gathered = torch.ops._c10d_functional.all_reduce(x, "sum", group)
        return layer(torch.ops._c10d_functional.wait_tensor(gathered))

    with testing.fake_deployment(ep_size=8) as deployment, testing.fake_tensors():
        layer = MoE(1024, 512, 64, 4, deployment=deployment, dtype=torch.bfloat16)
        x = torch.empty(32, 1024, dtype=torch.bfloat16)
        for comm, code in (("mc2", "mc2.shared_communicator"), ("fused_mc2", "fused.shared_communicator")):
            on = {
                group: testing.lower_graph(
                    lambda x, group=group: model(layer, x, group), x, deployment=deployment, comm=comm
                )
                for group in (deployment.mc2_group, deployment.ep_group)
            }
            testing.assert_refused(on[deployment.mc2_group], comm=comm, code=code)
            testing.assert_lowered(on[deployment.ep_group], comm=comm)
