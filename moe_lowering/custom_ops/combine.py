"""``combine``: the experts' results back to their tokens, weighted and summed.

Meaning: CANN's ``aclnnMoeDistributeCombineV2``: y = sum over k, ascending, of weight * row in float32, then the rows of
shared-expert ranks with weight 1, cast once to the dtype of rows. Under tensor parallelism y is complete and the same on
all ranks of the TP group.
Source: ops_transformer.combine_kernel: the documentation's formula weighs the shared expert, the kernel does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lowering.custom_ops.dispatch import check_ids, check_parallel, own_slice
from moe_lowering.custom_ops.exchange import (
    Group,
    as_bytes,
    from_bytes,
    gather_numbers,
    gather_rows,
    open_group,
    swap_rows,
)
from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.placement import Placement
from moe_lowering.custom_ops.sizes import ceil_div, differ, show, token_count, unify

SCHEMA = (
    "combine(Tensor rows, Tensor weights, Tensor ids, Tensor handle, Tensor? mask, int num_experts, str ep_group, "
    "int ep_size, str tp_group, int tp_size, int max_tokens, int shared_expert_ranks=0, int shared_experts=1) -> Tensor"
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check(
    rows: Tensor,
    weights: Tensor,
    ids: Tensor,
    handle: Tensor,
    mask: Tensor | None,
    num_experts: int,
    ep_group: str,
    ep_size: int,
    tp_group: str,
    tp_size: int,
    max_tokens: int,
    shared_expert_ranks: int = 0,
    shared_experts: int = 1,
) -> None:
    placement = Placement(num_experts, ep_size, shared_expert_ranks, shared_experts)
    check_parallel("combine", placement, ep_group, tp_group, tp_size, max_tokens)
    check_ids("combine", ids, mask, num_experts)
    if rows.dim() != 2:
        raise ValueError(f"combine: rows has shape {show(rows.shape)}; accepted: [R, hidden]")
    if rows.dtype not in FLOATS:
        raise TypeError(f"combine: rows is {rows.dtype}; accepted: float32, float16, bfloat16")
    if weights.dtype != torch.float32:
        raise TypeError(f"combine: weights is {weights.dtype}; accepted: float32")
    if differ(weights.shape, ids.shape):
        raise ValueError(f"combine: weights has shape {show(weights.shape)}; accepted: that of ids, {show(ids.shape)}")
    if handle.dtype != torch.int32:
        raise TypeError(f"combine: handle is {handle.dtype}; accepted: int32")
    if differ(handle.shape, (rows.shape[0], 3)):
        raise ValueError(
            f"combine: handle has shape {show(handle.shape)}; accepted: {show((rows.shape[0], 3))}, one line per row"
        )


def _fake(
    rows: Tensor,
    weights: Tensor,
    ids: Tensor,
    handle: Tensor,
    mask: Tensor | None,
    num_experts: int,
    ep_group: str,
    ep_size: int,
    tp_group: str,
    tp_size: int,
    max_tokens: int,
    shared_expert_ranks: int = 0,
    shared_experts: int = 1,
) -> Tensor:
    _check(
        rows, weights, ids, handle, mask, num_experts, ep_group, ep_size, tp_group, tp_size, max_tokens, shared_expert_ranks,
        shared_experts,
    )  # fmt: skip
    unify(weights.shape, ids.shape)
    if mask is not None:
        unify(mask.shape, ids.shape[:-1])
    return rows.new_empty((*ids.shape[:-1], rows.shape[1]))


def _cpu(
    rows: Tensor,
    weights: Tensor,
    ids: Tensor,
    handle: Tensor,
    mask: Tensor | None,
    num_experts: int,
    ep_group: str,
    ep_size: int,
    tp_group: str,
    tp_size: int,
    max_tokens: int,
    shared_expert_ranks: int = 0,
    shared_experts: int = 1,
) -> Tensor:
    _check(
        rows, weights, ids, handle, mask, num_experts, ep_group, ep_size, tp_group, tp_size, max_tokens, shared_expert_ranks,
        shared_experts,
    )  # fmt: skip
    ep = open_group("combine", "ep", ep_group, ep_size)
    tp = open_group("combine", "tp", tp_group, tp_size)
    tokens, top_k = token_count(ids.shape), ids.shape[-1]
    mine = own_slice(tokens, tp)
    kept = None if mask is None else mask.reshape(tokens)[mine].nonzero().squeeze(1)
    size = mine.stop - mine.start
    added = Placement(num_experts, ep_size, shared_expert_ranks, shared_experts).added
    expected = (top_k + added) * (size if kept is None else kept.numel())
    returned, slots = send_back("combine", rows, handle, top_k + added, expected, ep)
    own = weights.reshape(tokens, top_k)[mine]
    if added:
        own = torch.nn.functional.pad(own, (0, added), value=1.0)
    part = weighted_sum("combine", returned, slots, own, kept)
    if tp.size > 1:
        short = ceil_div(tokens, tp.size) - size
        part = gather_rows(torch.nn.functional.pad(part, (0, 0, 0, short)), tp)[:tokens]
    return part.reshape(*ids.shape[:-1], rows.shape[1])


def send_back(
    operator: str, rows: Tensor, handle: Tensor, top_k: int, expected: int, ep: Group
) -> tuple[Tensor, Tensor]:
    """Every received row to the rank that it came from.

    Args:
        expected: how many rows this rank sent out.

    Returns:
        The rows of this rank's tokens [expected, H], and the slot of each: token * k + choice, int64.

    Raises:
        ValueError: on all ranks alike, when a rank would not get as many rows as it sent.
    """
    received = int((handle[:, 0] >= 0).sum())
    handle, rows = handle[:received], rows[:received]
    if ep.size == 1:
        _complete(operator, [received], [expected])
        return rows, handle[:, 1].long() * top_k + handle[:, 2]
    source, order = torch.sort(handle[:, 0], stable=True)
    sources = torch.bincount(source, minlength=ep.size)
    everyone = gather_numbers(torch.cat([sources, torch.tensor([expected])]), ep)
    _complete(operator, everyone[:, :-1].sum(0).tolist(), everyone[:, -1].tolist())
    raw = torch.cat([as_bytes(rows), as_bytes(handle[:, 1:])], 1).index_select(0, order)
    raw = swap_rows(raw, sources.tolist(), everyone[:, ep.rank].tolist(), ep)
    place = from_bytes(raw[:, -8:], torch.int32)
    return from_bytes(raw[:, :-8], rows.dtype), place[:, 0].long() * top_k + place[:, 1]


def _complete(operator: str, back: list[int], sent: list[int]) -> None:
    for rank, (rows, wanted) in enumerate(zip(back, sent, strict=True)):
        if rows != wanted:
            raise ValueError(
                f"{operator}: handle sends {rows} rows to EP rank {rank}, whose ids and mask ask for {wanted}; "
                "accepted: the handle that dispatch made from the same ids and mask"
            )


def weighted_sum(operator: str, rows: Tensor, slots: Tensor, weights: Tensor, kept: Tensor | None) -> Tensor:
    """y [m, H]: for each token the sum over k of ``weights [m, k]`` times its rows; zero for tokens not in ``kept``."""
    size, top_k = weights.shape
    row_of = torch.full((size * top_k,), -1, dtype=torch.int64)
    row_of[slots] = torch.arange(slots.numel())
    row_of = row_of.view(size, top_k)
    if kept is not None:
        row_of, weights = row_of[kept], weights[kept]
    if row_of.numel() and int(row_of.min()) < 0:
        raise ValueError(f"{operator}: handle names a slot twice; accepted: the handle that dispatch made")
    total = torch.zeros((row_of.shape[0], rows.shape[1]), dtype=torch.float32)
    for index, weight in zip(row_of.unbind(1), weights.unsqueeze(2).unbind(1), strict=True):
        total.addcmul_(rows.index_select(0, index).float(), weight)
    if kept is None:
        return total.to(rows.dtype)
    return rows.new_zeros((size, rows.shape[1])).index_copy_(0, kept, total.to(rows.dtype))


register(SCHEMA, cpu=_cpu, fake=_fake, side_effect=True)
