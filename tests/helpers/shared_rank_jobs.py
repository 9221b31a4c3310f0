"""What runs on ranks of which the first hold shared experts, and the dense reference: float64, every expert on every token."""

from __future__ import annotations

import dataclasses
from typing import Any

import rank_jobs
import reference
import torch

from moe_lowering import MoE, MoeLowering, npugraph_ex_options, quantise_experts, shard_experts


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer on four ranks. ``counts``: T by rank, one entry for each call; ``mask``: none, prefix or any."""

    shared_ranks: int
    shared_experts: int = 1
    comm: str = "mc2"
    dtype: str = "bfloat16"
    quantisation: str = "none"
    counts: tuple[tuple[int, ...], ...] = ((5, 5, 5, 5),)
    mask: str = "none"
    dynamic: bool = False
    tp: int = 1
    experts: int = 12
    skew: bool = False

    @property
    def equal(self) -> bool:
        return all(len(set(per_rank)) == 1 for per_rank in self.counts)


def whole(case: Case) -> MoE:
    module = rank_jobs.layer(getattr(torch, case.dtype), case.experts, shared_experts=case.shared_experts)
    return quantise_experts(module, case.quantisation) if case.quantisation != "none" else module


def tokens(case: Case, rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and mask of a rank; what a masked token holds must not reach any result."""
    group = rank // case.tp
    x = rank_jobs.tokens_of(group, count, getattr(torch, case.dtype), case.skew)
    if case.mask == "none":
        return x, None
    mask = torch.arange(count) < 4 - group if case.mask == "prefix" else (torch.arange(count) + group) % 3 != 1
    x[~mask] = torch.nan
    return x, mask


_tp_groups: dict[int, str] = {}


def tp_fields(rank: int, tp: int) -> dict[str, Any]:
    import torch.distributed as dist

    if tp == 1:
        return {}
    if tp not in _tp_groups:
        for first in range(0, dist.get_world_size(), tp):
            group = dist.new_group(range(first, first + tp))
            if first <= rank < first + tp:
                _tp_groups[tp] = group.group_name
    return {"tp_size": tp, "tp_rank": rank % tp, "tp_group": _tp_groups[tp]}


def deployment(rank: int, case: Case, **more: Any) -> Any:
    fields = {"max_tokens": 16} if case.dynamic or not case.equal else {}
    return rank_jobs.deployment(
        rank, equal_tokens=case.equal, mask_is_prefix=case.mask == "prefix", shared_expert_ranks=case.shared_ranks,
        shared_experts=case.shared_experts, **fields, **tp_fields(rank, case.tp), **more,
    )  # fmt: skip


def lower_and_run(rank: int, case: Case) -> tuple[list[torch.Tensor], list[Any], tuple[int, ...]]:
    """This rank's results, (implementation, verdicts) of each graph, and the shape of its weights."""
    where = deployment(rank, case)
    module = shard_experts(whole(case), where)
    lowering = MoeLowering(where, case.comm, strict=True)
    torch._dynamo.reset()
    options = npugraph_ex_options(where, lowering=lowering, force_eager=True)
    compiled = torch.compile(module, backend="npugraph_ex", fullgraph=True, dynamic=case.dynamic, options=options)
    outputs = []
    with torch.no_grad():
        for per_rank in case.counts:
            x, mask = tokens(case, rank, per_rank[rank])
            outputs.append(compiled(x, mask) if mask is not None else compiled(x))
    return outputs, decided(lowering), tuple(module.w13.shape)


def eager(rank: int, case: Case) -> list[torch.Tensor]:
    """The generic operators themselves."""
    module = shard_experts(whole(case), deployment(rank, case))
    with torch.no_grad():
        return [module(*tokens(case, rank, per_rank[rank])) for per_rank in case.counts]


def decided(lowering: MoeLowering) -> list[Any]:
    """(implementation, reason, codes by implementation) of each block: what must be the same on every rank."""
    return [
        (b.comm, b.reason, {name: [v.code for v in verdict.violations] for name, verdict in b.verdicts.items()})
        for report in lowering.reports
        for b in report.blocks
    ]


def plain(module: MoE, name: str) -> torch.Tensor:
    """Weights of all experts in float64, dequantised."""
    weight = getattr(module, name).double()
    scale = getattr(module, f"{name}_scale", None)
    return weight if scale is None else weight * scale.double().unsqueeze(1)


def expected(case: Case, rank: int, count: int) -> torch.Tensor:
    """y [T, H] in float64 of the whole layer: routed experts by their weights, shared ones with weight 1."""
    module, (x, mask) = whole(case), tokens(case, rank, count)
    given = torch.where(mask.unsqueeze(1), x, 0) if mask is not None else x
    with torch.no_grad():
        logits = module.gate(given).float()
    weights, ids = reference.route(logits, None, rank_jobs.TOP_K, "softmax", True, 1, 1, "max", 1.0)
    y = reference.moe(given, weights, ids, plain(module, "w13"), plain(module, "w2"), mask=mask)
    for token in range(count):
        if mask is None or mask[token]:
            for w13, w2 in zip(plain(module, "shared_w13"), plain(module, "shared_w2"), strict=True):
                y[token] += reference.expert(given[token], w13, w2)
    return y
