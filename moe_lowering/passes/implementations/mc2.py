"""MC2: ``npu_moe_distribute_dispatch_v2`` > MLP > ``npu_moe_distribute_combine_v2``.

The operators order rows by local expert, source rank and token, like the generic ``dispatch``, and allocate the same
bound ``ep * max_tokens * min(k, E_local)``. Rows past the received ones are undefined; ``combine`` never reads them.
When T may differ between ranks, ``global_bs = max_tokens * ep`` says so; a mask and ``global_bs`` exclude each other.
Auxiliary tensors go from dispatch to combine untouched. On A2 both ends take the routing weights.
Sources: facts/cann_ops.md §1.1, §1.2, §2.1, §2.3; facts/vllm_ascend.md §2.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import has_side_effect

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter
from moe_lowering.passes.implementations.base import Implementation, Replacement, stage_after
from moe_lowering.passes.implementations.mlp import emit_mlp, mlp_operators


def _operators(spec: BlockSpec, soc: str) -> tuple[str, ...]:
    return ("npu_moe_distribute_dispatch_v2", *mlp_operators(spec, soc), "npu_moe_distribute_combine_v2")


def _emit(block: Block, emit: Emitter, deployment: Deployment, quantities: dict[str, Any]) -> Replacement:
    _keep_communication()
    spec = block.spec
    on_a2 = deployment.soc == "A2"
    group = (deployment.mc2_group, spec.ep_size, deployment.ep_rank, spec.experts)
    global_bs = spec.max_tokens * spec.ep_size
    start = stage_after(block, block.weights) if on_a2 else block.dispatch
    with emit.at(start, block.dispatch):
        x, ids = emit.rows(block.x), emit.rows(block.ids)
        scales = {"expert_scales": emit.rows(block.weights)} if on_a2 else {}
        sent = emit.call(
            torch.ops.npu.npu_moe_distribute_dispatch_v2.default, x, ids, *group,
            **scales, global_bs=global_bs, expert_token_nums_type=1,
        )  # fmt: skip
        rows, _, assist, counts, received = (emit.item(sent, i) for i in range(5))
        expand = {"expand_scales": emit.item(sent, 6)} if on_a2 else {}
    with emit.at(max(block.mlp, start), block.mlp):
        y_rows = emit_mlp(emit, block, rows, counts, deployment.soc)
    with emit.at(block.combine, block.combine):
        y = emit.call(
            torch.ops.npu.npu_moe_distribute_combine_v2.default, y_rows, ids, assist, received,
            emit.rows(block.weights), *group, **expand, global_bs=global_bs,
        )  # fmt: skip
        return Replacement(emit.like(y, block.x), counts)


def _keep_communication() -> None:
    """torch_npu does not mark its communication operators: an unused dispatch would be dropped on one rank only."""
    for op in (torch.ops.npu.npu_moe_distribute_dispatch_v2, torch.ops.npu.npu_moe_distribute_combine_v2):
        has_side_effect(op.default)


MC2 = Implementation("mc2", _operators, _emit)
