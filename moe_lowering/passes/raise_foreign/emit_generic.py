"""A layer that others wrote, as generic operators: dispatch, grouped_mlp, combine, in front of the result that they replace."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.custom_ops.combine import CombineCall
from moe_lowering.custom_ops.dispatch import DispatchCall
from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.emitter import Emitter, aten
from moe_lowering.passes.raise_foreign.records import ForeignBlock, Weights
from moe_lowering.passes.verifier import VerificationError

OPS = torch.ops.moe_lowering
_NAMES = ("rows", "row_scale", "counts", "handle")


@dataclasses.dataclass(frozen=True)
class Generic:
    """The nodes of a layer in generic form; ``result`` stands for the result of the foreign one."""

    dispatch: Node
    combine: Node
    result: Node


def emit_generic(block: ForeignBlock, emit: Emitter, deployment: Deployment) -> Generic:
    """Emits a block in front of its result. The fake kernels of the generic operators refuse what does not fit."""
    with emit.at(block.result, block.result):
        return _emit(block, emit, deployment)


def _emit(block: ForeignBlock, emit: Emitter, deployment: Deployment) -> Generic:
    dtype = block.out_dtype or block.w2.nodes[0].meta["val"].dtype
    result = block.result.meta["val"]
    x = emit.rows(block.x)
    if block.x_scale is None:
        x = emit.cast(x, dtype)
    top_k = int(block.ids.meta["val"].shape[-1])
    ids, weights = (_by_token(emit, node, x, top_k) for node in (block.ids, block.weights))
    ids, weights = emit.cast(ids, torch.int32), emit.cast(weights, torch.float32)
    if block.weigh_input:
        weighted = emit.call(aten.mul.Tensor, x, weights)
        x = emit.cast(weighted, dtype)
        weights = emit.call(aten.ones_like.default, weights)
    places: dict[str, Any] = {
        "num_experts": block.num_experts,
        "ep_group": block.ep_group,
        "ep_size": block.ep_size,
        "tp_group": block.tp_group,
        "tp_size": block.tp_size,
        "max_tokens": deployment.token_bound,
    }
    sent = DispatchCall[Any](x, block.x_scale, ids, block.mask, **places, max_rows=deployment.max_rows)
    dispatch = emit.call(OPS.dispatch.default, *_given(sent))
    rows, row_scale, counts, handle = (emit.call(operator.getitem, dispatch, index) for index, _ in enumerate(_NAMES))
    mlp = emit.call(OPS.grouped_mlp.default, *_given(_mlp_call(block, emit, rows, row_scale, counts)))
    back = CombineCall[Any](mlp, weights, ids, handle, block.mask, **places)
    combine = emit.call(OPS.combine.default, *_given(back))
    y = combine
    if y.meta["val"].dim() != result.dim():
        y = emit.call(aten.reshape.default, y, _shape(block, emit, result))
    y = emit.cast(y, result.dtype)
    if block.base is not None:
        y = emit.call(aten.add.Tensor, block.base, y)
    return Generic(dispatch, combine, y)


def _shape(block: ForeignBlock, emit: Emitter, result: torch.Tensor) -> list[Any]:
    """The result's sizes; one that is a symbol is that of an operand."""
    shape: list[Any] = []
    for size in result.shape:
        if isinstance(size, int):
            shape.append(size)
            continue
        same = (
            (node, at)
            for node in (block.x, block.ids)
            for at, other in enumerate(node.meta["val"].shape)
            if size_key(other) == size_key(size)
        )
        found = next(same, None)
        if found is None:
            raise VerificationError(f"{block.result.name} has size {size}, which none of x and ids has")
        shape.append(emit.size(*found))
    return shape


def _mlp_call(block: ForeignBlock, emit: Emitter, rows: Node, row_scale: Node, counts: Node) -> GroupedMlpCall[Node]:
    call = GroupedMlpCall[Node](
        rows,
        row_scale,
        counts,
        _matrices(emit, block.w13),
        _matrices(emit, block.w2),
        _biases(emit, block),
        [*block.w2_bias],
        block.activation,
        block.limit,
        block.alpha,
        block.interleaved,
    )
    if block.quantisation == "none":
        return call
    lists: dict[str, Any] = {
        name: [*getattr(block, name)] or None
        for name in ("w13_scale", "w2_scale", "w13_offset", "w2_offset", "w13_scale_bias", "w2_scale_bias")
    }
    return call._replace(quantisation=block.quantisation, out_dtype=block.out_dtype, **lists)


def _given(call: Any) -> tuple[Any, ...]:
    """The arguments of a call without defaults at its end, as a graph has them."""
    given = [*call]
    defaults = type(call)._field_defaults
    while call._fields[len(given) - 1] in defaults and given[-1] == defaults[call._fields[len(given) - 1]]:
        given.pop()
    return tuple(given)


def _matrices(emit: Emitter, weights: Weights) -> list[Node]:
    nodes = [*weights.nodes]
    if weights.transposed:
        nodes = [emit.call(aten.transpose.int, node, -2, -1) for node in nodes]
    return [emit.call(aten.cat.default, nodes, -1)] if weights.joined else nodes


def _biases(emit: Emitter, block: ForeignBlock) -> list[Node]:
    biases = [*block.w13_bias]
    return [emit.call(aten.cat.default, biases, -1)] if block.w13.joined and biases else biases


def _by_token(emit: Emitter, node: Node, x: Node, top_k: int) -> Node:
    """What has one element for each slot, by token, as [T, k]."""
    if node.meta["val"].dim() == 2:
        return node
    return emit.call(aten.reshape.default, node, [emit.size(x, 0), top_k])
