"""AllToAll with exact splits: the whole block as one operator of ours, ``alltoall_experts``, for graphs not captured.

It sends exactly the rows that go to each rank, and needs their numbers on the host for that: a captured graph would keep
those of the capture. Source: vllm_ascend.token_dispatcher: TokenDispatcherWithAll2AllV.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.custom_ops.alltoall_experts import AllToAllExpertsCall
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.base import Form, Replacement
from moe_lowering.passes.implementations.gathered import route_call
from moe_lowering.passes.implementations.mlp import mlp_calls
from moe_lowering.passes.implementations.quantised_calls import PLAIN, tokens_calls
from moe_lowering.passes.implementations.tensor_parallel import OwnTokens, gather, tokens_per_rank
from moe_lowering.passes.implementations.unpermute import unpermute_call
from moe_lowering.passes.operator_calls import OperatorCall, Premises, Rules


def needs_no_host(deployment: Deployment) -> bool:
    """Whether no operator may read a size on the host while the graph runs: then the form is judged for the reason alone."""
    return deployment.capture or deployment.mode == "ge"


def _calls(spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall | Rules, ...]:
    """The rules of the form, and the calls that its kernel makes, whatever the weights are."""
    rules = Rules(
        "alltoall.exact",
        {
            "capture": deployment.capture,
            "mode": deployment.mode,
            "experts": spec.experts,
            "quantisation": spec.quantisation,
            "smooth_scales": spec.smooth_scales,
            "clips_activations": spec.has_h_clip,
            "zero_experts": spec.zero_experts,
            "has_scale_bias": spec.has_scale_bias,
            "counts_read_before_combine": spec.counts_read_before_combine,
        },
    )
    if needs_no_host(deployment):  # the form is refused already: violations of its operators would not help the user
        return (rules,)
    return (
        rules,
        *tokens_calls(spec),
        route_call(spec, spec.top_k, spec.experts + 1, [0, spec.experts]),
        route_call(spec, 1, spec.local_experts, [0, spec.local_experts]),
        *mlp_calls(spec, deployment, PLAIN),
        unpermute_call(spec),
    )


def _emit(block: Block, emit: Emitter, deployment: Deployment, premises: Premises) -> Replacement:
    spec, own_tokens = block.spec, OwnTokens(emit, block, deployment)
    with emit.at(block.combine, block.combine):
        flat = [
            None if n is None else own_tokens.of(emit.call(aten.reshape.default, n, [-1]))
            for n in (block.x_scale, block.mask)
        ]
        call: AllToAllExpertsCall[Node] = AllToAllExpertsCall.of(
            block.experts,
            x=own_tokens.of(emit.rows(block.x)),
            x_scale=flat[0],
            ids=own_tokens.of(emit.rows(block.ids)),
            weights=emit.cast(own_tokens.of(emit.rows(block.weights)), torch.float32),
            mask=flat[1],
            num_experts=spec.experts,
            ep_group=spec.ep_group,
            ep_size=spec.ep_size,
            max_tokens=tokens_per_rank(spec.max_tokens, spec),
            max_rows=spec.max_rows,
        )
        pair = emit.call(torch.ops.moe_lowering.alltoall_experts.default, *call)
        y, counts = emit.item(pair, 0), emit.item(pair, 1)
        return Replacement(emit.like(gather(emit, block, y), block.x), counts)


EXACT = Form("exact", _calls, _emit, sends_masks=False, keeps_max_rows=True)
