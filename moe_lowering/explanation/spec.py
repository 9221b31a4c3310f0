"""``BlockSpec`` of a ``BlockDescription``: the record that the pass would make if the layer stood in a graph."""

from __future__ import annotations

import dataclasses

from moe_lowering.deployment import Deployment
from moe_lowering.explanation.description import BlockDescription
from moe_lowering.passes.block_specs import Layer, spec_of_layer
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.vocabulary import EXPERT_FORMATS


def block_spec(block: BlockDescription, deployment: Deployment, tokens: int) -> BlockSpec:
    """The block at T = ``tokens`` on a rank with routed experts, its weights as ``shard_experts`` and
    ``quantise_experts`` lay them out."""
    layer = Layer(
        hidden=block.hidden,
        intermediate=block.intermediate,
        experts=block.experts,
        top_k=block.top_k,
        dtype=block.dtype,
        activation=block.activation,
        limit=block.limit,
        alpha=block.alpha,
        interleaved=block.interleaved,
        has_bias=block.has_bias,
        routing_dtype=block.routing_dtype,
    )
    laid_out = deployment.ep_size > 1 or EXPERT_FORMATS[block.quantisation].quantised
    return dataclasses.replace(
        spec_of_layer(layer, deployment, tokens, block.quantisation),
        weights_contiguous=block.weights_contiguous or laid_out,
    )
