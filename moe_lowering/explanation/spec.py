"""The record that the pass would make of a described block in a graph."""

from __future__ import annotations

import torch

from moe_lowering.custom_ops.quantised import WEIGHT_DTYPES
from moe_lowering.deployment import Deployment
from moe_lowering.explanation.description import BlockDescription
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.operands import Experts, Operand, Operands
from moe_lowering.vocabulary import EXPERT_FORMATS


def spec_of(block: BlockDescription, deployment: Deployment, tokens: int) -> BlockSpec:
    """The block at T = ``tokens`` on a rank with routed experts, with weights as ``shard_experts`` and
    ``quantise_experts`` lay them out."""
    form = EXPERT_FORMATS[block.quantisation]
    return BlockSpec(
        tokens=tokens,
        hidden=block.hidden,
        intermediate=block.intermediate,
        top_k=block.top_k,
        experts=block.experts,
        local_experts=block.experts // deployment.routed_ranks,
        ep_size=deployment.ep_size,
        ep_group=deployment.ep_group,
        tp_size=deployment.tp_size,
        tp_group=deployment.tp_group,
        max_tokens=deployment.token_bound,
        max_rows=deployment.max_rows,
        shared_expert_ranks=deployment.shared_expert_ranks,
        shared_experts=deployment.shared_experts,
        on_shared_rank=False,  # a decision must not depend on which rank this is
        dtype=block.dtype,
        weight_dtype=_weight_dtype(block),
        activation=block.activation,
        limit=block.limit,
        alpha=block.alpha,
        interleaved=block.interleaved,
        stacked=True,
        weights_contiguous=block.weights_contiguous or deployment.ep_size > 1 or form.quantised,
        has_bias=block.has_bias,
        has_mask=False,
        quantised_input=False,
        counts_are_read=False,
        scopes_differ=False,
        key=(),
        quantisation=block.quantisation,
        scale_dtypes=_scale_dtypes(block) if form.quantised else (),
        scale_dims=2 if form.quantised else 0,
        has_offset=form.has_offset,
        has_scale_bias=form.has_scale_bias,
        tensors=_tensors(block, deployment),
    )


def _weight_dtype(block: BlockDescription) -> torch.dtype:
    return WEIGHT_DTYPES.get(block.quantisation, block.dtype)


def _scale_dtypes(block: BlockDescription) -> tuple[torch.dtype, torch.dtype]:
    """Of the first and the second matmul, as ``quantise_experts`` makes them: bfloat16 for results in it, where the format
    has such scales."""
    form = EXPERT_FORMATS[block.quantisation]
    first = block.dtype if form.weight_only else torch.float32
    second = block.dtype if block.dtype == torch.bfloat16 and "bfloat16" in form.scale_dtypes else first
    return first, second


def _tensors(block: BlockDescription, deployment: Deployment) -> Experts:
    """The experts' tensors on one rank: stacked, contiguous, stored."""
    experts = block.experts // deployment.routed_ranks
    form, weight = EXPERT_FORMATS[block.quantisation], _weight_dtype(block)
    made: dict[str, Operands] = {}
    shapes = {"w13": (block.hidden, 2 * block.intermediate), "w2": (block.intermediate, block.hidden)}
    for (name, (inner, width)), scale in zip(shapes.items(), _scale_dtypes(block), strict=True):
        beside = {
            "bias": block.dtype if block.has_bias else None,
            "scale": scale if form.quantised else None,
            "offset": scale if form.has_offset else None,
            "scale_bias": torch.float32 if form.has_scale_bias else None,
        }
        made[name] = Operands(1, (Operand((experts, inner, width // form.packed), weight),))
        for kind, dtype in beside.items():
            if dtype is not None:
                made[f"{name}_{kind}"] = Operands(1, (Operand((experts, width), dtype),))
    return Experts(**made)
