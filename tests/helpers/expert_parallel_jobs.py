"""MoE blocks of transformers under its own expert parallelism (``AllReduceEP``), on the ranks of a pool."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from edit_outcomes import outcomes
from npu_chain_edits import edit
from raise_graphs import compiled_graph
from rank_jobs import setup
from torch import Tensor, nn

from moe_lowering import AgreementError, Deployment, MoeLowering
from moe_lowering.backends.aot import lowering_backend

__all__ = ["compare_blocks", "compile_block", "compile_with", "edited", "setup"]
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 128, 8, 2  # as small as MC2 takes them
_groups: list[str] = []


def block_of(family: str, dtype: torch.dtype) -> nn.Module:
    """The block of all experts, the same on every rank."""
    import transformers.models.gpt_oss.modeling_gpt_oss as gpt_oss
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen3_moe
    from transformers import GptOssConfig, Qwen3MoeConfig

    common = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    if family == "qwen3_moe":
        config = Qwen3MoeConfig(**common, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, norm_topk_prob=True)
        made: nn.Module = qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    else:
        config = GptOssConfig(**common, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
        made = gpt_oss.GptOssMLP(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.requires_grad_(False)
    return made.eval().to(dtype)


PARTLY_SHARED = "a part of something shared in the sum"
# Something else under ATen's name
torch.library.define("another_library::add", "(Tensor x, Tensor other, *, Scalar alpha=1) -> Tensor")
torch.library.impl("another_library::add", "CompositeExplicitAutograd", lambda x, other, alpha=1: x - other)
torch.library.register_fake("another_library::add", lambda x, other, alpha=1: torch.empty_like(x))


class Changed:
    """``AllReduceEP`` written again, with one thing that a twin does otherwise."""

    def __init__(self, experts: Any, rank: int, group: Any, change: str) -> None:
        self.forward, self.count, self.rank, self.group, self.change = (
            experts.forward, experts.num_experts, rank, group, change,
        )  # fmt: skip

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rank = (self.rank + (self.change == "the other rank's place")) % dist.get_world_size()
        given = ids + 1 if self.change == "a range off by one" else ids
        off = (given // self.count) != rank
        past = self.count - 1 if self.change == "an expert for those of others" else self.count
        own = torch.where(~off if self.change == "the condition inverted" else off, past, self.local(ids))
        masked = {"another mask at one end": off.flip(0), "the mask inverted": ~off, "weights of others": off & ~off}
        y = self.forward(x, own, weights.masked_fill(masked.get(self.change, off), 0.0))
        if self.change == "relu before the sum":
            y = y.relu()
        if self.change == PARTLY_SHARED:  # not a twin
            y = y + x * (self.rank + 1)
        if self.change == "a part by another library's add":
            y = torch.ops.another_library.add(y, x)
        if self.change == "a part added twice":
            y = torch.add(y, x, alpha=2)
        operation = {"a maximum": "max", "the mean": "avg"}.get(self.change, "sum")
        group = "another" if self.change == "another group" else self.group.group_name
        total = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(y, operation, group))
        return total + y if self.change == "one rank's result read" else total

    def local(self, ids: Tensor) -> Tensor:
        """The number of an expert among its rank's."""
        return ids % (self.count - 1 if self.change == "fewer experts on a rank" else self.count)


def shard(block: nn.Module, rank: int, implementation: str, change: str) -> None:
    """Keep this rank's experts, and let transformers run them."""
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.expert_parallel import AllReduceEP

    experts: Any = block.experts
    own = EXPERTS // dist.get_world_size()
    for name, parameter in list(experts.named_parameters()):
        mine = parameter.data[rank * own : (rank + 1) * own].clone()
        setattr(experts, name, nn.Parameter(mine, requires_grad=False))
    experts.num_experts, experts._is_expert_parallel = own, True
    experts.config._experts_implementation = implementation
    if change:
        experts.forward = Changed(experts, rank, dist.group.WORLD, change).__call__
        return
    with mock.patch.object(torch._C, "_get_accelerator", lambda: torch.device("cpu")):  # else the mesh is of npu
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    experts.forward = AllReduceEP(experts, mesh, mesh).__call__


def deployment(rank: int, **fields: Any) -> Deployment:
    """The EP group is the TP group."""
    size = dist.get_world_size()
    while len(_groups) < 2:
        _groups.append(dist.new_group(range(size)).group_name)
    places = {"ep_size": size, "ep_rank": rank, "tp_size": size, "tp_rank": rank, "tp_group": _groups[0]}
    return Deployment(
        soc="A3", ep_group=dist.group.WORLD.group_name, mc2_group=_groups[1], weight_format="nz",
        providers=(("vllm_ascend", "0.23.0"),), installed=(), **{"hccl_buffer_mb": 1024, **places, **fields},
    )  # fmt: skip


def compile_block(
    rank: int, family: str, implementation: str, dtype: torch.dtype, comm: str, tokens: int = 6, change: str = "",
    **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """What became of a block; its result, that of transformers without the pass, and that of all experts in float64."""
    whole = block_of(family, dtype)
    block = copy.deepcopy(whole)
    shard(block, rank, implementation, change)
    whole.experts.config._experts_implementation = "eager"
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    lowering = MoeLowering(deployment(rank, **fields), comm)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        lowered, written = (
            first(run(x)) for run in (torch.compile(block, backend=lowering_backend(lowering), fullgraph=True), block)
        )
        reference = first(whole.double()(x.double()))
    report = lowering.reports[0]
    return {
        "lowered": lowered,
        "written": written,
        "reference": reference,
        "blocks": [(b.comm, b.raised_from, b.reason, b.ops_after) for b in report.blocks],
        "foreign": [str(layer) for layer in report.foreign],
    }


def compile_with(rank: int, given: tuple[Any, ...], fields: dict[str, Any]) -> dict[str, Any]:
    """``compile_block`` in a deployment with other fields."""
    return compile_block(rank, *given, **fields)


def graph_of(rank: int, family: str, implementation: str, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """The graph of this rank's block as the pass gets it, and the inputs that it ran with."""
    block = block_of(family, dtype)
    shard(block, rank, implementation, "")
    with torch._dynamo.config.patch(specialize_float=True):
        return compiled_graph(block, torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(6)).to(dtype))


def edited(rank: int, case: tuple[Any, ...], comm: str, seeds: list[str]) -> list[tuple[str, str]]:
    """What became of graphs with random edits, the same on each rank: (outcome, what is wrong or "")."""
    gm, inputs = graph_of(rank, *case)
    return outcomes(gm, {str(at): tensor for at, tensor in enumerate(inputs)}, deployment(rank), comm, seeds)


def compare_blocks(rank: int, case: tuple[Any, ...], seed: str) -> tuple[bool, str]:
    """Of a graph with an edit: whether this rank's layer is raised, and with which error its graph then ends, before
    it sends anything, the comparison with the others.

    The buffer is no other test's: what ranks have agreed on is not compared again."""
    gm, inputs = graph_of(rank, *case)
    gm, _ = edit(gm, seed)
    lowering = MoeLowering(deployment(rank, hccl_buffer_mb=1022), "allgather")
    lowering(gm, agreement_timeout=1.0)
    if not lowering.reports[0].blocks:
        return False, ""
    try:
        gm(*inputs)
    except AgreementError as error:
        return True, type(error).__name__
    return True, ""


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
