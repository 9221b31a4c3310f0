"""``dispatch``: every token to the ranks that hold its experts.

Meaning: CANN's ``aclnnMoeDistributeDispatchV2`` with a row bound known from shapes. Rows are ordered by local expert, source
rank, token; those past the received ones are zero. With shared-expert ranks (``placement``) each token also goes to one
rank of each shared expert, as its choices k, k + 1, ...

The CPU kernel is ``token_exchange``.
"""

from __future__ import annotations

from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from moe_lowering.custom_ops.exchange import open_group
from moe_lowering.custom_ops.library import Value, check_once, register, schema_of
from moe_lowering.custom_ops.placement import Placement, check
from moe_lowering.custom_ops.quantised import quantise_rows
from moe_lowering.custom_ops.row_factors import check_factors
from moe_lowering.custom_ops.sizes import are_certainly_different, ceil_div, is_known, show, token_count, unify
from moe_lowering.custom_ops.token_exchange import DTYPES, Bounds, TokenBatch, exchange


class DispatchCall(NamedTuple, Generic[Value]):
    """The arguments of ``dispatch``.

    x [..., H], its scales [...] float32 when it is int8; ids [..., k] int32, and mask [...] bool, False for tokens that are
    not sent. ``num_experts`` routed experts on ``ep_size`` ranks, of which ``tp_size`` neighbours have the same tokens.
    ``max_tokens`` bounds T of every rank, 0 says that T is equal on all; ``max_rows`` bounds R, 0 for no bound.
    ``shared_expert_ranks``, ``shared_experts``: see ``placement``; ``on_shared_rank`` says that this rank is one of those.
    ``x_smooth`` [num_experts, H] float32: each row is multiplied by that of its expert, in float32, and arrives as int8 with a
    scale. Source: ops_transformer.dispatch: scales of quantMode 2.
    ``zero_experts``: ids from num_experts on, that many, are experts that give nothing: no row is sent for them.
    Source: op_plugin.dispatch: zero_expert_num.
    """

    x: Value
    x_scale: Value | None
    ids: Value
    mask: Value | None
    num_experts: int
    ep_group: str
    ep_size: int
    tp_group: str
    tp_size: int
    max_tokens: int
    max_rows: int
    shared_expert_ranks: int = 0
    shared_experts: int = 1
    on_shared_rank: bool = False
    x_smooth: Value | None = None
    zero_experts: int = 0

    @property
    def placement(self) -> Placement:
        return placement_of(self)


NAME = "dispatch"
SCHEMA = schema_of(NAME, DispatchCall, "(Tensor rows, Tensor row_scale, Tensor counts, Tensor handle)")


def placement_of(call: Any) -> Placement:
    """Where the experts of a call of ``dispatch`` or ``combine`` live."""
    return Placement(
        call.num_experts, call.ep_size, call.shared_expert_ranks, call.shared_experts, zero_experts=call.zero_experts
    )


def check_parallel(
    operator: str,
    placement: Placement,
    ep_group: str,
    tp_group: str,
    tp_size: int,
    max_tokens: int,
) -> None:
    """The rules for the arguments that a deployment fixes, shared by ``dispatch`` and ``combine``."""
    check(operator, placement)
    ep_size = placement.ep_size
    if tp_size < 1 or ep_size % tp_size:
        raise ValueError(f"{operator}: tp_size is {tp_size}; accepted: a divisor of ep_size, {ep_size}")
    for name, group, size in (("ep_group", ep_group, ep_size), ("tp_group", tp_group, tp_size)):
        if size > 1 and not group:
            raise ValueError(f"{operator}: {name} is '' for {size} ranks; accepted: the name of a process group")
    if max_tokens < 0:
        raise ValueError(f"{operator}: max_tokens is {max_tokens}; accepted: 0 (T is equal on all ranks) or more")


def check_ids(operator: str, ids: Tensor, mask: Tensor | None, num_ids: int) -> None:
    """The rules for ``ids [..., k]`` from 0 to ``num_ids`` - 1, and ``mask [...]``, that need no data."""
    if ids.dtype != torch.int32:
        raise TypeError(f"{operator}: ids is {ids.dtype}; accepted: int32")
    if ids.dim() < 1 or is_known(ids.shape[-1] < 1) or is_known(ids.shape[-1] > num_ids):
        raise ValueError(f"{operator}: ids has shape {show(ids.shape)}; accepted: [..., k], k from 1 to {num_ids}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{operator}: mask is {mask.dtype}; accepted: bool")
    if are_certainly_different(mask.shape, ids.shape[:-1]):
        raise ValueError(
            f"{operator}: mask has shape {show(mask.shape)}; accepted: {show(ids.shape[:-1])}, one per token"
        )


def _check(call: DispatchCall[Tensor]) -> None:
    x, ids, x_scale, placement = call.x, call.ids, call.x_scale, call.placement
    check_parallel(NAME, placement, call.ep_group, call.tp_group, call.tp_size, call.max_tokens)
    if call.on_shared_rank and not call.shared_expert_ranks:
        raise ValueError("dispatch: on_shared_rank is True with shared_expert_ranks 0; accepted: False")
    if call.max_rows < 0:
        raise ValueError(f"dispatch: max_rows is {call.max_rows}; accepted: 0 (no cap) or more")
    if x.dim() < 1:
        raise ValueError("dispatch: x has no dimension; accepted: [..., hidden]")
    if x.dtype not in DTYPES:
        raise TypeError(f"dispatch: x is {x.dtype}; accepted: float32, float16, bfloat16, or int8 with x_scale")
    check_ids(NAME, ids, call.mask, placement.num_ids)
    _check_factors(call)
    lead = x.shape[:-1]
    if are_certainly_different(ids.shape[:-1], lead):
        raise ValueError(
            f"dispatch: ids has shape {show(ids.shape)}; accepted: [..., k] with x's leading dimensions, {show(lead)}"
        )
    if x_scale is None:
        if x.dtype == torch.int8:
            raise ValueError("dispatch: x is int8 and x_scale is None; accepted: a float32 scale per token")
        return
    if x_scale.dtype != torch.float32:
        raise TypeError(f"dispatch: x_scale is {x_scale.dtype}; accepted: float32")
    if are_certainly_different(x_scale.shape, lead):
        raise ValueError(f"dispatch: x_scale has shape {show(x_scale.shape)}; accepted: {show(lead)}, one per token")


def _check_factors(call: DispatchCall[Tensor]) -> None:
    x, smooth = call.x, call.x_smooth
    if smooth is None:
        return
    if x.dtype == torch.int8 or call.x_scale is not None:
        raise ValueError(
            "dispatch: x_smooth is given for tokens that are int8 already; accepted: tokens of floats without x_scale"
        )
    if call.shared_expert_ranks:
        raise ValueError(
            f"dispatch: x_smooth is given with shared_expert_ranks {call.shared_expert_ranks}; accepted: 0, since no form "
            "of shared experts' scales is known"
        )
    check_factors(NAME, "x_smooth", smooth, (call.num_experts, x.shape[-1]), "[experts, H]")


def _row_bound(call: DispatchCall[Tensor], placement: Placement, on_shared_rank: bool) -> int:
    tokens = ceil_div(call.max_tokens or token_count(call.x.shape), call.tp_size)
    return placement.row_bound(tokens, call.ids.shape[-1], call.max_rows, on_shared_rank)


def _fake(call: DispatchCall[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, placement = call.x, call.placement
    _check(call)
    for other in (call.ids.shape[:-1], *(t.shape for t in (call.x_scale, call.mask) if t is not None)):
        unify(other, x.shape[:-1])
    bound = _row_bound(call, placement, call.on_shared_rank)
    local = 1 if call.on_shared_rank else placement.local_experts
    scaled = call.x_scale is not None or call.x_smooth is not None
    return (
        x.new_empty((bound, x.shape[-1]), dtype=x.dtype if call.x_smooth is None else torch.int8),
        x.new_empty((bound if scaled else 0,), dtype=torch.float32),
        x.new_empty((local,), dtype=torch.int64),
        x.new_empty((bound, 3), dtype=torch.int32),
    )


def _cpu(call: DispatchCall[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, placement = call.x, call.placement
    check_once(_check, call)
    ep = open_group(NAME, "ep", call.ep_group, call.ep_size)
    tp = open_group(NAME, "tp", call.tp_group, call.tp_size)
    bounds = _bounds(call, placement)
    received = exchange(NAME, _flat_tokens(call), placement, ep, tp, bounds)
    size = bounds.shared_rows if call.on_shared_rank else bounds.rows
    rows, scale = received.rows, received.scale
    if call.x_smooth is not None:
        rows, scale = _smooth_rows(rows, received.counts, call.x_smooth, ep.rank)
    return (
        _pad(rows, size, 0),
        x.new_empty((0,), dtype=torch.float32) if scale is None else _pad(scale, size, 0),
        received.counts,
        _pad(received.handle, size, -1),
    )


def _smooth_rows(rows: Tensor, counts: Tensor, smooth: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of this rank's experts, times each one's line of ``smooth`` [num_experts, H], as int8 with a scale each.

    Each row is quantised by itself, so that it is the same here as before it was sent.
    """
    first = rank * len(counts)
    own = smooth[first : first + len(counts)].repeat_interleave(counts, 0)
    return quantise_rows(rows.float() * own)


def _flat_tokens(call: DispatchCall[Tensor]) -> TokenBatch:
    """The tokens of a call with one leading dimension, T."""
    lines = token_count(call.x.shape)
    return TokenBatch(
        call.x.reshape(lines, call.x.shape[-1]),
        call.ids.reshape(lines, call.ids.shape[-1]),
        None if call.x_scale is None else call.x_scale.reshape(lines),
        None if call.mask is None else call.mask.reshape(lines),
    )


def _bounds(call: DispatchCall[Tensor], placement: Placement) -> Bounds:
    rows = _row_bound(call, placement, False)
    shared_rows = _row_bound(call, placement, True) if call.shared_expert_ranks else 0
    cap = f" (max_rows is {call.max_rows})" if call.max_rows else ""
    return Bounds(
        rows=rows,
        rows_name=f"R = {rows}{cap}",
        max_tokens=call.max_tokens,
        equal_tokens=not call.max_tokens,
        shared_rows=shared_rows,
        shared_rows_name=f"R = {shared_rows} of a shared-expert rank{cap}",
        on_shared_rank=call.on_shared_rank,
    )


def _pad(rows: Tensor, size: int, fill: int) -> Tensor:
    if rows.shape[0] == size:
        return rows
    padded = rows.new_empty((size, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    padded[rows.shape[0] :] = fill
    return padded


register(SCHEMA, DispatchCall, cpu=_cpu, fake=_fake, side_effect=True)
