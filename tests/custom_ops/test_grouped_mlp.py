"""``grouped_mlp`` of weights that are not quantised, on one rank: against an independent reference, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from generic_calls import ACTIVATIONS, width
from torch import Tensor

from moe_lowering import vocabulary
from moe_lowering.custom_ops.combine import FLOATS

ops = torch.ops.moe_lowering


def grouped_mlp(rows: Tensor, counts: Tensor, w13: Any, w2: Any, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "rows": rows,
        "row_scale": torch.empty(0),
        "counts": counts,
        "w13": w13,
        "w2": w2,
        "w13_bias": [],
        "w2_bias": [],
        "activation": "swiglu",
        "limit": 0.0,
        "alpha": 1.702,
        "interleaved": False,
    }
    return ops.grouped_mlp(**(arguments | changes))


def test_the_list_of_activations_is_whole() -> None:
    assert {name for name, *_ in ACTIVATIONS} == set(vocabulary.ACTIVATIONS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("activation", "limit", "interleaved"), ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lists", [False, True])
def test_grouped_mlp_against_reference(
    dtype: torch.dtype, activation: str, limit: float, interleaved: bool, bias: bool, lists: bool
) -> None:
    torch.manual_seed(2)
    rows = torch.randn(9, 24).to(dtype)
    columns = width(activation, 16)
    w13, w2 = (torch.randn(4, 24, columns) / 5).to(dtype), (torch.randn(4, 16, 24) / 4).to(dtype)
    b13, b2 = torch.randn(4, columns).to(dtype), torch.randn(4, 24).to(dtype)
    counts = torch.tensor([3, 0, 1, 4])
    as_argument: Callable[[Tensor], list[Tensor]] = (lambda t: list(t)) if lists else (lambda t: [t])
    biases = {"w13_bias": as_argument(b13), "w2_bias": as_argument(b2)} if bias else {}
    options = {"activation": activation, "limit": limit, "interleaved": interleaved}
    out = grouped_mlp(rows, counts, as_argument(w13), as_argument(w2), **biases, **options)
    expected = torch.zeros(9, 24, dtype=torch.float64)
    for row, expert in enumerate([0, 0, 0, 2, 3, 3, 3, 3]):
        extra = (b13[expert], b2[expert]) if bias else (None, None)
        expected[row] = reference.expert(
            rows[row], w13[expert], w2[expert], *extra, activation, limit, 1.702, interleaved
        )
    reference.assert_near(out, expected, dtype)
    assert not out[8:].any()


def test_grouped_mlp_rounds_the_biased_sum_once() -> None:
    torch.manual_seed(3)
    rows, identity = torch.randn(64, 16).bfloat16(), torch.eye(16).bfloat16()
    w13 = torch.randn(16, 32).bfloat16()
    bias = torch.randn(32).bfloat16()
    hidden = (rows.double() @ w13.double() + bias.double()).bfloat16()  # float64 stands for exact
    gate, up = hidden.float().chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up).bfloat16()
    out = grouped_mlp(rows, torch.tensor([64]), [w13], [identity], w13_bias=[bias])
    assert (out != expected).float().mean() < 0.01  # two roundings differ in about a third of hidden
    twice = (torch.mm(rows, w13) + bias).float().chunk(2, -1)
    other = (torch.nn.functional.silu(twice[0]) * twice[1]).bfloat16()
    assert (other != expected).float().mean() > 0.2


def test_grouped_mlp_float32_bias_for_16_bit_rows() -> None:
    rows, w13, w2 = torch.randn(2, 8).bfloat16(), torch.randn(1, 8, 8).bfloat16(), torch.randn(1, 4, 8).bfloat16()
    b13 = torch.randn(1, 8)
    out = grouped_mlp(rows, torch.tensor([2]), [w13], [w2], w13_bias=[b13])
    expected = torch.stack([reference.expert(row, w13[0], w2[0], b13[0]) for row in rows])
    reference.assert_near(out, expected, torch.bfloat16)


@pytest.mark.parametrize(("hidden", "half"), [(20, 6), (7, 5), (16, 8)])
def test_grouped_mlp_takes_any_size_and_transposed_weights(hidden: int, half: int) -> None:
    torch.manual_seed(4)
    rows, counts = torch.randn(5, hidden), torch.tensor([2, 3])
    w13, w2 = torch.randn(2, 2 * half, hidden).transpose(1, 2), torch.randn(2, hidden, half).transpose(1, 2)
    expected = torch.stack([reference.expert(row, w13[i // 2 and 1], w2[i // 2 and 1]) for i, row in enumerate(rows)])
    reference.assert_near(grouped_mlp(rows, counts, [w13], [w2]), expected, torch.float32)
    odd = torch.empty(w13.numel() + 1)[1:].view(w13.shape).copy_(w13)  # storage that is not aligned to 16 bytes
    reference.assert_near(grouped_mlp(rows, counts, [odd], [w2]), expected, torch.float32)


def test_grouped_mlp_large_activation_in_chunks() -> None:
    torch.manual_seed(5)
    rows, w13, w2 = torch.randn(700, 8).bfloat16(), torch.randn(1, 8, 512).bfloat16(), torch.randn(1, 256, 8).bfloat16()
    whole = grouped_mlp(rows, torch.tensor([700]), [w13], [w2])
    parts = torch.cat([grouped_mlp(part, torch.tensor([len(part)]), [w13], [w2]) for part in rows.split(100)])
    reference.assert_near(whole, parts.double(), torch.bfloat16)


def test_grouped_mlp_refuses_counts_past_the_rows() -> None:
    w13, w2 = torch.ones(2, 4, 8), torch.ones(2, 4, 4)
    for counts in ([3, 2], [5, -1]):
        with pytest.raises(ValueError, match="counts is"):
            grouped_mlp(torch.ones(4, 4), torch.tensor(counts), [w13], [w2])
