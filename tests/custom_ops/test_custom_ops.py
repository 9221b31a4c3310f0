"""The values of the generic operators on one rank: against independent references and hand-computed vectors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference
import torch
from generic_calls import ACTIVATIONS, random_ids, width
from torch import Tensor

import moe_lowering.functional as functional
from moe_lowering.custom_ops.combine import FLOATS
from moe_lowering.custom_ops.route import SCORINGS, stable_top_k

ops = torch.ops.moe_lowering


ONE_RANK = ("", 1, "", 1, 0)  # ep_group, ep_size, tp_group, tp_size, max_tokens


def dispatch(x: Tensor, ids: Tensor, experts: int, **changes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "x": x,
        "x_scale": None,
        "ids": ids,
        "mask": None,
        "num_experts": experts,
        "ep_group": "",
        "ep_size": 1,
        "tp_group": "",
        "tp_size": 1,
        "max_tokens": 0,
        "max_rows": 0,
    }
    return ops.dispatch(**(arguments | changes))


# route


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("groups", "kept", "score"), [(1, 1, "top2_sum"), (4, 2, "top2_sum"), (4, 2, "max"), (2, 2, "max"), (8, 4, "max")]
)
def test_route_against_reference(scoring: str, dtype: torch.dtype, groups: int, kept: int, score: str) -> None:
    torch.manual_seed(1)
    for lead, bias, renormalize, scale in itertools.product(
        [(33,), (2, 5)], [None, torch.randn(16) / 4], [True, False], [1.0, 2.5]
    ):
        logits = (3 * torch.randn(*lead, 16)).to(dtype)
        arguments = (logits, bias, 4, scoring, renormalize, groups, kept, score, scale)
        weights, ids = ops.route(*arguments)
        expected, chosen = reference.route(*arguments)
        assert ids.dtype == torch.int32 and torch.equal(ids, chosen)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, expected.float(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.0, 1e-20, 1e-6, 0.5])
def test_route_adds_epsilon_to_the_sum(epsilon: float) -> None:
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)) - 3
    arguments = (logits, None, 4, "sigmoid", True, 1, 1, "max", 1.0)
    weights, ids = functional.route(logits, 4, scoring="sigmoid", epsilon=epsilon)
    expected, chosen = reference.route(*arguments, epsilon)
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, expected.float(), rtol=2e-6, atol=1e-7)
    assert torch.equal(functional.route(logits, 4, scoring="sigmoid")[0], ops.route(*arguments)[0])
    assert epsilon < 1e-6 or not torch.allclose(weights, ops.route(*arguments)[0], rtol=1e-6)


def test_route_takes_the_lower_index_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 0.0], [0.0] * 6, [0.0, -0.0, 0.0, -1.0, -0.0, -1.0]])
    _, ids = ops.route(logits, None, 4, "sigmoid", True, 1, 1, "max", 1.0)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 2, 4]]
    _, ids = ops.route(torch.zeros(1, 8), None, 3, "softmax", True, 4, 2, "top2_sum", 1.0)
    assert ids.tolist() == [[0, 1, 2]]  # groups 0 and 1 of four equal ones
    assert stable_top_k(torch.tensor([-1.0, -0.0, 0.0, -torch.inf]), 4).tolist() == [1, 2, 0, 3]
    coarse = torch.randint(-2, 3, (64, 32)).bfloat16()
    arguments = (coarse, torch.randint(0, 2, (32,)).float(), 8, "sigmoid", True, 8, 3, "top2_sum", 1.0)
    assert torch.equal(ops.route(*arguments)[1], reference.route(*arguments)[1])


def test_route_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    weights, ids = ops.route(logits, bias, 2, "sigmoid", False, 1, 1, "max", 1.0)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[-1.0, 2.0]])))


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()])
def test_route_empty_and_no_leading_dimension(lead: tuple[int, ...]) -> None:
    weights, ids = functional.route(torch.randn(*lead, 8), 2, num_groups=4, topk_groups=2)
    assert weights.shape == ids.shape == (*lead, 2)


# dispatch and combine, each alone, against vectors computed by hand


def test_dispatch_by_hand() -> None:
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    ids = torch.tensor([[2, 0], [0, 1], [2, 3]], dtype=torch.int32)
    rows, scale, counts, handle = dispatch(x, ids, 5, max_tokens=4)
    assert rows.shape == (8, 2)  # 1 rank * 4 tokens * min(2, 5)
    assert rows[:, 0].tolist() == [1, 2, 2, 1, 3, 3, 0, 0]
    assert rows[:, 1].tolist() == [10, 20, 20, 10, 30, 30, 0, 0]
    assert counts.dtype == torch.int64 and counts.tolist() == [2, 1, 2, 1, 0]
    assert handle.dtype == torch.int32
    assert handle.tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0], [0, 2, 0], [0, 2, 1]] + 2 * [[-1, -1, -1]]
    assert scale.shape == (0,) and scale.dtype == torch.float32


def test_dispatch_mask_and_scale_by_hand() -> None:
    x = torch.tensor([[[1, 1], [2, 2]], [[3, 3], [4, 4]]], dtype=torch.int8)
    ids = torch.tensor([[[1], [99]], [[0], [1]]], dtype=torch.int32)  # ids of masked tokens do not count
    mask = torch.tensor([[True, False], [True, True]])
    x_scale = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    rows, scale, counts, handle = dispatch(x, ids, 2, mask=mask, x_scale=x_scale)
    assert rows.dtype == torch.int8 and rows[:, 0].tolist() == [3, 1, 4, 0]
    torch.testing.assert_close(scale, torch.tensor([0.3, 0.1, 0.4, 0.0]))
    assert counts.tolist() == [1, 2]
    assert handle.tolist() == [[0, 2, 0], [0, 0, 0], [0, 3, 0], [-1, -1, -1]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_combine_by_hand(dtype: torch.dtype) -> None:
    ids = torch.tensor([[2, 0], [0, 1]], dtype=torch.int32)
    handle = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0], [-1, -1, -1]], dtype=torch.int32)
    rows = torch.tensor([[1.0, -1.0], [10.0, 2.0], [100.0, 3.0], [1000.0, 4.0], [torch.nan, torch.nan]])
    weights = torch.tensor([[0.5, 2.0], [3.0, 0.25]], dtype=dtype)
    y = ops.combine(rows, weights, ids, handle, None, 3, *ONE_RANK)
    assert y.dtype == torch.float32 and y.tolist() == [[520.0, 6.0], [28.0, -2.25]]


def test_combine_sums_in_float32_by_ascending_k_and_rounds_once() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # bfloat16 has no 257: 256 + 1 would stay 256
    handle = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 2]], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    assert ops.combine(rows, torch.ones(1, 3), ids, handle, None, 3, *ONE_RANK).tolist() == [[258.0]]
    big = torch.tensor([[2.0**25], [1.0], [-(2.0**25)]])  # in float32, left to right, the 1 is lost
    assert ops.combine(big, torch.ones(1, 3), ids, handle, None, 3, *ONE_RANK).tolist() == [[0.0]]


def test_combine_masked_tokens_are_zero() -> None:
    ids = torch.tensor([[0], [0], [0]], dtype=torch.int32)
    handle = torch.tensor([[0, 1, 0], [-1, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    rows = torch.tensor([[5.0], [torch.nan], [torch.nan]])
    weights = torch.tensor([[torch.nan], [2.0], [torch.inf]])
    y = ops.combine(rows, weights, ids, handle, torch.tensor([False, True, False]), 1, *ONE_RANK)
    assert y.tolist() == [[0.0], [10.0], [0.0]]


def test_combine_refuses_a_handle_of_other_ids() -> None:
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    handle = torch.tensor([[0, 0, 0], [-1, -1, -1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"handle sends 1 rows to EP rank 0, whose ids and mask ask for 2"):
        ops.combine(torch.ones(2, 3), torch.ones(1, 2), ids, handle, None, 2, *ONE_RANK)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [3, 4]], "ids has 4 for token 1 on EP rank 0; accepted: 0 to 3"),
        ([[0, -1], [3, 2]], "ids has -1 for token 0 on EP rank 0; accepted: 0 to 3"),
        ([[0, 1], [2, 2]], "ids has 2 twice for token 1 on EP rank 0; accepted: distinct ids"),
    ],
)
def test_dispatch_refuses_wrong_ids(ids: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dispatch(torch.ones(2, 3), torch.tensor(ids, dtype=torch.int32), 4)


def test_dispatch_bounds() -> None:
    ids = random_ids((4,), 4, 2)
    with pytest.raises(
        RuntimeError, match=r"EP rank 0 would receive 8 rows; accepted: at most R = 7 \(max_rows is 7\)"
    ):
        dispatch(torch.ones(4, 3), ids, 4, max_rows=7)
    with pytest.raises(ValueError, match="T is 4 on EP rank 0; accepted: at most max_tokens, 3"):
        dispatch(torch.ones(4, 3), ids, 4, max_tokens=3)
    assert dispatch(torch.ones(4, 3), ids, 4, max_rows=8)[0].shape == (8, 3)


@pytest.mark.parametrize(
    ("top_k", "tp_size", "max_tokens", "max_rows", "rows"),
    [(8, 1, 0, 0, 16 * 10 * 4), (2, 4, 0, 0, 16 * 3 * 2), (2, 4, 33, 0, 16 * 9 * 2), (2, 4, 33, 100, 100)],
)
def test_row_bound(top_k: int, tp_size: int, max_tokens: int, max_rows: int, rows: int) -> None:
    x, ids = torch.empty(10, 8, device="meta"), torch.empty(10, top_k, dtype=torch.int32, device="meta")
    received = ops.dispatch(x, None, ids, None, 64, "ep", 16, "tp", tp_size, max_tokens, max_rows)
    assert [len(result) for result in received] == [rows, 0, 4, rows]


# the chain


def chain_case(lead: tuple[int, ...], experts: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(6)
    x = torch.randn(*lead, 32).to(dtype)
    weights, ids = functional.route(torch.randn(*lead, experts), top_k)
    return x, weights, ids, (torch.randn(experts, 32, 48) / 6).to(dtype), (torch.randn(experts, 24, 32) / 5).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("lead", "experts", "top_k"),
    [((17,), 8, 2), ((2, 5), 4, 4), ((1,), 16, 3), ((0,), 4, 2), ((), 4, 1), ((3, 0), 4, 2)],
)
def test_chain_against_reference(dtype: torch.dtype, lead: tuple[int, ...], experts: int, top_k: int) -> None:
    x, weights, ids, w13, w2 = chain_case(lead, experts, top_k, dtype)
    expected = reference.moe(x, weights, ids, w13, w2)
    reference.assert_near(functional.moe_experts(x, weights, ids, w13, w2), expected, dtype)
    reference.assert_near(functional.moe_experts(x, weights, ids, list(w13), list(w2)), expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("activation", "limit", "interleaved"), ACTIVATIONS)
def test_chain_activations_biases_mask(dtype: torch.dtype, activation: str, limit: float, interleaved: bool) -> None:
    x, weights, ids, w13, w2 = chain_case((3, 4), 6, 2, dtype)
    w13 = w13[..., : width(activation, 24)]
    b13, b2 = torch.randn(6, w13.shape[-1]).to(dtype), torch.randn(6, 32).to(dtype)
    mask = torch.rand(3, 4) > 0.4
    options: dict[str, Any] = {
        "w13_bias": b13,
        "w2_bias": b2,
        "mask": mask,
        "activation": activation,
        "limit": limit,
        "alpha": 1.5,
        "interleaved": interleaved,
    }
    y = functional.moe_experts(x, weights.to(dtype), ids.long(), w13, w2, **options)
    expected = reference.moe(x, weights.to(dtype), ids, w13, w2, **options)
    reference.assert_near(y, expected, dtype)
    assert not y[~mask].any()


def test_chain_skewed_load_and_all_masked() -> None:
    x, weights, _, w13, w2 = chain_case((9,), 8, 2, torch.float32)
    ids = torch.tensor([[5, 7]] * 8 + [[7, 0]], dtype=torch.int32)
    reference.assert_near(
        functional.moe_experts(x, weights, ids, w13, w2), reference.moe(x, weights, ids, w13, w2), torch.float32
    )
    assert not functional.moe_experts(x, weights, ids, w13, w2, mask=torch.zeros(9, dtype=torch.bool)).any()


def test_the_comparison_detects_mistakes() -> None:
    """Each broken variant must fail the comparison that the correct one passes, in the coarsest dtype."""
    x, weights, ids, w13, w2 = chain_case((17,), 8, 2, torch.bfloat16)
    expected = reference.moe(x, weights, ids, w13, w2)
    gate, up = w13.chunk(2, dim=-1)
    broken = {
        "gate and up swapped": (weights, ids, torch.cat([up, gate], -1), w2),
        "weights dropped": (torch.ones_like(weights), ids, w13, w2),
        "weights of k swapped": (weights.flip(-1), ids, w13, w2),
        "wrong expert": (weights, (ids + 1) % 8, w13, w2),
        "one token lost": (weights * (torch.arange(17) != 3).unsqueeze(1), ids, w13, w2),
        "interleaved for concatenated": (weights, ids, w13.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), w2),
    }
    reference.assert_near(functional.moe_experts(x, weights, ids, w13, w2), expected, torch.bfloat16)
    for name, arguments in broken.items():
        with pytest.raises(AssertionError, match="relative error"):
            reference.assert_near(functional.moe_experts(x, *arguments), expected, torch.bfloat16)
            pytest.fail(f"not detected: {name}")
