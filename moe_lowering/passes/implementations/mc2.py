"""MC2: ``npu_moe_distribute_dispatch_v2`` > MLP > ``npu_moe_distribute_combine_v2``.

The operators order rows by local expert, source rank and token, like the generic ``dispatch``, and allocate the same
bound ``ep * max_tokens * min(k, E_local)``. Rows past the received ones are undefined; ``combine`` never reads them.
When T may differ between ranks, ``global_bs = max_tokens * ep`` says so; a mask and ``global_bs`` exclude each other.
With W8A8 and W4A8 weights dispatch quantises each token (quant_mode 2), times its expert's smooth scales where there are
any, and its int8 rows feed the MLP directly.
Auxiliary tensors go from dispatch to combine untouched. On A2, and in the two-level algorithm ("hierarchy"), both ends
take the routing weights, so dispatch stands where they exist.

With shared-expert ranks both ends are told their number and that of shared experts; such a rank receives the rows of one
expert, and combine adds what it sends back with weight 1. Its graph has the same operators, with other sizes.

A mask of padding (``Deployment.mask_is_prefix``) is passed as it is; any other one as [T, k], which A3 and A5 take.
Results of masked tokens are undefined and are selected to zero. Ids of experts that give nothing are told by their number.
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
from moe_lowering.limits.calls.tensors import data_dependent
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.base import Form, Implementation, Replacement, stage_after
from moe_lowering.passes.implementations.mlp import emit_mlp, mlp_calls
from moe_lowering.passes.implementations.tensor_parallel import OwnTokens, gather, tokens_per_rank
from moe_lowering.passes.operator_calls import OperatorCall, Premises, Rules, emit_call, tensor

TWO_LEVELS = "hierarchy"
PER_TOKEN = 2  # quant_mode: int8 with a scale per token
DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"


def _rules(spec: BlockSpec, deployment: Deployment) -> Rules:
    fixed = {
        "ep_size": spec.ep_size,
        "has_mask": spec.has_mask,
        "mask_is_prefix": deployment.mask_is_prefix,
        "comm_alg": _algorithm(deployment),
        "has_weights": deployment.weighs_before_sending,
        "has_communicator": bool(deployment.mc2_group),
        "communicator_is_shared": deployment.mc2_group in spec.collective_groups,
        "counts_read_before_weights": spec.counts_read_before_weights,
    }
    return Rules(
        "mc2",
        lambda premises: {
            **fixed,
            "data_dependent_bound": spec.max_tokens > 0 and data_dependent([premises.own_tokens]),
        },
    )


def _calls(spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall | Rules, ...]:
    # Left out: the rule on has_communicator has the better message
    words = {} if deployment.mc2_group else {"group_length": None}
    return (
        OperatorCall(DISPATCH, lambda premises: _judged_dispatch(spec, deployment, premises), words),
        *mlp_calls(spec, deployment),
        OperatorCall(COMBINE, lambda premises: _judged_combine(spec, deployment, premises), words),
    )


def _judged_dispatch(spec: BlockSpec, deployment: Deployment, premises: Premises) -> dict[str, Any]:
    tokens = _judged_tokens(spec, deployment, tokens_per_rank(premises.tokens, spec))
    # no dispatch takes int8 tokens: it quantises by itself
    x = tensor(torch.int8 if spec.quantised_input else spec.dtype, tokens.weights.shape[0], spec.hidden)
    smooth = tensor(torch.float32, spec.experts, spec.hidden) if spec.has_x_smooth else None
    return dispatch_arguments(spec, deployment, None, x, tokens, smooth)


def _judged_combine(spec: BlockSpec, deployment: Deployment, premises: Premises) -> dict[str, Any]:
    tokens = _judged_tokens(spec, deployment, tokens_per_rank(premises.tokens, spec))
    expand = tensor(torch.float32, None) if deployment.weighs_before_sending else None
    numbers = tensor(torch.int32, None)  # how many there are depends on the kind of rank
    sent = _Sent(tensor(spec.dtype, None, spec.hidden), None, numbers, None, numbers, expand)
    return combine_arguments(spec, deployment, None, sent.rows, tokens, sent)


def _judged_tokens(spec: BlockSpec, deployment: Deployment, count: Any) -> _Tokens:
    mask = None
    if spec.has_mask:
        mask = tensor(torch.bool, *((count,) if deployment.mask_is_prefix else (count, spec.top_k)))
    ids, weights = (tensor(dtype, count, spec.top_k) for dtype in (torch.int32, torch.float32))
    return _Tokens(ids, weights, mask)


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """What both ends take of this rank's tokens: ids [M, k], weights [M, k], and the mask. Nodes or records."""

    ids: Any
    weights: Any
    mask: Any


def dispatch_arguments(
    spec: BlockSpec, deployment: Deployment, rank: int | None, x: Any, tokens: _Tokens, x_smooth: Any = None
) -> dict[str, Any]:
    """Of dispatch of x [M, H] on EP rank ``rank``; None in a call that is judged for all ranks."""
    weights = {"expert_scales": tokens.weights} if deployment.weighs_before_sending else {}
    return {
        "x": x,
        "expert_ids": tokens.ids,
        **_group(spec, deployment, rank),
        **weights,
        **({} if x_smooth is None else {"scales": x_smooth}),
        "quant_mode": _quant_mode(spec),
        "expert_token_nums_type": 1,
        **_shared_arguments(spec, deployment, tokens.mask),
    }


def combine_arguments(
    spec: BlockSpec, deployment: Deployment, rank: int | None, rows: Any, tokens: _Tokens, sent: _Sent
) -> dict[str, Any]:
    """Of combine of rows [N, H], with what dispatch made."""
    expand = {} if sent.expand is None else {"expand_scales": sent.expand}
    return {
        "expand_x": rows,
        "expert_ids": tokens.ids,
        "assist_info_for_combine": sent.assist,
        "ep_send_counts": sent.received,
        "expert_scales": tokens.weights,
        **_group(spec, deployment, rank),
        **_shared_arguments(spec, deployment, tokens.mask),
        **expand,
    }


def _group(spec: BlockSpec, deployment: Deployment, rank: int | None) -> dict[str, Any]:
    return {
        "group_ep": deployment.mc2_group,
        "ep_world_size": spec.ep_size,
        "ep_rank_id": rank,
        "moe_expert_num": spec.experts,
    }


def _shared_arguments(spec: BlockSpec, deployment: Deployment, mask: Any) -> dict[str, Any]:
    """The keyword arguments that dispatch and combine have in common."""
    shared: dict[str, Any] = {"global_bs": global_tokens(spec)}
    if spec.shared_expert_ranks:
        shared["shared_expert_num"] = spec.shared_experts
        shared["shared_expert_rank_num"] = spec.shared_expert_ranks
    if spec.zero_experts:
        shared["zero_expert_num"] = spec.zero_experts
    if _algorithm(deployment):
        shared["comm_alg"] = _algorithm(deployment)
        if deployment.chip.two_level_tp_world:
            shared["tp_world_size"] = deployment.chip.two_level_tp_world
    if deployment.chip.graph_mode_group_tp and deployment.mode == "ge":
        shared["group_tp"] = deployment.mc2_group
    return shared if mask is None else {**shared, "x_active_mask": mask}


def global_tokens(spec: BlockSpec) -> int:
    """``global_bs``: what all ranks have of tokens at most, 0 where their numbers are equal."""
    return int(tokens_per_rank(spec.max_tokens, spec)) * spec.ep_size


def _algorithm(deployment: Deployment) -> str:
    return TWO_LEVELS if deployment.mc2_hierarchy else ""


def _quant_mode(spec: BlockSpec) -> int:
    return PER_TOKEN if spec.format.int8_rows else 0


@dataclasses.dataclass
class _Sent:
    """What dispatch returns, by name. Nodes or records."""

    rows: Any
    scale: Any
    assist: Any
    counts: Any
    received: Any
    expand: Any


def _emit(block: Block, emit: Emitter, deployment: Deployment, premises: Premises) -> Replacement:
    _keep_communication()
    spec, own_tokens, rank = block.spec, OwnTokens(emit, block, deployment), deployment.own_rank("ep")
    start = stage_after(block, block.weights) if deployment.weighs_before_sending else block.dispatch
    with emit.at(start, block.dispatch):
        ids, mask, active = own_tokens.of(emit.rows(block.ids)), None, None
        if block.mask is not None:
            mask = own_tokens.of(emit.call(aten.reshape.default, block.mask, [-1]))
            active = _active(emit, mask, spec, deployment)
        weights = _scales(emit, block, own_tokens) if deployment.weighs_before_sending else None
        x = own_tokens.of(emit.rows(block.x))
        arguments = dispatch_arguments(spec, deployment, rank, x, _Tokens(ids, weights, active), block.x_smooth)
        sent = _emit_dispatch(emit, emit_call(emit, DISPATCH, arguments), spec, deployment)
    with emit.at(max(block.mlp, start), block.mlp):
        y_rows = emit_mlp(emit, block, sent.rows, sent.scale, sent.counts, deployment)
    with emit.at(block.combine, block.combine):
        tokens = _Tokens(ids, _scales(emit, block, own_tokens) if weights is None else weights, active)
        y = emit_call(emit, COMBINE, combine_arguments(spec, deployment, rank, y_rows, tokens, sent))
        if mask is not None:
            y = zero_masked_rows(emit, y, mask)
        return Replacement(emit.like(gather(emit, block, y), block.x), sent.counts)


def _scales(emit: Emitter, block: Block, own_tokens: OwnTokens) -> Node:
    """The routing weights of this rank's tokens as both ends take them."""
    return emit.cast(own_tokens.of(emit.rows(block.weights)), torch.float32)


def _emit_dispatch(emit: Emitter, sent: Node, spec: BlockSpec, deployment: Deployment) -> _Sent:
    rows, scale, assist, counts, received = (emit.item(sent, i) for i in range(5))
    expand = emit.item(sent, 6) if deployment.weighs_before_sending else None
    return _Sent(rows, scale if _quant_mode(spec) == PER_TOKEN else None, assist, counts, received, expand)


def _active(emit: Emitter, mask: Node, spec: BlockSpec, deployment: Deployment) -> Node:
    """The mask as dispatch takes it: [M] for a prefix, else [M, k]."""
    if deployment.mask_is_prefix:
        return mask
    column = emit.call(aten.unsqueeze.default, mask, 1)
    return emit.call(aten.repeat.default, column, [1, spec.top_k])


def zero_masked_rows(emit: Emitter, y: Node, mask: Node) -> Node:
    """Results [M, H] of masked tokens, which are undefined, to zero."""
    value = y.meta["val"]
    zero = emit.constant(aten.full.default, [], 0.0, dtype=value.dtype, device=value.device, pin_memory=False)
    return emit.call(aten.where.self, emit.call(aten.unsqueeze.default, mask, 1), y, zero)


def _keep_communication() -> None:
    """torch_npu does not mark its communication operators: an unused dispatch would be dropped on one rank only."""
    for name in (DISPATCH, COMBINE):
        if hasattr(torch.ops.npu, name):  # a price is asked for without torch_npu, too
            has_side_effect(getattr(torch.ops.npu, name).default)


MC2 = Implementation("mc2", _rules, lambda deployment: (Form("mc2", _calls, _emit, sends_masks=False),))
