"""CPU kernels of gating and local routing: values against definitions written out here, shapes against the wheel's
meta functions, undefined parts, and refusals. No code of the kernels is used to compute what is expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_calls import assert_quantised, like_meta

from moe_lowering.simulator.kernels import common, register

npu = torch.ops.npu
NAN = float("nan")
LOWEST = {torch.int32: -(2**31), torch.int64: -(2**63)}


@pytest.fixture
def on_soc(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda soc: monkeypatch.setattr(common, "current_soc", lambda: soc)


def test_register_twice_is_harmless() -> None:
    register()
    register()


# --------------------------------------------------------------------------------------------------------------- gating


def gate(
    row: list[float], bias: list[float], k: int, norm: str, groups: int, best: int, mode: int, scale: float
) -> Any:
    """One row of npu_moe_gating_top_k in plain Python floats."""
    if norm == "softmax":
        total = sum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
    elif norm == "sigmoid":
        p = [1 / (1 + math.exp(-v)) for v in row]
    else:
        p = [math.sqrt(math.log1p(math.exp(v))) for v in row]
    v = [a + b for a, b in zip(p, bias, strict=True)]
    size = len(row) // groups
    score = [sum(sorted(v[g * size : (g + 1) * size])[-(1, 2)[mode] :]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-score[g], g))[:best]
    ids = sorted((i for i in range(len(row)) if i // size in kept), key=lambda i: (-v[i], i))[:k]
    y = [p[i] for i in ids]
    if norm != "softmax":
        total = sum(y)
        y = [a / (total + 1e-20) for a in y]
    return [a * scale for a in y], ids, p


@pytest.mark.parametrize(("norm_type", "norm"), [(0, "softmax"), (1, "sigmoid"), (2, "sqrt_softplus")])
@pytest.mark.parametrize(("groups", "best", "mode"), [(1, 1, 0), (4, 2, 0), (4, 2, 1)])
def test_gating_is_its_definition(
    norm_type: int, norm: str, groups: int, best: int, mode: int, on_soc: Callable[[str], None]
) -> None:
    on_soc("A5")  # norm_type 2 is documented there only
    x, bias = torch.randn(6, 16), torch.randn(16) / 8
    y, ids, out = like_meta(
        npu.npu_moe_gating_top_k, x, 3, bias=bias, k_group=best, group_count=groups, group_select_mode=mode,
        norm_type=norm_type, out_flag=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    for t in range(6):
        weights, chosen, norms = gate(x[t].tolist(), bias.tolist(), 3, norm, groups, best, mode, 2.5)
        assert ids[t].tolist() == chosen
        torch.testing.assert_close(y[t], torch.tensor(weights))
        torch.testing.assert_close(out[t], torch.tensor(norms))


def test_gating_takes_the_lower_index_of_equal_values() -> None:
    y, ids, out = like_meta(npu.npu_moe_gating_top_k, torch.zeros(2, 8, dtype=torch.bfloat16), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert y.tolist() == [[0.125] * 3] * 2
    assert out.isnan().all(), "norm_out is undefined without out_flag"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"k": 9}, "gating.top_k"),
        ({"k": 0}, "gating.top_k"),
        ({"group_count": 3}, "gating.groups_divide"),
        ({"group_count": 4, "k_group": 2}, "gating.group_size"),
        ({"group_count": 2, "k_group": 1, "k": 5}, "gating.top_k"),
        ({"group_count": 2, "k_group": 3}, "gating.k_group"),
        ({"group_count": 0}, "gating.group_count"),
        ({"group_select_mode": 2}, "gating.group_select_mode"),
        ({"renorm": 1}, "gating.renorm"),
        ({"norm_type": 2}, "gating.norm_type"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "gating.bias_dtype"),
        ({"bias": torch.zeros(7)}, "gating.bias_length"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "gating.x_dtype"),
        ({"x": torch.zeros(2, 8, 8)}, "gating.x_dims"),
        ({"x": torch.zeros(1, 2049)}, "gating.experts"),
    ],
)
def test_gating_refuses(changes: dict[str, Any], code: str) -> None:
    arguments = {"x": torch.zeros(2, 8), "k": 2, **changes}
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_gating_top_k(**arguments)


def test_gating_refuses_ids_of_a_table() -> None:
    """``input_ids`` and ``tid2eid`` came with torch_npu 2.11; before that torch refuses their names."""
    ids, table = torch.zeros(2, dtype=torch.int32), torch.zeros(9, 2, dtype=torch.int32)
    there = "input_ids" in {argument.name for argument in npu.npu_moe_gating_top_k.default._schema.arguments}
    with pytest.raises(ValueError if there else RuntimeError, match="input_ids"):
        npu.npu_moe_gating_top_k(torch.zeros(2, 8), 2, input_ids=ids, tid2eid=table)


# --------------------------------------------------------------------------------------------------------- init routing

X = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
IDS = torch.tensor([[2, 0], [1, 2], [0, 3]], dtype=torch.int32)  # slots 0..5; by expert: 0: 1, 4; 1: 2; 2: 0, 3; 3: 5
COUNTS = {"expert_num": 4, "expert_tokens_num_flag": True}


def test_init_routing_of_all_experts() -> None:
    rows, index, counts, scale = like_meta(npu.npu_moe_init_routing_v2, X, IDS, **COUNTS, expert_tokens_num_type=1)
    assert rows[:, 0].tolist() == [1, 3, 2, 1, 2, 3]
    assert rows[:, 1].tolist() == [10, 30, 20, 10, 20, 30]
    assert index.tolist() == [3, 0, 2, 4, 1, 5]
    assert counts.tolist() == [2, 1, 2, 1]
    assert scale.isnan().all()


def test_init_routing_of_a_range_leaves_the_rest_undefined() -> None:
    rows, index, counts, _ = like_meta(
        npu.npu_moe_init_routing_v2, X, IDS, **COUNTS, expert_tokens_num_type=1, active_expert_range=[1, 3]
    )
    assert rows[:3, 0].tolist() == [2, 1, 2]
    assert rows[3:].isnan().all()
    assert index.tolist() == [1, -1, 0, 2, -1, -1]
    assert counts.tolist() == [1, 2]


def test_init_routing_scatter_index_and_prefix_sums() -> None:
    _, index, counts, _ = like_meta(
        npu.npu_moe_init_routing_v2, X, IDS, **COUNTS, expert_tokens_num_type=0, active_expert_range=[1, 3],
        row_idx_type=1,
    )  # fmt: skip
    assert index.tolist() == [2, 0, 3] + [LOWEST[torch.int32]] * 3
    assert counts.tolist() == [1, 3]


def test_init_routing_key_value_counts() -> None:
    pairs = like_meta(
        npu.npu_moe_init_routing_v2, X, IDS % 3 * 2, expert_num=6, expert_tokens_num_flag=True, expert_tokens_num_type=2
    )[2]
    low = LOWEST[torch.int64]
    assert pairs.tolist() == [[0, 3], [2, 1], [4, 2], [0, 0], [low, low], [low, low]]


def test_init_routing_active_num_truncates_rows_only() -> None:
    rows, index, counts, _ = like_meta(
        npu.npu_moe_init_routing_v2, X, IDS, **COUNTS, expert_tokens_num_type=1, active_num=4
    )
    assert rows[:, 0].tolist() == [1, 3, 2, 1]
    assert (index.tolist(), counts.tolist()) == ([3, 0, 2, 4, 1, 5], [2, 1, 2, 1])
    for everything in (-1, 0):
        assert npu.npu_moe_init_routing_v2(X, IDS, **COUNTS, active_num=everything)[0].shape[0] == 6


def test_init_routing_moves_given_scales() -> None:
    scale = like_meta(
        npu.npu_moe_init_routing_v2, X, IDS, **COUNTS, scale=torch.tensor([0.1, 0.2, 0.3]), active_expert_range=[1, 3]
    )[3]
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.1, 0.2, NAN, NAN, NAN]), equal_nan=True)


@pytest.mark.parametrize("active", [[], [1, 3]])
def test_init_routing_of_quantised_rows(active: list[int]) -> None:
    """int8 rows and their scales travel together, as W8A8 behind an all-gather has them."""
    x, scale = torch.tensor([[1, -10], [2, 127], [3, -128]], dtype=torch.int8), torch.tensor([0.5, 0.25, 2.0])
    rows, _, counts, scales = like_meta(
        npu.npu_moe_init_routing_v2, x, IDS, **COUNTS, scale=scale, expert_tokens_num_type=1, quant_mode=-1,
        active_expert_range=active,
    )  # fmt: skip
    tokens = [1, 0, 1] if active else [0, 2, 1, 0, 1, 2]
    used = len(tokens)
    assert torch.equal(rows[:used], x[tokens])
    assert torch.equal(scales[:used], scale[tokens])
    assert counts.tolist() == ([1, 2] if active else [2, 1, 2, 1])
    assert (rows[used:] == -128).all()
    assert scales[used:].isnan().all()


def test_init_routing_quantises_random_rows() -> None:
    x, smooth = torch.randn(6, 64).bfloat16(), torch.rand(4, 64) + 0.5
    ids = torch.rand(6, 4).topk(2).indices.int()
    rows, index, _, scale = npu.npu_moe_init_routing_v2(x, ids, **COUNTS, quant_mode=1, scale=smooth)
    slots = torch.argsort(index.long())
    expected = x.double()[slots // 2] * smooth.double()[ids.reshape(-1).long()[slots]]
    assert_quantised(rows, scale, expected)
    assert_quantised(*npu.npu_moe_init_routing_v2(x, ids, **COUNTS, quant_mode=1)[::3], x.double()[slots // 2])


def test_init_routing_quantises_rows() -> None:
    x = torch.tensor([[127.0, -2.5], [-254.0, 3.0], [0.0, 0.0]])
    rows, _, _, scale = like_meta(npu.npu_moe_init_routing_v2, x, IDS, **COUNTS, quant_mode=1)
    by_token = {0: [127, -2], 1: [-127, 2], 2: [0, 0]}  # -2.5 -> -2 and 1.5 -> 2: half to even
    assert rows.tolist() == [by_token[t] for t in (0, 2, 1, 0, 1, 2)]
    assert scale.tolist() == [1, 0, 2, 1, 2, 0]


def test_init_routing_quantises_with_the_smooth_row_of_the_expert() -> None:
    smooth = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    rows, _, _, scale = npu.npu_moe_init_routing_v2(
        X, IDS, **COUNTS, quant_mode=1, scale=smooth, active_expert_range=[1, 3]
    )
    torch.testing.assert_close(scale[:3], torch.tensor([20.0, 40.0, 80.0]) / 127)  # max of [4,20], [1,40], [2,80]
    assert rows[:3].tolist() == [[25, 127], [3, 127], [3, 127]]
    assert (rows[3:] == -128).all()


def test_init_routing_without_counts() -> None:
    counts = like_meta(npu.npu_moe_init_routing_v2, X, IDS, expert_num=4)[2]
    assert counts.item() == LOWEST[torch.int64]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"expert_idx": IDS.long()}, "routing.ids_dtype"),
        ({"expert_idx": IDS[:2]}, "routing.ids_tokens"),
        ({"expert_idx": IDS.reshape(-1)}, "routing.ids_dims"),
        ({"expert_idx": IDS + 1}, "expert_idx is 1 to 4; accepted: 0 to"),
        ({"expert_idx": IDS - 1}, "expert_idx is -1 to 2; accepted: 0 to"),
        ({"x": X.double()}, "routing.x_dtype"),
        ({"expert_num": -1}, "routing.experts"),
        ({"expert_num": 10241}, "routing.experts"),
        ({"expert_num": 5121, "expert_tokens_num_type": 2}, "routing.experts"),
        ({"active_expert_range": [1, 5]}, "routing.expert_end"),
        ({"active_expert_range": [2, 2]}, "routing.expert_start"),
        ({"active_expert_range": [-1, 2]}, "routing.expert_start"),
        ({"drop_pad_mode": 1, "expert_capacity": 1}, "routing.drop_pad_mode"),
        ({"expert_tokens_num_type": 3}, "routing.expert_tokens_num_type"),
        ({"row_idx_type": 2}, "routing.row_idx_type"),
        ({"active_num": -2}, "routing.active_num"),
        ({"quant_mode": 3}, "routing.quant_mode"),
        ({"quant_mode": 0}, "quant_mode is 0; the CPU kernel computes only"),
        ({"x": X.to(torch.int8), "quant_mode": 1}, "routing.quant_int8"),
        ({"offset": torch.zeros(3)}, "routing.offset"),
        ({"scale": torch.zeros(2)}, "routing.scale_tokens"),
        ({"scale": torch.zeros(3, 2), "quant_mode": 1}, "routing.scale_rows"),
    ],
)
def test_init_routing_refuses(changes: dict[str, Any], code: str) -> None:
    arguments = {"x": X, "expert_idx": IDS, **COUNTS, **changes}
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_init_routing_v2(**arguments)


# ------------------------------------------------------------------------------------------------------------ unpermute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpermute_is_its_definition(dtype: torch.dtype) -> None:
    rows, probs = torch.randn(12, 5).to(dtype), torch.rand(4, 3).to(dtype)
    indices = torch.randperm(12).int()
    y = like_meta(npu.npu_moe_token_unpermute, rows, indices, probs)
    for t in range(4):
        expected = sum(probs[t, k].double() * rows[int(indices[3 * t + k])].double() for k in range(3))
        torch.testing.assert_close(y[t], expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_unpermute_rounds_once() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # bf16 cannot hold 257
    y = npu.npu_moe_token_unpermute(rows, torch.tensor([0, 1, 2]).int(), torch.ones(1, 3, dtype=torch.bfloat16))
    assert y.item() == 258


def test_unpermute_without_weights_is_a_gather() -> None:
    y = like_meta(npu.npu_moe_token_unpermute, X, torch.tensor([2, 0, 1]).int())
    assert y[:, 0].tolist() == [3, 1, 2]


def test_unpermute_passes_on_what_is_undefined() -> None:
    rows = torch.cat((X, torch.full((1, 2), NAN)))
    y = npu.npu_moe_token_unpermute(rows, torch.tensor([0, 3]).int(), torch.tensor([[1.0, 0.0]]))
    assert y.isnan().all(), "0 * NaN is NaN: undefined rows must be selected to zero before"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"sorted_indices": torch.tensor([0, 1, 2, 3, 4, 6]).int()}, "sorted_indices is 0 to 6; accepted: 0 to 5"),
        ({"sorted_indices": torch.tensor([0, 1, 2, 3, 4, -1]).int()}, "sorted_indices is -1 to 4"),
        ({"sorted_indices": torch.arange(6)}, "unpermute.indices_dtype"),
        ({"sorted_indices": torch.arange(5).int()}, "unpermute.indices_length"),
        ({"probs": torch.ones(3, 2, dtype=torch.bfloat16)}, "unpermute.weights_dtype"),
        ({"probs": torch.ones(6)}, "unpermute.weights_dims"),
        ({"padded_mode": True}, "unpermute.padded_mode"),
        ({"permuted_tokens": torch.ones(6, 2).double(), "probs": None}, "unpermute.x_dtype"),
        ({"sorted_indices": torch.zeros(513).int(), "probs": torch.ones(1, 513)}, "unpermute.top_k"),
    ],
)
def test_unpermute_refuses(changes: dict[str, Any], code: str) -> None:
    legal = {"permuted_tokens": torch.ones(6, 2), "sorted_indices": torch.arange(6).int(), "probs": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_token_unpermute(**{**legal, **changes})


def test_each_soc_has_its_rows(on_soc: Callable[[str], None]) -> None:
    on_soc("310P")
    for call in (
        lambda: npu.npu_moe_gating_top_k(torch.zeros(2, 8), 2),
        lambda: npu.npu_moe_init_routing_v2(X, IDS, **COUNTS),
        lambda: npu.npu_moe_token_unpermute(X, torch.arange(3).int()),
    ):
        with pytest.raises(ValueError, match=r"soc is 310P; accepted: one of A2, A3, A5"):
            call()
