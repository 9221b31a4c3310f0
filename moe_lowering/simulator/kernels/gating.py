"""npu_moe_gating_top_k. Meaning: torch_npu 2.13.0's documentation, aclnnMoeGatingTopK, and op-plugin's reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moe_lowering.simulator.kernels.common import Kernel, make_undefined, refuse_unsimulated, take

SOFTMAX, SIGMOID, SQRT_SOFTPLUS = 0, 1, 2
SUM_OF_TWO = 1


def _normalise_logits(logits: torch.Tensor, norm_type: int) -> torch.Tensor:
    if norm_type == SOFTMAX:
        return torch.softmax(logits, dim=-1)
    if norm_type == SIGMOID:
        return torch.sigmoid(logits)
    return torch.sqrt(torch.nn.functional.softplus(logits))


def largest_indices(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest values of each row, equal values by lower index."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def _in_best_groups(values: torch.Tensor, group_count: int, k_group: int, mode: int) -> torch.Tensor:
    """The values, with -inf in the groups that are not among the ``k_group`` best of each row."""
    groups = values.reshape(*values.shape[:-1], group_count, values.shape[-1] // group_count)
    top = groups.topk(2 if mode == SUM_OF_TWO else 1, dim=-1).values
    chosen = largest_indices(top.sum(-1), k_group)
    keep = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter_(-1, chosen, True)
    return groups.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(-2)


class GatingTopKCall(NamedTuple):
    """What the kernel reads of a call's arguments."""

    x: torch.Tensor
    k: int
    bias: torch.Tensor | None
    input_ids: torch.Tensor | None
    tid2eid: torch.Tensor | None
    k_group: int
    group_count: int
    group_select_mode: int
    norm_type: int
    out_flag: bool
    routed_scaling_factor: float
    eps: float


def gating_top_k(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, E] -> weights [T, k] of x's dtype, ids [T, k] int32, norm [T, E] float32 (undefined unless ``out_flag``).

    The bias takes part in the selection only. ``norm_type`` 0 (softmax) does not renormalise over the selected experts,
    1 (sigmoid) and 2 (sqrt of softplus, A5) do.
    """
    call = take(GatingTopKCall, arguments)
    if call.input_ids is not None or call.tid2eid is not None:
        refuse_unsimulated("npu_moe_gating_top_k", "input_ids", "given", "None (no hash routing)")
    norm = _normalise_logits(call.x.float(), call.norm_type)
    scores = norm if call.bias is None else norm + call.bias.float()
    if call.group_count > 1:
        scores = _in_best_groups(scores, call.group_count, call.k_group, call.group_select_mode)
    ids = largest_indices(scores, call.k)
    weights = norm.gather(-1, ids)
    if call.norm_type != SOFTMAX:
        weights = weights / (weights.sum(-1, keepdim=True) + call.eps)
    weights = (weights * call.routed_scaling_factor).to(call.x.dtype)
    return weights, ids.to(torch.int32), norm if call.out_flag else make_undefined(norm.shape, torch.float32)


KERNELS: dict[str, Kernel] = {"npu_moe_gating_top_k": gating_top_k}
