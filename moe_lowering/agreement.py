"""Comparison of all ranks before they exchange tokens: deployment, settings of the pass, code and limit tables.

Two ranks that choose differently hang, or abort the process. The comparison goes through the store of the process group,
with a timeout, and raises ``AgreementError`` on every rank. Users call ``check_agreement`` and ``decisions``; backends call
``agreement_before_first`` before the first graph is lowered. Blocks and decisions are compared once more, before the first
exchange of a graph (``custom_ops.assert_agreement``), since a rank that finds its graph in a compile cache lowers nothing.
What the ranks have agreed on is not compared again: it does not matter how often a rank asks for options, compiles or runs.
So ranks that run different graphs of those that all agreed on wait for each other (docs/ranks.md); ``COMPARE_EVERY_RUN`` of
``agreement_records`` names the environment variable under which each run is compared.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from moe_lowering.agreement_records import SETTINGS_ABSENT, setting_differences
from moe_lowering.agreement_rounds import AgreementError, group_session, session
from moe_lowering.argument_checks import require_instance, require_seconds
from moe_lowering.deployment import Deployment
from moe_lowering.passes.agreement_check import settings_record
from moe_lowering.passes.pipeline import MoeLowering

__all__ = ["AgreementError", "agreement_before_first", "check_agreement", "decisions"]

_Decisions = list[list[tuple[str, str | None, str]]]  # of each graph, of each block: its name, implementation, and why


def decisions(lowering: MoeLowering) -> _Decisions:
    """(block, implementation, why and for which sizes) of every graph that a pass object has seen, in order."""
    return [[(block.name, block.comm, block.reason) for block in report.blocks] for report in lowering.reports]


def check_agreement(
    deployment: Deployment,
    lowering: MoeLowering | None = None,
    *,
    timeout: float = 60.0,
    store: Any = None,
    ranks: int | None = None,
    rank: int | None = None,
) -> None:
    """Compare this rank's deployment, settings, code and decisions with every other rank's. Call it on all ranks.

    Like a collective, every rank must call it equally often. A call ends on all ranks alike, with agreement or with an
    error, and the next calls meet again.

    Args:
        deployment: this rank's.
        lowering: a pass object whose settings, and decisions so far, are compared too.
        timeout: seconds to wait for the slowest rank.
        store, ranks, rank: a ``torch.distributed`` store and this rank's place in it; the default process group's when
            None. Nothing is done with one rank.

    Raises:
        AgreementError: when ranks differ, or one did not come within ``timeout``.
        RuntimeError: when there is neither a store nor a default process group.
    """
    require_instance("check_agreement", "deployment", deployment, Deployment, "a moe_lowering.Deployment")
    kinds = (MoeLowering, type(None))
    require_instance("check_agreement", "lowering", lowering, kinds, "a moe_lowering.MoeLowering, or None")
    require_seconds("check_agreement", "timeout", timeout)
    members, own, group_store = _all_ranks(store, ranks, rank)
    record = {
        **settings_record(deployment, lowering),
        "decisions": decisions(lowering) if lowering else [],
    }
    session(group_store, range(members), own).agree("check", record, _differences, timeout)


def _all_ranks(store: Any, ranks: int | None, rank: int | None) -> tuple[int, int, Any]:
    """How many ranks, which one is this, and the store between them."""
    import torch.distributed as dist

    if store is None:
        if not dist.is_initialized():
            raise RuntimeError("check_agreement: there is no process group; give store, ranks and rank")
        c10d: Any = dist.distributed_c10d
        return dist.get_world_size(), dist.get_rank(), c10d._get_default_store()
    if ranks is None or rank is None:
        raise ValueError(f"check_agreement: ranks is {ranks} and rank is {rank}; accepted beside a store: two ints")
    return ranks, rank, store


def agreement_before_first(
    deployment: Deployment, lowering: MoeLowering, timeout: float | str | None
) -> Callable[[], None] | None:
    """The function to call before the first graph is lowered: it raises on ranks of one EP group that differ.

    Args:
        timeout: seconds to wait for the slowest rank; ``auto`` for as long as the EP group's own collectives would wait,
            and for no check where there is no group of real processes to ask; None for no check.

    Raises:
        ValueError: ``timeout`` is another word or no length of time; the deployment contradicts its process groups.
    """
    require_seconds("MoeLowering", "agreement_timeout", timeout, "auto", None)
    if timeout is None or deployment.ep_size == 1:
        return None

    def check() -> None:
        meeting = group_session(deployment.ep_group)
        if meeting is not None:
            with_others, _, patience = meeting
            seconds = patience if isinstance(timeout, str) else timeout
        elif isinstance(timeout, str):
            return
        else:  # this process has no group of that name: all ranks of the job are compared
            members, own, group_store = _all_ranks(None, None, None)
            with_others, seconds = session(group_store, range(members), own), timeout
        record = settings_record(deployment, lowering, ep_group=meeting is not None)
        with_others.agree_once("settings", record, setting_differences, seconds, SETTINGS_ABSENT)
        deployment.placed()  # after this rank has answered: the others need not wait for it

    return check


def _differences(a: dict[str, Any], b: dict[str, Any], rank: int) -> list[str]:
    """Of two records with decisions."""
    compare = _graphs if a["deployment"]["equal_tokens"] and b["deployment"]["equal_tokens"] else _blocks
    pairs = compare(a["decisions"], b["decisions"])
    return setting_differences(a, b, rank) + [
        f"{what}: it decided {theirs}, rank {rank} {ours}" for what, ours, theirs in pairs if ours != theirs
    ]


def _graphs(a: _Decisions, b: _Decisions) -> Iterator[tuple[str, Any, Any]]:
    """Graph by graph, in order; one rank may be some graphs ahead."""
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        yield f"graph {number}", x, y


def _blocks(a: _Decisions, b: _Decisions) -> Iterator[tuple[str, Any, Any]]:
    """The implementations of each block that both lowered: ranks with another T each compile graphs of their own. A graph
    that left a block alone refuses to run (``passes.legality.refusal``): no other rank has to know."""
    ours, theirs = _chosen(a), _chosen(b)
    for name in sorted(ours.keys() & theirs.keys()):
        yield name, sorted(ours[name]), sorted(theirs[name])


def _chosen(graphs: _Decisions) -> dict[str, set[str]]:
    comms: dict[str, set[str]] = collections.defaultdict(set)
    for name, comm, _ in itertools.chain.from_iterable(graphs):
        if comm is not None:
            comms[name].add(comm)
    return comms
