"""Do all ranks mean the same? Checked through the process group's store, before the first collective, with a timeout.

Two ranks that choose differently hang. A decision depends only on the deployment's rank-invariant fields, the block and
the limit tables, so agreeing on these is agreeing on decisions; decisions already made are compared as well.
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

from moe_lowering.backends.identity import identity
from moe_lowering.deployment import Deployment
from moe_lowering.passes.judging import torch_npu_is_loaded
from moe_lowering.passes.pipeline import MoeLowering

# How often each set of ranks has compared: every rank of it counts alike.
_rounds: dict[str, Any] = collections.defaultdict(itertools.count)
_Decisions = list[list[tuple[str, str | None, str]]]  # of each graph, of each block: its name, implementation, and why
LONGEST = 1800.0  # seconds; what torch.distributed waits for a collective unless it is told otherwise


class AgreementError(RuntimeError):
    """Ranks differ, or some did not answer in time. The message names the ranks and what differs."""


def limits_digest() -> str:
    """SHA-256 (hex) of the limit tables."""
    digest = hashlib.sha256()
    for file in sorted(resources.files("moe_lowering.limits").joinpath("data").iterdir(), key=lambda f: f.name):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def decisions(lowering: MoeLowering) -> _Decisions:
    """(block, implementation, why and for which sizes) of every graph that a pass object has seen, in order."""
    return [[(block.name, block.comm, block.reason) for block in report.blocks] for report in lowering.reports]


def _fields(deployment: Deployment) -> dict[str, Any]:
    """What must agree. Group names are local to a group of ranks: of them only whether there is one."""
    fields = deployment.invariant_fields()
    for name in ("ep_group", "mc2_group"):
        fields[name] = bool(fields[name])
    return fields


def _settings(lowering: MoeLowering) -> dict[str, str]:
    policy = lowering.policy
    cost = f"{policy.cost.__module__}.{getattr(policy.cost, '__qualname__', type(policy.cost).__name__)}"
    text = identity(policy.cost)  # what it does and holds, where that can be compared between processes
    if "unique(" not in text:
        cost += f" ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
    flags = {"strict": str(lowering.strict), "overlap": str(lowering.overlap)}
    return {"comm": policy.comm, "policy": policy.name, "cost": cost, **flags}


def check_agreement(
    deployment: Deployment,
    lowering: MoeLowering | None = None,
    *,
    timeout: float = 60.0,
    store: Any = None,
    ranks: int | None = None,
    rank: int | None = None,
) -> None:
    """Compare this rank's deployment, limit tables and decisions with every other rank's. Call it on all ranks.

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
    import torch.distributed as dist

    if store is None:
        if not dist.is_initialized():
            raise RuntimeError("check_agreement: there is no process group; give store, ranks and rank")
        store, ranks, rank = dist.distributed_c10d._get_default_store(), dist.get_world_size(), dist.get_rank()
    assert ranks is not None
    assert rank is not None
    _Published(deployment, lowering, store, range(ranks), rank).compare(timeout)


def agreement_before_first(
    deployment: Deployment, lowering: MoeLowering, timeout: float | str | None
) -> Callable[[], None] | None:
    """What to call before the first graph is lowered, so that ranks of one EP group that differ are told so.

    This rank's record is published now, where there is an EP group already: a rank that finds its graph in a compile cache,
    and compiles nothing, has still answered the others.

    Args:
        timeout: seconds to wait for the slowest rank; ``auto`` for as long as the EP group's own collectives would wait,
            and for no check where there is no group of real processes to ask; None for no check.

    Raises:
        ValueError: ``timeout`` is another word; the deployment contradicts its process groups.
    """
    if isinstance(timeout, str) and timeout != "auto":
        raise ValueError(f"agreement_timeout is {timeout!r}; accepted: seconds, 'auto', or None")
    if timeout is None or deployment.ep_size == 1:
        return None
    published = _publish_to_group(deployment, lowering)

    def check() -> None:
        found = published or _publish_to_group(deployment, lowering)
        if found is not None:
            found.compare(found.patience if isinstance(timeout, str) else timeout)
        elif not isinstance(timeout, str):
            check_agreement(deployment, lowering, timeout=timeout)

    return check


def _publish_to_group(deployment: Deployment, lowering: MoeLowering) -> _Published | None:
    """Through the default store, to the ranks of the EP group; None where it is no group of real processes."""
    import torch.distributed as dist

    c10d: Any = dist.distributed_c10d
    if not dist.is_initialized() or not deployment.ep_group:
        return None
    try:
        group = c10d._resolve_process_group(deployment.ep_group)
        members = dist.get_process_group_ranks(group)
    except Exception:  # a name that is not of this process's groups
        return None
    if dist.get_backend(group) == "fake":
        return None
    published = _Published(deployment, lowering, c10d._get_default_store(), members, dist.get_rank())
    deployment.placed()  # after this rank has answered: the others need not wait for it
    published.patience = _patience(group)
    return published


def _patience(group: Any) -> float:
    """How long a collective of the group waits, in seconds, where its backend says so."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        waits = getattr(options, "_timeout", None)
        if isinstance(waits, datetime.timedelta):
            return waits.total_seconds()
    return LONGEST


class _Published:
    """This rank's record in the store, for the others to compare with."""

    def __init__(
        self, deployment: Deployment, lowering: MoeLowering | None, store: Any, members: Sequence[int], rank: int
    ) -> None:
        mine = {
            "deployment": _fields(deployment),
            "misplaced": deployment.misplaced,
            "limits": limits_digest(),
            "torch_npu": torch_npu_is_loaded(),
            "settings": _settings(lowering) if lowering else {},
            "decisions": decisions(lowering) if lowering else [],
        }
        self.patience = LONGEST
        self._store, self._members = store, list(members)
        ranks = ",".join(map(str, self._members))
        self._prefix = f"moe_lowering/agreement/{ranks}/{next(_rounds[ranks])}"
        store.set(f"{self._prefix}/{rank}", json.dumps(mine, sort_keys=True))

    def compare(self, timeout: float) -> None:
        texts = self._collect(timeout)
        first, (reference, *_) = self._members[0], texts
        lines = [
            f"rank {rank}: {line}"
            for rank, text in zip(self._members, texts, strict=True)
            if text != reference
            for line in _differences(json.loads(reference), json.loads(text), first)
        ]
        if lines:
            raise AgreementError(f"ranks disagree with rank {first}:\n  " + "\n  ".join(lines))

    def _collect(self, timeout: float) -> list[str]:
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        texts, missing = [], []
        for rank in self._members:
            key = f"{self._prefix}/{rank}"
            left = max(deadline - datetime.datetime.now(), datetime.timedelta(milliseconds=10))
            try:
                self._store.wait([key], left)
                texts.append(self._store.get(key).decode())
            except Exception:  # stores raise types of their own for a timeout
                missing.append(rank)
        if missing:
            absent = ", ".join(map(str, missing))
            raise AgreementError(f"no answer from rank {absent} of {len(self._members)} within {timeout:g} s")
        return texts


def _differences(a: dict[str, Any], b: dict[str, Any], rank: int) -> list[str]:
    found = [
        f"Deployment.{name} is {b['deployment'][name]!r}, on rank {rank} {a['deployment'][name]!r}"
        for name in a["deployment"]
        if a["deployment"][name] != b["deployment"][name]
    ]
    found += [
        f"MoeLowering's {name} is {b['settings'].get(name)!r}, on rank {rank} {a['settings'].get(name)!r}"
        for name in sorted({*a["settings"], *b["settings"]})
        if a["settings"].get(name) != b["settings"].get(name)
    ]
    found += [text for text in (b["misplaced"], a["misplaced"] and f"on rank {rank} {a['misplaced']}") if text]
    if a["torch_npu"] != b["torch_npu"]:
        found.append(f"torch_npu is {'' if b['torch_npu'] else 'not '}loaded, on rank {rank} the other way")
    if a["limits"] != b["limits"]:
        found.append("its limit tables differ (another version of moe_lowering)")
    compare = _graphs if a["deployment"]["equal_tokens"] and b["deployment"]["equal_tokens"] else _blocks
    pairs = compare(a["decisions"], b["decisions"])
    return found + [
        f"{what}: it decided {theirs}, rank {rank} {ours}" for what, ours, theirs in pairs if ours != theirs
    ]


def _graphs(a: _Decisions, b: _Decisions) -> Iterator[tuple[str, Any, Any]]:
    """Graph by graph, in order; one rank may be some graphs ahead."""
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        yield f"graph {number}", x, y


def _blocks(a: _Decisions, b: _Decisions) -> Iterator[tuple[str, Any, Any]]:
    """The implementations of each block that both lowered: ranks with another T each compile graphs of their own. A graph
    that left a block alone refuses to run (``passes.judging.refusal``): no other rank has to know."""
    ours, theirs = _chosen(a), _chosen(b)
    for name in sorted(ours.keys() & theirs.keys()):
        yield name, sorted(ours[name]), sorted(theirs[name])


def _chosen(graphs: _Decisions) -> dict[str, set[str]]:
    found: dict[str, set[str]] = collections.defaultdict(set)
    for name, comm, _ in itertools.chain.from_iterable(graphs):
        if comm is not None:
            found[name].add(comm)
    return found
