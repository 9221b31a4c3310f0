"""CPU kernels of npu_moe_gating_top_k_softmax (both versions), npu_moe_init_routing and npu_moe_compute_expert_tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_calls import like_meta

npu = torch.ops.npu
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]


def softmax_top_k(row: list[float], k: int, first: str) -> tuple[list[float], list[int]]:
    """One row in plain Python floats: ``first`` says whether softmax or top-k comes first."""
    ids = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    among = row if first == "softmax" else [row[i] for i in ids]
    total = sum(math.exp(v) for v in among)
    return [math.exp(row[i]) / total for i in ids], ids


@pytest.mark.parametrize(("dtype", "error"), DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 8), (2, 3, 8)])
def test_gating_softmax_is_its_definition(shape: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    x = torch.randn(shape).to(dtype)
    y, ids, rows = like_meta(npu.npu_moe_gating_top_k_softmax, x, k=3)
    results = [(y, ids, "softmax")]
    for renorm, first in ((0, "softmax"), (1, "top-k")):
        results.append((*like_meta(npu.npu_moe_gating_top_k_softmax_v2, x, k=3, renorm=renorm)[:2], first))
    for weights, chosen, first in results:
        for t, row in enumerate(x.reshape(-1, 8).tolist()):
            expected, wanted_ids = softmax_top_k(row, 3, first)
            assert chosen.reshape(-1, 3)[t].tolist() == wanted_ids
            torch.testing.assert_close(
                weights.reshape(-1, 3)[t].float(), torch.tensor(expected), atol=error, rtol=error
            )
    tokens = x.numel() // 8
    assert rows.reshape(-1, 3).tolist() == [[j * tokens + t for j in range(3)] for t in range(tokens)]


def test_the_softmax_itself() -> None:
    x = torch.randn(4, 8).bfloat16()
    softmax = like_meta(npu.npu_moe_gating_top_k_softmax_v2, x, k=2, output_softmax=True)[2]
    torch.testing.assert_close(softmax.double(), torch.softmax(x.double(), -1), atol=1e-6, rtol=1e-6)
    assert len(like_meta(npu.npu_moe_gating_top_k_softmax_v2, x, k=2, renorm=1, output_softmax=True)[2]) == 0


def test_rows_that_take_no_part() -> None:
    x, done = torch.zeros(3, 4), torch.tensor([False, True, False])
    for op in (npu.npu_moe_gating_top_k_softmax, npu.npu_moe_gating_top_k_softmax_v2):
        y, ids, _ = like_meta(op, x, finished=done, k=2)
        assert ids.tolist() == [[0, 1], [4, 4], [0, 1]], "equal values by lower index; 4 is no expert"
        assert y[done].isnan().all() and (y[~done] == 0.25).all()


@pytest.mark.parametrize("name", ["npu_moe_gating_top_k_softmax", "npu_moe_gating_top_k_softmax_v2"])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"x": torch.zeros(2, 4).double()}, "gating_softmax.x_dtype"),
        ({"x": torch.zeros(4)}, "gating_softmax.x_dims"),
        ({"k": 5}, "gating_softmax.top_k"),
        ({"k": 0}, "gating_softmax.top_k"),
        ({"finished": torch.zeros(2)}, "gating_softmax.finished_dtype"),
        ({"finished": torch.zeros(2, 1).bool()}, "gating_softmax.finished_dims"),
        ({"finished": torch.zeros(3).bool()}, r"finished is \(3,\); accepted: \(2,\)"),
    ],
)
def test_gating_softmax_refuses(name: str, changes: dict[str, Any], code: str) -> None:
    legal, op = {"x": torch.zeros(2, 4), "k": 2}, getattr(npu, name)
    op(**legal)
    with pytest.raises(ValueError, match=code):
        op(**{**legal, **changes})


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"renorm": 2}, "gating_softmax.renorm"), ({"output_softmax": True}, "gating_softmax.output_softmax")],
)
def test_the_second_version_refuses(changes: dict[str, Any], code: str) -> None:
    npu.npu_moe_gating_top_k_softmax_v2(torch.zeros(2, 2, 4), k=2)
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_gating_top_k_softmax_v2(torch.zeros(2, 2, 4), k=2, **changes)


X = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
ROW_IDX = torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=torch.int32)
IDS = torch.tensor([[1, 2], [0, 1], [0, 2]], dtype=torch.int32)


@pytest.mark.parametrize(("active", "kept"), [(3, 6), (9, 6), (2, 4), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_init_routing_by_hand(active: int, kept: int, dtype: torch.dtype) -> None:
    """The example of torch_npu's documentation, worked out on paper: expert 0 has tokens 1 and 2, 1 has 0 and 1, 2 has 0, 2."""
    rows, places, experts = like_meta(npu.npu_moe_init_routing, X.to(dtype), ROW_IDX, IDS, active)
    assert rows[:, 0].tolist() == [2, 3, 1, 2, 1, 3][:kept]
    assert places.tolist() == [2, 0, 1, 4, 3, 5]
    assert experts.tolist() == [0, 0, 1, 1, 2, 2]
    assert like_meta(npu.npu_moe_compute_expert_tokens, experts, 4).tolist() == [2, 4, 6, 6]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_the_chain_of_the_first_versions(tokens: int) -> None:
    """Softmax, init_routing, and finalize by column bring every token back with the sum of its weights."""
    x, experts = torch.randn(tokens, 4).double().float(), 6
    weights, ids, row_idx = npu.npu_moe_gating_top_k_softmax(torch.randn(tokens, experts), k=3)
    rows, places, by_expert = like_meta(npu.npu_moe_init_routing, x, row_idx, ids, tokens)
    ends = like_meta(npu.npu_moe_compute_expert_tokens, by_expert, experts)
    assert ends.tolist() == [int((ids <= e).sum()) for e in range(experts)]
    if tokens:
        y = npu.npu_moe_finalize_routing(rows, None, None, None, weights, places, None, drop_pad_mode=0)
        torch.testing.assert_close(y.double(), x.double() * weights.double().sum(1, keepdim=True), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"x": X.double()}, "init_routing.x_dtype"),
        ({"x": X.unsqueeze(0)}, "init_routing.x_dims"),
        ({"x": X[:2]}, "init_routing.ids_tokens"),
        ({"expert_idx": IDS.long()}, "init_routing.ids_dtype"),
        ({"row_idx": ROW_IDX.long()}, "init_routing.row_dtype"),
        ({"row_idx": ROW_IDX[:2]}, "init_routing.row_tokens"),
        ({"row_idx": ROW_IDX[:, :1]}, "init_routing.row_top_k"),
        ({"row_idx": ROW_IDX * 0}, "accepted: each of 0 to 5 once"),
        ({"expert_idx": IDS - 1}, "expert_idx is -1; accepted: 0 or more"),
        ({"active_num": -1}, "init_routing.active_num"),
    ],
)
def test_init_routing_refuses(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_init_routing(**{"x": X, "row_idx": ROW_IDX, "expert_idx": IDS, "active_num": 3, **changes})


@pytest.mark.parametrize(
    ("rows", "experts", "code"),
    [
        (torch.tensor([0, 1]), 2, "expert_tokens.ids_dtype"),
        (torch.zeros(1, 2).int(), 2, "expert_tokens.ids_dims"),
        (torch.tensor([0]).int(), 2049, "expert_tokens.experts"),
        (torch.tensor([0]).int(), 0, "expert_tokens.experts"),
        (torch.tensor([1, 0]).int(), 2, "experts that never decrease"),
        (torch.tensor([0, 2]).int(), 2, "0 to 2; accepted: 0 to num_expert - 1 = 1"),
        (torch.tensor([-1, 1]).int(), 2, "-1 to 1; accepted: 0 to num_expert - 1 = 1"),
    ],
)
def test_expert_tokens_refuses(rows: torch.Tensor, experts: int, code: str) -> None:
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_compute_expert_tokens(rows, experts)
