"""Quantisation of rows, by itself and together with what stands before it in a quantised MLP.

npu_dynamic_quant, npu_grouped_matmul_swiglu_quant, npu_grouped_matmul_swiglu_quant_v2, npu_dequant_swiglu_quant,
npu_swiglu_quant. Meaning: torch_npu 2.13.0's and op-plugin's documentation, aclnnDynamicQuant,
aclnnGroupedMatmulSwigluQuant(V2). All compute in float32 and quantise with ``quantise_rows``. A CPU tensor has no memory
format: whether a device reads the weights as FRACTAL_NZ is for the pass to know (``Deployment.weight_format``).
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.simulator.kernels.common import Kernel, make_undefined, refuse, refuse_others, refuse_unsimulated
from moe_lowering.simulator.kernels.grouped_matmul import COUNTS, CUMSUM, PAIRS, group_bounds
from moe_lowering.simulator.kernels.quantised_matmul import int_product, quantise_rows

QUANT = "npu_dynamic_quant"
FUSED, FUSED_V2 = "npu_grouped_matmul_swiglu_quant", "npu_grouped_matmul_swiglu_quant_v2"
DEQUANT, SWIGLU_QUANT = "npu_dequant_swiglu_quant", "npu_swiglu_quant"
INT8, FLOAT32 = 1, 6  # torch_npu's numbers of dtypes
DYNAMIC = 1  # quant_mode of the operators that have 0 for static
HALVES, INTERLEAVED_CLAMPED = 0, 1  # swiglu_mode; 2 is halves, clamped


def _by_row(factors: torch.Tensor, bounds: list[tuple[int, int, int]]) -> torch.Tensor:
    """factors [G, n] -> float32 [rows of all groups, n], the row of its group for each."""
    groups = torch.tensor([group for group, _, _ in bounds], dtype=torch.int64)
    sizes = torch.tensor([end - begin for _, begin, end in bounds], dtype=torch.int64)
    return factors.float()[groups].repeat_interleave(sizes, 0)


def dynamic_quant(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., n] -> int8 [..., n], scale [...] float32: scale = max|x * smooth| / 127, y = round(x * smooth / scale).

    smooth_scales is [n], or [G, n] with group_index [G] int32, prefix sums over the rows of x, all of which they cover.
    """
    if dst_type not in (None, INT8):
        refuse_unsimulated(QUANT, "dst_type", dst_type, "None, 1 (int8)")
    if quant_mode != "pertoken":
        refuse_unsimulated(QUANT, "quant_mode", quant_mode, "pertoken")
    if dst_type_max:
        refuse_unsimulated(QUANT, "dst_type_max", dst_type_max, "0")
    rows = input.float().reshape(-1, input.shape[-1])
    if smooth_scales is not None:
        smooth = smooth_scales.float()
        if group_index is not None:
            bounds = group_bounds(QUANT, "group_index", group_index, CUMSUM, len(rows))
            if bounds[-1][2] != len(rows):
                refuse(
                    QUANT, "group_index", group_index.tolist(), f"prefix sums that end with the {len(rows)} rows of x"
                )
            smooth = _by_row(smooth_scales, bounds)
        rows = rows * smooth
    values, scale = quantise_rows(rows)
    return values.reshape(input.shape), scale.reshape(input.shape[:-1])


def swiglu_of_halves(x: torch.Tensor, gate_first: bool = True) -> torch.Tensor:
    """silu(gate) * up of the two halves [..., 2n] -> [..., n]."""
    left, right = x.chunk(2, -1)
    gate, up = (left, right) if gate_first else (right, left)
    return gate * torch.sigmoid(gate) * up


def _apply_activation(x: torch.Tensor, gate_first: bool, a: dict[str, Any]) -> torch.Tensor:
    """x [m, 2H] float32 -> [m, H] by ``swiglu_mode``: 0 SwiGLU of halves; 1 even columns the gate, odd ones the other, both
    clamped; 2 halves, clamped. Clamped: gate * sigmoid(alpha * gate) * (other + bias)."""
    mode, limit = a["swiglu_mode"], a["clamp_limit"]
    if mode == HALVES:
        return swiglu_of_halves(x, gate_first)
    left, right = (x[:, ::2], x[:, 1::2]) if mode == INTERLEAVED_CLAMPED else x.chunk(2, -1)
    gate, other = (left, right) if gate_first or mode == INTERLEAVED_CLAMPED else (right, left)
    gate, other = gate.clamp(max=limit), other.clamp(-limit, limit)
    return gate * torch.sigmoid(a["glu_alpha"] * gate) * (other + a["glu_bias"])


def _matmul_swiglu_quant(
    operator: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x int8 [m, K], weight int8 [E, K, N], scales [E, N] and [m] -> int8 [m, N / 2], scale [m] float32."""
    if weight.dim() != 3:
        refuse_unsimulated(
            operator, "weight", f"{weight.dim()}-D", "3-D (the view of FRACTAL_NZ storage that torch shows)"
        )
    expected = (weight_scale.shape[0], x.shape[1], weight_scale.shape[1])
    if tuple(weight.shape) != expected:
        refuse(operator, "weight", tuple(weight.shape), f"(E, K, N) = {expected}, from weight_scale and x")
    y, scale = make_undefined((len(x), expected[2] // 2), torch.int8), make_undefined((len(x),), torch.float32)
    for expert, begin, end in group_bounds(operator, "group_list", group_list, kind, len(x)):
        if end > begin:
            total = int_product(x[begin:end], weight[expert]).float()
            activated = swiglu_of_halves(total * weight_scale[expert].float() * x_scale[begin:end].unsqueeze(1))
            y[begin:end], scale[begin:end] = quantise_rows(activated)
    return y, scale


def grouped_matmul_swiglu_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x int8 [m, K], weight int8 [E, K, N], group_list [E] prefix sums -> int8 [m, N / 2], scale [m], offset [].

    C = (x @ weight) * weight_scale * x_scale; S = silu(first half) * second half; the scale is max|S| / 127 of each row,
    y = round(S / scale). Rows past the last group, and the offset, are undefined.
    """
    y, scale = _matmul_swiglu_quant(FUSED, x, weight, weight_scale, x_scale, group_list, CUMSUM)
    return y, scale, make_undefined((), torch.float32)


def grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    group_list_type: int | None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As version 1, with lists of one weight and one scale, and prefix sums (group_list_type 0) or counts (1)."""
    accepted = {"dequant_mode": 0, "dequant_dtype": FLOAT32, "quant_mode": 0, "quant_dtype": INT8}
    refuse_others(FUSED_V2, others, accepted)
    for argument in ("x_dtype", "weight_dtype", "weight_scale_dtype", "x_scale_dtype"):
        if others[argument] is not None:
            refuse_unsimulated(FUSED_V2, argument, others[argument], "None")
    kind = CUMSUM if group_list_type is None else group_list_type
    return _matmul_swiglu_quant(FUSED_V2, x, weight[0], weight_scale[0], x_scale, group_list, kind)


def dequant_swiglu_quant(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x int32 or bfloat16 [m, 2H] -> int8 [m, H], scale [m] float32.

    int32 x is scaled by weight_scale [G, 2H] float32 and activation_scale [m]; then silu(one half) * the other: the gate is
    the first half only with ``activate_left`` (other ``swiglu_mode``: see ``_apply_activation``); times quant_scale [G, H]; then
    int8 per row. group_index [G] holds counts, [G, 2] pairs (group, count); without it there is one group of all rows. Rows
    past its sum are undefined.
    """
    _check_dequant(others, bias)
    groups = torch.tensor([len(x)]) if group_index is None else group_index
    bounds = group_bounds(DEQUANT, "group_index", groups, PAIRS if groups.dim() == 2 else COUNTS, len(x))
    used = bounds[-1][2] if bounds else 0
    _check_groups(weight_scale, "weight_scale", len(groups), x.shape[1])
    _check_groups(quant_scale, "quant_scale", len(groups), x.shape[1] // 2)
    values = x[:used].float()
    if weight_scale is not None and activation_scale is not None:  # with int32 x only
        values = values * _by_row(weight_scale, bounds) * activation_scale.reshape(-1)[:used].unsqueeze(1)
    values = _apply_activation(values, activate_left, others)
    if quant_scale is not None:
        values = values * _by_row(quant_scale, bounds)
    y, scale = make_undefined((len(x), x.shape[1] // 2), torch.int8), make_undefined((len(x),), torch.float32)
    y[:used], scale[:used] = quantise_rows(values)
    return y, scale


def _check_dequant(a: dict[str, Any], bias: torch.Tensor | None) -> None:
    if bias is not None:
        refuse_unsimulated(DEQUANT, "bias", "given", "None")
    if a["quant_mode"] != DYNAMIC:
        refuse_unsimulated(DEQUANT, "quant_mode", a["quant_mode"], "1 (dynamic)")
    if a["quant_offset"] is not None:
        refuse_unsimulated(DEQUANT, "quant_offset", "given", "None")
    if a["round_mode"]:
        refuse_unsimulated(DEQUANT, "round_mode", a["round_mode"], "None, 0")
    if a["activate_dim"] not in (None, -1, 1):
        refuse_unsimulated(DEQUANT, "activate_dim", a["activate_dim"], "None, -1, 1 (the last axis)")


def _check_groups(factors: torch.Tensor | None, argument: str, groups: int, width: int) -> None:
    if factors is not None and tuple(factors.shape) != (groups, width):
        refuse(DEQUANT, argument, tuple(factors.shape), f"{(groups, width)}, one row for each group")


def swiglu_quant(
    x: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    quant_mode: int,
    group_list_type: int,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., 2H] -> int8 [..., H], scale [...] float32: silu(one half) * the other, times smooth_scales, int8 per row.

    The gate is the first half only with ``activate_left``. smooth_scales is [G, H] or [G], group_index [G] int32 prefix
    sums (group_list_type 0) or counts (1); without it there is one group of all rows. Rows past them are undefined.
    """
    if quant_mode != DYNAMIC:
        refuse_unsimulated(SWIGLU_QUANT, "quant_mode", quant_mode, "1 (dynamic)")
    rows, half = x.reshape(-1, x.shape[-1]), x.shape[-1] // 2
    groups = torch.tensor([len(rows)]) if group_index is None else group_index
    kind = COUNTS if group_index is None else group_list_type
    bounds = group_bounds(SWIGLU_QUANT, "group_index", groups, kind, len(rows))
    used = bounds[-1][2] if bounds else 0
    values = swiglu_of_halves(rows[:used].float(), activate_left)
    if smooth_scales is not None:
        if tuple(smooth_scales.shape) not in ((len(groups), half), (len(groups),)):
            accepted = f"{(len(groups), half)} or {(len(groups),)}, one row for each group"
            refuse(SWIGLU_QUANT, "smooth_scales", tuple(smooth_scales.shape), accepted)
        values = values * _by_row(smooth_scales.reshape(len(groups), -1), bounds)
    y, scale = make_undefined((len(rows), half), torch.int8), make_undefined((len(rows),), torch.float32)
    y[:used], scale[:used] = quantise_rows(values)
    return y.reshape(*x.shape[:-1], half), scale.reshape(x.shape[:-1])


KERNELS: dict[str, Kernel] = {
    QUANT: dynamic_quant,
    FUSED: grouped_matmul_swiglu_quant,
    FUSED_V2: grouped_matmul_swiglu_quant_v2,
    DEQUANT: dequant_swiglu_quant,
    SWIGLU_QUANT: swiglu_quant,
}
