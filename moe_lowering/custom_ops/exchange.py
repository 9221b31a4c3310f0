"""Process groups for CPU kernels: find a group by its name, and move numbers and rows between its ranks.

Rows travel as bytes, so that every dtype can (gloo does not know all of them). Nothing here decides anything: a caller
that finds a mistake on one rank must let all ranks know before the next collective, or they hang.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lowering.groups import process_group


@dataclasses.dataclass(frozen=True)
class Group:
    """A process group and this rank's place in it; ``handle`` is None for a group of one, which needs none."""

    handle: Any
    size: int
    rank: int

    def first_global_rank(self) -> int:
        """Global rank of the group's first member: the same on all members, and another one for another group."""
        return dist.get_process_group_ranks(self.handle)[0] if self.handle is not None else -1


ALONE = Group(None, 1, 0)


def open_group(operator: str, kind: str, name: str, size: int) -> Group:
    """The process group called ``name``, checked to have ``size`` ranks.

    Raises:
        ValueError: no such group, or another number of ranks; names the operator's arguments ``{kind}_group`` and
            ``{kind}_size``.
    """
    if size == 1:
        return ALONE
    try:
        handle = process_group(name)
    except Exception as error:
        raise ValueError(
            f"{operator}: {kind}_group is {name!r}, which names no process group here; accepted: the group_name of an "
            "initialised group that this rank belongs to"
        ) from error
    actual = dist.get_world_size(handle)
    if actual != size:
        raise ValueError(f"{operator}: {kind}_size is {size}, but group {name!r} has {actual} ranks")
    return Group(handle, size, dist.get_rank(handle))


def gather_numbers(numbers: Tensor, group: Group) -> Tensor:
    """int64 [n] of every rank, as [size, n]."""
    if group.size == 1:
        return numbers.unsqueeze(0)
    everyone = numbers.new_empty((group.size, numbers.numel()))
    dist.all_gather(list(everyone.unbind(0)), numbers, group=group.handle)
    return everyone


def gather_rows(rows: Tensor, group: Group) -> Tensor:
    """[m, ...] of every rank, the same m on all, as [size * m, ...]."""
    if group.size == 1:
        return rows
    raw = as_bytes(rows)
    everyone = raw.new_empty((group.size, *raw.shape))
    dist.all_gather(list(everyone.unbind(0)), raw, group=group.handle)
    return from_bytes(everyone.flatten(0, 1), rows.dtype)


def swap_rows(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """All-to-all of uint8 ``rows [sum(send), B]``: the first send[0] go to rank 0, and so on.

    Returns [sum(receive), B], by source rank.
    """
    arrived = rows.new_empty((sum(receive), rows.shape[1]))
    dist.all_to_all_single(arrived, rows, receive, send, group=group.handle)
    return arrived


def as_bytes(rows: Tensor) -> Tensor:
    """[m, n] as uint8 [m, n * itemsize]."""
    return rows.contiguous().view(torch.uint8)


def from_bytes(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``as_bytes``, as a copy: ``raw`` may be a slice of wider rows, with strides that suit no dtype."""
    return raw.clone(memory_format=torch.contiguous_format).view(dtype)
