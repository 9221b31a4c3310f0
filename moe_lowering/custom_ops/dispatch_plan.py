"""``DispatchPlan``: the rows that one rank sends in ``dispatch``, in order of the places (``placement``) that they go to.

It serves the CPU kernels through ``token_exchange``. Wrong ids do not raise here: a plan of a rank with wrong ids sends
nothing and carries the fault, so that all ranks learn of it and raise together.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moe_lowering.custom_ops.placement import Placement

FEW = 64  # slots of a rank up to which a plan is made in Python
NO_FAULT, OUT_OF_RANGE, DUPLICATE, OTHER_KIND = range(4)  # OTHER_KIND: ``on_shared_rank`` is wrong for this rank


@dataclasses.dataclass(frozen=True)
class DispatchPlan:
    """What a rank sends, in order of place (``placement``), then token.

    slots: token * choices + choice of each row, int64, and token by itself; choices: k, and the shared experts of a token;
    counts: rows per place, int64; fault: (kind, token, id) of the first mistake; the counts are all zero when there is one;
    listed: slots once more, of a plan of few rows.
    """

    slots: Tensor
    token: Tensor
    choices: int
    counts: Tensor
    fault: tuple[int, int, int] = (NO_FAULT, 0, 0)
    listed: tuple[int, ...] | None = None

    def refused(self, kind: int, token: int = 0, expert: int = 0) -> DispatchPlan:
        """The plan of a rank with wrong arguments: it sends nothing and carries the fault."""
        return dataclasses.replace(self, counts=torch.zeros_like(self.counts), fault=(kind, token, expert))


def make_plan(ids: Tensor, mask: Tensor | None, placement: Placement, rank: int, first_token: int) -> DispatchPlan:
    """The plan of ``ids [T, k]`` on EP rank ``rank``; ``mask [T]`` says which tokens are sent. Faults name tokens from
    ``first_token`` on."""
    top_k = ids.shape[1]
    experts = ids.reshape(-1)
    if experts.numel() <= FEW and not placement.added:
        return _plan_few(experts.tolist(), mask, top_k, placement, first_token)
    if mask is None:
        experts, slots = torch.sort(experts, stable=True)
    else:
        kept = mask.unsqueeze(1).expand(-1, top_k).reshape(-1).nonzero().squeeze(1)
        experts, order = torch.sort(experts[kept], stable=True)
        slots = kept[order]
    token = slots // top_k
    kind, at = _find_fault(experts, token, placement.num_ids)
    if kind != NO_FAULT:
        empty = torch.zeros(placement.places, dtype=torch.int64)
        return DispatchPlan(slots, token, top_k, empty).refused(kind, int(token[at]) + first_token, int(experts[at]))
    if placement.zero_experts:  # the last ones in order
        some = int((experts < placement.num_experts).sum())
        experts, slots, token = experts[:some], slots[:some], token[:some]
    plan = DispatchPlan(slots, token, top_k, torch.bincount(experts, minlength=placement.num_experts))
    if not placement.added:
        return plan
    tokens = torch.arange(len(ids)) if mask is None else mask.nonzero().squeeze(1)
    return _add_shared_experts(plan, tokens, placement, rank)


def _plan_few(
    experts: list[int], mask: Tensor | None, top_k: int, placement: Placement, first_token: int
) -> DispatchPlan:
    """As ``make_plan``, in Python's lists: a decode step has few rows, and an operator on them takes 3 us or more."""
    kept = None if mask is None else mask.tolist()
    slots = [slot for slot in range(len(experts)) if kept is None or kept[slot // top_k]]
    slots.sort(key=experts.__getitem__)
    tokens, counts = [slot // top_k for slot in slots], [0] * placement.places
    at = _find_fault_of_few([experts[slot] for slot in slots], tokens, placement.num_ids)
    fault = None if at is None else (at[0], tokens[at[1]] + first_token, experts[slots[at[1]]])
    slots = [slot for slot in slots if experts[slot] < placement.num_experts]
    for slot in slots if fault is None else ():
        counts[experts[slot]] += 1
    plan = DispatchPlan(
        torch.tensor(slots, dtype=torch.int64),
        torch.tensor([slot // top_k for slot in slots], dtype=torch.int64),
        top_k,
        torch.tensor(counts, dtype=torch.int64),
        listed=tuple(slots),
    )
    return plan if fault is None else plan.refused(*fault)


def _find_fault_of_few(experts: list[int], tokens: list[int], num_ids: int) -> tuple[int, int] | None:
    """As ``_find_fault``; None where there is none."""
    if not experts:
        return None
    if experts[0] < 0 or experts[-1] >= num_ids:
        return OUT_OF_RANGE, 0 if experts[0] < 0 else len(experts) - 1
    pairs = zip(experts, experts[1:], tokens, tokens[1:], strict=False)
    twice = (at for at, (a, b, s, t) in enumerate(pairs) if a == b and s == t)
    at = next(twice, None)
    return None if at is None else (DUPLICATE, at)


def _add_shared_experts(plan: DispatchPlan, tokens: Tensor, placement: Placement, rank: int) -> DispatchPlan:
    """A plan of routed rows, and each of ``tokens`` to one place for each shared expert, as its choices k, k + 1, ..."""
    top_k, choices = plan.choices, plan.choices + placement.added
    counts = plan.counts.new_zeros(placement.places)
    counts[placement.shared_places(rank)] = len(tokens)
    counts[placement.shared_expert_ranks :] = plan.counts
    shared = [tokens * choices + top_k + expert for expert in range(placement.added)]
    slots = torch.cat([*shared, plan.token * choices + (plan.slots - plan.token * top_k)])
    return DispatchPlan(slots, slots // choices, choices, counts)


def _find_fault(experts: Tensor, token: Tensor, num_ids: int) -> tuple[int, int]:
    """The first mistake in sorted ids and where it is; equal ids of one token are neighbours there."""
    if not experts.numel():
        return NO_FAULT, 0
    if int(experts[0]) < 0:
        return OUT_OF_RANGE, 0
    if int(experts[-1]) >= num_ids:
        return OUT_OF_RANGE, -1
    twice = (experts[1:] == experts[:-1]) & (token[1:] == token[:-1])
    return (DUPLICATE, int(twice.to(torch.uint8).argmax())) if bool(twice.any()) else (NO_FAULT, 0)
