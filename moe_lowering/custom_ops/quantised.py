"""Integer arithmetic of quantised experts: rows as int8, weights as int8 or packed int4, their scales, and matmuls.

Meaning: aclnnGroupedMatmulV5 with per-token scales, y = int32 sum * scale * per-token scale, and its antiquant form,
weight = (int4 + offset) * scale. Arguments are checked by ``grouped_mlp``.
Source: ops_transformer.grouped_matmul.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lowering.vocabulary import EXPERT_FORMATS

PER_INT32 = 8  # int4 weights in one int32
WEIGHT_DTYPES = {
    format.name: getattr(torch, format.weight_dtype) for format in EXPERT_FORMATS.values() if format.quantised
}
LARGEST = 127  # of an int8 value that stands for an activation


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row: q = round_half_even(row / s), s = max|row| / 127.

    Args:
        rows: [..., K] of any float dtype; computed with in float32.

    Returns:
        q int8 [..., K] in [-127, 127]; s float32 [...], 1 for a row of zeros. A row with a NaN or an infinity has q = 0
        there and such a scale, so that its results are NaN.
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.dim() < 1:
        shown = f"{rows.dtype} of shape {list(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise TypeError(f"quantise_rows: rows is {shown}; accepted: a tensor [..., K] of floats")
    return quantise_clipped_rows(rows, None)


def quantise_clipped_rows(rows: Tensor, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``quantise_rows``, with s = clip * max|row| / 127 for a clip [...]: what is beyond becomes 127, or -127."""
    rows = rows.float()
    if not rows.shape[-1]:
        return rows.to(torch.int8), rows.new_ones(rows.shape[:-1])
    largest = rows.abs().amax(-1)
    scale = (largest if clip is None else largest * clip) / LARGEST
    if clip is not None:  # where it is 0 nothing is left of a row
        rows = torch.where(scale.unsqueeze(-1) == 0, 0.0, rows)
    scale = torch.where(scale == 0, 1.0, scale)
    whole = (rows / scale.unsqueeze(-1)).round().clamp(-LARGEST, LARGEST)
    return whole.nan_to_num(0).to(torch.int8), scale


def unpack_int4(packed: Tensor) -> Tensor:
    """int32 [..., n] that hold eight int4 each, lowest bits first, as int8 [..., 8n] in [-8, 7]."""
    if not isinstance(packed, Tensor) or packed.dtype != torch.int32 or packed.dim() < 1:
        shown = f"{packed.dtype} of shape {list(packed.shape)}" if isinstance(packed, Tensor) else repr(packed)
        raise TypeError(f"unpack_int4: packed is {shown}; accepted: an int32 tensor [..., n]")
    shifts = torch.arange(28, -1, -4, dtype=torch.int32, device=packed.device)
    # up to the top of the word and, with its sign, down again
    return ((packed.unsqueeze(-1) << shifts) >> 28).to(torch.int8).flatten(-2)


def float_scale(scale: Tensor) -> Tensor:
    """Scales as float32; int64 holds the bits of a float32 in its low half."""
    return scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale.float()


def dequantise_weight(weight: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """(weight + offset) * scale in float32: [..., K, N].

    Args:
        weight: int8 [..., K, N], or int32 [..., K, N / 8].
        scale, offset: [..., N], or [..., G, N] for G groups of K / G lines each, as many dimensions as the weight has.
    """
    whole = (unpack_int4(weight) if weight.dtype == torch.int32 else weight).float()
    lines = whole.shape[-2]
    if offset is not None:
        whole = whole + _by_line(offset.float(), whole.dim(), lines)
    return whole * _by_line(float_scale(scale), whole.dim(), lines)


def _by_line(values: Tensor, dims: int, lines: int) -> Tensor:
    if values.dim() < dims:
        return values.unsqueeze(-2)
    return values.repeat_interleave(lines // values.shape[-2], -2)


def quantised_matmul(
    rows: Tensor,
    row_scale: Tensor,
    counts: list[int],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    between: torch.dtype = torch.float32,
) -> Tensor:
    """For each expert, its int8 rows @ its integer weights, times both scales: float32 [sum(counts), N].

    Args:
        rows: int8 [sum(counts), K], by expert; row_scale: float32 [sum(counts)].
        weights, scales: of each expert [K, N] int8 or [K, N / 8] int32, and [N]; or one stacked tensor.
        between: what the sum times the column's scale is rounded to, before it is multiplied with the row's scale.
    """
    parts = []
    for part, matrix, scale in zip(
        torch.split(rows, counts), split_experts(weights), split_experts(scales, 1), strict=True
    ):
        column = float_scale(scale)
        if not part.shape[0]:
            parts.append(column.new_empty((0, column.shape[0])))
            continue
        whole = unpack_int4(matrix) if matrix.dtype == torch.int32 else matrix
        total = part.double() @ whole.double()  # exact: integers, |sum| < 2**53
        parts.append((total.float() * column).to(between).float())
    return torch.cat(parts).mul_(row_scale.unsqueeze(1))


def antiquant_matmul(
    rows: Tensor, counts: list[int], weights: Sequence[Tensor], scales: Sequence[Tensor], offsets: Sequence[Tensor]
) -> Tensor:
    """For each expert, its rows @ ((int4 + offset) * scale), summed in float32 and rounded once to the rows' dtype.

    Args:
        rows: [sum(counts), K], by expert.
        weights: [K, N / 8] int32 of each expert, or one stacked tensor.
        scales, offsets: [N] or [G, N] of each expert, or one stacked tensor; no offsets when empty.
    """
    dims = 2 if are_scales_grouped(scales, len(counts)) else 1
    experts = zip(
        torch.split(rows, counts),
        split_experts(weights),
        split_experts(scales, dims),
        split_experts(offsets, dims) if offsets else [None] * len(counts),
        strict=True,
    )
    parts = [
        (part.float() @ dequantise_weight(matrix, scale, offset)).to(rows.dtype)
        if part.shape[0]
        else rows.new_empty((0, scale.shape[-1]))
        for part, matrix, scale, offset in experts
    ]
    return torch.cat(parts)


def split_experts(tensors: Sequence[Tensor], dims: int = 2) -> Sequence[Tensor]:
    """One tensor of ``dims`` dimensions for each expert, from a list of those or one stacked tensor."""
    return tensors[0].unbind(0) if len(tensors) == 1 and tensors[0].dim() > dims else tensors


def are_scales_grouped(scales: Sequence[Tensor], experts: int) -> bool:
    """Whether scales are by group of lines: [E, G, N] or a list of [G, N], not [E, N] or a list of [N].

    One tensor [G, N] of one expert is told from [E, N] by G > 1; for G = 1 they are the same.
    """
    dims = scales[0].dim()
    stacked = len(scales) == 1 and (experts != 1 or scales[0].shape[0] == 1)
    return dims == 3 or (dims == 2 and not stacked)
