"""npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 over a torch.distributed process group.

Meaning: aclnnMoeDistributeDispatchV2 / CombineV2 and op-plugin's documentation and reference; facts in cann_ops.md §2.
Expert g lives on rank g // E_local. A rank's rows are ordered by local expert, source rank, token there. Besides the
rows, dispatch returns what combine needs to send them back: (source rank, token, k) of each row, and the number of rows
of each (local expert, source rank) as inclusive prefix sums. ``group_ep`` is the name of a process group here, and that
of an HCCL communicator on a device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe_lowering.simulator.kernels.common import Kernel, current_soc, undefined
from moe_lowering.simulator.kernels.exchange import GroupLike, agree, exchange_counts, exchange_rows, resolve

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
NO_QUANT, INT8_PER_TOKEN = 0, 2  # quant_mode
CUMSUM = 0  # expert_token_nums_type
TRIPLE = 3  # int32 values per row in assist_info: source rank, token, k
ASSIST_PER_ROW = 128
AT_DISPATCH, AT_COMBINE, AT_RETURN = 0, 1, 2  # stages of ``agree``
SERVER_SIZE = 8  # ranks of one server, in the size of ep_recv_counts where expert_scales are given


@dataclasses.dataclass(frozen=True)
class Call:
    """What dispatch and combine of one rank have in common, checked. ``tokens`` counts those not masked, the first."""

    operator: str
    group: GroupLike
    rank: int
    ep_size: int
    experts: int
    ids: torch.Tensor  # [T, K] int32
    tokens: int
    max_rows: int  # A: rows that dispatch allocates

    @property
    def local_experts(self) -> int:
        return self.experts // self.ep_size

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]


def _active_tokens(mask: torch.Tensor | None, tokens: int) -> int:
    return tokens if mask is None else int(mask.sum())


def _value_refusal(operator: str, a: dict[str, Any]) -> str:
    """What the values of ids and mask break, and the documented forms that are not computed here; "" when nothing."""
    mask, ids = a["x_active_mask"], a["expert_ids"]
    unsupported = {"zero_expert_num": 0, "copy_expert_num": 0, "const_expert_num": 0, "performance_info": None}
    for argument, accepted in unsupported.items():
        if a[argument] != accepted:
            return f"{operator}: {argument} is given; the CPU kernel computes only: {accepted}"
    if mask is not None and mask.dim() != 1:
        return f"{operator}: x_active_mask is {mask.dim()}-D; the CPU kernel computes only: 1-D"
    if mask is not None and bool((mask[1:] & ~mask[:-1]).any()):
        return f"{operator}: x_active_mask is {mask.tolist()}; accepted: all True before the first False"
    ids = ids[: _active_tokens(mask, len(ids))]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= a["moe_expert_num"]):
        bounds = f"{int(ids.min())} to {int(ids.max())}"
        return f"{operator}: expert_ids is {bounds}; accepted: 0 to moe_expert_num - 1 = {a['moe_expert_num'] - 1}"
    ordered = ids.sort(-1).values
    repeated = torch.nonzero((ordered[:, 1:] == ordered[:, :-1]).any(-1)).flatten()
    if len(repeated):
        row = int(repeated[0])
        return f"{operator}: expert_ids of token {row} is {ids[row].tolist()}; accepted: no expert twice for one token"
    return ""


def _begin(operator: str, refusal: str, a: dict[str, Any], x: torch.Tensor, facts: dict[str, int]) -> Call:
    """Check this rank's values, agree with the others, and return what the call is about.

    Raises:
        ValueError: on every rank when one refuses; the ranks' arguments differ; or T differs while global_bs is 0.
    """
    refusal = refusal or _value_refusal(operator, a)
    group, wrong = resolve(operator, a["group_ep"], a["ep_world_size"], a["ep_rank_id"])
    if group is None:
        raise ValueError("; ".join(text for text in (refusal, wrong) if text))
    ids, global_bs, ep_size = a["expert_ids"], a["global_bs"], a["ep_world_size"]
    everyone = agree(
        operator,
        group,
        AT_DISPATCH if operator == DISPATCH else AT_COMBINE,
        refusal or wrong,
        {
            "own_tokens": len(ids),
            "hidden": x.shape[-1],
            "bytes per element of x": x.element_size(),
            "top_k": ids.shape[-1],
            "moe_expert_num": a["moe_expert_num"],
            "global_bs": global_bs,
            **facts,
        },
    )
    tokens = [row["own_tokens"] for row in everyone]
    if global_bs == 0 and len(set(tokens)) > 1:
        raise ValueError(
            f"{operator}: tokens of the ranks are {tokens} while global_bs is 0; accepted: the same on all ranks, or "
            "global_bs = largest * ep_world_size"
        )
    local_experts = a["moe_expert_num"] // ep_size
    return Call(
        operator=operator,
        group=group,
        rank=a["ep_rank_id"],
        ep_size=ep_size,
        experts=a["moe_expert_num"],
        ids=ids,
        tokens=_active_tokens(a["x_active_mask"], len(ids)),
        max_rows=(global_bs or len(ids) * ep_size) * min(local_experts, ids.shape[1]),
    )


def _quantise(rows: torch.Tensor, smooth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> int8 rows, scale [n, 1]: s = 127 / max|row|, q = round-half-even(row * s), the scale is 1 / s."""
    values = rows.float() if smooth is None else rows.float() * smooth
    largest = values.abs().amax(-1, keepdim=True)
    factor = torch.where(largest == 0, torch.zeros_like(largest), 127.0 / largest)
    return torch.round(values * factor).to(torch.int8), torch.where(largest == 0, largest, 1.0 / factor)


def _send_order(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The (token, k) pairs of the active tokens by expert, then token; with the experts. Each [n] int64."""
    experts = call.ids[: call.tokens].reshape(-1).long()
    slots = torch.sort(experts, stable=True).indices
    return slots // call.top_k, slots % call.top_k, experts[slots]


def _counts_size(call: Call, has_weights: bool) -> int:
    """Length of ep_recv_counts; with expert_scales there is room for what hierarchical combine keeps (not on A5)."""
    size = call.ep_size * call.local_experts
    if has_weights and current_soc() != "A5":
        size += call.max_rows // min(call.local_experts, call.top_k) * 2 * call.top_k * (call.ep_size // SERVER_SIZE)
    return size


def _filled(size: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """``values`` at the front of an otherwise undefined tensor."""
    out = undefined(size, values.dtype)
    out[: len(values)] = values
    return out


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

    A = (global_bs or T * ep) * min(E_local, K). Everything past the received rows is undefined, so are dynamic_scales
    without quantisation. expand_scales is [A] where expert_scales are given, [0] elsewhere.
    """
    if not refusal and (quant_mode not in (NO_QUANT, INT8_PER_TOKEN) or others["y_dtype"] is not None):
        refusal = f"{DISPATCH}: quant_mode is {quant_mode}; the CPU kernel computes only: 0, 2 without y_dtype"
    facts = {"quant_mode": quant_mode, "expert_scales given": int(expert_scales is not None)}
    call = _begin(DISPATCH, refusal, others, x, facts)
    token, k, expert = _send_order(call)
    rows, row_scale = x[token], torch.full((len(token), 1), float("nan"))
    if quant_mode == INT8_PER_TOKEN:
        rows, row_scale = _quantise(rows, None if scales is None else scales[expert])
    weight = (
        torch.full((len(token), 1), float("nan")) if expert_scales is None else expert_scales[token, k].unsqueeze(1)
    )
    triples = torch.stack((torch.full_like(token, call.rank), token, k), dim=1).to(torch.int32)

    send = torch.bincount(expert, minlength=call.experts).reshape(call.ep_size, call.local_experts)
    received = exchange_counts(send, call.group)  # [source rank, local expert]
    splits = send.sum(1).tolist(), received.sum(1).tolist()
    columns = exchange_rows([rows, row_scale, weight, triples], *splits, call.group)
    local = torch.arange(call.local_experts).repeat(call.ep_size).repeat_interleave(received.reshape(-1))
    order = torch.sort(local, stable=True).indices  # from (source, expert) to (expert, source)
    rows, row_scale, weight, triples = (c[order] for c in columns)

    a, tokens_per_expert = call.max_rows, received.sum(0)
    recv_counts = received.t().reshape(-1).cumsum(0).to(torch.int32)
    return (
        _filled((a, x.shape[1]), rows),
        _filled((a,), row_scale.flatten()),
        _filled((max(call.ids.numel(), ASSIST_PER_ROW * a),), triples.reshape(-1)),
        tokens_per_expert.cumsum(0) if expert_token_nums_type == CUMSUM else tokens_per_expert,
        _filled((_counts_size(call, expert_scales is not None),), recv_counts),
        undefined((tp_world_size,), torch.int32),
        torch.empty(0) if expert_scales is None else _filled((a,), weight.flatten()),
    )


def _returned_rows(
    call_facts: tuple[int, int, int], counts: torch.Tensor, assist: torch.Tensor, rows: int
) -> tuple[torch.Tensor, str]:
    """The triples [n, 3] int64 of the rows that this rank received, and what is wrong with them ("" when nothing)."""
    ep_size, local_experts, top_k = call_facts
    ends = counts[: ep_size * local_experts].long()
    sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    if bool((sizes < 0).any()) or int(ends[-1]) > rows:
        return torch.empty(0, TRIPLE, dtype=torch.int64), (
            f"{COMBINE}: ep_send_counts is {ends.tolist()}; accepted: prefix sums that never decrease, up to {rows}"
        )
    triples = assist[: TRIPLE * int(ends[-1])].reshape(-1, TRIPLE).long()
    source = torch.arange(ep_size).repeat(local_experts).repeat_interleave(sizes)
    legal = (triples[:, 0] == source) & (triples[:, 1] >= 0) & (triples[:, 2] >= 0) & (triples[:, 2] < top_k)
    if not bool(legal.all()):
        row = int(torch.nonzero(~legal)[0])
        return triples, (
            f"{COMBINE}: assist_info_for_combine of row {row} is {triples[row].tolist()}; accepted: (source rank "
            f"{int(source[row])}, token, k), as dispatch returned it together with ep_send_counts"
        )
    return triples, ""


def _arrived(call: Call, triples: torch.Tensor, sender: torch.Tensor) -> str:
    """What is wrong with the rows that came back ("" when nothing): each (token, k) once, from its expert's rank."""
    token, k = triples[:, 1], triples[:, 2]
    if bool((token >= call.tokens).any()):
        return f"{COMBINE}: token {int(token.max())} came back; accepted: the {call.tokens} tokens that were sent"
    seen = torch.bincount(token * call.top_k + k, minlength=call.tokens * call.top_k)
    if bool((seen != 1).any()):
        slot = int(torch.nonzero(seen != 1)[0])
        return (
            f"{COMBINE}: token {slot // call.top_k}, k {slot % call.top_k} came back {int(seen[slot])} times; "
            "accepted: once (assist_info_for_combine, ep_send_counts and expert_ids of one dispatch)"
        )
    owner = call.ids[token, k].long() // call.local_experts
    if bool((owner != sender).any()):
        row = int(torch.nonzero(owner != sender)[0])
        return (
            f"{COMBINE}: token {int(token[row])}, k {int(k[row])} came back from rank {int(sender[row])}; accepted: "
            f"rank {int(owner[row])}, which holds its expert (expert_ids differ from those of dispatch?)"
        )
    return ""


def combine_v2(
    refusal: str,
    expand_x: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    shared_expert_x: torch.Tensor | None,
    comm_quant_mode: int,
    **others: Any,
) -> torch.Tensor:
    """rows [A, H] of the experts -> y [T, H]: sum over k of expert_scales[t, k] * row, plus shared_expert_x[t].

    Float32, k ascending, shared expert last with weight 1, rounded once. Rows of masked tokens are undefined. Rows are
    sent where ``assist_info_for_combine`` and ``ep_send_counts`` say; those of another dispatch are refused where they
    cannot be right.
    """
    ep_size, experts, ids = others["ep_world_size"], others["moe_expert_num"], others["expert_ids"]
    if not refusal and comm_quant_mode != 0:
        refusal = f"{COMBINE}: comm_quant_mode is {comm_quant_mode}; the CPU kernel computes only: 0"
    triples = torch.empty(0, TRIPLE, dtype=torch.int64)
    if not refusal:
        sizes = ep_size, experts // ep_size, ids.shape[1]
        triples, refusal = _returned_rows(sizes, ep_send_counts, assist_info_for_combine, len(expand_x))
    call = _begin(COMBINE, refusal, others, expand_x, {})

    back = torch.sort(triples[:, 0], stable=True).indices
    send = torch.bincount(triples[:, 0], minlength=ep_size).reshape(-1, 1)
    received = exchange_counts(send, call.group).flatten()
    columns = [expand_x[: len(triples)][back], triples[back].to(torch.int32)]
    rows, places = exchange_rows(columns, send.flatten().tolist(), received.tolist(), call.group)
    places = places.long()
    wrong = _arrived(call, places, torch.arange(ep_size).repeat_interleave(received))
    agree(COMBINE, call.group, AT_RETURN, wrong, {})

    table = torch.empty(call.tokens, call.top_k, expand_x.shape[1], dtype=expand_x.dtype)
    table[places[:, 1], places[:, 2]] = rows
    total = torch.zeros(call.tokens, expand_x.shape[1], dtype=torch.float32)
    for k in range(call.top_k):
        total += expert_scales[: call.tokens, k : k + 1] * table[:, k].float()
    if shared_expert_x is not None:
        total += shared_expert_x.reshape(len(ids), -1)[: call.tokens].float()
    return _filled((len(ids), expand_x.shape[1]), total.to(expand_x.dtype))


KERNELS: dict[str, Kernel] = {DISPATCH: dispatch_v2, COMBINE: combine_v2}
