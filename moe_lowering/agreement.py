"""Do all ranks mean the same? Checked through the process group's store, before the first collective, with a timeout.

Two ranks that choose differently hang. A decision depends only on the deployment's rank-invariant fields, the block and
the limit tables, so agreeing on these is agreeing on decisions; decisions already made are compared as well.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
from importlib import resources
from typing import Any

from moe_lowering.deployment import Deployment
from moe_lowering.passes.judging import torch_npu_is_loaded
from moe_lowering.passes.pipeline import MoeLowering

_round = itertools.count()


class AgreementError(RuntimeError):
    """Ranks differ, or some did not answer in time. The message names the ranks and what differs."""


def limits_digest() -> str:
    """SHA-256 (hex) of the limit tables."""
    digest = hashlib.sha256()
    for file in sorted(resources.files("moe_lowering.limits").joinpath("data").iterdir(), key=lambda f: f.name):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def decisions(lowering: MoeLowering) -> list[list[tuple[str, str | None, str]]]:
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
    return {"comm": policy.comm, "policy": policy.name, "cost": cost}


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
    mine = {
        "deployment": _fields(deployment),
        "limits": limits_digest(),
        "torch_npu": torch_npu_is_loaded(),
        "settings": _settings(lowering) if lowering else {},
        "decisions": decisions(lowering) if lowering else [],
    }
    prefix = f"moe_lowering/agreement/{next(_round)}"
    store.set(f"{prefix}/{rank}", json.dumps(mine, sort_keys=True))
    texts = _collect(store, prefix, ranks, timeout)
    first = json.loads(texts[0])
    different = [r for r, text in enumerate(texts) if text != texts[0]]
    if different:
        lines = [f"rank {r}: {line}" for r in different for line in _differences(first, json.loads(texts[r]))]
        raise AgreementError("ranks disagree with rank 0:\n  " + "\n  ".join(lines))


def _collect(store: Any, prefix: str, ranks: int, timeout: float) -> list[str]:
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
    texts, missing = [], []
    for rank in range(ranks):
        key = f"{prefix}/{rank}"
        left = max(deadline - datetime.datetime.now(), datetime.timedelta(milliseconds=10))
        try:
            store.wait([key], left)
            texts.append(store.get(key).decode())
        except Exception:  # stores raise types of their own for a timeout
            missing.append(rank)
    if missing:
        raise AgreementError(f"no answer from rank {', '.join(map(str, missing))} of {ranks} within {timeout:g} s")
    return texts


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    found = [
        f"Deployment.{name} is {b['deployment'][name]!r}, on rank 0 {a['deployment'][name]!r}"
        for name in a["deployment"]
        if a["deployment"][name] != b["deployment"][name]
    ]
    found += [
        f"MoeLowering's {name} is {b['settings'].get(name)!r}, on rank 0 {a['settings'].get(name)!r}"
        for name in sorted({*a["settings"], *b["settings"]})
        if a["settings"].get(name) != b["settings"].get(name)
    ]
    if a["torch_npu"] != b["torch_npu"]:
        found.append(f"torch_npu is {'' if b['torch_npu'] else 'not '}loaded, on rank 0 the other way")
    if a["limits"] != b["limits"]:
        found.append("its limit tables differ (another version of moe_lowering)")
    for graph, (x, y) in enumerate(itertools.zip_longest(a["decisions"], b["decisions"])):
        if x != y:
            found.append(f"graph {graph}: it decided {y}, rank 0 {x}")
    return found
