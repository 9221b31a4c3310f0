"""``check_smooth``: the check of smooth scales that ``dispatch`` and ``grouped_mlp`` share.

Smooth scales are float32 factors that tokens and activations are multiplied by before they become int8.

Source: ops_transformer.dispatch: scales, (moeExpertNum, H); op_plugin.dequant_swiglu_quant: quant_scale, a line for
each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lowering.custom_ops.sizes import are_certainly_different, show


def check_smooth(operator: str, name: str, smooth: Tensor, shape: tuple[int, int], words: str) -> None:
    """float32 of ``shape``, which ``words`` name."""
    if smooth.dtype != torch.float32:
        raise TypeError(f"{operator}: {name} is {smooth.dtype}; accepted: float32")
    if are_certainly_different(smooth.shape, shape):
        raise ValueError(f"{operator}: {name} has shape {show(smooth.shape)}; accepted: {show(shape)}, {words}")
