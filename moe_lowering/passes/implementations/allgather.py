"""AllGather: every rank gets every token, computes its own experts, and the partial results are reduced.

One rank:  init_routing_v2 > MLP > token_unpermute.
EP group:  all_gather > init_routing_v2 (own experts only) > MLP > token_unpermute > reduce_scatter.
(finalize_routing in place of token_unpermute, with ``Deployment.unpermute_operator``.)

Why it is equivalent: ``gathered``, which emits all but the last step.
Source: vllm_ascend.prepare_finalize: all_gather and reduce_scatter around the experts.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.implementations.base import Form, Implementation, Replacement
from moe_lowering.passes.implementations.gathered import Partial, emit_partial, gathered_calls, gathered_words
from moe_lowering.passes.implementations.tensor_parallel import first_tokens, gather
from moe_lowering.passes.operator_calls import Premises, Rules

c10d = torch.ops._c10d_functional


def _emit(block: Block, emit: Emitter, deployment: Deployment, premises: Premises) -> Replacement:
    partial = emit_partial(block, emit, deployment)
    with emit.at(block.combine, block.combine):
        y = _reduce(emit, block, partial)
        return Replacement(emit.like(gather(emit, block, y), block.x), partial.counts)


def _reduce(emit: Emitter, block: Block, partial: Partial) -> Node:
    """This rank's own tokens, summed over the ranks that computed their experts."""
    spec = block.spec
    if spec.ep_size == 1:
        return partial.y
    reduced = emit.call(c10d.reduce_scatter_tensor.default, partial.y, "sum", spec.ep_size, spec.ep_group)
    y = emit.call(c10d.wait_tensor.default, reduced)
    return first_tokens(emit, y, partial.own) if spec.max_tokens else y


def _rules(spec: BlockSpec, deployment: Deployment) -> Rules:
    return Rules(
        "allgather",
        {
            "shared_expert_rank_num": spec.shared_expert_ranks,
            **gathered_words(spec, deployment),
        },
    )


ALLGATHER = Implementation("allgather", _rules, lambda deployment: (Form("allgather", gathered_calls, _emit),))
