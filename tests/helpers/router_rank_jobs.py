"""A layer with DeepSeek-V3's router in its own operators, on the ranks of a pool."""

from __future__ import annotations

from typing import Any

import rank_jobs
import torch
from torch import Tensor, nn

from moe_lowering import MoeLowering, moe_experts, npugraph_ex_options, shard_experts

GROUPS, KEPT, TOP_K, SCALE = 3, 2, 3, 2.5


def route(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    experts = logits.shape[-1]
    scores = logits.float().sigmoid()
    choice = scores + bias
    best = choice.view(-1, GROUPS, experts // GROUPS).topk(2, -1)[0].sum(-1).topk(KEPT, -1, sorted=False)[1]
    mask = torch.zeros(logits.shape[0], GROUPS).scatter(1, best, 1).unsqueeze(-1)
    mask = mask.expand(-1, -1, experts // GROUPS).reshape(-1, experts)
    ids = choice.masked_fill(~mask.bool(), float("-inf")).topk(TOP_K, -1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * SCALE, ids


class Layer(nn.Module):
    def __init__(self, deployment: Any) -> None:
        super().__init__()
        self.deployment = deployment
        self.bias = torch.linspace(-0.2, 0.2, rank_jobs.EXPERTS)
        self.experts = shard_experts(rank_jobs.layer(torch.bfloat16), deployment)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = route(self.experts.gate(x), self.bias)
        return moe_experts(
            x,
            weights,
            ids,
            self.experts.w13,
            self.experts.w2,
            num_experts=rank_jobs.EXPERTS,
            deployment=self.deployment,
        )


def lower_and_run(rank: int, comm: str, counts: list[tuple[int, ...]]) -> tuple[list[Tensor], list[str | None]]:
    """(results, what became of the routers) with T as an input of the graph."""
    deployment = rank_jobs.deployment(rank, max_tokens=64, equal_tokens=False)
    lowering = MoeLowering(deployment, comm, strict=True)
    torch._dynamo.reset()
    options = npugraph_ex_options(deployment, lowering=lowering, force_eager=True)
    compiled = torch.compile(Layer(deployment), backend="npugraph_ex", fullgraph=True, dynamic=True, options=options)
    with torch.no_grad():
        results = [compiled(rank_jobs.tokens_of(rank, each[rank], torch.bfloat16, False)) for each in counts]
    return results, [router.became for report in lowering.reports for router in report.routers]
