"""FusedMC2: the whole block in one operator, ``dispatch_ffn_combine`` of vllm-ascend, through our functional wrapper.

The operator dispatches, runs both matmuls with SwiGLU (gate first), and combines with the routing weights. It computes
nothing else, so a block with anything else in it is not legal (``limits/data``). ``max_output_size`` bounds the rows
that it processes; rows past it are dropped silently, so it must cover the proven receive bound.
Sources: facts/vllm_ascend.md §3 (conditions §3.5), facts/cann_ops.md §1.6, facts/versions.md (schema).
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter
from moe_lowering.passes.implementations.base import Implementation, Replacement


def _operators(spec: BlockSpec, soc: str) -> tuple[str, ...]:
    return ("dispatch_ffn_combine",)


def _emit(block: Block, emit: Emitter, deployment: Deployment, quantities: dict[str, Any]) -> Replacement:
    # One operator in place of three: it stands where the last of its inputs exists.
    w13, w2, _, _ = block.experts
    with emit.at(block.combine, block.combine):
        fused = emit.call(
            torch.ops.moe_lowering.dispatch_ffn_combine.default, emit.rows(block.x), list(w13), list(w2),
            emit.rows(block.ids), emit.rows(block.weights), deployment.mc2_group, block.spec.ep_size,
            quantities["max_output_size"],
        )  # fmt: skip
        y = emit.item(fused, 0)
        counts = emit.cast(emit.item(fused, 1), torch.int64) if block.counts is not None else None
        return Replacement(emit.like(y, block.x), counts)


FUSED_MC2 = Implementation("fused_mc2", _operators, _emit)
