"""A lowering that is wrong must not pass the comparison: each mutation of a lowered graph is caught by it."""

import pytest
import rank_jobs
import reference
import torch
from rank_pools import Ranks
from test_lowering import INTERMEDIATE, Experts, routed
from test_lowering_ranks import expected
from torch.fx import Graph

from moe_lowering import Deployment, MoE, MoeLowering, lowering_backend, testing
from moe_lowering.passes.implementations import IMPLEMENTATIONS

aten, npu = torch.ops.aten, torch.ops.npu


def nodes(gm, target):
    found = gm.graph.find_nodes(op="call_function", target=target)
    assert found, f"the lowered graph has no {target}: the mutation would change nothing"
    return found


def wrong_group_list_type(gm):
    for node in nodes(gm, npu.npu_grouped_matmul.default):
        node.kwargs = {**node.kwargs, "group_list_type": 0}


def gate_and_up_swapped(gm):
    for node in nodes(gm, npu.npu_swiglu.default):
        with gm.graph.inserting_before(node):
            swapped = gm.graph.call_function(aten.roll.default, (node.args[0], [INTERMEDIATE], [1]))
        node.args = (swapped, *node.args[1:])


def unweighted_combine(gm):
    for node in nodes(gm, npu.npu_moe_token_unpermute.default):
        with gm.graph.inserting_before(node):
            ones = gm.graph.call_function(aten.ones_like.default, (node.args[2],))
        node.args = (*node.args[:2], ones)


def undefined_rows_let_through(gm):
    for node in nodes(gm, aten.masked_fill_.Scalar):
        gm.graph.erase_node(node)


def last_row_zeroed_where_it_is_valid(gm):
    for node in nodes(gm, aten.masked_fill_.Scalar):
        node.target, node.args = aten.fill_.Scalar, (node.args[0], 0)


def counts_shifted(gm):
    for node in nodes(gm, npu.npu_grouped_matmul.default):
        with gm.graph.inserting_before(node):
            rolled = gm.graph.call_function(aten.roll.default, (node.kwargs["group_list"], [1], [0]))
        node.kwargs = {**node.kwargs, "group_list": rolled}


MUTATIONS = [
    wrong_group_list_type,
    gate_and_up_swapped,
    unweighted_combine,
    undefined_rows_let_through,
    counts_shifted,
]


def outcome(mutation, every=3):
    """The relative error, or the refusal of a kernel, of a lowered block with a mask after one mutation.

    One token in ``every`` is masked, none for 0.
    """
    module, (x, weights, ids) = Experts(), routed(17)
    mask = torch.arange(17) % every != 0 if every else torch.ones(17, dtype=torch.bool)

    def mutate(gm, example_inputs, config):
        if mutation is not None:
            mutation(gm)
            gm.recompile()

    lowering = MoeLowering(Deployment(), "allgather", strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=lowering_backend(lowering, mutate), fullgraph=True)
    try:
        with torch.no_grad():
            y = compiled(x, weights, ids, mask)
    except (ValueError, RuntimeError) as refusal:
        return refusal
    return reference.relative_error(y, module.expected(x, weights, ids, mask))


@pytest.mark.parametrize("every", [0, 1, 3])
def test_unbroken_passes(every):
    assert outcome(None, every) <= reference.BOUNDS[torch.float32]


def test_a_last_row_that_is_valid_is_kept():
    """Without a masked token all rows are valid: the condition of the write is what keeps the last one."""
    assert outcome(last_row_zeroed_where_it_is_valid, 0) > 100 * reference.BOUNDS[torch.float32]
    assert outcome(last_row_zeroed_where_it_is_valid, 3) <= reference.BOUNDS[torch.float32]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_broken_is_caught(mutation):
    result = outcome(mutation)
    assert isinstance(result, Exception) or result > 100 * reference.BOUNDS[torch.float32], result


# On two ranks: (implementation, mutation in rank_jobs).
ON_RANKS = [
    ("allgather", "absolute_row_index"),
    ("allgather", "undefined_rows_let_through"),
    ("alltoall", "absolute_row_index"),
    ("alltoall", "undefined_rows_let_through"),
    ("alltoall", "unweighted_combine"),
    ("alltoall", "gate_and_up_swapped"),
    ("alltoall", "counts_shifted"),
    ("mc2", "unweighted_combine"),
    ("mc2", "gate_and_up_swapped"),
    ("mc2", "counts_shifted"),
    ("fused_mc2", "unweighted_combine"),
    ("fused_mc2", "gate_and_up_swapped"),
]


@pytest.fixture(scope="module")
def pair():
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=20) as ranks:
        yield ranks


def worst(pair, comm, mutation, unpermute_operator="token_unpermute", **shape):
    """The largest relative error over the ranks, or the refusal of a kernel."""
    sizes = {"experts": rank_jobs.EXPERTS, "top_k": rank_jobs.TOP_K, **shape}
    results = pair.run(rank_jobs.mutated, comm, mutation, *sizes.values(), unpermute_operator)
    refusals = [result for result in results if isinstance(result, str)]
    if refusals:
        return refusals[0]
    wanted = (expected(rank, 6, torch.bfloat16, **shape) for rank in range(len(results)))
    return max(map(reference.relative_error, results, wanted))


@pytest.mark.parametrize("comm", [*IMPLEMENTATIONS])
def test_unbroken_passes_on_ranks(pair, comm):
    assert worst(pair, comm, None) <= reference.BOUNDS[torch.bfloat16]


@pytest.mark.parametrize(("comm", "mutation"), ON_RANKS)
def test_broken_is_caught_on_ranks(pair, comm, mutation):
    result = worst(pair, comm, mutation)
    assert isinstance(result, str) or result > 3 * reference.BOUNDS[torch.bfloat16], result


@pytest.mark.parametrize("mutation", [name for name in rank_jobs.MUTATIONS if "finalize" in name])
def test_a_broken_finalize_routing_is_caught_on_ranks(pair, mutation):
    """Its twin, unbroken, is in test_lowering_ranks.py."""
    result = worst(pair, "allgather", mutation, "finalize_routing")
    assert isinstance(result, str) or result > 3 * reference.BOUNDS[torch.bfloat16], result


def test_a_dropped_communication_operator_is_not_dropped_by_dead_code_elimination():
    """A rank whose dispatch output is unused would skip the collective and hang the others."""
    graph = Graph()
    x, ids = graph.placeholder("x"), graph.placeholder("ids")
    for op in (
        torch.ops.moe_lowering.dispatch,
        torch.ops.moe_lowering.combine,
        torch.ops.moe_lowering.dispatch_ffn_combine,
    ):
        graph.call_function(op.default, (x, ids))
    graph.call_function(torch.ops.moe_lowering.grouped_mlp.default, (x, ids))
    graph.output(x)
    graph.eliminate_dead_code()
    kept = [node.target for node in graph.nodes if node.op == "call_function"]
    ops = torch.ops.moe_lowering
    assert kept == [ops.dispatch.default, ops.combine.default, ops.dispatch_ffn_combine.default]


def test_lowering_to_mc2_marks_its_operators_too():
    with testing.fake_deployment(ep_size=2) as deployment, testing.fake_tensors():
        model = MoE(1024, 512, 16, 2, deployment=deployment, dtype=torch.bfloat16)
        lowered = testing.lower_graph(
            model, torch.empty(4, 1024, dtype=torch.bfloat16), deployment=deployment, comm="mc2"
        )
    (output,) = lowered.gm.graph.find_nodes(op="output")
    output.args = ((),)
    lowered.gm.graph.eliminate_dead_code()
    assert nodes(lowered.gm, npu.npu_moe_distribute_dispatch_v2.default)
    assert nodes(lowered.gm, npu.npu_moe_distribute_combine_v2.default)


@pytest.mark.parametrize("comm", ["allgather", "alltoall"])
def test_the_spare_row_of_more_choices_than_local_experts_is_zero(pair, comm):
    """k > E_local: one row is kept that no slot fills, which the device leaves undefined; absent slots name it."""
    shape = {"experts": 4, "top_k": 3}
    assert worst(pair, comm, None, **shape) <= reference.BOUNDS[torch.bfloat16]
    assert worst(pair, comm, "spare_row_let_through", **shape) > 3 * reference.BOUNDS[torch.bfloat16]
