"""CPU kernels of vllm-ascend's own operators (``_C_ascend``) that a served model calls beside those of torch_npu.

Each is an operator of torch_npu under another name, or with another argument. float32 inside, rounded once.

Meaning: vllm-ascend 0.23.0, csrc/torch_binding.cpp and what its Python passes.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.simulator.kernels.common import Kernel, make_undefined, refuse_unsimulated
from moe_lowering.simulator.kernels.norm import add_rms_norm

GATING, ROUTING, ADD_NORM = "moe_gating_top_k", "npu_moe_init_routing_custom", "npu_add_rms_norm_bias"


def add_rms_norm_bias(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``npu_add_rms_norm``, and beta added to the normalised sum."""
    if beta is None:
        return add_rms_norm(x1, x2, gamma, epsilon)
    _, inverse, total = add_rms_norm(x1, x2, gamma, epsilon)
    return (total.float() * inverse * gamma.float() + beta.float()).to(x1.dtype), inverse, total


def moe_gating_top_k(bias_opt: torch.Tensor | None, renorm: int, x: torch.Tensor, **arguments: Any) -> Any:
    """``npu_moe_gating_top_k`` of logits of any float dtype; ``renorm`` 1 divides softmax's weights by their sum."""
    y, ids, norm = torch.ops.npu.npu_moe_gating_top_k(
        x.float(), bias=None if bias_opt is None else bias_opt.float(), renorm=0, **arguments
    )
    if renorm:
        y = y / y.sum(-1, keepdim=True) * arguments["routed_scaling_factor"]
    return y.to(x.dtype), ids, norm if arguments["out_flag"] else make_undefined(norm.shape, norm.dtype)


def moe_init_routing_custom(expert_capacity: int, drop_pad_mode: int, **arguments: Any) -> Any:
    """``npu_moe_init_routing_v2``, which takes the same arguments."""
    if drop_pad_mode:
        refuse_unsimulated(ROUTING, "drop_pad_mode", drop_pad_mode, "0 (no row is dropped)")
    return torch.ops.npu.npu_moe_init_routing_v2(**arguments)


KERNELS: dict[str, Kernel] = {
    ADD_NORM: add_rms_norm_bias,
    GATING: moe_gating_top_k,
    ROUTING: moe_init_routing_custom,
}
