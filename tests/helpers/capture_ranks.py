"""What each rank does in the tests of captured communication: one MoE layer on device npu, captured for two sizes."""

from __future__ import annotations

import capture_jobs
import rank_jobs
import torch

from moe_lowering import MoeLowering, npugraph_ex_options, shard_experts, simulator

BUCKETS = (6, 10)  # tokens of a rank
REPLAYS = 10
KINDS = ("random", "same", "half")  # in turn; "same": one token, on all ranks, so that most experts have no rows


def tokens(rank: int, step: int) -> torch.Tensor:
    """x [T, hidden] of one replay."""
    length, kind = BUCKETS[step % len(BUCKETS)], KINDS[step % len(KINDS)]
    x = rank_jobs.tokens_of(10 * step + rank, length, torch.bfloat16, False)
    if kind == "random":
        return x
    one = rank_jobs.tokens_of(10 * step, 1, torch.bfloat16, False)
    rows = length if kind == "same" else length // 2
    return torch.cat([one.expand(rows, -1), x[rows:]])


def run_captured(rank: int, comm: str):
    """Outputs of the captured layer, whether each equals the lowered layer's without a graph, counts, operators, form."""
    torch._dynamo.reset()
    where = capture_jobs.deployment(rank, max_tokens=max(BUCKETS))
    module = shard_experts(rank_jobs.layer(torch.bfloat16), where).to("npu")
    lowering = MoeLowering(where, comm, strict=True)

    def compiled(dynamic, **options):
        given = npugraph_ex_options(where, **options)
        return torch.compile(lambda x: module(x), backend="npugraph_ex", fullgraph=True, dynamic=dynamic, options=given)

    fast, eager = compiled(True, lowering=lowering), compiled(True, comm=comm, strict=True, force_eager=True)
    before, outputs, equal = simulator.device.counts(), [], []
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        for step in range(REPLAYS):
            x = tokens(rank, step).to("npu")
            outputs.append(fast(x).cpu())
            equal.append(torch.equal(outputs[-1], eager(x).cpu()))
    counts = simulator.device.counts() - before
    forms = {(b.comm, b.verdicts[comm].form) for report in lowering.reports for b in report.blocks}
    return outputs, equal, counts, simulator.device.tapes()[-1].operators, forms


def exact_in_a_graph(rank: int):
    """(operator, file, line, message) of the refusal of an exact-split AllToAll that the model calls itself."""
    torch._dynamo.reset()
    where = capture_jobs.deployment(rank)
    layer = shard_experts(rank_jobs.layer(torch.bfloat16), where).to("npu")

    def model(x):
        weights = torch.full((x.shape[0], 3), 1 / 3, device=x.device)
        ids = (torch.arange(3, device=x.device) * 4).expand(x.shape[0], 3).to(torch.int32).contiguous()
        experts = [layer.w13], [layer.w2], [], [], "swiglu", 0.0, 1.702, False, "none", *[None] * 7
        place = rank_jobs.EXPERTS, where.ep_group, where.ep_size, 0, 0
        return torch.ops.moe_lowering.alltoall_experts(x, None, ids, weights, None, *experts, *place)[0] * 2  # planted

    x = rank_jobs.tokens_of(rank, 6, torch.bfloat16, False).to("npu")
    with torch.no_grad():
        direct = model(x).cpu().isfinite().all().item()
        try:
            torch.compile(model, backend="npugraph_ex", fullgraph=True)(x)
        except simulator.device.CaptureError as error:
            return direct, error.operator, error.place.file, error.place.line, str(error)
    return direct, "", "", 0, "nothing was refused"
