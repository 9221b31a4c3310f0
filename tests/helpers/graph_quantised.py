"""Quantised experts of ``graph_cases``: whole numbers and scales drawn at random, and the float64 weights that they mean.

The meaning is written down in docs/architecture.md; int4 is packed here by its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from graph_cases import BlockCase
from quantised_numbers import pack_int4
from torch import Tensor

from moe_lowering.vocabulary import EXPERT_FORMATS

# By bits: the largest whole number, and the standard deviation that the numbers are drawn with.
WHOLE = {8: (127, 40.0), 4: (7, 3.0)}
PACKED = {name: form.packed for name, form in EXPERT_FORMATS.items() if form.quantised}
# Signal-to-noise in dB over all tokens. Rows rounded to int8 (max / 127), before each matmul, give 31 dB and more for a
# single token (docs/matrix.md); a wrong expert or scale gives less than 15.
FLOOR = 24.0


def extras(spec: BlockCase) -> tuple[str, ...]:
    """What a weight has beside it."""
    form = EXPERT_FORMATS[spec.quantisation]
    has = {"scale": form.quantised, "scale_bias": form.has_scale_bias, "offset": form.has_offset}
    return tuple(name for name, there in has.items() if there)


def dtypes(spec: BlockCase, x: torch.dtype) -> dict[str, torch.dtype]:
    """Of weights, scales, offsets and scale biases; the device's second w8a8 matmul wants bfloat16 scales for bfloat16."""
    form = EXPERT_FORMATS[spec.quantisation]
    scale = x if form.weight_only else torch.float32
    second = x if "bfloat16" in form.scale_dtypes and x == torch.bfloat16 else scale
    found = {}
    for name, of_scale in (("w13", scale), ("w2", second)):
        found[name] = getattr(torch, form.weight_dtype)
        found.update({f"{name}_scale": of_scale, f"{name}_offset": scale, f"{name}_scale_bias": torch.float32})
    return found


def draw(
    random: Callable[..., Tensor], name: str, spec: BlockCase, shape: tuple[int, int], x: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """(what the operator is given, the weights [E, K, N] in float64) of w13 or w2."""
    form = EXPERT_FORMATS[spec.quantisation]
    most, spread = WHOLE[form.bits]
    whole = (random(f"{name} whole", spec.experts, *shape) * spread).round().clamp(-most, most)
    size = (random(f"{name} scale", spec.experts, shape[1]).sigmoid() + 0.5) / (spread * shape[0] ** 0.5)
    scale = size.to(dtypes(spec, x)[f"{name}_scale"])
    given = {name: pack_int4(whole) if form.packed > 1 else whole.to(torch.int8), f"{name}_scale": scale}
    exact = whole.double() * scale.double().unsqueeze(1)
    if form.has_scale_bias:
        given[f"{name}_scale_bias"] = (8 * exact.sum(1)).float()
    if form.has_offset:
        offset = (random(f"{name} offset", spec.experts, shape[1]) * 2).round().to(scale.dtype)
        given[f"{name}_offset"] = offset
        exact = (whole.double() + offset.double().unsqueeze(1)) * scale.double().unsqueeze(1)
    return given, exact
