"""Builds ``BlockSpec``, the record that decisions about a block are made from: of a block in a graph, or of a described layer.

Both ways stand side by side, so that ``explain`` judges what the pass would judge: what follows from the experts' tensors is
derived from those, and what a deployment fixes is read under the same names.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from moe_lowering.custom_ops.dispatch import DispatchCall
from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.custom_ops.quantised import WEIGHT_DTYPES
from moe_lowering.custom_ops.sizes import token_count
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec, shape_key
from moe_lowering.passes.operands import ExpertOperands, Operand, Operands
from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS

# What ``dispatch`` is told of a deployment, under the same names in both; but for ``max_tokens``.
_OF_DEPLOYMENT = (
    "ep_size",
    "ep_group",
    "tp_size",
    "tp_group",
    "max_rows",
    "shared_expert_ranks",
    "shared_experts",
)


class Surroundings(NamedTuple):
    """What a block's record says of the graph around it; the names are those of ``BlockSpec``."""

    counts_are_read: bool = False
    counts_read_before_combine: bool = False
    counts_read_before_weights: bool = False
    scopes_differ: bool = False
    collective_groups: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Layer:
    """An MoE layer on all ranks, without its weights' formats. ``limit`` is 0 for an activation that has none;
    ``routing_dtype`` is that of the routing weights."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: torch.dtype
    activation: str
    limit: float
    alpha: float
    interleaved: bool = False
    has_bias: bool = False
    routing_dtype: torch.dtype = torch.float32


def spec_of_graph(
    call: DispatchCall[torch.Tensor],
    weights: torch.Tensor,
    mlp: GroupedMlpCall[Any],
    tensors: ExpertOperands,
    around: Surroundings,
) -> BlockSpec:
    """Of a block in a graph.

    Args:
        call: the values of its dispatch; of ``x_scale`` only whether there is one.
        weights: the value of the routing weights.
        mlp: the call of its ``grouped_mlp``, of which words and numbers are read.
        tensors: the experts' tensors of this rank.
    """
    local_experts = call.placement.local_experts
    if call.on_shared_rank:
        tensors = tensors.of_routed_rank(local_experts)
    return BlockSpec(
        tokens=token_count(call.x.shape),
        hidden=int(call.x.shape[-1]),
        top_k=int(call.ids.shape[-1]),
        experts=call.num_experts,
        local_experts=local_experts,
        max_tokens=call.max_tokens,
        on_shared_rank=call.on_shared_rank,
        dtype=mlp.out_dtype or call.x.dtype,
        activation=mlp.activation,
        limit=mlp.limit,
        alpha=mlp.alpha,
        interleaved=mlp.interleaved,
        has_mask=call.mask is not None,
        quantised_input=call.x_scale is not None,
        has_x_smooth=call.x_smooth is not None,
        zero_experts=call.zero_experts,
        routing_dtype=weights.dtype,
        has_h_smooth=mlp.h_smooth is not None,
        has_h_clip=mlp.h_clip is not None,
        key=tuple(None if v is None else shape_key(v) for v in (call.x, call.ids, weights, call.mask)),
        quantisation=mlp.quantisation,
        **{name: getattr(call, name) for name in _OF_DEPLOYMENT},
        **_facts_of(tensors),
        **around._asdict(),
    )


def spec_of_layer(
    layer: Layer, deployment: Deployment, tokens: int, quantisation: str, tensors: ExpertOperands | None = None
) -> BlockSpec:
    """Of a layer that is described, on a rank with routed experts, with ``tokens`` of a rank and the given experts' tensors
    of that rank; without them as ``shard_experts`` and ``quantise_experts`` lay them out."""
    local_experts = layer.experts // deployment.routed_ranks
    return BlockSpec(
        tokens=tokens,
        hidden=layer.hidden,
        top_k=layer.top_k,
        experts=layer.experts,
        local_experts=local_experts,
        max_tokens=deployment.token_bound,
        on_shared_rank=False,  # whichever rank asks: a decision must not depend on it
        dtype=layer.dtype,
        activation=layer.activation,
        limit=layer.limit,
        alpha=layer.alpha,
        interleaved=layer.interleaved,
        has_mask=False,
        quantised_input=False,
        routing_dtype=layer.routing_dtype,
        key=(),
        quantisation=quantisation,
        **{name: getattr(deployment, name) for name in _OF_DEPLOYMENT},
        **_facts_of(tensors or _tensors_of(layer, local_experts, quantisation)),
        **Surroundings()._asdict(),
    )


def _facts_of(tensors: ExpertOperands) -> dict[str, Any]:
    """The fields of ``BlockSpec`` that follow from the experts' tensors."""
    w13, w2 = tensors.w13, tensors.w2
    scales = [each for each in (tensors.w13_scale, tensors.w2_scale) if each]
    return {
        "intermediate": w2.first.shape[-2],
        "weight_dtype": w13.first.dtype,
        "stacked": w13.stacked and w2.stacked,
        "weights_contiguous": all(w.is_contiguous() for w in (*w13.kinds, *w2.kinds)),
        "has_bias": bool(tensors.w13_bias or tensors.w2_bias),
        "scale_dtypes": tuple(scale.first.dtype for scale in scales),
        "scale_dims": max((scale.first.dim() + (scale.count > 1) for scale in scales), default=0),
        "has_offset": bool(tensors.w13_offset or tensors.w2_offset),
        "has_scale_bias": bool(tensors.w13_scale_bias and tensors.w2_scale_bias),
        "mixed_forms": w13.first.dim() != w2.first.dim(),
        "tensors": tensors,
    }


def _tensors_of(layer: Layer, experts: int, quantisation: str) -> ExpertOperands:
    """The experts' tensors as ``quantise_experts`` and ``shard_experts`` lay them out: stacked, contiguous, stored."""
    form, dtype = EXPERT_FORMATS[quantisation], layer.dtype
    weight = WEIGHT_DTYPES.get(quantisation, dtype)
    first_scale = dtype if form.weight_only else torch.float32
    # as ``quantise_experts`` makes them: bfloat16 for results in it, where the format has such scales
    second_scale = dtype if dtype == torch.bfloat16 and "bfloat16" in form.scale_dtypes else first_scale
    tensors: dict[str, Operands] = {}
    for name, inner, width, scale in (
        ("w13", layer.hidden, ACTIVATIONS[layer.activation].parts * layer.intermediate, first_scale),
        ("w2", layer.intermediate, layer.hidden, second_scale),
    ):
        tensors[name] = Operands(1, (Operand((experts, inner, width // form.packed), weight),))
        for beside, beside_dtype, is_there in (
            ("bias", dtype, layer.has_bias),
            ("scale", scale, form.quantised),
            ("offset", scale, form.has_offset),
            ("scale_bias", torch.float32, form.has_scale_bias),
        ):
            if is_there:
                tensors[f"{name}_{beside}"] = Operands(1, (Operand((experts, width), beside_dtype),))
    return ExpertOperands(**tensors)
