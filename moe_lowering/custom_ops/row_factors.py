"""``check_factors``: the check of smooth scales and clips that ``dispatch`` and ``grouped_mlp`` share.

Smooth scales are float32 factors that tokens and activations are multiplied by before they become int8. Clips are float32
factors of the largest activation of a row.

Source: ops_transformer.dispatch: scales, (moeExpertNum, H); op_plugin.dequant_swiglu_quant: quant_scale, a line for
each group; recipes.swiglu_clip_quant: group_alpha, one for each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lowering.custom_ops.sizes import are_certainly_different, show


def check_factors(operator: str, name: str, factors: Tensor, shape: tuple[int, ...], words: str) -> None:
    """float32 of ``shape``, which ``words`` name."""
    if factors.dtype != torch.float32:
        raise TypeError(f"{operator}: {name} is {factors.dtype}; accepted: float32")
    if are_certainly_different(factors.shape, shape):
        raise ValueError(f"{operator}: {name} has shape {show(factors.shape)}; accepted: {show(shape)}, {words}")
