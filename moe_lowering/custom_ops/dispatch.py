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

import torch
from torch import Tensor

from moe_lowering.custom_ops.exchange import Group, as_bytes, from_bytes, gather_numbers, open_group, swap_rows
from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.placement import Placement, check
from moe_lowering.custom_ops.plan import DUPLICATE, OTHER_KIND, OUT_OF_RANGE, Plan, make_plan
from moe_lowering.custom_ops.sizes import ceil_div, differ, known, row_bound, show, token_count, unify

SCHEMA = (
    "dispatch(Tensor x, Tensor? x_scale, Tensor ids, Tensor? mask, int num_experts, str ep_group, int ep_size, "
    "str tp_group, int tp_size, int max_tokens, int max_rows, int shared_expert_ranks=0, int shared_experts=1, "
    "bool on_shared_rank=False) "
    "-> (Tensor rows, Tensor row_scale, Tensor counts, Tensor handle)"
)
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


def _check(
    x: Tensor,
    x_scale: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    num_experts: int,
    ep_group: str,
    ep_size: int,
    tp_group: str,
    tp_size: int,
    max_tokens: int,
    max_rows: int,
    shared_expert_ranks: int = 0,
    shared_experts: int = 1,
    on_shared_rank: bool = False,
) -> None:
    placement = Placement(num_experts, ep_size, shared_expert_ranks, shared_experts)
    check_parallel("dispatch", placement, ep_group, tp_group, tp_size, max_tokens)
    if on_shared_rank and not shared_expert_ranks:
        raise ValueError("dispatch: on_shared_rank is True with shared_expert_ranks 0; accepted: False")
    if max_rows < 0:
        raise ValueError(f"dispatch: max_rows is {max_rows}; accepted: 0 (no cap) or more")
    if x.dim() < 1:
        raise ValueError("dispatch: x has no dimension; accepted: [..., hidden]")
    if x.dtype not in DTYPES:
        raise TypeError(f"dispatch: x is {x.dtype}; accepted: float32, float16, bfloat16, or int8 with x_scale")
    check_ids("dispatch", ids, mask, num_experts)
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


def _fake(
    x: Tensor,
    x_scale: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    num_experts: int,
    ep_group: str,
    ep_size: int,
    tp_group: str,
    tp_size: int,
    max_tokens: int,
    max_rows: int,
    shared_expert_ranks: int = 0,
    shared_experts: int = 1,
    on_shared_rank: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(
        x, x_scale, ids, mask, num_experts, ep_group, ep_size, tp_group, tp_size, max_tokens, max_rows, shared_expert_ranks,
        shared_experts, on_shared_rank,
    )  # fmt: skip
    for other in (ids.shape[:-1], *(t.shape for t in (x_scale, mask) if t is not None)):
        unify(other, x.shape[:-1])
    bound = row_bound(
        token_count(x.shape), ids.shape[-1], num_experts, ep_size, tp_size, max_tokens, max_rows, shared_expert_ranks,
        shared_experts, on_shared_rank,
    )  # fmt: skip
    local = 1 if on_shared_rank else num_experts // (ep_size - shared_expert_ranks)
    return (
        x.new_empty((bound, x.shape[-1])),
        x.new_empty((0 if x_scale is None else bound,), dtype=torch.float32),
        x.new_empty((local,), dtype=torch.int64),
        x.new_empty((bound, 3), dtype=torch.int32),
    )


def _cpu(
    x: Tensor,
    x_scale: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    num_experts: int,
    ep_group: str,
    ep_size: int,
    tp_group: str,
    tp_size: int,
    max_tokens: int,
    max_rows: int,
    shared_expert_ranks: int = 0,
    shared_experts: int = 1,
    on_shared_rank: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(
        x, x_scale, ids, mask, num_experts, ep_group, ep_size, tp_group, tp_size, max_tokens, max_rows, shared_expert_ranks,
        shared_experts, on_shared_rank,
    )  # fmt: skip
    ep = open_group("dispatch", "ep", ep_group, ep_size)
    tp = open_group("dispatch", "tp", tp_group, tp_size)
    tokens = token_count(x.shape)
    shape = (
        tokens,
        ids.shape[-1],
        num_experts,
        ep_size,
        tp_size,
        max_tokens,
        max_rows,
        shared_expert_ranks,
        shared_experts,
    )
    bound = row_bound(*shape)
    shared_bound = row_bound(*shape, on_shared_rank=True) if shared_expert_ranks else 0
    cap = f" (max_rows is {max_rows})" if max_rows else ""
    received = exchange(
        "dispatch",
        x.reshape(tokens, x.shape[-1]),
        None if x_scale is None else x_scale.reshape(tokens),
        ids.reshape(tokens, ids.shape[-1]),
        None if mask is None else mask.reshape(tokens),
        num_experts,
        ep,
        tp,
        limit=bound,
        limit_name=f"R = {bound}{cap}",
        max_tokens=max_tokens,
        equal_tokens=not max_tokens,
        shared=Shared(
            shared_expert_ranks,
            shared_experts,
            on_shared_rank,
            shared_bound,
            f"R = {shared_bound} of a shared-expert rank{cap}",
        ),
    )
    bound = shared_bound if on_shared_rank else bound
    scale = received.scale if received.scale is not None else x.new_empty((0,), dtype=torch.float32)
    return (
        _pad(received.rows, bound, 0),
        scale if x_scale is None else _pad(scale, bound, 0),
        received.counts,
        _pad(received.handle, bound, -1),
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


@dataclasses.dataclass(frozen=True)
class Shared:
    """Shared-expert ranks, whether this rank was told to be one, and the most rows that one of them may receive."""

    ranks: int = 0
    experts: int = 1
    told: bool = False
    limit: int = 0
    limit_name: str = ""


def own_slice(tokens: int, tp: Group) -> slice:
    """The tokens that this rank contributes: [j * M, (j + 1) * M) with M = ceil(T / tp_size)."""
    share = ceil_div(tokens, tp.size)
    return slice(min(tp.rank * share, tokens), min((tp.rank + 1) * share, tokens))


def exchange(
    operator: str,
    x: Tensor,
    x_scale: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    num_experts: int,
    ep: Group,
    tp: Group,
    *,
    limit: int,
    limit_name: str,
    max_tokens: int,
    equal_tokens: bool | str,
    shared: Shared = Shared(),
) -> Received:
    """Send this rank's slice of ``x [T, H]`` to the experts ``ids [T, k]`` and receive what the others send here.

    Raises, on all ranks alike:
        ValueError: an id outside [0, num_experts) or twice in one row; T differs although ``equal_tokens``, is more
            than ``max_tokens`` (when not 0), or differs within a TP group; ranks disagree about k, H or dtype; a rank was
            told wrongly whether it holds a shared expert.
        RuntimeError: a rank would receive more than ``limit`` rows; a shared-expert rank more than ``shared.limit``.
    """
    mine = own_slice(ids.shape[0], tp)
    placement = Placement(num_experts, ep.size, shared.ranks, shared.experts)
    plan = make_plan(ids[mine], None if mask is None else mask[mine], placement, ep.rank, mine.start)
    if shared.told != (ep.rank < shared.ranks):
        plan = plan.refused(OTHER_KIND)
    if ep.size == 1:
        _bounded(operator, 0, ids.shape[0], max_tokens)
        _valid(operator, 0, plan.fault, num_experts)
        fits(operator, [plan.slots.numel()], limit, limit_name)
        return _keep(x, x_scale, plan)

    width = x.shape[1] * x.element_size() + 8 + (0 if x_scale is None else 4)
    head = [ids.shape[0], tp.first_global_rank(), *plan.fault, ids.shape[1], width, DTYPES.index(x.dtype)]
    everyone = gather_numbers(torch.cat([torch.tensor(head, dtype=torch.int64), plan.counts]), ep)
    agree(operator, everyone[:, :FIELDS].tolist(), num_experts, max_tokens, equal_tokens)
    places = everyone[:, FIELDS:]  # [source, place]
    sent = placement.by_rank(places)  # [source, destination]
    received = sent.sum(0).tolist()
    fits(operator, received[: shared.ranks], shared.limit, shared.limit_name)
    fits(operator, received[shared.ranks :], limit, limit_name, shared.ranks)

    here = _keep(x[mine], None if x_scale is None else x_scale[mine], plan)
    parts = [as_bytes(here.rows), as_bytes(here.handle[:, 1:])]
    if here.scale is not None:
        parts.append(as_bytes(here.scale.unsqueeze(1)))
    counts = placement.of_rank(places, ep.rank)  # [source, E_local]
    arrived = swap_rows(torch.cat(parts, 1), sent[ep.rank].tolist(), sent[:, ep.rank].tolist(), ep)
    return _sort(arrived, counts, x, scaled=x_scale is not None)


def _keep(x: Tensor, x_scale: Tensor | None, plan: Plan) -> Received:
    """The planned rows with their handles, before they travel; on one rank that is what it receives."""
    handle = torch.zeros((plan.slots.numel(), 3), dtype=torch.int32)
    handle[:, 1] = plan.token
    handle[:, 2] = plan.slots - plan.token * plan.choices
    scale = None if x_scale is None else x_scale.index_select(0, plan.token)
    return Received(x.index_select(0, plan.token), scale, plan.counts, handle)


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


register(SCHEMA, cpu=_cpu, fake=_fake, side_effect=True)
