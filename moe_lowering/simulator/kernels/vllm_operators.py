"""CPU kernels of vllm-ascend's own operators (``_C_ascend``) that a served model calls beside those of torch_npu.

Each is an operator of torch_npu under another name, or with another argument. float32 inside, rounded once.

Meaning: vllm-ascend 0.23.0, csrc/torch_binding.cpp and what its Python passes.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.simulator.kernels.common import Kernel, make_undefined, refuse_others, refuse_unsimulated
from moe_lowering.simulator.kernels.grouped_matmul import group_bounds
from moe_lowering.simulator.kernels.norm import add_rms_norm
from moe_lowering.simulator.kernels.quantised import grouped_matmul_swiglu_quant, swiglu_of_halves
from moe_lowering.simulator.kernels.quantised_matmul import (
    COMPENSATION,
    int_product,
    quantise_rows,
    scale_of_bits,
    unpack_int4,
)

SWIGLU_QUANT, SWIGLU_QUANT_W4 = "grouped_matmul_swiglu_quant_weight_nz", "grouped_matmul_swiglu_quant_v2"
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


def grouped_matmul_swiglu_quant_weight_nz(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    swiglu_limit: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``npu_grouped_matmul_swiglu_quant`` of int8 weights: group_list [E] prefix sums -> int8 [m, N / 2], scale [m], nothing."""
    for name, value in (("bias", bias), ("offset", offset), ("swiglu_limit", swiglu_limit or None)):
        if value is not None:
            refuse_unsimulated(SWIGLU_QUANT, name, "given" if isinstance(value, torch.Tensor) else value, "none")
    y, scale, _ = grouped_matmul_swiglu_quant(x, weight, group_list, weight_scale, x_scale)
    return y, scale, make_undefined((), torch.float32)


def grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    weight_assist_matrix: list[torch.Tensor] | None,
    group_list_type: int,
    swiglu_limit: float,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int4 weights: x int8 [m, K], weight int32 [E, K, N / 8], scales as bits [E, N], assist 8 * sum(w * scale) [E, N] ->
    int8 [m, N / 2], scale [m]. C = ((x @ w - 8 * sum(w)) * scale + assist) * x_scale; SwiGLU; int8 per row."""
    accepted = {"smooth_scale": None, "bias": None, "dequant_mode": 0, "quant_mode": 0, "transpose_weight": False}
    refuse_others(SWIGLU_QUANT_W4, others, accepted)
    if swiglu_limit or weight_assist_matrix is None or weight[0].dtype != torch.int32 or len(weight) != 1:
        given = f"{len(weight)} {weight[0].dtype}, swiglu_limit {swiglu_limit}"
        refuse_unsimulated(SWIGLU_QUANT_W4, "weight", given, "one int32 tensor with weight_assist_matrix, and no limit")
    width = weight_scale[0].shape[-1]
    y, scale = make_undefined((len(x), width // 2), torch.int8), make_undefined((len(x),), torch.float32)
    scales = scale_of_bits(weight_scale[0].reshape(-1, width))
    for expert, begin, end in group_bounds(SWIGLU_QUANT_W4, "group_list", group_list, group_list_type, len(x)):
        if end > begin:
            whole = unpack_int4(weight[0][expert])
            total = int_product(x[begin:end], whole) - COMPENSATION * whole.to(torch.int32).sum(0)
            sums = (total.float() * scales[expert] + weight_assist_matrix[0][expert]) * x_scale[begin:end].unsqueeze(1)
            y[begin:end], scale[begin:end] = quantise_rows(swiglu_of_halves(sums))
    return y, scale


KERNELS: dict[str, Kernel] = {
    SWIGLU_QUANT: grouped_matmul_swiglu_quant_weight_nz,
    SWIGLU_QUANT_W4: grouped_matmul_swiglu_quant_v2,
    ADD_NORM: add_rms_norm_bias,
    GATING: moe_gating_top_k,
    ROUTING: moe_init_routing_custom,
}
