"""Lowered graphs on real gloo ranks, through npugraph_ex, against the dense float64 reference on one process."""

import pytest
import rank_jobs
import reference
import router_rank_jobs
import torch
from rank_pools import Ranks

from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.testing import RankError


@pytest.fixture(scope="module")
def pair():
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=30) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4, setup=rank_jobs.setup, collective_timeout=60) as ranks:
        yield ranks


def expected(rank, tokens, dtype, skew=False, experts=rank_jobs.EXPERTS, top_k=rank_jobs.TOP_K):
    """The whole layer on one rank's tokens; routed from the model's own logits, which are in its dtype."""
    layer = rank_jobs.layer(dtype, experts, top_k)
    x = rank_jobs.tokens_of(rank, tokens, dtype, skew)
    with torch.no_grad():
        logits = layer.gate(x).float()
    weights, ids = reference.route(logits, None, top_k, "softmax", True, 1, 1, "max", 1.0)
    return reference.moe(x, weights, ids, layer.w13, layer.w2)


def check(ranks, comm, dtype, counts, **options):
    results = ranks.run(rank_jobs.lower_and_run, comm, dtype, counts, options)
    for rank, (outputs, comms) in enumerate(results):
        assert set(comms) == {comm}
        shape = {k: options[k] for k in ("skew", "experts", "top_k") if k in options}
        for y, per_rank in zip(outputs, counts, strict=True):
            reference.assert_near(
                y, expected(rank, per_rank[rank], getattr(torch, dtype), **shape), getattr(torch, dtype)
            )


COMMS = [*IMPLEMENTATIONS]


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_ranks(pair, comm, dynamic, dtype):
    check(pair, comm, dtype, [(6, 6), (9, 9)], dynamic=dynamic)


def test_allgather_float32(pair):
    check(pair, "allgather", "float32", [(7, 7)])


@pytest.mark.parametrize("comm", COMMS)
def test_every_token_to_the_same_experts_and_others_empty(pair, comm):
    check(pair, comm, "bfloat16", [(8, 8)], skew=True)


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_unequal_token_counts(pair, comm, dynamic):
    counts = [(6, 3), (2, 9)] if dynamic else [(6, 1), (1, 9)]
    check(pair, comm, "bfloat16", counts, equal=False, dynamic=dynamic)


@pytest.mark.parametrize("comm", ["allgather", "mc2"])
def test_a_router_in_the_model_s_own_operators(pair, comm):
    """DeepSeek-V3's becomes the operator on each rank, for its own T."""
    counts = [(6, 3), (2, 9)]
    layer = rank_jobs.layer(torch.bfloat16)
    bias = torch.linspace(-0.2, 0.2, rank_jobs.EXPERTS)
    for rank, (outputs, became) in enumerate(pair.run(router_rank_jobs.lower_and_run, comm, counts)):
        assert became == ["npu.npu_moe_gating_top_k"]
        for y, per_rank in zip(outputs, counts, strict=True):
            x = rank_jobs.tokens_of(rank, per_rank[rank], torch.bfloat16, False)
            with torch.no_grad():
                logits = layer.gate(x)
            weights, ids = reference.route(logits, bias, 3, "sigmoid", True, 3, 2, "top2_sum", 2.5)
            reference.assert_near(y, reference.moe(x, weights, ids, layer.w13, layer.w2), torch.bfloat16)


@pytest.mark.parametrize("comm", COMMS)
def test_four_ranks(four, comm):
    check(four, comm, "bfloat16", [(5, 5, 5, 5)])


@pytest.mark.parametrize("comm", ["allgather", "alltoall", "mc2"])
def test_more_choices_than_local_experts(four, comm):
    """k > E_local: a token has at most E_local rows on one rank, and the row bound is smaller than ep * T * k."""
    check(four, comm, "bfloat16", [(5, 5, 5, 5)], experts=8, top_k=5)


@pytest.mark.parametrize("comm", ["allgather", "alltoall"])
def test_more_choices_than_local_experts_with_every_row_valid_none_and_unequal(pair, comm):
    """Beside the one row that no slot fills: all others are valid where every token has all experts of a rank."""
    shape = {"experts": 4, "top_k": 3}
    check(pair, comm, "bfloat16", [(8, 8)], skew=True, **shape)
    check(pair, comm, "bfloat16", [(0, 0)], **shape)
    check(pair, comm, "bfloat16", [(6, 3), (2, 9)], equal=False, dynamic=True, **shape)


def test_finalize_routing_brings_rows_back(pair):
    """Any T in one graph, one token, all tokens to one rank and none to the other, unequal ones, more choices than experts;
    AllToAll by token and by row."""
    ours = {"unpermute_operator": "finalize_routing"}
    check(pair, "allgather", "bfloat16", [(6, 6), (9, 9)], dynamic=True, **ours)
    check(pair, "allgather", "bfloat16", [(1, 1)], **ours)
    check(pair, "allgather", "float32", [(8, 8)], skew=True, **ours)
    check(pair, "alltoall", "bfloat16", [(6, 3), (2, 9)], equal=False, dynamic=True, experts=4, top_k=3, **ours)
    check(pair, "alltoall", "bfloat16", [(8, 8)], skew=True, top_k=1, max_rows=16, **ours)


def test_one_token_each(pair):
    for comm in COMMS:
        check(pair, comm, "bfloat16", [(1, 1)])


@pytest.mark.parametrize("comm", ["allgather", "alltoall"])
def test_no_token_on_any_rank(pair, comm):
    check(pair, comm, "float32", [(0, 0)])


def test_rows_beyond_max_rows_are_nan_with_alltoall(pair):
    """All 8 tokens of a rank go to one expert, and its buffer has 4 lines: a broken promise must not give garbage."""
    shape = {"skew": True, "top_k": 1}
    results = pair.run(rank_jobs.lower_and_run, "alltoall", "bfloat16", [(8, 8)], {**shape, "max_rows": 4})
    for rank, ((y,), _) in enumerate(results):
        reference.assert_near(y[:4], expected(rank, 8, torch.bfloat16, **shape)[:4], torch.bfloat16)
        assert y[4:].isnan().all()


def test_rows_up_to_max_rows_are_right_with_alltoall(pair):
    check(pair, "alltoall", "bfloat16", [(8, 8)], skew=True, top_k=1, max_rows=16)


def test_ranks_with_different_token_counts_choose_alike(four):
    """600 tokens are too many for the fused operator, so no rank may take it, not even the one with a single token."""
    assert four.run(rank_jobs.choices, (1, 512, 37, 600)) == [["allgather"]] * 4


def test_without_that_rule_they_would_differ(four):
    """The twin: each rank judged by its own T. On a device, three ranks would wait for the fourth."""
    chosen = four.run(rank_jobs.choices, (1, 512, 37, 600), True)
    assert chosen == [["fused_mc2"], ["fused_mc2"], ["fused_mc2"], ["allgather"]]


def test_two_implementations_across_the_capacity(pair):
    """One model, dynamic sizes: the fused operator up to 512 tokens, AllGather above; right on both sides and at 512."""
    counts = [(t, t) for t in (300, 512, 513, 640, 511)]
    results = pair.run(rank_jobs.lower_and_run, "auto", "bfloat16", counts, {"dynamic": True, "bounded": False})
    for rank, (outputs, comms) in enumerate(results):
        assert comms == ["fused_mc2", "allgather"]
        for y, (tokens, _) in zip(outputs, counts, strict=True):
            reference.assert_near(y, expected(rank, tokens, torch.bfloat16), torch.bfloat16)


def test_more_tokens_than_declared_is_an_error_on_that_rank():
    message = "T is 65 and the deployment declares 1 to 64 on every rank"
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=5) as ranks, pytest.raises(RankError, match=message):
        ranks.run(rank_jobs.lower_and_run, "allgather", "bfloat16", [(65, 3)], {"equal": False})
