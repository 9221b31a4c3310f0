"""CPU kernels of npu_rms_norm and npu_add_rms_norm.

Meaning: torch_npu 2.13.0's documentation, aclnnRmsNorm, aclnnAddRmsNorm.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels.common import Kernel, refuse

RMS_NORM, ADD_RMS_NORM = "npu_rms_norm", "npu_add_rms_norm"


def normalise_rows(
    operator: str, x: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * gamma over the axes of gamma, of x's dtype, and 1 / sqrt(...) in float32.

    float32 inside, rounded once. The second result keeps the axes that were reduced, with size 1.
    """
    if gamma.dim() == 0 or x.shape[x.dim() - gamma.dim() :] != gamma.shape:
        refuse(operator, "gamma", f"{list(gamma.shape)}", f"the last axes of x, {list(x.shape)}")
    axes = tuple(range(x.dim() - gamma.dim(), x.dim()))
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * inverse * gamma.float()).to(x.dtype), inverse


def rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., H], gamma [H] (or more axes) -> y like x, rstd [..., 1] float32."""
    return normalise_rows(RMS_NORM, input, gamma, epsilon)


def add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of x1 + x2 -> y, rstd, and the sum, which is rounded to x1's dtype before it is normalised."""
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        refuse(ADD_RMS_NORM, "x2", f"{x2.dtype} {list(x2.shape)}", f"x1's {x1.dtype} {list(x1.shape)}")
    total = (x1.float() + x2.float()).to(x1.dtype)
    return *normalise_rows(ADD_RMS_NORM, total, gamma, epsilon), total


KERNELS: dict[str, Kernel] = {RMS_NORM: rms_norm, ADD_RMS_NORM: add_rms_norm}
