"""MC2: ``npu_moe_distribute_dispatch_v2`` > MLP > ``npu_moe_distribute_combine_v2``.

The operators order rows by local expert, source rank and token, like the generic ``dispatch``, and allocate the same
bound ``ep * max_tokens * min(k, E_local)``. Rows past the received ones are undefined; ``combine`` never reads them.
When T may differ between ranks, ``global_bs = max_tokens * ep`` says so; a mask and ``global_bs`` exclude each other.
With W8A8 and W4A8 weights dispatch quantises each token (quant_mode 2) and its int8 rows feed the MLP directly.
Auxiliary tensors go from dispatch to combine untouched. On A2, and in the two-level algorithm ("hierarchy"), both ends
take the routing weights, so dispatch stands where they exist.

With shared-expert ranks both ends are told their number and that of shared experts; such a rank receives the rows of one
expert, and combine adds what it sends back with weight 1. Its graph has the same operators, with other sizes.

A mask of padding (``Deployment.mask_is_prefix``) is passed as it is; any other one as [T, k], which A3 and A5 take.
Results of masked tokens are undefined and are selected to zero.
Sources: ops_transformer.dispatch, ops_transformer.combine, op_plugin.dispatch, op_plugin.combine: arguments;
ops_transformer.dispatch_kernel, ops_transformer.combine_kernel: values; vllm_ascend.token_dispatcher: TokenDispatcherWithMC2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import has_side_effect

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter, aten
from moe_lowering.passes.implementations.base import (
    Call,
    Form,
    Implementation,
    Replacement,
    result_quantities,
    stage_after,
)
from moe_lowering.passes.implementations.mlp import emit_mlp, mlp_calls
from moe_lowering.passes.implementations.tensor_parallel import Share, gather, share

TWO_LEVELS = "hierarchy"
PER_TOKEN = 2  # quant_mode: int8 with a scale per token


def _calls(spec: BlockSpec, deployment: Deployment) -> tuple[Call, ...]:
    both = result_quantities(
        spec,
        mask_dims=None if not spec.has_mask else 1 if deployment.mask_is_prefix else 2,
        mask_dtype="bool" if spec.has_mask else None,
    )
    sent = {"x_dtype": "int8"} if spec.quantised_input else {}  # which no dispatch takes: it quantises by itself
    quantised = _quant_mode(spec) == PER_TOKEN
    return (
        Call("npu_moe_distribute_dispatch_v2", {**both, **sent, "quant_mode": _quant_mode(spec), "has_scales": False}),
        *mlp_calls(spec, deployment, quantised),
        Call("npu_moe_distribute_combine_v2", both),
    )


def _quant_mode(spec: BlockSpec) -> int:
    return PER_TOKEN if spec.format.int8_rows else 0


@dataclasses.dataclass
class _Sent:
    """What dispatch returns, by name."""

    rows: Node
    scale: Node | None
    assist: Node
    counts: Node
    received: Node
    expand: Node | None


def _emit(block: Block, emit: Emitter, deployment: Deployment, quantities: dict[str, Any]) -> Replacement:
    _keep_communication()
    spec, mine = block.spec, Share(emit, block, deployment)
    start = stage_after(block, block.weights) if deployment.weighs_before_sending else block.dispatch
    shared = _shared_arguments(spec, deployment)
    group = (deployment.mc2_group, spec.ep_size, deployment.own_rank("ep"), spec.experts)
    with emit.at(start, block.dispatch):
        ids = mine.of(emit.rows(block.ids))
        if block.mask is not None:
            mask = mine.of(emit.call(aten.reshape.default, block.mask, [-1]))
            shared["x_active_mask"] = _active(emit, mask, spec, deployment)
        sent = _dispatch(emit, block, mine, ids, group, shared, deployment)
    with emit.at(max(block.mlp, start), block.mlp):
        y_rows = emit_mlp(emit, block, sent.rows, sent.scale, sent.counts, deployment)
    with emit.at(block.combine, block.combine):
        if sent.expand is not None:
            shared["expand_scales"] = sent.expand
        y = emit.call(
            torch.ops.npu.npu_moe_distribute_combine_v2.default, y_rows, ids, sent.assist, sent.received,
            mine.of(emit.rows(block.weights)), *group, **shared,
        )  # fmt: skip
        if block.mask is not None:
            y = zero_masked(emit, y, mask)
        return Replacement(emit.like(gather(emit, block, y), block.x), sent.counts)


def _shared_arguments(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    """What both ends take alike."""
    shared: dict[str, Any] = {"global_bs": share(spec.max_tokens, spec) * spec.ep_size}
    if spec.shared_expert_ranks:
        shared["shared_expert_num"] = spec.shared_experts
        shared["shared_expert_rank_num"] = spec.shared_expert_ranks
    if deployment.mc2_hierarchy:
        shared["comm_alg"] = TWO_LEVELS
        if deployment.chip.two_level_tp_world:
            shared["tp_world_size"] = deployment.chip.two_level_tp_world
    if deployment.chip.graph_mode_group_tp and deployment.mode == "ge":
        shared["group_tp"] = deployment.mc2_group
    return shared


def _dispatch(
    emit: Emitter,
    block: Block,
    mine: Share,
    ids: Node,
    group: tuple[str, int, int, int],
    shared: dict[str, Any],
    deployment: Deployment,
) -> _Sent:
    weights = {"expert_scales": mine.of(emit.rows(block.weights))} if deployment.weighs_before_sending else {}
    mode = _quant_mode(block.spec)
    sent = emit.call(
        torch.ops.npu.npu_moe_distribute_dispatch_v2.default, mine.of(emit.rows(block.x)), ids, *group,
        **weights, quant_mode=mode, expert_token_nums_type=1, **shared,
    )  # fmt: skip
    rows, scale, assist, counts, received = (emit.item(sent, i) for i in range(5))
    return _Sent(
        rows, scale if mode == PER_TOKEN else None, assist, counts, received, emit.item(sent, 6) if weights else None
    )


def _active(emit: Emitter, mask: Node, spec: BlockSpec, deployment: Deployment) -> Node:
    """The mask as dispatch takes it: [M] for a prefix, else [M, k]."""
    if deployment.mask_is_prefix:
        return mask
    column = emit.call(aten.unsqueeze.default, mask, 1)
    return emit.call(aten.repeat.default, column, [1, spec.top_k])


def zero_masked(emit: Emitter, y: Node, mask: Node) -> Node:
    """Results [M, H] of masked tokens, which are undefined, to zero."""
    value = y.meta["val"]
    zero = emit.constant(aten.full.default, [], 0.0, dtype=value.dtype, device=value.device, pin_memory=False)
    return emit.call(aten.where.self, emit.call(aten.unsqueeze.default, mask, 1), y, zero)


def _keep_communication() -> None:
    """torch_npu does not mark its communication operators: an unused dispatch would be dropped on one rank only."""
    for op in (torch.ops.npu.npu_moe_distribute_dispatch_v2, torch.ops.npu.npu_moe_distribute_combine_v2):
        has_side_effect(op.default)


MC2 = Implementation("mc2", lambda deployment: (Form("mc2", _calls, _emit, sends_masks=False),))
