"""CPU kernels of the grouped matmul without quantisation and of activations: values against definitions written out here,
shapes against the wheel's meta functions, undefined parts, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_calls import like_meta

from moe_lowering.simulator.kernels import common

npu = torch.ops.npu


# ------------------------------------------------------------------------------------------------------- grouped matmul

BY_ROWS = {"group_type": 0, "split_item": 2}


def gmm(x: torch.Tensor, weight: list[torch.Tensor], groups: list[int], kind: int, **others: Any) -> torch.Tensor:
    arguments = {**BY_ROWS, "group_list": torch.tensor(groups), "group_list_type": kind, **others}
    return like_meta(npu.npu_grouped_matmul, [x], weight, **arguments)[0]


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(("groups", "kind"), [([2, 0, 3], 1), ([2, 2, 5], 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_matmul_is_its_definition(as_list: bool, groups: list[int], kind: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(7, 4).to(dtype), torch.randn(3, 4, 6).to(dtype)
    bias = torch.randn(3, 6).to(torch.float16 if dtype == torch.float16 else torch.float32)
    weight, biases = ([*w], [*bias]) if as_list else ([w], [bias])
    y = gmm(x, weight, groups, kind, bias=biases)
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        expected = x[row].double() @ w[expert].double() + bias[expert].double()
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5)
    assert y[5:].isnan().all(), "rows past the last group are left untouched"


def test_grouped_matmul_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    w = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]], dtype=torch.bfloat16)
    assert gmm(x, [w], [1, 1], 1).tolist() == [[21.0], [4288.0]]  # 4300, rounded to bf16


def test_grouped_matmul_takes_a_transposed_view() -> None:
    x, w = torch.randn(3, 4), torch.randn(2, 6, 4)
    torch.testing.assert_close(gmm(x, [w.transpose(1, 2)], [1, 2], 1)[0], w[0] @ x[0])


GMM = {"x": [torch.ones(4, 3)], "weight": [torch.ones(2, 3, 5)], "group_list": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"weight": [torch.ones(2, 4, 5)]}, "gmm.k_mismatch"),
        ({"weight": [torch.ones(2, 5, 3)]}, "gmm.k_mismatch"),
        ({"weight": [torch.ones(2, 3, 5).half()]}, "gmm.weight_dtype"),
        ({"x": [torch.ones(4, 3).double()], "weight": [torch.ones(2, 3, 5).double()]}, "gmm.x_dtype"),
        ({"x": [torch.ones(2, 2, 3)]}, "gmm.x_dims"),
        ({"group_list": torch.tensor([1, 2]).int()}, "gmm.group_list_dtype"),
        ({"group_list": torch.tensor([1, 2, 1])}, "gmm.group_list_length"),
        ({"group_list": torch.tensor([[0, 1], [1, 2]]), "group_list_type": 2}, "gmm.group_list_type"),
        ({"group_list": None}, "gmm.group_list"),
        ({"group_list": torch.tensor([2, 1])}, "never decrease"),
        ({"group_list": torch.tensor([1, 5])}, "at most the 4 rows"),
        ({"group_list": torch.tensor([3, 2]), "group_list_type": 1}, "at most the 4 rows"),
        ({"group_list": torch.tensor([3, -2]), "group_list_type": 1}, "no negative value"),
        ({"split_item": 0}, "gmm.split_item"),
        ({"group_type": 1}, "gmm.group_type"),
        ({"group_type": None}, "gmm.group_type"),
        ({"group_type": 2}, "group_type is 2; the CPU kernel computes only"),
        ({"bias": [torch.ones(2, 5).bfloat16()]}, "gmm.bias_dtype"),
        ({"bias": [torch.ones(2, 4)]}, "gmm.bias_width"),
        ({"bias": [torch.ones(5)]}, "gmm.bias_dims"),
        ({"bias": [torch.ones(5), torch.ones(5)]}, "gmm.bias_count"),
        ({"act_type": 5}, "gmm.act_type"),
        ({"weight": [torch.ones(3, 5), torch.ones(3, 6)]}, "gmm.weights_alike"),
        ({"weight": [torch.ones(1, 3, 5), torch.ones(1, 3, 5)]}, "gmm.weight_dims"),
        ({"output_dtype": 15}, "output_dtype is 15; the CPU kernel computes only"),
        ({"per_token_scale": [torch.ones(4)]}, "gmm.form"),
        (
            {"weight": [torch.ones(1, 1)] * 129, "x": [torch.ones(4, 1)], "group_list": torch.zeros(129).long()},
            "gmm.groups",
        ),
    ],
)
def test_grouped_matmul_refuses(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(ValueError, match=code):
        npu.npu_grouped_matmul(**{**GMM, **BY_ROWS, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_matmul_bias_is_float32(dtype: torch.dtype) -> None:
    x, w = torch.ones(1, 2, dtype=dtype), torch.ones(1, 2, 4, dtype=dtype)
    assert gmm(x, [w], [1], 1, bias=[torch.ones(1, 4)])[0].tolist() == [3.0] * 4


# ---------------------------------------------------------------------------------------------------------- activations


def silu(v: float) -> float:
    return v / (1 + math.exp(-v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_takes_the_gate_first(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]], dtype=dtype)
    expected = torch.tensor([[silu(1.0) * 3, silu(-2.0) * 4]]).to(dtype)
    torch.testing.assert_close(like_meta(npu.npu_swiglu, x), expected)


def test_swiglu_along_another_axis() -> None:
    x = torch.randn(3, 4, 5)
    y = like_meta(npu.npu_swiglu, x, 1)
    assert y[2, 1, 3].item() == pytest.approx(silu(x[2, 1, 3].item()) * x[2, 3, 3].item(), rel=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_clipped_swiglu_is_its_definition(interleaved: bool) -> None:
    x = torch.randn(4, 6) * 8
    counts = torch.tensor([1, 0, 2])
    y = like_meta(
        npu.npu_clipped_swiglu, x, group_index=counts, alpha=1.5, limit=6.0, bias=0.5, interleaved=interleaved
    )
    for t in range(3):
        row = x[t].tolist()
        pairs = zip(row[::2], row[1::2], strict=True) if interleaved else zip(row[:3], row[3:], strict=True)
        for i, (gate, up) in enumerate(pairs):
            gate, up = min(gate, 6.0), max(-6.0, min(up, 6.0))
            expected = gate / (1 + math.exp(-1.5 * gate)) * (up + 0.5)
            assert y[t, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert y[3].isnan().all(), "rows past sum(group_index) are undefined"


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: npu.npu_swiglu(torch.ones(2, 3)), "swiglu.width"),
        (lambda: npu.npu_swiglu(torch.ones(2, 4), 2), "swiglu.dim"),
        (lambda: npu.npu_swiglu(torch.ones(2, 4).int()), "swiglu.x_dtype"),
        (lambda: npu.npu_clipped_swiglu(torch.ones(4)), "swiglu.x_dims"),
        (lambda: npu.npu_clipped_swiglu(torch.ones(4, 2).t()), "swiglu.contiguous"),
        (lambda: npu.npu_clipped_swiglu(torch.ones(2, 4), group_index=torch.ones(1).int()), "swiglu.group_index_dtype"),
        (lambda: npu.npu_clipped_swiglu(torch.ones(2, 4), group_index=torch.tensor([3])), r"sum\(group_index\) is 3"),
    ],
)
def test_activations_refuse(call: Callable[[], Any], code: str) -> None:
    with pytest.raises(ValueError, match=code):
        call()


def test_310p_has_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "current_soc", lambda: "310P")
    with pytest.raises(ValueError, match=r"soc is 310P; accepted: one of A2, A3, A5"):
        npu.npu_swiglu(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"gmm\.x_dtype.*gmm\.|gmm\.n_multiple.*gmm\.x_dtype"):
        gmm(torch.ones(4, 3), [torch.ones(2, 3, 5)], [1, 1], 1)
    assert gmm(torch.ones(2, 3).half(), [torch.ones(1, 3, 16).half()], [2], 1)[0, 0] == 3
