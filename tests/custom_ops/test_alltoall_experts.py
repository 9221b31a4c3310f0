"""``alltoall_experts`` on two and four real ranks: the CPU kernel and the device's kernel, which here runs on the
simulator's kernels of ``npu::`` operators, against dense references in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import reference
import torch
from alltoall_layers import KERNELS, Case, arguments_of, counts_of, given_to, layer, on_case, on_quantised
from rank_jobs import setup
from rank_pools import Ranks

from moe_lowering.quantisation import FORMATS

pytestmark = pytest.mark.xdist_group("alltoall_experts")
HALVES = (torch.float16, torch.bfloat16)

# Least signal-to-noise ratio in dB against the dense reference with the weights that the integers stand for.
# int8 rows: a step is max|row| / 127, and the noise is a step / sqrt(12). Most of it comes from the second quantisation:
# in rows of silu(gate) * up the largest of 256 values is about 8 times their root mean square, 20 log10(127 sqrt(12) / 8)
# = 35. 16-bit rows: roundings to half a unit in the last place, 2**-9 and 2**-12 (54 and 72 dB when it is uniform), in the
# hidden values, the activated ones, the results, the weights' products and y, five in all: 7 dB less.
INT8_FLOOR = 33.0
FLOORS = {
    ("w4a16", torch.bfloat16): 43.0,
    ("w4a16", torch.float16): 61.0,
    **{(form, dtype): INT8_FLOOR for form in ("w8a8", "w4a8") for dtype in HALVES},
}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, setup=setup, collective_timeout=20) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4, setup=setup, collective_timeout=20) as ranks:
        yield ranks


UNEQUAL = (("max_tokens", 12),)
OAI = (("activation", "swiglu_oai"), ("limit", 1.5), ("interleaved", True))
CASES = [
    Case("even"),
    Case("skewed", ids="first", top_k=3),
    Case("empty-expert", ids="gap"),
    Case("masked", masked="third"),
    Case("rank-masked", masked="rank 1"),
    Case("all-masked", masked="all"),
    Case("unequal", (1, 12, 0, 5), options=UNEQUAL),
    Case("first-rank-empty", (0, 3, 7, 12), options=UNEQUAL, masked="third"),
    Case("no-tokens", (0, 0, 0, 0)),
    Case("more-choices-than-local-experts", top_k=5),
    Case("one-expert-each", experts=4, top_k=1),
    Case("lists", lists=True),
    Case("bounded", options=(("max_rows", 200),)),
    Case("clamped", options=(("activation", "swiglu_clamp"), ("limit", 0.7))),
    Case("gelu", options=(("activation", "gelu"),)),
]


def size_of(ranks: int, request: pytest.FixtureRequest) -> Ranks:
    return request.getfixturevalue({2: "two", 4: "four"}[ranks])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_both_kernels_are_the_dense_layer(size: int, case: Case, request: pytest.FixtureRequest) -> None:
    every = case.name in ("even", "masked", "unequal")
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if every else (torch.bfloat16,):
        for errors in size_of(size, request).run(on_case, case, dtype, False):
            assert max(errors.values()) <= reference.BOUNDS[dtype], (dtype, errors)


@pytest.mark.parametrize("lists", [False, True])
def test_biases(four: Ranks, lists: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = Case("biases", options=OAI, lists=lists)
        for errors in four.run(on_case, case, dtype, True):
            assert max(errors.values()) <= reference.BOUNDS[dtype], (dtype, errors)


QUANTISED = [
    Case("even"),
    Case("skewed", ids="first", top_k=3),
    Case("empty-expert", ids="gap"),
    Case("masked", masked="third"),
    Case("unequal", (3, 12, 0, 5), options=UNEQUAL),
]


def compare(ranks: Ranks, case: Case, form: str, dtype: torch.dtype, arrives: bool, wide: bool) -> None:
    for rank, ratios in enumerate(ranks.run(on_quantised, case, form, dtype, arrives, wide)):
        assert min(ratios["cpu"], ratios["npu"]) >= FLOORS[form, dtype], (dtype, rank, ratios)
        if case.tokens[rank]:
            assert ratios["swapped"] < 10, "the floor could not tell wrong experts from right ones"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", QUANTISED, ids=[case.name for case in QUANTISED])
def test_quantised_weights(size: int, form: str, case: Case, request: pytest.FixtureRequest) -> None:
    for dtype in HALVES if case.name == "even" else (torch.bfloat16,):
        compare(size_of(size, request), case, form, dtype, False, False)


@pytest.mark.parametrize("form", FORMATS)
def test_scales_as_bits_or_in_groups_of_lines(four: Ranks, form: str) -> None:
    compare(four, Case("even"), form, torch.bfloat16, False, True)


@pytest.mark.parametrize("wide", [False, True])
def test_weights_of_16_bit_rows_as_lists(four: Ranks, wide: bool) -> None:
    """npu_grouped_matmul takes lists of quantised weights for 16-bit rows only (gmm.quant_single_weight)."""
    compare(four, Case("lists", lists=True), "w4a16", torch.float16, False, wide)


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_rows_that_arrive_as_int8(four: Ranks, form: str) -> None:
    for wide in (False, True):
        compare(four, Case("masked", masked="third"), form, torch.bfloat16, True, wide)
    compare(four, Case("unequal", (3, 12, 0, 5), options=UNEQUAL), form, torch.float16, True, False)


def test_one_rank_needs_no_group() -> None:
    case, whole = Case("alone", masked="third"), layer(8, 32, 16, "none", torch.bfloat16)
    given = given_to(0, case, whole, torch.bfloat16)
    expected = reference.moe(given["x"], given["weights"], given["ids"], *whole.dense, mask=given["mask"])
    for kernel in KERNELS.values():
        y, counts = kernel(*arguments_of(**given, **whole.shard(0, 1, False)))
        reference.assert_near(y, expected, torch.bfloat16)
        assert torch.equal(counts, counts_of(case, whole, torch.bfloat16, 0, 1))
