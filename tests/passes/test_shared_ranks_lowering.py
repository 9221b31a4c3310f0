"""MC2 with shared-expert ranks on four real gloo ranks, through npugraph_ex, against the dense float64 reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import rank_jobs
import reference
import shared_rank_jobs as jobs
import torch
from rank_pools import Ranks
from shared_rank_jobs import Case

INT8_DB = 28.0  # the floor of docs/matrix.md: x and the activated values are rounded to int8


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4, setup=rank_jobs.setup, collective_timeout=60) as ranks:
        yield ranks


def near(case: Case, y: torch.Tensor, expected: torch.Tensor) -> bool:
    if case.quantisation == "none":
        return reference.relative_error(y, expected) <= reference.BOUNDS[getattr(torch, case.dtype)]
    noise = (y.double() - expected).square().sum(-1)
    ratio = expected.square().sum(-1)[noise > 0] / noise[noise > 0]
    return bool(y.isfinite().all()) and (not len(ratio) or 10 * math.log10(float(ratio.min())) >= INT8_DB)


def check(ranks: Ranks, case: Case) -> None:
    results = ranks.run(jobs.lower_and_run, case)
    generic = ranks.run(jobs.eager, case)
    for rank, (outputs, decided, shape) in enumerate(results):
        assert {comm for comm, _, _ in decided} == {"mc2"}
        assert decided == results[0][1], "ranks decide differently"
        routed = case.experts // (4 - case.shared_ranks)
        assert shape[0] == (1 if rank < case.shared_ranks else routed)
        for y, eager, per_rank in zip(outputs, generic[rank], case.counts, strict=True):
            expected = jobs.expected(case, rank, per_rank[rank])
            assert y.dtype == eager.dtype == getattr(torch, case.dtype)
            assert near(case, y, expected), (rank, per_rank, reference.relative_error(y, expected))
            assert near(case, eager, expected), (rank, per_rank, reference.relative_error(eager, expected))


LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 1)]  # shared-expert ranks, shared experts


@pytest.mark.parametrize(
    ("ranks", "experts", "dtype"), [*((*layout, "bfloat16") for layout in LAYOUTS), (2, 2, "float16")]
)
def test_16_bit(four: Ranks, ranks: int, experts: int, dtype: str) -> None:
    check(four, Case(ranks, experts, dtype=dtype))


@pytest.mark.parametrize(("ranks", "experts"), [(1, 1), (2, 2)])
def test_w8a8_with_quantised_dispatch(four: Ranks, ranks: int, experts: int) -> None:
    check(four, Case(ranks, experts, quantisation="w8a8"))


def test_w8a8_with_unequal_tokens(four: Ranks) -> None:
    check(four, Case(2, 2, quantisation="w8a8", counts=((3, 1, 6, 2),)))


@pytest.mark.parametrize(
    ("ranks", "experts", "mask"), [(2, 2, "prefix"), (3, 1, "prefix"), (1, 1, "any"), (2, 2, "any")]
)
def test_masks(four: Ranks, ranks: int, experts: int, mask: str) -> None:
    """The last rank has one token left with a prefix; masked tokens hold NaN and give zero."""
    check(four, Case(ranks, experts, mask=mask))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_unequal_tokens(four: Ranks, dynamic: bool) -> None:
    counts = ((6, 2, 3, 9), (2, 9, 4, 3)) if dynamic else ((6, 1, 3, 9), (1, 9, 4, 2))
    check(four, Case(2, 1, counts=counts, dynamic=dynamic))


@pytest.mark.parametrize(("ranks", "experts"), [(1, 1), (2, 2)])
def test_one_graph_for_several_token_counts(four: Ranks, ranks: int, experts: int) -> None:
    check(four, Case(ranks, experts, counts=((3,) * 4, (8,) * 4, (5,) * 4), dynamic=True))


def test_tokens_of_a_tp_group(four: Ranks) -> None:
    """Ranks 0 and 1 hold the same five tokens, of which each sends its share; so do ranks 2 and 3."""
    check(four, Case(2, 2, tp=2))
    check(four, Case(1, 1, tp=2))


def test_every_token_to_the_same_experts(four: Ranks) -> None:
    check(four, Case(2, 1, skew=True))


# ----------------------------------------------------------------------------------------------------- broken on purpose


def without_shared_experts(rank: int, case: Case) -> list[torch.Tensor]:
    """The lowered layer with the shared experts' weights at zero."""
    real = jobs.whole

    def zeroed(case: Case) -> torch.nn.Module:
        module = real(case)
        module.shared_w2.data.zero_()
        return module

    jobs.whole = zeroed
    try:
        return jobs.lower_and_run(rank, case)[0]
    finally:
        jobs.whole = real


def with_swapped_shared_experts(rank: int, case: Case) -> list[torch.Tensor]:
    real = jobs.whole

    def swapped(case: Case) -> torch.nn.Module:
        module = real(case)
        module.shared_w13.data = module.shared_w13.flip(0)
        return module

    jobs.whole = swapped
    try:
        return jobs.lower_and_run(rank, case)[0]
    finally:
        jobs.whole = real


@pytest.mark.parametrize("broken", [without_shared_experts, with_swapped_shared_experts])
def test_the_comparison_sees_wrong_shared_experts(four: Ranks, broken: object) -> None:
    case = Case(2, 2)
    for rank, (y,) in enumerate(four.run(broken, case)):
        assert reference.relative_error(y, jobs.expected(case, rank, 5)) > 5 * reference.BOUNDS[torch.bfloat16]


def refused(rank: int, case: Case) -> str:
    try:
        jobs.lower_and_run(rank, case)
    except Exception as error:
        return str(error).split("\n\n")[0]  # behind it stand the time and the rank
    return ""


def test_other_implementations_are_refused_on_every_rank(four: Ranks) -> None:
    for comm in ("allgather", "alltoall", "fused_mc2"):
        first, *others = four.run(refused, dataclasses.replace(Case(1), comm=comm))
        assert f"{comm} was asked for and is not legal: " in first
        assert f"{comm.removesuffix('_mc2')}.shared_expert_ranks" in first
        assert others == [first] * 3
