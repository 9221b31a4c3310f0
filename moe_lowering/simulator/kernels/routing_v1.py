"""npu_moe_init_routing (the first version) and npu_moe_compute_expert_tokens.

Meaning: torch_npu 2.13.0's documentation, aclnnMoeInitRouting, aclnnMoeComputeExpertTokens.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels.common import Kernel, refuse

INIT, TOKENS = "npu_moe_init_routing", "npu_moe_compute_expert_tokens"


def init_routing(
    x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [N, H], row_idx and expert_idx [N, K] int32 -> rows [min(N, active_num) * K, H], places [N*K], experts [N*K] int32.

    Slots are sorted by expert, equal ones by position; ``experts`` are those of the sorted slots. The slot that stands at
    place i has rows[i] = x[row_idx % N] and places[row_idx] = i. row_idx holds each of 0 to N*K - 1 once, by column as
    npu_moe_gating_top_k_softmax gives it: choice j of token t has j * N + t.
    """
    tokens, slots = len(x), row_idx.reshape(-1).long()
    if not torch.equal(slots.sort().values, torch.arange(len(slots))):
        refuse(INIT, "row_idx", row_idx.tolist(), f"each of 0 to {len(slots) - 1} once")
    if expert_idx.numel() and int(expert_idx.min()) < 0:
        refuse(INIT, "expert_idx", int(expert_idx.min()), "0 or more")
    experts, order = torch.sort(expert_idx.reshape(-1), stable=True)
    sorted_slots = slots[order]
    places = torch.empty(len(slots), dtype=torch.int32)
    places[sorted_slots] = torch.arange(len(slots), dtype=torch.int32)
    kept = min(tokens, active_num) * expert_idx.shape[1]
    return x[sorted_slots[:kept] % max(tokens, 1)], places, experts


def compute_expert_tokens(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> torch.Tensor:
    """Experts of the sorted rows [n] int32 -> prefix sums [E] int32: where the rows of each expert end."""
    experts = sorted_expert_for_source_row
    if bool((experts[1:] < experts[:-1]).any()):
        refuse(TOKENS, "sorted_expert_for_source_row", experts.tolist(), "experts that never decrease")
    if len(experts) and (int(experts[0]) < 0 or int(experts[-1]) >= num_expert):
        value = f"{int(experts[0])} to {int(experts[-1])}"
        refuse(TOKENS, "sorted_expert_for_source_row", value, f"0 to num_expert - 1 = {num_expert - 1}")
    counts = torch.bincount(experts.long(), minlength=num_expert)
    return counts.cumsum(0).to(torch.int32)


KERNELS: dict[str, Kernel] = {INIT: init_routing, TOKENS: compute_expert_tokens}
