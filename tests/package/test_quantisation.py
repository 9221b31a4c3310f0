"""``moe_lowering.quantisation``: one weight, and what is refused of it.

Whole modules: test_quantise_experts.py; what the operator computes from the results: test_quantised_mlp.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from int4_by_hand import floats, whole_numbers
from quantised_numbers import snr

from moe_lowering import quantisation

pytestmark = pytest.mark.xdist_group("quantisation_ranks")


ops = torch.ops.moe_lowering


# Of 64 normal values, max is about 2.4 deviations. A column in 2n + 1 levels has an error of max / n / sqrt(12):
# 45 dB for n = 127, 20 dB for n = 7; in 16 levels between its least and largest value 21 dB.
WEIGHT_DB = {"w8a8": 43.0, "w4a8": 18.0, "w4a16": 19.0}


# one weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("form", "group_size"), [("w8a8", None), ("w4a8", None), ("w4a16", None), ("w4a16", 16)])
def test_weight_and_back(form: str, dtype: torch.dtype, group_size: int | None) -> None:
    torch.manual_seed(0)
    w = (torch.randn(3, 64, 24) / 8).to(dtype)
    w[1, :, 5] = 0  # a column of zeros
    scale_dtype = torch.bfloat16 if form == "w4a16" else None
    made = quantisation.quantise_weight(w, form, scale_dtype=scale_dtype, group_size=group_size)
    assert made.weight.dtype == (torch.int8 if form == "w8a8" else torch.int32)
    assert made.weight.shape == ((3, 64, 24) if form == "w8a8" else (3, 64, 3))
    assert made.scale.shape == ((3, 4, 24) if group_size else (3, 24))
    assert made.scale.dtype == (scale_dtype or torch.float32)
    back = quantisation.dequantise(made)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back.double(), floats(made.weight, made.scale, made.offset), rtol=1e-6, atol=1e-7)
    assert snr(back, w) > WEIGHT_DB[form] and not back[1, :, 5].any()
    step = made.scale.double().amax() * (1 if form == "w4a16" else 0.5)  # bfloat16's scale may cut an end
    assert (back - w.float()).abs().max() <= 1.01 * step
    assert snr(back.roll(1, -1), w) < 0


def test_offsets_are_whole_and_the_ranges_are_used() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 16) + 0.5
    made = quantisation.quantise_weight(w, "w4a16", scale_dtype=torch.float16)
    values = whole_numbers(made.weight)
    assert made.offset is not None and torch.equal(made.offset, made.offset.round())
    assert values.min() == -8 and values.max() == 7 and made.offset.abs().max() <= 8
    assert ((values.double() + made.offset.double()) == 0).any()  # zero can be said
    even = quantisation.quantise_weight(w, "w4a8")
    assert whole_numbers(even.weight).abs().amax(0).tolist() == [7] * 16
    assert quantisation.quantise_weight(w, "w8a8").weight.abs().amax(0).tolist() == [127] * 16


def test_scale_bias_is_eight_times_the_column_sums() -> None:
    made = quantisation.quantise_weight(torch.randn(2, 32, 8), "w4a8")
    assert made.scale_bias is not None and made.scale_bias.dtype == torch.float32
    expected = 8 * floats(made.weight, made.scale).sum(-2)
    torch.testing.assert_close(made.scale_bias.double(), expected, rtol=1e-6, atol=1e-6)


def test_pack_and_bits() -> None:
    values = torch.randint(-8, 8, (2, 3, 16)).to(torch.int8)
    packed = quantisation.pack_int4(values)
    assert packed.shape == (2, 3, 2) and torch.equal(whole_numbers(packed), values.long())
    assert torch.equal(quantisation.unpack_int4(packed), values)
    assert quantisation.pack_int4(torch.tensor([1, 2, 3, 4, 5, 6, 7, -8], dtype=torch.int8)).tolist() == [-0x789ABCDF]
    assert quantisation.scale_bits(torch.tensor([1.0, -2.0])).tolist() == [0x3F800000, 0xC0000000]
    made = quantisation.quantise_weight(torch.randn(32, 8), "w8a8")
    as_bits = quantisation.QuantisedWeight("w8a8", made.weight, quantisation.scale_bits(made.scale))
    assert torch.equal(quantisation.dequantise(as_bits), quantisation.dequantise(made))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantisation.quantise_weight(torch.ones(8, 8), "int8"),
            "format is 'int8'; accepted: w8a8, w4a8, w4a16",
        ),
        (lambda: quantisation.quantise_weight(torch.ones(8, 8).double(), "w8a8"), "w is torch.float64 of shape"),
        (lambda: quantisation.quantise_weight(torch.ones(8), "w8a8"), r"of shape \[8\]; accepted: .* \[..., K, N\]"),
        (lambda: quantisation.quantise_weight(torch.ones(0, 8), "w8a8"), r"of shape \[0, 8\]"),
        (
            lambda: quantisation.quantise_weight(torch.ones(8, 12), "w4a8"),
            "12 columns for w4a8; accepted: a multiple of 8",
        ),
        (
            lambda: quantisation.quantise_weight(torch.ones(8, 8), "w4a16"),
            "scale_dtype is None and w is torch.float32 for w4a16; accepted: float16 or bfloat16",
        ),
        (
            lambda: quantisation.quantise_weight(torch.ones(8, 8), "w4a8", scale_dtype=torch.bfloat16),
            "scale_dtype is torch.bfloat16 for w4a8; accepted: float32",
        ),
        (
            lambda: quantisation.quantise_weight(torch.ones(8, 8).half(), "w4a16", group_size=3),
            "group_size is 3; accepted: a divisor of 8",
        ),
        (lambda: quantisation.quantise_weight(torch.ones(8, 8), "w8a8", group_size=4), "group_size is 4 for w8a8"),
        (lambda: quantisation.pack_int4(torch.ones(8, dtype=torch.int32)), "values is torch.int32"),
        (lambda: quantisation.pack_int4(torch.ones(9, dtype=torch.int8)), r"of shape \[9\]; accepted: int8"),
        (lambda: quantisation.pack_int4(torch.full((8,), 8, dtype=torch.int8)), "values is 8 to 8; accepted: -8 to 7"),
    ],
)
def test_weight_mistakes(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
