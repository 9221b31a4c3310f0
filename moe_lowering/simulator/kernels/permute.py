"""npu_moe_token_permute, npu_moe_re_routing: the local sides of AllToAll.

Meaning: torch_npu 2.13.0's documentation, aclnnMoeTokenPermute, aclnnMoeReRouting.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels.common import Kernel, check_own_dtype, make_undefined, refuse

PERMUTE, RE_ROUTING = "npu_moe_token_permute", "npu_moe_re_routing"
MOST_INDICES = 16777215  # the documentation: indices are smaller


def token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [T, H], indices [T, k] or [T] -> rows [n, H], places [T * k] int32: rows[places[i]] = tokens[i // k].

    Rows are sorted by index, equal ones by position. ``num_out_tokens`` > 0 keeps that many of the first rows, < 0 drops
    that many of the last; places do not know of it.
    """
    flat = indices.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= MOST_INDICES):
        refuse(PERMUTE, "indices", f"{int(flat.min())} to {int(flat.max())}", f"0 to {MOST_INDICES - 1}")
    total, requested = flat.numel(), num_out_tokens or 0
    if -requested > total:
        refuse(PERMUTE, "num_out_tokens", requested, f"{-total} (no row) or more")
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    order = torch.sort(flat, stable=True).indices
    places = torch.empty(total, dtype=torch.int32)
    places[order] = torch.arange(total, dtype=torch.int32)
    kept = min(requested, total) if requested > 0 else total + requested
    return tokens[order[:kept] // top_k], places


def re_routing(
    tokens: torch.Tensor,
    expert_token_num_per_rank: torch.Tensor,
    per_token_scales: torch.Tensor | None,
    expert_token_num_type: int,
    idx_type: int,
    tokens_dtype: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens [A, H] by source rank and expert, counts [ranks, E] -> rows [A, H] by expert and source rank, scales [A],
    index [A] int32 (rows[i] = tokens[index[i]]), counts [E] of the dtype of the given ones.

    Scales move with their rows; without any they are undefined. The counts must add up to A.
    """
    check_own_dtype(RE_ROUTING, "tokens_dtype", tokens_dtype, tokens)
    counts = expert_token_num_per_rank.long()
    if bool((counts < 0).any()) or int(counts.sum()) != len(tokens):
        refuse(
            RE_ROUTING, "expert_token_num_per_rank", counts.tolist(), f"no negative count, {len(tokens)} rows in all"
        )
    experts = torch.arange(counts.shape[1]).repeat(counts.shape[0]).repeat_interleave(counts.reshape(-1))
    index = torch.sort(experts, stable=True).indices
    scales = make_undefined((len(tokens),), torch.float32) if per_token_scales is None else per_token_scales[index]
    return tokens[index], scales, index.to(torch.int32), counts.sum(0).to(expert_token_num_per_rank.dtype)


KERNELS: dict[str, Kernel] = {PERMUTE: token_permute, RE_ROUTING: re_routing}
