"""CPU kernels of the local ``npu::`` operators: values against definitions written out here, shapes against the wheel's
meta functions, undefined parts, and refusals. No code of the kernels is used to compute what is expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_lowering.simulator.kernels import common, register

npu = torch.ops.npu
NAN = float("nan")
LOWEST = {torch.int32: -(2**31), torch.int64: -(2**63)}


@pytest.fixture
def on_soc(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda soc: monkeypatch.setattr(common, "current_soc", lambda: soc)


def like_meta(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The CPU result, after its shapes and dtypes were found equal to those of torch_npu's meta function."""
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
    expected = torch.utils._pytree.tree_leaves(op(*meta[0], **meta[1]))
    result = op(*args, **kwargs)
    got = torch.utils._pytree.tree_leaves(result)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    return result


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
        (
            {"input_ids": torch.zeros(2, dtype=torch.int32), "tid2eid": torch.zeros(9, 2, dtype=torch.int32)},
            "input_ids",
        ),
    ],
)
def test_gating_refuses(changes: dict[str, Any], code: str) -> None:
    arguments = {"x": torch.zeros(2, 8), "k": 2, **changes}
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_gating_top_k(**arguments)


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
        ({"restore_shape": [3, 2]}, "unpermute.restore_shape"),
        ({"permuted_tokens": torch.ones(6, 2).double(), "probs": None}, "unpermute.x_dtype"),
        ({"sorted_indices": torch.zeros(513).int(), "probs": torch.ones(1, 513)}, "unpermute.top_k"),
    ],
)
def test_unpermute_refuses(changes: dict[str, Any], code: str) -> None:
    legal = {"permuted_tokens": torch.ones(6, 2), "sorted_indices": torch.arange(6).int(), "probs": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=code):
        npu.npu_moe_token_unpermute(**{**legal, **changes})


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


def test_each_soc_has_its_rows(on_soc: Callable[[str], None]) -> None:
    on_soc("310P")
    for call in (
        lambda: npu.npu_moe_gating_top_k(torch.zeros(2, 8), 2),
        lambda: npu.npu_moe_init_routing_v2(X, IDS, **COUNTS),
        lambda: npu.npu_moe_token_unpermute(X, torch.arange(3).int()),
        lambda: npu.npu_swiglu(torch.ones(2, 4)),
    ):
        with pytest.raises(ValueError, match=r"soc is 310P; accepted: one of A2, A3, A5"):
            call()
    with pytest.raises(ValueError, match=r"gmm\.x_dtype.*gmm\.|gmm\.n_multiple.*gmm\.x_dtype"):
        gmm(torch.ones(4, 3), [torch.ones(2, 3, 5)], [1, 1], 1)
    assert gmm(torch.ones(2, 3).half(), [torch.ones(1, 3, 16).half()], [2], 1)[0, 0] == 3
