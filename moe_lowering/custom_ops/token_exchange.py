"""Tokens to the ranks that hold their experts over a process group: what the CPU kernels of ``dispatch``, ``alltoall_experts``
and the fused operators share.

Two collectives: one that tells every rank what all others send and whether their arguments are valid (so a mistake on one
rank raises on all of them), and one that moves the rows with their metadata. Rows arrive in the order of ``dispatch``'s
contract: by local expert, source rank, token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lowering.custom_ops.dispatch_plan import DUPLICATE, OTHER_KIND, OUT_OF_RANGE, DispatchPlan, make_plan
from moe_lowering.custom_ops.exchange import Group, as_bytes, from_bytes, gather_numbers, swap_rows
from moe_lowering.custom_ops.placement import Placement
from moe_lowering.custom_ops.sizes import ceil_div

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)

# The fields of what a rank tells the others, before its row counts per expert.
TOKENS, TP_GROUP, FAULT, FAULT_TOKEN, FAULT_ID, TOP_K, WIDTH, DTYPE, FIELDS = range(9)
EQUAL = "max_tokens is 0, which says that T is equal on all ranks"


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


class TokenBatch(NamedTuple):
    """The tokens of one rank: x [T, H], ids [T, k] int32, x_scale [T] float32 and mask [T] bool where there are any."""

    x: Tensor
    ids: Tensor
    x_scale: Tensor | None = None
    mask: Tensor | None = None

    def part(self, lines: slice) -> TokenBatch:
        scale, mask = (None if tensor is None else tensor[lines] for tensor in (self.x_scale, self.mask))
        return TokenBatch(self.x[lines], self.ids[lines], scale, mask)


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
    per_rank = ceil_div(tokens, tp.size)
    return slice(min(tp.rank * per_rank, tokens), min((tp.rank + 1) * per_rank, tokens))


def exchange(operator: str, tokens: TokenBatch, placement: Placement, ep: Group, tp: Group, bounds: Bounds) -> Received:
    """Send this rank's slice of the tokens to the experts that their ids name and receive what the others send here.

    Raises, on all ranks alike:
        ValueError: an id outside [0, placement.num_ids) or twice in one row; T differs although ``bounds.equal_tokens``, is more
            than ``bounds.max_tokens`` (when not 0), or differs within a TP group; ranks disagree about k, H or dtype; a rank
            was told wrongly whether it holds a shared expert.
        RuntimeError: a rank would receive more than ``bounds.rows`` rows; a shared-expert rank more than
            ``bounds.shared_rows``.
    """
    num_ids, shared_ranks = placement.num_ids, placement.shared_expert_ranks
    count, lines = tokens.ids.shape[0], own_slice(tokens.ids.shape[0], tp)
    own = tokens if tp.size == 1 else tokens.part(lines)
    plan = make_plan(own.ids, own.mask, placement, ep.rank, lines.start)
    if bounds.on_shared_rank != (ep.rank < shared_ranks):
        plan = plan.refused(OTHER_KIND)
    if ep.size == 1:
        _check_bound(operator, 0, count, bounds.max_tokens)
        _check_ids(operator, 0, plan.fault, num_ids)
        fits(operator, [plan.slots.numel()], bounds.rows, bounds.rows_name)
        return _keep(own, plan)

    x, scaled = own.x, own.x_scale is not None
    width = x.shape[1] * x.element_size() + 8 + (4 if scaled else 0)
    head = [count, tp.first_global_rank(), *plan.fault, own.ids.shape[1], width, DTYPES.index(x.dtype)]
    everyone = gather_numbers(torch.cat([torch.tensor(head, dtype=torch.int64), plan.counts]), ep)
    agree(operator, everyone[:, :FIELDS].tolist(), num_ids, bounds.max_tokens, bounds.equal_tokens)
    places = everyone[:, FIELDS:]  # [source, place]
    sent = placement.by_rank(places)  # [source, destination]
    received = sent.sum(0).tolist()
    fits(operator, received[:shared_ranks], bounds.shared_rows, bounds.shared_rows_name)
    fits(operator, received[shared_ranks:], bounds.rows, bounds.rows_name, shared_ranks)

    kept = _keep(own, plan)
    parts = [as_bytes(kept.rows), as_bytes(kept.handle[:, 1:])]
    if kept.scale is not None:
        parts.append(as_bytes(kept.scale.unsqueeze(1)))
    counts = placement.of_rank(places, ep.rank)  # [source, E_local]
    arrived = swap_rows(torch.cat(parts, 1), sent[ep.rank].tolist(), sent[:, ep.rank].tolist(), ep)
    return _sort(arrived, counts, x, scaled=scaled)


def _keep(tokens: TokenBatch, plan: DispatchPlan) -> Received:
    """The rows of the plan with their handles, before they travel. On one rank these are the rows that it receives."""
    if plan.listed is not None:
        lines = [(0, *divmod(slot, plan.choices)) for slot in plan.listed]
        handle = torch.tensor(lines, dtype=torch.int32).view(len(lines), 3)
    else:
        handle = torch.zeros((plan.slots.numel(), 3), dtype=torch.int32)
        handle[:, 1] = plan.token
        handle[:, 2] = plan.slots - plan.token * plan.choices
    scale = None if tokens.x_scale is None else tokens.x_scale.index_select(0, plan.token)
    return Received(tokens.x.index_select(0, plan.token), scale, plan.counts, handle)


def _check_bound(operator: str, rank: int, tokens: int, max_tokens: int) -> None:
    if max_tokens and tokens > max_tokens:
        raise ValueError(f"{operator}: T is {tokens} on EP rank {rank}; accepted: at most max_tokens, {max_tokens}")


def _check_ids(operator: str, rank: int, fault: Sequence[int], num_ids: int) -> None:
    kind, token, expert = fault
    if kind == OUT_OF_RANGE:
        raise ValueError(
            f"{operator}: ids has {expert} for token {token} on EP rank {rank}; accepted: 0 to {num_ids - 1}"
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


def agree(operator: str, heads: list[list[int]], num_ids: int, max_tokens: int, equal_tokens: bool | str) -> None:
    """Raises the same error on every rank when one of them reported a fault; a str is the reason why T must be equal."""
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
        _check_bound(operator, rank, tokens, max_tokens)
        if head[TP_GROUP] >= 0 and tokens != first.setdefault(head[TP_GROUP], tokens):
            raise ValueError(
                f"{operator}: T is {tokens} on EP rank {rank} and {first[head[TP_GROUP]]} on another rank of its TP "
                "group; accepted: the same tokens on all ranks of a TP group"
            )
        _check_ids(operator, rank, head[FAULT : FAULT + 3], num_ids)


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
