"""Packed int4 weights read back, in Python integers."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_numbers(packed: Tensor) -> Tensor:
    """The int4 values of int32, lowest bits first, in Python integers."""
    values = [(word >> (4 * at)) & 15 for word in packed.flatten().tolist() for at in range(8)]
    return torch.tensor([v - 16 if v > 7 else v for v in values]).reshape(*packed.shape[:-1], -1)


def floats(weight: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """(weight + offset) * scale in float64, by the definition."""
    whole = (whole_numbers(weight) if weight.dtype == torch.int32 else weight).double()
    lines = torch.arange(whole.shape[-2])
    parts = [
        t.double()[..., lines * t.shape[-2] // len(lines), :] if t.dim() == whole.dim() else t.double().unsqueeze(-2)
        for t in (scale, *(() if offset is None else (offset,)))
    ]
    return (whole + parts[1] if offset is not None else whole) * parts[0]
