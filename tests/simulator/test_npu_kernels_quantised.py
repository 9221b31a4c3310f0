"""CPU kernels of the quantised ``npu::`` operators against integers and float64, their undefined parts, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from int8_kernels import EXPERTS, assert_undefined, int8s, silu
from kernel_calls import assert_quantised, like_meta

from moe_lowering.simulator.kernels import common

npu = torch.ops.npu


NAN = float("nan")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def on_soc(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda soc: monkeypatch.setattr(common, "current_soc", lambda: soc)


# -------------------------------------------------------------------------------------------------------- dynamic quant


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_dynamic_quant_is_its_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, smooth = torch.randn(shape).to(dtype), torch.rand(48).to(dtype) + 0.5
    assert_quantised(*like_meta(npu.npu_dynamic_quant, x), x.double())
    assert_quantised(*like_meta(npu.npu_dynamic_quant, x, smooth_scales=smooth), x.double() * smooth.double())


def test_dynamic_quant_by_hand() -> None:
    x = torch.tensor([[127.0, -2.5, 1.5, 0.5], [0.0, 0.0, 0.0, 0.0], [-254.0, 3.0, 1.0, 5.0]], dtype=torch.bfloat16)
    values, scale = npu.npu_dynamic_quant(x)
    assert values.tolist() == [[127, -2, 2, 0], [0, 0, 0, 0], [-127, 2, 0, 2]], "half to even"
    assert scale.tolist() == [1, 0, 2]


def test_dynamic_quant_of_undefined_rows_is_undefined() -> None:
    x = torch.tensor([[1.0, NAN], [1.0, float("inf")], [1.0, 2.0]], dtype=torch.bfloat16)
    values, scale = npu.npu_dynamic_quant(x)
    assert scale.isnan().tolist() == [True, True, False]
    assert values[:2].tolist() == [[-128, -128]] * 2


def test_dynamic_quant_of_groups_and_of_no_rows() -> None:
    x, smooth = torch.randn(5, 16).bfloat16(), torch.rand(3, 16).bfloat16() + 0.5
    groups = torch.tensor([2, 2, 5], dtype=torch.int32)
    result = like_meta(npu.npu_dynamic_quant, x, smooth_scales=smooth, group_index=groups)
    assert_quantised(*result, x.double() * smooth.double()[[0, 0, 2, 2, 2]])
    assert like_meta(npu.npu_dynamic_quant, x[:0])[0].shape == (0, 16)


GROUPED = {"smooth_scales": torch.ones(2, 8).half(), "group_index": torch.tensor([1, 3], dtype=torch.int32)}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"input": torch.ones(3, 8)}, "dynamic_quant.x_dtype"),
        ({"input": torch.ones(8).half()}, "dynamic_quant.x_dims"),
        ({"dst_type": 2}, "dynamic_quant.dst_type"),
        ({"dst_type": 16}, "dst_type is 16; the CPU kernel computes only"),
        ({"quant_mode": "perchannel"}, "dynamic_quant.quant_mode"),
        ({"dst_type_max": 1.0}, "dynamic_quant.dst_type_max"),
        ({"smooth_scales": torch.ones(8)}, "dynamic_quant.smooth_dtype"),
        ({"smooth_scales": torch.ones(7).half()}, "dynamic_quant.smooth_width"),
        ({"smooth_scales": torch.ones(2, 8).half()}, "dynamic_quant.smooth_dims"),
        ({**GROUPED, "group_index": torch.tensor([1, 3])}, "dynamic_quant.group_list_dtype"),
        ({"group_index": GROUPED["group_index"]}, "dynamic_quant.groups_without_smooth"),
        ({**GROUPED, "group_index": torch.tensor([2, 1], dtype=torch.int32)}, "never decrease"),
        ({**GROUPED, "group_index": torch.tensor([1, 2], dtype=torch.int32)}, "end with the 3 rows"),
        ({**GROUPED, "group_index": torch.tensor([1, 4], dtype=torch.int32)}, "at most the 3 rows"),
    ],
)
def test_dynamic_quant_refuses(changes: dict[str, Any], code: str) -> None:
    npu.npu_dynamic_quant(torch.ones(3, 8).half(), **GROUPED)
    with pytest.raises(ValueError, match=code):
        npu.npu_dynamic_quant(**{"input": torch.ones(3, 8).half(), **changes})


def fused_arguments(inner: int = 40, width: int = 32, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "x": int8s(7, inner),
        "weight": int8s(3, inner, width),
        "weight_scale": (torch.rand(3, width) / 500 + 0.001).to(dtype),
        "x_scale": torch.rand(7) / 50 + 0.01,
    }


def fused_reference(a: dict[str, Any]) -> torch.Tensor:
    """S of the first five rows, float64, from exact integer sums."""
    total = torch.stack([a["x"][r].long() @ a["weight"][e].long() for r, e in enumerate(EXPERTS)])
    scaled = total.double() * a["weight_scale"][EXPERTS].double() * a["x_scale"][:5, None].double()
    half = scaled.shape[1] // 2
    return silu(scaled[:, :half]) * scaled[:, half:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul_swiglu_quant(dtype: torch.dtype) -> None:
    a = fused_arguments(dtype=dtype)
    values, scale, offset = like_meta(npu.npu_grouped_matmul_swiglu_quant, **a, group_list=torch.tensor([2, 2, 5]))
    assert_quantised(values[:5], scale[:5], fused_reference(a))
    assert_undefined(values[5:], scale[5:])
    assert offset.isnan()


FLOAT32_SCALES = {"dequant_dtype": 6}  # the default since torch_npu 2.11


@pytest.mark.parametrize(("groups", "kind"), [([2, 2, 5], 0), ([2, 0, 3], 1)])
def test_matmul_swiglu_quant_v2(groups: list[int], kind: int) -> None:
    a = fused_arguments()
    lists = {**a, "weight": [a["weight"]], "weight_scale": [a["weight_scale"]]}
    values, scale = like_meta(
        npu.npu_grouped_matmul_swiglu_quant_v2,
        **lists,
        **FLOAT32_SCALES,
        group_list=torch.tensor(groups),
        group_list_type=kind,
    )
    assert_quantised(values[:5], scale[:5], fused_reference(a))
    assert_undefined(values[5:], scale[5:])


def test_matmul_swiglu_quant_does_not_read_undefined_rows() -> None:
    a = fused_arguments()
    groups = {"group_list": torch.tensor([2, 2, 5])}
    values, scale, _ = npu.npu_grouped_matmul_swiglu_quant(**a, **groups)
    a["x"][5:], a["x_scale"][5:] = -128, NAN
    again, scale_again, _ = npu.npu_grouped_matmul_swiglu_quant(**a, **groups)
    assert torch.equal(values[:5], again[:5])
    assert torch.equal(scale[:5], scale_again[:5])


FUSED = {
    "x": torch.ones(4, 3, dtype=torch.int8),
    "weight": torch.ones(2, 3, 6, dtype=torch.int8),
    "weight_scale": torch.ones(2, 6),
    "x_scale": torch.ones(4),
    "group_list": torch.tensor([1, 3]),
}


BOTH = [
    ({"x": torch.ones(4, 3).half()}, "gmm_swiglu_quant.x_dtype"),
    ({"weight": torch.ones(2, 3, 6).half()}, "gmm_swiglu_quant.weight_dtype"),
    ({"weight": torch.ones(3, 6, dtype=torch.int8)}, "gmm_swiglu_quant.weight_dims"),
    ({"weight": torch.ones(2, 4, 6, dtype=torch.int8)}, r"weight is \(2, 4, 6\); accepted: \(E, K, N\) = \(2, 3, 6\)"),
    ({"weight": torch.ones(2, 6, 3, dtype=torch.int8)}, r"weight is \(2, 6, 3\)"),
    ({"weight_scale": torch.ones(2, 6).double()}, "gmm_swiglu_quant.scale_dtype"),
    ({"weight_scale": torch.ones(3, 6)}, "gmm_swiglu_quant.scale_groups"),
    ({"weight_scale": torch.ones(2, 7)}, "gmm_swiglu_quant.width"),
    ({"x_scale": torch.ones(4).half()}, "gmm_swiglu_quant.x_scale_dtype"),
    ({"x_scale": torch.ones(3)}, "gmm_swiglu_quant.x_scale_rows"),
    ({"x_scale": torch.ones(4, 1)}, "gmm_swiglu_quant.x_scale_dims"),
    ({"group_list": torch.tensor([1, 3]).int()}, "gmm_swiglu_quant.group_list_dtype"),
    ({"group_list": torch.tensor([1, 2, 3])}, "gmm_swiglu_quant.group_list_length"),
    ({"group_list": torch.tensor([3, 1])}, "group_list is .3, 1.; accepted: prefix sums that never decrease"),
    ({"group_list": torch.tensor([1, 5])}, "at most the 4 rows"),
    ({"bias": torch.ones(2, 6)}, "gmm_swiglu_quant.bias"),
]


@pytest.mark.parametrize(("changes", "code"), [*BOTH, ({"offset": torch.ones(2, 6)}, "gmm_swiglu_quant.offset")])
def test_matmul_swiglu_quant_refuses(changes: dict[str, Any], code: str) -> None:
    npu.npu_grouped_matmul_swiglu_quant(**FUSED)
    with pytest.raises(ValueError, match=code):
        npu.npu_grouped_matmul_swiglu_quant(**{**FUSED, **changes})


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        *BOTH,
        ({"weight_scale": torch.ones(2, 6).bfloat16()}, "gmm_swiglu_quant.scale_dtype"),
        ({"group_list_type": 2}, "gmm_swiglu_quant.group_list_type"),
        ({"dequant_dtype": 15}, "gmm_swiglu_quant.dequant_dtype"),
        ({"dequant_mode": 1}, "gmm_swiglu_quant.dequant_mode"),
        ({"quant_mode": 1}, "gmm_swiglu_quant.quant_mode"),
        ({"quant_dtype": 23}, "gmm_swiglu_quant.quant_dtype"),
        ({"smooth_scale": torch.ones(2)}, "gmm_swiglu_quant.smooth"),
        ({"weight_assist_matrix": [torch.ones(2, 6)]}, "gmm_swiglu_quant.assist"),
        ({"x_dtype": 290}, "gmm_swiglu_quant.overrides"),
    ],
)
def test_matmul_swiglu_quant_v2_refuses(changes: dict[str, Any], code: str) -> None:
    a = {**FUSED, **FLOAT32_SCALES, **changes}
    with pytest.raises(ValueError, match=code):
        npu.npu_grouped_matmul_swiglu_quant_v2(
            **{**a, "weight": [a["weight"]], "weight_scale": [a["weight_scale"]]},
        )


def test_each_soc_has_its_fused_operator(on_soc: Callable[[str], None]) -> None:
    a = {**FUSED, "weight": [FUSED["weight"]], "weight_scale": [FUSED["weight_scale"].bfloat16()]}
    on_soc("A5")
    npu.npu_grouped_matmul_swiglu_quant_v2(**a, **FLOAT32_SCALES)
    with pytest.raises(ValueError, match="dequant_dtype is 15; the CPU kernel computes only: 6"):
        npu.npu_grouped_matmul_swiglu_quant_v2(**a, dequant_dtype=15)
    with pytest.raises(ValueError, match=r"gmm_swiglu_quant\.soc"):
        npu.npu_grouped_matmul_swiglu_quant(**FUSED)


def test_the_chain_is_the_fused_operator() -> None:
    """int32 matmul, then dequant, SwiGLU and quant: what vllm-ascend runs where it does not fuse."""
    a, groups = fused_arguments(64, 128), torch.tensor([2, 0, 3])
    total = npu.npu_grouped_matmul(
        [a["x"]], [a["weight"]], group_list=groups, group_list_type=1, group_type=0, split_item=3, output_dtype=3
    )[0]
    values, scale = npu.npu_dequant_swiglu_quant(
        total, weight_scale=a["weight_scale"], activation_scale=a["x_scale"], group_index=groups, activate_left=True,
        quant_mode=1,
    )  # fmt: skip
    assert_quantised(values[:5], scale[:5], fused_reference(a))
