"""What each rank does in the tests of the simulated process group (``Ranks`` needs functions of a module)."""

from __future__ import annotations

import dataclasses

import rank_jobs
import torch
import torch.distributed as dist

from moe_lowering import Deployment, MoeLowering, moe_experts, route, shard_experts, simulator

c10d = torch.ops._c10d_functional


def hccl_group():
    return dist.new_group(backend="hccl")


def communicator(group):
    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank(group))


def run_collectives(rank):
    """The results of each collective on x = [4r, 4r+1, 4r+2, 4r+3], as lists."""
    group = hccl_group()
    x = torch.arange(4.0, device="npu") + 4 * rank
    found = {}
    gathered = torch.empty(8, device="npu")
    dist.all_gather_into_tensor(gathered, x, group=group)
    found["all_gather_into_tensor"] = gathered.tolist()
    listed = [torch.empty(4, device="npu") for _ in range(2)]
    dist.all_gather(listed, x, group=group)
    found["all_gather"] = [t.tolist() for t in listed]
    shares = [torch.empty(3, device="npu"), torch.empty(1, 2, device="npu")]
    dist.all_gather(shares, x[:3] if rank == 0 else x[None, :2], group=group)
    found["all_gather uneven"] = [t.tolist() for t in shares]
    half = torch.empty(2, device="npu")
    dist.reduce_scatter_tensor(half, x, group=group)
    found["reduce_scatter_tensor"] = half.tolist()
    for op in ("SUM", "MAX", "AVG"):
        total = x.clone()
        dist.all_reduce(total, op=getattr(dist.ReduceOp, op), group=group)
        found[f"all_reduce {op}"] = total.tolist()
    swapped = torch.empty(4, device="npu")
    dist.all_to_all_single(swapped, x, group=group)
    found["all_to_all_single"] = swapped.tolist()
    sizes = ([1, 3], [3, 1])  # rank 0 keeps one row and sends three
    uneven = torch.empty(2 if rank == 0 else 6, device="npu")
    dist.all_to_all_single(uneven, x, [sizes[0][rank], sizes[0][rank]] if rank == 0 else [3, 3], [1, 3], group=group)
    found["all_to_all_single uneven"] = uneven.tolist()
    sent = x.clone().to(torch.bfloat16)
    dist.broadcast(sent, 1, group=group)
    found["broadcast"] = sent.tolist()
    dist.barrier(group=group)
    name = group.group_name
    found["functional all_gather"] = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, name)).tolist()
    found["functional reduce_scatter"] = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 2, name)).tolist()
    found["functional all_reduce"] = c10d.wait_tensor(c10d.all_reduce(x, "sum", name)).tolist()
    found["functional all_to_all"] = c10d.wait_tensor(c10d.all_to_all_single(x, [2, 2], [2, 2], name)).tolist()
    return found


def deployment(rank, **fields):
    """Two groups over both ranks: EP by its name, MC2 by its communicator's. The second is made by ``from_groups``."""
    where = Deployment.from_groups(
        ep=hccl_group(), **{"providers": (("vllm_ascend", "0.23.0"),), "weight_format": "nz", "hccl_buffer_mb": 1024, **fields}
    )  # fmt: skip
    assert (where.soc, where.ep_size, where.ep_rank) == ("A3", dist.get_world_size(), rank)
    [made] = [found for found in where.detected if found.field == "mc2_group"]
    assert made.source == "HCCL's communicator of a second group over the ranks of ep"
    return where


def capture_lowered(rank, comm, replays):
    """A MoE layer on device npu, lowered and captured once: outputs and what the tape holds.

    Returns (outputs, the counts since the first call, operators of the tape, replay errors of NaN inputs).
    """
    where = deployment(rank)
    module = shard_experts(rank_jobs.layer(torch.bfloat16), where).to("npu")
    lowering = MoeLowering(where, comm, strict=True)
    compiled = torch.compile(
        module, backend="npugraph_ex", fullgraph=True, options={"post_grad_custom_pre_pass": lowering}
    )
    before = simulator.device.counts()
    outputs = []
    with torch.no_grad():
        for step in range(replays):
            x = rank_jobs.tokens_of(10 * step + rank, 6, torch.bfloat16, False)
            outputs.append(compiled(x.to("npu")).cpu())
    assert [b.comm for report in lowering.reports for b in report.blocks] == [comm]
    return outputs, simulator.device.counts() - before, simulator.device.tapes()[-1].operators


class InPieces(torch.nn.Module):
    """A layer whose tokens, ids and routing weights (in 16 bits) are columns of wider tensors."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, wide):
        layer = self.layer
        x = wide[:, : rank_jobs.HIDDEN]
        logits = layer.gate(x)
        weights, ids = route(torch.cat([logits, logits], 1)[:, : layer.num_experts], layer.top_k)
        weights = torch.cat([weights, ids.float()], 1).bfloat16()[:, : layer.top_k]
        ids = torch.cat([ids, ids + 1], 1)[:, : layer.top_k]
        return moe_experts(
            x,
            weights,
            ids,
            layer.w13,
            layer.w2,
            num_experts=layer.num_experts,
            deployment=layer.moe_lowering_deployment,
        )


def lower_in_pieces(rank, comm):
    """``InPieces`` on device npu, lowered; its result, and the collectives that are given something in pieces."""
    where = deployment(rank)
    module = InPieces(shard_experts(rank_jobs.layer(torch.bfloat16), where)).to("npu")
    lowering, found = MoeLowering(where, comm, strict=True), []

    def lower(graph, inputs, config):
        lowering(graph, inputs, config)
        sent = [node for node in graph.graph.nodes if getattr(node.target, "namespace", "") == c10d.name]
        found.extend(str(node) for node in sent if not node.args[0].meta["val"].is_contiguous())

    compiled = torch.compile(
        module, backend="npugraph_ex", fullgraph=True, options={"post_grad_custom_pre_pass": lower}
    )
    x = rank_jobs.tokens_of(rank, 6, torch.bfloat16, False)
    with torch.no_grad():
        y = compiled(torch.cat([x, torch.full_like(x, torch.nan)], 1).to("npu")).cpu()
    assert [b.comm for report in lowering.reports for b in report.blocks] == [comm]
    return y, found


def capture_collectives(rank, replays):
    """All functional collectives in one compiled graph, against the same without a graph."""
    name = hccl_group().group_name

    def function(x):
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, name))
        scattered = c10d.wait_tensor(c10d.reduce_scatter_tensor(gathered * 2, "sum", 2, name))
        swapped = c10d.wait_tensor(c10d.all_to_all_single(scattered + 1, [2, 2], [2, 2], name))
        return c10d.wait_tensor(c10d.all_reduce(swapped, "sum", name)) - 1

    compiled = torch.compile(function, backend="npugraph_ex", fullgraph=True)
    results = []
    for step in range(replays):
        x = torch.arange(4.0).npu() * (step + 1) + 10 * rank
        results.append((compiled(x).tolist(), function(x).tolist()))
    return results, simulator.device.tapes()[-1].operators


SPLITS = {
    "equal": (([2, 2], [2, 2]), ([2, 2], [2, 2])),
    "none": (([], []), ([], [])),
    "sent": (([1, 3], [1, 1]), ([1, 3], [3, 3])),  # rank 0 receives the same number from both, rank 1 too
    "received": (([1, 1], [1, 3]), ([3, 3], [1, 3])),
}


def capture_splits(rank, case, compiled):
    """all_to_all_single of 4 rows: "" and what two replays gave, or the error, its operator, file and line."""
    group = hccl_group()
    send, receive = SPLITS[case][rank]
    x = torch.arange(float(sum(send) or 4), device="npu") + 10 * rank
    out = torch.empty(sum(receive) or 4, device="npu")
    name = group.group_name

    def by_hand():
        dist.all_to_all_single(out, x, receive, send, group=group)  # planted

    def functional(x):
        return c10d.wait_tensor(c10d.all_to_all_single(x, receive or [2, 2], send or [2, 2], name)) * 1  # planted

    torch._dynamo.reset()
    found = []
    try:
        if compiled:
            fast = torch.compile(functional, backend="npugraph_ex", fullgraph=True)
            found = [fast(x + step).tolist() for step in range(2)]
        else:
            by_hand()  # without a graph any splits are right
            eager = out.tolist()
            graph = torch.npu.NPUGraph()
            with torch.npu.graph(graph):
                by_hand()
            for step in range(2):
                x.copy_(torch.arange(float(sum(send) or 4)) + 10 * rank + step)
                graph.replay()
                found.append(out.tolist())
            assert found[0] == eager
    except simulator.device.CaptureError as error:
        return str(error), error.operator, error.place.file, error.place.line
    return "", found


def misuse(rank, what):
    """The error of one call that must be refused, as text."""
    try:
        if what == "mc2 by group name":
            where = dataclasses.replace(deployment(rank), mc2_group=hccl_group().group_name)
            module = shard_experts(rank_jobs.layer(torch.bfloat16), where).to("npu")
            options = {"post_grad_custom_pre_pass": MoeLowering(where, "mc2", strict=True)}
            with torch.no_grad():
                torch.compile(module, backend="npugraph_ex", fullgraph=True, options=options)(
                    rank_jobs.tokens_of(rank, 6, torch.bfloat16, False).npu()
                )
        elif what == "cpu tensor":
            dist.all_reduce(torch.ones(2), group=hccl_group())
        elif what == "gloo group":
            dist.all_reduce(torch.ones(2, device="npu"), group=dist.new_group(backend="gloo"))
        elif what == "other rank":
            hccl_group()._get_backend(torch.device("npu")).get_hccl_comm_name(1 - rank)
        elif what == "in pieces":
            dist.all_gather_into_tensor(
                torch.empty(4, 2, device="npu"), torch.ones(2, 3, device="npu")[:, :2], group=hccl_group()
            )
        elif what == "barrier in capture":
            group = hccl_group()
            with torch.npu.graph(torch.npu.NPUGraph()):
                dist.barrier(group=group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
