"""Quantised experts of ``graph_cases``: whole numbers and scales drawn at random, and the float64 weights that they mean.

The meaning is written down in docs/architecture.md; int4 is packed here by its own arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from graph_cases import BlockCase
from torch import Tensor

# Largest whole number, and the standard deviation that the numbers are drawn with.
WHOLE = {"w8a8": (127, 40.0), "w4a8": (7, 3.0), "w4a16": (7, 3.0)}
PACKED = {"w8a8": 1, "w4a8": 8, "w4a16": 8}
# Signal-to-noise in dB over all tokens. Rows rounded to int8 (max / 127), before each matmul, give 31 dB and more for a
# single token (docs/matrix.md); a wrong expert or scale gives less than 15.
FLOOR = 24.0


def extras(spec: BlockCase) -> tuple[str, ...]:
    """What a weight has beside it."""
    return {"w8a8": ("scale",), "w4a8": ("scale", "scale_bias"), "w4a16": ("scale", "offset")}.get(
        spec.quantisation, ()
    )


def dtypes(spec: BlockCase, x: torch.dtype) -> dict[str, torch.dtype]:
    """Of weights, scales, offsets and scale biases; the device's second w8a8 matmul wants bfloat16 scales for bfloat16."""
    scale = x if spec.quantisation == "w4a16" else torch.float32
    second = x if spec.quantisation == "w8a8" and x == torch.bfloat16 else scale
    found = {}
    for name, of_scale in (("w13", scale), ("w2", second)):
        found[name] = torch.int8 if spec.quantisation == "w8a8" else torch.int32
        found.update({f"{name}_scale": of_scale, f"{name}_offset": scale, f"{name}_scale_bias": torch.float32})
    return found


def draw(
    random: Callable[..., Tensor], name: str, spec: BlockCase, shape: tuple[int, int], x: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """(what the operator is given, the weights [E, K, N] in float64) of w13 or w2."""
    most, spread = WHOLE[spec.quantisation]
    whole = (random(f"{name} whole", spec.experts, *shape) * spread).round().clamp(-most, most)
    size = (random(f"{name} scale", spec.experts, shape[1]).sigmoid() + 0.5) / (spread * shape[0] ** 0.5)
    scale = size.to(dtypes(spec, x)[f"{name}_scale"])
    given = {name: whole.to(torch.int8) if spec.quantisation == "w8a8" else pack(whole), f"{name}_scale": scale}
    exact = whole.double() * scale.double().unsqueeze(1)
    if spec.quantisation == "w4a8":
        given[f"{name}_scale_bias"] = (8 * exact.sum(1)).float()
    if spec.quantisation == "w4a16":
        offset = (random(f"{name} offset", spec.experts, shape[1]) * 2).round().to(scale.dtype)
        given[f"{name}_offset"] = offset
        exact = (whole.double() + offset.double().unsqueeze(1)) * scale.double().unsqueeze(1)
    return given, exact


def pack(whole: Tensor) -> Tensor:
    """[..., N] in [-8, 7] as int32 [..., N / 8], the first in the lowest bits."""
    digits = whole.to(torch.int64).remainder(16).unflatten(-1, (-1, 8))
    value = sum(digits[..., i] * 16**i for i in range(8))
    return torch.where(value >= 2**31, value - 2**32, value).to(torch.int32)


def ratio(actual: Tensor, expected: Tensor) -> float:
    """Signal-to-noise in dB; minus infinity when a value is not finite or shapes differ."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return -math.inf
    noise = float((actual.double() - expected).square().sum())
    signal = float(expected.square().sum())
    return math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
