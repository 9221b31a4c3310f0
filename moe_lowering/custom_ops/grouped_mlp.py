"""``grouped_mlp``: each expert's gated MLP on the rows that arrived for it.

Meaning: grouped matmul, gated activation, grouped matmul. Each of the three stages accumulates in float32 and rounds
once to the dtype of rows; a bias is added before that rounding.

Quantised weights (int4 is packed by eight into int32 along the last axis, lowest bits first):

- ``w8a8``, ``w4a8``: before each matmul the rows become int8, with a scale each, unless they arrive so. Sums are int32;
  y = sum * weight scale * row scale. All between the first sum and the result is float32; the result is rounded once.
- ``w4a16``: weight = (int4 + offset) * scale, in float32; the three stages round as without quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Generic

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import NamedTuple

from moe_lowering.custom_ops.expert_matmul import grouped_matmul
from moe_lowering.custom_ops.library import Value, check_once, register, schema_of
from moe_lowering.custom_ops.quantised import (
    WEIGHT_DTYPES,
    antiquant_matmul,
    are_scales_grouped,
    quantise_clipped_rows,
    quantise_rows,
    quantised_matmul,
)
from moe_lowering.custom_ops.row_factors import check_factors
from moe_lowering.custom_ops.sizes import are_certainly_different, is_known, show
from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
QUANTISERS = {  # and the formats that have them
    "scale": tuple(format.name for format in EXPERT_FORMATS.values() if format.quantised),
    "offset": tuple(format.name for format in EXPERT_FORMATS.values() if format.has_offset),
    "scale_bias": tuple(format.name for format in EXPERT_FORMATS.values() if format.has_scale_bias),
}
_QUANTISER_LISTS = {f"{name}_{what}": formats for name, (what, formats) in product(("w13", "w2"), QUANTISERS.items())}
# The formats that _cpu computes; a format that only the vocabulary has is refused
_COMPUTED = frozenset({"none", "w8a8", "w4a8", "w4a16"})
# Elements of a 16-bit activation that are worked on at a time, so that their float32 copies stay in cache
CHUNK = 2**17


class GroupedMlpCall(NamedTuple, Generic[Value]):
    """The arguments of ``grouped_mlp``.

    rows [R, H], of which the first sum(counts) are meant, their scales [R] float32 when they are int8, else [0]; counts
    [E_local] int64. Each list holds one tensor of all experts or one for each: w13 [H, 2I] (without a gate [H, I]) and w2
    [I, H], an eighth as wide in int32 for int4, biases, scales, offsets and scale biases without their first axis; none is []
    or None.
    ``out_dtype`` is that of the result of int8 rows. ``h_smooth`` [E_local, I] float32 multiplies the activation, in float32,
    before that becomes int8. ``h_clip`` [E_local] float32 clips it: max|row| times that of the row's expert becomes 127, and
    what is beyond is as far. The others: see ``docs/architecture.md``.
    """

    rows: Value
    row_scale: Value
    counts: Value
    w13: Sequence[Value]
    w2: Sequence[Value]
    w13_bias: Sequence[Value]
    w2_bias: Sequence[Value]
    activation: str
    limit: float
    alpha: float
    interleaved: bool
    quantisation: str = "none"
    w13_scale: Sequence[Value] | None = None
    w2_scale: Sequence[Value] | None = None
    w13_offset: Sequence[Value] | None = None
    w2_offset: Sequence[Value] | None = None
    w13_scale_bias: Sequence[Value] | None = None
    w2_scale_bias: Sequence[Value] | None = None
    out_dtype: torch.dtype | None = None
    h_smooth: Value | None = None
    h_clip: Value | None = None


NAME = "grouped_mlp"
SCHEMA = schema_of(NAME, GroupedMlpCall, "Tensor")


def check_per_expert(
    operator: str,
    name: str,
    tensors: Sequence[Tensor],
    experts: int,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> None:
    """``tensors`` is one tensor [experts, *shape], or ``experts`` tensors of ``shape``. One is called by the argument's name
    alone: its caller most likely gave it so, and not a list of it."""
    stacked = len(tensors) == 1 and tensors[0].dim() == len(shape) + 1
    if not stacked and len(tensors) != experts:
        what = f"has shape {show(tensors[0].shape)}" if len(tensors) == 1 else f"has {len(tensors)} tensors"
        raise ValueError(
            f"{operator}: {name} {what}; accepted: one tensor {show((experts, *shape))}, or {experts} of {show(shape)}"
        )
    expected = (experts, *shape) if stacked else tuple(shape)
    for at, tensor in enumerate(tensors):
        which = name if len(tensors) == 1 else f"{name}[{at}]"
        if are_certainly_different(tensor.shape, expected):
            raise ValueError(f"{operator}: {which} has shape {show(tensor.shape)}; accepted: {show(expected)}")
        if tensor.dtype not in dtypes:
            accepted = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
            raise TypeError(f"{operator}: {which} is {tensor.dtype}; accepted: {accepted}")


def _check(call: GroupedMlpCall[Tensor]) -> None:
    form, rows, counts, w13, w2 = call.quantisation, call.rows, call.counts, call.w13, call.w2
    _check_rows(call)
    _check_activation(call)
    if counts.dim() != 1 or counts.dtype != torch.int64:
        raise ValueError(
            f"grouped_mlp: counts is {counts.dtype} of shape {show(counts.shape)}; accepted: int64 [E_local]"
        )
    for name, weights in (("w13", w13), ("w2", w2)):
        if not weights or weights[0].dim() < 2:
            raise ValueError(f"grouped_mlp: {name} holds no matrix; accepted: one tensor [E, K, N] or E tensors [K, N]")
    packed, dtypes = EXPERT_FORMATS[form].packed, (WEIGHT_DTYPES.get(form, rows.dtype),)
    experts, hidden, width = counts.shape[0], rows.shape[1], w13[0].shape[-1] * packed
    parts = ACTIVATIONS[call.activation].parts
    if is_known(width % parts != 0):
        raise ValueError(f"grouped_mlp: w13 has {width} columns; accepted: an even number, gate and up")
    if is_known(hidden % packed != 0):
        raise ValueError(f"grouped_mlp: rows has hidden size {hidden} for {form}; accepted: a multiple of {packed}")
    check_per_expert(NAME, "w13", w13, experts, (hidden, width // packed), dtypes)
    check_per_expert(NAME, "w2", w2, experts, (width // parts, hidden // packed), dtypes)
    for name, biases, columns in (("w13_bias", call.w13_bias, width), ("w2_bias", call.w2_bias, hidden)):
        if biases and EXPERT_FORMATS[form].quantised:
            raise ValueError(f"grouped_mlp: {name} is given for quantisation {form!r}; accepted: none")
        if biases:
            check_per_expert(NAME, name, biases, experts, (columns,), (rows.dtype, torch.float32))
    _check_quantisers(call, experts, hidden, width)
    _check_smooth_and_clip(call, experts, width // parts)


def _check_rows(call: GroupedMlpCall[Tensor]) -> None:
    rows, row_scale, form, out_dtype = call.rows, call.row_scale, call.quantisation, call.out_dtype
    if form not in EXPERT_FORMATS:
        raise ValueError(f"grouped_mlp: quantisation is {form!r}; accepted: {', '.join(EXPERT_FORMATS)}")
    if rows.dim() != 2:
        raise ValueError(f"grouped_mlp: rows has shape {show(rows.shape)}; accepted: [R, hidden]")
    format = EXPERT_FORMATS[form]
    accepted = HALVES if format.weight_only else (*FLOATS, torch.int8) if format.int8_rows else FLOATS
    if rows.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise TypeError(f"grouped_mlp: rows is {rows.dtype} for quantisation {form!r}; accepted: {names}")
    if rows.dtype != torch.int8:
        if row_scale.dim() != 1 or is_known(row_scale.shape[0] != 0):
            raise ValueError(
                f"grouped_mlp: row_scale has shape {show(row_scale.shape)} for rows of {rows.dtype}; accepted: [0], "
                "since only int8 rows have scales"
            )
        if out_dtype not in (None, rows.dtype):
            raise TypeError(f"grouped_mlp: out_dtype is {out_dtype}; accepted: None or that of rows, {rows.dtype}")
        return
    if row_scale.dtype != torch.float32 or are_certainly_different(row_scale.shape, rows.shape[:1]):
        raise TypeError(
            f"grouped_mlp: row_scale is {row_scale.dtype} of shape {show(row_scale.shape)}; accepted: float32 "
            f"{show(rows.shape[:1])}, one for each row of int8"
        )
    if out_dtype not in FLOATS:
        raise TypeError(f"grouped_mlp: out_dtype is {out_dtype} for int8 rows; accepted: float32, float16, bfloat16")


def _check_quantisers(call: GroupedMlpCall[Tensor], experts: int, hidden: int, first: int) -> None:
    """Scales, offsets and scale biases: there when the format has them, and of which shapes and dtypes."""
    form, dtype = call.quantisation, call.rows.dtype
    for name, formats in _QUANTISER_LISTS.items():
        if form not in formats and getattr(call, name):
            raise ValueError(
                f"grouped_mlp: {name} is given for quantisation {form!r}; accepted: none, since only "
                f"{', '.join(formats)} has it"
            )
    if form == "none":
        return
    scale_dtypes = tuple(getattr(torch, name) for name in EXPERT_FORMATS[form].scale_dtypes) or (dtype,)
    middle = first // ACTIVATIONS[call.activation].parts
    for name, inner, width in (("w13", hidden, first), ("w2", middle, hidden)):
        scale, offset, bias = (getattr(call, f"{name}_{what}") or () for what in QUANTISERS)
        if not scale:
            raise ValueError(f"grouped_mlp: {name}_scale is None for {form}; accepted: {show((experts, width))}")
        shape: tuple[int, ...] = (width,)
        if EXPERT_FORMATS[form].weight_only and are_scales_grouped(scale, experts):
            shape = (_groups(f"{name}_scale", scale[0].shape[-2], inner), width)
        check_per_expert(NAME, f"{name}_scale", scale, experts, shape, scale_dtypes)
        if offset:
            check_per_expert(NAME, f"{name}_offset", offset, experts, shape, (dtype,))
        if bias:
            check_per_expert(NAME, f"{name}_scale_bias", bias, experts, (width,), (torch.float32,))


def _check_smooth_and_clip(call: GroupedMlpCall[Tensor], experts: int, middle: int) -> None:
    for name, factors, shape, words in (
        ("h_smooth", call.h_smooth, (experts, middle), "[E_local, I]"), ("h_clip", call.h_clip, (experts,), "[E_local]"),
    ):  # fmt: skip
        if factors is None:
            continue
        if not EXPERT_FORMATS[call.quantisation].int8_rows:
            accepted = ", ".join(form.name for form in EXPERT_FORMATS.values() if form.int8_rows)
            raise ValueError(
                f"grouped_mlp: {name} is given for quantisation {call.quantisation!r}; accepted: none, since only {accepted} "
                "quantise activations"
            )
        check_factors(NAME, name, factors, shape, words)


def _groups(name: str, groups: int, inner: int) -> int:
    if groups < 1 or is_known(inner % groups != 0):
        raise ValueError(f"grouped_mlp: {name} has {groups} groups; accepted: a divisor of {inner}, the weight's lines")
    return groups


def _check_activation(call: GroupedMlpCall[Tensor]) -> None:
    activation, limit, alpha = call.activation, call.limit, call.alpha
    if activation not in ACTIVATIONS:
        raise ValueError(f"grouped_mlp: activation is {activation!r}; accepted: {', '.join(ACTIVATIONS)}")
    clamped = ACTIVATIONS[activation].clamped
    if clamped and not 0 < limit < math.inf:
        raise ValueError(f"grouped_mlp: limit is {limit} for {activation}; accepted: more than 0, and finite")
    if not clamped and limit != 0:
        raise ValueError(f"grouped_mlp: limit is {limit} for {activation}, which has none; accepted: 0")
    if not math.isfinite(alpha):
        raise ValueError(f"grouped_mlp: alpha is {alpha}; accepted: a finite number")
    if activation == "swiglu_softcap" and alpha <= 0:
        raise ValueError(
            f"grouped_mlp: alpha is {alpha} for {activation}, whose cap of up it is; accepted: more than 0"
        )
    if call.interleaved and not ACTIVATIONS[activation].gated:
        raise ValueError(f"grouped_mlp: interleaved is True for {activation}, which has no gate; accepted: False")


def _fake(call: GroupedMlpCall[Tensor]) -> Tensor:
    _check(call)
    return call.rows.new_empty(call.rows.shape, dtype=call.out_dtype or call.rows.dtype)


def _cpu(call: GroupedMlpCall[Tensor]) -> Tensor:
    check_once(_check, call)
    rows, numbers = call.rows, call.counts.tolist()
    used, gate = sum(numbers), (call.activation, call.limit, call.alpha, call.interleaved)
    if used > rows.shape[0] or min(numbers, default=0) < 0:
        raise ValueError(
            f"grouped_mlp: counts is {numbers}, {used} in all; accepted: 0 or more each, at most R = {rows.shape[0]}"
        )
    if call.quantisation not in _COMPUTED:
        raise ValueError(f"grouped_mlp: quantisation is {call.quantisation!r}, which has no kernel")
    form = EXPERT_FORMATS[call.quantisation]
    if form.int8_rows:
        out = _int8_rows(call, numbers, used)
    elif form.weight_only:
        hidden = antiquant_matmul(rows[:used], numbers, call.w13, call.w13_scale or (), call.w13_offset or ())
        hidden = activate(hidden, *gate, rows.dtype)
        out = antiquant_matmul(hidden, numbers, call.w2, call.w2_scale or (), call.w2_offset or ())
    else:
        hidden = grouped_matmul(rows[:used], numbers, call.w13, call.w13_bias, rows.dtype)
        hidden = activate(hidden, *gate, rows.dtype)
        out = grouped_matmul(hidden, numbers, call.w2, call.w2_bias, rows.dtype)
    out = out.to(call.out_dtype or rows.dtype)
    return out if used == rows.shape[0] else F.pad(out, (0, 0, 0, rows.shape[0] - used))


def _int8_rows(call: GroupedMlpCall[Tensor], counts: list[int], used: int) -> Tensor:
    """w8a8 and w4a8 in float32, of the first ``used`` rows: floats, or int8 with their scales."""
    rows, row_scale = call.rows[:used], call.row_scale[:used]
    if rows.dtype != torch.int8:
        rows, row_scale = quantise_rows(rows)
    hidden = quantised_matmul(rows, row_scale, counts, call.w13, call.w13_scale or ())
    gate = (call.activation, call.limit, call.alpha, call.interleaved)
    activated = activate(hidden, *gate, torch.float32)
    if call.h_smooth is not None:
        activated = activated * _of_rows(call.h_smooth, counts)
    rows, row_scale = quantise_clipped_rows(activated, None if call.h_clip is None else _of_rows(call.h_clip, counts))
    return quantised_matmul(rows, row_scale, counts, call.w2, call.w2_scale or ())


def _of_rows(factors: Tensor, counts: list[int]) -> Tensor:
    """For each row what its expert has."""
    return factors.repeat_interleave(torch.tensor(counts), 0)


def activate(
    hidden: Tensor, activation: str, limit: float, alpha: float, interleaved: bool, dtype: torch.dtype
) -> Tensor:
    """The activation of ``hidden [n, 2I]``, or [n, I] where it has no gate, computed in float32: [n, I] of ``dtype``."""
    step = CHUNK // hidden.shape[1]
    if dtype == torch.float32 or hidden.shape[0] <= step or step == 0:
        return _activated(hidden, activation, limit, alpha, interleaved).to(dtype)
    starts = range(0, hidden.shape[0], step)
    parts = [_activated(hidden[at : at + step], activation, limit, alpha, interleaved).to(dtype) for at in starts]
    return torch.cat(parts)


def _activated(hidden: Tensor, activation: str, limit: float, alpha: float, interleaved: bool) -> Tensor:
    if activation in _UNGATED:
        return _UNGATED[activation](hidden.float())
    gate, up = (hidden[:, 0::2], hidden[:, 1::2]) if interleaved else hidden.chunk(2, dim=1)
    gate, up = gate.float(), up.float()
    if activation == "swiglu_softcap":
        return torch.tanh(gate / limit).mul_(limit).mul_(torch.sigmoid(gate)).mul_(torch.tanh(up / alpha).mul_(alpha))
    if activation == "swiglu_clamp_after":
        return F.silu(gate).clamp_(max=limit).mul_(up.clamp(-limit, limit))
    if activation in ("swiglu_clamp", "swiglu_oai"):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        return torch.sigmoid(gate * alpha).mul_(gate).mul_(up + 1)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)
    if activation in ("swiglu", "swiglu_clamp"):
        return F.silu(gate).mul_(up)
    raise ValueError(f"grouped_mlp: activation is {activation!r}, which has no kernel")


_UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda hidden: F.relu(hidden).square_(),
    "silu": F.silu,
    "gelu_ungated": F.gelu,
    "gelu_tanh_ungated": lambda hidden: F.gelu(hidden, approximate="tanh"),
}

register(SCHEMA, GroupedMlpCall, cpu=_cpu, fake=_fake)
