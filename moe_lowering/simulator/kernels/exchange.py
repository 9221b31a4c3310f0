"""Collectives that the MC2 kernels are made of, over any torch.distributed group with CPU collectives (gloo).

Rows travel as bytes, since gloo does not know every dtype. Every call of an operator starts with ``agree``: a rank that
must refuse says so first, so that all ranks raise and none waits for a timeout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from moe_lowering.groups import process_group

GroupLike = Any  # torch.distributed.ProcessGroup; the stubs of torch lack half of its interface


def resolve(operator: str, name: str, ep_size: int, ep_rank: int) -> tuple[GroupLike | None, str]:
    """The process group of that name, and what is wrong with it ("" when nothing is)."""
    try:
        group = process_group(name)
    except (LookupError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        return None, f"{operator}: group_ep is {name!r}; accepted: the name of a process group ({error})"
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if (size, rank) != (ep_size, ep_rank):
        return group, (
            f"{operator}: ep_world_size and ep_rank_id are {ep_size} and {ep_rank}; accepted: those of the group, "
            f"{size} and {rank}"
        )
    return group, ""


WIDTH = 16  # one length for every message of agree: ranks that are at different places must still understand each other


def agree(operator: str, group: GroupLike, stage: int, refusal: str, facts: Mapping[str, int]) -> list[dict[str, int]]:
    """Tell all ranks whether this one can go on and what it assumes; the facts of every rank, in rank order.

    Args:
        stage: where this rank is: one number for each place that calls this function, see distribute.py.
        refusal: why this rank refuses the call; "" when it does not.
        facts: what must be the same on every rank. Only names that start with ``own_`` may differ.

    Raises:
        ValueError: on every rank, when some rank refuses or the ranks differ in a fact.
    """
    facts = {"stage (dispatch 0, combine 1, its end 2)": stage, **facts}
    own = torch.zeros(WIDTH, dtype=torch.int64)
    own[: len(facts) + 1] = torch.tensor([bool(refusal), *facts.values()])
    table = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(table, own, group=group)
    if refusal:
        raise ValueError(refusal)
    refusing = [rank for rank, row in enumerate(table) if row[0]]
    if refusing:
        raise ValueError(f"{operator}: not run, because rank {refusing} of the group refused the same call")
    everyone = [dict(zip(facts, row[1:].tolist(), strict=False)) for row in table]
    for name in facts:
        values = [row[name] for row in everyone]
        if not name.startswith("own_") and len(set(values)) > 1:
            raise ValueError(f"{operator}: {name} is {values} on the ranks of the group; accepted: the same on all")
    return everyone


def exchange_counts(counts: torch.Tensor, group: GroupLike) -> torch.Tensor:
    """counts [ranks, n] int64, row d for rank d -> [ranks, n], row s from rank s."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def exchange_rows(
    columns: list[torch.Tensor], send: list[int], receive: list[int], group: GroupLike
) -> list[torch.Tensor]:
    """Send the rows of several tensors together, the first ``send[0]`` to rank 0 and so on.

    Args:
        columns: tensors [n, width] of any dtypes, n = sum(send).

    Returns:
        Tensors [sum(receive), width] of the same dtypes, by source rank.
    """
    packed = torch.cat([c.contiguous().view(torch.uint8) for c in columns], dim=1)
    received = torch.empty((sum(receive), packed.shape[1]), dtype=torch.uint8)
    dist.all_to_all_single(received, packed, receive, send, group=group)
    widths = [c.shape[1] * c.element_size() for c in columns]
    parts = torch.split(received, widths, dim=1)
    return [p.contiguous().view(c.dtype) for p, c in zip(parts, columns, strict=True)]
