"""CPU kernel of npu_grouped_matmul with quantised weights, against exact integers and float64, and its refusals.

Floors of the signal-to-noise ratio: a bfloat16 result is rounded once, to 8 bits (at least 50 dB), a float16 one to 11 (at
least 68 dB); weights that are rounded to 16 bits first cost 3 dB more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from int8_kernels import int8s
from kernel_calls import like_meta
from quantised_numbers import pack_int4, scale_bits, snr

from moe_lowering.simulator.kernels import common
from moe_lowering.simulator.kernels.quantised_matmul import int_product, scale_of_bits, unpack_int4

npu = torch.ops.npu
EXPERTS = [0, 0, 2, 2, 2]  # of the first five of seven rows
COUNTS = torch.tensor([2, 0, 3])
INT32, FLOAT16, BFLOAT16 = 3, 5, 15
FLOORS = {FLOAT16: 68.0, BFLOAT16: 50.0}
DTYPES = {FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def on_soc(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda soc: monkeypatch.setattr(common, "current_soc", lambda: soc)


def int4s(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 8, shape).to(torch.int8)


def gmm(x: torch.Tensor, weight: list[torch.Tensor], **others: Any) -> torch.Tensor:
    arguments = {"group_type": 0, "split_item": 2, "group_list": COUNTS, "group_list_type": 1, **others}
    return like_meta(npu.npu_grouped_matmul, [x], weight, **arguments)[0]


def sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight of its expert for the first five rows, int64."""
    return torch.stack([x[r].long() @ weight[e].long() for r, e in enumerate(EXPERTS)])


# ------------------------------------------------------------------------------------------------------------ the pieces


def test_int_product_is_exact_at_the_extremes() -> None:
    x, weight = torch.tensor([[-128], [127]]).expand(2, 3001), torch.tensor([[-128, 127]]).expand(3001, 2)
    x, weight = x.to(torch.int8), weight.to(torch.int8)  # 127 * 127 * 3001 is odd and above 2 ** 25
    assert int_product(x, weight).tolist() == (x.long() @ weight.long()).tolist()
    assert int_product(x[:, :0], weight[:0]).tolist() == [[0, 0], [0, 0]]


def test_int4_is_packed_from_the_lowest_bits() -> None:
    assert unpack_int4(torch.tensor([0x76543210], dtype=torch.int32)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert unpack_int4(torch.tensor([-1, 0x8F], dtype=torch.int32)).tolist() == [-1] * 8 + [-1, -8] + [0] * 6
    values = int4s(3, 5, 24)
    assert torch.equal(unpack_int4(pack_int4(values)), values)
    for rows, words in ((5, 1), (1, 5), (3, 0), (0, 3)):  # views whose last stride is not 1
        packed = torch.arange(rows * words, dtype=torch.int32).reshape(words, rows).t()
        assert torch.equal(unpack_int4(packed), unpack_int4(packed.clone(memory_format=torch.contiguous_format)))
        assert unpack_int4(packed).shape == (rows, 8 * words)


def test_scales_travel_as_bits() -> None:
    scale = torch.rand(3, 5) - 0.25
    assert scale_bits(torch.tensor([1.0])).tolist() == [0x3F800000]
    assert torch.equal(scale_of_bits(scale_bits(scale)), scale)
    assert torch.equal(scale_of_bits(scale_bits(scale).t().contiguous().t()), scale)
    assert torch.equal(scale_of_bits(scale_bits(scale).to(torch.int32).long()), scale), "sign-extended"


# ------------------------------------------------------------------------------------------------------------------ a8w8


def test_int8_to_int32() -> None:
    x, weight = int8s(7, 2050), int8s(3, 2050, 6)
    bias = torch.randint(-(2**20), 2**20, (3, 6), dtype=torch.int32)
    y = gmm(x, [weight], output_dtype=INT32, bias=[bias])
    assert torch.equal(y[:5].long(), sums(x, weight) + bias[EXPERTS])
    assert (y[5:] == -(2**31)).all()


@pytest.mark.parametrize("number", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("per_token", [True, False])
def test_int8_scaled(number: int, per_token: bool) -> None:
    x, weight = int8s(7, 64), int8s(3, 64, 48)
    scale = (torch.rand(3, 48) / 200).to(torch.bfloat16 if number == BFLOAT16 else torch.float32)
    rows = torch.rand(7) / 30
    bias = torch.randint(-(2**14), 2**14, (3, 48), dtype=torch.int32)
    more = {"per_token_scale": [rows]} if per_token else {}
    y = gmm(x, [weight], scale=[scale], bias=[bias], output_dtype=number, **more)
    expected = (sums(x, weight) + bias[EXPERTS]).double() * scale[EXPERTS].double()
    expected = expected * rows[:5, None].double() if per_token else expected
    assert y.dtype == DTYPES[number]
    assert snr(y[:5], expected) > FLOORS[number]
    assert y[5:].isnan().all()


def test_int8_groups_as_prefix_sums_and_as_pairs() -> None:
    x, weight = int8s(7, 16), int8s(3, 16, 4)
    expected = sums(x, weight)
    prefix = gmm(x, [weight], output_dtype=INT32, group_list=torch.tensor([2, 2, 5]), group_list_type=0)
    assert torch.equal(prefix[:5].long(), expected)
    pairs = {"group_list": torch.tensor([[2, 3], [0, 2], [1, 0]]), "group_list_type": 2}  # rows of expert 2 come first
    y = gmm(torch.cat((x[2:5], x[:2], x[5:])), [weight], output_dtype=INT32, **pairs)
    assert torch.equal(y[:5].long(), expected[[2, 3, 4, 0, 1]])


def test_undefined_rows_are_not_read() -> None:
    x, weight, rows = int8s(7, 16), int8s(3, 16, 8), torch.rand(7)
    rows[5:] = float("nan")
    scale = torch.rand(3, 8)
    y = gmm(x, [weight], scale=[scale], per_token_scale=[rows], output_dtype=FLOAT16)
    assert not y[:5].isnan().any()


# ------------------------------------------------------------------------------------------------------------------ a8w4


def int4_call(groups: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments with the right compensation, and the float64 result: scale by column, or by column and group of K."""
    x, weight = int8s(7, 512), int4s(3, 512, 16)
    scale = torch.rand(3, groups, 16) / 300 + 1e-4
    rows = torch.rand(7) / 30 + 0.01
    size = 512 // groups
    along_k = scale.repeat_interleave(size, 1).double()  # [3, 512, 16]
    dense = weight.double() * along_k
    expected = torch.stack([x[r].double() @ dense[e] for r, e in enumerate(EXPERTS)]) * rows[:5, None].double()
    scale = scale if groups > 1 else scale[:, 0].contiguous()
    arguments = {
        "x": x,
        "weight": [pack_int4(weight)],
        "scale": [scale_bits(scale)],
        "bias": [(8 * dense.sum(1)).float()],
        "per_token_scale": [rows],
    }
    return arguments, expected


@pytest.mark.parametrize("number", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("groups", [1, 2])
def test_int4_with_the_right_compensation_is_the_product(number: int, groups: int) -> None:
    arguments, expected = int4_call(groups)
    y = gmm(**arguments, output_dtype=number)
    assert (y.dtype, y.shape) == (DTYPES[number], (7, 16))
    assert snr(y[:5], expected) > FLOORS[number]
    assert y[5:].isnan().all()


def test_int4_takes_scales_as_uint64() -> None:
    arguments, expected = int4_call(1)
    arguments["scale"] = [arguments["scale"][0].view(torch.uint64)]
    assert snr(gmm(**arguments, output_dtype=FLOAT16)[:5], expected) > FLOORS[FLOAT16]


@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0])
def test_int4_with_another_compensation_is_wrong_by_it(factor: float) -> None:
    arguments, expected = int4_call(1)
    right = arguments["bias"][0]
    arguments["bias"] = [factor * right]
    y = gmm(**arguments, output_dtype=FLOAT16)[:5]
    assert snr(y, expected) < 20
    off = (factor - 1) * right[EXPERTS].double() * arguments["per_token_scale"][0][:5, None].double()
    assert snr(y, expected + off) > FLOORS[FLOAT16]


# ------------------------------------------------------------------------------------------------- a16w8, a16w4: antiquant


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("has_offset", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
def test_weights_are_dequantised(
    dtype: torch.dtype, groups: int, four_bit: bool, has_offset: bool, as_list: bool
) -> None:
    x, weight = torch.randn(7, 64).to(dtype), int4s(3, 64, 16) if four_bit else int8s(3, 64, 16)
    scale, offset = (torch.rand(3, groups, 16) / 50).to(dtype), (torch.rand(3, groups, 16) * 8).to(dtype)
    along_k = (scale.repeat_interleave(64 // groups, 1).double(), offset.repeat_interleave(64 // groups, 1).double())
    dense = (weight.double() + (along_k[1] if has_offset else 0)) * along_k[0]
    bias = torch.randn(3, 16).to(torch.float16 if dtype == torch.float16 else torch.float32)
    expected = torch.stack([x[r].double() @ dense[e] + bias[e].double() for r, e in enumerate(EXPERTS)])

    def given(t: torch.Tensor) -> list[torch.Tensor]:
        t = t if groups > 1 or t.dim() < 3 else t[:, 0]
        return [part.clone() for part in t] if as_list else [t]

    packed = pack_int4(weight) if four_bit else weight
    more = {"antiquant_offset": given(offset)} if has_offset else {}
    y = gmm(
        x, [w.clone() for w in packed] if as_list else [packed], antiquant_scale=given(scale), bias=given(bias), **more
    )
    assert snr(y[:5], expected) > FLOORS[FLOAT16 if dtype == torch.float16 else BFLOAT16] - 3
    assert y[5:].isnan().all()


# -------------------------------------------------------------------------------------------------------------- refusals

A8W8 = {
    "x": [torch.ones(4, 256, dtype=torch.int8)],
    "weight": [torch.ones(2, 256, 16, dtype=torch.int8)],
    "scale": [torch.ones(2, 16)],
    "per_token_scale": [torch.ones(4)],
    "output_dtype": FLOAT16,
}
A8W4 = {
    **A8W8,
    "weight": [torch.ones(2, 256, 2, dtype=torch.int32)],
    "scale": [torch.ones(2, 16, dtype=torch.int64)],
    "bias": [torch.zeros(2, 16)],
}
A16W4 = {
    "x": [torch.ones(4, 256).half()],
    "weight": A8W4["weight"],
    "antiquant_scale": [torch.ones(2, 16).half()],
    "antiquant_offset": [torch.ones(2, 16).half()],
}


def refused(legal: dict[str, Any], changes: dict[str, Any], code: str) -> None:
    common_arguments = {"group_type": 0, "split_item": 2, "group_list": torch.tensor([1, 2]), "group_list_type": 1}
    npu.npu_grouped_matmul(**{**common_arguments, **legal})
    with pytest.raises(ValueError, match=code):
        npu.npu_grouped_matmul(**{**common_arguments, **legal, **changes})


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"output_dtype": BFLOAT16}, "gmm.scale_dtype"),
        ({"scale": [torch.ones(2, 16).bfloat16()]}, "gmm.scale_dtype"),
        ({"scale": None}, "gmm.scale"),
        ({"scale": [torch.ones(2, 15)]}, "gmm.scale_width"),
        ({"scale": [torch.ones(3, 16)]}, "gmm.scale_groups"),
        ({"scale": [torch.ones(2, 4, 16)]}, r"scale is 2 of \(4, 16\); accepted: for each expert: 2 of \(16,\)"),
        ({"output_dtype": None}, "gmm.output_dtype"),
        ({"output_dtype": INT32}, "gmm.output_dtype"),
        ({"output_dtype": INT32, "per_token_scale": None}, "gmm.scale"),
        ({"per_token_scale": [torch.ones(4).half()]}, "gmm.per_token_dtype"),
        ({"per_token_scale": [torch.ones(3)]}, "gmm.per_token_rows"),
        ({"per_token_scale": [torch.ones(4, 1)]}, "gmm.per_token_dims"),
        ({"weight": [torch.ones(2, 16, 256, dtype=torch.int8)]}, "gmm.k_mismatch"),
        ({"weight": [torch.ones(256, 16, dtype=torch.int8)] * 2}, "gmm.quant_single_weight"),
        ({"bias": [torch.ones(2, 16)]}, "gmm.bias_dtype"),
        ({"bias": [torch.ones(2, 15, dtype=torch.int32)]}, r"bias is 2 of \(15,\)"),
        ({"offset": [torch.ones(2, 16)]}, "gmm.offset"),
        ({"antiquant_scale": [torch.ones(2, 16)]}, "gmm.antiquant_scale"),
        ({"act_type": 3}, "gmm.act_type"),
        ({"act_type": 5}, "act_type is 5; the CPU kernel computes only: 0"),
        ({"group_list": torch.tensor([[0, 1], [0, 2]]), "group_list_type": 2}, "each of the experts 0 to 1 once"),
        ({"group_list": torch.tensor([[2, 1], [0, 2]]), "group_list_type": 2}, "each of the experts 0 to 1 once"),
        ({"group_list": torch.tensor([[1, 0], [0, 2]]), "group_list_type": 2}, "those with rows first"),
        ({"group_list": torch.tensor([[1, 3], [0, 2]]), "group_list_type": 2}, "at most the 4 rows"),
        ({"scale_dtype": 293}, "scale_dtype is 293; the CPU kernel"),
    ],
)
def test_int8_refuses(changes: dict[str, Any], code: str) -> None:
    refused(A8W8, changes, code)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"bias": None}, "gmm.int4_bias"),
        ({"bias": [torch.zeros(2, 16).half()]}, "gmm.bias_dtype"),
        ({"bias": [torch.zeros(2, 2)]}, r"bias is 2 of \(2,\); accepted: for each expert: 2 of \(16,\)"),
        ({"scale": [torch.ones(2, 16)]}, "gmm.scale_dtype"),
        ({"scale": [torch.ones(2, 3, 16, dtype=torch.int64)]}, "G a divisor of 256"),
        ({"scale": [torch.ones(2, 2, dtype=torch.int64)]}, "gmm.scale_width"),
        ({"per_token_scale": None}, "gmm.per_token_scale"),
        ({"group_list": torch.tensor([1, 3]), "group_list_type": 0}, "gmm.group_list_type_int4"),
        ({"x": [torch.ones(4, 128).to(torch.int8)], "weight": [torch.ones(2, 128, 2).int()]}, "gmm.int4_k_multiple"),
        ({"output_dtype": None}, "gmm.output_dtype"),
    ],
)
def test_int4_refuses(changes: dict[str, Any], code: str) -> None:
    refused(A8W4, changes, code)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"antiquant_scale": None}, "gmm.antiquant_scale"),
        ({"antiquant_scale": [torch.ones(2, 16)]}, "gmm.antiquant_dtype"),
        ({"antiquant_scale": [torch.ones(2, 15).half()]}, "gmm.antiquant_width"),
        ({"antiquant_scale": [torch.ones(3, 16).half()]}, "antiquant_scale is 3 of"),
        ({f"antiquant_{w}": [torch.ones(2, 3, 16).half()] for w in ("scale", "offset")}, "G a divisor of 256"),
        ({"antiquant_offset": [torch.ones(2, 16)]}, "gmm.antiquant_offset_dtype"),
        ({"antiquant_offset": [torch.ones(2, 2, 16).half()]}, "gmm.antiquant_offset_dims"),
        (
            {f"antiquant_{w}": [torch.ones(2, n, 16).half()] for w, n in (("scale", 4), ("offset", 2))},
            r"antiquant_offset is \(2, 16\); accepted: as antiquant",
        ),
        ({"scale": [torch.ones(2, 16)]}, "gmm.scale_of_weights"),
        ({"per_token_scale": [torch.ones(4)]}, "gmm.per_token_scale"),
        ({"output_dtype": BFLOAT16}, "gmm.output_dtype_weights"),
        ({"bias": [torch.ones(2, 16)]}, "gmm.bias_dtype"),
        ({"x": [torch.ones(4, 256)]}, "gmm.form"),
        ({"x": [torch.ones(4, 32, dtype=torch.int32)]}, "gmm.antiquant_scale"),
    ],
)
def test_int4_weights_of_16_bit_rows_refuse(changes: dict[str, Any], code: str) -> None:
    refused(A16W4, changes, code)


def test_int4_rows_are_not_simulated() -> None:
    a4w4 = {**A8W4, "x": [torch.ones(4, 32, dtype=torch.int32)], "bias": None}
    with pytest.raises(ValueError, match=r"torch.int32 rows with torch.int32 weights; the CPU kernel computes only"):
        npu.npu_grouped_matmul(**a4w4, group_type=0, split_item=2, group_list=torch.tensor([1, 2]), group_list_type=1)


def test_a5_takes_float32_scales_for_bfloat16(on_soc: Callable[[str], None]) -> None:
    on_soc("A5")
    x, weight, scale = int8s(7, 16), int8s(3, 16, 8), torch.rand(3, 8)
    y = gmm(x, [weight], scale=[scale], per_token_scale=[torch.ones(7)], output_dtype=BFLOAT16)
    assert snr(y[:5], sums(x, weight).double() * scale[EXPERTS].double()) > FLOORS[BFLOAT16]
    with pytest.raises(ValueError, match=r"bias is torch.float32; the CPU kernel computes only: int32"):
        gmm(x, [weight], scale=[scale], bias=[torch.ones(3, 8)], output_dtype=BFLOAT16)
