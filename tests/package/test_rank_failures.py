"""What ranks are told when one of them dies, or was given another deployment: an error within a timeout, never a hang."""

import threading

import pytest
import rank_jobs
from rank_pools import Ranks

from moe_lowering.testing import RankError


@pytest.mark.parametrize("comm", ["alltoall", "mc2"])
def test_a_killed_rank_is_an_error_on_the_others_within_the_timeout(comm):
    with Ranks(4, setup=rank_jobs.setup, collective_timeout=15) as ranks:
        ranks.run(rank_jobs.lower_and_run, comm, "bfloat16", [(4, 4, 4, 4)], {})  # all are up, and compiled once
        threading.Timer(3.0, ranks.kill, [3]).start()
        with pytest.raises(RankError) as failure:
            ranks.run(rank_jobs.run_until_killed, comm, timeout=300)
    text = str(failure.value)
    assert "no answer within" not in text
    assert text.startswith("rank 3: process died, exit code -9 (SIGKILL)")
    for rank in range(3):
        own = next(line for line in text.splitlines() if line.startswith(f"rank {rank}: "))
        assert "Error: " in own, own


@pytest.fixture(scope="module")
def pair():
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=30) as ranks:
        yield ranks


def test_ranks_with_different_deployments_are_told_so_before_the_first_collective(pair):
    answers = pair.run(rank_jobs.compile_with_agreement, {1: {"hccl_buffer_mb": 512}}, 60.0)
    assert all("rank 1: Deployment.hccl_buffer_mb is 512, on rank 0 1024" in answer for answer in answers)


def test_ranks_with_equal_deployments_run(pair):
    """The twin."""
    assert pair.run(rank_jobs.compile_with_agreement, {}, 60.0) == ["mc2", "mc2"]
