"""npu_moe_distribute_dispatch_v2 over a torch.distributed process group.

Meaning: aclnnMoeDistributeDispatchV2 and op-plugin's documentation and reference. A rank's rows are ordered by local
expert, source rank, token there. Besides the rows, dispatch returns what combine needs to send them back: (source rank,
token, k) of each row, and the number of rows of each (local expert, source rank) as inclusive prefix sums. Rows for shared
expert j have k = K + j (moe_distribute_dispatch_v2.h, SendToSharedExpert, ops-transformer 5778144). The order of rows
within an expert is documented for A3 and A5 only; A2 and the hierarchical algorithm have the same here.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.simulator.kernels.combine import combine_v2
from moe_lowering.simulator.kernels.common import Kernel, current_soc, make_undefined
from moe_lowering.simulator.kernels.distribute_call import COMBINE, DISPATCH, DistributeCall, begin_call, pad_undefined
from moe_lowering.simulator.kernels.exchange import exchange_counts, exchange_rows

NO_QUANT, INT8_PER_TOKEN = 0, 2  # quant_mode
CUMSUM = 0  # expert_token_nums_type
ASSIST_PER_ROW = 128
SERVER_SIZE = 8  # ranks of one server, in the size of ep_recv_counts where expert_scales are given


def _quantise(rows: torch.Tensor, smooth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> int8 rows, scale [n, 1]: s = 127 / max|row|, q = round-half-even(row * s), the scale is 1 / s."""
    values = rows.float() if smooth is None else rows.float() * smooth
    largest = values.abs().amax(-1, keepdim=True)
    factor = torch.where(largest == 0, torch.zeros_like(largest), 127.0 / largest)
    return torch.round(values * factor).to(torch.int8), torch.where(largest == 0, largest, 1.0 / factor)


def _send_order(call: DistributeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The (token, k) pairs that are sent, by rank, expert, then token; with the rows of their smooth scales. Each [n] int64.

    Pairs of shared experts have k from K on. Their ranks and their smooth scales come first.
    """
    experts = call.ids.reshape(-1).long()
    slots = torch.nonzero(call.sent.reshape(-1)).flatten()
    slots = slots[torch.sort(experts[slots], stable=True).indices]
    shared = torch.arange(call.shared_experts).repeat_interleave(int(call.active.sum()))
    token = torch.cat([torch.nonzero(call.active).flatten().repeat(call.shared_experts), slots // call.top_k])
    k = torch.cat([shared + call.top_k, slots % call.top_k])
    return token, k, torch.cat([shared, experts[slots] + call.shared_experts])


def _send_counts(call: DistributeCall, expert: torch.Tensor) -> torch.Tensor:
    """Rows for each (rank, its local expert) [ep, experts of a rank with routed ones] int64, from what ``_send_order`` gave."""
    counts = torch.zeros(call.ep_size, call.routed_experts, dtype=torch.int64)
    counts[call.shared_ranks :] = torch.bincount(
        expert[expert >= call.shared_experts] - call.shared_experts, minlength=call.experts
    ).reshape(-1, call.routed_experts)
    served = call.shared_rank(torch.tensor(call.rank), torch.arange(call.shared_experts))
    counts[served, 0] = call.active.sum()
    return counts


def _counts_size(call: DistributeCall, has_weights: bool) -> int:
    """Length of ep_recv_counts; with expert_scales there is room for what hierarchical combine keeps (not on A5)."""
    size = call.ep_size * call.local_experts
    if has_weights and current_soc() != "A5":
        size += call.max_rows // min(call.local_experts, call.top_k) * 2 * call.top_k * (call.ep_size // SERVER_SIZE)
    return size


def dispatch_v2(
    refusal: str,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    expert_scales: torch.Tensor | None,
    quant_mode: int,
    expert_token_nums_type: int,
    tp_world_size: int,
    **others: Any,
) -> tuple[torch.Tensor, ...]:
    """x [T, H], expert_ids [T, K] int32 -> rows [A, H], dynamic_scales [A], assist_info [max(T*K, 128*A)] int32,
    expert_token_nums [E_local] int64, ep_recv_counts [ep * E_local] int32, tp_recv_counts, expand_scales.

    A = (global_bs or T * ep) * min(E_local, K); on a shared-expert rank global_bs / ep, or T, for each rank that it serves,
    and E_local is 1. Everything past the received rows is undefined, so are dynamic_scales
    without quantisation. expand_scales is [A] where expert_scales are given, [0] elsewhere; undefined for shared experts.
    """
    if not refusal and (quant_mode not in (NO_QUANT, INT8_PER_TOKEN) or others["y_dtype"] is not None):
        refusal = f"{DISPATCH}: quant_mode is {quant_mode}; the CPU kernel computes only: 0, 2 without y_dtype"
    facts = {"quant_mode": quant_mode, "expert_scales given": int(expert_scales is not None)}
    call = begin_call(DISPATCH, refusal, others, x, facts)
    token, k, expert = _send_order(call)
    rows, row_scale = x[token], torch.full((len(token), 1), float("nan"))
    if quant_mode == INT8_PER_TOKEN:
        rows, row_scale = _quantise(rows, None if scales is None else scales[expert])
    weight = torch.full((len(token), 1), float("nan"))
    if expert_scales is not None:
        routed = k < call.top_k
        weight[routed, 0] = expert_scales[token[routed], k[routed]]
    triples = torch.stack((torch.full_like(token, call.rank), token, k), dim=1).to(torch.int32)

    send = _send_counts(call, expert)
    received = exchange_counts(send, call.group)[:, : call.local_experts]  # [source rank, local expert]
    splits = send.sum(1).tolist(), received.sum(1).tolist()
    columns = exchange_rows([rows, row_scale, weight, triples], *splits, call.group)
    local = torch.arange(call.local_experts).repeat(call.ep_size).repeat_interleave(received.reshape(-1))
    order = torch.sort(local, stable=True).indices  # from (source, expert) to (expert, source)
    rows, row_scale, weight, triples = (c[order] for c in columns)

    a, tokens_per_expert = call.max_rows, received.sum(0)
    recv_counts = received.t().reshape(-1).cumsum(0).to(torch.int32)
    return (
        pad_undefined((a, x.shape[1]), rows),
        pad_undefined((a,), row_scale.flatten()),
        pad_undefined((max(call.ids.numel(), ASSIST_PER_ROW * a),), triples.reshape(-1)),
        tokens_per_expert.cumsum(0) if expert_token_nums_type == CUMSUM else tokens_per_expert,
        pad_undefined((_counts_size(call, expert_scales is not None),), recv_counts),
        make_undefined((tp_world_size,), torch.int32),
        torch.empty(0) if expert_scales is None else pad_undefined((a,), weight.flatten()),
    )


KERNELS: dict[str, Kernel] = {DISPATCH: dispatch_v2, COMBINE: combine_v2}
