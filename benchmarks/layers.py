"""One MoE layer of any size and weight format, lowered without a device: what ``costs.py`` counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_lowering import moe_experts, testing
from moe_lowering.passes.emission.emitter import MARK, is_emitted
from moe_lowering.vocabulary import EXPERT_FORMATS


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer; those of a decode step of DeepSeek-V3 unless told otherwise. ``tokens`` are of one rank, and
    ``routing`` is the dtype of the routing weights."""

    tokens: int = 128
    hidden: int = 7168
    intermediate: int = 2048
    experts: int = 256
    top_k: int = 8
    dtype: torch.dtype = torch.bfloat16
    routing: torch.dtype = torch.float32


def scale_dtypes(quantisation: str, comm: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of w13's and w2's scales that the implementation takes as they are: others are cast in every forward."""
    if EXPERT_FORMATS[quantisation].bits_of_scales:
        return torch.int64, torch.int64  # as bits
    if EXPERT_FORMATS[quantisation].weight_only:
        return dtype, dtype
    return torch.float32, torch.float32 if comm == "fused_mc2" else dtype


def experts_of(sizes: LayerSizes, quantisation: str, comm: str, local: int) -> dict[str, Tensor]:
    """The experts of one rank."""
    form = EXPERT_FORMATS[quantisation]
    kind = getattr(torch, form.weight_dtype) if form.weight_dtype else sizes.dtype
    found: dict[str, Tensor] = {}
    shapes = ((sizes.hidden, 2 * sizes.intermediate), (sizes.intermediate, sizes.hidden))
    for name, (rows, columns), scale in zip(
        ("w13", "w2"), shapes, scale_dtypes(quantisation, comm, sizes.dtype), strict=True
    ):
        found[name] = torch.empty(local, rows, columns // form.packed, dtype=kind)
        if form.quantised:
            found[f"{name}_scale"] = torch.empty(local, columns, dtype=scale)
        if form.has_scale_bias:
            found[f"{name}_scale_bias"] = torch.empty(local, columns)
    return found


def lower_layer(
    sizes: LayerSizes, comm: str, ep_size: int, quantisation: str = "none", mask: bool = False, **fields: Any
) -> testing.Lowered:
    """One layer lowered to ``comm`` on rank 0 of ``ep_size``; its router is not part of it.

    Args:
        fields: of ``Deployment``.
    """
    with testing.fake_deployment(ep_size=ep_size, **{"hccl_buffer_mb": 6140, "soc": "A3", **fields}) as where:
        with testing.fake_tensors():
            given = experts_of(sizes, quantisation, comm, sizes.experts // ep_size)
            x = torch.empty(sizes.tokens, sizes.hidden, dtype=sizes.dtype)
            weights = torch.empty(sizes.tokens, sizes.top_k, dtype=sizes.routing)
            ids = torch.empty(sizes.tokens, sizes.top_k, dtype=torch.int32)
            masks = (torch.empty(sizes.tokens, dtype=torch.bool),) if mask else ()

        def run(x: Tensor, weights: Tensor, ids: Tensor, *masks: Tensor) -> Tensor:
            found: dict[str, Any] = {"mask": masks[0]} if masks else {}
            return moe_experts(x, weights, ids, quantisation=quantisation, deployment=where, **found, **given)

        return testing.lower_graph(run, x, weights, ids, *masks, deployment=where, comm=comm, strict=True)


def emitted(lowered: testing.Lowered) -> tuple[list[Node], list[Node]]:
    """The nodes that the pass made for the layer, and the constants that all layers of a graph share."""
    made = [node for node in lowered.gm.graph.nodes if is_emitted(node)]
    constants = [node for node in made if node.meta["custom"][MARK] == "constant"]
    return [node for node in made if node not in constants], constants
