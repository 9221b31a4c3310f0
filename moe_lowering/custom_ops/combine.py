"""``combine``: the experts' results back to their tokens, weighted and summed.

Meaning: CANN's ``aclnnMoeDistributeCombineV2``: y = sum over k of weight * row in float32 and the rows of shared-expert
ranks with weight 1, cast once to the dtype of rows. CANN's order, k ascending, is not kept here. Under tensor parallelism y
is complete and the same on all ranks of the TP group.
Source: ops_transformer.combine_kernel: the documentation's formula weighs the shared expert, the kernel does not.
"""

from __future__ import annotations

from typing import Generic

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from moe_lowering.custom_ops.dispatch import check_ids, check_parallel, placement_of
from moe_lowering.custom_ops.dispatch_plan import FEW
from moe_lowering.custom_ops.exchange import (
    Group,
    as_bytes,
    from_bytes,
    gather_numbers,
    gather_rows,
    open_group,
    swap_rows,
)
from moe_lowering.custom_ops.library import Value, check_once, register, schema_of
from moe_lowering.custom_ops.placement import Placement
from moe_lowering.custom_ops.sizes import are_certainly_different, ceil_div, show, token_count, unify
from moe_lowering.custom_ops.token_exchange import own_slice
from moe_lowering.custom_ops.weighted_sum import sum_rows

SLOT_TWICE = "handle names a slot twice; accepted: the handle that dispatch made"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class CombineCall(NamedTuple, Generic[Value]):
    """The arguments of ``combine``.

    rows [R, H] and handle [R, 3] as ``dispatch`` made them, but for what the experts did to the rows; weights [..., k]
    float32, float16 or bfloat16 of the ids [..., k] that were dispatched, which are used in float32. The others: as in
    ``DispatchCall``.
    """

    rows: Value
    weights: Value
    ids: Value
    handle: Value
    mask: Value | None
    num_experts: int
    ep_group: str
    ep_size: int
    tp_group: str
    tp_size: int
    max_tokens: int
    shared_expert_ranks: int = 0
    shared_experts: int = 1
    zero_experts: int = 0

    @property
    def placement(self) -> Placement:
        return placement_of(self)


NAME = "combine"
SCHEMA = schema_of(NAME, CombineCall, "Tensor")


def _check(call: CombineCall[Tensor]) -> None:
    rows, weights, ids, handle = call.rows, call.weights, call.ids, call.handle
    placement = call.placement
    check_parallel(NAME, placement, call.ep_group, call.tp_group, call.tp_size, call.max_tokens)
    check_ids(NAME, ids, call.mask, placement.num_ids)
    if rows.dim() != 2:
        raise ValueError(f"combine: rows has shape {show(rows.shape)}; accepted: [R, hidden]")
    if rows.dtype not in FLOATS:
        raise TypeError(f"combine: rows is {rows.dtype}; accepted: float32, float16, bfloat16")
    if weights.dtype not in FLOATS:
        raise TypeError(f"combine: weights is {weights.dtype}; accepted: float32, float16, bfloat16")
    if are_certainly_different(weights.shape, ids.shape):
        raise ValueError(f"combine: weights has shape {show(weights.shape)}; accepted: that of ids, {show(ids.shape)}")
    if handle.dtype != torch.int32:
        raise TypeError(f"combine: handle is {handle.dtype}; accepted: int32")
    if are_certainly_different(handle.shape, (rows.shape[0], 3)):
        raise ValueError(
            f"combine: handle has shape {show(handle.shape)}; accepted: {show((rows.shape[0], 3))}, one line per row"
        )


def _fake(call: CombineCall[Tensor]) -> Tensor:
    _check(call)
    unify(call.weights.shape, call.ids.shape)
    if call.mask is not None:
        unify(call.mask.shape, call.ids.shape[:-1])
    return call.rows.new_empty((*call.ids.shape[:-1], call.rows.shape[1]))


def _cpu(call: CombineCall[Tensor]) -> Tensor:
    rows, ids, placement = call.rows, call.ids, call.placement
    check_once(_check, call)
    ep = open_group(NAME, "ep", call.ep_group, call.ep_size)
    tp = open_group(NAME, "tp", call.tp_group, call.tp_size)
    tokens, top_k, added = token_count(ids.shape), ids.shape[-1], placement.added
    own_tokens = own_slice(tokens, tp)
    kept = None if call.mask is None else call.mask.reshape(tokens)[own_tokens].nonzero().squeeze(1)
    size = own_tokens.stop - own_tokens.start
    expected = (top_k + added) * (size if kept is None else kept.numel())
    empty = _empty_slots(ids.reshape(tokens, top_k)[own_tokens], call.mask, own_tokens, call)
    expected -= empty.numel()
    if ep.size == tp.size == 1 and kept is None and 0 < top_k * tokens <= FEW and not added and not empty.numel():
        y = _sum_few(rows, call.handle.tolist(), call.weights.reshape(tokens, top_k).float())
        return y.reshape(*ids.shape[:-1], rows.shape[1])
    returned, slots = send_back(NAME, rows, call.handle, top_k + added, expected, ep)
    if empty.numel():
        returned, slots = (
            torch.cat([returned, rows.new_zeros((empty.numel(), rows.shape[1]))]),
            torch.cat([slots, empty]),
        )
    own = call.weights.reshape(tokens, top_k)[own_tokens].float()
    if added:
        own = torch.nn.functional.pad(own, (0, added), value=1.0)
    part = weighted_sum(NAME, returned, slots, own, kept)
    if tp.size > 1:
        short = ceil_div(tokens, tp.size) - size
        part = gather_rows(torch.nn.functional.pad(part, (0, 0, 0, short)), tp)[:tokens]
    return part.reshape(*ids.shape[:-1], rows.shape[1])


def _empty_slots(ids: Tensor, mask: Tensor | None, own_tokens: slice, call: CombineCall[Tensor]) -> Tensor:
    """Slots, token * k + choice, int64, of own tokens that chose an expert that gives nothing."""
    if not call.zero_experts:
        return torch.empty(0, dtype=torch.int64)
    empty = ids >= call.num_experts
    if mask is not None:
        empty &= mask.reshape(-1)[own_tokens].unsqueeze(1)
    return empty.reshape(-1).nonzero().squeeze(1)


def _sum_few(rows: Tensor, handle: list[list[int]], weights: Tensor) -> Tensor:
    """``send_back`` and ``weighted_sum`` on one rank without a mask, with the handle in Python's lists: a decode step has
    few rows, and an operator on the handle takes 3 us or more."""
    tokens, top_k = weights.shape
    used = [line for line in handle if line[0] >= 0]
    _complete(NAME, [len(used)], [tokens * top_k])
    row_of = [-1] * (tokens * top_k)
    for row, (_, token, choice) in enumerate(used):
        row_of[token * top_k + choice] = row
    if min(row_of) < 0:
        raise ValueError(f"{NAME}: {SLOT_TWICE}")
    return sum_rows(rows.index_select(0, torch.tensor(row_of)), weights)


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
    for rank, (rows, expected) in enumerate(zip(back, sent, strict=True)):
        if rows != expected:
            raise ValueError(
                f"{operator}: handle sends {rows} rows to EP rank {rank}, whose ids and mask ask for {expected}; "
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
        raise ValueError(f"{operator}: {SLOT_TWICE}")
    total = sum_rows(rows.index_select(0, row_of.reshape(-1)), weights)
    return total if kept is None else rows.new_zeros((size, rows.shape[1])).index_copy_(0, kept, total)


register(SCHEMA, CombineCall, cpu=_cpu, fake=_fake, side_effect=True)
