"""transformers' own expert parallelism, on two real ranks: its blocks are raised from the trace, and right.

MOE_LOWERING_RANKS sets another number of ranks.
"""

import os
from collections import Counter

import expert_parallel_jobs as jobs
import pytest
import torch
from reference import relative_error

from moe_lowering.testing import Ranks

RANKS = int(os.environ.get("MOE_LOWERING_RANKS", "2"))
SEED = os.environ.get("MOE_LOWERING_SEED", "")  # part of the seeds of edits
CASES = [
    ("qwen3_moe", "grouped_mm", torch.bfloat16, "mc2", 6),
    ("qwen3_moe", "grouped_mm", torch.float32, "allgather", 5),
    ("gpt_oss", "grouped_mm", torch.bfloat16, "allgather", 6),
    ("gpt_oss", "batched_mm", torch.bfloat16, "alltoall", 5),
]
TWINS = ("the other rank's place", "a maximum", "one rank's result read")  # more in test_twins_of_expert_parallel


@pytest.fixture(scope="module")
def ranks():
    with Ranks(RANKS, setup=jobs.setup, collective_timeout=60) as pool:
        yield pool


@pytest.mark.parametrize(("family", "implementation", "dtype", "comm", "tokens"), CASES)
def test_a_block_is_raised_over_the_ranks(ranks, family, implementation, dtype, comm, tokens):
    for found in ranks.run(jobs.compile_block, family, implementation, dtype, comm, tokens):
        form = "grouped_mm" if implementation == "grouped_mm" else "gathered_weights"
        ((chosen, raised, reason, after),) = found["blocks"]
        assert (chosen, raised) == (comm, form), reason
        assert found["foreign"] == []
        assert "_c10d_functional.all_reduce" not in after
        bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert relative_error(found["written"], found["reference"]) < bound
        assert relative_error(found["lowered"], found["reference"]) < bound


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_what_each_rank_adds_to_its_own_result_is_summed_too(ranks, implementation):
    given = ("qwen3_moe", implementation, torch.float32, "allgather", 6, jobs.PARTLY_SHARED)
    for found in ranks.run(jobs.compile_block, *given):
        assert [chosen for chosen, *_ in found["blocks"]] == ["allgather"] and found["foreign"] == []
        assert relative_error(found["lowered"], found["written"]) < 1e-5


@pytest.mark.parametrize("change", TWINS)
def test_a_twin_is_left_and_computes_what_it_did(ranks, change):
    for found in ranks.run(jobs.compile_block, "qwen3_moe", "grouped_mm", torch.float32, "allgather", 6, change):
        assert found["blocks"] == [] and "[raise.expert_parallel]" in found["foreign"][0], found
        assert torch.equal(found["lowered"], found["written"])


def test_a_deployment_whose_ranks_have_tokens_of_their_own(ranks):
    """The twin: all ranks have the same tokens here, and the deployment says that each has its own."""
    fields = {"tp_size": 1, "tp_rank": 0, "tp_group": ""}
    given = ("qwen3_moe", "batched_mm", torch.float32, "allgather", 6, "")
    for found in ranks.run(jobs.compile_with, given, fields):
        assert found["blocks"] == [] and "tp_size 1" in found["foreign"][0]
        assert torch.equal(found["lowered"], found["written"])


EDITED = {  # in float32, where no two logits are equal: of equal ones the router's operator may take another first
    "grouped_mm": ("qwen3_moe", "grouped_mm", torch.float32),
    "batched_mm": ("qwen3_moe", "batched_mm", torch.float32),
    "gpt-oss": ("gpt_oss", "grouped_mm", torch.float32),
}


def test_graphs_with_random_edits_are_left_or_equal(ranks):
    """MOE_LOWERING_EDITS sets how many of all forms."""
    count = int(os.environ.get("MOE_LOWERING_EDITS", "150")) // 15
    seen = Counter()
    for name, case in EDITED.items():
        seeds = [f"{SEED}{name}/{index}" for index in range(count)]
        found = ranks.run(jobs.edited, case, "allgather", seeds, timeout=3600.0)
        assert [wrong for each in found for _, wrong in each if wrong] == []
        seen += Counter(outcome for outcome, _ in found[0])
    print(seen)
    assert seen["left"] and seen["raised"]


def test_a_write_into_masks_and_views_of_a_layer_is_seen(ranks):
    """Edits that put a zero_ behind the mask of others' experts, and on a view of the weights: it reads them from outside."""
    seeds = [f"a/batched_mm/{seed}" for seed in (33, 69)]
    for found in ranks.run(jobs.edited, EDITED["batched_mm"], "allgather", seeds):
        assert found == [("left", "")] * 2
    for found in ranks.run(jobs.edited, EDITED["grouped_mm"], "allgather", ["a/grouped_mm/38"]):
        assert found == [("left", "")]


def test_a_layer_that_one_rank_alone_raises_is_refused_by_the_comparison(ranks):
    """The rank's place is 0 on all: right on rank 0, whose graph then waits for others that have no such block."""
    found = ranks.run(jobs.compare_blocks, EDITED["batched_mm"], "a/batched_mm/136", timeout=240.0)
    assert found[0] == (True, "AgreementError") and set(found[1:]) == {(False, "")}
    for (outcome,) in ranks.run(jobs.edited, EDITED["batched_mm"], "allgather", ["a/batched_mm/136"]):
        assert outcome == ("ranks differ", "")
