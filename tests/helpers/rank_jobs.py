"""What runs on the ranks of a pool. Module-level functions: spawned processes import them by name."""

import copy
import time
from unittest import mock

import torch
import torch.distributed as dist

from moe_lowering import Deployment, MoE, MoeLowering, npugraph_ex_options, shard_experts, simulator, testing
from moe_lowering.limits.calls import schemas
from moe_lowering.limits.calls.schemas import LIBRARIES, TEXTS
from moe_lowering.passes.implementations.quantised_calls import CLIP_ROWS

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 128, 12, 3
_groups = {}


def fused_first(implementation, load):
    """A cost under which ``auto`` takes the fused operator wherever it is legal."""
    return ("fused_mc2", "mc2", "allgather", "alltoall").index(implementation)


def setup():
    simulator.enable("A3")


def deployment(rank, **fields):
    """A deployment over all ranks; the second group is made once per process."""
    size = dist.get_world_size()
    if "mc2" not in _groups:
        _groups["mc2"] = dist.new_group(range(size)).group_name
    return Deployment(
        ep_size=size, ep_rank=rank, ep_group=dist.group.WORLD.group_name, mc2_group=_groups["mc2"],
        **{"providers": (("vllm_ascend", "0.23.0"),), "weight_format": "nz", "hccl_buffer_mb": 1024, **fields},
    )  # fmt: skip


def layer(dtype, experts=EXPERTS, top_k=TOP_K, **options):
    """The whole layer, the same on every rank."""
    module = MoE(HIDDEN, INTERMEDIATE, experts, top_k, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        scale = 4 if tensor is module.gate.weight else 1
        tensor.data = (torch.randn(tensor.shape, generator=generator) * scale / tensor.shape[-1] ** 0.5).to(
            tensor.dtype
        )
    return module


def tokens_of(rank, tokens, dtype, skew):
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    if skew:
        x = x[:1].expand(tokens, HIDDEN).contiguous() if tokens else x  # every token to the same experts
    return x.to(dtype)


def lower_and_run(rank, comm, dtype_name, counts, options):
    return _lower_and_run(rank, comm, getattr(torch, dtype_name), counts, **options)


def _lower_and_run(
    rank, comm, dtype, counts, equal=True, dynamic=False, skew=False, experts=EXPERTS, top_k=TOP_K, bounded=True,
    max_rows=0, unpermute_operator="token_unpermute",
):  # fmt: skip
    """Compile this rank's shard through npugraph_ex and run it once per entry of ``counts`` (T by rank).

    Returns (outputs, implementations chosen per graph).
    """
    fields = {"max_tokens": 64} if bounded and (dynamic or not equal) else {}
    where = deployment(rank, equal_tokens=equal, max_rows=max_rows, unpermute_operator=unpermute_operator, **fields)
    module = shard_experts(layer(dtype, experts, top_k), where)
    lowering = MoeLowering(where, comm, strict=True, cost=fused_first)
    torch._dynamo.reset()
    options = npugraph_ex_options(where, lowering=lowering, force_eager=True)
    compiled = torch.compile(module, backend="npugraph_ex", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        outputs = [compiled(tokens_of(rank, per_rank[rank], dtype, skew)) for per_rank in counts]
    return outputs, [block.comm for report in lowering.reports for block in report.blocks]


def run_until_killed(rank, comm):
    """Call a compiled layer until another rank is gone."""
    where = deployment(rank)
    module = shard_experts(layer(torch.bfloat16), where)
    options = npugraph_ex_options(where, comm=comm, strict=True, force_eager=True)
    compiled = torch.compile(module, backend="npugraph_ex", fullgraph=True, options=options)
    x = tokens_of(rank, 4, torch.bfloat16, False)
    with torch.no_grad():
        for _ in range(100_000):
            compiled(x)


def compile_with_agreement(rank, fields_by_rank, timeout):
    """The error of the first call of a layer whose options ask for agreement; the implementation when there is none."""
    where = deployment(rank, **fields_by_rank.get(rank, {}))
    module = shard_experts(layer(torch.bfloat16), where)
    lowering = MoeLowering(where, "mc2", strict=True)
    options = npugraph_ex_options(where, lowering=lowering, force_eager=True, agreement_timeout=timeout)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="npugraph_ex", fullgraph=True, options=options)
    try:
        with torch.no_grad():
            compiled(tokens_of(rank, 4, torch.bfloat16, False))
    except Exception as error:
        return str(error)
    return lowering.reports[-1].blocks[0].comm


def choices(rank, counts, rule_removed=False):
    """The implementation each rank chooses for its own token count, without running anything."""
    from moe_lowering.passes import decision

    where = deployment(rank, equal_tokens=False, max_tokens=2048)
    module = shard_experts(layer(torch.bfloat16), where)
    declared = decision.declared_tokens
    if rule_removed:  # the rules see this rank's own T
        decision.declared_tokens = lambda _: counts[rank]
    try:
        x = tokens_of(rank, counts[rank], torch.bfloat16, False)
        lowering = MoeLowering(where, cost=fused_first)
        lowered = testing.lower_graph(module, x, deployment=where, lowering=lowering)
    finally:
        decision.declared_tokens = declared
    return [block.comm for block in lowered.report.blocks]


def agree(rank, common, by_rank, timeout, late=None):
    """The message of the disagreement, "" when all agree. A rank that is late comes when the others have given up."""
    from moe_lowering.agreement import AgreementError, check_agreement

    fields = {"ep_size": 4, "ep_group": "ep", "max_tokens": 128, **common, **by_rank.get(rank, {})}
    if rank == late:
        time.sleep(timeout + 1)
    try:
        check_agreement(Deployment(ep_rank=rank, **fields), timeout=timeout)
    except AgreementError as error:
        return str(error)
    return ""


def agree_with_library(rank, having):
    """The library that brings ``npu_swiglu_clip_quant`` is loaded on the ranks ``having``; of another name, as the simulator
    has brought the real one to all of them."""
    with (
        mock.patch.dict(LIBRARIES, {CLIP_ROWS: "planted"}),
        mock.patch.object(schemas, "schema", schemas.schema.__wrapped__),  # what is cached has the real name
        torch.library._scoped_library("planted", "DEF") as library,
    ):
        if rank in having:
            library.define(TEXTS[CLIP_ROWS])
        return agree(rank, {}, {}, 20.0)


def agree_before_first(rank, by_rank, silent=(), timeout="auto", often=()):
    """As the options of a backend do it. ``silent`` ranks never compile; ``often`` ones make options and compile thrice."""
    from moe_lowering.agreement import AgreementError, agreement_before_first

    where = deployment(rank, **by_rank.get(rank, {}))
    if rank in silent:
        return "silent"
    try:
        for _ in range(3 if rank in often else 1):
            agreement_before_first(where, MoeLowering(where, "mc2"), timeout)
            agreement_before_first(where, MoeLowering(where), timeout)()
    except AgreementError as error:
        return str(error)
    return ""


def agree_with_wrong_size(rank):
    from moe_lowering.agreement import agreement_before_first

    where = copy.copy(deployment(rank))
    object.__setattr__(where, "ep_size", 2)  # as when it was made for other groups
    try:
        agreement_before_first(where, MoeLowering(deployment(rank)), "auto")()
    except ValueError as error:  # after this rank has answered: the others do not wait for it
        return str(error)
    return ""


def agree_on_decisions(rank, graphs_of, declared=None):
    """``graphs_of``: the implementation of the one block in each graph of a rank; by default one graph, AllGather."""
    from moe_lowering.agreement import AgreementError, check_agreement
    from moe_lowering.report.records import BlockReport, LoweringReport

    where = Deployment(ep_size=4, ep_rank=rank, ep_group="ep", **(declared or {}))
    lowering = MoeLowering(where)
    for comm in graphs_of.get(rank, ["allgather"]):
        block = BlockReport("combine", comm, "", (), (), {})
        lowering.reports.append(LoweringReport((block,), (), 0, 0, 0.0))
    try:
        check_agreement(where, lowering, timeout=20.0)
    except AgreementError as error:
        return str(error)
    return ""


def agree_on_settings(rank, comm_of, cost_of):
    from moe_lowering.agreement import AgreementError, check_agreement

    where = Deployment(ep_size=4, ep_rank=rank, ep_group="ep")
    prefers = cost_of.get(rank, "mc2")
    try:
        lowering = MoeLowering(where, comm_of.get(rank, "allgather"), cost=lambda name, load: float(name != prefers))
        check_agreement(where, lowering, timeout=20.0)
    except AgreementError as error:
        return str(error)
    return ""


def mutated(rank, comm, mutation, experts=EXPERTS, top_k=TOP_K, unpermute_operator="token_unpermute"):
    """This rank's output of a lowered layer that was broken on purpose; the text of a kernel's refusal."""
    from moe_lowering import lowering_backend

    where = deployment(rank, unpermute_operator=unpermute_operator)
    module = shard_experts(layer(torch.bfloat16, experts, top_k), where)
    if mutation == "gate_and_up_swapped":
        module.w13.data = module.w13.roll(INTERMEDIATE, -1)

    def mutate(gm, example_inputs, config):
        if mutation in MUTATIONS:
            MUTATIONS[mutation](gm)
            gm.recompile()

    torch._dynamo.reset()
    backend = lowering_backend(MoeLowering(where, comm, strict=True), mutate)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    try:
        with torch.no_grad():
            return compiled(tokens_of(rank, 6, torch.bfloat16, False))
    except ValueError as refusal:
        return str(refusal)


def _nodes(gm, *targets):
    found = [node for node in gm.graph.nodes if node.target in targets]
    assert found, f"no {targets} in the lowered graph: the mutation would change nothing"
    return found


def _replace_argument(gm, node, index, op, *args):
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(op, (node.args[index], *args))
    node.args = (*node.args[:index], new, *node.args[index + 1 :])


def _unweighted(gm):
    """The routing weights are argument 4 of the two that communicate, and 2 of unpermute."""
    npu, own = torch.ops.npu, torch.ops.moe_lowering
    unpermute = npu.npu_moe_token_unpermute.default
    for node in _nodes(gm, unpermute, npu.npu_moe_distribute_combine_v2.default, own.dispatch_ffn_combine.default):
        _replace_argument(gm, node, 2 if node.target is unpermute else 4, torch.ops.aten.ones_like.default)


def _shifted_counts(gm):
    for node in _nodes(gm, torch.ops.npu.npu_grouped_matmul.default):
        with gm.graph.inserting_before(node):
            rolled = gm.graph.call_function(torch.ops.aten.roll.default, (node.kwargs["group_list"], [1], [0]))
        node.kwargs = {**node.kwargs, "group_list": rolled}


def _absolute_row_index(gm):
    """The seed's abs(-1): a slot of another rank reads row 1, with a weight that is not zero."""
    (unpermute,) = _nodes(gm, torch.ops.npu.npu_moe_token_unpermute.default)
    remainder = unpermute.args[1]
    with gm.graph.inserting_before(unpermute):
        index = gm.graph.call_function(torch.ops.aten.abs.default, (remainder.args[0],))
    unpermute.args = (unpermute.args[0], index, *unpermute.args[2:])


def _finalize(gm):
    (node,) = _nodes(gm, torch.ops.npu.npu_moe_finalize_routing.default)
    return node


def _absolute_index_of_finalize(gm):
    """The seed's abs(-1) again."""
    _replace_argument(gm, _finalize(gm), 5, torch.ops.aten.abs.default)


def _finalize_by_column(gm):
    """drop_pad_mode 1: the index is read choice by choice."""
    node = _finalize(gm)
    node.args = (*node.args[:7], 1)


def _finalize_without_drop(gm):
    """drop_pad_mode 2, which reads no -1, with the rows as it wants them."""
    node = _finalize(gm)
    node.args = (node.args[0].args[0], *node.args[1:7], 2)


def _finalize_unweighted(gm):
    _replace_argument(gm, _finalize(gm), 4, torch.ops.aten.ones_like.default)


def _undefined_rows(gm):
    for node in _nodes(gm, torch.ops.aten.masked_fill_.Scalar):
        gm.graph.erase_node(node)


def _spare_row(gm):
    for node in _nodes(gm, torch.ops.aten.fill_.Scalar):
        gm.graph.erase_node(node)


MUTATIONS = {
    "unweighted_combine": _unweighted,
    "counts_shifted": _shifted_counts,
    "absolute_row_index": _absolute_row_index,
    "undefined_rows_let_through": _undefined_rows,
    "spare_row_let_through": _spare_row,
    "absolute_index_of_finalize": _absolute_index_of_finalize,
    "finalize_by_column": _finalize_by_column,
    "finalize_without_drop": _finalize_without_drop,
    "finalize_unweighted": _finalize_unweighted,
}
