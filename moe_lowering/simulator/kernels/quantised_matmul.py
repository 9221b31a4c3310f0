"""One expert's product in npu_grouped_matmul with quantised weights, before the rounding to the output's dtype.

    a8w8   (x @ w + bias) * scale * per_token_scale, int32 up to the bias; without scale: int32
    a8w4   ((x @ w - 8 * sum(w)) * scale + bias) * per_token_scale
    a16wN  x @ ((w + offset) * scale) + bias, the weight rounded to the dtype of x

Meaning: torch_npu 2.13.0's documentation, aclnnGroupedMatmulV4/V5. The device splits int8 rows into two int4 halves for
int4 weights, the lower one less 8: only ``bias`` = 8 * sum over K of (w * scale) makes it right, so the missing 8 * sum(w)
is computed here too. What the device rounds in between (float16 halves) is not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe_lowering.limits.calls.matmul import PACKED, dtype_form
from moe_lowering.simulator.kernels.common import refuse, refuse_unsimulated

INT8_MAX = 127.0
EXACT = 1024  # terms of at most 2 ** 14 whose sum float32 holds exactly
COMPENSATION = 8  # what the device subtracts from the lower half of an int8
FORMS = ("none", "a8w8", "a8w4", "a16w8", "a16w4")
SCALED = {torch.float16: 5, torch.bfloat16: 15}  # numbers of torch_npu's output_dtype
INT32 = 3


def quantise_rows(rows: torch.Tensor, share: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 rows [..., n] -> int8 rows and their scales max|row| / 127 [...]; rounds half to even.

    With ``share`` [...] the scales are share * max|row| / 127, and what is beyond share * max|row| is clipped.
    A row of zeros stays zero, with scale 0. A row with NaN or infinity is undefined: its scale is NaN, its values the
    smallest int8.
    """
    most = rows.abs().amax(-1)
    scale = (most if share is None else most * share) / INT8_MAX
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).unsqueeze(-1)
    values = torch.round(rows / divisor).clamp(-INT8_MAX, INT8_MAX)
    return torch.where(scale.isnan().unsqueeze(-1), -128.0, values).to(torch.int8), scale


def int_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [m, K] @ int8 [K, n] -> int32 [m, n], exact: by float32 matmuls that are short enough to be exact."""
    total = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.int32)
    for k in range(0, x.shape[1], EXACT):
        total += (x[:, k : k + EXACT].float() @ weight[k : k + EXACT].float()).to(torch.int32)
    return total


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int32 [..., n / 8] -> int8 [..., n] in [-8, 7]; the lowest four bits come first."""
    words = packed.contiguous().unsqueeze(-1)  # a last stride of 1, which a size of 1 need not have
    pairs = words.view(torch.int8)  # a host's bytes, the lowest first; shifts of int8 keep the sign
    return torch.stack((pairs << 4 >> 4, pairs >> 4), -1).flatten(-3)


def scale_of_bits(scale: torch.Tensor) -> torch.Tensor:
    """int64 or uint64 [..., n] that hold float32 bits in their lower halves -> float32 [..., n]."""
    return scale.contiguous().view(torch.int32)[..., ::2].contiguous().view(torch.float32)


@dataclasses.dataclass(frozen=True)
class MatmulOperands:
    """The tensors of one call, by expert; None for what is not given. ``weight`` holds int8, unpacked, or floats."""

    form: str
    weight: list[torch.Tensor]  # [K, N]
    bias: list[torch.Tensor] | None  # [N]
    scale: list[torch.Tensor] | None  # float32 [N], or [G, N]
    antiquant_scale: list[torch.Tensor] | None  # [N], or [G, N]
    antiquant_offset: list[torch.Tensor] | None
    per_token_scale: torch.Tensor | None  # [M]

    @property
    def width(self) -> int:
        """N."""
        return self.weight[0].shape[1] * (PACKED if self.weight[0].dtype == torch.int32 else 1)


def operands(operator: str, a: dict[str, Any]) -> MatmulOperands:
    """The operands from the arguments of npu_grouped_matmul, after shapes are found to fit.

    Raises:
        ValueError: a shape that does not fit the weights; a form that is not computed here.
    """
    x, weight = a["x"][0], a["weight"]
    scales = ("scale", "antiquant_scale", "antiquant_offset", "per_token_scale")
    kind = dtype_form(x, weight[0], any(a[name] for name in (*scales, "offset")))
    if kind not in FORMS:
        refuse_unsimulated(operator, "quantisation", f"{x.dtype} rows with {weight[0].dtype} weights", ", ".join(FORMS))
    stacked = weight[0].dim() == 3
    weights = list(weight[0]) if stacked else list(weight)
    inner, width = x.shape[1], weights[0].shape[1] * (PACKED if weights[0].dtype == torch.int32 else 1)

    def by_expert(name: str, groups: bool) -> list[torch.Tensor] | None:
        tensors = a[name]
        if not tensors:
            return None
        parts = list(tensors[0]) if stacked and tensors[0].dim() > 1 else list(tensors)
        accepted = f"{len(weights)} of ({width},)" + (f" or (G, {width}), G a divisor of {inner}" if groups else "")
        shapes = [tuple(p.shape) for p in parts]
        fits = all(s == (width,) or (groups and _in_groups(s, inner, width)) for s in shapes)
        if len(parts) != len(weights) or not fits or len(set(shapes)) > 1:
            refuse(operator, name, f"{len(parts)} of {shapes[0] if shapes else ()}", f"for each expert: {accepted}")
        return parts

    antiquant = kind.startswith("a16")
    result = MatmulOperands(
        form=kind,
        weight=weights,
        bias=by_expert("bias", False),
        scale=by_expert("scale", kind == "a8w4"),
        antiquant_scale=by_expert("antiquant_scale", antiquant),
        antiquant_offset=by_expert("antiquant_offset", antiquant),
        per_token_scale=a["per_token_scale"][0] if a["per_token_scale"] else None,
    )
    _check_pair(operator, result)
    return result


def _in_groups(shape: tuple[int, ...], inner: int, width: int) -> bool:
    return len(shape) == 2 and shape[1] == width and shape[0] > 0 and inner % shape[0] == 0


def _check_pair(operator: str, o: MatmulOperands) -> None:
    scale, offset = o.antiquant_scale, o.antiquant_offset
    if offset and scale and offset[0].shape != scale[0].shape:
        refuse(operator, "antiquant_offset", tuple(offset[0].shape), f"as antiquant_scale, {tuple(scale[0].shape)}")


def output_dtype(
    operator: str, o: MatmulOperands, x: torch.Tensor, number: int | None, act_type: int | None
) -> torch.dtype:
    """The dtype of y, after what is not computed here is refused."""
    if act_type:
        refuse_unsimulated(operator, "act_type", act_type, "0 (no activation)")
    if o.form == "a8w8" and number == INT32:
        return torch.int32
    if not o.form.startswith("a8"):
        if number not in (None, _number(x.dtype)):
            refuse_unsimulated(operator, "output_dtype", number, f"None, {_number(x.dtype)} (as x)")
        return x.dtype
    dtypes = [dtype for dtype, value in SCALED.items() if value == number]
    if not dtypes:
        refuse_unsimulated(operator, "output_dtype", number, "5, 15 (float16, bfloat16), 3 (int32) for int8 weights")
    return dtypes[0]


def _number(dtype: torch.dtype) -> int:
    return {torch.float32: 6, **SCALED}.get(dtype, -1)


def product(operator: str, o: MatmulOperands, x: torch.Tensor, expert: int, begin: int, end: int) -> torch.Tensor:
    """Rows ``begin`` to ``end`` of x times the weight of one expert: int32 or float32 [end - begin, N]."""
    rows = x[begin:end]
    bias = None if o.bias is None else o.bias[expert]
    if o.form == "a8w8":
        return _a8w8(operator, o, rows, expert, begin, bias)
    if o.form == "a8w4":
        return _a8w4(o, rows, expert, begin, bias)
    weight = o.weight[expert]
    if o.form != "none":
        weight = _dequantise_weight(o, expert, rows.dtype)
    result = rows.float() @ weight.float()
    return result if bias is None else result + bias.float()


def _a8w8(
    operator: str, o: MatmulOperands, rows: torch.Tensor, expert: int, begin: int, bias: torch.Tensor | None
) -> torch.Tensor:
    total = int_product(rows, o.weight[expert])
    if bias is not None:
        if bias.dtype != torch.int32:
            refuse_unsimulated(operator, "bias", bias.dtype, "int32 with int8 weights")
        total += bias
    if o.scale is None:
        return total
    scaled = total.float() * o.scale[expert].float()
    if o.per_token_scale is None:
        return scaled
    return scaled * o.per_token_scale[begin : begin + len(rows)].unsqueeze(1)


def _a8w4(o: MatmulOperands, rows: torch.Tensor, expert: int, begin: int, bias: torch.Tensor | None) -> torch.Tensor:
    assert o.scale is not None and o.per_token_scale is not None and bias is not None  # the limit tables want them
    weight = unpack_int4(o.weight[expert])
    scale = scale_of_bits(o.scale[expert])
    scale = scale if scale.dim() == 2 else scale.unsqueeze(0)
    size = weight.shape[0] // scale.shape[0]
    total = bias.float().expand(len(rows), -1).clone()
    for group, factor in enumerate(scale):
        part = slice(group * size, (group + 1) * size)
        short = int_product(rows[:, part], weight[part]) - COMPENSATION * weight[part].sum(0, dtype=torch.int32)
        total += short.float() * factor
    return total * o.per_token_scale[begin : begin + len(rows)].unsqueeze(1)


def _dequantise_weight(o: MatmulOperands, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [K, N] of one expert in 16 bits: (w + offset) * scale, rounded once."""
    assert o.antiquant_scale is not None  # the limit tables want it
    weight = o.weight[expert]
    values = (unpack_int4(weight) if weight.dtype == torch.int32 else weight).float()
    if o.antiquant_offset is not None:
        values = values + _along_k(o.antiquant_offset[expert], len(values))
    return (values * _along_k(o.antiquant_scale[expert], len(values))).to(dtype)


def _along_k(factor: torch.Tensor, inner: int) -> torch.Tensor:
    """[N] or [G, N] -> float32 [1, N] or [K, N]."""
    return (
        factor.float().unsqueeze(0) if factor.dim() == 1 else factor.float().repeat_interleave(inner // len(factor), 0)
    )
