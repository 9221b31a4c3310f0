"""CPU kernel of npu_moe_finalize_routing against its formula in float64, written out token by token, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_calls import like_meta

npu = torch.ops.npu
NAN = float("nan")
EXPERTS, CAPACITY, HIDDEN = 4, 3, 8


def formula(rows: torch.Tensor, index: torch.Tensor, mode: int, k: int, given: dict[str, Any]) -> torch.Tensor:
    """The documented sum, one token and one choice after the other."""
    flat, tokens = rows.reshape(-1, rows.shape[-1]).double(), len(index) // k
    y = torch.zeros(tokens, rows.shape[-1], dtype=torch.float64)
    for t in range(tokens):
        for name in ("skip1", "skip2"):
            y[t] += 0 if given[name] is None else given[name][t].double()
        for j in range(k):
            place = int(index[j * tokens + t] if mode < 2 else index[t * k + j])
            row = torch.zeros(rows.shape[-1], dtype=torch.float64) if place == -1 else flat[place]
            if given["bias"] is not None:
                row = row + given["bias"][int(given["export_for_source_row"][t, j])].double()
            y[t] += row if given["scales"] is None else row * given["scales"][t, j].double()
    return y


def call(mode: int, tokens: int, k: int, dtype: torch.dtype, *names: str) -> tuple[Any, ...]:
    """The arguments of a call that has the optional tensors of ``names``."""
    rows = torch.randn((EXPERTS, CAPACITY, HIDDEN) if mode % 2 else (tokens * k, HIDDEN)).to(dtype)
    index = torch.randperm(rows.numel() // HIDDEN)[: tokens * k].int()
    if mode % 2:
        index[::3] = -1
    optional = {
        "skip1": torch.randn(tokens, HIDDEN).to(dtype),
        "skip2": torch.randn(tokens, HIDDEN).to(dtype),
        "bias": torch.randn(EXPERTS, HIDDEN).to(dtype),
        "scales": torch.rand(tokens, k).to(dtype),
        "export_for_source_row": torch.randint(EXPERTS, (tokens, k), dtype=torch.int32),
    }
    return rows, index, {name: value if name in names else None for name, value in optional.items()}


def run(rows: torch.Tensor, index: torch.Tensor, given: dict[str, Any], mode: int, k: int) -> Any:
    order = (given[name] for name in ("skip1", "skip2", "bias", "scales"))
    return like_meta(npu.npu_moe_finalize_routing, rows, *order, index, given["export_for_source_row"], mode, k)


BIAS = ("bias", "export_for_source_row")


@pytest.mark.parametrize("names", [(), ("scales",), ("scales", "skip1"), (*BIAS, "skip1", "skip2"), (*BIAS, "scales")])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_finalize_is_its_formula(mode: int, names: tuple[str, ...]) -> None:
    for tokens, k in ((1, 1), (1, 4), (5, 2)):
        for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            rows, index, given = call(mode, tokens, k, dtype, *names)
            y = run(rows, index, given, mode, k)
            torch.testing.assert_close(y.double(), formula(rows, index, mode, k, given), atol=error, rtol=error)


def test_by_column_is_not_by_row() -> None:
    rows, index, given = call(0, 3, 2, torch.float32, "scales")
    assert not torch.allclose(run(rows, index, given, 0, 2), run(rows, index, given, 2, 2))


@pytest.mark.parametrize("mode", [1, 3])
def test_rows_that_nobody_has_are_not_read(mode: int) -> None:
    """A dropped slot reads no row, so what the operator before left undefined does not reach the sum."""
    rows = torch.full((EXPERTS, CAPACITY, HIDDEN), NAN)
    rows[1, 2] = 1.0
    index = torch.tensor([-1, 5], dtype=torch.int32)
    given = {"scales": torch.tensor([[0.5], [0.25]]), **dict.fromkeys(("skip1", "skip2", *BIAS))}
    assert run(rows, index, given, mode, 1)[:, 0].tolist() == [0.0, 0.25]
    assert run(rows, torch.tensor([4, 5], dtype=torch.int32), given, mode, 1)[0].isnan().all()


def test_finalize_after_init_routing() -> None:
    """The chain of expert tensor parallelism in cann-recipes-infer: counts, mode 2, the shared expert as skip1."""
    x, ids = torch.randn(5, HIDDEN), torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(5)]).int()
    scales, shared = torch.rand(5, 2), torch.randn(5, HIDDEN)
    named = {"expert_num": EXPERTS, "active_expert_range": [0, EXPERTS], "active_num": 10}
    rows, index, _, _ = npu.npu_moe_init_routing_v2(x, ids, expert_tokens_num_flag=True, **named)
    y = npu.npu_moe_finalize_routing(rows, shared, None, None, scales, index, None, drop_pad_mode=2)
    torch.testing.assert_close(y, shared + x * scales.sum(1, keepdim=True))


LEGAL = {
    "expanded_permuted_rows": torch.ones(6, 4), "skip1": None, "skip2": None, "bias": None, "scales": torch.ones(3, 2),
    "expanded_src_to_dst_row": torch.arange(6).int(), "export_for_source_row": None, "drop_pad_mode": 2,
}  # fmt: skip
IDS = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"drop_pad_mode": 4}, "finalize.drop_pad_mode"),
        ({"drop_pad_mode": 3}, "finalize.x_dims"),
        ({"expanded_permuted_rows": torch.ones(2, 3, 4)}, "finalize.x_dims"),
        ({"expanded_permuted_rows": torch.ones(7, 4)}, "finalize.rows"),
        ({"expanded_permuted_rows": torch.ones(6, 4).double()}, "finalize.x_dtype"),
        ({"expanded_src_to_dst_row": torch.arange(6)}, "finalize.index_dtype"),
        ({"expanded_src_to_dst_row": torch.arange(-1, 5).int()}, "expanded_src_to_dst_row is -1 to 4; accepted: 0 to 5"),
        ({"expanded_src_to_dst_row": torch.arange(1, 7).int()}, "expanded_src_to_dst_row is 1 to 6; accepted: 0 to 5"),
        ({"scales": torch.ones(3, 2).half()}, "finalize.weights_dtype"),
        ({"scales": torch.ones(2, 2)}, "finalize.index_length"),
        ({"scales": None, "k": 4}, "6 long; accepted: a multiple of k = 4"),
        ({"scales": None, "k": 0}, "finalize.k"),
        ({"skip2": torch.ones(3, 4)}, "finalize.skips"),
        ({"skip1": torch.ones(3, 4).half()}, "finalize.skip1_dtype"),
        ({"skip1": torch.ones(1, 4)}, r"skip1 is \(1, 4\); accepted: \(3, 4\)"),
        ({"bias": torch.ones(4, 4)}, "finalize.bias_experts"),
        ({"bias": torch.ones(4, 4), "export_for_source_row": IDS.long()}, "finalize.experts_dtype"),
        ({"bias": torch.ones(4, 4), "export_for_source_row": IDS + 4}, "export_for_source_row is 4 to 4; accepted: 0 to 3"),
        ({"bias": torch.ones(4, 5), "export_for_source_row": IDS}, r"bias is \(4, 5\); accepted: \(4, 4\)"),
        (
            {"expanded_permuted_rows": torch.ones(0, 4), "expanded_src_to_dst_row": IDS[:0, 0], "scales": torch.ones(0, 2)},
            "finalize.empty",
        ),
    ],
)  # fmt: skip
def test_finalize_refuses(changes: dict[str, Any], code: str) -> None:
    npu.npu_moe_finalize_routing(**LEGAL)
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_finalize_routing(**{**LEGAL, **changes})
