"""npu_moe_init_routing_v2 and npu_moe_token_unpermute.

Meaning: torch_npu 2.13.0's documentation, aclnnMoeInitRoutingV3, aclnnMoeTokenUnpermute, op-plugin's reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moe_lowering.simulator.kernels.common import (
    Kernel,
    check_own_dtype,
    make_undefined,
    refuse,
    refuse_unsimulated,
    take,
)
from moe_lowering.simulator.kernels.quantised_matmul import quantise_rows

GATHER = 0  # row_idx_type: row_idx[slot] = row; 1 (scatter) is the inverse
CUMSUM, COUNT, KEY_VALUE = 0, 1, 2  # expert_tokens_num_type
NO_QUANT, DYNAMIC_QUANT = -1, 1  # quant_mode


def _check_ids(ids: torch.Tensor, experts: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= experts):
        value = f"{int(ids.min())} to {int(ids.max())}"
        refuse("npu_moe_init_routing_v2", "expert_idx", value, f"0 to expert_num - 1 = {experts - 1}")


def _sorted_slots(ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Slots (token * K + k) of the experts in [start, end), by expert, then by slot."""
    flat = ids.reshape(-1).long()
    slots = torch.nonzero((flat >= start) & (flat < end)).squeeze(-1)
    return slots[torch.sort(flat[slots], stable=True).indices]


def _expert_tokens(experts: torch.Tensor, start: int, end: int, total: int, kind: int) -> torch.Tensor:
    """The third output from the sorted experts: prefix sums or counts [end - start], or pairs [total, 2], int64.

    Pairs (expert, count) hold the experts that have tokens, then (0, 0) if there is room; the rest is undefined.
    """
    counts = torch.bincount(experts - start, minlength=end - start)
    if kind == KEY_VALUE:
        busy = torch.nonzero(counts).squeeze(-1)
        pairs = make_undefined((total, 2), torch.int64)
        pairs[: len(busy) + 1] = 0
        pairs[: len(busy)] = torch.stack((busy + start, counts[busy]), dim=-1)
        return pairs
    return counts.cumsum(0) if kind == CUMSUM else counts


def _row_idx(slots: torch.Tensor, total: int, kind: int) -> torch.Tensor:
    """int32 [N * K]: gather (-1 for slots of other experts), or scatter (undefined past the valid ones)."""
    if kind == GATHER:
        row_idx = torch.full((total,), -1, dtype=torch.int32)
        row_idx[slots] = torch.arange(len(slots), dtype=torch.int32)
        return row_idx
    row_idx = make_undefined((total,), torch.int32)
    row_idx[: len(slots)] = slots.to(torch.int32)
    return row_idx


def _expand_rows(
    x: torch.Tensor, scale: torch.Tensor | None, tokens: torch.Tensor, smooth_rows: torch.Tensor, quant_mode: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The valid rows, and their scales where those are defined. ``smooth_rows`` are rows of ``scale``, one per row."""
    rows = x[tokens]
    if quant_mode == NO_QUANT:
        return rows, None if scale is None else scale[tokens]
    rows = rows.float()
    if scale is not None and len(rows):
        rows = rows * scale[smooth_rows if scale.shape[0] > 1 else torch.zeros_like(smooth_rows)]
    return quantise_rows(rows)


class InitRoutingCall(NamedTuple):
    """What the kernel reads of a call's arguments."""

    x: torch.Tensor
    expert_idx: torch.Tensor
    scale: torch.Tensor | None
    active_num: int
    expert_num: int
    expert_tokens_num_type: int
    expert_tokens_num_flag: bool
    quant_mode: int
    active_expert_range: list[int]
    row_idx_type: int
    x_dtype: int | None


def init_routing_v2(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [N, H], expert_idx [N, K] int32 -> rows [N*K, H], row_idx [N*K] int32, counts int64, scale [N*K] float32.

    Rows of the experts in ``active_expert_range`` (all when empty) sorted by expert, then token; rows past them are
    undefined. ``active_num`` > 0 keeps that many rows; counts and row_idx do not know of it.
    """
    name, call = "npu_moe_init_routing_v2", take(InitRoutingCall, arguments)
    x, expert_idx = call.x, call.expert_idx
    if call.quant_mode not in (NO_QUANT, DYNAMIC_QUANT):
        refuse_unsimulated(name, "quant_mode", call.quant_mode, "-1 (none), 1 (int8 per row)")
    check_own_dtype(name, "x_dtype", call.x_dtype, x)
    _check_ids(expert_idx, call.expert_num)
    start, end = call.active_expert_range or (0, call.expert_num)
    slots = _sorted_slots(expert_idx, start, end)
    experts = expert_idx.reshape(-1).long()[slots]
    total, top_k = expert_idx.numel(), expert_idx.shape[1]
    size = min(call.active_num, total) if call.active_num > 0 else total
    kept = slots[:size]
    valid_rows, valid_scales = _expand_rows(x, call.scale, kept // top_k, experts[:size] - start, call.quant_mode)
    rows = make_undefined((size, x.shape[1]), valid_rows.dtype)
    rows[: len(kept)] = valid_rows
    scales = make_undefined((size,), torch.float32)
    if valid_scales is not None:
        scales[: len(kept)] = valid_scales
    counts = make_undefined((), torch.int64)
    if call.expert_tokens_num_flag:
        counts = _expert_tokens(experts, start, end, call.expert_num, call.expert_tokens_num_type)
    return rows, _row_idx(slots, total, call.row_idx_type), counts, scales


def token_unpermute(
    permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None, **_: Any
) -> torch.Tensor:
    """rows [R, H], indices [T*k] int32, probs [T, k] or None (k = 1) -> [T, H]: sum over k of probs * rows[index].

    Accumulates in float32, k ascending, and rounds once. Documentation wants distinct indices; a repeated one
    is read twice, which vllm-ascend's AllGather path relies on (``abs(row_idx)`` with zero weights).
    """
    rows = permuted_tokens.shape[0]
    if sorted_indices.numel():
        low, high = int(sorted_indices.min()), int(sorted_indices.max())
        if low < 0 or high >= rows:
            refuse("npu_moe_token_unpermute", "sorted_indices", f"{low} to {high}", f"0 to {rows - 1} (rows given)")
    top_k = 1 if probs is None else probs.shape[1]
    indices = sorted_indices.reshape(-1, top_k).long()
    total = torch.zeros(indices.shape[0], permuted_tokens.shape[1], dtype=torch.float32)
    for k in range(top_k):
        part = permuted_tokens[indices[:, k]].float()
        total += part if probs is None else part * probs[:, k : k + 1].float()
    return total.to(permuted_tokens.dtype)


KERNELS: dict[str, Kernel] = {
    "npu_moe_init_routing_v2": init_routing_v2,
    "npu_moe_token_unpermute": token_unpermute,
}
