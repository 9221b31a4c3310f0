"""Every implementation captured on 2 and 4 ranks: replays with changing, skewed and empty routings, against float64."""

import functools
from pathlib import Path

import capture_ranks
import pytest
import rank_jobs
import reference
import torch
from capture_ranks import BUCKETS, REPLAYS
from rank_pools import Ranks

from moe_lowering import simulator
from moe_lowering.simulator.device import Counts

FORMS = {"allgather": "allgather", "alltoall": "static", "mc2": "mc2", "fused_mc2": "dispatch_ffn_combine"}
COMMUNICATION = {
    "allgather": {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_"},
    "alltoall": {"c10d::alltoall_base_"},
    "mc2": {"npu::npu_moe_distribute_dispatch_v2", "npu::npu_moe_distribute_combine_v2"},
    "fused_mc2": {"moe_lowering::dispatch_ffn_combine"},
}


@pytest.fixture(scope="module", params=[2, 4], ids=["ep2", "ep4"])
def ranks(request):
    with Ranks(request.param, setup=simulator.enable_device, collective_timeout=120) as pool:
        yield pool


@functools.cache
def whole():
    return rank_jobs.layer(torch.bfloat16)


@functools.cache
def routing(rank, step):
    layer = whole()
    with torch.no_grad():
        logits = layer.gate(capture_ranks.tokens(rank, step)).float()
    return reference.route(logits, None, rank_jobs.TOP_K, "softmax", True, 1, 1, "max", 1.0)


@functools.cache
def dense(rank, step):
    """The layer of all experts in float64."""
    layer, x, (weights, ids) = whole(), capture_ranks.tokens(rank, step), routing(rank, step)
    return reference.moe(x, weights, ids, layer.w13, layer.w2)


@pytest.mark.parametrize("comm", FORMS)
def test_replays_are_right_and_each_bucket_is_captured_once(ranks, comm):
    for rank, (outputs, equal, counts, operators, forms) in enumerate(ranks.run(capture_ranks.run_captured, comm)):
        assert counts == Counts(begun=len(BUCKETS) + 1, empty=1, captured=len(BUCKETS), replayed=REPLAYS)
        assert equal == [True] * REPLAYS
        assert forms == {(comm, FORMS[comm])}
        assert COMMUNICATION[comm] <= set(operators)
        for step, y in enumerate(outputs):
            reference.assert_near(y, dense(rank, step), torch.bfloat16)


def test_routings_are_skewed_and_leave_experts_and_ranks_without_rows(ranks):
    local = rank_jobs.EXPERTS // ranks.size
    used = [{e for r in range(ranks.size) for e in routing(r, s)[1].flatten().tolist()} for s in range(REPLAYS)]
    assert min(map(len, used)) == rank_jobs.TOP_K < rank_jobs.EXPERTS <= max(map(len, used))
    assert len({tuple(routing(0, s)[1].flatten().tolist()) for s in range(REPLAYS)}) == REPLAYS
    if ranks.size == 4:
        assert any(len({expert // local for expert in each}) < ranks.size for each in used)


@pytest.mark.parametrize("ranks", [2], ids=["ep2"], indirect=True)
def test_the_exact_form_in_a_model_is_refused_with_its_line(ranks):
    lines = Path(capture_ranks.__file__).read_text().splitlines()
    for direct, operator, file, line, message in ranks.run(capture_ranks.exact_in_a_graph):
        assert direct  # without a graph it runs
        assert operator == "moe_lowering::alltoall_experts", message
        assert file == capture_ranks.__file__ and "# planted" in lines[line - 1]
        assert f"{file}:{line}" in message
