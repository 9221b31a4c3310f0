"""``dispatch``: every token to the ranks that hold its experts.

Meaning: CANN's ``aclnnMoeDistributeDispatchV2`` with a row bound known from shapes. Rows are ordered by local expert, source
rank, token; those past the received ones are zero. With shared-expert ranks (``placement``) each token also goes to one
rank of each shared expert, as its choices k, k + 1, ...

The CPU kernel uses two collectives: one that tells every rank what all others send and whether their arguments are
valid (so a mistake on one rank raises on all of them), and one that moves the rows with their metadata.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from moe_lowering.custom_ops.exchange import Group, as_bytes, from_bytes, gather_numbers, open_group, swap_rows
from moe_lowering.custom_ops.library import Value, register, schema_of
from moe_lowering.custom_ops.placement import Placement, check
from moe_lowering.custom_ops.plan import DUPLICATE, OTHER_KIND, OUT_OF_RANGE, Plan, make_plan
from moe_lowering.custom_ops.sizes import ceil_div, differ, known, show, token_count, unify


class DispatchCall(NamedTuple, Generic[Value]):
    """The arguments of ``dispatch``.

    x [..., H], its scales [...] float32 when it is int8; ids [..., k] int32, and mask [...] bool, False for tokens that are
    not sent. ``num_experts`` routed experts on ``ep_size`` ranks, of which ``tp_size`` neighbours have the same tokens.
    ``max_tokens`` bounds T of every rank, 0 says that T is equal on all; ``max_rows`` bounds R, 0 for no bound.
    ``shared_expert_ranks``, ``shared_experts``: see ``placement``; ``on_shared_rank`` says that this rank is one of those.
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

    @property
    def placement(self) -> Placement:
        return Placement(self.num_experts, self.ep_size, self.shared_expert_ranks, self.shared_experts)


NAME = "dispatch"
SCHEMA = schema_of(NAME, DispatchCall, "(Tensor rows, Tensor row_scale, Tensor counts, Tensor handle)")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)

# The fields of what a rank tells the others, before its row counts per expert.
TOKENS, TP_GROUP, FAULT, FAULT_TOKEN, FAULT_ID, TOP_K, WIDTH, DTYPE, FIELDS = range(9)
EQUAL = "max_tokens is 0, which says that T is equal on all ranks"


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


def check_ids(operator: str, ids: Tensor, mask: Tensor | None, num_experts: int) -> None:
    """The rules for ``ids [..., k]`` and ``mask [...]`` that need no data."""
    if ids.dtype != torch.int32:
        raise TypeError(f"{operator}: ids is {ids.dtype}; accepted: int32")
    if ids.dim() < 1 or known(ids.shape[-1] < 1) or known(ids.shape[-1] > num_experts):
        raise ValueError(f"{operator}: ids has shape {show(ids.shape)}; accepted: [..., k], k from 1 to {num_experts}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{operator}: mask is {mask.dtype}; accepted: bool")
    if differ(mask.shape, ids.shape[:-1]):
        raise ValueError(
            f"{operator}: mask has shape {show(mask.shape)}; accepted: {show(ids.shape[:-1])}, one per token"
        )


def _check(call: DispatchCall[Tensor], placement: Placement) -> None:
    x, ids, x_scale = call.x, call.ids, call.x_scale
    check_parallel(NAME, placement, call.ep_group, call.tp_group, call.tp_size, call.max_tokens)
    if call.on_shared_rank and not call.shared_expert_ranks:
        raise ValueError("dispatch: on_shared_rank is True with shared_expert_ranks 0; accepted: False")
    if call.max_rows < 0:
        raise ValueError(f"dispatch: max_rows is {call.max_rows}; accepted: 0 (no cap) or more")
    if x.dim() < 1:
        raise ValueError("dispatch: x has no dimension; accepted: [..., hidden]")
    if x.dtype not in DTYPES:
        raise TypeError(f"dispatch: x is {x.dtype}; accepted: float32, float16, bfloat16, or int8 with x_scale")
    check_ids(NAME, ids, call.mask, call.num_experts)
    lead = x.shape[:-1]
    if differ(ids.shape[:-1], lead):
        raise ValueError(
            f"dispatch: ids has shape {show(ids.shape)}; accepted: [..., k] with x's leading dimensions, {show(lead)}"
        )
    if x_scale is None:
        if x.dtype == torch.int8:
            raise ValueError("dispatch: x is int8 and x_scale is None; accepted: a float32 scale per token")
        return
    if x_scale.dtype != torch.float32:
        raise TypeError(f"dispatch: x_scale is {x_scale.dtype}; accepted: float32")
    if differ(x_scale.shape, lead):
        raise ValueError(f"dispatch: x_scale has shape {show(x_scale.shape)}; accepted: {show(lead)}, one per token")


def _row_bound(call: DispatchCall[Tensor], placement: Placement, on_shared_rank: bool) -> int:
    share = ceil_div(call.max_tokens or token_count(call.x.shape), call.tp_size)
    return placement.row_bound(share, call.ids.shape[-1], call.max_rows, on_shared_rank)


def _fake(call: DispatchCall[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, placement = call.x, call.placement
    _check(call, placement)
    for other in (call.ids.shape[:-1], *(t.shape for t in (call.x_scale, call.mask) if t is not None)):
        unify(other, x.shape[:-1])
    bound = _row_bound(call, placement, call.on_shared_rank)
    local = 1 if call.on_shared_rank else placement.local_experts
    return (
        x.new_empty((bound, x.shape[-1])),
        x.new_empty((0 if call.x_scale is None else bound,), dtype=torch.float32),
        x.new_empty((local,), dtype=torch.int64),
        x.new_empty((bound, 3), dtype=torch.int32),
    )


def _cpu(call: DispatchCall[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, placement = call.x, call.placement
    _check(call, placement)
    ep = open_group(NAME, "ep", call.ep_group, call.ep_size)
    tp = open_group(NAME, "tp", call.tp_group, call.tp_size)
    bounds = _bounds(call, placement)
    received = exchange(NAME, _flat_tokens(call), placement, ep, tp, bounds)
    size = bounds.shared_rows if call.on_shared_rank else bounds.rows
    scale = received.scale if received.scale is not None else x.new_empty((0,), dtype=torch.float32)
    return (
        _pad(received.rows, size, 0),
        scale if call.x_scale is None else _pad(scale, size, 0),
        received.counts,
        _pad(received.handle, size, -1),
    )


def _flat_tokens(call: DispatchCall[Tensor]) -> Tokens:
    """The tokens of a call with one leading dimension, T."""
    lines = token_count(call.x.shape)
    return Tokens(
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


@dataclasses.dataclass(frozen=True)
class Received:
    """What one rank receives: n rows by local expert, source rank, token.

    rows [n, H]; scale [n] float32 or None; counts [E_local] int64; handle [n, 3] int32: source EP rank, token in the
    source's slice, k index.
    """

    rows: Tensor
    scale: Tensor | None
    counts: Tensor
    handle: Tensor


class Tokens(NamedTuple):
    """The tokens of one rank: x [T, H], ids [T, k] int32, x_scale [T] float32 and mask [T] bool where there are any."""

    x: Tensor
    ids: Tensor
    x_scale: Tensor | None = None
    mask: Tensor | None = None

    def part(self, lines: slice) -> Tokens:
        return Tokens(*(None if tensor is None else tensor[lines] for tensor in self))  # type: ignore[arg-type]


class Bounds(NamedTuple):
    """What an exchange was promised, and may not exceed.

    Attributes:
        rows, rows_name: the most rows that a rank with routed experts may receive, and where an error says it is from.
        max_tokens: the most tokens of a rank, 0 for no bound.
        equal_tokens: T is the same on all ranks; a str says why it must be.
        shared_rows, shared_rows_name: as ``rows``, of a shared-expert rank.
        on_shared_rank: this rank was told to be one of those.
    """

    rows: int
    rows_name: str
    max_tokens: int = 0
    equal_tokens: bool | str = False
    shared_rows: int = 0
    shared_rows_name: str = ""
    on_shared_rank: bool = False


def own_slice(tokens: int, tp: Group) -> slice:
    """The tokens that this rank contributes: [j * M, (j + 1) * M) with M = ceil(T / tp_size)."""
    share = ceil_div(tokens, tp.size)
    return slice(min(tp.rank * share, tokens), min((tp.rank + 1) * share, tokens))


def exchange(operator: str, tokens: Tokens, placement: Placement, ep: Group, tp: Group, bounds: Bounds) -> Received:
    """Send this rank's slice of the tokens to the experts that their ids name and receive what the others send here.

    Raises, on all ranks alike:
        ValueError: an id outside [0, num_experts) or twice in one row; T differs although ``bounds.equal_tokens``, is more
            than ``bounds.max_tokens`` (when not 0), or differs within a TP group; ranks disagree about k, H or dtype; a rank
            was told wrongly whether it holds a shared expert.
        RuntimeError: a rank would receive more than ``bounds.rows`` rows; a shared-expert rank more than
            ``bounds.shared_rows``.
    """
    num_experts, shared_ranks = placement.num_experts, placement.shared_expert_ranks
    count, mine = tokens.ids.shape[0], own_slice(tokens.ids.shape[0], tp)
    own = tokens if tp.size == 1 else tokens.part(mine)
    plan = make_plan(own.ids, own.mask, placement, ep.rank, mine.start)
    if bounds.on_shared_rank != (ep.rank < shared_ranks):
        plan = plan.refused(OTHER_KIND)
    if ep.size == 1:
        _bounded(operator, 0, count, bounds.max_tokens)
        _valid(operator, 0, plan.fault, num_experts)
        fits(operator, [plan.slots.numel()], bounds.rows, bounds.rows_name)
        return _keep(own, plan)

    x, scaled = own.x, own.x_scale is not None
    width = x.shape[1] * x.element_size() + 8 + (4 if scaled else 0)
    head = [count, tp.first_global_rank(), *plan.fault, own.ids.shape[1], width, DTYPES.index(x.dtype)]
    everyone = gather_numbers(torch.cat([torch.tensor(head, dtype=torch.int64), plan.counts]), ep)
    agree(operator, everyone[:, :FIELDS].tolist(), num_experts, bounds.max_tokens, bounds.equal_tokens)
    places = everyone[:, FIELDS:]  # [source, place]
    sent = placement.by_rank(places)  # [source, destination]
    received = sent.sum(0).tolist()
    fits(operator, received[:shared_ranks], bounds.shared_rows, bounds.shared_rows_name)
    fits(operator, received[shared_ranks:], bounds.rows, bounds.rows_name, shared_ranks)

    here = _keep(own, plan)
    parts = [as_bytes(here.rows), as_bytes(here.handle[:, 1:])]
    if here.scale is not None:
        parts.append(as_bytes(here.scale.unsqueeze(1)))
    counts = placement.of_rank(places, ep.rank)  # [source, E_local]
    arrived = swap_rows(torch.cat(parts, 1), sent[ep.rank].tolist(), sent[:, ep.rank].tolist(), ep)
    return _sort(arrived, counts, x, scaled=scaled)


def _keep(tokens: Tokens, plan: Plan) -> Received:
    """The planned rows with their handles, before they travel; on one rank that is what it receives."""
    handle = torch.zeros((plan.slots.numel(), 3), dtype=torch.int32)
    handle[:, 1] = plan.token
    handle[:, 2] = plan.slots - plan.token * plan.choices
    scale = None if tokens.x_scale is None else tokens.x_scale.index_select(0, plan.token)
    return Received(tokens.x.index_select(0, plan.token), scale, plan.counts, handle)


def _bounded(operator: str, rank: int, tokens: int, max_tokens: int) -> None:
    if max_tokens and tokens > max_tokens:
        raise ValueError(f"{operator}: T is {tokens} on EP rank {rank}; accepted: at most max_tokens, {max_tokens}")


def _valid(operator: str, rank: int, fault: Sequence[int], num_experts: int) -> None:
    kind, token, expert = fault
    if kind == OUT_OF_RANGE:
        raise ValueError(
            f"{operator}: ids has {expert} for token {token} on EP rank {rank}; accepted: 0 to {num_experts - 1}"
        )
    if kind == OTHER_KIND:
        raise ValueError(
            f"{operator}: on_shared_rank is wrong on EP rank {rank}; accepted: True on the first shared_expert_ranks ranks, "
            "False on the others"
        )
    if kind == DUPLICATE:
        raise ValueError(
            f"{operator}: ids has {expert} twice for token {token} on EP rank {rank}; accepted: distinct ids"
        )


def agree(operator: str, heads: list[list[int]], num_experts: int, max_tokens: int, equal_tokens: bool | str) -> None:
    """Raise, from what all ranks said, the error that all ranks raise; a str says why T must be equal."""
    first: dict[int, int] = {}
    why, remedy = (equal_tokens, "") if isinstance(equal_tokens, str) else (EQUAL, ", or max_tokens as its bound")
    for rank, head in enumerate(heads):
        tokens = head[TOKENS]
        if head[TOP_K:FIELDS] != heads[0][TOP_K:FIELDS]:
            raise ValueError(f"{operator}: EP ranks 0 and {rank} were given different k, hidden sizes or dtypes")
        if equal_tokens and tokens != heads[0][TOKENS]:
            raise ValueError(
                f"{operator}: {why}, but T is {heads[0][TOKENS]} on EP rank 0 and {tokens} on EP rank {rank}; accepted: "
                f"equal T{remedy}"
            )
        _bounded(operator, rank, tokens, max_tokens)
        if head[TP_GROUP] >= 0 and tokens != first.setdefault(head[TP_GROUP], tokens):
            raise ValueError(
                f"{operator}: T is {tokens} on EP rank {rank} and {first[head[TP_GROUP]]} on another rank of its TP "
                "group; accepted: the same tokens on all ranks of a TP group"
            )
        _valid(operator, rank, head[FAULT : FAULT + 3], num_experts)


def fits(operator: str, received: list[int], limit: int, limit_name: str, first: int = 0) -> None:
    """Raise when a rank, of which ``first`` is the first one's index, would receive more than ``limit`` rows."""
    for rank, rows in enumerate(received, first):
        if rows > limit:
            raise RuntimeError(f"{operator}: EP rank {rank} would receive {rows} rows; accepted: at most {limit_name}")


def _sort(arrived: Tensor, counts: Tensor, x: Tensor, *, scaled: bool) -> Received:
    """Rows as they arrive (by source, local expert, token) to the order of the contract."""
    sources, local = counts.shape
    blocks = counts.reshape(-1)
    expert = torch.arange(local).repeat(sources).repeat_interleave(blocks)
    source = torch.arange(sources, dtype=torch.int32).repeat_interleave(counts.sum(1))
    order = torch.sort(expert, stable=True).indices
    arrived = arrived.index_select(0, order)
    width = x.shape[1] * x.element_size()
    place = from_bytes(arrived[:, width : width + 8], torch.int32)
    return Received(
        from_bytes(arrived[:, :width], x.dtype),
        from_bytes(arrived[:, width + 8 :], torch.float32).squeeze(1) if scaled else None,
        counts.sum(0),
        torch.cat([source[order].unsqueeze(1), place], 1),
    )


register(SCHEMA, DispatchCall, cpu=_cpu, fake=_fake, side_effect=True)
