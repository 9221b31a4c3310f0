"""Each rank sends one token of no expert behind its own, so that the last row of every rank is never valid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import rank_jobs
import reference
import shared_rank_jobs
import spare_token_jobs as jobs
import torch
from rank_pools import Ranks
from shared_rank_jobs import Case

COMMS = ["allgather", "alltoall"]
INT8_DB = 28.0  # the floor of docs/matrix.md: x and the activated values are rounded to int8
W8A8 = Case(0, quantisation="w8a8", counts=((5, 5),))
PREFIX = Case(0, mask="prefix", counts=((6, 3),))


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=30) as ranks:
        yield ranks


def is_near(case: Case, y: torch.Tensor, expected: torch.Tensor) -> bool:
    if y.shape != expected.shape or not y.isfinite().all():
        return False
    if case.quantisation == "none":
        return reference.relative_error(y, expected) <= reference.BOUNDS[getattr(torch, case.dtype)]
    noise, signal = ((each.square().sum(-1)) for each in (y.double() - expected, expected))
    ratio = (signal / noise)[noise > 0]
    return not len(ratio) or 10 * math.log10(float(ratio.min())) >= INT8_DB


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
