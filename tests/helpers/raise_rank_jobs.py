"""Layers that others wrote, with experts spread over the ranks of a pool."""

import torch
import torch.distributed as dist
from foreign_forms import batched
from raise_graphs import lower, run, trace
from rank_jobs import deployment, setup

__all__ = ["layer", "lower_and_run", "routed", "setup", "tensors"]
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 1024, 128, 4, 2, 8


def tensors(rank, dtype):
    """x of this rank; router and all experts, the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    made = {
        "router": random(HIDDEN, EXPERTS) * 30,
        "w13": random(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        "w2": random(EXPERTS, HIDDEN, INTERMEDIATE),
    }
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank + 1)).to(dtype)
    return {"x": x} | made


def routed(x, router):
    return (x.float() @ router.float()).softmax(-1).topk(TOP_K, -1)


def layer(x, router, w13, w2):
    weights, ids = routed(x, router)
    return batched()(x, weights, ids, w13=w13, w2=w2)


def lower_and_run(rank, comm):
    """(what the pass did, this rank's y)."""
    made, own = tensors(rank, torch.bfloat16), EXPERTS // dist.get_world_size()
    mine = slice(rank * own, (rank + 1) * own)
    made |= {name: made[name][mine].contiguous() for name in ("w13", "w2")}
    gm = trace(layer, made)
    report = lower(gm, deployment=deployment(rank), comm=comm)
    blocks = [(block.comm, block.raised_from, block.reason) for block in report.blocks]
    return blocks, report.unlowered, run(gm, made) if report.fully_lowered else None
