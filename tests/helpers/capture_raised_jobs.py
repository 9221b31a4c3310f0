"""What each rank does in the tests of raised models that are captured: on device npu, by npugraph_ex, with only our options."""

from __future__ import annotations

import copy
import gc
from typing import Any

import capture_jobs
import npu_chain_layers as chains
import torch
import torch.distributed as dist

from moe_lowering import Deployment, MoeLowering, npugraph_ex_options, simulator

MODEL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def capture_model(rank: int) -> Any:
    """A plain Qwen3-MoE, on the first rank alone: of three inputs the logits and transformers' own on the CPU; what was counted;
    the report."""
    if rank:
        return None
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # it imports torch_npu

    torch.manual_seed(5)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).to(torch.bfloat16).eval()
    lowering = MoeLowering(Deployment(soc="A3"), strict=True)
    torch._dynamo.reset()
    options = npugraph_ex_options(lowering.deployment, lowering=lowering)
    compiled = torch.compile(copy.deepcopy(model).to("npu"), backend="npugraph_ex", options=options, fullgraph=True)
    before, pairs = simulator.device.counts(), []
    with torch.inference_mode():
        for step in range(3):
            ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
            pairs.append((compiled(ids.to("npu"), use_cache=False).logits.cpu(), model(ids, use_cache=False).logits))
    return pairs, simulator.device.counts() - before, _told(lowering)


def capture_chain(rank: int, case: dict[str, Any], comm: str) -> Any:
    """A hand-written MC2 chain in the communicator of its EP group, captured: of three inputs the result, the reference, and
    the chain without a graph; what was counted; the tape's operators; the report."""
    group = capture_jobs.hccl_group()
    name = capture_jobs.communicator(group)
    where = Deployment.from_groups(
        ep=group, providers=(("vllm_ascend", "0.23.0"),), weight_format="nz", hccl_buffer_mb=1024
    )
    given = dict(case)
    layer = chains.Mc2(name, given.pop("quantisation", "none"), "swiglu", rank, dist.get_world_size(), **given).to(
        "npu"
    )
    lowering = MoeLowering(where, comm, strict=True)
    torch._dynamo.reset()
    options = npugraph_ex_options(where, lowering=lowering)
    compiled = torch.compile(layer, backend="npugraph_ex", options=options, fullgraph=True, dynamic=False)
    before, found = simulator.device.counts(), []
    with torch.no_grad():
        for step in range(3):
            x, ids, weights = chains.inputs(10 * step + rank)
            on_device = [tensor.npu() for tensor in (x, ids, weights)]
            reference = chains.reference(layer, x, ids, weights) + x.double() @ layer.w_shared.cpu().double()
            found.append((compiled(*on_device).cpu(), reference))
        counts, operators = simulator.device.counts() - before, simulator.device.tapes()[-1].operators
        written = layer(*on_device).cpu()
    return found, written, counts, operators, _told(lowering)


def _told(lowering: MoeLowering) -> Any:
    (report,) = lowering.reports
    blocks = [(block.comm, block.raised_from, block.reason) for block in report.blocks]
    routers = [router.became for router in report.routers]
    return blocks, routers, report.fully_lowered and not report.not_capturable


def outputs_in_cycles(rank: int) -> list[bool]:
    """Outputs that only reference cycles keep, and a collection whenever npugraph_ex has asked which outputs live: of each
    replay, whether it is right."""
    from npugraph_ex._acl_concrete_graph.acl_graph import AclGraph

    asked = AclGraph.get_stale_list_from_weakref

    def collected_after(self: Any) -> Any:
        found = asked(self)
        if gc.isenabled():  # as the collector itself would
            gc.collect()
        return found

    compiled = torch.compile(lambda x: (x * 2 + 1, x - 1), backend="npugraph_ex", fullgraph=True, dynamic=True)
    AclGraph.get_stale_list_from_weakref, right = collected_after, []
    try:
        with torch.no_grad():
            for step in range(6):
                x = torch.arange(4.0 + step)
                results = compiled(x.npu())
                right.append(torch.equal(results[0].cpu(), x * 2 + 1))
                cycle: list[Any] = [results]
                cycle.append(cycle)
                del results, cycle
    finally:
        AclGraph.get_stale_list_from_weakref = asked
    return [*right, gc.isenabled()]
