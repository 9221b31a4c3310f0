"""What each rank does in the tests of captured models: sharded, on device npu, against the same without a graph."""

from __future__ import annotations

import copy
import dataclasses
import time

import capture_jobs
import capture_models
import torch

from moe_lowering import MoeLowering, npugraph_ex_options, shard_experts, simulator
from moe_lowering.cli.lower import compare
from moe_lowering.simulator.device import Counts

BUCKETS = (4, 8)  # tokens of a rank
KINDS = ("random", "same", "half")  # in turn; "same": one token, on all ranks, so that most experts have no rows
# the smallest hidden size that MC2 takes (mc2.hidden), and widths that dispatch_ffn_combine takes
SIZES = {"hidden_size": 1024, "intermediate_size": 128, "moe_intermediate_size": 128}
EXPERTS = 12  # three on each of four ranks, the fewest that dispatch_ffn_combine takes (fused.local_experts)
COUNTED = {"qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}


@dataclasses.dataclass
class Seen:
    """What one rank saw. ``equal``: of each replay, whether logits and every block's result are those without a graph."""

    equal: list[bool]
    errors: compare.Errors
    compared: int
    counts: Counts
    operators: list[str]
    blocks: list[tuple[str, str]]
    routings: list[set[tuple[int, ...]]]  # of each MoE layer, over all replays
    fewest: int
    seconds: float = 0.0  # of this process
    compile_seconds: float = 0.0  # of them, up to the first result


def tokens(rank: int, step: int) -> torch.Tensor:
    """Token ids [1, T] of one replay of one rank."""
    length, kind = BUCKETS[step % len(BUCKETS)], KINDS[step % len(KINDS)]
    own, shared = (torch.Generator().manual_seed(seed) for seed in (10 * step + rank + 1, 10 * step))
    ids = torch.randint(0, capture_models.VOCABULARY, (1, length), generator=own)
    if kind != "random":
        ids[:, : length if kind == "same" else length // 2] = torch.randint(
            0, capture_models.VOCABULARY, (1, 1), generator=shared
        )
    return ids


def run_model(rank: int, name: str, layers: int, comm: str, replays: int, compared_every: int) -> Seen:
    """``replays`` replays with new inputs each, and of some the comparison with the whole model's own experts."""
    torch._dynamo.reset()
    where = capture_jobs.deployment(rank, max_tokens=max(BUCKETS))
    sizes = {**SIZES, COUNTED[name]: EXPERTS, "num_hidden_layers": layers}
    whole = capture_models.build(name, torch.bfloat16, **sizes)
    model = copy.deepcopy(whole)
    model.set_experts_implementation("moe_lowering")
    shard_experts(model, where).to("npu")
    compare.use_reference(whole)
    taken, lowering = compare.record(model), MoeLowering(where, comm, strict=True)

    given = npugraph_ex_options(where, lowering=lowering)
    fast = torch.compile(
        lambda ids: model(ids, use_cache=False).logits,
        backend="npugraph_ex",
        fullgraph=True,
        dynamic=True,
        options=given,
    )

    def run(ids):
        taken.clear()
        logits = fast(ids.npu()).cpu()
        return logits, [tuple(tensor.cpu() for tensor in block) for block in taken]  # the next replay writes over them

    before, began = simulator.device.counts(), time.process_time()
    seen = Seen([], compare.Errors(), 0, before, [], [], [set() for _ in compare.moe_modules(model)], 10**9)
    graphs: list[object] = []
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        for step in range(replays):
            ids = tokens(rank, step)
            logits, blocks = run(ids)
            graphs = graphs or capture_models.graphs_of_this_process()
            with capture_models.without_graphs(graphs):
                expected, eager_blocks = run(ids)
            if not step:
                seen.compile_seconds = time.process_time() - began
            same = [torch.equal(a[-1], b[-1]) for a, b in zip(blocks, eager_blocks, strict=True)]
            seen.equal.append(torch.equal(logits, expected) and all(same) and len(same) == len(seen.routings))
            for routings, block in zip(seen.routings, blocks, strict=True):
                routings.add(tuple(block[1].flatten().tolist()))
                seen.fewest = min(seen.fewest, len(block[1].unique()))
            if step % compared_every == 0:
                seen.errors = seen.errors.merge(compare.compare(whole, ids, logits, blocks))
                seen.compared += 1
    seen.counts = simulator.device.counts() - before
    seen.operators = simulator.device.tapes()[-1].operators
    seen.blocks = [(b.comm, b.verdicts[comm].form) for report in lowering.reports for b in report.blocks]
    assert all(report.not_capturable == () for report in lowering.reports)
    seen.seconds = time.process_time() - began
    return seen
