"""npu_moe_gating_top_k_softmax and its version 2.

Meaning: op-plugin's documentation of the first, torch_npu 2.13.0's of the second, aclnnMoeGatingTopKSoftmax.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels.common import Kernel, refuse
from moe_lowering.simulator.kernels.gating import largest_indices

FIRST, SECOND = "npu_moe_gating_top_k_softmax", "npu_moe_gating_top_k_softmax_v2"


def _drop_finished(
    operator: str, weights: torch.Tensor, ids: torch.Tensor, finished: torch.Tensor | None, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that ``finished`` marks take no part: their ids are the number of experts, their weights undefined (NaN)."""
    if finished is None:
        return weights, ids
    if finished.shape != ids.shape[:-1]:
        refuse(
            operator,
            "finished",
            tuple(finished.shape),
            f"{tuple(ids.shape[:-1])}, the shape of x without its last axis",
        )
    done = finished.unsqueeze(-1)
    return weights.masked_fill(done, float("nan")), ids.masked_fill(done, experts)


def gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., E] -> weights [..., k] of x's dtype, ids [..., k] int32, rows [..., k] int32.

    The k largest of softmax(x), computed in float32, equal ones by lower index; they are not normalised again. Rows count
    by column, as npu_moe_init_routing wants them: choice j of token t has j * T + t.
    """
    weights, ids, _ = gating_top_k_softmax_v2(x, k, finished, 0, False, FIRST)
    tokens = ids.numel() // k
    rows = torch.arange(tokens * k, dtype=torch.int32).reshape(k, tokens).t().reshape(ids.shape)
    return weights, ids, rows.contiguous()


def gating_top_k_softmax_v2(
    x: torch.Tensor,
    k: int,
    finished: torch.Tensor | None,
    renorm: int | None,
    output_softmax: bool | None,
    operator: str = SECOND,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., E] -> weights [..., k] of x's dtype, ids [..., k] int32, softmax float32 (x's shape, or [0]).

    renorm 0: the k largest of softmax(x); 1: softmax over the k largest of x. The third output is softmax(x) with renorm 0
    and ``output_softmax``.
    """
    logits = x.float()
    if renorm:
        ids = largest_indices(logits, k)
        weights = torch.softmax(logits.gather(-1, ids), dim=-1)
    else:
        scores = torch.softmax(logits, dim=-1)
        ids = largest_indices(scores, k)
        weights = scores.gather(-1, ids)
    softmax = scores if output_softmax and not renorm else torch.empty(0)
    return *_drop_finished(operator, weights.to(x.dtype), ids.to(torch.int32), finished, x.shape[-1]), softmax


KERNELS: dict[str, Kernel] = {FIRST: gating_top_k_softmax, SECOND: gating_top_k_softmax_v2}
