"""custom::npu_swiglu_clip_quant, of the library that production models bring. Without that library it is defined here.

Meaning: recipes.swiglu_clip_quant, and the reference in its example.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.limits.calls.schemas import LIBRARIES, TEXTS
from moe_lowering.simulator.kernels.common import Kernel, make_undefined
from moe_lowering.simulator.kernels.grouped_matmul import COUNTS, group_bounds
from moe_lowering.simulator.kernels.quantised_matmul import quantise_rows

CLIP_QUANT = "npu_swiglu_clip_quant"
NAMESPACE = LIBRARIES[CLIP_QUANT]


def swiglu_clip_quant(
    x: torch.Tensor, group_index: torch.Tensor, group_alpha: torch.Tensor, activate_left: bool, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, 2H] -> int8 [m, H], scale [m] float32, of groups of rows by counts [G].

    S = silu(gate) * other half; m = max|S| of a row * group_alpha of its group; scale = m / 127; y = S / scale, rounded, at
    most 127 and at least -127. The gate is the first half only with ``activate_left``. Rows past the groups are undefined.
    """
    half, bounds = x.shape[1] // 2, group_bounds(CLIP_QUANT, "group_index", group_index, COUNTS, len(x))
    y, scale = make_undefined((len(x), half), torch.int8), make_undefined((len(x),), torch.float32)
    for group, begin, end in bounds:
        left, right = x[begin:end].float().chunk(2, 1)
        gate, up = (left, right) if activate_left else (right, left)
        y[begin:end], scale[begin:end] = quantise_rows(torch.nn.functional.silu(gate) * up, group_alpha[group])
    return y, scale


def _fake(
    x: torch.Tensor, group_index: torch.Tensor, group_alpha: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def define() -> None:
    """Define the operator, where no library has."""
    if not hasattr(getattr(torch.ops, NAMESPACE), CLIP_QUANT):
        torch.library.define(f"{NAMESPACE}::{CLIP_QUANT}", TEXTS[CLIP_QUANT].removeprefix(CLIP_QUANT))
        torch.library.register_fake(f"{NAMESPACE}::{CLIP_QUANT}", _fake)


KERNELS: dict[str, Kernel] = {CLIP_QUANT: swiglu_clip_quant}
