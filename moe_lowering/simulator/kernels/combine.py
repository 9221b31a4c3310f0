"""npu_moe_distribute_combine_v2 over a torch.distributed process group.

Meaning: aclnnMoeDistributeCombineV2 and op-plugin's documentation and reference. Quantised communication: the device code
of ops-transformer (moe_distribute_combine_v2.h, Int8QuantProcess) has one scale for eight values, max / 127, which travels
in the dtype of the rows.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.simulator.kernels.common import current_soc, make_undefined
from moe_lowering.simulator.kernels.distribute_call import AT_RETURN, COMBINE, DistributeCall, begin_call
from moe_lowering.simulator.kernels.exchange import agree, exchange_counts, exchange_rows
from moe_lowering.simulator.kernels.special_experts import special_refusal, special_results
from moe_lowering.vocabulary import SOCS

TRIPLE = 3  # int32 values per row in assist_info: source rank, token, k
INT8_BLOCKS = 2  # comm_quant_mode
BLOCK = 8  # values that share a scale
INT8_MAX = 127.0


def _returned_rows(
    call_facts: tuple[int, int, range], counts: torch.Tensor, assist: torch.Tensor, rows: int
) -> tuple[torch.Tensor, str]:
    """The triples [n, 3] int64 of the rows that this rank received, and what is wrong with them ("" when nothing).

    ``call_facts``: ranks, experts of this rank, and the k that its rows may have.
    """
    ep_size, local_experts, choices = call_facts
    ends = counts[: ep_size * local_experts].long()
    sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    if bool((sizes < 0).any()) or int(ends[-1]) > rows:
        return torch.empty(0, TRIPLE, dtype=torch.int64), (
            f"{COMBINE}: ep_send_counts is {ends.tolist()}; accepted: prefix sums that never decrease, up to {rows}"
        )
    triples = assist[: TRIPLE * int(ends[-1])].reshape(-1, TRIPLE).long()
    source = torch.arange(ep_size).repeat(local_experts).repeat_interleave(sizes)
    k = triples[:, 2]
    legal = (triples[:, 0] == source) & (triples[:, 1] >= 0) & (k >= choices.start) & (k < choices.stop)
    if not bool(legal.all()):
        row = int(torch.nonzero(~legal)[0])
        return triples, (
            f"{COMBINE}: assist_info_for_combine of row {row} is {triples[row].tolist()}; accepted: (source rank "
            f"{int(source[row])}, token, k), as dispatch returned it together with ep_send_counts"
        )
    return triples, ""


def _check_arrival(call: DistributeCall, triples: torch.Tensor, sender: torch.Tensor) -> str:
    """What is wrong with the rows that came back ("" when nothing): each (token, k) once, from its expert's rank."""
    token, k = triples[:, 1], triples[:, 2]
    if bool((token >= len(call.ids)).any()):
        return f"{COMBINE}: token {int(token.max())} came back; accepted: the {len(call.ids)} tokens that were sent"
    expected = torch.cat([call.sent, call.active.unsqueeze(1).expand(-1, call.shared_experts)], 1)  # [T, K + shared]
    width = expected.shape[1]
    actual = torch.bincount(token * width + k, minlength=expected.numel())
    wrong = torch.nonzero(actual != expected.reshape(-1).long()).flatten()
    if len(wrong):
        slot = int(wrong[0])
        accepted = "once" if bool(expected.reshape(-1)[slot]) else "never, it is masked"
        return (
            f"{COMBINE}: token {slot // width}, k {slot % width} came back {int(actual[slot])} times; "
            f"accepted: {accepted} (assist_info_for_combine, ep_send_counts, expert_ids and mask of one dispatch)"
        )
    owner = call.shared_rank(torch.full_like(token, call.rank), k - call.top_k)
    routed = k < call.top_k
    owner[routed] = call.shared_ranks + call.ids[token[routed], k[routed]].long() // call.routed_experts
    if bool((owner != sender).any()):
        row = int(torch.nonzero(owner != sender)[0])
        return (
            f"{COMBINE}: token {int(token[row])}, k {int(k[row])} came back from rank {int(sender[row])}; accepted: "
            f"rank {int(owner[row])}, which holds its expert (expert_ids differ from those of dispatch?)"
        )
    return ""


def _check_weights(places: torch.Tensor, carried: torch.Tensor, weights: torch.Tensor) -> str:
    """What is wrong with the weights that dispatch sent along: hierarchical sums use them instead of expert_scales."""
    own = weights[places[:, 1], places[:, 2]]
    differ = torch.nonzero(carried != own).flatten()
    if not len(differ):
        return ""
    row = int(differ[0])
    return (
        f"{COMBINE}: expand_scales of token {int(places[row, 1])}, k {int(places[row, 2])} is {carried[row].item():g}; "
        f"accepted: its expert_scales, {own[row].item():g} (dispatch and combine take the same)"
    )


def _round_to_int8(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, H] as they arrive when they travel as int8 with one scale for eight values, in their own dtype."""
    hidden = rows.shape[1]
    blocks = torch.nn.functional.pad(rows.float(), (0, -hidden % BLOCK)).reshape(len(rows), -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / INT8_MAX
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = torch.round((blocks / divisor).half().float())
    return (values * scale.to(rows.dtype).float()).to(rows.dtype).flatten(1)[:, :hidden]


def _refusal(
    comm_quant_mode: int, comm_alg: str, needs_weights: bool, expand_scales: torch.Tensor | None, n: int
) -> str:
    simulated = comm_quant_mode == 0 or (
        comm_quant_mode == INT8_BLOCKS and current_soc() == "A3" and comm_alg != "hierarchy"
    )
    if not simulated:
        return (
            f"{COMBINE}: comm_quant_mode is {comm_quant_mode} on {current_soc()} with comm_alg {comm_alg!r}; the CPU kernel "
            "computes only: 0, or 2 on A3 without hierarchy"
        )
    if needs_weights and expand_scales is not None and expand_scales.numel() < n:
        return f"{COMBINE}: expand_scales has {expand_scales.numel()} values; accepted: one for each of the {n} rows received"
    return ""


def combine_v2(
    refusal: str,
    expand_x: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    shared_expert_x: torch.Tensor | None,
    expand_scales: torch.Tensor | None,
    comm_quant_mode: int,
    **others: Any,
) -> torch.Tensor:
    """rows [A, H] of the experts -> y [T, H]: sum over k of expert_scales[t, k] * row, plus the rows of shared-expert ranks,
    plus shared_expert_x[t].

    Float32, k ascending, shared experts last with weight 1, rounded once; zero, copy and const experts give what
    ``special_experts`` says. Masked (token, k) pairs are left out; a token
    that has no other is undefined. Rows are sent where ``assist_info_for_combine`` and ``ep_send_counts`` say; those of
    another dispatch are refused where they cannot be right. expand_scales (A2, hierarchy) must be expert_scales as
    dispatch got them. comm_quant_mode 2: rows travel as int8.
    """
    ep_size, ids = others["ep_world_size"], others["expert_ids"]
    triples = torch.empty(0, TRIPLE, dtype=torch.int64)
    if not refusal:
        sizes = ep_size, *_own_experts(others)
        triples, refusal = _returned_rows(sizes, ep_send_counts, assist_info_for_combine, len(expand_x))
    weighs = SOCS[current_soc()].weighs_before_sending or others["comm_alg"] == "hierarchy"
    refusal = refusal or _refusal(comm_quant_mode, others["comm_alg"], weighs, expand_scales, len(triples))
    refusal = refusal or special_refusal(COMBINE, others, expand_x)
    call = begin_call(COMBINE, refusal, others, expand_x, {"comm_quant_mode": comm_quant_mode})

    back = torch.sort(triples[:, 0], stable=True).indices
    send = torch.bincount(triples[:, 0], minlength=ep_size).reshape(-1, 1)
    received = exchange_counts(send, call.group).flatten()
    sent_rows = expand_x[: len(triples)][back]
    if comm_quant_mode == INT8_BLOCKS:
        sent_rows = _round_to_int8(sent_rows)
    carried = torch.zeros(len(back), 1)
    if weighs and expand_scales is not None:
        carried = expand_scales[: len(triples)][back].unsqueeze(1)
    columns = [sent_rows, triples[back].to(torch.int32), carried]
    rows, places, carried = exchange_rows(columns, send.flatten().tolist(), received.tolist(), call.group)
    places = places.long()
    wrong = _check_arrival(call, places, torch.arange(ep_size).repeat_interleave(received))
    wrong = wrong or (_check_weights(places, carried.flatten(), expert_scales) if weighs else "")
    agree(COMBINE, call.group, AT_RETURN, wrong, {})

    shared = None if shared_expert_x is None else shared_expert_x.reshape(len(ids), -1)
    return _sum_rows(call, rows, places, expert_scales, shared, special_results(others, ids))


def _own_experts(a: dict[str, Any]) -> tuple[int, range]:
    """Experts of this rank, and the k that rows of its experts may have."""
    shared_ranks, top_k = a["shared_expert_rank_num"], a["expert_ids"].shape[1]
    if a["ep_rank_id"] < shared_ranks:
        return 1, range(top_k, top_k + a["shared_expert_num"])
    return a["moe_expert_num"] // (a["ep_world_size"] - shared_ranks), range(top_k)


def _sum_rows(
    call: DistributeCall,
    rows: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    special: list[torch.Tensor],
) -> torch.Tensor:
    """y [T, H] from the rows that came back and their (source rank, token, k); ``special``: by k what experts give that no row
    was sent for."""
    hidden = rows.shape[1]
    table = torch.zeros(len(call.ids), call.top_k + call.shared_experts, hidden, dtype=rows.dtype)
    table[places[:, 1], places[:, 2]] = rows
    total = torch.zeros(len(call.ids), hidden)
    for k in range(call.top_k):
        given = (
            torch.where(call.sent[:, k : k + 1], table[:, k].float(), special[k]) if special else table[:, k].float()
        )
        total += torch.where(call.chosen[:, k : k + 1], weights[:, k : k + 1] * given, 0.0)
    for k in range(call.top_k, table.shape[1]):
        total += table[:, k].float()
    if shared is not None:
        total += shared.float()
    y = make_undefined(total.shape, rows.dtype)
    y[call.active] = total[call.active].to(rows.dtype)
    return y
