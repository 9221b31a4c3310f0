"""``grouped_mlp`` with quantised weights: against an integer model of its arithmetic, and float64 on dequantised weights.

Both are written from the text in docs/architecture.md; neither shares code with the package, int4 packing included.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from quantised_numbers import pack_int4, scale_bits, snr
from torch import Tensor

from moe_lowering.custom_ops.quantised import quantise_rows, quantised_matmul, unpack_int4
from moe_lowering.quantisation import FORMATS

ops = torch.ops.moe_lowering
HIDDEN, INNER, EXPERTS = 64, 32, 4
# Rows rounded to int8 with s = max|x| / 127 have an error of s / sqrt(12). Of 64 normal values max is about 2.5
# deviations: 44 dB, so 41 dB for a product of two such values, gate and up. Activated values have a longer tail, max about
# 5 times their root mean square: 39 dB. Both together: 37 dB. Measured 36.8 to 38.5.
INT8_ROWS_DB = 34.0
COUNTS = [5, 0, 1, 3]


def weights(form: str, seed: int = 0) -> dict[str, Tensor]:
    """Whole numbers as int64 and scales in float32, that bfloat16 can hold: w13, w2, w13_scale, w2_scale."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-127, 128) if form == "w8a8" else (-8, 8)

    def scale(*shape: int, inner: int) -> Tensor:
        return ((torch.rand(shape, generator=generator) + 0.5) / (high / 2 * inner**0.5)).bfloat16().float()

    return {
        "w13": torch.randint(low, high, (EXPERTS, HIDDEN, 2 * INNER), generator=generator),
        "w2": torch.randint(low, high, (EXPERTS, INNER, HIDDEN), generator=generator),
        "w13_scale": scale(EXPERTS, 2 * INNER, inner=HIDDEN),
        "w2_scale": scale(EXPERTS, HIDDEN, inner=INNER),
    }


def mlp(
    rows: Tensor, counts: list[int], form: str, given: dict[str, Tensor], lists: bool = False, **changes: Any
) -> Any:
    """The operator; ``given`` holds whole numbers for w13 and w2."""
    store = (lambda w: w.to(torch.int8)) if form == "w8a8" else pack_int4
    stored = {name: store(value) if name in ("w13", "w2") else value for name, value in given.items()}
    arguments: dict[str, Any] = {
        "rows": rows, "row_scale": torch.empty(0), "counts": torch.tensor(counts), "w13_bias": [], "w2_bias": [],
        "activation": "swiglu", "limit": 0.0, "alpha": 1.702, "interleaved": False, "quantisation": form,
        **{name: list(value) if lists else [value] for name, value in stored.items()},
    }  # fmt: skip
    return ops.grouped_mlp(**(arguments | changes))


def by_row(counts: list[int]) -> list[int]:
    return [expert for expert, count in enumerate(counts) for _ in range(count)]


# an integer model: every sum in whole numbers, every other step one float32 operation


def int8_model(row: Tensor) -> tuple[list[int], Tensor]:
    row = row.float()
    scale = row.abs().max() / 127
    scale = scale if scale > 0 else torch.tensor(1.0)
    return [max(-127, min(127, round(float(value)))) for value in row / scale], scale  # round: half to even


def sums_model(q: list[int], matrix: Tensor) -> Tensor:
    return torch.tensor([sum(a * b for a, b in zip(q, column, strict=True)) for column in matrix.t().tolist()])


def half_gate(hidden: Tensor) -> Tensor:
    """swiglu_oai with alpha 0, where sigmoid is 1/2: exact but for one rounding in each operation."""
    return 0.5 * hidden[:INNER] * (hidden[INNER:] + 1)


def model(q: list[int], s: Tensor, given: dict[str, Tensor], expert: int) -> Tensor:
    first = sums_model(q, given["w13"][expert]).float() * given["w13_scale"][expert] * s
    again, scale = int8_model(half_gate(first))
    return sums_model(again, given["w2"][expert]).float() * given["w2_scale"][expert] * scale


HALF_GATE = {"activation": "swiglu_oai", "limit": 1e9, "alpha": 0.0}


def test_smooth_scales_are_those_of_each_expert() -> None:
    """Of tokens in ``dispatch``, of activations in ``grouped_mlp``: multiplied in float32 before they become int8."""
    given, generator = weights("w8a8"), torch.Generator().manual_seed(3)
    x = torch.randn(5, HIDDEN, generator=generator).bfloat16()
    ids = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 3], [2, 0]], dtype=torch.int32)
    x_smooth, h_smooth = (torch.rand(EXPERTS, width, generator=generator) + 0.5 for width in (HIDDEN, INNER))
    place = {"num_experts": EXPERTS, "ep_group": "", "ep_size": 1, "tp_group": "", "tp_size": 1}
    sent = {**place, "mask": None, "max_tokens": 0, "max_rows": 0}
    rows, scale, counts, handle = ops.dispatch(x=x, x_scale=None, ids=ids, x_smooth=x_smooth, **sent)
    out = mlp(
        rows, counts.tolist(), "w8a8", given, row_scale=scale, out_dtype=torch.float32, h_smooth=h_smooth, **HALF_GATE
    )
    for row, (_, token, choice) in enumerate(handle.tolist()):
        expert = int(ids[token, choice])
        q, s = int8_model(x[token].float() * x_smooth[expert])
        assert rows[row].tolist() == q and scale[row] == s
        first = sums_model(q, given["w13"][expert]).float() * given["w13_scale"][expert] * s
        again, between = int8_model(half_gate(first) * h_smooth[expert])
        expected = sums_model(again, given["w2"][expert]).float() * given["w2_scale"][expert] * between
        assert torch.equal(out[row], expected)


def test_a_clip_is_its_expert_s_share_of_a_row_s_largest_activation() -> None:
    """Where it is beyond 1 nothing is clipped, and steps are as much larger."""
    given, generator = weights("w8a8"), torch.Generator().manual_seed(4)
    rows, clip = torch.randn(9, HIDDEN, generator=generator), torch.linspace(0.2, 1.4, EXPERTS)
    clip[by_row(COUNTS)[-1]], rows[2] = 0.0, 0.0  # nothing is left of the last rows
    out = mlp(rows, COUNTS, "w8a8", given, h_clip=clip, **HALF_GATE)
    clipped = 0
    for row, expert in enumerate(by_row(COUNTS)):
        q, s = int8_model(rows[row])
        first = half_gate(sums_model(q, given["w13"][expert]).float() * given["w13_scale"][expert] * s)
        step = first.abs().max() * clip[expert] / 127
        steps = [] if step == 0 else [round(float(value / step)) for value in first]
        clipped += sum(abs(n) > 127 for n in steps)
        again = [max(-127, min(127, n)) for n in steps] or [0] * INNER
        expected = sums_model(again, given["w2"][expert]).float() * given["w2_scale"][expert] * step
        torch.testing.assert_close(out[row], expected, rtol=1e-6, atol=0)
    assert clipped > 5


@pytest.mark.parametrize("lists", [False, True], ids=["stacked", "lists"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_equals_the_integer_model(form: str, dtype: torch.dtype, lists: bool) -> None:
    torch.manual_seed(1)
    given, out_dtype = weights(form), torch.float32
    rows, changes = torch.randn(11, HIDDEN), dict(HALF_GATE)
    rows[2] = 0  # a row of zeros among others
    if dtype == torch.int8:
        rows, scale = torch.randint(-128, 128, (11, HIDDEN), dtype=torch.int8), torch.rand(11) / 40
        changes |= {"row_scale": scale, "out_dtype": out_dtype}
    else:
        rows, out_dtype = rows.to(dtype), dtype
    out = mlp(rows, COUNTS, form, given, lists, **changes)
    assert out.dtype == out_dtype and out.shape == (11, HIDDEN) and not out[9:].any()
    for row, expert in enumerate(by_row(COUNTS)):
        q, s = (rows[row].tolist(), scale[row]) if dtype == torch.int8 else int8_model(rows[row])
        assert torch.equal(out[row], model(q, s, given, expert).to(out_dtype)), row
    assert not out[2].any() or dtype == torch.int8


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_the_model_differs_from_near_misses(form: str) -> None:
    """What the test above would not let pass."""
    torch.manual_seed(1)
    given, row = weights(form), torch.randn(HIDDEN)
    exact = model(*int8_model(row), given, 0)
    halves = torch.cat([given["w13"][0][:, INNER:], given["w13"][0][:, :INNER]], 1)
    misses = [
        model(*int8_model(row), given, 1),
        model(*int8_model(row), given | {"w13": halves.unsqueeze(0)}, 0),
        model(int8_model(row)[0], int8_model(row)[1] * 127 / 128, given, 0),
        model(*int8_model(row), given | {"w2_scale": given["w13_scale"]}, 0),
    ]
    for at, miss in enumerate(misses):
        assert not torch.equal(exact, miss), at


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_scales_as_bits_and_in_bfloat16_mean_the_same(form: str) -> None:
    given = weights(form)
    rows = torch.randn(9, HIDDEN)
    expected = mlp(rows, COUNTS, form, given)
    names = ("w13_scale", "w2_scale")
    assert torch.equal(mlp(rows, COUNTS, form, given | {name: scale_bits(given[name]) for name in names}), expected)
    if form == "w8a8":
        half = {name: given[name].bfloat16() for name in names}
        assert torch.equal(mlp(rows, COUNTS, form, given | half), expected)
        # One of each form
        assert torch.equal(mlp(rows, COUNTS, form, given, w2_scale=list(half["w2_scale"])), expected)
    high = {name: scale_bits(given[name]) | (7 << 32) for name in names}  # the high half counts for nothing
    assert torch.equal(mlp(rows, COUNTS, form, given | high), expected)


def test_sums_are_exact_where_float32_is_not() -> None:
    q = torch.randint(100, 128, (1, 2**14), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weight = torch.full((2**14, 8), 127, dtype=torch.int8)
    weight[2**13 :] = -127  # half of the sum is about 2**27, where float32 steps by 8
    out = quantised_matmul(q, torch.ones(1), [1], [weight.unsqueeze(0)], [torch.ones(1, 8)])
    assert out.tolist() == [[float(127 * (sum(q[0].tolist()[: 2**13]) - sum(q[0].tolist()[2**13 :])))] * 8]
    assert not torch.equal(q.float() @ weight.float(), out)
    biggest = torch.full((2**15, 8), -128, dtype=torch.int8)
    out = quantised_matmul(
        torch.full((1, 2**15), -127, dtype=torch.int8), torch.ones(1), [1], [biggest], [torch.ones(8)]
    )
    assert out.tolist() == [[float(127 * 2**22)] * 8]


def test_quantise_rows_by_hand() -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5], [0, 0, 0, 0, 0], [-254, 1, 3, 126, 0], [1, torch.nan, 0, 0, 0]])
    q, scale = quantise_rows(rows)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    assert q[:3].tolist() == [[127, 0, 2, 2, 0], [0, 0, 0, 0, 0], [-127, 0, 2, 63, 0]]
    assert scale[:3].tolist() == [1.0, 1.0, 2.0]
    assert scale[3].isnan() and not q[3].any()  # the whole row is NaN again after the matmul
    assert quantise_rows(rows.reshape(2, 2, 5))[1].shape == (2, 2)
    assert quantise_rows(torch.ones(0, 5))[0].shape == (0, 5) and quantise_rows(torch.ones(2, 0))[1].tolist() == [1, 1]


def test_a_nan_stays_visible() -> None:
    rows = torch.randn(9, HIDDEN)
    rows[1, 3], rows[2, 0] = torch.nan, torch.inf
    out = mlp(rows, COUNTS, "w8a8", weights("w8a8"))
    assert out[1].isnan().all() and out[2].isnan().all() and out[[0, 3, 4, 5, 6, 7, 8]].isfinite().all()


def test_unpack_int4() -> None:
    values = torch.randint(-8, 8, (3, 5, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_int4(pack_int4(values)).long(), values)
    assert unpack_int4(torch.tensor([0x76543210, -1], dtype=torch.int32)).tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        *[-1] * 8,
    ]
    with pytest.raises(TypeError, match=r"unpack_int4: packed is torch.int64 of shape .*; accepted: an int32"):
        unpack_int4(torch.tensor([0x76543210]))


# float64 on dequantised weights


def dense(rows: Tensor, counts: list[int], first: Tensor, second: Tensor, **gate: Any) -> Tensor:
    pairs = zip(rows, by_row(counts), strict=False)
    return torch.stack([reference.expert(row, first[expert], second[expert], **gate) for row, expert in pairs])


@pytest.mark.parametrize(
    "gate",
    [{}, {"activation": "swiglu_oai", "limit": 2.0, "interleaved": True}, {"activation": "gelu"}],
    ids=["swiglu", "oai", "gelu"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_int8_rows_against_dense(form: str, dtype: torch.dtype, gate: dict[str, Any]) -> None:
    torch.manual_seed(2)
    given, counts = weights(form), [40, 0, 1, 25]
    rows = torch.randn(66, HIDDEN).to(dtype)
    first, second = (given[name].double() * given[f"{name}_scale"].unsqueeze(1) for name in ("w13", "w2"))
    expected = dense(rows, counts, first, second, **gate)
    assert snr(mlp(rows, counts, form, given, **gate), expected) > INT8_ROWS_DB
    wrong = given | {"w13_scale": given["w13_scale"].roll(1, 1)}
    assert snr(mlp(rows, counts, form, wrong, **gate), expected) < 15
    wrong = given | {"w2": given["w2"].unflatten(2, (-1, 8)).flip(-1).flatten(2)}  # highest bits first
    assert snr(mlp(rows, counts, form, wrong, **gate), expected) < 5


@pytest.mark.parametrize("lists", [False, True], ids=["stacked", "lists"])
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize("groups", [0, 1, 4], ids=["channel", "one_group", "groups"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_w4a16_against_dense(dtype: torch.dtype, groups: int, offsets: bool, lists: bool) -> None:
    """Only 16-bit roundings are between the two, as without quantisation."""
    torch.manual_seed(3)
    rows, given = torch.randn(11, HIDDEN).to(dtype), weights("w4a16")
    lines = {"w13": HIDDEN, "w2": INNER}
    for name in lines:
        shape = list(given[f"{name}_scale"].shape)
        shape[1:1] = [groups] if groups else []
        given[f"{name}_scale"] = ((torch.rand(shape) + 0.5) / (4 * lines[name] ** 0.5)).to(dtype)
        if offsets:
            given[f"{name}_offset"] = (torch.rand(shape) * 8 - 4).to(dtype)

    def dequantised(name: str) -> Tensor:
        def by_line(values: Tensor) -> Tensor:
            if not groups:
                return values.double().unsqueeze(1)
            return values.double()[:, torch.arange(lines[name]) // (lines[name] // groups)]

        offset = by_line(given[f"{name}_offset"]) if offsets else 0
        return (given[name].double() + offset) * by_line(given[f"{name}_scale"])

    out = mlp(rows, COUNTS, "w4a16", given, lists)
    assert not out[9:].any()
    expected = dense(rows, COUNTS, dequantised("w13"), dequantised("w2"))
    reference.assert_near(out[:9], expected, dtype)
    wrong = given | {"w13_scale": given["w13_scale"].roll(3, -1)}
    assert reference.relative_error(mlp(rows, COUNTS, "w4a16", wrong, lists)[:9], expected) > 0.1


def test_one_expert_with_a_list_of_groups() -> None:
    """[G, N] of one expert is not taken for [E, N]."""
    torch.manual_seed(4)
    rows, given = torch.randn(3, HIDDEN).bfloat16(), weights("w4a16")
    scale = ((torch.rand(4, 2 * INNER) + 0.5) / 32).bfloat16()
    given = {name: value[:1] for name, value in given.items()} | {"w2_scale": given["w2_scale"][:1].bfloat16()}
    as_list = mlp(rows, [3], "w4a16", given, w13_scale=[scale])
    assert torch.equal(as_list, mlp(rows, [3], "w4a16", given, w13_scale=[scale.unsqueeze(0)]))
    first = given["w13"][0].double() * scale.double().repeat_interleave(HIDDEN // 4, 0)
    second = given["w2"][0].double() * given["w2_scale"].double()
    reference.assert_near(as_list, dense(rows, [3], first.unsqueeze(0), second.unsqueeze(0)), torch.bfloat16)


# edges


@pytest.mark.parametrize("form", FORMATS)
def test_no_rows_and_no_counts(form: str) -> None:
    given = weights(form)
    if form == "w4a16":
        given |= {name: given[name].bfloat16() for name in ("w13_scale", "w2_scale")}
    for rows in (0, 3):
        out = mlp(torch.randn(rows, HIDDEN).bfloat16(), [0] * EXPERTS, form, given)
        assert out.shape == (rows, HIDDEN) and out.dtype == torch.bfloat16 and not out.any()
    one = mlp(torch.ones(4, HIDDEN).bfloat16(), [0, 0, 4, 0], form, given)  # all rows to one expert
    assert one.any() and all(torch.equal(row, one[0]) for row in one)
    with pytest.raises(ValueError, match=r"counts is .* 5 in all; accepted: 0 or more each, at most R = 4"):
        mlp(torch.ones(4, HIDDEN).bfloat16(), [1, 0, 4, 0], form, given)


def test_scale_biases_change_nothing() -> None:
    given, rows = weights("w4a8"), torch.randn(9, HIDDEN)
    biases = {"w13_scale_bias": torch.randn(EXPERTS, 2 * INNER), "w2_scale_bias": torch.randn(EXPERTS, HIDDEN)}
    expected = mlp(rows, COUNTS, "w4a8", given)
    assert torch.equal(mlp(rows, COUNTS, "w4a8", given | biases), expected)
    assert torch.equal(mlp(rows, COUNTS, "w4a8", given | biases, lists=True), expected)


def test_transposed_and_unaligned_weights() -> None:
    given, rows = weights("w8a8"), torch.randn(9, HIDDEN)
    view = {n: [given[n].to(torch.int8).transpose(1, 2).contiguous().transpose(1, 2)] for n in ("w13", "w2")}
    assert torch.equal(mlp(rows, COUNTS, "w8a8", given, **view), mlp(rows, COUNTS, "w8a8", given))
