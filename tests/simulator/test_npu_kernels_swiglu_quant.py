"""CPU kernels of ``npu_dequant_swiglu_quant`` and ``npu_swiglu_quant`` against float64, their undefined parts, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from int8_kernels import EXPERTS, assert_undefined, silu
from kernel_calls import assert_quantised, like_meta

npu = torch.ops.npu


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------- dequant, SwiGLU, quant by itself


@pytest.mark.parametrize("gate_first", [True, False])
def test_dequant_swiglu_quant_of_integers(gate_first: bool) -> None:
    x = torch.randint(-(10**6), 10**6, (7, 128), dtype=torch.int32)
    weight_scale, x_scale, smooth = torch.rand(3, 128) / 1e4, torch.rand(7, 1) / 20, torch.rand(3, 64) + 0.5
    values, scale = like_meta(
        npu.npu_dequant_swiglu_quant, x, weight_scale=weight_scale, activation_scale=x_scale, quant_scale=smooth,
        group_index=torch.tensor([2, 0, 3]), activate_left=gate_first, quant_mode=1,
    )  # fmt: skip
    scaled = x[:5].double() * weight_scale[EXPERTS].double() * x_scale[:5].double()
    left, right = scaled[:, :64], scaled[:, 64:]
    expected = silu(left) * right if gate_first else silu(right) * left
    assert_quantised(values[:5], scale[:5], expected * smooth[EXPERTS].double())
    assert_undefined(values[5:], scale[5:])


def test_dequant_swiglu_quant_of_pairs() -> None:
    """Pairs (expert, rows) as npu_moe_init_routing_v2 leaves them: each row meets the scales of its own expert."""
    ids = torch.tensor([[1, 4], [4, 7], [4, 1]], dtype=torch.int32)
    named = {"expert_num": 8, "expert_tokens_num_flag": True}
    pairs = npu.npu_moe_init_routing_v2(torch.ones(3, 4), ids, expert_tokens_num_type=2, **named)[2]
    counts = npu.npu_moe_init_routing_v2(torch.ones(3, 4), ids, expert_tokens_num_type=1, **named)[2]
    assert pairs[:4].tolist() == [[1, 2], [4, 3], [7, 1], [0, 0]] and (pairs[4:] == torch.iinfo(torch.int64).min).all()
    given = {
        "x": torch.randint(-(10**6), 10**6, (6, 128), dtype=torch.int32), "weight_scale": torch.rand(8, 128) / 1e4,
        "activation_scale": torch.rand(6) / 20, "quant_scale": torch.rand(8, 64) + 0.5, "quant_mode": 1,
    }  # fmt: skip
    for got, expected in zip(
        *(npu.npu_dequant_swiglu_quant(**given, group_index=g) for g in (pairs, counts)), strict=True
    ):
        assert torch.equal(got, expected)
    total = given["x"].double() * given["weight_scale"][[1, 1, 4, 4, 4, 7]].double()
    assert_quantised(
        *npu.npu_dequant_swiglu_quant(**given, group_index=pairs),
        silu(total[:, 64:] * given["activation_scale"][:, None].double())
        * total[:, :64] * given["activation_scale"][:, None].double() * given["quant_scale"][[1, 1, 4, 4, 4, 7]].double(),
    )  # fmt: skip


@pytest.mark.parametrize(("mode", "gate_first"), [(1, True), (2, True), (2, False)])
def test_dequant_swiglu_quant_clamped(mode: int, gate_first: bool) -> None:
    """gpt-oss: columns in turn, the even ones the gate; halves for mode 2, of which either may be."""
    x = (torch.randn(5, 128) * 4).bfloat16()
    settings = {"clamp_limit": 3.0, "glu_alpha": 1.5, "glu_bias": 0.5}
    result = like_meta(
        npu.npu_dequant_swiglu_quant, x, activate_left=gate_first, quant_mode=1, swiglu_mode=mode, **settings
    )
    wide = x.double()
    gate, other = (wide[:, 0::2], wide[:, 1::2]) if mode == 1 else (wide[:, :64], wide[:, 64:])
    if mode == 2 and not gate_first:
        gate, other = other, gate
    gate = torch.minimum(gate, torch.tensor(3.0))
    other = torch.maximum(torch.minimum(other, torch.tensor(3.0)), torch.tensor(-3.0))
    assert_quantised(*result, gate / (1 + torch.exp(-1.5 * gate)) * (other + 0.5))


def test_dequant_swiglu_quant_of_floats_without_groups() -> None:
    x = torch.randn(4, 12).bfloat16()
    result = like_meta(npu.npu_dequant_swiglu_quant, x, activate_left=True, quant_mode=1)
    assert_quantised(*result, silu(x[:, :6].double()) * x[:, 6:].double())


DEQUANT = {
    "x": torch.ones(3, 128, dtype=torch.int32),
    "weight_scale": torch.ones(2, 128),
    "activation_scale": torch.ones(3),
    "group_index": torch.tensor([1, 1]),
    "quant_mode": 1,
}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"x": torch.ones(3, 128)}, "dequant_swiglu_quant.x_dtype"),
        ({"weight_scale": None}, "dequant_swiglu_quant.scale"),
        ({"activation_scale": None}, "dequant_swiglu_quant.x_scale"),
        ({"x": torch.ones(3, 128).bfloat16()}, "dequant_swiglu_quant.scale"),
        ({"weight_scale": torch.ones(2, 128).bfloat16()}, "dequant_swiglu_quant.scale_dtype"),
        ({"weight_scale": torch.ones(3, 128)}, "dequant_swiglu_quant.scale_groups"),
        ({"weight_scale": torch.ones(2, 64)}, "dequant_swiglu_quant.scale_width"),
        ({"activation_scale": torch.ones(2)}, "dequant_swiglu_quant.x_scale_rows"),
        ({"group_index": torch.tensor([1, 1]).int()}, "dequant_swiglu_quant.group_list_dtype"),
        ({"group_index": torch.tensor([3, 1])}, "at most the 3 rows"),
        ({"group_index": torch.tensor([3, -1])}, "group_index is .3, -1.; accepted: no negative value"),
        ({"quant_mode": 0}, "dequant_swiglu_quant.quant_mode"),
        ({"bias": torch.ones(128, dtype=torch.int32)}, "dequant_swiglu_quant.bias_groups"),
        ({"quant_offset": torch.ones(2, 64)}, "dequant_swiglu_quant.quant_offset"),
        ({"quant_scale": torch.ones(2, 128)}, r"quant_scale is \(2, 128\); accepted: \(2, 64\)"),
        ({"x": torch.ones(3, 64, dtype=torch.int32)}, "dequant_swiglu_quant.intermediate"),
        ({"swiglu_mode": 3}, "dequant_swiglu_quant.swiglu_mode"),
        ({"swiglu_mode": 1, "activate_left": False}, "dequant_swiglu_quant.activate_left"),
        ({"clamp_limit": 0.0}, "dequant_swiglu_quant.clamp_limit"),
        ({"clamp_limit": math.inf}, "dequant_swiglu_quant.clamp_limit"),
        ({"swiglu_mode": 2, "group_index": torch.tensor([[0, 1], [1, 1]])}, "dequant_swiglu_quant.clamped_pairs"),
        ({"round_mode": 1}, "round_mode is 1; the CPU kernel"),
        ({"dst_type": 16}, "dequant_swiglu_quant.dst_type"),
    ],
)
def test_dequant_swiglu_quant_refuses(changes: dict[str, Any], code: str) -> None:
    npu.npu_dequant_swiglu_quant(**DEQUANT)
    with pytest.raises(ValueError, match=code):
        npu.npu_dequant_swiglu_quant(**{**DEQUANT, **changes})


@pytest.mark.parametrize(("groups", "kind"), [([2, 2, 5], 0), ([2, 0, 3], 1)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_swiglu_quant(groups: list[int], kind: int, per_channel: bool) -> None:
    x, smooth = torch.randn(7, 20).half(), torch.rand(3, 10) + 0.5
    smooth = smooth if per_channel else smooth[:, 0].contiguous()
    values, scale = like_meta(
        npu.npu_swiglu_quant, x, smooth_scales=smooth, group_index=torch.tensor(groups).int(), group_list_type=kind,
        quant_mode=1, dst_type=torch.int8,
    )  # fmt: skip
    factor = smooth.reshape(3, -1)[EXPERTS].double()
    assert_quantised(values[:5], scale[:5], silu(x[:5, 10:].double()) * x[:5, :10].double() * factor)
    assert_undefined(values[5:], scale[5:])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"x": torch.ones(2, 4).double()}, "swiglu_quant.x_dtype"),
        ({"x": torch.ones(2, 5)}, "swiglu_quant.width_multiple"),
        ({"x": torch.ones(2, 8194)}, "swiglu_quant.width"),
        ({"smooth_scales": torch.ones(1, 2).half()}, "swiglu_quant.smooth_dtype"),
        ({"smooth_scales": torch.ones(2, 2)}, r"smooth_scales is \(2, 2\); accepted: \(1, 2\) or \(1,\)"),
        ({"quant_mode": 0, "smooth_scales": torch.ones(1, 2)}, "quant_mode is 0; the CPU kernel"),
        ({"group_index": torch.tensor([1])}, "swiglu_quant.group_list_dtype"),
        ({"group_index": torch.tensor([3]).int()}, "at most the 2 rows"),
    ],
)
def test_swiglu_quant_refuses(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(ValueError, match=code):
        npu.npu_swiglu_quant(**{"x": torch.ones(2, 4), "quant_mode": 1, **changes})
