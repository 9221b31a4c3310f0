"""Layers for the fused operators: quantised weights, what they mean in float64, and the reference of a whole layer.

Nothing here comes from the package but ids and routing weights, which are inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import reference
import torch
from quantised_numbers import pack_int4
from torch import Tensor

from moe_lowering import functional

HIDDEN, INNER, TOP_K = 64, 48, 3

# Signal to noise that a correct result has at least, in dB, against float64 with the same (dequantised) weights. int8 rows:
# the largest of 64 normal values is about 2.5 sigma, so a step is 2.5 sigma / 127 and its noise 45 dB below; the activated
# values have longer tails, 38 dB. bfloat16 has 8 bits and rounds at most four times, 48 dB. 2 to 3 dB of margin.
FLOORS = {"none": 45.0, "w8a8": 34.0, "w4a8": 34.0}
# The same against ``in_steps``, which makes int8 of the same values: what is left are bfloat16, float16 and rare ties.
STEP_FLOOR = 44.0


@dataclasses.dataclass
class Layer:
    """The experts of all ranks: as stored, as scales, as compensation, and in float64."""

    stored: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor] | None
    compensation: tuple[Tensor, Tensor] | None
    means: tuple[Tensor, Tensor]
    integers: tuple[Tensor, Tensor] | None = None


def make_layer(quantisation: str, experts: int, dtype: torch.dtype) -> Layer:
    torch.manual_seed(8)
    plain = (torch.randn(experts, HIDDEN, 2 * INNER) / 8, torch.randn(experts, INNER, HIDDEN) / 7)
    if quantisation == "none":
        stored = plain[0].to(dtype), plain[1].to(dtype)
        return Layer(stored, None, None, (stored[0].double(), stored[1].double()))
    most = 127 if quantisation == "w8a8" else 7
    scales = tuple(w.abs().amax(1) / most * torch.linspace(0.7, 1.0, w.shape[-1]) for w in plain)
    low = -127 if quantisation == "w8a8" else -8
    integers = [(w / s.unsqueeze(1)).round().clamp(low, most) for w, s in zip(plain, scales, strict=True)]
    means = tuple(q.double() * s.double().unsqueeze(1) for q, s in zip(integers, scales, strict=True))
    stored = tuple(q.to(torch.int8) if quantisation == "w8a8" else pack_int4(q.long()) for q in integers)
    compensation = tuple((8 * m.sum(1)).float() for m in means) if quantisation == "w4a8" else None
    return Layer(stored, scales, compensation, means, tuple(integers))  # type: ignore[arg-type]


def make_tokens(rank: int, tokens: int, experts: int, dtype: torch.dtype, skew: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, routing weights and ids of a rank; with ``skew`` the last experts of each rank get nothing."""
    torch.manual_seed(200 + rank)
    logits = torch.randn(tokens, experts)
    if skew:
        logits[:, TOP_K + 1 :] -= 100
    weights, ids = functional.route(logits, TOP_K)
    return torch.randn(tokens, HIDDEN).to(dtype), weights, ids


def expected(x: Tensor, weights: Tensor, ids: Tensor, layer: Layer, mask: Tensor | None, limit: float) -> Tensor:
    name = "swiglu_clamp" if limit else "swiglu"
    return reference.moe(x, weights, ids, *layer.means, mask=mask, activation=name, limit=limit)


def int8_of(row: Tensor) -> tuple[Tensor, float]:
    """A float64 row as integers in [-127, 127], and the step."""
    step = row.abs().max().item() / 127
    return torch.tensor([max(-127, min(127, round(v / step))) for v in row.tolist()], dtype=torch.float64), step


def in_steps(x: Tensor, weights: Tensor, ids: Tensor, layer: Layer, mask: Tensor | None, limit: float) -> Tensor:
    """The layer in float64, token by token, with int8 activations before both matmuls."""
    assert layer.integers is not None and layer.scales is not None
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        if mask is not None and not mask[token]:
            continue
        row, step = int8_of(x[token].double())
        for weight, chosen in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            first, second = (scale[chosen].double() for scale in layer.scales)
            hidden = (row @ layer.integers[0][chosen].double()) * first * step
            gated = reference.gated(hidden, "swiglu_clamp" if limit else "swiglu", limit, 0.0, False)
            again, step_2 = int8_of(gated)
            out[token] += weight * ((again @ layer.integers[1][chosen].double()) * second * step_2)
    return out


def lists_of(layer: Layer, rank: int, ranks: int, as_lists: bool) -> dict[str, Any]:
    """Weights, scales and compensation of one rank's experts, by the wrappers' names."""
    found: dict[str, Any] = {}
    for kind, pair in (("", layer.stored), ("_scale", layer.scales), ("_scale_bias", layer.compensation)):
        for name, whole in zip(("w13", "w2"), pair or (), strict=False):
            own = whole.chunk(ranks)[rank].contiguous()
            found[name + kind] = [part.clone() for part in own] if as_lists else [own]
    return found
