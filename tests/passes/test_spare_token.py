"""Each rank sends one token of no expert behind its own, so that the last row of every rank is never valid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import rank_jobs
import shared_rank_jobs
import spare_token_jobs as jobs
from rank_pools import Ranks
from shared_rank_jobs import Case, is_near

COMMS = ["allgather", "alltoall"]
W8A8 = Case(0, quantisation="w8a8", counts=((5, 5),))
PREFIX = Case(0, mask="prefix", counts=((6, 3),))


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=30) as ranks:
        yield ranks


def is_right(ranks: Ranks, case: Case, mutation: str = "") -> bool:
    """Whether every rank's results are near the dense reference's."""
    results = ranks.run(jobs.lower_and_run, case, mutation)
    return all(
        is_near(case, y, shared_rank_jobs.expected(case, rank, per_rank[rank]))
        for rank, outputs in enumerate(results)
        for y, per_rank in zip(outputs, case.counts, strict=True)
    )


CASES = {
    "one token": {"counts": ((1, 1),)},
    "no token": {"counts": ((0, 0),)},
    "every token to the same experts": {"skew": True, "counts": ((8, 8),)},
    "every token on one rank": {"first_half": True, "counts": ((8, 8),)},
    "symbolic": {"dynamic": True, "counts": ((5, 5), (9, 9))},
    "unequal": {"counts": ((6, 3), (1, 9))},
    "unequal, symbolic": {"dynamic": True, "counts": ((6, 3), (1, 9))},
    "unequal, as many as there may be": {"counts": ((16, 16), (16, 3)), "first_half": True},
    "float16": {"dtype": "float16"},
}


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("name", CASES)
def test_int8_rows(pair: Ranks, comm: str, name: str) -> None:
    assert is_right(pair, dataclasses.replace(W8A8, comm=comm, **CASES[name]))


@pytest.mark.parametrize("comm", COMMS)
def test_tokens_that_are_filled_up_and_masked(pair: Ranks, comm: str) -> None:
    assert is_right(pair, dataclasses.replace(PREFIX, comm=comm))


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("mutation", jobs.MUTATIONS)
def test_broken_is_caught(pair: Ranks, comm: str, mutation: str) -> None:
    """Twice: for some tokens of each rank, and with all slots on one, where only the spare token's rows are not valid."""
    cases = [dataclasses.replace(W8A8, comm=comm, first_half=one_rank) for one_rank in (False, True)]
    assert all(is_right(pair, case) for case in cases)
    assert not all(is_right(pair, case, mutation) for case in cases)
