"""Rows by the weights of their experts, for CPU kernels: torch's grouped matmul, or one matmul for each expert with rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lowering.custom_ops.quantised import split_experts


def grouped_matmul(
    rows: Tensor, counts: list[int], weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """For each expert, its rows @ its weight (+ its bias): summed in float32, rounded once to ``dtype``.

    Args:
        rows: [sum(counts), K], by expert.
        weights, biases: as in the schema; no bias when empty.

    A matmul in the rows' own dtype rounds like that: CPU kernels for 16-bit types accumulate in float32.
    """
    native = dtype == rows.dtype and all(bias.dtype == dtype for bias in biases)
    if native and not biases and _takes_grouped_mm(rows, weights, len(counts)):
        return F.grouped_mm(rows, weights[0], offs=last_rows(counts))
    out = rows.new_empty((rows.shape[0], weights[0].shape[-1]), dtype=dtype)
    matrices = split_experts(weights)
    vectors = split_experts(biases, 1) if biases else ()
    for expert, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        if not count:
            continue
        own_rows, target, matrix = rows[end - count : end], out[end - count : end], matrices[expert]
        if native and vectors:
            torch.addmm(vectors[expert], own_rows, matrix, out=target)
        elif native:
            torch.mm(own_rows, matrix, out=target)
        else:
            product = own_rows.float() @ matrix.float()
            target.copy_(product.add_(vectors[expert]) if vectors else product)
    return out


def last_rows(counts: list[int]) -> Tensor:
    """Where each expert's rows end, [E_local] int32."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def stacked_matmul(rows: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    """As ``grouped_matmul`` of weights [E, K, N] without biases, with what ``last_rows`` makes of the counts."""
    if _takes_grouped_mm(rows, [weight], ends.shape[0]):
        return F.grouped_mm(rows, weight, offs=ends)
    bounds = ends.tolist()
    counts = [end - begin for begin, end in pairwise([0, *bounds])]
    return grouped_matmul(rows, counts, [weight], (), rows.dtype)


def single_matmuls(rows: Tensor, experts: list[int], weight: Tensor) -> Tensor:
    """Each row by the weight [E, K, N] of its expert; a single row by all of them. As ``grouped_matmul``."""
    out = rows.new_empty((len(experts), weight.shape[2]))
    own_rows = torch.split(rows, 1) if len(rows) > 1 else (rows,) * len(experts)
    for own, expert, target in zip(own_rows, experts, torch.split(out, 1), strict=True):
        torch.mm(own, weight[expert], out=target)
    return out


def _takes_grouped_mm(rows: Tensor, weights: Sequence[Tensor], experts: int) -> bool:
    """Whether torch's own loop takes them: it wants lines that start at multiples of 16 bytes (torch 2.10 to 2.13), and takes
    1 us for each expert without a row."""
    if 0 < 2 * rows.shape[0] <= experts or len(weights) != 1 or weights[0].dim() != 3 or not rows.shape[0]:
        return False
    weight, size = weights[0], rows.element_size()
    inner, outer = sorted(weight.stride()[1:])
    return (
        inner == 1
        and outer * size % 16 == 0
        and outer >= min(weight.shape[1:])
        and weight.data_ptr() % 16 == 0
        and rows.stride() == (rows.shape[1], 1)
        and rows.shape[1] * size % 16 == 0
        and rows.data_ptr() % 16 == 0
    )
