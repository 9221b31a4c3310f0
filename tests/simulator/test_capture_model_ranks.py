"""Qwen3-MoE and DeepSeek-V3 on 2 and 4 ranks, captured, for every implementation: replays with changing inputs,
skewed routings and experts without rows, each equal to the lowered model without a graph, bit by bit; some of them compared
with transformers' own experts, unsharded, on the CPU.

How many layers and replays there are by default, and why not four and 200 in all cases: docs/simulator.md.
"""

import os

import capture_model_ranks
import capture_models
import pytest
from capture_model_ranks import BUCKETS, KINDS
from rank_pools import Ranks
from test_capture_ranks import COMMUNICATION, FORMS

from moe_lowering import simulator
from moe_lowering.cli.lower.compare import TOLERANCE
from moe_lowering.simulator.device import Counts

ALL = int(os.environ.get("MOE_LOWERING_REPLAYS", "0"))  # of every case; 200 takes most of half an hour on two cores
REPLAYS = {("qwen3_moe", 2): 24, ("qwen3_moe", 4): 12, ("deepseek_v3", 2): 24, ("deepseek_v3", 4): 12}
LAYERS = 4 if ALL else 2
# left out by default: on four ranks most of the time is compiling
LONG = {("deepseek_v3", 4, comm) for comm in ("allgather", "mc2", "fused_mc2")}
LONG |= {("qwen3_moe", 4, comm) for comm in ("allgather", "alltoall", "mc2")}
LONG |= {("deepseek_v3", 2, "alltoall"), ("qwen3_moe", 2, "fused_mc2")}  # the two that four ranks have
LONG |= {("deepseek_v3", 2, "allgather"), ("qwen3_moe", 2, "alltoall")}  # each implementation is left in another case


@pytest.fixture(scope="module")
def ranks(request):
    with Ranks(request.param, setup=simulator.enable_device, collective_timeout=120) as pool:
        yield pool


CASES = [
    pytest.param(ep, comm, name, id=f"ep{ep}-{comm}-{name}")
    for ep in (2, 4)
    for comm in FORMS
    for name in capture_models.CONFIGS
    if ALL or (name, ep, comm) not in LONG
]


@pytest.mark.parametrize(("ranks", "comm", "name"), CASES, indirect=["ranks"])
def test_replays_are_equal_to_eager_and_each_bucket_is_captured_once(ranks, comm, name):
    replays, layers = ALL or REPLAYS[name, ranks.size], capture_models.moe_layers(name, LAYERS)
    found = ranks.run(capture_model_ranks.run_model, name, LAYERS, comm, replays, 13, timeout=600)
    for seen in found:
        assert seen.equal == [True] * replays
        assert seen.counts == Counts(begun=len(BUCKETS) + 1, empty=1, captured=len(BUCKETS), replayed=replays)
        assert seen.blocks == [(comm, FORMS[comm])] * layers
        assert all(seen.operators.count(operator) >= layers for operator in COMMUNICATION[comm])
        assert seen.compared == -(-replays // 13) and seen.errors.block_relative < TOLERANCE["bfloat16"]
        assert seen.errors.relative < TOLERANCE["bfloat16"]
        # new routings in nearly every replay but those of one token, and two experts of twelve for those
        assert min(map(len, seen.routings)) > replays / len(KINDS) and seen.fewest == capture_models.TOP_K
