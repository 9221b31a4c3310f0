"""Process groups of this process by name, and the comparison of a deployment with them.

A rank's place is a fact of its process group: where ``torch.distributed`` has the group, its size, its members and this
process's index in it are read from it, or a deployment that says otherwise is refused. A group of the backend "fake" moves
nothing and has no place; neither has a name that no group of this process bears (an HCCL communicator's, or one of another
machine).
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

FAKE = "fake"


@dataclasses.dataclass(frozen=True)
class Membership:
    """A process group: the global ranks of its members, in its own order, and this process's index among them."""

    ranks: tuple[int, ...]
    rank: int


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a deployment says of its EP or TP group (``kind`` is ``ep`` or ``tp``). An unknown rank is None."""

    kind: str
    group: str
    size: int
    rank: int | None


def process_group(name: Any) -> Any:
    """torch's process group called ``name``.

    Raises:
        Exception: no group of this process has that name; of which type torch does not say.
    """
    from torch.distributed import distributed_c10d

    c10d: Any = distributed_c10d  # torch's own function, which its types do not have
    return c10d._resolve_process_group(name)


def find_group(name: str) -> Membership | None:
    """The group called ``name``; None where this process has none that communicates."""
    dist: Any = sys.modules.get("torch.distributed")  # without it there is no group, and nothing to import
    if not name or dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    try:
        group = process_group(name)
    except (LookupError, RuntimeError, ValueError):  # no group of this process has that name
        return None
    if dist.get_backend(group) == FAKE:
        return None
    return Membership(tuple(dist.get_process_group_ranks(group)), dist.get_rank(group))


def own_ranks(ep: Claim, tp: Claim, mc2_group: str) -> tuple[int | None, int | None]:
    """This process's index in the EP and in the TP group: read from the groups where they exist, else as the deployment
    claims.

    Raises:
        ValueError: a claim contradicts a group that this process has; the TP group or MC2's group has other members than
            the EP group allows. With the field, its value, what the group says, and what is accepted.
    """
    groups = {claim.kind: find_group(claim.group) for claim in (ep, tp)}
    for claim in (ep, tp):
        group = groups[claim.kind]
        if group is not None:
            _compare(claim, group)
    _compare_members(ep, groups["ep"], tp, groups["tp"], mc2_group)
    ranks = [claim.rank if (group := groups[claim.kind]) is None else group.rank for claim in (ep, tp)]
    return ranks[0], ranks[1]


def _compare(claim: Claim, group: Membership) -> None:
    kind, name = claim.kind, claim.group
    if len(group.ranks) != claim.size:
        raise ValueError(
            f"Deployment: {kind}_size is {claim.size}, and {kind}_group {name!r} has {len(group.ranks)} ranks; "
            f"accepted: {len(group.ranks)}"
        )
    if claim.rank is not None and claim.rank != group.rank:
        raise ValueError(
            f"Deployment: {kind}_rank is {claim.rank}, and this process is rank {group.rank} of {kind}_group {name!r} "
            f"(global ranks {list(group.ranks)}); accepted: {group.rank}, or no {kind}_rank, which is then read from the group"
        )


def _compare_members(
    ep: Claim, ep_group: Membership | None, tp: Claim, tp_group: Membership | None, mc2_name: str
) -> None:
    """Those of TP are some of EP's: a rank sends its share of the tokens there. Those of MC2 are the same, in this order."""
    if ep_group is not None and tp_group is not None and not set(tp_group.ranks) <= set(ep_group.ranks):
        raise ValueError(
            f"Deployment: tp_group {tp.group!r} has global ranks {list(tp_group.ranks)}; accepted: some of those of ep_group "
            f"{ep.group!r}, {list(ep_group.ranks)}, as the ranks of a TP group are ranks of one EP group"
        )
    mc2 = find_group(mc2_name)
    if mc2 is None:
        return
    if len(mc2.ranks) != ep.size or (ep_group is not None and mc2.ranks != ep_group.ranks):
        members = f"those of ep_group {ep.group!r}, {list(ep_group.ranks)}" if ep_group else f"a group of {ep.size}"
        raise ValueError(
            f"Deployment: mc2_group {mc2_name!r} has global ranks {list(mc2.ranks)}; accepted: {members} (a second group over "
            "the same ranks)"
        )
