"""CPU kernels of npu_moe_token_permute and npu_moe_re_routing: vectors written by hand, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_calls import like_meta

npu = torch.ops.npu
X = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
IDS = torch.tensor([[2, 0], [1, 2], [0, 3]], dtype=torch.int32)  # slots 0..5; by expert: 0: 1, 4; 1: 2; 2: 0, 3; 3: 5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_permute_by_hand(dtype: torch.dtype) -> None:
    rows, places = like_meta(npu.npu_moe_token_permute, X, IDS.to(dtype))
    assert rows[:, 0].tolist() == [1, 3, 2, 1, 2, 3]
    assert places.tolist() == [3, 0, 2, 4, 1, 5]
    rows, places = like_meta(npu.npu_moe_token_permute, X, torch.tensor([5, 1, 5], dtype=dtype))
    assert (rows[:, 1].tolist(), places.tolist()) == ([20, 10, 30], [1, 0, 2])


@pytest.mark.parametrize(("expected", "kept"), [(None, 6), (0, 6), (4, 4), (9, 6), (-1, 5), (-6, 0)])
def test_permute_keeps_some_rows(expected: int | None, kept: int) -> None:
    rows, places = like_meta(npu.npu_moe_token_permute, X, IDS, expected)
    assert rows[:, 0].tolist() == [1, 3, 2, 1, 2, 3][:kept]
    assert places.tolist() == [3, 0, 2, 4, 1, 5]


def test_unpermute_undoes_permute() -> None:
    x, ids, probs = torch.randn(9, 4), torch.randint(0, 5, (9, 3)), torch.rand(9, 3)
    rows, places = npu.npu_moe_token_permute(x, ids)
    y = npu.npu_moe_token_unpermute(rows, places, probs)
    torch.testing.assert_close(y, x * probs.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tokens": X.double()}, "permute.x_dtype"),
        ({"tokens": X.to(torch.int16)}, "permute.x_dtype"),
        ({"tokens": X.unsqueeze(0)}, "permute.x_dims"),
        ({"indices": IDS.half()}, "permute.ids_dtype"),
        ({"indices": IDS[:2]}, "permute.ids_tokens"),
        ({"indices": IDS - 1}, "indices is -1 to 2; accepted: 0 to"),
        ({"num_out_tokens": -7}, "num_out_tokens is -7; accepted: -6"),
        ({"padded_mode": True}, "permute.padded_mode"),
    ],
)
def test_permute_refuses(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_token_permute(**{"tokens": X, "indices": IDS, **changes})


ROUTED = torch.tensor([[0, 2], [1, 3]])  # rank 0 sent two rows for expert 1, rank 1 one for expert 0 and three for 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_re_routing_by_hand(dtype: torch.dtype) -> None:
    x = torch.arange(12).reshape(6, 2).to(dtype)
    rows, scales, index, counts = like_meta(
        npu.npu_moe_re_routing, x, ROUTED.int(), per_token_scales=torch.arange(6.0) / 2
    )
    assert rows[:, 0].tolist() == [4, 0, 2, 6, 8, 10]
    assert index.tolist() == [2, 0, 1, 3, 4, 5]
    assert scales.tolist() == [1, 0, 0.5, 1.5, 2, 2.5]
    assert (counts.tolist(), counts.dtype) == ([1, 5], torch.int32)
    assert like_meta(npu.npu_moe_re_routing, x, ROUTED)[1].isnan().all()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tokens": torch.ones(6, 2)}, "re_routing.x_dtype"),
        ({"tokens": torch.ones(5, 2).half()}, "accepted: no negative count, 5 rows in all"),
        ({"expert_token_num_per_rank": torch.tensor([[-1, 3], [1, 3]])}, "accepted: no negative count"),
        ({"expert_token_num_per_rank": ROUTED.half()}, "re_routing.counts_dtype"),
        ({"expert_token_num_per_rank": ROUTED.flatten()}, "re_routing.counts_dims"),
        ({"per_token_scales": torch.ones(5)}, "re_routing.scale_rows"),
        ({"per_token_scales": torch.ones(6).half()}, "re_routing.scale_dtype"),
        ({"expert_token_num_type": 0}, "re_routing.expert_token_num_type"),
        ({"idx_type": 1}, "re_routing.idx_type"),
    ],
)
def test_re_routing_refuses(changes: dict[str, Any], code: str) -> None:
    legal = {"tokens": torch.ones(6, 2).half(), "expert_token_num_per_rank": ROUTED}
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_re_routing(**{**legal, **changes})
